"""A store in an S3 bucket: boto3 for single objects and the conditional create, pyarrow for bulk data."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import pyarrow.fs

from hashdist.ground import telemetry
from hashdist.ground.errors import HashdistError, InvalidInput, NotFound, OutcomeUnknown, Unavailable
from hashdist.store.base import BucketStore, Contended, Entry, Exists, joined

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_ATTEMPTS = 4
"""Requests per call, the first one included; botocore waits between them (up to 20 s) with jitter."""

_ENVIRONMENT = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
_OPERATIONS = {"GetObject": "get", "HeadObject": "head", "ListObjectsV2": "list", "DeleteObject": "delete"}
_NO_OBJECT = {"NoSuchKey", "404", "NotFound"}
_BUSY = {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestTimeTooSkewed", "TooManyRequests"}
_opening = threading.Lock()


class S3Store(BucketStore):
    """Objects under a prefix of a bucket.

    Args:
        bucket: its name.
        prefix: without slashes at its ends; may be empty.
    """

    form: ClassVar[str] = "s3://bucket/prefix"
    kind: ClassVar[str] = "an S3 URI"
    environment: ClassVar[tuple[str, ...]] = ("AWS_",)

    def is_away(self, error: OSError) -> bool:
        """See Store."""
        return "AWS Error" in str(error)

    def proof_scope(self) -> str:
        """See Store: a bucket at an endpoint either honours If-None-Match or does not."""
        return f"{_client().meta.endpoint_url} {self._bucket}"

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """See Store."""
        return _filesystem(os.getpid(), _environment()), joined(self._bucket, self._prefix)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        if length == 0:
            return b""
        span: dict[str, Any] = {}
        if start or length is not None:
            span["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
        for attempt in range(_ATTEMPTS):
            try:
                with _errors(f"{self.uri}/{name}", writes=False):
                    data = _client().get_object(Bucket=self._bucket, Key=self._key(name), **span)["Body"].read()
                telemetry.count_bytes("read", len(data))
                return data
            except _PastTheEnd:
                break
            except _CutShort:  # botocore repeats requests, but not the reading of an answer that has begun
                if attempt == _ATTEMPTS - 1:
                    raise
        return b""

    def put(self, name: str, data: bytes | memoryview) -> None:
        """See Store."""
        with _errors(f"{self.uri}/{name}", writes=True):
            _client().put_object(Bucket=self._bucket, Key=self._key(name), Body=bytes(data))
        telemetry.count_bytes("written", len(data))

    def put_file(self, name: str, path: Path) -> None:
        """See Store. Large files go up in parts, and appear when the last one has landed."""
        with _errors(f"{self.uri}/{name}", writes=True), path.open("rb") as file:
            _client().upload_fileobj(file, self._bucket, self._key(name))
        telemetry.count_bytes("written", path.stat().st_size)

    def create(self, name: str, data: bytes, write_id: str) -> None:
        """See Store."""
        with _errors(f"{self.uri}/{name}", writes=True):
            _client().put_object(
                Bucket=self._bucket,
                Key=self._key(name),
                Body=data,
                IfNoneMatch="*",
                ContentType="application/json",
                Metadata={"write-id": write_id},
            )
        telemetry.count_bytes("written", len(data))

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[Entry]:
        """See Store."""
        base = f"{self._prefix}/" if self._prefix else ""
        after = base + start_after if start_after else ""
        with _errors(f"{self.uri}/{prefix}*", writes=False):
            pages = (
                _client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self._bucket, Prefix=base + prefix, StartAfter=after)
            )
            for page in pages:
                for found in page.get("Contents", ()):
                    if not found["Key"].endswith("/"):  # "folders" that some clients write
                        stamp = found["ETag"].strip('"')
                        yield Entry(found["Key"][len(base) :], found["Size"], stamp, found["LastModified"].timestamp())

    def stat(self, name: str) -> Entry:
        """See Store."""
        with _errors(f"{self.uri}/{name}", writes=False):
            found = _client().head_object(Bucket=self._bucket, Key=self._key(name))
        return Entry(name, found["ContentLength"], found["ETag"].strip('"'), found["LastModified"].timestamp())

    def exists(self, name: str) -> bool:
        """See Store."""
        try:
            self.stat(name)
        except NotFound:
            return False
        return True

    def delete(self, name: str) -> None:
        """See Store."""
        with _errors(f"{self.uri}/{name}", writes=True):
            _client().delete_object(Bucket=self._bucket, Key=self._key(name))


def _environment() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in _ENVIRONMENT)


def _client() -> "S3Client":
    """The process's client for the present environment (a forked child must not share its parent's connections)."""
    with _opening:
        return _open_client(os.getpid(), _environment())


@lru_cache(maxsize=8)
def _open_client(pid: int, environment: tuple[str | None, ...]) -> "S3Client":  # noqa: ARG001 (cache key)
    # boto3 takes a third of a second to import, which a local store need not pay
    import boto3.session
    from botocore.config import Config

    with _errors("S3", writes=False):
        session = boto3.session.Session()
        own_endpoint = bool(environment[0] or environment[1])
        config = Config(
            retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=32,
            tcp_keepalive=True,
            # older S3 servers refuse the trailing checksums that newer clients send unasked
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if own_endpoint else "auto"},
        )
        region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
        try:
            client = session.client("s3", config=config, region_name=region)
        except ValueError as error:
            raise InvalidInput(f"AWS_ENDPOINT_URL must read http(s)://host[:port]: {error}") from error
        client.meta.events.register("before-send.s3", _count)
        return client


def _count(request: Any, event_name: str, **_: Any) -> None:
    """Called by botocore before each request that goes out, repeats included."""
    operation = event_name.rpartition(".")[2]
    conditional = operation == "PutObject" and "If-None-Match" in request.headers
    telemetry.count_request("create" if conditional else _OPERATIONS.get(operation, "put"))


@lru_cache(maxsize=8)
def _filesystem(pid: int, environment: tuple[str | None, ...]) -> pyarrow.fs.S3FileSystem:
    client = _open_client(pid, environment)
    options: dict[str, Any] = {"region": client.meta.region_name}
    endpoint = urlsplit(client.meta.endpoint_url)
    if not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    return pyarrow.fs.S3FileSystem(**options, connect_timeout=5, request_timeout=60)


class _CutShort(Unavailable):
    """The connection broke in the middle of an object."""


class _PastTheEnd(HashdistError):
    """A range begins at or behind the object's end."""


@contextmanager
def _errors(what: str, *, writes: bool) -> Iterator[None]:
    """Client errors as hashdist's, told apart by whether the request can have had an effect."""
    from botocore import exceptions as boto

    try:
        yield
    except boto.ClientError as error:
        raise _answer(error.response, what, writes) from error
    except (
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.ProfileNotFound,
        boto.CredentialRetrievalError,
    ) as error:
        raise InvalidInput(
            f"{what}: S3 credentials are required (AWS_ACCESS_KEY_ID, a profile or a role): {error}"
        ) from error
    except (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError) as error:
        raise Unavailable(
            f"{what}: the S3 endpoint cannot be reached: {error}; check AWS_ENDPOINT_URL and the network"
        ) from error
    except (boto.ResponseStreamingError, boto.IncompleteReadError) as error:
        raise _CutShort(f"{what}: the connection to S3 broke in the middle of the object: {error}") from error
    except boto.HTTPClientError as error:
        kind = OutcomeUnknown if writes else Unavailable
        raise kind(f"{what}: the connection to S3 broke before the answer was complete: {error}") from error
    except boto.BotoCoreError as error:
        raise InvalidInput(f"{what}: the S3 client cannot be used as it is configured: {error}") from error


def _answer(response: Any, what: str, writes: bool) -> HashdistError:
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    text = f"{what}: S3 answered {status} {code}"
    if code == "NoSuchBucket":
        return InvalidInput(f"{what}: the bucket does not exist; create it, or name another root")
    if code in _NO_OBJECT:
        return NotFound(f"{what} does not exist")
    if code == "InvalidRange" or status == 416:
        return _PastTheEnd(text)
    if code == "PreconditionFailed" or status == 412:
        return Exists(text)
    if code in ("ConditionalRequestConflict", "OperationAborted", "Conflict", "409"):  # "409": no code was given
        return Contended(text)
    if code in ("NotImplemented", "InvalidArgument", "InvalidRequest"):
        return InvalidInput(f"{text}; this server does not know a request that hashdist needs (If-None-Match on PUT)")
    if status >= 500 or status == 429 or code in _BUSY:
        # a 5xx may come from a proxy in front of a server that did carry the write out
        return OutcomeUnknown(text) if writes else Unavailable(text)
    if status in (401, 403):
        return InvalidInput(f"{text}; check the credentials, and that they may read, write and list there")
    return InvalidInput(f"{text}: {response.get('Error', {}).get('Message', '')}")
