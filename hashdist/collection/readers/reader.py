"""The contract of a source format: a class that says how its files are known, and reads their images.

A format is one file in this folder and one line in hashdist/collection/readers/__init__.py (docs/extend.md). Three
verbs: `units` cuts the files into units of scanning; `images` reads every byte of a unit once, of which `scan` makes a
row per image (SCANNED); `read` returns the bytes of rows that were scanned, sequentially. Readers are picklable and
hold no connection. An image that cannot be read is a row with a reason; a file of many images that cannot be read ends
the run with its name, because it stands for thousands of images.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_id
from hashdist.ground.schema import LISTING, OK, UNREADABLE
from hashdist.store import Entry, Store

SCANNED = pa.schema(
    [
        *LISTING,
        pa.field("names", pa.list_(pa.string())),  # labels given as text, before they have numbers
        pa.field("offset", pa.int64()),  # of the image's first byte within a tar
    ]
)
"""A row per image in the order of the source; ids without salts where the format only learns its keys by scanning."""

MAX_BYTES = 512 << 20
"""Most bytes of an encoded image: one of decode.MAX_PIXELS is smaller however it is encoded."""

REMOTE_READS = 16
"""Requests at once to a remote store."""

SPAN_BYTES = 8 << 20
"""Bytes of one request, about, where images lie beside each other in a file."""


class Unit(NamedTuple):
    """A run of rows of one source: the work of one task."""

    source: int
    start: int
    stop: int | None  # None: to the end, which only scanning tells


class Lost(NamedTuple):
    """Instead of an image's bytes: why there are none."""

    reason: str


class RawImage(NamedTuple):
    """An image as its source holds it; `more`: the other columns of SCANNED that the source knows."""

    key: str
    data: bytes | Lost
    position: int
    more: dict[str, Any]


class Reader(ABC):
    """The images of one format.

    Class attributes:
        format: name of the format, as `--collection.format` takes it and manifests keep it.
        plural: what messages call its files.
        extensions: by which its files are known, in lower case, with the dot.
        options: fields of CollectionSettings that `open` takes by keyword; they are part of the collection's digest.
        files_are_images: whether each file is one image whose key is the file's name; else files hold many images.
        digits_are_numbers: whether a label that is given as text and is all digits is that number.

    Attributes:
        salts: of the keys whose ids collide, where the keys are known without a scan.
    """

    format: ClassVar[str]
    plural: ClassVar[str]
    extensions: ClassVar[frozenset[str]]
    options: ClassVar[tuple[str, ...]] = ("labels",)
    files_are_images: ClassVar[bool] = False
    digits_are_numbers: ClassVar[bool] = False

    salts: Mapping[str, int] = MappingProxyType({})

    @classmethod
    @abstractmethod
    def open(cls, store: Store, files: list[Entry], **options: Any) -> "Reader":
        """A reader of listed files that are to be scanned. Raises InvalidInput for a file that is not of the format."""

    @classmethod
    def reopen(cls, store: Store, files: list[Entry], **options: Any) -> "Reader":
        """A reader of files that were scanned before, for `read` alone; nothing is read here."""
        return cls.open(store, files, **options)

    @abstractmethod
    def units(self, part_rows: int) -> list[Unit]:
        """Units that cover every image; a unit holds whole parts of at most `part_rows` rows."""

    @abstractmethod
    def images(self, unit: Unit) -> Iterator[RawImage]:
        """The images of a unit, in source order, every byte read once."""

    def scan(self, unit: Unit) -> pa.Table:
        """Rows SCANNED of a unit, in source order, every image byte read once."""
        scanned = ScannedRows(unit.source)
        for image in self.images(unit):
            scanned.add(image)
        return scanned.table()

    @abstractmethod
    def read(self, rows: pa.Table) -> Iterator[bytes | Lost]:
        """Bytes of rows of one source, in their order (ascending position)."""

    def read_keys(self, keys: Sequence[str]) -> Iterator[RawImage]:  # noqa: ARG002
        """One image for each key, listed or not; nothing where files hold many images."""
        return iter(())

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

    def add(self, image: RawImage) -> None:
        """Append a row."""
        data = image.data
        row = {
            "key": image.key,
            "digest": None if isinstance(data, Lost) else content_digest(data),
            "size": None if isinstance(data, Lost) else len(data),
            "source": self._source,
            "position": image.position,
            "status": UNREADABLE if isinstance(data, Lost) else OK,
            "reason": data.reason if isinstance(data, Lost) else None,
            **image.more,
        }
        if row.get("id") is None:
            row["id"] = image_id(image.key)
        for name, column in self._columns.items():
            column.append(row.get(name))

    def __len__(self) -> int:
        return len(self._columns["id"])

    def table(self) -> pa.Table:
        """The rows so far."""
        return pa.table(self._columns, schema=SCANNED)


def is_hidden(name: str) -> bool:
    """Whether a file lies under a name that begins with a dot, or in a folder that macOS adds to archives."""
    if "/." not in name and not name.startswith(".") and "__MACOSX" not in name:
        return False
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def require_unchanged(store: Store, entry: Entry) -> Entry:
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
