"""Image ids: a 63-bit keyed hash of the key (docs/decisions.md, S2).

An id is stable under growth and independent of arrival order and sharding, and since it is a hash it doubles
as the pseudo-random order that breaks ties between equal distances.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_DOMAIN = b"hashdist image id 1"
_MASK = (1 << 63) - 1


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
