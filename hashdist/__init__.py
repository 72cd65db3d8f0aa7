"""hashdist: a growing image collection as a compact, versioned binary index, with a hash function it learns itself.

`create_index`, `open_index`, `Index` and `Hits` are the life of an index and need neither torch nor Ray;
`load_model` loads torch when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hashdist.ground.errors import (
    AlreadyExists,
    Conflict,
    Corrupt,
    HashdistError,
    InvalidInput,
    NotFound,
    OutcomeUnknown,
    Unavailable,
)
from hashdist.ground.version import __version__

if TYPE_CHECKING:
    from hashdist.index import Hits, Index, create_index, open_index
    from hashdist.models.model import load_model

__all__ = [
    "AlreadyExists",
    "Conflict",
    "Corrupt",
    "HashdistError",
    "Hits",
    "Index",
    "InvalidInput",
    "NotFound",
    "OutcomeUnknown",
    "Unavailable",
    "__version__",
    "create_index",
    "load_model",
    "open_index",
]

_HOMES = {
    "create_index": "hashdist.index",
    "open_index": "hashdist.index",
    "Index": "hashdist.index",
    "Hits": "hashdist.index",
    "load_model": "hashdist.models.model",
}


def __getattr__(name: str) -> Any:
    """Public names come from their modules when they are first asked for, so that each import stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hashdist' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
