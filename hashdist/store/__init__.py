"""Stores: folders of immutable objects, one kind a file; a new kind is one more file and its line here.

Imports ground; boto3 only in s3, obstore only in azure.
"""

from hashdist.ground.errors import InvalidInput
from hashdist.store.azure import AzureStore
from hashdist.store.base import Entry, Store
from hashdist.store.local import LocalStore
from hashdist.store.s3 import S3Store

__all__ = ["STORES", "Entry", "Store", "of_file", "open_store"]

STORES: dict[str, type[Store]] = {"file": LocalStore, "s3": S3Store, "az": AzureStore}
"""Every kind of store by the scheme of its URIs."""


def open_store(uri: str) -> Store:
    """The store at a path or a URI: file://..., s3://bucket/prefix, az://container/prefix; nothing is read or created.

    Each kind takes endpoint and credentials from where the tools of its vendor take them: AWS_ENDPOINT_URL,
    AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, profiles, roles. Raises InvalidInput for an empty or unknown URI.
    """
    if not uri:
        raise InvalidInput(f"a folder or a URI ({_forms()}) is required, found an empty text")
    scheme, separator, _ = uri.partition("://")
    store = STORES.get(scheme) if separator else LocalStore
    if store is None:
        raise InvalidInput(f"a path, {_forms()} is required, found {uri!r}")
    return store.parse(uri)


def of_file(uri: str) -> tuple[Store, str]:
    """The store of the folder that a file lies in, and the file's name; an empty name where the URI names no file.

    Raises InvalidInput for an unknown URI.
    """
    if not uri or uri.endswith("/"):
        return open_store(uri or "."), ""
    return open_store(uri).as_file()


def _forms() -> str:
    *others, last = (store.form for store in STORES.values())
    return f"{', '.join(others)} or {last}"
