"""Verification: every byte that a version which can be opened names is read from the store, checksummed and counted.

Copies in the local cache prove nothing about the store, so they are not used: files of a remote store are streamed
into a temporary folder, of which the ids and tombstones stay until the versions are counted (8 bytes a row), and the
rest only while its shard is looked at.
"""

import hashlib
import itertools
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashdist.ground import telemetry
from hashdist.ground.errors import Corrupt, HashdistError, NotFound
from hashdist.ground.progress import Progress
from hashdist.ground.ranges import blocks
from hashdist.index.index import Index
from hashdist.index.manifest import apply_rewrites, content, entries_of, files, kept_numbers
from hashdist.index.shards.shard import Shard, map_npy, parts
from hashdist.store import Store, open_store
from hashdist.store.commit import Log, digest

_RANGE_BYTES = 8 << 20
_AT_ONCE = 8
_ROWS_AT_ONCE = 1 << 23
_CANDIDATE = "candidate"


class Fault(NamedTuple):
    """Something that is not as it was committed.

    Attributes:
        versions: numbers of the versions that have it, or "candidate".
        file: where, below the index; empty: in no one file.
        fault: what.
    """

    versions: list[str]
    file: str
    fault: str


@dataclass
class Verified:
    """Outcome of a verification.

    Attributes:
        versions: how many can be opened; all were looked at.
        files: how many they name.
        bytes: read of them.
        rows: of their shards, hidden ones too.
        faults: all of them.
    """

    versions: int = 0
    files: int = 0
    bytes: int = 0
    rows: int = 0
    faults: list[Fault] = field(default_factory=list)


def verify(index: Index) -> Verified:
    """Read and check all versions that can be opened, and the candidate.

    Checked: the log has no gap; every record and file has its checksum; shards open, with as many codes, ids, keys,
    columns and further rows as they say; ids and tombstones are ascending; live rows are as many as the version says,
    and no id lives twice. A file that cannot be read, for whatever reason, is a fault.
    """
    found = Verified()
    records, head = _records(index.versions, found)
    contents = {str(number): content(apply_rewrites(record, head)) for number, record in records.items()}
    if head.get("candidate"):
        contents[_CANDIDATE] = content(head["candidate"])
    named = _Named.by(contents, head)
    found.versions, found.files = len(records), len(named.entries)
    with tempfile.TemporaryDirectory(prefix="hashdist-verify-") as folder:
        ids = _check_files(_Copies(index.store, Path(folder)), named, found)
        _check_rows(contents, ids, found)
    found.faults.sort(key=lambda fault: (fault.file, fault.fault))
    telemetry.FAULTS.set(len(found.faults))
    return found


# Records


def _records(log: Log, found: Verified) -> tuple[dict[int, Mapping[str, Any]], Mapping[str, Any]]:
    """The records of the versions that can be opened, and the newest one's, which must be good."""
    newest = log.latest()
    if newest is None:
        raise NotFound(f"{log.uri} holds no index")
    there = set(log.numbers())
    for number in sorted(set(range(1, newest.number)) - there):
        found.faults.append(Fault([str(number)], _record_name(number), "the record is missing"))
    records: dict[int, Mapping[str, Any]] = {}

    def read(number: int) -> None:
        try:
            record = log.read(number).manifest
        except HashdistError as error:
            found.faults.append(Fault([str(number)], _record_name(number), str(error)))
            return
        if (record.get("number"), record.get("parent")) != (number, number - 1):
            told = f"it must be version {number} upon {number - 1}, found {record['number']} upon {record['parent']}"
            found.faults.append(Fault([str(number)], _record_name(number), told))
        records[number] = record

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(read, (number for number in kept_numbers(newest.manifest) if number in there)))
    return dict(sorted(records.items())), newest.manifest


def _record_name(number: int) -> str:
    return f"manifests/{number:020d}.json"


@dataclass(frozen=True)
class _Named:
    """Everything that records name.

    Attributes:
        entries: of files, by path.
        users: the versions that name a file, by path.
        shards: entries by the path of their codes.
        tombstones: paths.
    """

    entries: dict[str, Mapping[str, Any]]
    users: Mapping[str, list[str]]
    shards: dict[str, Mapping[str, Any]]
    tombstones: set[str]

    @classmethod
    def by(cls, contents: Mapping[str, Mapping[str, Any]], head: Mapping[str, Any]) -> "_Named":
        shards: dict[str, Mapping[str, Any]] = {}
        entries: dict[str, Mapping[str, Any]] = {}
        versions: dict[str, list[str]] = {}  # one list for all files of an entry: versions share most entries
        known: dict[tuple[str, ...], list[str]] = {}
        for version, record in contents.items():
            for _, entry in entries_of(record):
                unit = (entry["path"], *entry.get("parts", {}))
                if unit not in known:
                    known[unit] = []
                    own = parts(entry) if "parts" in entry else {"": entry}
                    entries |= {file["path"]: file for file in own.values()}
                    versions |= {file["path"]: known[unit] for file in own.values()}
                    if "parts" in entry:
                        shards[own["codes"]["path"]] = entry
                if known[unit][-1:] != [version]:
                    known[unit].append(version)
        for entry in files(head):  # what it names besides its content: of the gate, of a purge
            if entry["path"] not in entries:
                entries[entry["path"]], versions[entry["path"]] = entry, [str(head["number"])]
        tombstones = {entry["path"] for record in contents.values() for entry in record["tombstones"]}
        return cls(entries, versions, shards, tombstones)


# Files


class _Copies:
    """Files on this machine's disk as the store has them now: the store's own where it is local."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._from = store
        self.store = store if store.local_path("x") is not None else open_store(str(folder))

    def check(self, entry: Mapping[str, Any]) -> None:
        """Read a file and keep a copy. Raises Corrupt, NotFound, Unavailable."""
        size, sha256 = self._from.stat(entry["path"]).size, hashlib.sha256()
        if size != entry["bytes"]:
            raise Corrupt(f"{entry['bytes']} bytes were committed, found {size}")
        own = None if self.store is self._from else self.store.local_path(entry["path"])
        if own is not None:
            own.parent.mkdir(parents=True, exist_ok=True)
        for start, stop in blocks(size, _RANGE_BYTES):
            data = self._from.get(entry["path"], start, stop - start)
            sha256.update(data)
            if own is not None:
                with own.open("ab") as file:
                    file.write(data)
        if sha256.hexdigest() != entry["sha256"]:
            raise Corrupt(f"SHA-256 {entry['sha256']} was committed, found {sha256.hexdigest()}")

    def drop(self, path: str) -> None:
        """The copy is not needed any more."""
        if self.store is not self._from:
            self.store.delete(path)


def _check_files(copies: _Copies, named: _Named, found: Verified) -> dict[str, NDArray[np.int64]]:
    """Check every file; returns the ids of the sound shards, by the path of their codes, and of the tombstones."""
    ids: dict[str, NDArray[np.int64]] = {}
    of_shards = {entry["path"] for shard in named.shards.values() for entry in parts(shard).values()}

    def checked(path: str, look: Callable[[], None]) -> bool:
        try:
            look()
        except (HashdistError, OSError, ValueError) as error:
            found.faults.append(Fault(named.users[path], path, str(error) or type(error).__name__))
            return False
        return True

    def check_shard(name: str) -> int:
        shard, of = named.shards[name], parts(named.shards[name])
        sound = [checked(entry["path"], lambda entry=entry: copies.check(entry)) for entry in of.values()]  # type: ignore[misc]
        if all(sound):
            opened = Shard(copies.store, shard)
            if checked(name, lambda: _open(opened)):
                ids[name] = opened.ids
        for part, entry in of.items():
            if part != "ids":
                copies.drop(entry["path"])
        return sum(entry["bytes"] for entry in of.values())

    def check_file(path: str) -> int:
        entry = named.entries[path]
        if checked(path, lambda: copies.check(entry)) and path in named.tombstones:
            checked(path, lambda: ids.update({path: _tombstone(copies.store, entry)}))
        return int(entry["bytes"])

    work: list[tuple[Callable[[str], int], str]] = [(check_shard, name) for name in named.shards]
    work += [(check_file, path) for path in named.entries if path not in of_shards]
    with Progress("verify", len(work)) as progress, ThreadPoolExecutor(_AT_ONCE) as pool:
        for size in pool.map(lambda one: one[0](one[1]), work):
            found.bytes += size
            progress.step(note=f"{found.bytes / 1e9:.3g} GB, {len(found.faults)} faults")
    found.rows = sum(int(shard["rows"]) for shard in named.shards.values())
    return ids


def _open(shard: Shard) -> None:
    """Raise Corrupt where a shard's files do not hold what its entry says; their bytes are checked already."""
    shard.verify()
    for name in shard.arrays:
        shard.array(name)


def _tombstone(store: Store, entry: Mapping[str, Any]) -> NDArray[np.int64]:
    own = store.local_path(entry["path"])
    assert own is not None
    ids: NDArray[np.int64] = map_npy(own)
    if ids.dtype != np.int64 or ids.shape != (entry["rows"],) or (np.diff(ids) <= 0).any():
        raise Corrupt(f"{entry['rows']} ascending int64 ids are required, found {ids.dtype} {list(ids.shape)}")
    return ids


# Rows


def _check_rows(
    contents: Mapping[str, Mapping[str, Any]], ids: Mapping[str, NDArray[np.int64]], found: Verified
) -> None:
    """Count the live rows of every version whose shards and tombstones are sound; equal contents are counted once."""
    known: dict[str, list[str]] = {}
    with Progress("verify: live rows", len(contents)) as progress:
        for version, record in contents.items():
            same = digest([record["shards"], record["tombstones"], record["rows"]])
            if same not in known:
                known[same] = _row_faults(record, ids)
            found.faults += [Fault([version], "", fault) for fault in known[same]]
            progress.step()


def _row_faults(record: Mapping[str, Any], ids: Mapping[str, NDArray[np.int64]]) -> list[str]:
    shards = [(int(shard["version"]), parts(shard)["codes"]["path"]) for shard in record["shards"]]
    tombstones = [(int(entry["version"]), entry["path"]) for entry in record["tombstones"]]
    if any(path not in ids for _, path in [*shards, *tombstones]):
        return ["its live rows cannot be counted because of faults in its files"]
    live = twice = 0
    total = sum(len(ids[path]) for _, path in shards)
    for start, stop in _spans(1 + total // _ROWS_AT_ONCE):
        own = [(version, _between(ids[path], start, stop)) for version, path in shards]
        hidden = [(version, _between(ids[path], start, stop)) for version, path in tombstones]
        alive = [part[~np.isin(part, _joined([h for v, h in hidden if v > since]))] for since, part in own]
        every = np.sort(_joined(alive))
        live, twice = live + len(every), twice + int((np.diff(every) == 0).sum())
    faults = [] if live == record["rows"] else [f"{record['rows']} live rows were committed, found {live}"]
    return faults + ([f"{twice} ids live in two shards"] if twice else [])


def _spans(count: int) -> list[tuple[int, int]]:
    """The range of ids in equal spans: ids are uniform in it (hashdist/ground/ids.py)."""
    edges = [(1 << 63) * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _between(ids: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    """Of ascending ids those in [start, stop)."""
    first, last = np.searchsorted(ids, [start, min(stop, (1 << 63) - 1)])
    return np.asarray(ids[first : len(ids) if stop == 1 << 63 else last])


def _joined(parts_: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts_) if parts_ else np.empty(0, np.int64)
