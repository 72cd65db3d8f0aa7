"""Stores: folders of immutable objects on local disk or S3, opened by path or URI."""

from hashdist.ground.errors import InvalidInput
from hashdist.store.base import Entry, Store
from hashdist.store.local import LocalStore
from hashdist.store.s3 import S3Store

__all__ = ["Entry", "Store", "open_store"]


def open_store(uri: str) -> Store:
    """The store at a path, a file:// URI or s3://bucket/prefix; nothing is read or created.

    S3 takes endpoint, region and credentials from where AWS tools take them: AWS_ENDPOINT_URL, AWS_DEFAULT_REGION,
    AWS_ACCESS_KEY_ID, profiles, roles. Raises InvalidInput for an empty or unknown URI.
    """
    if not uri:
        raise InvalidInput("a folder or a URI (file://... or s3://bucket/prefix) is required, found an empty text")
    if uri.startswith("s3://"):
        return S3Store.parse(uri)
    if "://" in uri and not uri.startswith("file://"):
        raise InvalidInput(f"a path, file://... or s3://bucket/prefix is required, found {uri!r}")
    return LocalStore.parse(uri)
