"""The columns of every table that one stage writes and another reads, and how vectors sit in parquet.

Vectors (features, codes) are fixed-size binary, uncompressed, with dtype and width in the schema's metadata:
13 times faster to read than fixed-size lists (docs/decisions.md, S12).
"""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.ground.errors import Corrupt

FORMAT_VERSION = 1
"""Written into every manifest; a reader refuses a newer one by name."""

OK = "ok"
"""Status of a row that has its feature or code; any other status comes with a reason and a null vector."""

UNREADABLE = "unreadable"
"""Status of a row whose image could not be read."""

UNUSABLE = "unusable"
"""Status of a row whose vector is missing, not finite, or zero."""

ROW = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("digest", pa.string()),  # content digest of the image bytes, hex; null where never read
    pa.field("labels", pa.list_(pa.int32())),  # null where the collection has none
]
"""What every row about an image begins with, in this order, whatever the stage."""

LISTING = pa.schema(
    [
        *ROW,
        pa.field("size", pa.int64()),  # bytes of the encoded image; null where the container does not say
        pa.field("stamp", pa.string()),  # ETag, or mtime in ns: changes when the content may have changed
        pa.field("source", pa.int32(), nullable=False),  # which file of the manifest's "sources"; folder: always 0
        pa.field("position", pa.int64(), nullable=False),  # row or member within that file; folder: 0
        pa.field("status", pa.string(), nullable=False),  # OK or UNREADABLE
        pa.field("reason", pa.string()),
    ]
)


def vector_schema(name: str, dtype: str, width: int) -> pa.Schema:
    """Schema of a table of one vector per image: ROW, status, reason, and `name` as fixed-size binary.

    Args:
        name: `feature` or `code`.
        dtype: numpy name of one element: float32, float16 or uint8.
        width: elements per vector.
    """
    field = pa.field(name, pa.binary(np.dtype(dtype).itemsize * width))
    columns = [*ROW, pa.field("status", pa.string(), nullable=False), pa.field("reason", pa.string()), field]
    return pa.schema(columns, metadata={"dtype": dtype, "width": str(width)})


def to_vectors(vectors_ND: NDArray[np.generic], present_N: NDArray[np.bool_] | None = None) -> pa.Array:
    """Rows of a C-contiguous [N, D] array as fixed-size binary; null where `present_N` is False."""
    rows = np.ascontiguousarray(vectors_ND)
    kind = pa.binary(rows.itemsize * rows.shape[1])
    validity = None
    if present_N is not None and not present_N.all():
        validity = pa.py_buffer(np.packbits(present_N, bitorder="little").tobytes())
    return pa.Array.from_buffers(kind, len(rows), [validity, pa.py_buffer(rows)])


def from_vectors(column: pa.ChunkedArray, schema: pa.Schema) -> NDArray[np.generic]:
    """The [N, D] array of a column written by `to_vectors`; nulls read as zeros. Raises Corrupt without metadata."""
    metadata = schema.metadata or {}
    if b"dtype" not in metadata or b"width" not in metadata:
        raise Corrupt(f"a vector column needs `dtype` and `width` in the schema's metadata, found {sorted(metadata)}")
    dtype, width = np.dtype(metadata[b"dtype"].decode()), int(metadata[b"width"])
    if column.num_chunks == 1 and column.null_count == 0:
        chunk = column.chunk(0)
        flat = np.frombuffer(
            chunk.buffers()[1], dtype, count=len(chunk) * width, offset=chunk.offset * dtype.itemsize * width
        )
        return flat.reshape(len(chunk), width)
    out = np.zeros((len(column), width), dtype)
    row = 0
    for chunk in column.chunks:
        raw = np.frombuffer(
            chunk.buffers()[1], dtype, count=len(chunk) * width, offset=chunk.offset * dtype.itemsize * width
        )
        part = out[row : row + len(chunk)]
        part[:] = raw.reshape(len(chunk), width)
        if chunk.null_count:
            part[chunk.is_null().to_numpy(zero_copy_only=False)] = 0
        row += len(chunk)
    return out


def slug(reason: str | None) -> str:
    """The kind of a failure: the word of its reason that stands before the colon."""
    return str(reason).partition(":")[0]


def failures(table: pa.Table) -> Counter[str]:
    """How many rows of a table failed, by the kind of failure."""
    return Counter(map(slug, table.filter(pc.not_equal(table["status"], OK))["reason"].to_pylist()))
