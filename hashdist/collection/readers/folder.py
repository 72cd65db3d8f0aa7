"""Folders of image files; the folder of an image may be its label."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from hashdist.collection.decode import EXTENSIONS
from hashdist.collection.readers.reader import MAX_BYTES, REMOTE_READS, Lost, RawImage, Reader, Unit
from hashdist.ground.errors import InvalidInput, NotFound, Unavailable
from hashdist.ground.ids import image_ids, salts_of
from hashdist.ground.schema import LISTING
from hashdist.ground.threads import in_order
from hashdist.store import Entry, Store

_ROWS = pa.schema([LISTING.field(name) for name in ("id", "key", "size", "stamp")])


@dataclass(frozen=True)
class FolderReader(Reader):
    """Image files in a folder tree; the key is the relative path, the class its first component.

    Args:
        store: the folder.
        rows: id, key, size, stamp of every image, sorted by id.
        labels: whether first-level subfolders are classes.
        salts: see Reader.
    """

    format: ClassVar[str] = "folder"
    plural: ClassVar[str] = "images"
    extensions: ClassVar[frozenset[str]] = EXTENSIONS
    files_are_images: ClassVar[bool] = True

    store: Store
    rows: pa.Table
    labels: bool
    salts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, store: Store, files: list[Entry], **options: Any) -> "FolderReader":
        """See Reader. Raises InvalidInput for two names of one key."""
        # names that are not UTF-8 cannot be keys; escaped, they are rows that will not be found
        keys = [entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for entry in files]
        ids = image_ids(keys)
        salts = salts_of(ids, lambda rows: [keys[row] for row in rows], lambda: keys)
        if salts:
            ids = image_ids(keys, salts)
        rows = pa.table([ids, keys, [e.size for e in files], [e.stamp for e in files]], schema=_ROWS)
        return cls(store, rows.take(np.argsort(ids)), **options, salts=salts)

    @classmethod
    def reopen(cls, store: Store, files: list[Entry], **options: Any) -> "FolderReader":  # noqa: ARG003
        """See Reader."""
        return cls(store, _ROWS.empty_table(), **options)

    def units(self, part_rows: int) -> list[Unit]:
        """A unit is one part: runs of the rows by id."""
        return [Unit(0, start, min(start + part_rows, len(self.rows))) for start in range(0, len(self.rows), part_rows)]

    def images(self, unit: Unit) -> Iterator[RawImage]:
        """See Reader."""
        rows = self.rows.slice(unit.start, (unit.stop or 0) - unit.start)
        for row, data in zip(rows.to_pylist(), self.read(rows), strict=True):
            known = {"id": row["id"], "stamp": row["stamp"], **self._label(row["key"])}
            yield RawImage(row["key"], data, 0, {**known, "size": row["size"]} if isinstance(data, Lost) else known)

    def _label(self, key: str) -> dict[str, Any]:
        folder, slash, _ = key.partition("/")
        return {"names": [folder] if self.labels and slash else None}

    def read(self, rows: pa.Table) -> Iterator[bytes | Lost]:
        """See Reader. Many requests at once where the folder is remote."""
        return (image.data for image in self.read_keys(rows["key"].to_pylist()))

    def read_keys(self, keys: Sequence[str]) -> Iterator[RawImage]:
        """See Reader."""
        read = in_order(self._get, keys, REMOTE_READS) if self._remote else map(self._get, keys)
        return (RawImage(key, data, 0, self._label(key)) for key, data in zip(keys, read, strict=True))

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
