"""Reading features and codes: committed tables of one vector per image, in parts."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashdist.ground.errors import Corrupt, InvalidInput
from hashdist.ground.schema import to_vectors
from hashdist.ground.threads import in_order
from hashdist.store.commit import Artefact, read_table

_AHEAD = 4
"""Files read at once: enough to hide the latency of a store, few enough for memory."""


def vectors(artefact: Artefact, column: str) -> Iterator[pa.Table]:
    """Tables of the parts, in part order, with every column that stands before the vector, and the vector.

    Args:
        artefact: committed features or codes.
        column: the vector column it must have, `feature` or `code`.

    Raises:
        NotFound where nothing is committed; InvalidInput without that column; Corrupt.
    """
    for table in _tables(artefact, None):
        if column not in table.schema.names:
            raise InvalidInput(f"{artefact.uri} must have the column {column!r}, found {table.schema.names}")
        yield table


def read_vectors(artefact: Artefact, columns: Sequence[str], ids: NDArray[np.int64] | None = None) -> pa.Table:
    """One table of the columns asked for, sorted by id; in memory: the result and a few parts.

    Args:
        artefact: committed features or codes.
        columns: names; `id` need not be among them.
        ids: ascending int64 [n] of the rows wanted; None = all.

    Raises:
        InvalidInput: an id is not there, or a column. NotFound, Corrupt.
    """
    found = [table["id"].to_numpy() for table in _tables(artefact, ["id"])]
    places_per_file, rows = _places(found, ids, artefact)
    files = artefact.manifest()["files"]
    wanted = [(entry, places) for entry, places in zip(files, places_per_file, strict=True) if (places >= 0).any()]
    if not wanted:
        return _empty(artefact, columns)
    tables = _read(artefact, [entry for entry, _ in wanted], columns)
    picked = ((table, places) for table, (_, places) in zip(tables, wanted, strict=True))
    return _gather(picked, list(columns), rows)


def _tables(artefact: Artefact, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    return _read(artefact, artefact.manifest()["files"], columns)


def _read(artefact: Artefact, entries: Sequence[dict[str, Any]], columns: Sequence[str] | None) -> Iterator[pa.Table]:
    return in_order(lambda entry: read_table(artefact.store, entry, columns), entries, _AHEAD)


def _places(
    found: Sequence[NDArray[np.int64]], ids: NDArray[np.int64] | None, artefact: Artefact
) -> tuple[list[NDArray[np.int64]], int]:
    """For every row of every file its place in the result, or -1; and the number of rows of the result."""
    every = np.concatenate([*found, np.empty(0, np.int64)])
    order = np.argsort(every, kind="stable")
    if len(every) and (np.diff(every[order]) == 0).any():
        raise Corrupt(f"{artefact.uri} holds an id twice; make it again")
    places = np.full(len(every), -1, np.int64)
    if ids is None:
        places[order] = np.arange(len(every))
    elif len(ids):
        at = np.searchsorted(every[order], ids).clip(max=max(len(every) - 1, 0))
        missing = ids[every[order][at] != ids] if len(every) else ids
        if len(missing):
            raise InvalidInput(
                f"{artefact.uri} must hold {len(ids)} ids that were asked for, {len(missing)} are missing (the first: "
                f"{missing[0]}); use a snapshot that was made from the same collection"
            )
        places[order[at]] = np.arange(len(ids))
    bounds = np.cumsum([len(part) for part in found])[:-1]
    return np.split(places, bounds), len(every) if ids is None else len(ids)


def _gather(picked: Iterator[tuple[pa.Table, NDArray[np.int64]]], columns: list[str], rows: int) -> pa.Table:
    """Scatter rows into their places: vectors straight into one array, the small columns by one sort at the end."""
    vectors_of: dict[str, NDArray[np.uint8]] = {}
    present_of: dict[str, NDArray[np.bool_]] = {}
    small: list[pa.Table] = []
    order: list[NDArray[np.int64]] = []
    schema: pa.Schema | None = None
    for table, places in picked:
        schema = schema or table.schema
        if not table.schema.equals(schema, check_metadata=True):
            raise Corrupt(f"parts of one snapshot must have one schema, found {schema} and {table.schema}")
        rows_here = np.flatnonzero(places >= 0)
        for name in columns:
            kind = table.schema.field(name).type
            if pa.types.is_fixed_size_binary(kind):
                out = vectors_of.setdefault(name, np.zeros((rows, kind.byte_width), np.uint8))
                present = present_of.setdefault(name, np.zeros(rows, np.bool_))
                raw, valid = _raw(table[name], kind.byte_width)
                out[places[rows_here]] = raw[rows_here]
                present[places[rows_here]] = valid[rows_here]
        plain = [name for name in columns if name not in vectors_of]
        small.append(table.select(plain).take(rows_here) if len(rows_here) < len(table) else table.select(plain))
        order.append(places[rows_here])
    assert schema is not None
    sorter = np.argsort(np.concatenate(order))
    joined = pa.concat_tables(small).take(sorter)
    arrays = [
        to_vectors(vectors_of[name], present_of[name]) if name in vectors_of else joined[name] for name in columns
    ]
    return pa.table(arrays, schema=pa.schema([schema.field(name) for name in columns], schema.metadata))


def _raw(column: pa.ChunkedArray, width: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Bytes [n, width] and validity [n] of a fixed-size binary column."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    valid = np.ones(len(array), np.bool_)
    if array.null_count:
        valid = array.is_valid().to_numpy(zero_copy_only=False)
    if not len(array):
        return np.empty((0, width), np.uint8), valid
    flat = np.frombuffer(array.buffers()[1], np.uint8, count=len(array) * width, offset=array.offset * width)
    return flat.reshape(len(array), width), valid


def _empty(artefact: Artefact, columns: Sequence[str]) -> pa.Table:
    files = artefact.manifest()["files"]
    if not files:
        raise InvalidInput(f"{artefact.uri} has no rows; make it from a collection with images in it")
    return read_table(artefact.store, files[0], columns).slice(0, 0)
