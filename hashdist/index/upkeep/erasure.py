"""Erasure: images leave every version of an index, and its log stays whole.

Records are immutable, are never deleted, and name no image. So a purge writes every data file again that holds one of
the images and that a kept version, or the candidate, is read from, and commits one version. Its content is the newest
version's without the images. Its `rewrites` name the new file in the place of every old one (`manifest.apply_rewrites`
reads older versions through them), its `erased` counts the rows that older versions lose, and its `purge.delete` lists
the files to delete. Only then are these deleted. A purge that was killed in between is finished by the next one, or by
a vacuum.

- Another writer that commits first: everything is planned again upon what it committed, so what it brought is
  searched too. A writer that adds one of the keys afterwards adds an image like any other.
- Files that only expired versions, former candidates, rewrites or probe sets name, are deleted if they hold an image.
- Files that no record names (of writers that were killed, or are at work) cannot be told apart by what they hold; they
  are counted, and a vacuum collects them.
- Pins do not hold a purge up: readers of older versions that have not opened a file yet get NotFound, and open again.
- The version says why, when and how many. It names no image, and nothing from which one follows.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_ids
from hashdist.index.change import checked_keys
from hashdist.index.index import Index
from hashdist.index.manifest import (
    LISTS,
    apply_rewrites,
    entries_of,
    files,
    files_of,
    is_expired,
    successor,
    with_candidate,
)
from hashdist.index.notes import FOLDER, SUFFIX, read_seen, write_seen
from hashdist.index.shards.merging import Piece, merge
from hashdist.index.shards.shard import Shard, local_file, map_npy, read_salts, write_ids, write_salts
from hashdist.index.view import View
from hashdist.store.cache import cache_folder
from hashdist.store.commit import read_table

Record = Mapping[str, Any]
Entry = Mapping[str, Any]

_AT_ONCE = 16
_NO_DATA = ("manifests/", "pins/")


class Erased(NamedTuple):
    """Outcome of a purge in one index.

    Attributes:
        version: the one it committed, or the present one where nothing was to be erased.
        images: keys of which rows were found, in whatever version.
        versions: kept versions that had rows of them.
        rewritten: entries (shards, tombstones, salts, notes) that were written again or left out.
        deleted: files, those of purges that were killed before among them.
        unnamed: files that no record names and that were not looked into.
    """

    version: int
    images: int
    versions: int
    rewritten: int
    deleted: int
    unnamed: int


def purge(index: Index, keys: Sequence[str], reason: str = "", purge_id: str = "") -> Erased:
    """Erase images from all versions of an index. Run again after a failure, it finishes.

    Reads the ids of every shard of every kept version, and writes those again that hold an image: memory for one.

    Args:
        index: opened as the newest version.
        keys: of the images; keys that the index never had are fine.
        reason: stands in the version's record for ever.
        purge_id: likewise; a new one by default.

    Raises:
        InvalidInput: no keys, or a reason that names one. Conflict: other writers were always first.
    """
    wanted = checked_keys(keys, distinct=False)
    if not wanted:
        raise InvalidInput("at least one key is required, found none")
    if any(key in reason for key in wanted):
        raise InvalidInput("the reason stays in the log for ever and must name no image, found one of the keys in it")
    work = _Purge(index, list(dict.fromkeys(wanted)), reason, purge_id or uuid4().hex)
    committed = index.transact(work)
    if committed is not None:
        telemetry.PURGED.inc(len(work.plan.found))
    deleted, unnamed = work.finish()
    plan = work.plan
    return Erased(index.version, len(plan.found), len(plan.fewer), len(plan.replaced), deleted, unnamed)


def forget(checksums: Iterable[str]) -> int:
    """Delete what this machine's cache holds of files: copies under their SHA-256, and what was derived from them.

    Returns how many files went.
    """
    gone = set(checksums)
    there = [Path(folder, name) for folder, _, names in os.walk(cache_folder()) for name in names]
    named = [path for path in there if path.name[:64] in gone]
    # what is in use has a second name (hashdist/store/cache.py); who has opened it keeps it as long as its process
    # lives
    inodes = {_inode(path) for path in named} - {None}
    links = [path for path in there if inodes and _inode(path) in inodes]
    for path in {*named, *links}:
        path.unlink(missing_ok=True)
    return len({*named, *links})


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None


# Planning


@dataclass
class _PurgePlan:
    """A purge worked out against one version.

    Attributes:
        found: the keys that have rows.
        replaced: new entry of each file that holds an image, or None; by path.
        old: the entries of these files.
        fewer: rows that go from each kept version that has any.
        deleted: entries of the files to delete.
        drops_probes: whether the probe set holds an image.
    """

    found: set[str] = field(default_factory=set)
    replaced: dict[str, Entry | None] = field(default_factory=dict)
    old: list[Entry] = field(default_factory=list)
    fewer: dict[int, int] = field(default_factory=dict)
    deleted: list[Entry] = field(default_factory=list)
    drops_probes: bool = False


class _ImageRows(NamedTuple):
    """The images in a file: rows of a table, or ids of a tombstone."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]


class _Purge:
    """Proposes the version without the images; what was found and written for a file is kept over all tries."""

    plan: _PurgePlan

    def __init__(self, index: Index, keys: list[str], reason: str, purge_id: str) -> None:
        self._store, self._log, self._names = index.store, index.versions, index.versions.new_attempt()
        self._keys, self._about = set(keys), {"id": purge_id, "reason": reason}
        self._records: dict[int, Record] = {}
        self._stored: set[str] = set()
        self._held: dict[str, _ImageRows] = {}
        self._made: dict[tuple[str, bytes], Entry | None] = {}

    def __call__(self, view: View, _tried: int) -> dict[str, Any] | None:
        head = view.manifest
        self._read_records(view)
        self._stored = self._listed()
        kept = {n: apply_rewrites(record, head) for n, record in self._records.items() if not is_expired(head, n)}
        candidate = head.get("candidate")
        readable = _entries([*kept.values(), *([candidate] if candidate else [])])
        self._ids = self._candidate_ids(readable)
        self.plan = plan = _PurgePlan(drops_probes=self._in_probes(head.get("probes")))
        others = self._look_into(readable, plan)
        self._erased_ids = np.setdiff1d(self._ids, others)
        self._write_again(readable, plan)
        counts = {number: self._live(record) for number, record in kept.items()}
        plan.fewer = {number: count for number, count in counts.items() if count}
        plan.deleted += self._only_named(head, readable)
        if not plan.replaced and not plan.deleted and not plan.drops_probes:
            return None
        return self._record(view, counts, candidate)

    def _record(self, view: View, counts: Mapping[int, int], candidate: Record | None) -> dict[str, Any]:
        head, plan = view.manifest, self.plan
        paths = [file["path"] for entry in [*plan.old, *plan.deleted] for file in files_of(entry)]
        before = {n: sum(r for a, b, r in head.get("erased", ()) if a <= n <= b) for n in counts}
        kept: dict[str, Any] = {
            "rewrites": self._rewrites(head, counts) or None,
            "erased": _runs({n: before[n] + counts[n] for n in counts}),
        }
        if candidate:
            now = {**candidate, **self._lists(candidate), "rows": candidate["rows"] - self._live(candidate)}
            kept["candidate"] = now
        if plan.drops_probes:
            kept["probes"] = None
        changed = {**self._lists(head), "rows": head["rows"] - counts[view.number]}
        about = {**self._about, "images": len(plan.found), "delete": paths}
        return successor(view.version, "purge", changed, kept, purge=about)

    def _rewrites(self, head: Record, counts: Mapping[int, int]) -> dict[str, Any]:
        """The files that kept versions name, each with what stands in its place now."""
        replaced = self.plan.replaced
        before = {
            path: entry and replaced.get(entry["path"], entry) for path, entry in head.get("rewrites", {}).items()
        }
        named = {entry["path"] for number in counts for _, entry in entries_of(self._records[number])}
        return {path: entry for path, entry in {**before, **replaced}.items() if path in named}

    def _listed(self) -> set[str]:
        """Names of the data files that are there."""
        return {entry.name for entry in self._store.list() if not entry.name.startswith(_NO_DATA)}

    def _lists(self, record: Record) -> dict[str, Any]:
        return {
            name: [
                {**now, "version": entry["version"]}
                for entry in record[name]
                if (now := self.plan.replaced.get(entry["path"], entry)) is not None
            ]
            for name in LISTS
            if record.get(name) is not None
        }

    # Reading

    def _read_records(self, view: View) -> None:
        missing = [n for n in self._log.numbers() if n <= view.number and n not in self._records]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            read = pool.map(lambda number: self._log.read(number).manifest, missing)
            self._records |= dict(zip(missing, read, strict=True))

    def _candidate_ids(self, readable: Mapping[tuple[str, str], Entry]) -> NDArray[np.int64]:
        """Every id that the keys have had in these versions, ascending."""
        salted = {(key, 0) for key in self._keys}
        for (name, _), entry in readable.items():
            if name == "salts":
                salts = read_salts(self._store, entry)
                salted |= {(key, salts[key]) for key in self._keys & salts.keys()}
        return np.unique(np.concatenate([image_ids([key], {key: salt}) for key, salt in salted]))

    def _look_into(self, readable: Mapping[tuple[str, str], Entry], plan: _PurgePlan) -> NDArray[np.int64]:
        """Find the images; returns those of the ids that belong to other keys as well."""
        others = [np.empty(0, np.int64)]
        for (name, path), entry in readable.items():
            if name == "shards":
                held, keys, foreign = self._in_shard(entry)
                self._held[path] = held
                plan.found |= keys
                others.append(foreign)
            elif name == "tombstones":
                ids = map_npy(local_file(self._store, entry))
                self._held[path] = _ImageRows(np.empty(0, np.int64), np.intersect1d(ids, self._ids))
        return np.concatenate(others)

    def _in_shard(self, entry: Entry) -> tuple[_ImageRows, set[str], NDArray[np.int64]]:
        shard = Shard(self._store, entry)
        which, rows = shard.find(self._ids)
        keys = shard.keys(rows) if len(rows) else []
        mine = np.array([key in self._keys for key in keys], np.bool_)
        return _ImageRows(rows[mine], self._ids[which[mine]]), self._keys & set(keys), self._ids[which[~mine]]

    def _in_probes(self, entry: Entry | None) -> bool:
        if entry is None:
            return False
        table = read_table(self._store, entry)
        columns = [pc.list_flatten(column) if pa.types.is_list(column.type) else column for column in table.columns]
        return any(np.isin(self._ids, column.to_numpy()).any() for column in columns)

    def _only_named(self, head: Record, readable: Mapping[tuple[str, str], Entry]) -> list[Entry]:
        """Entries that no reader gets to any more, and that hold an image if they are still there."""
        named: dict[tuple[str, str], Entry] = {}
        for record in self._records.values():
            named |= _entries(with_candidate(record))
            again = [entry for entry in record.get("rewrites", {}).values() if entry]
            named |= {("shards" if "parts" in e else e["path"].partition("/")[0], e["path"]): e for e in again}
        gone = head.get("rewrites", {})
        found = [e for k, e in named.items() if k not in readable and k[1] not in gone and self._holds(k[0], e)]
        kept = None if self.plan.drops_probes else head.get("probes")
        probes = {r["probes"]["path"]: r["probes"] for r in self._records.values() if r.get("probes")}
        return found + [e for path, e in probes.items() if path in self._stored and path != (kept or {}).get("path")]

    def _holds(self, name: str, entry: Entry) -> bool:
        if not all(file["path"] in self._stored for file in files_of(entry)):
            return False
        if name == "shards":
            return bool(len(self._in_shard(entry)[0].rows))
        if name == "tombstones":
            return bool(np.isin(self._ids, map_npy(local_file(self._store, entry))).any())
        if name == "salts":
            return bool(self._keys & read_salts(self._store, entry).keys())
        return bool(len(self._notes_of(read_seen(self._store, entry))))

    def _notes_of(self, notes: pa.Table) -> NDArray[np.int64]:
        """Rows of the notes about the images."""
        return np.flatnonzero(pc.is_in(notes["key"], pa.array(sorted(self._keys), pa.large_string())))

    # Writing

    def _write_again(self, readable: Mapping[tuple[str, str], Entry], plan: _PurgePlan) -> None:
        for (name, path), entry in readable.items():
            leaves = self._held[path].rows if name == "shards" else self._erased_ids
            made = path, leaves.tobytes()
            if made not in self._made:
                self._made[made] = getattr(self, f"_{name}_without")(entry)
            if self._made[made] is not entry:
                plan.replaced[path] = self._made[made]
                plan.old.append(entry)

    # each returns the entry itself where it holds none of the images, None where nothing is left

    def _shards_without(self, entry: Entry) -> Entry | None:
        gone = self._held[entry["path"]].rows
        if not len(gone):
            return entry
        rows = np.delete(np.arange(entry["rows"]), gone)
        piece = Piece(self._store, entry, Shard(self._store, entry), rows)
        return next(merge([piece], self._names, entry["rows"])) if len(rows) else None

    def _tombstones_without(self, entry: Entry) -> Entry | None:
        ids = map_npy(local_file(self._store, entry))
        left = np.setdiff1d(ids, self._erased_ids)
        if len(left) == len(ids):
            return entry
        return write_ids(self._store, self._names.new("tombstones", ".npy"), left) if len(left) else None

    def _salts_without(self, entry: Entry) -> Entry | None:
        salts = read_salts(self._store, entry)
        others = {key: salt for key, salt in salts.items() if key not in self._keys}
        if len(others) == len(salts):
            return entry
        return write_salts(self._store, self._names.new("salts", ".json"), others) if others else None

    def _seen_without(self, entry: Entry) -> Entry | None:
        notes = read_seen(self._store, entry)
        gone = self._notes_of(notes)
        if not len(gone):
            return entry
        rest = notes.take(np.delete(np.arange(len(notes)), gone))
        return write_seen(self._store, self._names.new(FOLDER, SUFFIX), rest) if len(rest) else None

    def _live(self, record: Record) -> int:
        """How many of the rows that go are live rows of a version."""
        count = 0
        for shard in record["shards"]:
            ids = self._held[shard["path"]].ids
            if len(ids):
                later = [entry["path"] for entry in record["tombstones"] if entry["version"] > shard["version"]]
                hidden = [self._held[path].ids for path in later]
                count += len(np.setdiff1d(ids, np.concatenate([np.empty(0, np.int64), *hidden])))
        return count

    # Deleting

    def finish(self) -> tuple[int, int]:
        """Delete what this purge, and those before it, have said; returns how many files, and how many are unnamed."""
        for number in self._log.numbers():
            if number not in self._records:
                self._records[number] = self._log.read(number).manifest
        condemned = {path for record in self._records.values() for path in record.get("purge", {}).get("delete", ())}
        stored = self._listed()
        self._store.delete_all(sorted(condemned & stored))
        named = [file for entry in _everything(self._records.values()) for file in files_of(entry)]
        forget(file["sha256"] for file in named if file["path"] in condemned)
        return len(condemned & stored), len(stored - condemned - {file["path"] for file in named})


def _entries(records: Iterable[Record]) -> dict[tuple[str, str], Entry]:
    """The entries that records name, by list and path; of one path the one with most parts."""
    found: dict[tuple[str, str], Entry] = {}
    for name, entry in (one for record in records for one in entries_of(record)):
        known = found.get((name, entry["path"]))
        if known is None or len(entry.get("parts", ())) > len(known.get("parts", ())):
            found[name, entry["path"]] = entry
    return found


def _everything(records: Iterable[Record]) -> list[Entry]:
    """Every entry of a data file or shard that records name, once: thousands of records name the same shards."""
    found: dict[str, Entry] = {}
    for record in records:
        parts = with_candidate(record)
        found |= {entry["path"]: entry for entry in _entries(parts).values()}
        for part in parts:
            others = {name: value for name, value in part.items() if name not in (*LISTS, "candidate")}
            found |= {entry["path"]: entry for entry in files(others)}
    return list(found.values())


def _runs(rows: Mapping[int, int]) -> list[list[int]] | None:
    """[first, last, rows] runs of versions with equal numbers of rows."""
    runs: list[list[int]] = []
    for number in sorted(number for number in rows if rows[number]):
        if runs and runs[-1][1:] == [number - 1, rows[number]]:
            runs[-1][1] = number
        else:
            runs.append([number, number, rows[number]])
    return runs or None
