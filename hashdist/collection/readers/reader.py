"""Where encoded images lie: a folder tree, parquet files, WebDataset tars. One class a format, three verbs each.

`units` cuts the files into units of scanning; `images` reads every byte of a unit once, of which `scan` makes a row
per image (SCANNED); `read` returns the bytes of rows that were scanned, sequentially. Readers are picklable and hold no
connection. An image that cannot be read is a row with a reason; a parquet or tar file that cannot be read ends the
run with its name, because it stands for thousands of images.
"""

import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count, pairwise
from pathlib import PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hashdist.collection.decode import EXTENSIONS
from hashdist.ground.errors import InvalidInput, NotFound, Unavailable
from hashdist.ground.ids import image_id
from hashdist.ground.schema import LISTING, OK
from hashdist.ground.threads import in_order
from hashdist.store import Entry, Store

UNREADABLE = "unreadable"
"""Status of a row whose bytes could not be read."""

SCANNED = pa.schema(
    [
        *LISTING,
        pa.field("names", pa.list_(pa.string())),  # labels given as text, before they have numbers
        pa.field("offset", pa.int64()),  # of the image's first byte within a tar
    ]
)
"""A row per image in the order of the source; ids without salts where the format only learns its keys by scanning."""

MAX_BYTES = 512 << 20
"""Of an encoded image: one of images.MAX_PIXELS is smaller however it is encoded, but anything may lie in a bucket."""

_REMOTE_READS = 16
_SPAN_BYTES = 8 << 20
_MOST_LABEL_BYTES = 65_536
_UNIT_ROWS = 16_384


class Unit(NamedTuple):
    """A run of rows of one source; what one task scans."""

    source: int
    start: int
    stop: int | None  # None: to the end, which only scanning tells


class Lost(NamedTuple):
    """Instead of an image's bytes: why there are none."""

    reason: str


class Found(NamedTuple):
    """An image as it is met in its source; `more`: what the source says beside its bytes, by column of SCANNED."""

    key: str
    data: bytes | Lost
    position: int
    more: dict[str, Any]


class Reader(ABC):
    """The images of one format."""

    format: ClassVar[str]

    @abstractmethod
    def units(self, part_rows: int) -> list[Unit]:
        """Units that cover every image; a unit holds whole parts of at most `part_rows` rows."""

    @abstractmethod
    def images(self, unit: Unit) -> Iterator[Found]:
        """The images of a unit, in source order, every byte read once."""

    def scan(self, unit: Unit) -> pa.Table:
        """Rows SCANNED of a unit, in source order, every image byte read once."""
        scanned = ScannedRows(unit.source)
        for found in self.images(unit):
            scanned.add(found)
        return scanned.table()

    @abstractmethod
    def read(self, rows: pa.Table) -> Iterator[bytes | Lost]:
        """Bytes of rows of one source, in their order (ascending position)."""

    def classes(self) -> list[str]:
        """Names of the integer labels 0, 1, ..., where the format carries them."""
        return []


def content_digest(data: bytes) -> str:
    """32 hex digits of the encoded bytes: equal images have equal digests wherever they lie."""
    return blake2b(data, digest_size=16).hexdigest()


def source_stamp(entry: Entry) -> str:
    """Stamp of the rows of a parquet file or tar: another one when the file, or what is in it, may be another."""
    told = f"{entry.name}\0{entry.size}\0{entry.stamp}".encode("utf-8", "surrogateescape")
    return "file:" + blake2b(told, digest_size=12).hexdigest()


class ScannedRows:
    """Columns of SCANNED being filled."""

    def __init__(self, source: int) -> None:
        self._source = source
        self._columns: dict[str, list[Any]] = {name: [] for name in SCANNED.names}

    def add(self, found: Found) -> None:
        """Append a row."""
        data = found.data
        row = {
            "key": found.key,
            "digest": None if isinstance(data, Lost) else content_digest(data),
            "size": None if isinstance(data, Lost) else len(data),
            "source": self._source,
            "position": found.position,
            "status": UNREADABLE if isinstance(data, Lost) else OK,
            "reason": data.reason if isinstance(data, Lost) else None,
            **found.more,
        }
        if row.get("id") is None:
            row["id"] = image_id(found.key)
        for name, column in self._columns.items():
            column.append(row.get(name))

    def __len__(self) -> int:
        return len(self._columns["id"])

    def table(self) -> pa.Table:
        """The rows so far."""
        return pa.table(self._columns, schema=SCANNED)


@dataclass(frozen=True)
class FolderReader(Reader):
    """Image files in a folder tree; the key is the relative path, the class its first component.

    Args:
        store: the folder.
        rows: id, key, size, stamp of every image, sorted by id.
        labels: whether first-level subfolders are classes.
    """

    format: ClassVar[str] = "folder"

    store: Store
    rows: pa.Table
    labels: bool

    def units(self, part_rows: int) -> list[Unit]:
        """A unit is one part: runs of the rows by id."""
        return [Unit(0, start, min(start + part_rows, len(self.rows))) for start in range(0, len(self.rows), part_rows)]

    def images(self, unit: Unit) -> Iterator[Found]:
        """See Reader."""
        rows = self.rows.slice(unit.start, (unit.stop or 0) - unit.start)
        for row, data in zip(rows.to_pylist(), self.read(rows), strict=True):
            yield Found(row["key"], data, 0, self._known(row, data))

    def _known(self, row: dict[str, Any], data: bytes | Lost) -> dict[str, Any]:
        folder, slash, _ = row["key"].partition("/")
        known = {"id": row["id"], "stamp": row["stamp"], "names": [folder] if self.labels and slash else None}
        return {**known, "size": row["size"]} if isinstance(data, Lost) else known

    def read(self, rows: pa.Table) -> Iterator[bytes | Lost]:
        """See Reader. Many requests at once where the folder is remote."""
        return (data for _, data in self.read_keys(rows["key"].to_pylist()))

    def read_keys(self, keys: Sequence[str]) -> Iterator[tuple[str, bytes | Lost]]:
        """The keys with their bytes, as `read` does."""
        read = in_order(self._get, keys, _REMOTE_READS) if self._remote else map(self._get, keys)
        return zip(keys, read, strict=True)

    @property
    def _remote(self) -> bool:
        return self.store.local_path("any") is None

    def _get(self, key: str) -> bytes | Lost:
        try:
            data = self.store.get(key, 0, MAX_BYTES + 1)
            return data if len(data) <= MAX_BYTES else Lost(f"too-large: more than {MAX_BYTES} bytes")
        except NotFound:
            return Lost("vanished: it was listed, but is not there any more")
        except InvalidInput as error:
            return Lost(f"refused: {error}")
        except Unavailable as error:
            if not self._remote:
                return Lost(f"unreadable: {error}")
            raise  # the store, not the image: another run finds it


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

    store: Store
    files: list[Entry]
    id_column: str
    image_column: str
    labels: bool
    groups: list[list[int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, store: Store, files: list[Entry], id_column: str, image_column: str, labels: bool) -> "ParquetReader":
        """Read the footers. Raises InvalidInput for a file that is not parquet or lacks a column."""
        reader = cls(store, files, id_column, image_column, labels)
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            footers = list(pool.map(reader._footer, range(len(files))))
        named = [names for _, names in footers if names]
        if any(names != named[0] for names in named):
            raise InvalidInput(f"{store.uri}: the class names in the files' metadata must agree, found {named[:2]}")
        groups = [rows for rows, _ in footers]
        return cls(store, files, id_column, image_column, labels, groups, named[0] if named else [])

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

    def images(self, unit: Unit) -> Iterator[Found]:
        """See Reader."""
        stamp = source_stamp(_unchanged(self.store, self.files[unit.source]))
        with self._open(unit.source, buffer_size=_SPAN_BYTES) as file:
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
                    yield Found(str(key), data, position, {"stamp": stamp, **_label(value)})

    def read(self, rows: pa.Table) -> Iterator[bytes | Lost]:
        """See Reader. Reads the row groups that hold the rows from their beginning."""
        if not len(rows):
            return
        source = rows["source"][0].as_py()
        _unchanged(self.store, self.files[source])
        positions = rows["position"].to_numpy()
        done = 0
        with self._open(source, buffer_size=_SPAN_BYTES) as file:
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
        batch_rows = int(np.clip(_SPAN_BYTES * max(1, stop - start) // max(size, 1), 16, 1024))
        for batch in file.iter_batches(batch_rows, row_groups=groups, columns=wanted):
            first, last = max(start, base), min(stop, base + len(batch))
            if first < last:
                yield first, batch.slice(first - base, last - first)
            base += len(batch)


@dataclass(frozen=True)
class TarReader(Reader):
    """Samples of WebDataset tars: consecutive members that differ only in what follows the first dot of the name.

    The key is the path up to that dot, the image the first member with an image extension, the label the text of
    the member `cls`.

    Args:
        store: the folder of the tars.
        files: the tars, sorted by name.
        labels: whether to read `cls` members.
    """

    format: ClassVar[str] = "webdataset"

    store: Store
    files: list[Entry]
    labels: bool

    def units(self, part_rows: int) -> list[Unit]:  # noqa: ARG002 (only scanning tells where a tar's rows begin)
        """A unit is one tar."""
        return [Unit(source, 0, None) for source in range(len(self.files))]

    def images(self, unit: Unit) -> Iterator[Found]:
        """See Reader."""
        entry = _unchanged(self.store, self.files[unit.source])
        stamp, found = source_stamp(entry), 0
        filesystem, base = self.store.filesystem()
        try:
            with (
                filesystem.open_input_stream(f"{base}/{entry.name}", buffer_size=_SPAN_BYTES) as stream,
                tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar,
            ):
                for sample in _samples(tar, self.labels):
                    yield Found(sample.key, sample.image, found, {"stamp": stamp, **sample.known()})
                    found += 1
        except (tarfile.TarError, OSError) as error:
            raise InvalidInput(
                f"{self.store.uri}/{entry.name} must be a whole, uncompressed tar; reading it failed after "
                f"{found} samples ({error}); repair it, or move it out of the collection"
            ) from error

    def read(self, rows: pa.Table) -> Iterator[bytes | Lost]:
        """See Reader. Neighbouring images are read in one request."""
        if not len(rows):
            return
        entry = _unchanged(self.store, self.files[rows["source"][0].as_py()])
        offsets, sizes = rows["offset"].to_pylist(), rows["size"].to_pylist()
        spans = _together(offsets, sizes)

        def get(span: tuple[int, int]) -> list[bytes | Lost]:
            first, last = span
            begin = offsets[first]
            data = self.store.get(entry.name, begin, offsets[last] + sizes[last] - begin)
            return [data[offsets[i] - begin : offsets[i] - begin + sizes[i]] for i in range(first, last + 1)]

        for images in in_order(get, spans, 2):
            yield from images


@dataclass
class _Sample:
    """One sample of a tar while its members pass by."""

    key: str
    image: bytes | Lost
    offset: int | None = None
    plain: bool = False
    label: str | None = None
    others: list[str] = field(default_factory=list)

    def known(self) -> dict[str, Any]:
        return {"offset": self.offset, "names": None if self.label is None else [self.label]}

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, labels: bool) -> None:
        """Use a member: the first plain image (`jpg`), else the first of several words (`seg.png`)."""
        plain = f".{extension}" in EXTENSIONS
        if PurePosixPath(f"x.{extension}").suffix in EXTENSIONS and (self.offset is None or (plain and not self.plain)):
            large = member.size > MAX_BYTES  # a sparse member claims to be larger than the tar it is in
            self.image = Lost(f"too-large: {member.size} bytes") if large else _content(tar, member)
            self.offset, self.plain = member.offset_data, plain
        elif extension == "cls" and labels and member.size <= _MOST_LABEL_BYTES:
            self.label = _content(tar, member).decode(errors="replace").strip() or None
        else:
            self.others.append(extension)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _samples(tar: tarfile.TarFile, labels: bool) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header in memory
        folder, _, file = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = file.partition(".")
        if not member.isreg() or not stem or is_hidden(member.name):
            continue
        key = f"{folder}/{stem}" if folder else stem
        if sample is None or sample.key != key:
            if sample is not None:
                yield _finished(sample)
            sample = _Sample(key, Lost(""))
        sample.take(tar, member, extension.lower(), labels)
    if sample is not None:
        yield _finished(sample)


def _finished(sample: _Sample) -> _Sample:
    if isinstance(sample.image, Lost) and not sample.image.reason:
        sample.image = Lost(f"no-image: the sample has only {', '.join(sample.others) or 'a label'}")
    return sample


def is_hidden(name: str) -> bool:
    """Whether a file lies under a name that begins with a dot, or in what macOS adds to archives."""
    if "/." not in name and not name.startswith(".") and "__MACOSX" not in name:
        return False
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def _unchanged(store: Store, entry: Entry) -> Entry:
    """The file as it is now. Raises InvalidInput if it is not the one that was listed."""
    now = next(store.list(entry.name), None)
    if now is None or now.name != entry.name:
        raise InvalidInput(f"{store.uri}/{entry.name} was listed, but is not there any more; list the collection again")
    if (now.size, now.stamp) != (entry.size, entry.stamp):
        raise InvalidInput(
            f"{store.uri}/{entry.name} changed after it was listed ({entry.size} bytes then, {now.size} now); "
            "list the collection again"
        )
    return now


def _together(offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """[first, last] of runs of images that are read in one request."""
    starts = [0]
    for row, (before, here) in enumerate(pairwise(range(len(offsets))), 1):
        gap = offsets[here] - offsets[before] - sizes[before]
        if gap > _SPAN_BYTES // 8 or offsets[here] + sizes[here] - offsets[starts[-1]] > _SPAN_BYTES:
            starts.append(row)
    return [(first, after - 1) for first, after in pairwise([*starts, len(offsets)])]


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


def _label(value: Any) -> dict[str, Any]:
    """`labels` or `names` of a parquet value: an integer, a string, or a list of either; null entries are left out."""
    if value is None:
        return {}
    values = [entry for entry in (value if isinstance(value, list) else [value]) if entry is not None]
    return {"names": values} if values and isinstance(values[0], str) else {"labels": values}


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
