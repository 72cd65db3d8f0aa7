"""Files that are derived from the codes of a shard, kept in the local cache."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from hashdist.ground.progress import say
from hashdist.index.shards.shard import Shard
from hashdist.store.cache import cache_folder

_DIGEST = 16  # hexadecimal digits of a file's own checksum, in its name

T = TypeVar("T")


def load_or_build(
    shard: Shard,
    kind: str,
    name: str,
    *,
    read: Callable[[Path], T | None],
    build: Callable[[], T],
    write: Callable[[T, Path], T],
    said: str,
) -> T:
    """A structure from the local cache; built, and put there, where it is not or is damaged.

    The file is named by the checksum of the codes and ends in its own.

    Args:
        shard: whose codes it is derived from.
        kind: folder in the cache.
        name: of the structure, with the suffix of its file.
        read: gives the structure of a file whose bytes are right; None for a file of something else.
        build: makes the structure.
        write: writes the structure, and gives what is to be held of it from then on.
        said: the structure with its verb, for the message that the cache cannot be written.
    """
    folder, suffix = cache_folder() / kind, Path(name).suffix
    stem = f"{shard.digest('codes')}-{name.removesuffix(suffix)}-"
    for path in sorted(folder.glob(f"{stem}*{suffix}")) if folder.is_dir() else []:
        if path.stem.removeprefix(stem) == _checksum(path):
            found = read(path)
            if found is not None:
                return found
    built = build()
    fresh = folder / f"{stem}{uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = write(built, fresh)
        os.replace(fresh, folder / f"{stem}{_checksum(fresh)}{suffix}")
    except (OSError, RuntimeError) as error:  # faiss raises the latter
        say(f"search: {said} kept in memory only, {folder} cannot be written: {error}")
        fresh.unlink(missing_ok=True) if folder.is_dir() else None
        return built
    return held


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGEST]
