"""Engines by name. A new one is a file beside this one, and a line of `ENGINES`.

All of them answer in (distance, id) order (hashdist/index/search/engine.py). docs/search.md says which serves when.
"""

from dataclasses import fields
from typing import Any

from hashdist.ground.errors import InvalidInput
from hashdist.index.search.engine import Engine
from hashdist.index.search.faiss import Faiss, Ivf, MultiHash
from hashdist.index.search.folded import Folded
from hashdist.index.search.scanning import Scan
from hashdist.index.search.torch import Torch

ENGINES: dict[str, type[Engine]] = {
    "scan": Scan,
    "folded": Folded,
    "faiss": Faiss,
    "ivf": Ivf,
    "multihash": MultiHash,
    "torch": Torch,
}


def find_engine(engine: str | Engine, /, **knobs: Any) -> Engine:
    """The engine of that name; an engine is taken as it is.

    Args:
        engine: a name of `ENGINES`, or an engine.
        knobs: settings by name; an engine takes those that are its own.

    Raises InvalidInput for another name, and for knobs that cannot be.
    """
    if not isinstance(engine, str):
        return engine
    if engine not in ENGINES:
        raise InvalidInput(f"the engine must be one of {', '.join(ENGINES)}, found {engine!r}")
    kind = ENGINES[engine]
    if not knobs:
        return kind()
    own = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in knobs.items() if name in own})


def not_by_radius(engine: str | Engine) -> InvalidInput:
    """The error about an engine that does not search by radius; it names those that do."""
    names = {kind: name for name, kind in ENGINES.items()}
    found = engine if isinstance(engine, str) else names.get(type(engine), engine)
    able = [name for name, kind in ENGINES.items() if kind.by_radius]
    return InvalidInput(f"{found} does not search by radius; use {', '.join(able[:-1])} or {able[-1]}")
