"""Tables for radius search (hashdist/nearest/tables.py), held for the shards that are open.

Building takes as long as about a thousand scans, so `auto` builds when a shard has been asked as many radius queries.
Tables lie in the local cache, named by the checksum of the shard's codes, and are mapped; where the cache cannot be
written, in memory.
"""

import threading
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np

from hashdist.index.search.derived import load_or_build
from hashdist.index.shards.shard import Shard, map_npy
from hashdist.nearest import tables as arrays
from hashdist.nearest.tables import Tables

Use = Literal["auto", "on", "off"]

_FEWEST_ROWS = 1 << 14  # a smaller shard is scanned in microseconds
_BUILD_AFTER = 1024  # radius queries that a shard is asked before `auto` builds


def tables_of(shard: Shard, queries: int, use: Use) -> Tables | None:
    """The tables of a shard, where it has some or should have them by now; `queries` is how many it is asked now."""
    if use == "off" or shard.rows < _FEWEST_ROWS:
        return None
    held = _held_of(shard)
    with held.lock:
        held.asked += queries
        if held.tables is None and (use == "on" or held.asked >= _BUILD_AFTER):
            held.tables = _load_or_build(shard)
        return held.tables


class _Held:
    """Tables of an open shard, and how many radius queries it was asked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = 0
        self.tables: Tables | None = None


_holding = threading.Lock()
_held: WeakKeyDictionary[Shard, _Held] = WeakKeyDictionary()


def _held_of(shard: Shard) -> _Held:
    with _holding:
        return _held.setdefault(shard, _Held())


def _load_or_build(shard: Shard) -> Tables:
    pieces, bits = arrays.shape_of(*shard.codes.shape)
    shape = (pieces, 2**bits + 1 + shard.rows)

    def read(path: Path) -> Tables | None:
        data = map_npy(path)
        return Tables(pieces, bits, data) if data.dtype == np.uint32 and data.shape == shape else None

    return load_or_build(
        shard,
        "radius",
        f"{pieces}x{bits}.npy",
        read=read,
        build=lambda: arrays.build(shard.codes),
        write=_write,
        said="the radius tables of a shard are",
    )


def _write(tables: Tables, path: Path) -> Tables:
    """The same, mapped: a file stays mapped when it is renamed."""
    with path.open("wb") as file:
        np.save(file, tables.data)
    return tables._replace(data=map_npy(path))
