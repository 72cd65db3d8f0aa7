"""Rows of the difference, read and encoded in this process."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.collection.readers.reader import SCANNED, Lost, Reader, content_digest
from hashdist.ground.schema import OK, UNREADABLE, UNUSABLE, slug
from hashdist.reindex.difference import Difference
from hashdist.reindex.find import AT_ONCE, Increment
from hashdist.store.commit import Artefact

if TYPE_CHECKING:  # brings torch with it, which a listing does without
    from hashdist.models.model import Model

SAMPLE = 32
"""Images that are encoded first, to tell how long the others will take."""

_NOT_FINITE = "not-finite"


ENCODED = pa.schema(
    [
        pa.field("key", pa.large_string()),
        *(SCANNED.field(name) for name in ("digest", "labels", "size", "stamp", "names")),
    ]
)
"""Columns of an image beside its code: `names` are labels given as text."""

Row = dict[str, Any]


@dataclass
class Encoded:
    """Images of an increment that are encoded so far, and notes about the others.

    Attributes:
        rows: ENCODED, of those that have a code.
        codes: theirs, uint8 [n, W].
        features: theirs, [n, D], where they are asked for.
        notes: SEEN, about those that have no code, or need none.
        failed: how many have none, by reason.
        vocabulary: numbers of labels given as text, where `rows` has numbers already.
        artefact: the committed codes that `codes` come from, if they do.
    """

    rows: list[pa.Table] = field(default_factory=list)
    codes: list[NDArray[np.uint8]] = field(default_factory=list)
    features: list[NDArray[Any]] = field(default_factory=list)
    notes: list[Row] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    vocabulary: dict[str, int] | None = None
    artefact: Artefact | None = None

    def same(self, row: Row, digest: str) -> None:
        """An image whose row is right as it is."""
        self._note(row, digest, OK, None)

    def bad(self, row: Row, digest: str | None, reason: str) -> None:
        """An image that no code can be made of."""
        kind = slug(reason)
        self.failed[kind] += 1
        self._note(row, digest, UNUSABLE if kind == _NOT_FINITE else UNREADABLE, reason)

    def _note(self, row: Row, digest: str | None, status: str, reason: str | None) -> None:
        about = {name: row[name] for name in ("id", "key", "size", "stamp")}
        self.notes.append({**about, "digest": digest, "status": status, "reason": reason})


def rows_to_read(change: Difference) -> pa.Table:
    """The images that are new or touched, in the order in which their sources are read."""
    new = change.new.append_column("indexed_digest", pa.nulls(len(change.new), pa.string()))
    rows = pa.concat_tables([change.touched, new])
    in_files = "source" in rows.column_names
    return rows.sort_by([("source", "ascending"), ("position", "ascending")]) if in_files else rows


def differing(increment: Increment, rows: pa.Table, encoded: Encoded) -> pa.Table:
    """Those of the rows that are new, or whose bytes differ; the others are noted in `encoded`."""
    if "digest" in rows.column_names:  # of parquet files and tars, which were read for it
        fine = pc.equal(rows["status"], OK)
        for row in rows.filter(pc.invert(fine)).to_pylist():
            encoded.bad(row, None, row["reason"])
        same = pc.fill_null(pc.equal(rows["digest"], rows["indexed_digest"]), False)
        for row in rows.filter(pc.and_(fine, same)).to_pylist():
            encoded.same(row, row["digest"])
        return rows.filter(pc.and_(fine, pc.invert(same)))
    indexed = pc.is_valid(rows["indexed_digest"])
    ids = [row["id"] for row, _ in pictures(increment, rows.filter(indexed), encoded)]
    return rows.filter(pc.or_(pc.invert(indexed), pc.is_in(rows["id"], pa.array(ids, pa.int64()))))


def pictures(increment: Increment, rows: pa.Table, encoded: Encoded) -> Iterator[tuple[Row, bytes]]:
    """The images that have to be encoded, with their bytes, each read once; the others are noted in `encoded`.

    `row["digest"]` is that of the bytes that come with it.
    """
    reader = increment.reader() if len(rows) else None
    for start in range(0, len(rows), AT_ONCE):
        some = rows.slice(start, AT_ONCE)
        read = _read_by_key(reader, some) if reader and reader.files_are_images else _read_files(reader, some)
        for row, data in read:
            if isinstance(data, Lost):
                encoded.bad(row, None, data.reason)
                continue
            digest = content_digest(data)
            if digest == row["indexed_digest"]:
                encoded.same(row, digest)
            else:
                yield {**row, "digest": digest}, data


def _read_by_key(reader: Reader, rows: pa.Table) -> Iterator[tuple[Row, bytes | Lost]]:
    for row, image in zip(rows.to_pylist(), reader.read_keys(rows["key"].to_pylist()), strict=True):
        yield {**row, "names": image.more.get("names"), "labels": image.more.get("labels")}, image.data


def _read_files(reader: Reader | None, rows: pa.Table) -> Iterator[tuple[Row, bytes | Lost]]:
    assert reader is not None
    for source in pc.unique(rows["source"]).to_pylist():
        here = rows.filter(pc.equal(rows["source"], source))
        yield from zip(here.to_pylist(), reader.read(here.select(SCANNED.names)), strict=True)


def encode(model: "Model", images: Iterable[tuple[Row, bytes]], encoded: Encoded, *, features: bool) -> int:
    """Encode images in this process; returns how many. A code is the same bits as the stages' own (decision S10)."""
    rows: list[Row] = []

    def passing() -> Iterator[bytes]:
        for row, data in images:
            rows.append(row)
            yield data

    found = model.encode_readable(passing(), keep_features=features)
    good = [number for number, reason in enumerate(found.reasons) if reason is None]
    for row, reason in zip(rows, found.reasons, strict=True):
        if reason is not None:
            encoded.bad(row, row["digest"], reason)
    kept = [{name: rows[number][name] for name in ENCODED.names} for number in good]
    encoded.rows.append(pa.Table.from_pylist(kept, schema=ENCODED))
    encoded.codes.append(found.codes[good])
    if found.features is not None:
        encoded.features.append(found.features[good])
    return len(rows)


def estimate(increment: Increment, images_per_s: float | None = None) -> dict[str, Any]:
    """The plan of a run: counts, bytes and requests that it is going to cost; seconds where a speed is given."""
    change = increment.change
    look = len(change.new) + len(change.touched)
    # four files of a shard, notes about what turns out to be the same, a tombstone, and the manifest
    hides = bool(change.removed or len(change.touched))
    files = 4 * bool(look) + bool(len(change.touched)) + hides + 1 if look or hides else 0
    return {
        "new": len(change.new),
        "touched": len(change.touched),
        "removed": len(change.removed),
        "unchanged": change.unchanged,
        "read_bytes": sum(int(pc.sum(rows["size"]).as_py() or 0) for rows in (change.new, change.touched)),
        "get_requests": look if increment.files_are_images else len(increment.files),
        "put_requests": files,
        "images_per_s": round(images_per_s, 1) if images_per_s else None,
        "seconds": round(look / images_per_s, 6) if images_per_s else None,
    }
