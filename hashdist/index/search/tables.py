"""Tables for radius search (hashdist/nearest/tables.py), held for the shards that are open.

Building takes as long as about a thousand scans, so `auto` builds when a shard has been asked as many radius queries.
Tables lie in the local cache, named by the checksum of the shard's codes, and are mapped; where the cache cannot be
written, in memory.
"""

import hashlib
import os
import threading
from pathlib import Path
from typing import Literal
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np

from hashdist.ground.progress import say
from hashdist.index.shards.shard import Shard, map_npy
from hashdist.nearest import tables as arrays
from hashdist.nearest.tables import Tables
from hashdist.store.cache import cache_folder

Use = Literal["auto", "on", "off"]

_FEWEST_ROWS = 1 << 14  # a smaller shard is scanned in microseconds
_BUILD_AFTER = 1024  # radius queries that a shard is asked before `auto` builds
_DIGEST = 16  # hexadecimal digits of a file's own checksum, in its name


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
    """From the local cache, checked; else built and put there."""
    pieces, bits = arrays.shape_of(*shard.codes.shape)
    stem, folder = f"{shard.digest('codes')}-{pieces}x{bits}-", cache_folder() / "radius"
    shape = (pieces, 2**bits + 1 + shard.rows)
    for path in sorted(folder.glob(f"{stem}*.npy")) if folder.is_dir() else []:
        if path.stem.removeprefix(stem) == _checksum(path):
            data = map_npy(path)
            if data.dtype == np.uint32 and data.shape == shape:
                return Tables(pieces, bits, data)
    tables = arrays.build(shard.codes)
    fresh = folder / f"{stem}{uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            np.save(file, tables.data)
        path = folder / f"{stem}{_checksum(fresh)}.npy"
        os.replace(fresh, path)
        return tables._replace(data=map_npy(path))
    except OSError as error:
        say(f"search: the radius tables of a shard are kept in memory only, {folder} cannot be written: {error}")
        return tables


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGEST]
