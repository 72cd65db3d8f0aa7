"""A store in a container of Azure Blob Storage: obstore for single objects and the conditional create, pyarrow for
bulk data.

The account is taken from where Azure's tools take it: AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or
a token, a workload identity or a managed identity. AZURE_STORAGE_ENDPOINT names another server, such as Azurite.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pyarrow.fs

from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput, NotFound, OutcomeUnknown, Unavailable
from hashdist.store.base import BucketStore, Entry, Exists, joined

_ACCOUNT, _KEY, _ENDPOINT = "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ENDPOINT"
_STATUS = re.compile(r"status code: (\d{3})")


class AzureStore(BucketStore):
    """Blobs under a prefix of a container.

    Args:
        container: its name.
        prefix: without slashes at its ends; may be empty.
    """

    form: ClassVar[str] = "az://container/prefix"
    kind: ClassVar[str] = "an Azure URI"
    environment: ClassVar[tuple[str, ...]] = ("AZURE_",)

    def proof_scope(self) -> str:
        """See Store: a container at a server either honours If-None-Match or does not."""
        return f"{os.environ.get(_ENDPOINT) or os.environ.get(_ACCOUNT)} {self._bucket}"

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """See Store."""
        return _filesystem(os.getpid(), _environment()), joined(self._bucket, self._prefix)

    def is_away(self, error: OSError) -> bool:
        """See Store."""
        return "Azure" in str(error) or "HTTP" in str(error)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        import obstore

        key = self._key(name)
        if length == 0:
            return b""
        with self._request("get", name):
            if not start and length is None:
                data = bytes(obstore.get(self._client(), key).bytes())
            else:
                size = obstore.head(self._client(), key)["size"]  # a range past the end is an error, a cut one is not
                stop = size if length is None else min(size, start + length)
                data = bytes(obstore.get_range(self._client(), key, start=start, end=stop)) if start < stop else b""
        telemetry.count_bytes("read", len(data))
        return data

    def put(self, name: str, data: bytes | memoryview) -> None:
        """See Store."""
        import obstore

        key = self._key(name)
        with self._request("put", name, writes=True):
            obstore.put(self._client(), key, bytes(data))
        telemetry.count_bytes("written", len(data))

    def put_file(self, name: str, path: Path) -> None:
        """See Store. Large files go up in blocks, and appear when the list of blocks has landed."""
        import obstore

        key = self._key(name)
        with self._request("put", name, writes=True):
            obstore.put(self._client(), key, path)
        telemetry.count_bytes("written", path.stat().st_size)

    def create(self, name: str, data: bytes, write_id: str) -> None:
        """See Store."""
        import obstore

        key = self._key(name)
        with self._request("create", name, writes=True):
            # an attribute's name must be an identifier there
            obstore.put(self._client(), key, data, mode="create", attributes={"write_id": write_id})
        telemetry.count_bytes("written", len(data))

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[Entry]:
        """See Store. Azure cannot begin behind a name, so the pages before `start_after` are read and dropped."""
        import obstore

        base, after = f"{self._prefix}/" if self._prefix else "", start_after.encode()
        folder = (base + prefix).rpartition("/")[0]  # obstore knows prefixes that are whole folders only
        with self._request("list", f"{prefix}*"):
            for page in obstore.list(self._client(), folder or None):
                for found in page:
                    name = found["path"][len(base) :]
                    if name.startswith(prefix) and name.encode() > after:
                        yield _entry(name, found)

    def stat(self, name: str) -> Entry:
        """See Store."""
        import obstore

        key = self._key(name)
        with self._request("head", name):
            return _entry(name, obstore.head(self._client(), key))

    def exists(self, name: str) -> bool:
        """See Store."""
        try:
            self.stat(name)
        except NotFound:
            return False
        return True

    def delete(self, name: str) -> None:
        """See Store."""
        import obstore

        key = self._key(name)
        try:
            with self._request("delete", name, writes=True):
                obstore.delete(self._client(), key)
        except NotFound:
            pass

    def _client(self) -> Any:
        return _open_client(os.getpid(), _environment(), self._bucket)

    @contextmanager
    def _request(self, kind: str, name: str, *, writes: bool = False) -> Iterator[None]:
        """Errors of obstore as hashdist's, told apart by whether the request can have had an effect."""
        try:
            from obstore import exceptions as azure
        except ImportError as error:
            raise InvalidInput(f"{self.uri}: az:// needs obstore; pip install 'hashdist[azure]'") from error

        what = f"{self.uri}/{name}"
        telemetry.count_request(kind)
        try:
            yield
        except (azure.AlreadyExistsError, azure.PreconditionError) as error:
            raise Exists(f"{what} exists") from error
        except FileNotFoundError as error:
            if "ContainerNotFound" in str(error):
                raise InvalidInput(f"{what}: the container does not exist; create it, or name another root") from error
            raise NotFound(f"{what} does not exist") from error
        except (azure.PermissionDeniedError, azure.UnauthenticatedError) as error:
            raise InvalidInput(
                f"{what}: {_first_line(error)}; check {_ACCOUNT} and {_KEY}, and that they may read and write there"
            ) from error
        except (azure.GenericError, TimeoutError, OSError) as error:
            status = _STATUS.search(str(error))
            if status and status[1].startswith("4") and status[1] not in ("408", "409", "429"):
                raise InvalidInput(f"{what}: {_first_line(error)}") from error
            kind_of_error = OutcomeUnknown if writes else Unavailable
            raise kind_of_error(f"{what}: Azure did not answer as it must: {_first_line(error)}") from error
        except azure.BaseError as error:
            raise InvalidInput(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _entry(name: str, found: Any) -> Entry:
    return Entry(name, found["size"], str(found["e_tag"]).strip('"'), found["last_modified"].timestamp())


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AZURE_")))


@lru_cache(maxsize=8)
def _open_client(pid: int, environment: tuple[tuple[str, str], ...], container: str) -> Any:  # noqa: ARG001 (cache key)
    from obstore.store import AzureStore as Client

    given = dict(environment)
    options: dict[str, Any] = {}
    if given.get(_ENDPOINT):
        options = {"endpoint": given[_ENDPOINT], "client_options": {"allow_http": True}}
    return Client(container, account_name=given.get(_ACCOUNT), account_key=given.get(_KEY), **options)


@lru_cache(maxsize=8)
def _filesystem(pid: int, environment: tuple[tuple[str, str], ...]) -> pyarrow.fs.FileSystem:  # noqa: ARG001
    given = dict(environment)
    options: dict[str, Any] = {}
    if given.get(_ENDPOINT):
        server = urlsplit(given[_ENDPOINT])
        for service in ("blob", "dfs"):
            options |= {f"{service}_storage_authority": server.netloc, f"{service}_storage_scheme": server.scheme}
    return pyarrow.fs.AzureFileSystem(given.get(_ACCOUNT, ""), account_key=given.get(_KEY), **options)
