"""Files of a store on this machine's disk: the store's own where it is local, else copies in a cache of bounded size.

A copy lies under its SHA-256 in CACHE/<2 digits>/, where CACHE is HASHDIST_CACHE or ~/.cache/hashdist, and is made of
ranges that are fetched in parallel and checksummed while the rest still comes. Any number of processes share a cache:

- A copy appears whole, by rename. Who makes it holds a lock on its `.part` file; others who want it wait and use it.
- A file in use is a hard link in CACHE/in-use/<process>/, which the process holds a lock on for its life. The link is
  what is opened, so nothing that happens to the copy can reach its user, and a copy with a second link is not evicted.
- Before a copy is made, the copies that were used least recently are deleted until it fits: HASHDIST_CACHE_GB, or
  half of what is free, at most 50 GB. What is in use stays, even where that is more.

Where the cache cannot be written, copies lie in a temporary folder of the process, which is said once.
"""

import atexit
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from hashdist.ground import telemetry
from hashdist.ground.errors import Corrupt, InvalidInput, NotFound, Unavailable
from hashdist.ground.progress import say
from hashdist.ground.ranges import blocks
from hashdist.store import Store

_RANGE_BYTES = 4 << 20
_REQUESTS = 16
"""Ranges fetched at once by a process, of all files together: a download needs memory for these."""

_HASHED_AT_ONCE = 1 << 20
_DEFAULT_GB = 50
_RECENT_S = 60
"""A copy used this lately is not evicted: its user may be about to open it."""

_STALE_S = 86_400
_ALIVE = "alive"
_SHA256 = re.compile("[0-9a-f]{64}")
_opening = threading.Lock()
_checked: set[tuple[str, int, int, str]] = set()


def local_file(store: Store, entry: Mapping[str, Any], user: object = None) -> Path:
    """A committed file on this machine's disk, checksummed when it is first asked for in a process.

    Args:
        store: where it is committed.
        entry: {"path", "bytes", "sha256"}.
        user: while this object lives, the copy is not evicted; without one, open the file at once.

    Raises:
        Corrupt: the store's bytes are not those that were committed. NotFound. Unavailable: the store does not
        answer, or there is no room on this machine.
    """
    own: Path | None = store.local_path(entry["path"])
    if own is None:
        return _local_copy(store, entry, user)
    if not own.is_file():
        raise NotFound(f"{store.uri}/{entry['path']} does not exist, but a committed version names it")
    if not _sound(own, entry):
        raise Corrupt(f"{own} does not match its checksum {entry['sha256']}; restore it from a backup")
    return own


def cache_folder() -> Path:
    """Where copies of remote files are kept: HASHDIST_CACHE, or ~/.cache/hashdist."""
    return Path(os.environ.get("HASHDIST_CACHE") or Path.home() / ".cache" / "hashdist")


# Copies


def _local_copy(store: Store, entry: Mapping[str, Any], user: object) -> Path:
    cache = _open(cache_folder(), os.getpid())
    for folder in dict.fromkeys((cache_folder(), cache.folder)):  # one that cannot be written may be full of copies
        with suppress(OSError):
            copy = _place(folder, entry)
            if _sound(copy, entry):
                return _count("hit", entry, cache.use(copy, user))
    copy = _place(cache.folder, entry)
    with _sole_maker(copy) as descriptor:
        with suppress(FileNotFoundError):
            if _sound(copy, entry):  # another was making it
                return _count("hit", entry, cache.use(copy, user))
        cache.make_room(entry["bytes"])
        found = _download(store, entry, descriptor)
        if found != entry["sha256"]:
            raise Corrupt(f"{store.uri}/{entry['path']}: SHA-256 {entry['sha256']} was committed, found {found}")
        os.replace(_part(copy), copy)
        _checked.add(_mark(copy, entry))
        return _count("miss", entry, cache.use(copy, user))


def _count(outcome: str, entry: Mapping[str, Any], path: Path) -> Path:
    telemetry.CACHE_FILES.inc(outcome=outcome)
    telemetry.CACHE_BYTES.inc(entry["bytes"], outcome=outcome)
    return path


def _place(folder: Path, entry: Mapping[str, Any]) -> Path:
    sha256 = str(entry["sha256"])
    if not _SHA256.fullmatch(sha256):  # it becomes a path, and a manifest may say anything
        raise Corrupt(f"the checksum of {entry['path']} must be 64 hexadecimal digits, found {sha256[:80]!r}")
    return folder / sha256[:2] / sha256


def _part(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.part")


@contextmanager
def _sole_maker(copy: Path) -> Iterator[int]:
    """The locked, empty `.part` file of a copy; waits for whoever has it."""
    part = _part(copy)
    part.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(part)
    while not _is_file(descriptor, part):  # it was renamed or deleted while this waited
        os.close(descriptor)
        descriptor = _lock(part)
    try:
        os.ftruncate(descriptor, 0)
        yield descriptor
    finally:
        if _is_file(descriptor, part):
            part.unlink()
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _download(store: Store, entry: Mapping[str, Any], descriptor: int) -> str:
    """Fetch a file in parallel ranges; returns the SHA-256 of the bytes, complete soon after the last range is."""
    digest = hashlib.sha256()
    fetch = partial(_fetch, store, entry["path"], descriptor)
    ranges = list(blocks(entry["bytes"], _RANGE_BYTES))
    futures = [requests().submit(fetch, *span) for span in ranges]
    try:
        for (start, stop), future in zip(ranges, futures, strict=True):
            future.result()
            for at in range(start, stop, _HASHED_AT_ONCE):
                digest.update(os.pread(descriptor, min(_HASHED_AT_ONCE, stop - at), at))
    except OSError as error:
        raise Unavailable(
            f"{entry['bytes']} bytes of {store.uri}/{entry['path']} cannot be kept in {cache_folder()}: {error}; "
            "make room there, or let HASHDIST_CACHE name another folder"
        ) from error
    finally:
        for future in futures:
            future.cancel()
        for future in futures:
            with suppress(BaseException):  # also of the cancelled; the descriptor is closed next
                future.result()
    return digest.hexdigest()


def _fetch(store: Store, name: str, descriptor: int, start: int, stop: int) -> None:
    data = memoryview(store.get(name, start, stop - start))
    while data:
        written = os.pwrite(descriptor, data, start)
        data, start = data[written:], start + written


def requests() -> ThreadPoolExecutor:
    """The threads by which this process fetches ranges; work handed to them must not wait for other such work."""
    return _requests(os.getpid())


@lru_cache(maxsize=1)
def _requests(pid: int) -> ThreadPoolExecutor:  # noqa: ARG001 (a forked child has none of its parent's threads)
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="hashdist-fetch")


def _sound(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file holds the committed bytes; looked at once a process, and again if the file has changed."""
    mark = _mark(path, entry)
    if mark in _checked:
        return True
    if mark[1] != entry["bytes"]:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_HASHED_AT_ONCE):
            digest.update(data)
    if digest.hexdigest() != entry["sha256"]:
        return False
    _checked.add(mark)
    return True


def _mark(path: Path, entry: Mapping[str, Any]) -> tuple[str, int, int, str]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns, entry["sha256"]


# The folder, shared


class _Copy(NamedTuple):
    used_at: float
    bytes: int
    links: int
    path: Path


class _Cache:
    """A folder that this process can write, and the files there that it uses."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._pid = folder, os.getpid()
        self._in_use = folder / "in-use" / f"{self._pid}-{uuid4().hex}"
        self._in_use.mkdir(parents=True)
        self._alive = _lock(self._in_use / _ALIVE)
        self._counting = threading.Lock()
        self._room = 0  # bytes that may be added before the copies must be counted again
        atexit.register(self._leave)

    def use(self, copy: Path, user: object) -> Path:
        """The path to open; the use is noted. Raises FileNotFoundError."""
        with suppress(PermissionError):  # a copy in a folder that is only read
            os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))
        if user is None:
            return copy
        link = self._in_use / uuid4().hex
        try:
            os.link(copy, link)
        except FileNotFoundError:
            raise
        except OSError:
            return copy  # no links here, or a copy in another file system
        weakref.finalize(user, self._release, link).atexit = False
        return link

    def make_room(self, size: int) -> None:
        """Evict the copies that were used least recently, until `size` more bytes are within the bound."""
        with self._counting:
            self._room -= size
            if self._room >= 0:
                return
            lock = _lock(self.folder / "lock")
            try:
                self._room = self._evict(size)
            finally:
                os.close(lock)

    def _evict(self, size: int) -> int:
        """The bytes that this process may add thereafter without counting again."""
        _forget_the_dead(self.folder)
        copies = sorted(_copies(self.folder))
        held = sum(copy.bytes for copy in copies)
        bound = _bound(self.folder, held)
        for copy in copies:
            if held + size <= bound:
                break
            if copy.links == 1 and time.time() - copy.used_at > _RECENT_S:
                copy.path.unlink(missing_ok=True)
                held -= copy.bytes
                _count("evicted", {"bytes": copy.bytes}, copy.path)
        return max(0, bound - held - size) // 8  # other processes add too

    def _release(self, link: Path) -> None:
        if os.getpid() == self._pid:
            link.unlink(missing_ok=True)

    def _leave(self) -> None:
        if os.getpid() == self._pid:
            shutil.rmtree(self._in_use, ignore_errors=True)


def _open(folder: Path, pid: int) -> _Cache:
    with _opening:
        return _open_once(folder, pid)


@lru_cache(maxsize=8)
def _open_once(folder: Path, pid: int) -> _Cache:  # noqa: ARG001 (a forked child must note its own uses)
    try:
        return _Cache(folder)
    except OSError as error:
        temporary = _temporary_folder(folder)
        say(f"the cache folder {folder} cannot be written ({error}); copies are kept in {temporary} for this process")
        return _Cache(temporary)


def _temporary_folder(instead_of: Path) -> Path:
    for place in (None, "/dev/shm"):  # memory, where no disk can be written
        with suppress(OSError):
            made = Path(tempfile.mkdtemp(prefix="hashdist-", dir=place))
            atexit.register(shutil.rmtree, made, ignore_errors=True)
            return made
    raise Unavailable(f"neither {instead_of} nor a temporary folder can be written; let HASHDIST_CACHE name one")


def _bound(folder: Path, held: int) -> int:
    """The most bytes that copies may take. Raises InvalidInput for a setting that is no positive number."""
    given = os.environ.get("HASHDIST_CACHE_GB")
    if not given:
        return min(int(_DEFAULT_GB * 1e9), (shutil.disk_usage(folder).free + held) // 2)
    with suppress(ValueError):
        if float(given) > 0:
            return int(float(given) * 1e9)
    raise InvalidInput(f"HASHDIST_CACHE_GB must be a number of gigabytes above 0, found {given!r}")


def _copies(folder: Path) -> Iterator[_Copy]:
    """Copies of files, and files derived from them: a derived file that is mapped may go, its bytes stay."""
    for path in chain(
        folder.glob("??/" + "[0-9a-f]" * 64), folder.glob("radius/*.npy"), folder.glob("engines/*.faiss")
    ):
        with suppress(FileNotFoundError):
            status = path.stat()
            yield _Copy(status.st_atime, status.st_size, status.st_nlink, path)


def _forget_the_dead(folder: Path) -> None:
    """Delete the notes of use and the parts of copies of processes that are no more."""
    for left in (folder / "in-use").iterdir():
        with suppress(OSError):
            os.close(_lock(left / _ALIVE, os.O_RDWR, fcntl.LOCK_NB))
            shutil.rmtree(left, ignore_errors=True)
    for part in chain(folder.glob("??/*.part"), folder.glob("radius/*.part"), folder.glob("engines/*.part")):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _STALE_S:
                lock = _lock(part, os.O_RDWR, fcntl.LOCK_NB)
                part.unlink(missing_ok=True)
                os.close(lock)


def _lock(path: Path, flags: int = os.O_RDWR | os.O_CREAT, how: int = 0) -> int:
    """Descriptor of a file with an exclusive lock, which ends when it is closed. Raises OSError."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
