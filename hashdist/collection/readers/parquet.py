"""Parquet files with a column of images, or of paths, beside keys and labels."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hashdist.collection.readers.reader import (
    REMOTE_READS,
    SPAN_BYTES,
    Lost,
    RawImage,
    Reader,
    Unit,
    require_unchanged,
    source_stamp,
)
from hashdist.ground.errors import InvalidInput
from hashdist.store import Entry, Store

_UNIT_ROWS = 16_384  # at least, but for the last unit of a file


@dataclass(frozen=True)
class ParquetReader(Reader):
    """Rows of parquet files: a key column, a column of encoded images, and labels.

    Args:
        store: the folder of the files.
        files: the files, sorted by name.
        id_column: string or integer.
        image_column: binary, or a struct with a field `bytes`.
        labels: whether to read `labels` (lists of integers or strings) or else `label` (one of them).
        groups: rows of each row group of each file.
        names: of the classes, from the schema's metadata.
    """

    format: ClassVar[str] = "parquet"
    plural: ClassVar[str] = "parquet files"
    extensions: ClassVar[frozenset[str]] = frozenset({".parquet"})
    options: ClassVar[tuple[str, ...]] = ("labels", "id_column", "image_column")

    store: Store
    files: list[Entry]
    id_column: str
    image_column: str
    labels: bool
    groups: list[list[int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, store: Store, files: list[Entry], **options: Any) -> "ParquetReader":
        """See Reader. Reads the footers. Raises InvalidInput for a file that is not parquet or lacks a column."""
        reader = cls.reopen(store, files, **options)
        with ThreadPoolExecutor(REMOTE_READS) as pool:
            footers = list(pool.map(reader._footer, range(len(files))))
        named = [names for _, names in footers if names]
        if any(names != named[0] for names in named):
            raise InvalidInput(f"{store.uri}: the class names in the files' metadata must agree, found {named[:2]}")
        return replace(reader, groups=[rows for rows, _ in footers], names=named[0] if named else [])

    @classmethod
    def reopen(cls, store: Store, files: list[Entry], **options: Any) -> "ParquetReader":
        """See Reader."""
        return cls(store, files, **options)

    def _footer(self, source: int) -> tuple[list[int], list[str]]:
        with self._open(source) as file:
            schema = file.schema_arrow
            self._check(schema, source)
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            return rows, _class_names(schema) if self.labels else []

    def _check(self, schema: pa.Schema, source: int) -> None:
        where = f"{self.store.uri}/{self.files[source].name}"
        for column, option in ((self.id_column, "id_column"), (self.image_column, "image_column")):
            if column not in schema.names:
                raise InvalidInput(
                    f"{where} must have a column {column!r}, found {schema.names}; "
                    f"name yours with --collection.{option}"
                )
        key, image = schema.field(self.id_column).type, schema.field(self.image_column).type
        if not (_is_text(key) or pa.types.is_integer(key)):
            raise InvalidInput(f"{where}: column {self.id_column!r} must hold strings or integers, found {key}")
        if not _is_image(image):
            raise InvalidInput(
                f"{where}: column {self.image_column!r} must hold encoded image bytes (binary, or a struct with "
                f"`bytes`), found {image}; name yours with --collection.image_column"
            )
        label = self._label_column(schema)
        if label and not _is_label(schema.field(label).type):
            raise InvalidInput(
                f"{where}: column {label!r} must hold integers or strings or lists of them, found "
                f"{schema.field(label).type}; leave labels out with --collection.labels false"
            )

    def _label_column(self, schema: pa.Schema) -> str | None:
        return next((name for name in ("labels", "label") if self.labels and name in schema.names), None)

    def _open(self, source: int, **options: Any) -> pq.ParquetFile:
        entry = self.files[source]
        filesystem, base = self.store.filesystem()
        try:
            return pq.ParquetFile(filesystem.open_input_file(f"{base}/{entry.name}"), **options)
        except (pa.ArrowInvalid, OSError) as error:
            raise InvalidInput(
                f"{self.store.uri}/{entry.name} must be a parquet file, found {entry.size} bytes that cannot be read "
                f"as one ({error}); repair it, or move it out of the collection"
            ) from error

    def classes(self) -> list[str]:
        """See Reader."""
        return self.names

    def units(self, part_rows: int) -> list[Unit]:
        """Runs of whole row groups, unless one row group is very long."""
        target = -(-_UNIT_ROWS // part_rows) * part_rows
        return [Unit(source, *span) for source, groups in enumerate(self.groups) for span in _spans(groups, target)]

    def images(self, unit: Unit) -> Iterator[RawImage]:
        """See Reader."""
        stamp = source_stamp(require_unchanged(self.store, self.files[unit.source]))
        with self._open(unit.source, buffer_size=SPAN_BYTES) as file:
            label = self._label_column(file.schema_arrow)
            columns = [self.id_column, *([label] if label else [])]
            for first, batch in self._batches(file, unit.start, unit.stop or 0, columns):
                keys = batch[self.id_column].to_pylist()
                labels = batch[label].to_pylist() if label else [None] * len(keys)
                images = _bytes(batch[self.image_column])
                for position, key, data, value in zip(count(first), keys, images, labels, strict=False):
                    if key is None:
                        raise InvalidInput(
                            f"{self.store.uri}/{self.files[unit.source].name}: every row must have a value in column "
                            f"{self.id_column!r}, row {position} has none"
                        )
                    yield RawImage(str(key), data, position, {"stamp": stamp, **_labels(value)})

    def read(self, rows: pa.Table) -> Iterator[bytes | Lost]:
        """See Reader. Reads the row groups that hold the rows from their beginning."""
        if not len(rows):
            return
        source = rows["source"][0].as_py()
        require_unchanged(self.store, self.files[source])
        positions = rows["position"].to_numpy()
        done = 0
        with self._open(source, buffer_size=SPAN_BYTES) as file:
            for first, batch in self._batches(file, int(positions[0]), int(positions[-1]) + 1, []):
                stop = int(np.searchsorted(positions, first + len(batch)))
                wanted = positions[done:stop] - first
                column = batch[self.image_column]
                yield from _bytes(column if len(wanted) == len(batch) else column.take(pa.array(wanted)))
                done = stop

    def _batches(
        self, file: pq.ParquetFile, start: int, stop: int, columns: list[str]
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Rows [start, stop) of the images and `columns`, in batches of bounded bytes, with their first position."""
        nested = pa.types.is_struct(file.schema_arrow.field(self.image_column).type)
        wanted = [*columns, f"{self.image_column}.bytes" if nested else self.image_column]
        groups, base, size = _overlap(file, start, stop)
        batch_rows = int(np.clip(SPAN_BYTES * max(1, stop - start) // max(size, 1), 16, 1024))
        for batch in file.iter_batches(batch_rows, row_groups=groups, columns=wanted):
            first, last = max(start, base), min(stop, base + len(batch))
            if first < last:
                yield first, batch.slice(first - base, last - first)
            base += len(batch)


def _spans(groups: Sequence[int], target: int) -> list[tuple[int, int]]:
    """[start, stop) of runs of row groups with at least `target` rows, and of pieces of a group with far more."""
    spans: list[tuple[int, int]] = []
    start = stop = 0
    for rows in groups:
        stop += rows
        while stop - start >= 8 * target:
            spans.append((start, start + target))
            start += target
        if stop - start >= target:
            spans.append((start, stop))
            start = stop
    if stop > start:
        spans.append((start, stop))
    return spans


def _overlap(file: pq.ParquetFile, start: int, stop: int) -> tuple[list[int], int, int]:
    """Row groups that hold rows of [start, stop), the position of their first row, their bytes per such row, summed."""
    groups: list[int] = []
    first = base = size = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        last = first + metadata.num_rows
        shared = min(last, stop) - max(first, start)
        if shared > 0:
            base = base if groups else first
            groups.append(group)
            size += metadata.total_byte_size * shared // metadata.num_rows
        first = last
    return groups, base, size


def _bytes(column: pa.Array) -> list[bytes | Lost]:
    """Encoded images of a binary column, or of a struct column with the one field `bytes`."""
    plain = column.field(0) if pa.types.is_struct(column.type) else column
    return [Lost("null: the row has no image bytes") if value is None else value for value in plain.to_pylist()]


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain))


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_label(kind: pa.DataType) -> bool:
    single = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return bool(_is_text(single) or pa.types.is_integer(single))


def _class_names(schema: pa.Schema) -> list[str]:
    """Class names in a schema's metadata: `classes` as JSON or with | or , between them, or Hugging Face's form."""
    metadata = {key.decode(): value.decode(errors="replace") for key, value in (schema.metadata or {}).items()}
    text = metadata.get("classes") or metadata.get("class_names")
    if text:
        if text.lstrip().startswith("["):
            with suppress(ValueError):
                return [str(name) for name in json.loads(text)]
        return [name.strip() for name in text.split("|" if "|" in text else ",")]
    try:
        features = json.loads(metadata.get("huggingface", "{}"))["info"]["features"]
        label = features.get("labels") or features.get("label") or {}
        return [str(name) for name in (label.get("names") or label.get("feature", {}).get("names") or [])]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _labels(value: Any) -> dict[str, Any]:
    """`labels` or `names` of a parquet value: an integer, a string, or a list of either; null entries are left out."""
    if value is None:
        return {}
    values = [entry for entry in (value if isinstance(value, list) else [value]) if entry is not None]
    return {"names": values} if values and isinstance(values[0], str) else {"labels": values}
