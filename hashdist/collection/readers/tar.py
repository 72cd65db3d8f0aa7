"""WebDataset tars: members that share a base name are one sample."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, ClassVar

import pyarrow as pa

from hashdist.collection.decode import EXTENSIONS
from hashdist.collection.readers.reader import (
    MAX_BYTES,
    SPAN_BYTES,
    Lost,
    RawImage,
    Reader,
    Unit,
    is_hidden,
    require_unchanged,
    source_stamp,
)
from hashdist.ground.errors import InvalidInput
from hashdist.ground.threads import in_order
from hashdist.store import Entry, Store

_MOST_LABEL_BYTES = 65_536


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
    plural: ClassVar[str] = "tars"
    extensions: ClassVar[frozenset[str]] = frozenset({".tar"})
    digits_are_numbers: ClassVar[bool] = True  # a tar has no other way to give numbers

    store: Store
    files: list[Entry]
    labels: bool

    @classmethod
    def open(cls, store: Store, files: list[Entry], **options: Any) -> "TarReader":
        """See Reader. Nothing is read: only scanning tells what is in a tar."""
        return cls(store, files, **options)

    def units(self, part_rows: int) -> list[Unit]:  # noqa: ARG002 (only scanning tells where a tar's rows begin)
        """A unit is one tar."""
        return [Unit(source, 0, None) for source in range(len(self.files))]

    def images(self, unit: Unit) -> Iterator[RawImage]:
        """See Reader."""
        entry = require_unchanged(self.store, self.files[unit.source])
        stamp, found = source_stamp(entry), 0
        filesystem, base = self.store.filesystem()
        try:
            with (
                filesystem.open_input_stream(f"{base}/{entry.name}", buffer_size=SPAN_BYTES) as stream,
                tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar,
            ):
                for sample in _samples(tar, self.labels):
                    yield RawImage(sample.key, sample.image, found, {"stamp": stamp, **sample.known()})
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
        entry = require_unchanged(self.store, self.files[rows["source"][0].as_py()])
        offsets, sizes = rows["offset"].to_pylist(), rows["size"].to_pylist()
        runs = spans(offsets, sizes)

        def get(span: tuple[int, int]) -> list[bytes | Lost]:
            first, last = span
            begin = offsets[first]
            data = self.store.get(entry.name, begin, offsets[last] + sizes[last] - begin)
            return [data[offsets[i] - begin : offsets[i] - begin + sizes[i]] for i in range(first, last + 1)]

        for images in in_order(get, runs, 2):
            yield from images


def spans(offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """[first, last] of runs of images that are read in one request."""
    starts = [0]
    for row, (before, here) in enumerate(pairwise(range(len(offsets))), 1):
        gap = offsets[here] - offsets[before] - sizes[before]
        if gap > SPAN_BYTES // 8 or offsets[here] + sizes[here] - offsets[starts[-1]] > SPAN_BYTES:
            starts.append(row)
    return [(first, after - 1) for first, after in pairwise([*starts, len(offsets)])]


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
                yield _complete(sample)
            sample = _Sample(key, Lost(""))
        sample.take(tar, member, extension.lower(), labels)
    if sample is not None:
        yield _complete(sample)


def _complete(sample: _Sample) -> _Sample:
    if isinstance(sample.image, Lost) and not sample.image.reason:
        sample.image = Lost(f"no-image: the sample has only {', '.join(sample.others) or 'a label'}")
    return sample
