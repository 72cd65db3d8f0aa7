"""Erasing images from artefacts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.ground.errors import Conflict, NotFound
from hashdist.ground.ids import image_id
from hashdist.ground.schema import OK, slug
from hashdist.index.change import checked_keys
from hashdist.store import Store, open_store
from hashdist.store.arrays import read_array
from hashdist.store.commit import (
    MANIFEST,
    REWRITES,
    Artefact,
    create_record,
    named_files,
    now,
    read_record,
    read_table,
    write_table,
)

TABLES = ("collections", "features", "codes")
"""Kinds of artefacts that are tables with a row an image."""

ERASED = "erased.json"
"""Record of an artefact that is being deleted whole."""

_SALTS = 8  # an id is a key's with one of these salts; more than one collision in a row does not happen
_TRIES = 8


class Artefacts(NamedTuple):
    """Outcome of a purge for the artefacts of a root.

    Attributes:
        rewritten: that were written again without the images.
        deleted: that were deleted whole.
        runs: training runs that were deleted.
        files: files that were deleted.
    """

    rewritten: int
    deleted: int
    runs: int
    files: int


def erase(root_uri: str, keys: Sequence[str], reason: str = "", purge_id: str = "") -> Artefacts:
    """Erase images from the artefacts and training runs of a root. Run again after a failure, it finishes.

    Reads the id column of every table; memory for one file of an artefact.

    Args:
        root_uri: of the artefacts.
        keys: of the images.
        reason: stands in the records for ever; names no image.
        purge_id: likewise; a new one by default.

    Raises Conflict where another purge of the same artefact was always first.
    """
    images = _Images(frozenset(checked_keys(keys, distinct=False)))
    about = {"id": purge_id or uuid4().hex, "reason": reason}
    root = open_store(root_uri)
    done = Counter(rewritten=0, deleted=0, runs=0, files=0)
    for artefact in _artefacts(root, TABLES):
        manifest = _committed(artefact)
        if manifest is not None and not images.keys & manifest.get("salts", {}).keys():
            done.update(rewritten=int(_rewrite(artefact, images, about)), files=_delete_old(artefact, images))
        elif manifest is not None or _left_over(artefact) or _holds(artefact.store, images, _data(artefact.store)):
            done.update(deleted=1, files=_delete_whole(artefact.store))
    graphs = [artefact for artefact in _artefacts(root, ["graphs"]) if _graph_holds(artefact, images)]
    if graphs:  # the graphs last: by them the runs are found
        for run in _runs_of(root, {graph.name for graph in graphs}):
            done.update(runs=1, files=_delete_whole(run))
    for graph in graphs:
        done.update(deleted=1, files=_delete_whole(graph.store))
    return Artefacts(**done)


@dataclass(frozen=True)
class _Images:
    """The images to be erased."""

    keys: frozenset[str]

    @property
    def ids(self) -> NDArray[np.int64]:
        """Every id that they may have, ascending."""
        return np.unique([image_id(key, salt) for key in self.keys for salt in range(_SALTS)]).astype(np.int64)

    def rows(self, ids: NDArray[np.int64], keys: Any) -> NDArray[np.int64]:
        """Rows of a table that are theirs. `keys` gives the keys of some rows."""
        near = np.flatnonzero(np.isin(ids, self.ids))
        return near[[key in self.keys for key in keys(near)]] if len(near) else near

    def in_bytes(self, data: bytes) -> bool:
        """Whether a file holds a key or an id of theirs, byte by byte."""
        needles = [key.encode() for key in self.keys] + [int(id_).to_bytes(8, "little") for id_ in self.ids]
        return any(needle in data for needle in needles)


def _artefacts(root: Store, kinds: Iterable[str]) -> Iterator[Artefact]:
    for kind in kinds:
        names = {entry.name.partition("/")[0] for entry in root.child(kind).list() if "/" in entry.name}
        for name in sorted(names):
            yield Artefact(root, kind, name)


def _committed(artefact: Artefact) -> dict[str, Any] | None:
    """Its manifest; None while it is unfinished or being deleted."""
    if _left_over(artefact):
        return None
    try:
        return artefact.manifest()
    except NotFound:
        return None


def _left_over(artefact: Artefact) -> bool:
    return artefact.store.exists(ERASED)


def _data(store: Store) -> list[str]:
    return [entry.name for entry in store.list("data/")]


def _holds(store: Store, images: _Images, names: Sequence[str]) -> bool:
    """Whether any of these files holds an image, byte by byte: tables are written without compression."""
    return any(images.in_bytes(store.get(name)) for name in names)


def _graph_holds(graph: Artefact, images: _Images) -> bool:
    manifest = _committed(graph)
    if manifest is None:
        return _left_over(graph) or _holds(graph.store, images, _data(graph.store))
    ids = read_array(graph.store, manifest["files"]["ids"])
    return bool(np.isin(images.ids, ids).any())


def _runs_of(root: Store, graphs: set[str]) -> list[Store]:
    """Training runs on these graphs, and those whose graph nothing tells, since they are unfinished."""
    made_from = {}
    for model in _artefacts(root, ["models"]):
        manifest = _committed(model)
        made_from[model.name] = manifest["inputs"].get("graphs", {}).get("digest") if manifest else None
    names = {entry.name.partition("/")[0] for entry in root.child("runs").list() if "/" in entry.name}
    return [root.child(f"runs/{name}") for name in sorted(names) if made_from.get(name) in {*graphs, None}]


# Deleting whole


def _delete_whole(store: Store) -> int:
    """Delete an artefact or run: the manifest first, so that no reader starts, then records, then data.

    The record of the deletion comes before all and goes after all, so that a second call finishes what a first began.
    """
    names = [entry.name for entry in store.list() if entry.name != ERASED]
    create_record(store, ERASED, {"kind": "erased", "created_at": now()})
    folders = ("data/", "states/", "ray/")
    store.delete(MANIFEST)
    store.delete_all(name for name in names if not name.startswith(folders))
    store.delete_all(name for name in names if name.startswith(folders))
    store.delete(ERASED)
    return len(names)


# Writing again


def _rewrite(artefact: Artefact, images: _Images, about: Mapping[str, Any]) -> bool:
    """Write the files again that hold an image, and commit that; whether there were any."""
    for _ in range(_TRIES):
        artefact = Artefact.at(artefact.store, artefact.kind, artefact.name)
        written = _Written.of(artefact, images)
        if not written.files:
            return False
        number = len(list(artefact.store.list(REWRITES))) + 1
        record = {
            "kind": "rewrite",
            "purge": {**about, "images": written.images},
            "files": written.files,
            "changed": written.changed,
            "delete": sorted(written.files),
            "created_at": now(),
        }
        if create_record(artefact.store, f"{REWRITES}{number:08d}.json", record)[1]:
            return True
    raise Conflict(f"{artefact.uri}: another purge was first in {_TRIES} tries; run again")


def _delete_old(artefact: Artefact, images: _Images) -> int:
    """Delete what records of erasures say, and files of lost attempts that hold an image; returns how many."""
    records = [read_record(artefact.store, entry.name) for entry in artefact.store.list(REWRITES)]
    there = _data(artefact.store)
    gone = {path for record in records for path in record["delete"]}
    artefact = Artefact.at(artefact.store, artefact.kind, artefact.name)
    named = {entry["path"] for entry in named_files(artefact.manifest())}
    lost = [name for name in there if name not in gone | named and _holds(artefact.store, images, [name])]
    old = [name for name in there if name in gone]
    artefact.store.delete_all([*old, *lost])
    return len(old) + len(lost)


@dataclass(frozen=True)
class _Written:
    """An artefact's tables without the images.

    Attributes:
        files: new entries, by the path of the old ones.
        changed: fields of the manifest that are others now.
        images: how many it held.
    """

    files: dict[str, dict[str, Any]]
    changed: dict[str, Any]
    images: int

    @classmethod
    def of(cls, artefact: Artefact, images: _Images) -> "_Written":
        """Write the tables again that hold one."""
        manifest = artefact.manifest()
        files: dict[str, dict[str, Any]] = {}
        gone: list[pa.Table] = []
        for entry in manifest["files"]:
            rows = _rows(artefact.store, entry, images)
            if len(rows):
                files[entry["path"]], removed = _without(artefact, entry, rows)
                gone.append(removed.select(["status", "reason"]))
        changed = _counts(manifest, pa.concat_tables(gone)) if gone else {}
        units, parts, more = _units(artefact, manifest, images)
        if more:
            changed |= {"units": units, "parts": parts}
        return cls({**files, **more}, changed, sum(len(table) for table in gone))


def _rows(store: Store, entry: Mapping[str, Any], images: _Images) -> NDArray[np.int64]:
    ids = read_table(store, entry, ["id"])["id"].to_numpy()
    return images.rows(ids, lambda rows: read_table(store, entry, ["key"])["key"].take(pa.array(rows)).to_pylist())


def _without(
    artefact: Artefact, entry: Mapping[str, Any], rows: NDArray[np.int64], row_group_rows: int = 65_536
) -> tuple[dict[str, Any], pa.Table]:
    """The entry of a table without these rows, and the rows."""
    table = read_table(artefact.store, entry)
    rest = table.take(pa.array(np.delete(np.arange(len(table)), rows)))
    name = artefact.new_name(".parquet")
    return write_table(artefact.store, name, rest, row_group_rows=row_group_rows), table.take(pa.array(rows))


def _counts(manifest: Mapping[str, Any], gone: pa.Table) -> dict[str, Any]:
    """Rows, failures and their reasons without these rows."""
    bad = gone.filter(pc.not_equal(gone["status"], OK))
    changed: dict[str, Any] = {"rows": manifest["rows"] - len(gone), "failed": manifest["failed"] - len(bad)}
    kinds = Counter(slug(reason) for reason in bad["reason"].to_pylist() if reason is not None)
    for name in ("reasons", "unreadable"):
        if name in manifest:
            left = Counter(manifest[name])
            left.subtract(kinds)
            changed[name] = {kind: count for kind, count in left.items() if count > 0}
    return changed


def _units(
    artefact: Artefact, manifest: Mapping[str, Any], images: _Images
) -> tuple[list[dict[str, Any]], list[dict[str, int]], dict[str, dict[str, Any]]]:
    """Units and parts of a collection without the images, and the new files of units by the path of the old ones."""
    files: dict[str, dict[str, Any]] = {}
    units, parts = [dict(unit) for unit in manifest.get("units", ())], list(manifest.get("parts", ()))
    part_rows = max([part["rows"] for part in parts], default=1)
    for number, unit in enumerate(units):
        gone = _rows(artefact.store, unit["file"], images)
        if len(gone):
            path = unit["file"]["path"]
            files[path], _ = _without(artefact, unit["file"], gone, max(1, part_rows))
            units[number] = {**unit, "file": files[path], "rows": unit["rows"] - len(gone)}
            parts = [_part(part, gone) if part["unit"] == number else part for part in parts]
    return units, parts, files


def _part(part: dict[str, int], gone: NDArray[np.int64]) -> dict[str, int]:
    """A run of a unit's rows, by the numbers that they have without these."""
    first, last = (place - int((gone < place).sum()) for place in (part["first"], part["first"] + part["rows"]))
    return {**part, "first": first, "rows": last - first}
