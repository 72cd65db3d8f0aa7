"""The keys of a shard's rows: an Arrow IPC file in batches, of which the batches of a few rows are read by ranges.

The head of the file (metadata `batches` of its schema) says of every batch how many bytes it takes and what their
CRC-32 is, at 16 hex digits each. So one request reads the head and one more every batch asked for, and what came is
checked without the rest. Whatever is wrong with it, the whole file is fetched and checked by its SHA-256. So it is
where ranges would come to half of the file, all requests together, or where the file is small: a request takes as
long as a megabyte does.
"""

import threading
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from hashdist.ground.ranges import blocks
from hashdist.store import Store
from hashdist.store.cache import requests

BATCH_ROWS = 8192
_SMALL_BYTES = 1 << 20
_MAGIC = 8  # bytes before the schema: "ARROW1", padded
_PREFIX = 8  # of a message: continuation mark, length of what follows
_HEAD_BYTES = 1024  # enough for magic, schema and footer of the metadata, beside the digits
_DIGITS = 16
_FEW_ROWS = 1024  # up to here keys are cut out one by one: a call of Arrow costs as much as a hundred of them


def encode(keys: pa.Array | pa.ChunkedArray) -> memoryview:
    """The bytes of the file that holds these keys, large_string."""
    column = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    parts = [pa.record_batch([column[a:b]], ["key"]) for a, b in blocks(len(column), BATCH_ROWS)]
    messages = np.array([(len(m), zlib.crc32(m)) for m in (part.serialize() for part in parts)], ">u4")
    schema = pa.schema([("key", pa.large_string())], {"batches": messages.tobytes().hex()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for part in parts:
            writer.write_batch(part.replace_schema_metadata(schema.metadata))
    return memoryview(sink.getvalue())


class _Head(NamedTuple):
    schema: pa.Schema
    starts: NDArray[np.int64]  # of every batch, and where the last ends
    checksums: NDArray[np.uint32]


class KeyFile:
    """The keys of a shard, read as they are asked for.

    Args:
        store: of the shard.
        entry: {"path", "bytes", "rows"}.
        whole: fetches the file to this machine, checked.
    """

    def __init__(self, store: Store, entry: Mapping[str, Any], whole: Callable[[], Path]) -> None:
        self._store, self._entry, self._whole = store, entry, whole
        self._lock = threading.Lock()
        self._file: pa.ipc.RecordBatchFileReader | None = None
        self._texts: dict[int, Callable[[int], str]] = {}
        self._head: _Head | None = None
        self._fetched = 0

    @property
    def opened(self) -> bool:
        """Whether the whole file is on this machine, so that nothing is fetched any more."""
        return self._file is not None

    def open(self) -> pa.Table:
        """All keys, mapped. Raises Corrupt, NotFound, Unavailable."""
        return self._mapped().read_all()

    def take(self, rows: NDArray[np.int64]) -> list[str]:
        """The keys of some rows. Raises Corrupt, NotFound, Unavailable."""
        if not len(rows):
            return []
        if self.opened and len(rows) <= _FEW_ROWS:
            return [self._text(batch)(row) for batch, row in (divmod(row, BATCH_ROWS) for row in rows.tolist())]
        batches, within = np.divmod(rows, BATCH_ROWS)
        distinct = np.unique(batches)
        read = self._by_ranges(distinct) or [self._mapped().get_batch(int(batch)) for batch in distinct]
        keys = np.empty(len(rows), object)
        for batch, part in zip(distinct, read, strict=True):
            which = batches == batch
            keys[which] = part.column(0).take(within[which]).to_pylist()
        return list(keys)

    def _mapped(self) -> pa.ipc.RecordBatchFileReader:
        with self._lock:
            if self._file is None:
                self._file = pa.ipc.open_file(pa.memory_map(str(self._whole())))
            return self._file

    def _text(self, batch: int) -> Callable[[int], str]:
        """Row of a batch of the mapped file to its key; kept, since opening a batch costs as much as many keys."""
        found = self._texts.get(batch)
        if found is None:
            found = self._texts[batch] = _texts(self._mapped().get_batch(batch))
        return found

    def _by_ranges(self, batches: NDArray[np.int64]) -> list[pa.RecordBatch] | None:
        """These batches; None where the whole file is at hand, is the better choice, or has to be looked at."""
        if self.opened or self._entry["bytes"] <= _SMALL_BYTES:
            return None
        try:
            self._head = head = self._head or self._read_head()
            self._fetched += int((head.starts[batches + 1] - head.starts[batches]).sum())
            if self._fetched > self._entry["bytes"] // 2:
                return None
            return list(requests().map(partial(self._read, head), batches.tolist()))
        except (pa.ArrowException, ValueError, IndexError, KeyError):
            return None

    def _read_head(self) -> _Head:
        count = -(-self._entry["rows"] // BATCH_ROWS)
        data = self._store.get(self._entry["path"], 0, _HEAD_BYTES + _DIGITS * count)
        schema = pa.ipc.read_schema(pa.py_buffer(data[_MAGIC:]))
        messages = np.frombuffer(bytes.fromhex((schema.metadata or {})[b"batches"].decode()), ">u4").reshape(count, 2)
        first = _MAGIC + _PREFIX + int.from_bytes(data[_MAGIC + 4 : _MAGIC + 8], "little")
        return _Head(schema, np.cumsum([first, *messages[:, 0]], dtype=np.int64), messages[:, 1])

    def _read(self, head: _Head, batch: int) -> pa.RecordBatch:
        start, stop = (int(edge) for edge in head.starts[batch : batch + 2])
        data = self._store.get(self._entry["path"], start, stop - start)
        if zlib.crc32(data) != head.checksums[batch]:
            raise ValueError("other bytes than were written")
        return pa.ipc.read_record_batch(pa.py_buffer(data), head.schema)


def _texts(batch: pa.RecordBatch) -> Callable[[int], str]:
    """Row of a batch of keys to its key."""
    column = batch.column(0)
    _, edges, data = column.buffers()
    offsets = np.frombuffer(edges, np.int64)[column.offset : column.offset + len(column) + 1]
    view = memoryview(data) if data is not None else memoryview(b"")
    return lambda row: str(view[offsets[row] : offsets[row + 1]], "utf-8")
