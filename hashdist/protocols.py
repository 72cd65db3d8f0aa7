"""Evaluation protocols: which images are queries, which are trained on, which are searched.

A protocol is a pure function of (the images' ids and labels, seed): images are taken in the order of a hash of their
ids, so neither the order of rows nor what lies beside them in a file matters. Presets: docs/decisions.md, D14, D16;
the papers' own splits (sizes per class) are those of DSAH, SADH, CSDH and DDH's release.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashdist.errors import InvalidInput
from hashdist.order import mix64

Labels = Sequence[Sequence[int] | None]
Rows = NDArray[np.int64]


class Split(NamedTuple):
    """Row numbers, each ascending: int64 arrays. Training images may be searched; queries are neither."""

    query: Rows
    train: Rows
    database: Rows

    def digest(self, ids: NDArray[np.int64]) -> str:
        """32 hex digits of the three sets of ids: equal only for equal splits of equal images."""
        text = b"|".join(np.sort(ids[rows]).tobytes() for rows in self)
        return blake2b(text, digest_size=16).hexdigest()


@dataclass(frozen=True)
class PerClass:
    """So many queries and training images of every class (of an image's first label).

    Args:
        query: a class.
        train: a class; None = everything that is not a query.
    """

    query: int
    train: int | None


@dataclass(frozen=True)
class Uniform:
    """So many queries and training images in all, whatever their labels.

    Args:
        query: in all.
        train: in all; None = everything that is not a query.
    """

    query: int
    train: int | None


PROTOCOLS: dict[str, PerClass | Uniform] = {
    "cifar-dsah": PerClass(100, 1000),
    "cifar-sadh": PerClass(100, 500),
    "cifar-csdh": PerClass(100, 500),
    "cifar-ddh-release": PerClass(100, 1000),
    "flickr-dsah": Uniform(1000, 10_000),
    "flickr-sadh": Uniform(1000, 4000),
    "nus-dsah": Uniform(2100, 10_500),
    "nus-21": PerClass(100, 500),
    "digits": PerClass(20, None),
    "uniform": Uniform(1000, None),
}
"""By name. In all of them the database is everything but the queries."""


def split(name: str, ids: NDArray[np.int64], labels: Labels, seed: int) -> Split:
    """The split of images by a protocol.

    Args:
        name: one of PROTOCOLS.
        ids: int64 [N], distinct.
        labels: per image; None or empty where it has none.
        seed: another seed, another split of the same kind.

    Raises:
        InvalidInput: an unknown protocol, a class with too few images, missing labels where classes are needed.
    """
    if name not in PROTOCOLS:
        raise InvalidInput(f"a protocol must be one of {', '.join(PROTOCOLS)}, found {name!r}")
    if len(labels) != len(ids):
        raise InvalidInput(
            f"labels of all {len(ids)} images are needed (None where there are none), found {len(labels)}"
        )
    asked = PROTOCOLS[name]
    order = shuffled(ids, seed)
    take: Callable[..., tuple[Rows, Rows]] = _uniform if isinstance(asked, Uniform) else partial(_per_class, labels)
    query, train = take(name, order, asked.query, asked.train)
    rest = np.setdiff1d(np.arange(len(ids)), query)
    return Split(np.sort(query), rest if asked.train is None else np.sort(train), rest)


def shuffled(ids: NDArray[np.int64], seed: int) -> Rows:
    """Row numbers in an order that depends on (id, seed) alone."""
    key = mix64(np.array([seed], np.int64).astype(np.uint64))
    words = mix64(ids.astype(np.uint64) ^ key)
    return np.lexsort((ids, words))


def _uniform(name: str, order: Rows, query: int, train: int | None) -> tuple[Rows, Rows]:
    needed = query + (train if train is not None else 1)
    if len(order) < needed:
        raise InvalidInput(f"protocol {name} needs at least {needed} images, found {len(order)}")
    return order[:query], order[query : query + (train or 0)]


def _per_class(labels: Labels, name: str, order: Rows, query: int, train: int | None) -> tuple[Rows, Rows]:
    """By first label; an image without labels is in the database only."""
    first = np.array([found[0] if found else -1 for found in labels], np.int64)
    if (first < 0).all():
        raise InvalidInput(f"protocol {name} takes images by class, and none has a label; use a collection with labels")
    queries, training = [], []
    for number in np.unique(first[first >= 0]):
        members = order[first[order] == number]
        needed = query + (train if train is not None else 1)
        if len(members) < needed:
            raise InvalidInput(f"protocol {name} needs {needed} images of class {number}, found {len(members)}")
        queries.append(members[:query])
        training.append(members[query : query + (train or 0)])
    return np.concatenate(queries), np.concatenate(training)
