"""hashdist: a growing image collection as a compact, versioned binary index, with a hash function it learns itself.

Importing it, and a local search, load neither torch nor ray.
"""

from typing import Any

from hashdist import errors
from hashdist.searcher import Hits, Index, create_index, open_index

__version__ = "0.1.0"
__all__ = ["Hits", "Index", "__version__", "create_index", "errors", "load_model", "open_index"]


def __getattr__(name: str) -> Any:
    """`load_model` brings torch with it, so it is imported when first asked for."""
    if name == "load_model":
        import importlib

        return importlib.import_module("hashdist.model").load_model
    raise AttributeError(name)
