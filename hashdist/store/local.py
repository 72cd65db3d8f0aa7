"""A store in a local folder (or a shared file system with hard links, such as NFS)."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import pyarrow.fs

from hashdist.ground import telemetry
from hashdist.ground.errors import AlreadyExists, InvalidInput, NotFound, OutcomeUnknown, Unavailable
from hashdist.store.base import Entry, Exists, Store, checked_name

TEMPORARY = ".hashdist-tmp-"
"""Prefix of a file that is being written; listings never show one. A killed writer leaves it behind, and it may go."""

_ATTEMPT = re.compile("[0-9a-f]{32}")
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EOPNOTSUPP}  # file systems that order such changes themselves
_USERS_FAULT = {
    errno.EACCES,
    errno.EEXIST,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


class LocalStore(Store):
    """Objects are files. An object appears under its final name by link(), whole and on disk.

    Args:
        folder: absolute path; need not exist.
    """

    form: ClassVar[str] = "file://..."

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.uri = folder.as_uri()

    @classmethod
    def parse(cls, uri: str) -> "LocalStore":
        """From a path or a file:// URI."""
        path = Path(uri)
        if uri.startswith("file://"):
            parsed = urlsplit(uri)
            if parsed.netloc not in ("", "localhost"):
                raise InvalidInput(f"a file URI needs three slashes, file:///abs/path, found {uri!r}")
            path = Path(unquote(parsed.path))
        return cls(Path(os.path.abspath(path.expanduser())))

    def child(self, path: str) -> "LocalStore":
        """See Store."""
        return LocalStore(self._folder / checked_name(path))

    def as_file(self) -> tuple[Store, str]:
        """See Store."""
        return LocalStore(self._folder.parent), self._folder.name

    def local_path(self, name: str) -> Path:
        """See Store."""
        return self._folder / checked_name(name)

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """See Store."""
        return pyarrow.fs.LocalFileSystem(), str(self._folder)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        telemetry.count_request("get")
        with _reading(self.uri, name), open(self.local_path(name), "rb", opener=_regular) as file:
            file.seek(start)
            left = max(0, os.fstat(file.fileno()).st_size - start)
            data = file.read(left if length is None else min(length, left))
        telemetry.count_bytes("read", len(data))
        return data

    def stat(self, name: str) -> Entry:
        """See Store."""
        telemetry.count_request("head")
        with _reading(self.uri, name):
            path = self.local_path(name)
            if not path.is_file():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return _entry(name, path.stat())

    def exists(self, name: str) -> bool:
        """See Store."""
        telemetry.count_request("head")
        return self.local_path(name).is_file()

    def delete(self, name: str) -> None:
        """See Store."""
        telemetry.count_request("delete")
        path = self.local_path(name)
        with _writing(self.uri, name):
            path.unlink(missing_ok=True)
        if _ATTEMPT.fullmatch(path.parent.name):  # one writer's folder, which nobody else will write to
            with suppress(OSError):
                path.parent.rmdir()

    def abandoned(self) -> Iterator[Entry]:
        """See Store: files that were being written."""
        for folder, _, names in os.walk(self._folder):
            for name in names:
                if name.startswith(TEMPORARY):
                    path = Path(folder, name)
                    with suppress(FileNotFoundError):
                        yield _entry(path.relative_to(self._folder).as_posix(), path.stat())

    def put(self, name: str, data: bytes | memoryview) -> None:
        """See Store. Raises AlreadyExists for a name in use: nothing is ever overwritten."""
        telemetry.count_request("put")
        self._put(name, [data])

    def put_file(self, name: str, path: Path) -> None:
        """See Store."""
        telemetry.count_request("put")
        with path.open("rb") as source:
            self._put(name, iter(lambda: source.read(8 << 20), b""))

    def _put(self, name: str, pieces: "Iterator[bytes] | list[bytes | memoryview]") -> None:
        try:
            self._land(name, pieces)
        except Exists as error:
            raise AlreadyExists(
                f"{self.uri}/{name} exists; objects are never overwritten, choose a new name"
            ) from error

    def create(self, name: str, data: bytes, write_id: str) -> None:  # noqa: ARG002 (the body carries the write id)
        """See Store."""
        telemetry.count_request("create")
        self._land(name, [data])

    def _land(self, name: str, pieces: "Iterator[bytes] | list[bytes | memoryview]") -> None:
        final = self.local_path(name)
        temporary = final.with_name(TEMPORARY + uuid4().hex)
        with _writing(self.uri, name):
            _make_folder(final.parent)
            try:
                with temporary.open("xb") as file:
                    for piece in pieces:
                        telemetry.count_bytes("written", file.write(piece))
                    file.flush()
                    os.fsync(file.fileno())
                _link(temporary, final)
            finally:
                with suppress(OSError):
                    temporary.unlink()
        try:
            _sync_folder(final.parent)
        except OSError as error:
            raise OutcomeUnknown(
                f"{self.uri}/{name} is written, but its folder could not be synced: {error}"
            ) from error

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[Entry]:
        """See Store. Links to files and folders are followed."""
        after = os.fsencode(start_after)
        folder, _, _ = prefix.rpartition("/")
        top = self._folder / checked_name(folder) if folder else self._folder
        return _walk(top, f"{folder}/" if folder else "", os.fsencode(prefix), after, frozenset())


def _walk(folder: Path, base: str, prefix: bytes, after: bytes, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
    telemetry.count_request("list")
    try:
        status = folder.stat()
        with os.scandir(folder) as scan:
            found = [(entry.name + "/" if entry.is_dir() else entry.name, entry) for entry in scan]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _as_ours(error, f"{folder} cannot be listed") from error
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link back to a folder above
        return
    # a folder sorts with its slash, so that the whole listing is in the order of the full names
    for name, entry in sorted(found, key=lambda item: os.fsencode(item[0])):
        full = os.fsencode(base + name)
        if name.endswith("/"):
            wanted = full.startswith(prefix) or prefix.startswith(full)
            if wanted and (full > after or after.startswith(full)):
                yield from _walk(folder / entry.name, base + name, prefix, after, above | {here})
        elif full.startswith(prefix) and full > after and not name.startswith(TEMPORARY):
            with suppress(FileNotFoundError):  # gone since the folder was read, or a link to nothing
                yield _entry(base + name, entry.stat())


def _regular(path: str, flags: int) -> int:
    """Descriptor of a file. A pipe or a device under an image's name would be waited for, or read, without end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EPERM, "it is no regular file")


def _entry(name: str, status: os.stat_result) -> Entry:
    return Entry(name, status.st_size, str(status.st_mtime_ns), status.st_mtime)


def _link(temporary: Path, final: Path) -> None:
    try:
        os.link(temporary, final)
    except FileExistsError as error:
        raise Exists(f"{final} exists") from error
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise InvalidInput(
                f"hashdist commits with hard links, but the file system of {final.parent} refuses: {error.strerror}; "
                "use another folder, or an s3:// root"
            ) from error
        raise


def _make_folder(folder: Path) -> None:
    """Create a folder with its parents, each one synced into its own parent."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _reading(uri: str, name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{uri}/{name} does not exist") from error
    except OSError as error:
        raise _as_ours(error, f"{uri}/{name} cannot be read") from error


@contextmanager
def _writing(uri: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _as_ours(error, f"{uri}/{name} cannot be written") from error


def _as_ours(error: OSError, what: str) -> InvalidInput | Unavailable:
    """The user's to mend (permissions, paths), or the machine's (disk full, I/O error)."""
    kind = InvalidInput if error.errno in _USERS_FAULT else Unavailable
    return kind(f"{what}: {error.strerror or error}")
