"""Arrays as data files that records name: .npy, written once, read whole or mapped."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import Corrupt
from hashdist.store import Store
from hashdist.store.commit import read_file, write_file


def write_array(store: Store, name: str, array: NDArray[Any]) -> dict[str, Any]:
    """Write an array as .npy; returns the entry by which records name it."""
    buffer = BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return write_file(store, name, buffer.getbuffer(), rows=len(array))


def read_array(store: Store, entry: Mapping[str, Any]) -> NDArray[Any]:
    """An array that `write_array` wrote, checked. Raises Corrupt, NotFound, Unavailable."""
    array: NDArray[Any] = np.load(BytesIO(read_file(store, entry)), allow_pickle=False)
    return array


def map_array(store: Store, entry: Mapping[str, Any]) -> NDArray[Any]:
    """As `read_array`; a file on this machine is mapped, and only the number of its bytes is checked."""
    path = store.local_path(entry["path"])
    if path is None:
        return read_array(store, entry)
    if path.stat().st_size != entry["bytes"]:
        raise Corrupt(f"{path}: {entry['bytes']} bytes were committed, found {path.stat().st_size}")
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped
