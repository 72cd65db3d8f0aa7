"""New shards from rows of old ones, for compaction and erasure.

Every part of a shard goes along row by row: codes, ids and keys, columns (the union of all, null where a shard has
none), and further arrays. Shards whose further arrays or columns do not fit together (float16 of another width, a
column of another kind) are not mixed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashdist.ground.ranges import blocks
from hashdist.index.shards.keys import encode
from hashdist.index.shards.shard import Shard, faiss_flat, ipc, local_file, npy, parts, write_parts
from hashdist.store import Store
from hashdist.store.commit import Names


@dataclass(frozen=True)
class Piece:
    """Some rows of a committed shard.

    Attributes:
        store: folder of the index.
        entry: of the shard.
        shard: the same, opened.
        rows: int64, ascending: which of its rows.
    """

    store: Store
    entry: Mapping[str, Any]
    shard: Shard
    rows: NDArray[np.int64]

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """Ids of the rows, ascending."""
        return self.shard.ids[self.rows]

    @property
    def keys(self) -> pa.ChunkedArray:
        """Keys of the rows."""
        path = local_file(self.store, parts(self.entry)["keys"])
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["key"].take(self.rows)

    @property
    def schema(self) -> pa.Schema:
        """Of the columns."""
        return self.shard.columns(self.shard.column_names).schema

    @cached_property
    def kind(self) -> list[tuple[str, str, int]]:
        """Name, type and width of the further arrays."""
        arrays = {part: self.shard.array(part) for part in self.shard.arrays}
        return [(part, str(array.dtype), array.shape[1]) for part, array in arrays.items()]

    def between(self, first: int, last: int) -> "Piece":
        """Those of the rows whose id lies in [first, last]."""
        start, stop = np.searchsorted(self.ids, first), np.searchsorted(self.ids, last, side="right")
        return Piece(self.store, self.entry, self.shard, self.rows[start:stop])


def unify(schemas: Sequence[pa.Schema]) -> pa.Schema | None:
    """The schema that holds the values of all of these unchanged; None if there is none."""
    try:
        union = pa.unify_schemas(list(schemas), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    # a whole number above 2^53 would not survive as a float
    rounded = (_rounds(field.type, union.field(field.name).type) for schema in schemas for field in schema)
    return None if any(rounded) else union


def merge(pieces: Sequence[Piece], names: Names, most_rows: int) -> Iterator[dict[str, Any]]:
    """Write the rows of all pieces as shards of at most `most_rows` rows; entries of them.

    In memory: the ids of all rows, and one part (codes, keys, ...) of one shard, up to four times.

    Args:
        pieces: with distinct ids, and joinable: of one `kind`, with a schema in common.
        names: of the attempt that writes.
        most_rows: per shard.
    """
    ids = np.sort(np.concatenate([piece.ids for piece in pieces]))
    for start, stop in blocks(len(ids), most_rows):
        here = [piece.between(int(ids[start]), int(ids[stop - 1])) for piece in pieces]
        yield _write([piece for piece in here if len(piece.rows)], names)


def _write(pieces: Sequence[Piece], names: Names) -> dict[str, Any]:
    ids = np.concatenate([piece.ids for piece in pieces])
    order = np.argsort(ids)

    def made() -> Iterator[tuple[str, bytes | memoryview]]:
        """One part after the other, so that no more than one is in memory."""
        yield "codes", faiss_flat(np.concatenate([piece.shard.codes[piece.rows] for piece in pieces])[order])
        yield "ids", npy(ids[order])
        yield "keys", encode(pa.chunked_array([chunk for piece in pieces for chunk in piece.keys.chunks]).take(order))
        columns = _columns(pieces)
        if columns.num_columns:
            yield "columns", ipc(columns.take(order))
        for part in pieces[0].shard.arrays:
            yield part, npy(np.concatenate([piece.shard.array(part)[piece.rows] for piece in pieces])[order])

    return write_parts(pieces[0].store, names.new("shards", ""), ids[order], made())


def _columns(pieces: Sequence[Piece]) -> pa.Table:
    schema = unify([piece.schema for piece in pieces])
    assert schema is not None, "pieces that cannot be joined"
    # a column that a shard does not have comes as null throughout
    tables = [piece.shard.columns(schema.names, piece.rows) for piece in pieces]
    return pa.concat_tables([table.cast(schema) for table in tables]) if len(schema) else pa.table({})


def _rounds(before: pa.DataType, after: pa.DataType) -> bool:
    return bool(pa.types.is_integer(_element(before))) and not pa.types.is_integer(_element(after))


def _element(kind: pa.DataType) -> pa.DataType:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return kind
