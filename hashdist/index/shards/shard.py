"""Shards: the files that hold the rows of an index, written once, opened by mapping.

A shard is up to five files, row-aligned, rows sorted by id:

- `.bin`: the codes as a plain faiss `IndexBinaryFlat`; `faiss.read_index_binary` opens it. After a header of
  33 bytes the codes follow as they are, so the file itself is mapped, without faiss.
- `.npy`: the ids, int64, ascending: row r of the faiss index is row r here.
- `.keys.arrow`: the keys, Arrow IPC in record batches of 8,192 rows: there is no map of all ids to keys. The head of
  the file says how long each batch is and what its CRC-32 is, so that a few keys are read by ranges, without the rest.
- `.columns.arrow`: content digest, labels and whatever else the caller gave; absent where nothing was given.
- `.rerank.npy`: features for two-stage ranking (hashdist/index/search/rerank.py); absent where they were not asked for.

The files of a shard have one name and differ by suffix, so that its entry in a manifest is short (`pack`); `parts`
and `files` give the plain entries of its files back. Nothing else takes an entry apart.

Files of a remote store are mapped in the local cache (hashdist/store/cache.py). Every file is checksummed when it is
first opened in a process.
"""

import base64
import io
import json
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from hashdist.ground.errors import Corrupt, InvalidInput
from hashdist.ground.threads import in_order
from hashdist.index.shards import keys as key_files
from hashdist.index.shards.keys import KeyFile
from hashdist.store import Store
from hashdist.store.cache import local_file as local_file
from hashdist.store.commit import write_file

_HEADER = struct.Struct("<4siiq?iQ")
"""faiss: "IBxF", bits, bytes per code, rows, is trained, metric, bytes of all codes."""

SUFFIXES = {"codes": ".bin", "ids": ".npy", "keys": ".keys.arrow", "columns": ".columns.arrow", "rerank": ".rerank.npy"}
"""Of the parts of a shard. Parts of other names, and parts that were written later, carry their whole path."""

_OPENED_AT_ONCE = 8
_HAMMING_METRIC = 1  # faiss writes METRIC_L2 for binary indexes


class Rows(NamedTuple):
    """Rows to be written as a shard, in any order.

    Attributes:
        ids: int64 [N], distinct.
        codes: uint8 [N, W].
        keys: one per row.
        columns: further columns, row-aligned; no columns at all are fine.
        arrays: further row-aligned arrays [N, D], by part (a name of SUFFIXES).
    """

    ids: NDArray[np.int64]
    codes: NDArray[np.uint8]
    keys: Sequence[str] | pa.ChunkedArray | pa.Array
    columns: pa.Table
    arrays: Mapping[str, NDArray[Any]] = {}


def write_shard(store: Store, new_name: Callable[[str], str], rows: Rows) -> dict[str, Any]:
    """Write the files of a shard; returns the entry by which a manifest names it.

    Args:
        store: folder of the index.
        new_name: a fresh name with the given suffix.
        rows: at least one; they are sorted here.

    Raises:
        InvalidInput: an id twice, or columns of another length.
    """
    order = np.argsort(rows.ids, kind="stable")
    ids = rows.ids[order]
    if (np.diff(ids) == 0).any():
        raise InvalidInput(f"every row of a shard must have its own id, found {int((np.diff(ids) == 0).sum())} twice")
    if not len(ids) == len(rows.codes) == len(rows.keys):
        raise InvalidInput(f"{len(ids)} ids need as many codes and keys, found {len(rows.codes)} and {len(rows.keys)}")
    for part, table in {"columns": rows.columns, **rows.arrays}.items():
        if len(table) != len(ids) and (part != "columns" or rows.columns.num_columns):
            raise InvalidInput(f"{part} must have {len(ids)} rows like the codes, found {len(table)}")

    def made() -> Iterator[tuple[str, bytes | memoryview]]:
        yield "codes", faiss_flat(rows.codes[order])
        yield "ids", npy(ids)
        yield "keys", key_files.encode(_chunked(rows.keys).cast(pa.large_string()).take(order))
        if rows.columns.num_columns:
            yield "columns", ipc(rows.columns.take(order))
        for part, array in rows.arrays.items():
            yield part, npy(array[order])

    return write_parts(store, new_name(""), ids, made())


def write_parts(
    store: Store, base: str, ids: NDArray[np.int64], made: Iterable[tuple[str, bytes | memoryview]]
) -> dict[str, Any]:
    """Write the files of a shard one after the other, as they are made; returns its entry.

    Args:
        store: folder of the index.
        base: a fresh name.
        ids: of the rows, ascending.
        made: part and content of each file: codes, ids and keys at least.
    """
    written = {part: write_file(store, base + SUFFIXES[part], data, len(ids)) for part, data in made}
    return pack({"rows": len(ids)}, written)


def pack(about: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The entry of a shard: fields about it, its `path` without suffix, and [bytes, sha256] of every part.

    Checksums are base64 here: 10,000 shards must fit a manifest of 5 MB. A part that is not `path` + its suffix (one
    that was written later, for example) has its own path as a third value.

    Args:
        about: rows, and whatever else; `path` and `parts` are replaced.
        entries: plain entries of files of as many rows, by part; `codes` among them.
    """
    base = entries["codes"]["path"].removesuffix(SUFFIXES["codes"])
    shortened = {}
    for part, entry in entries.items():
        short = base64.urlsafe_b64encode(bytes.fromhex(entry["sha256"])).decode().rstrip("=")
        own = [] if entry["path"] == base + SUFFIXES.get(part, "") else [entry["path"]]
        shortened[part] = [entry["bytes"], short, *own]
    return {**about, "path": base, "parts": shortened}


def parts(shard: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The plain entries {"path", "bytes", "sha256", "rows"} of a shard's files, by part: the inverse of `pack`."""
    return {
        part: {
            "path": own[0] if own else shard["path"] + SUFFIXES[part],
            "bytes": size,
            "sha256": base64.urlsafe_b64decode(short + "=").hex(),
            "rows": shard["rows"],
        }
        for part, (size, short, *own) in shard["parts"].items()
    }


def files(shard: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The plain entries of a shard's files."""
    return parts(shard).values()


def faiss_flat(codes_NW: NDArray[np.uint8]) -> bytes:
    """The bytes that faiss writes for an `IndexBinaryFlat` that holds these codes."""
    return _header(*codes_NW.shape) + np.ascontiguousarray(codes_NW).tobytes()


def _header(rows: int, width: int) -> bytes:
    return _HEADER.pack(b"IBxF", 8 * width, width, rows, True, _HAMMING_METRIC, rows * width)


def write_ids(store: Store, name: str, ids: NDArray[np.int64]) -> dict[str, Any]:
    """Write a file of ids (of a tombstone); returns its entry."""
    return write_file(store, name, npy(ids), len(ids))


_parsing = threading.Lock()


def map_npy(path: Path) -> NDArray[Any]:
    """An array file, mapped. One at a time: its header is Python, which CPython 3.11 parses wrongly in two threads."""
    with _parsing:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def write_salts(store: Store, name: str, salts: Mapping[str, int]) -> dict[str, Any]:
    """Write the salts of keys; returns the file's entry. A file of its own, because it names keys (see erasure)."""
    return write_file(store, name, json.dumps(dict(sorted(salts.items()))).encode(), len(salts))


def read_salts(store: Store, entry: Mapping[str, Any]) -> dict[str, int]:
    """The salts that `write_salts` wrote."""
    salts: dict[str, int] = json.loads(local_file(store, entry).read_bytes())
    return salts


class Shard:
    """A committed shard, opened piece by piece as it is needed.

    Args:
        store: folder of the index.
        entry: as `write_shard` returned it.
    """

    def __init__(self, store: Store, entry: Mapping[str, Any]) -> None:
        self._store, self._entry = store, entry
        self._opened: dict[str, Any] = {}
        self._opening = {part: threading.Lock() for part in entry["parts"]}
        self.rows: int = entry["rows"]
        self.name: str = entry["path"] + SUFFIXES["codes"]

    @cached_property
    def _files(self) -> dict[str, dict[str, Any]]:
        return parts(self._entry)

    @property
    def codes(self) -> NDArray[np.uint8]:
        """The codes, mapped: uint8 [N, W]. Raises Corrupt, NotFound, Unavailable."""
        codes: NDArray[np.uint8] = self._open("codes", self._map_codes)
        return codes

    @property
    def ids(self) -> NDArray[np.int64]:
        """The ids, mapped: int64 [N], ascending."""
        ids: NDArray[np.int64] = self._open("ids", self._map_ids)
        return ids

    def keys(self, rows: NDArray[np.int64] | None = None) -> list[str]:
        """The keys of some rows, or of all; of a few rows it reads only their ranges of the file."""
        return [str(key) for key in self._keys.open()["key"].to_pylist()] if rows is None else self._keys.take(rows)

    @cached_property
    def _keys(self) -> KeyFile:
        entry = self._files["keys"]
        return KeyFile(self._store, entry, lambda: local_file(self._store, entry, self))

    def open(self, parts: Sequence[str]) -> None:
        """Bring codes, ids or keys to this machine, whole. Raises Corrupt, NotFound, Unavailable."""
        for part in parts:
            if part == "keys":
                self._keys.open()
            else:
                getattr(self, part)

    def has_opened(self, part: str) -> bool:
        """Whether a part is on this machine and checked, so that reading it needs no store."""
        return self._keys.opened if part == "keys" else part in self._opened

    @property
    def column_names(self) -> list[str]:
        """Names of the further columns."""
        return list(self._table("columns").schema.names) if "columns" in self._files else []

    def columns(self, names: Sequence[str], rows: NDArray[np.int64] | None = None) -> pa.Table:
        """Further columns of some rows, or of all; one that this shard has not is null throughout."""
        here = self.column_names
        count = self.rows if rows is None else len(rows)
        present = [name for name in names if name in here]
        table = self._take("columns", present, rows) if present else None
        return pa.table({name: table[name] if table and name in here else pa.nulls(count) for name in names})

    def file(self, part: str) -> Path:
        """A part's file on this machine's disk, checksummed; it stays there while this shard is open."""
        return local_file(self._store, self._files[part], self)

    def digest(self, part: str) -> str:
        """SHA-256 of a part's file."""
        return str(self._files[part]["sha256"])

    @property
    def arrays(self) -> list[str]:
        """Names of the further row-aligned arrays."""
        return sorted(set(self._files) - {"codes", "ids", "keys", "columns"})

    def array(self, part: str) -> NDArray[Any]:
        """One of `arrays`, mapped: [N, D]."""
        array: NDArray[Any] = self._open(part, self._map_array)
        return array

    def find(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of `ids` are here: their positions among `ids`, and their rows."""
        if not len(ids):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        rows = np.searchsorted(self.ids, ids)
        found = np.flatnonzero(self.ids[np.minimum(rows, self.rows - 1)] == ids)
        return found, rows[found]

    def verify(self) -> None:
        """Open every file, which checks its bytes. Raises Corrupt, NotFound, Unavailable."""
        for part, table in (("keys", self._keys.open), ("columns", lambda: self._table("columns"))):
            if part in self._files and len(table()) != self.rows:
                raise Corrupt(f"{self._store.uri}/{self._files[part]['path']} must have {self.rows} rows; restore it")
        _ = self.codes
        if (np.diff(self.ids) <= 0).any():
            raise Corrupt(f"{self._store.uri}/{self._files['ids']['path']} must hold ascending ids; restore it")

    def _open(self, part: str, mapped: Callable[[Path], Any]) -> Any:
        if part not in self._opened:
            with self._opening[part]:
                if part not in self._opened:
                    self._opened[part] = mapped(local_file(self._store, self._files[part], self))
        return self._opened[part]

    def _table(self, part: str) -> pa.Table:
        return self._open(part, lambda path: pa.ipc.open_file(pa.memory_map(str(path))).read_all())

    def _take(self, part: str, names: Sequence[str], rows: NDArray[np.int64] | None) -> pa.Table:
        table = self._table(part).select(list(names))
        return table if rows is None else table.take(rows)

    def _map_codes(self, path: Path) -> NDArray[np.uint8]:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
        width = int.from_bytes(head[8:12], "little")
        if head != _header(self.rows, width):
            raise Corrupt(f"{path} must be a faiss IndexBinaryFlat of {self.rows} rows, found a header of {head!r}")
        return np.asarray(np.memmap(path, np.uint8, "r", offset=_HEADER.size, shape=(self.rows, width)))

    def _map_ids(self, path: Path) -> NDArray[np.int64]:
        ids = map_npy(path)
        if ids.dtype != np.int64 or ids.shape != (self.rows,):
            raise Corrupt(f"{path} must hold {self.rows} int64 ids, found {ids.dtype} {list(ids.shape)}")
        return ids

    def _map_array(self, path: Path) -> NDArray[Any]:
        array = map_npy(path)
        if array.ndim != 2 or len(array) != self.rows:
            raise Corrupt(f"{path} must hold {self.rows} rows [N, D], found {list(array.shape)}")
        return array


def opening(shards: Sequence[Shard], parts: Sequence[str] = ("codes", "ids")) -> Iterator[int]:
    """The numbers of the shards, in order, each once these parts of it are open, while the next ones are fetched.

    Raises Corrupt, NotFound, Unavailable at the shard that cannot be opened.
    """
    if all(shard.has_opened(part) for shard in shards for part in parts):
        yield from range(len(shards))
        return
    for number, _ in enumerate(in_order(lambda shard: shard.open(parts), shards, _OPENED_AT_ONCE)):
        yield number


def _chunked(keys: Sequence[str] | pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    return keys if isinstance(keys, pa.ChunkedArray | pa.Array) else pa.array(keys, pa.large_string())


def npy(array: NDArray[Any]) -> bytes:
    """The bytes of a .npy file."""
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def ipc(table: pa.Table) -> memoryview:
    """One record batch, so that taking rows reads only these."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return memoryview(sink.getvalue())
