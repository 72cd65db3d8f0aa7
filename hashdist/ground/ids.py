"""Image ids: a 63-bit keyed hash of the key (docs/decisions.md, S2).

An id is stable under growth and independent of arrival order and sharding, and since it is a hash it doubles
as the pseudo-random order that breaks ties between equal distances.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput

ID_BITS = 63

_EXAMPLES = 3
_DOMAIN = b"hashdist image id 1"
_MASK = (1 << ID_BITS) - 1


def image_id(key: str, salt: int = 0) -> int:
    """The id of `key`: a non-negative int64. `salt` > 0 only where a smaller one collided."""
    digest = blake2b(key.encode(), digest_size=8, key=_DOMAIN, salt=salt.to_bytes(16, "little")).digest()
    return int.from_bytes(digest, "little") & _MASK


def image_ids(keys: Sequence[str], salts: Mapping[str, int] | None = None) -> NDArray[np.int64]:
    """Ids of `keys`, int64 [N]; `salts` names the keys whose salt is not 0."""
    salts = salts or {}
    return np.fromiter((image_id(key, salts.get(key, 0)) for key in keys), np.int64, count=len(keys))


def assign_salts(keys: Iterable[str]) -> dict[str, int]:
    """Salts that make the ids of distinct `keys` distinct; only keys with a salt > 0 are returned.

    Of two keys with one id the later (in string order) takes the next salt, so the result does not depend on
    the order of `keys`.
    """
    owner: dict[int, str] = {}
    salts: dict[str, int] = {}
    for key in sorted(keys):
        salt = 0
        while owner.setdefault(image_id(key, salt), key) != key:
            salt += 1
        if salt:
            salts[key] = salt
    return salts


def rows_of_shared_ids(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows whose id another row has too, ascending: the same key twice, or two keys that collide."""
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(np.diff(ids[order]) == 0)
    return np.unique(order[np.concatenate([same, same + 1])])


def require_distinct_keys(keys: Iterable[str], *message: str) -> None:
    """Raises InvalidInput where a key is there more than once; `message`: see `repeated_keys`."""
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise repeated_keys(twice, *message)


def repeated_keys(
    keys: Sequence[str], subject: str = "every image", advice: str = "rename them, or choose another id column"
) -> InvalidInput:
    """The error about keys that are there more than once; `subject` begins its sentence, `advice` ends it."""
    return InvalidInput(
        f"{subject} must have its own key, found {len(keys)} keys more than once, among them "
        f"{', '.join(map(repr, sorted(keys)[:_EXAMPLES]))}; {advice}"
    )


def salts_of(
    ids: NDArray[np.int64],
    keys_at: Callable[[NDArray[np.int64]], Sequence[str]],
    all_keys: Callable[[], Iterable[str]],
    *message: str,
) -> dict[str, int]:
    """Salts that make the ids of all keys distinct (S2: on a collision the later key takes the next salt).

    Args:
        ids: of all rows, without salts, int64 [N].
        keys_at: keys of the given rows.
        all_keys: keys of all rows; asked for only when a salted id collides in its turn.
        message: see `repeated_keys`.

    Raises InvalidInput if two rows have one key.
    """
    rows = rows_of_shared_ids(ids)
    if not len(rows):
        return {}
    keys = keys_at(rows)
    require_distinct_keys(keys, *message)
    salts = assign_salts(keys)
    salted = np.array([image_id(key, salt) for key, salt in salts.items()], np.int64)
    return assign_salts(all_keys()) if np.isin(salted, ids).any() else salts
