"""Vectors that users bring: parquet files with a vector column, or the npy + parquet layout of clip-retrieval.

parquet: a key column (`key`, `id` or `image_path`), a vector column (`feature`, `embedding` or `embeddings`: lists,
fixed-size lists, or fixed-size binary with `dtype` and `width` in the schema's metadata), optionally `label` or
`labels`. clip-retrieval: img_emb/img_emb_0000.npy with the rows of metadata/metadata_0000.parquet.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_ids, salts_of
from hashdist.ground.schema import OK, UNUSABLE, from_vectors, to_vectors, vector_schema
from hashdist.store import Entry, Store, open_store

CHUNK_ROWS = 65_536
"""Rows per part at most."""

_KEYS = ("key", "id", "image_path")
_VECTORS = ("feature", "embedding", "embeddings")
_NPY = re.compile(r"(?:(?P<base>.*)/)?img_emb/img_emb_(?P<number>\w+)\.npy")
_HEADER_BYTES = 4096
_EXAMPLES = 3


@dataclass(frozen=True)
class VectorSource:
    """The files at a URI, by name; nothing has been read.

    Args:
        uri: canonical.
        store: the folder that names are relative to.
        files: the parquet files that hold the keys, sorted by name.
        arrays: for each the .npy file of its vectors, in the clip-retrieval layout; else empty.
        digest: of names, sizes and stamps.
    """

    uri: str
    store: Store
    files: list[Entry]
    arrays: list[Entry]
    digest: str


class Chunk(NamedTuple):
    """Rows [start, stop) of one file: a part."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class VectorPlan:
    """A source whose footers, headers and keys have been read.

    Args:
        source: as it was listed.
        chunks: parts, in the order of the files.
        width: D.
        dtype: float16 where the source is, else float32.
        salts: of the keys whose ids collided.
    """

    source: VectorSource
    chunks: list[Chunk]
    width: int
    dtype: str
    salts: dict[str, int]


def list_source(uri: str) -> VectorSource:
    """List the files. Raises InvalidInput where there are none, or an .npy without its metadata."""
    store = open_store(uri)
    entries = {entry.name: entry for entry in store.list() if not _hidden(entry.name)}
    if not entries and uri.endswith(".parquet"):
        where = store.uri
        store, name = store.as_file()
        entries = {entry.name: entry for entry in store.list(name) if entry.name == name}
    else:
        where = store.uri
    arrays = [(entry, found) for name, entry in entries.items() if (found := _NPY.fullmatch(name))]
    files = [_metadata(entry, found, entries, where) for entry, found in arrays]
    if not arrays:
        files = [entry for name, entry in entries.items() if name.endswith(".parquet")]
    if not files:
        raise InvalidInput(
            f"{where}: features are required as parquet files, or as img_emb/img_emb_*.npy with metadata/metadata_*."
            f"parquet, found {', '.join(list(entries)[:_EXAMPLES]) or 'nothing there'}; check --features.source"
        )
    used = sorted([*files, *(entry for entry, _ in arrays)])
    digest = blake2b("\n".join(f"{e.name} {e.size} {e.stamp}" for e in used).encode(), digest_size=16).hexdigest()
    return VectorSource(where, store, files, [entry for entry, _ in arrays], digest)


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _metadata(array: Entry, found: re.Match[str], entries: Mapping[str, Entry], where: str) -> Entry:
    base = f"{found['base']}/" if found["base"] else ""
    name = f"{base}metadata/metadata_{found['number']}.parquet"
    if name not in entries:
        raise InvalidInput(f"{where}: {array.name} needs the keys of its rows in {name}, found no such file")
    return entries[name]


def plan(source: VectorSource) -> VectorPlan:
    """Read footers, headers and keys. Raises InvalidInput for files that do not fit, and for keys that repeat.

    Memory: ids and keys of all rows.
    """
    shapes = [_shape(source, number) for number in range(len(source.files))]
    widths = {width for _, width, _ in shapes}
    if len(widths) != 1:
        raise InvalidInput(
            f"{source.uri}: all vectors must have one width, found {sorted(widths)}; keep one backbone's features there"
        )
    dtype = "float16" if {kind for _, _, kind in shapes} == {"float16"} else "float32"
    chunks = [
        Chunk(number, start, min(start + CHUNK_ROWS, rows))
        for number, (rows, _, _) in enumerate(shapes)
        for start in range(0, rows, CHUNK_ROWS)
    ]
    if not chunks:
        raise InvalidInput(f"{source.uri}: at least one feature is required, found {len(source.files)} empty files")
    return VectorPlan(source, chunks, widths.pop(), dtype, _salts(source))


def _salts(source: VectorSource) -> dict[str, int]:
    columns = []
    for number in range(len(source.files)):
        with _open(source, number) as file:
            name = _key_column(file.schema_arrow, source, number)
            columns.append(file.read([name])[name].cast(pa.string()).combine_chunks())
    keys = pa.chunked_array(columns, pa.string())
    if keys.null_count:
        raise InvalidInput(f"{source.uri}: every row must have a key, found {keys.null_count} without one")
    return salts_of(
        image_ids(keys.to_pylist()),
        lambda rows: keys.take(pa.array(rows)).to_pylist(),
        keys.to_pylist,
        f"{source.uri}: every feature",
        "remove the duplicates",
    )


def table(planned: VectorPlan, number: int) -> pa.Table:
    """The rows of a part, schema `vector_schema("feature", dtype, D)`; unusable vectors are null, with a reason."""
    chunk = planned.chunks[number]
    rows = _rows(planned.source, chunk)
    schema = rows.schema
    keys = rows[_key_column(schema, planned.source, chunk.file)].cast(pa.string())
    if planned.source.arrays:
        vectors_ND, missing_N = _from_npy(planned.source, chunk), np.zeros(len(rows), np.bool_)
    else:
        vectors_ND, missing_N = _vectors(rows, planned, chunk)
    with np.errstate(over="ignore"):
        vectors_ND = vectors_ND.astype(planned.dtype)
    vectors_ND[missing_N] = 0
    infinite_N = ~np.isfinite(vectors_ND).all(1)
    zero_N = ~vectors_ND.any(1)
    reasons_N = np.select(
        [missing_N, infinite_N, zero_N],
        ["missing: no vector", "not-finite: NaN or infinity", "zero: a vector without direction"],
        "",
    )
    good_N = reasons_N == ""
    columns = [
        pa.array(image_ids(keys.to_pylist(), planned.salts)),
        keys,
        pa.nulls(len(rows), pa.string()),
        _labels(rows),
        pa.array(np.where(good_N, OK, UNUSABLE), pa.string()),
        pa.array([str(reason) or None for reason in reasons_N], pa.string()),
        to_vectors(vectors_ND, good_N),
    ]
    return pa.table(columns, schema=vector_schema("feature", planned.dtype, planned.width))


def _labels(rows: pa.Table) -> pa.Array:
    kind = pa.list_(pa.int32())
    for name in ("labels", "label"):
        if name in rows.schema.names:
            found = rows[name].to_pylist()
            try:
                return pa.array([v if v is None or isinstance(v, list) else [v] for v in found], kind)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise InvalidInput(
                    f"column {name!r} must hold integers or lists of them, found {rows.schema.field(name).type}"
                ) from error
    return pa.nulls(len(rows), kind)


# Files


def _open(source: VectorSource, number: int) -> pq.ParquetFile:
    filesystem, base = source.store.filesystem()
    entry = source.files[number]
    try:
        return pq.ParquetFile(filesystem.open_input_file(f"{base}/{entry.name}"), pre_buffer=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidInput(f"{source.uri}: {entry.name} must be a parquet file, found {error}; repair it") from error


def _key_column(schema: pa.Schema, source: VectorSource, number: int) -> str:
    found = next((name for name in _KEYS if name in schema.names), None)
    if found is None:
        raise InvalidInput(
            f"{source.uri}: {source.files[number].name} must have a key column ({', '.join(_KEYS)}), found "
            f"{schema.names}; rename yours"
        )
    return found


def _vector_column(schema: pa.Schema, source: VectorSource, number: int) -> pa.Field:
    found = next((name for name in _VECTORS if name in schema.names), None)
    if found is None:
        raise InvalidInput(
            f"{source.uri}: {source.files[number].name} must have a vector column ({', '.join(_VECTORS)}), found "
            f"{schema.names}; rename yours"
        )
    return schema.field(found)


def _shape(source: VectorSource, number: int) -> tuple[int, int, str]:
    """Rows, width and dtype of one file."""
    with _open(source, number) as file:
        rows, schema = file.metadata.num_rows, file.schema_arrow
        _key_column(schema, source, number)
        if source.arrays:
            return _npy_shape(source, number, rows)
        field = _vector_column(schema, source, number)
        if pa.types.is_fixed_size_binary(field.type):
            metadata = schema.metadata or {}
            if b"dtype" not in metadata or b"width" not in metadata:
                raise InvalidInput(
                    f"{source.uri}: {source.files[number].name}: a fixed-size binary column needs `dtype` and `width` "
                    f"in the schema's metadata, found {sorted(metadata)}"
                )
            return rows, int(metadata[b"width"]), metadata[b"dtype"].decode()
        if not _is_list(field.type) or not _is_number(field.type.value_type):
            raise InvalidInput(
                f"{source.uri}: {source.files[number].name}: column {field.name!r} must hold lists of numbers or "
                f"fixed-size binary, found {field.type}"
            )
        if pa.types.is_fixed_size_list(field.type):
            return rows, field.type.list_size, _dtype(field.type.value_type)
        return rows, _first_width(file, field.name), _dtype(field.type.value_type)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _dtype(kind: pa.DataType) -> str:
    return "float16" if pa.types.is_float16(kind) else "float32"


def _first_width(file: pq.ParquetFile, column: str) -> int:
    for batch in file.iter_batches(1024, columns=[column]):
        lengths = pc.drop_null(pc.list_value_length(batch[column]))
        if len(lengths):
            return int(lengths[0].as_py())
    return 0


def _rows(source: VectorSource, chunk: Chunk) -> pa.Table:
    """Rows of a chunk: the columns that are needed."""
    with _open(source, chunk.file) as file:
        schema = file.schema_arrow
        wanted = [_key_column(schema, source, chunk.file), *(n for n in ("label", "labels") if n in schema.names)]
        if not source.arrays:
            wanted.append(_vector_column(schema, source, chunk.file).name)
        batches = list(_span(file, wanted, chunk.start, chunk.stop))
        selected = pa.schema([schema.field(name) for name in schema.names if name in wanted], schema.metadata)
        return pa.Table.from_batches(batches, batches[0].schema if batches else selected).replace_schema_metadata(
            schema.metadata
        )


def _span(file: pq.ParquetFile, columns: Sequence[str], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    groups: list[int] = []
    base = first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if base < stop and base + rows > start:
            first = first if groups else base
            groups.append(group)
        base += rows
    for batch in file.iter_batches(8192, row_groups=groups, columns=list(columns)):
        if first >= stop:
            return
        begin, end = max(start, first), min(stop, first + len(batch))
        if begin < end:
            yield batch.slice(begin - first, end - begin)
        first += len(batch)


def _vectors(rows: pa.Table, planned: VectorPlan, chunk: Chunk) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Vectors [n, D] and which rows have none, of a parquet column."""
    source = planned.source
    field = _vector_column(rows.schema, source, chunk.file)
    column = rows[field.name].combine_chunks()
    present_N = column.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_binary(field.type):
        return np.array(from_vectors(pa.chunked_array([column]), rows.schema)), ~present_N
    lists = column.filter(pa.array(present_N))
    lengths = np.asarray(pc.list_value_length(lists))
    if (lengths != planned.width).any():
        at = int(np.flatnonzero(lengths != planned.width)[0])
        raise InvalidInput(
            f"{source.uri}: {source.files[chunk.file].name}: all vectors must have the width {planned.width}, found "
            f"{lengths[at]} in or after row {chunk.start + at}"
        )
    vectors_ND = np.zeros((len(rows), planned.width), np.float32 if planned.dtype == "float32" else np.float16)
    with np.errstate(over="ignore"):
        vectors_ND[present_N] = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, planned.width)
    return vectors_ND, ~present_N


def _npy_header(source: VectorSource, number: int) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    entry = source.arrays[number]
    head = BytesIO(source.store.get(entry.name, 0, _HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
    except ValueError as error:
        raise InvalidInput(f"{source.uri}: {entry.name} must be an .npy file, found {error}") from error
    return shape, fortran, dtype, head.tell()


def _npy_shape(source: VectorSource, number: int, rows: int) -> tuple[int, int, str]:
    shape, fortran, dtype, start = _npy_header(source, number)
    entry = source.arrays[number]
    if len(shape) != 2 or shape[0] != rows or fortran or dtype.kind != "f":
        raise InvalidInput(
            f"{source.uri}: {entry.name} must hold floats of shape [{rows}, D] in C order, one row per row of "
            f"{source.files[number].name}, found {dtype} {list(shape)}{' in Fortran order' if fortran else ''}"
        )
    if entry.size != start + dtype.itemsize * shape[0] * shape[1]:
        raise InvalidInput(f"{source.uri}: {entry.name} is cut short: {entry.size} bytes; copy it again")
    return rows, shape[1], "float16" if dtype.itemsize == 2 else "float32"


def _from_npy(source: VectorSource, chunk: Chunk) -> NDArray[Any]:
    shape, _, dtype, start = _npy_header(source, chunk.file)
    row_bytes = dtype.itemsize * shape[1]
    name = source.arrays[chunk.file].name
    data = source.store.get(name, start + chunk.start * row_bytes, (chunk.stop - chunk.start) * row_bytes)
    return np.frombuffer(data, dtype).reshape(-1, shape[1])
