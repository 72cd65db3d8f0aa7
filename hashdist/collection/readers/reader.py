"""Where encoded images lie: a folder tree, parquet files, WebDataset tars. One class a format, three verbs each.

`units` cuts the files into units of scanning; `images` reads every byte of a unit once, of which `scan` makes a row
per image (SCANNED); `read` returns the bytes of rows that were scanned, sequentially. Readers are picklable and hold no
connection. An image that cannot be read is a row with a reason; a parquet or tar file that cannot be read ends the
run with its name, because it stands for thousands of images.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_id
from hashdist.ground.schema import LISTING, OK
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

REMOTE_READS = 16
SPAN_BYTES = 8 << 20
MOST_LABEL_BYTES = 65_536
UNIT_ROWS = 16_384


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


def is_hidden(name: str) -> bool:
    """Whether a file lies under a name that begins with a dot, or in what macOS adds to archives."""
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


def in_spans(offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """[first, last] of runs of images that are read in one request."""
    starts = [0]
    for row, (before, here) in enumerate(pairwise(range(len(offsets))), 1):
        gap = offsets[here] - offsets[before] - sizes[before]
        if gap > SPAN_BYTES // 8 or offsets[here] + sizes[here] - offsets[starts[-1]] > SPAN_BYTES:
            starts.append(row)
    return [(first, after - 1) for first, after in pairwise([*starts, len(offsets)])]


def label_columns(value: Any) -> dict[str, Any]:
    """`labels` or `names` of a parquet value: an integer, a string, or a list of either; null entries are left out."""
    if value is None:
        return {}
    values = [entry for entry in (value if isinstance(value, list) else [value]) if entry is not None]
    return {"names": values} if values and isinstance(values[0], str) else {"labels": values}
