"""The contract of an engine, and the parts that engines share.

An engine answers in (distance, id) order, honours tombstones and filters, and gives k results or as many as there are.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import Corrupt, InvalidInput
from hashdist.index.search import filters
from hashdist.index.search.filters import Filter, Searchable
from hashdist.index.shards.shard import Shard, opening
from hashdist.index.view import View
from hashdist.nearest import scan

Codes = NDArray[np.uint8]


class Engine(ABC):
    """Answers searches of a version. Subclasses are frozen dataclasses (hashable, picklable) of their knobs.

    Attributes:
        exact: whether the k nearest are the k nearest; else some rows may be missed.
        by_radius: whether `within` can be asked.
    """

    exact: bool = True
    by_radius: bool = True

    def matching(self, view: View, where: Filter | None) -> int:
        """Number of live rows that match a filter; of all live rows without one. Raises InvalidInput."""
        return filters.matching(view, where)

    @abstractmethod
    def nearest(self, view: View, queries_QW: Codes, k: int, where: Filter | None) -> scan.Nearest:
        """The k nearest live rows that match; "rows" are ids. k is at most `matching`, and there are k of them.

        Raises Corrupt where the version does not hold them.
        """

    def within(self, view: View, queries_QW: Codes, radius: int, where: Filter | None) -> scan.Ball:  # noqa: ARG002
        """The live rows that match within the radius; "rows" are ids."""
        raise InvalidInput(f"{self} does not search by radius; use another engine")

    def complete(self, view: View, found: scan.Nearest, k: int, where: Filter | None) -> scan.Nearest:
        """`found`, which must hold k rows for every query. Raises Corrupt."""
        if found.rows_QK.shape[1] < k or (found.counts_Q != k).any():
            rows = self.matching(view, where)
            raise Corrupt(f"{view.uri}, version {view.number} must hold {rows} such rows; verify it")
        return found


class ByShard(Engine):
    """Engines that answer shard by shard."""

    def nearest(self, view: View, queries_QW: Codes, k: int, where: Filter | None) -> scan.Nearest:
        """See Engine."""
        return self.complete(view, self.merge(view, queries_QW, k, where), k, where)

    def merge(self, view: View, queries_QW: Codes, k: int, where: Filter | None) -> scan.Nearest:
        """The k nearest of the rows that are found in the shards."""
        best = _nothing(len(queries_QW))
        for number in opening(view.shards):
            shard, searched = view.shards[number], filters.searchable(view, number, where)
            if len(searched.ids_N):
                found = self.nearest_in(shard, searched, queries_QW, k)
                found = found._replace(rows_QK=searched.ids_N[found.rows_QK.clip(min=0)])
                best = scan.merge(best, found, k)
        return best

    def within(self, view: View, queries_QW: Codes, radius: int, where: Filter | None) -> scan.Ball:
        """See Engine."""
        found = []
        for number in opening(view.shards):
            shard, searched = view.shards[number], filters.searchable(view, number, where)
            if len(searched.ids_N):
                ball = self.within_in(shard, searched, queries_QW, radius)
                found.append(ball._replace(rows=searched.ids_N[ball.rows]))
        return join(found, len(queries_QW))

    @abstractmethod
    def nearest_in(self, shard: Shard, searched: Searchable, queries_QW: Codes, k: int) -> scan.Nearest:
        """The k nearest rows of a shard; "rows" are its rows."""

    def within_in(self, shard: Shard, searched: Searchable, queries_QW: Codes, radius: int) -> scan.Ball:  # noqa: ARG002
        """The rows of a shard within the radius, for engines that search by radius."""
        raise InvalidInput(f"{self} does not search by radius; use another engine")


# Results


def recall(found_QK: NDArray[np.int32], exact_QK: NDArray[np.int32]) -> NDArray[np.float64]:
    """Recall of each query [Q], by distances: the share of its results that are no farther than the exact k-th one.

    Which of several rows at the last distance are found does not matter: none of them is nearer than another.
    """
    if not exact_QK.shape[1]:
        return np.ones(len(exact_QK))
    share: NDArray[np.float64] = (found_QK <= exact_QK[:, -1:]).mean(1)
    return share


def join(balls: Sequence[scan.Ball], queries: int) -> scan.Ball:
    """The rows of several parts around each query, in (distance, row) order."""
    if not balls:
        return scan.Ball(np.zeros(queries + 1, np.int64), np.empty(0, np.int64), np.empty(0, np.int32))
    query = np.concatenate([np.repeat(np.arange(queries), np.diff(ball.offsets)) for ball in balls])
    rows, distances = (np.concatenate([getattr(ball, part) for ball in balls]) for part in ("rows", "distances"))
    order = np.lexsort((rows, distances, query))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=queries))]).astype(np.int64)
    return scan.Ball(offsets, rows[order], distances[order])


def first(distances_QK: NDArray[Any], rows_QK: NDArray[np.int64], k: int) -> scan.Nearest:
    """The first k by (distance, row) of each query; rows of -1 are none."""
    none = rows_QK < 0
    far = np.where(none, np.iinfo(np.int32).max, distances_QK)
    order = np.lexsort((rows_QK, far), axis=1)[:, :k]
    rows = np.take_along_axis(rows_QK, order, axis=1)
    distances = np.take_along_axis(distances_QK, order, axis=1).astype(np.int32)
    return scan.Nearest(
        np.ascontiguousarray(distances), np.ascontiguousarray(rows), (rows >= 0).sum(1).astype(np.int64)
    )


def _nothing(queries: int) -> scan.Nearest:
    return scan.Nearest(np.empty((queries, 0), np.int32), np.empty((queries, 0), np.int64), np.zeros(queries, np.int64))


# Structures of a shard

_lock = threading.RLock()
_held: WeakKeyDictionary[Shard, dict[str, Any]] = WeakKeyDictionary()


def hold(shard: Shard, name: str, make: Callable[[], Any]) -> Any:
    """A structure that an engine needs of a shard, made at the first call and kept as long as the shard is open."""
    with _lock:
        held = _held.setdefault(shard, {})
        if name not in held:
            held[name] = make()
        return held[name]
