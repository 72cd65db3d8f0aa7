"""A collection as it is now against the rows of an index: one merge, partition by partition, in bounded memory.

Ids are hashes of keys, so rows with the same leading bits of the id are an even share of both sides. What is listed is
kept in memory while it is small, else spilt into local files, one a partition; the index's shards are sorted by id and
are read by ranges of ids. Each partition is joined on (id, key), vectorised.

What decides whether an image is looked at is its size and stamp (ETag, or mtime in ns). Whether it is encoded decides
the digest of its bytes, when it is read.
"""

import tempfile
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.ground.ids import ID_BITS, repeated_keys, require_distinct_keys, rows_of_shared_ids
from hashdist.ground.schema import OK

IN_MEMORY = 1 << 18
"""Rows up to which a side is one partition."""

PARTITIONS = 256

Indexed = Callable[[int, int], pa.Table]
"""Rows with first <= id <= last: their id, key and what more is asked for."""


class Spill:
    """Rows by partition of their ids: in memory while they are few, then in files of a temporary folder.

    Args:
        schema: of the rows, with `id`.
        most: rows kept in memory.
    """

    def __init__(self, schema: pa.Schema, most: int = IN_MEMORY) -> None:
        self._schema, self._most = schema, most
        self._held: list[pa.Table] = []
        self._held_rows = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()
        if self._folder:
            self._folder.cleanup()

    @property
    def spilt(self) -> bool:
        """Whether there are files."""
        return self._folder is not None

    def add(self, rows: pa.Table) -> None:
        """Take some rows."""
        self._held.append(rows)
        self._held_rows += len(rows)
        self.rows += len(rows)
        if self._held_rows > self._most:
            self._flush()

    def partition(self, number: int, partitions: int) -> pa.Table:
        """The rows of a partition. Nothing is added after the first call."""
        if self._folder is None:
            rows = pa.concat_tables([self._schema.empty_table(), *self._held])
            return rows if partitions == 1 else rows.filter(pa.array(partition_of(rows, partitions) == number))
        if self._held:
            self._flush()
        self._close()
        path = Path(self._folder.name) / str(number)
        if not path.exists():
            return self._schema.empty_table()
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_stream(source).read_all()

    def _flush(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="hashdist-difference-")
        rows = pa.concat_tables(self._held)
        self._held, self._held_rows = [], 0
        where = partition_of(rows, PARTITIONS)
        rows = rows.take(pa.array(np.argsort(where, kind="stable")))
        ends = np.cumsum(np.bincount(where, minlength=PARTITIONS))
        for number, end in enumerate(ends):
            start = int(ends[number - 1]) if number else 0
            if end > start:
                self._writer(number).write_table(rows.slice(start, int(end) - start).combine_chunks())

    def _writer(self, number: int) -> pa.ipc.RecordBatchStreamWriter:
        if number not in self._writers:
            assert self._folder is not None
            self._writers[number] = pa.ipc.new_stream(str(Path(self._folder.name) / str(number)), self._schema)
        return self._writers[number]

    def _close(self) -> None:
        for writer in self._writers.values():
            with suppress(pa.ArrowInvalid):
                writer.close()
        self._writers = {}


def partition_of(rows: pa.Table, partitions: int) -> NDArray[np.int64]:
    """The partition of every row, int64 [N]: the leading bits of its id."""
    ids: NDArray[np.int64] = rows["id"].to_numpy()
    return ids >> (ID_BITS - (partitions - 1).bit_length())


@dataclass(frozen=True)
class Difference:
    """Rows and keys by which an index differs from its collection.

    Attributes:
        new: rows as they were listed, of images without a row in the index.
        touched: likewise of those with a row whose size or stamp is another one; column `indexed_digest` beside.
        removed: keys that are in the index and not listed.
        unchanged: how many are as they were.
        failed: how many could not be encoded before and are as they were.
    """

    new: pa.Table
    touched: pa.Table
    removed: list[str]
    unchanged: int
    failed: int

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to look at and nothing to remove."""
        return not (len(self.new) or len(self.touched) or self.removed)


@dataclass
class _Parts:
    """The difference while it is collected."""

    new: list[pa.Table] = field(default_factory=list)
    touched: list[pa.Table] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    failed: int = 0


def difference(
    listed: Spill,
    indexed: Indexed,
    notes: Indexed,
    rows: int,
    *,
    sources: Set[str] = frozenset(),
    retry_failed: bool = False,
) -> Difference:
    """Merge what is listed with what is indexed.

    Args:
        listed: id, key, size (null: not known), stamp, and what more a reader needs.
        indexed: of live rows: id, key, digest, size, stamp.
        notes: of hashdist/index/notes.py: id, key, digest, size, stamp, status.
        rows: of the index.
        sources: stamps of parquet files and tars that are there as they were, and were not opened for that reason: what
            the index has of them is unchanged.
        retry_failed: look at images again that could not be encoded.

    Raises:
        InvalidInput: a key is listed twice.
    """
    parts = _Parts()
    partitions = PARTITIONS if listed.spilt or rows > IN_MEMORY else 1
    for number in range(partitions):
        width = (1 << ID_BITS) // partitions
        span = number * width, (number + 1) * width - 1
        here = listed.partition(number, partitions)
        _require_distinct(here)
        _merge(parts, here, indexed(*span), notes(*span), sources, retry_failed)
    empty = listed.partition(0, partitions).slice(0, 0)
    return Difference(
        new=pa.concat_tables([empty, *parts.new]),
        touched=pa.concat_tables([_with_indexed_digest(empty, pa.nulls(0, pa.string())), *parts.touched]),
        removed=parts.removed,
        unchanged=parts.unchanged,
        failed=parts.failed,
    )


def _merge(
    parts: _Parts, listed: pa.Table, indexed: pa.Table, notes: pa.Table, sources: Set[str], retry_failed: bool
) -> None:
    """One partition."""
    at_indexed, at_notes = _matches(listed, indexed), _matches(listed, notes)
    is_indexed, is_noted = at_indexed >= 0, at_notes >= 0
    row, note = _take(indexed, at_indexed), _take(notes, at_notes)
    noted = is_noted & _same_stamp(listed, note)
    fine = _equal(note["status"], pa.scalar(OK))
    same = is_indexed & (_same_stamp(listed, row) | (noted & fine & _equal(note["digest"], row["digest"])))
    # bytes that could not be had (no digest) may be had now
    failed = ~same & noted & ~fine & pc.is_valid(note["digest"]).to_numpy() & (not retry_failed)
    look = ~same & ~failed
    parts.new.append(listed.filter(pa.array(look & ~is_indexed)))
    touched = pa.array(look & is_indexed)
    parts.touched.append(_with_indexed_digest(listed.filter(touched), row["digest"].filter(touched)))
    parts.unchanged += int(same.sum())
    parts.failed += int(failed.sum())
    _remove(parts, indexed, at_indexed, notes, sources)


def _remove(parts: _Parts, indexed: pa.Table, matched: NDArray[np.int64], notes: pa.Table, sources: Set[str]) -> None:
    """Indexed rows that no listed one has met, unless their source was not opened."""
    gone = np.ones(len(indexed), np.bool_)
    gone[matched[matched >= 0]] = False
    if sources and len(indexed):
        known = pa.array(sorted(sources), pa.string())
        # a stamp stands for what is in its file, so whatever says it of a key says that the key is there
        noted = _take(notes, _matches(indexed, notes))["stamp"]
        kept = _is_in(noted, known) | _is_in(indexed["stamp"], known)
        parts.unchanged += int((gone & kept).sum())
        twice = indexed["key"].filter(pa.array(~gone & kept)).to_pylist()
        if twice:
            raise repeated_keys(twice)
        gone &= ~kept
    if sources:
        bad = _is_in(notes["stamp"], pa.array(sorted(sources), pa.string())) & ~_equal(notes["status"], pa.scalar(OK))
        parts.failed += int(bad.sum())
    parts.removed += indexed["key"].filter(pa.array(gone)).to_pylist()


def _matches(left: pa.Table, right: pa.Table) -> NDArray[np.int64]:
    """For every row of `left` the row of `right` with its id and key; -1 where there is none."""
    found = np.full(len(left), -1, np.int64)
    if not len(left) or not len(right):
        return found
    mine = pa.table({"id": left["id"], "key": left["key"].cast(pa.large_string()), "mine": np.arange(len(left))})
    other = pa.table({"id": right["id"], "key": right["key"].cast(pa.large_string()), "other": np.arange(len(right))})
    both = mine.join(other, ["id", "key"], join_type="inner")
    found[both["mine"].to_numpy()] = both["other"].to_numpy()
    return found


def _take(table: pa.Table, at: NDArray[np.int64]) -> pa.Table:
    """The rows at these places; nulls where the place is -1."""
    return table.take(pa.array(at, mask=at < 0))


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray | pa.Scalar) -> NDArray[np.bool_]:
    """Where both are there and equal."""
    return np.asarray(pc.fill_null(pc.equal(left, right), False).to_numpy(), np.bool_)


def _is_in(values: pa.ChunkedArray, known: pa.Array) -> NDArray[np.bool_]:
    return np.asarray(pc.is_in(values.cast(pa.string()), known).to_numpy(), np.bool_)


def _same_stamp(listed: pa.Table, known: pa.Table) -> NDArray[np.bool_]:
    """Where the stamp is known and the same, and the size is not known to be another."""
    sizes = pc.fill_null(pc.equal(listed["size"], known["size"].cast(pa.int64())), True).to_numpy()
    return _equal(listed["stamp"], known["stamp"].cast(pa.string())) & np.asarray(sizes, np.bool_)


def _with_indexed_digest(rows: pa.Table, digests: pa.ChunkedArray | pa.Array) -> pa.Table:
    return rows.append_column("indexed_digest", digests.cast(pa.string()))


def _require_distinct(listed: pa.Table) -> None:
    rows = rows_of_shared_ids(listed["id"].to_numpy())
    require_distinct_keys(listed["key"].take(pa.array(rows)).to_pylist())
