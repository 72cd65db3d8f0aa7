"""The contract of a store: a folder of immutable objects, wherever it lies (docs/extend.md).

A store knows nothing of manifests or versions: it reads, writes whole objects, lists, and creates one object
conditionally. Everything that is built on that one condition is in hashdist/store/commit.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple, Self

import pyarrow.fs

from hashdist.ground.errors import HashdistError, InvalidInput, NotFound, Unavailable

_DELETED_AT_ONCE = 16


class Entry(NamedTuple):
    """One object of a listing."""

    name: str  # relative to the listed store, "/" between folders
    size: int  # bytes
    stamp: str  # ETag, or mtime in ns: another stamp means that the content may have changed
    modified: float  # unix seconds


class Exists(HashdistError):
    """A conditional create was refused: the name is taken. Stays inside hashdist.store."""


class Contended(Unavailable):
    """A conditional create met a competing one and was not carried out (S3's 409). Stays inside hashdist.store."""


class Store(ABC):
    """A folder of immutable objects. Picklable and cheap to open: a connection is made on first use.

    Class attributes:
        form: how its URIs read, for messages.
        environment: how the names of those environment variables begin that every machine needs to open it.

    Attributes:
        uri: canonical, without a trailing slash: `file:///abs/path` or `s3://bucket/prefix`.
    """

    form: ClassVar[str]
    environment: ClassVar[tuple[str, ...]] = ()

    uri: str

    @classmethod
    def parse(cls, uri: str) -> "Store":
        """The store at a URI of its scheme; nothing is read or created. Raises InvalidInput."""
        raise NotImplementedError(f"{cls.__name__} is not opened by a URI")

    @abstractmethod
    def child(self, path: str) -> "Store":
        """The store of a folder inside this one; the folder need not exist."""

    @abstractmethod
    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length) of an object, cut at its end. Raises NotFound, Unavailable."""

    @abstractmethod
    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write an object under a name that nothing else uses: whole, or nothing visible.

        Raises Unavailable or OutcomeUnknown; either way the same bytes may be written again under a new name.
        """

    @abstractmethod
    def put_file(self, name: str, path: Path) -> None:
        """As `put`, from a local file."""

    @abstractmethod
    def create(self, name: str, data: bytes, write_id: str) -> None:
        """Write an object only if its name is free: of any number of callers exactly one succeeds.

        `write_id` is stored beside the object where the store can (S3 metadata); callers put it in the body too.
        Raises Exists (refused), Contended or Unavailable (not carried out, try again), OutcomeUnknown (may have
        landed, or may still land). A repeated request may find its own object and raise Exists.
        """

    @abstractmethod
    def list(self, prefix: str = "", start_after: str = "") -> Iterator[Entry]:
        """Objects whose name begins with `prefix` and is greater than `start_after`, recursively.

        In the order of the names' UTF-8 bytes. A folder that does not exist is empty.
        """

    def stat(self, name: str) -> Entry:
        """The object's entry in a listing, by one request. Raises NotFound, Unavailable."""
        found = next(self.list(name), None)
        if found is None or found.name != name:
            raise NotFound(f"{self.uri}/{name} does not exist")
        return found

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the object is there now."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is fine."""

    def delete_all(self, names: Iterable[str], failed: dict[str, HashdistError] | None = None) -> None:
        """Remove objects, several at once.

        Args:
            names: of the objects.
            failed: takes the errors, by name; None = the first one is raised once all objects were tried.
        """

        def delete(name: str) -> None:
            try:
                self.delete(name)
            except HashdistError as error:
                if failed is None:
                    raise
                failed[name] = error

        with ThreadPoolExecutor(_DELETED_AT_ONCE) as pool:
            list(pool.map(delete, names))

    def abandoned(self) -> Iterator[Entry]:
        """Objects that a dying writer left, which no listing shows; none where the store sees to that itself."""
        return iter(())

    @abstractmethod
    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """For bulk data: a pyarrow file system and the path of this store inside it."""

    def is_away(self, error: OSError) -> bool:  # noqa: ARG002
        """Whether an error of that file system means that the store does not answer now."""
        return False

    def as_file(self) -> "tuple[Store, str]":
        """The folder above this one, and the name of this one in it: what the URI of a single file names."""
        base, _, name = self.uri.rpartition("/")
        return (self, "") if base.endswith("/") else (type(self).parse(base), name)

    def bucket(self) -> "Store | None":
        """The bucket that this folder lies in; None where there are none."""
        return None

    def local_path(self, name: str) -> Path | None:  # noqa: ARG002
        """Where the object lies on this machine's disk; None for a remote store."""
        return None

    def proof_scope(self) -> str | None:
        """None where creates are conditional by construction; else the name under which a proof holds (a bucket)."""
        return None


def checked_name(name: str) -> str:
    """`name` itself if it stays inside its store, else InvalidInput: names come out of manifests too."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise InvalidInput(f"an object's name must be a relative path inside its store, found {name!r}")
    return name


def joined(base: str, name: str) -> str:
    """`base/name`, where either may be empty."""
    return f"{base}/{name}" if base and name else base or name


class BucketStore(Store):
    """Objects under a prefix of a bucket (on Azure a container), in a store whose URIs read scheme://bucket/prefix.

    Args:
        bucket: its name.
        prefix: without slashes at its ends; may be empty.
    """

    kind: ClassVar[str]
    """What its URIs are called in messages: "an S3 URI"."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix
        self.uri = f"{self.form.partition('://')[0]}://{joined(bucket, prefix)}"

    @classmethod
    def parse(cls, uri: str) -> Self:
        """See Store."""
        scheme, _, place = cls.form.partition("://")
        bucket, _, prefix = uri.removeprefix(f"{scheme}://").partition("/")
        prefix = prefix.rstrip("/")
        if not bucket or (prefix and "" in prefix.split("/")):
            raise InvalidInput(
                f"{cls.kind} must read {scheme}://{place.partition('/')[0]} or {cls.form}, found {uri!r}"
            )
        return cls(bucket, prefix and checked_name(prefix))

    def child(self, path: str) -> Self:
        """See Store."""
        return type(self)(self._bucket, joined(self._prefix, checked_name(path).strip("/")))

    def bucket(self) -> Self:
        """See Store."""
        return type(self)(self._bucket, "")

    def _key(self, name: str) -> str:
        return joined(self._prefix, checked_name(name))
