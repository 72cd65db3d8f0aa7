"""Folders of image files; the folder of an image may be its label."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from hashdist.collection.readers.reader import MAX_BYTES, REMOTE_READS, Found, Lost, Reader, Unit
from hashdist.ground.errors import InvalidInput, NotFound, Unavailable
from hashdist.ground.threads import in_order
from hashdist.store import Store


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
        read = in_order(self._get, keys, REMOTE_READS) if self._remote else map(self._get, keys)
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
