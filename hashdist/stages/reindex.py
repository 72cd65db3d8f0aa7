"""Stage: growth. What was added, changed or removed since the last version of an index, and one commit of it.

Finding the difference and committing it stand here; what encodes the difference in between is in hashdist/growth.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hashdist.errors import InvalidInput
from hashdist.index import Index
from hashdist.schema import OK, from_vectors
from hashdist.snapshots import vectors
from hashdist.store.commit import Artefact, open_artefact, read_table


@dataclass(frozen=True)
class Row:
    """What a listing says about one image."""

    id: int
    digest: str | None
    readable: bool


@dataclass(frozen=True)
class Difference:
    """A collection against an index.

    Attributes:
        added: ids, in the collection, of readable images whose key is not in the index.
        changed: likewise of those whose content digest differs from the indexed one.
        removed: keys that are in the index and not in the collection.
        unreadable: images listed but not readable, now or with these very bytes in an earlier run: those in the index
            stay as they are, the others stay out.
        collection: URI of the listing that was compared.
    """

    added: list[int]
    changed: list[int]
    removed: list[str]
    unreadable: int
    collection: str

    @property
    def to_encode(self) -> list[int]:
        """Ids of the images whose codes are needed."""
        return self.added + self.changed

    @property
    def nothing(self) -> bool:
        """Whether the index is up to date."""
        return not (self.added or self.changed or self.removed)

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return {
            "added": len(self.added),
            "changed": len(self.changed),
            "removed": len(self.removed),
            "unreadable": self.unreadable,
        }


def compare(
    indexed: Mapping[str, str | None],
    listed: Mapping[str, Row],
    collection: str = "",
    failed: Mapping[str, str | None] | None = None,
) -> Difference:
    """The difference, by key and content digest: a pure function.

    Args:
        indexed: content digest by key, of the live rows of the index.
        listed: what the listing says, by key.
        collection: URI of the listing.
        failed: content digest by key of the images that could not be encoded before.

    An image without a digest on either side counts as changed: nothing shows that it is the same.
    """
    added, changed, unreadable = [], [], 0
    failed = failed or {}
    for key, row in listed.items():
        if not row.readable or (row.digest is not None and failed.get(key) == row.digest):
            unreadable += 1
            continue
        if key not in indexed:
            added.append(row.id)
        elif row.digest is None or indexed[key] != row.digest:
            changed.append(row.id)
    removed = [key for key in indexed if key not in listed]
    return Difference(added, changed, removed, unreadable, collection)


def difference(index: Index, collection: Artefact) -> Difference:
    """A committed listing against the version that `index` is at."""
    indexed: dict[str, str | None] = {}
    for table in index.tables(["digest"]):
        indexed.update(zip(table["key"].to_pylist(), table["digest"].to_pylist(), strict=True))
    return compare(indexed, dict(_listed(collection)), collection.uri, _failed(index))


def _failed(index: Index) -> dict[str, str | None]:
    """The images that the codes behind this version could not be made of: content digest by key."""
    found: dict[str, str | None] = {}
    for uri in index.manifest.get("failed_in", []):
        codes = open_artefact(uri, "codes")
        for file in codes.manifest()["files"]:
            table = read_table(codes.store, file, ["key", "digest", "status"])
            table = table.filter(pc.not_equal(table["status"], OK))
            found.update(zip(table["key"].to_pylist(), table["digest"].to_pylist(), strict=True))
    return found


def _listed(collection: Artefact) -> Iterable[tuple[str, Row]]:
    for file in collection.manifest()["files"]:
        table = read_table(collection.store, file, ["id", "key", "digest", "status"])
        columns = (table[name].to_pylist() for name in ("key", "id", "digest", "status"))
        for key, id_, digest, status in zip(*columns, strict=True):
            yield key, Row(id_, digest, status == OK)


def commit(index: Index, change: Difference, codes: Artefact | None) -> Index:
    """Commit a difference as one version: new rows, and tombstones for what changed or is gone.

    Args:
        index: opened as the newest version; rows that another writer brought meanwhile with the same content digest
            are not written again.
        change: what `difference` found.
        codes: committed codes of exactly `change.to_encode`, or None where that is empty. Images that failed to
            encode stay as they are.

    Raises:
        InvalidInput: codes of another model or length, or of other images. Conflict: see `Index.apply`.
    """
    none: dict[str, Any] = {"collection": change.collection, "failed": 0, "inputs": {}}
    if codes is None:
        _require(change, [])
        index.apply(
            np.empty((0, index.bits // 8), np.uint8), [], removed=change.removed, operation="reindex", lineage=none
        )
        return index
    rows = pa.concat_tables(vectors(codes, "code"))
    _require(change, rows["id"].to_pylist())
    good = rows.filter(pc.equal(rows["status"], OK))
    made_from = {
        "inputs": {"codes": {"uri": codes.uri, "digest": codes.name}},
        "failed": len(rows) - len(good),
        "failed_in": [*index.manifest.get("failed_in", []), *([codes.uri] if len(good) < len(rows) else [])],
    }
    index.apply(
        np.asarray(from_vectors(good["code"], good.schema), np.uint8),
        good["key"].to_pylist(),
        good.select(["digest", "labels"]),
        removed=change.removed,
        model=codes.manifest()["model_digest"],
        operation="reindex",
        lineage={**none, **made_from},
    )
    return index


def _require(change: Difference, ids: Iterable[int]) -> None:
    missing = len(set(change.to_encode) ^ set(ids))
    if missing:
        raise InvalidInput(
            f"codes of exactly the {len(change.to_encode)} new and changed images are required, found a set that "
            f"differs in {missing}; encode that difference"
        )
