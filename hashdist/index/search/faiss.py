"""Engines of faiss, over the shard files or structures that faiss builds of them.

| engine | what it is | answers |
|---|---|---|
| `faiss` | `IndexBinaryFlat` on the shard files themselves, mapped | exact: the scan's reference |
| `ivf` | `IndexBinaryIVF` (Sivic and Zisserman 2003) of each shard | approximate |
| `multihash` | `IndexBinaryMultiHash` of each shard (Norouzi et al. 2012) | approximate; exact within a radius |

faiss keeps arbitrary ones of the rows at the last distance, so where that distance is tied the exact engine asks for
all rows at it. An approximate engine that finds fewer than k rows for a query leaves this query to the scan.

The structures of `ivf` and `multihash` are built for a shard when it is first asked for, and kept in the local cache
under the checksum of the shard's codes.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ranges import blocks
from hashdist.index.search import scanning
from hashdist.index.search.derived import load_or_build
from hashdist.index.search.engine import ByShard, Codes, first, hold
from hashdist.index.search.filters import Filter, Searchable
from hashdist.index.shards.shard import Shard
from hashdist.index.view import View
from hashdist.nearest import scan

_RANGE_RESULTS = 1 << 25  # rows that one call of faiss's range search may return
_SAMPLE_PER_LIST = 64
_SEED = 1234
_WORST_SHARE = 0.5  # of a shard's rows left out, from which an approximate engine has nothing to gain


@dataclass(frozen=True)
class Faiss(ByShard):
    """`IndexBinaryFlat` on the shard files, with its arbitrary choice at the last distance put right."""

    def nearest_in(self, shard: Shard, searched: Searchable, queries_QW: Codes, k: int) -> scan.Nearest:
        """See ByShard."""
        if searched.codes_NW is not shard.codes:
            return scan.nearest(searched.codes_NW, queries_QW, k, dead=searched.dead)  # a few rows, copied out
        index, parameters = _flat(shard), _selector(searched)
        live = shard.rows - _left_out(searched)
        # one more than k shows whether the last distance is tied
        distances, rows = index.search(queries_QW, min(k + 1, max(live, 1)), params=parameters)
        found = first(distances, rows, k)
        tied = np.flatnonzero((distances[:, k:] == distances[:, k - 1 : k]).any(1))
        for q, ball in self._balls(index, parameters, queries_QW, {int(q): int(distances[q, k]) for q in tied}):
            order = np.lexsort((ball[1], ball[0]))[:k]
            found.distances_QK[q], found.rows_QK[q] = ball[0][order], ball[1][order]
        return found

    @staticmethod
    def _balls(index: Any, parameters: Any, queries_QW: Codes, radii: dict[int, int]) -> Any:
        """(query, (distances, rows)) of everything within the radius of each of these queries."""
        for radius in sorted(set(radii.values())):
            which = np.array([q for q, own in radii.items() if own == radius])
            for start, stop in blocks(len(which), max(1, _RANGE_RESULTS // index.ntotal)):
                part = which[start:stop]
                offsets, distances, rows = index.range_search(queries_QW[part], radius + 1, params=parameters)
                for place, q in enumerate(part.tolist()):
                    span = slice(int(offsets[place]), int(offsets[place + 1]))
                    yield q, (distances[span].astype(np.int32), rows[span])

    def within_in(self, shard: Shard, searched: Searchable, queries_QW: Codes, radius: int) -> scan.Ball:
        """See ByShard."""
        if searched.codes_NW is not shard.codes:
            return scan.within(searched.codes_NW, queries_QW, radius, dead=searched.dead)
        radii = dict.fromkeys(range(len(queries_QW)), radius)
        parts = self._balls(_flat(shard), _selector(searched), queries_QW, radii)
        return _ball([ball for _, ball in parts])


def _flat(shard: Shard) -> Any:
    def open_flat() -> Any:
        faiss = _faiss()
        return faiss.read_index_binary(str(shard.file("codes")), faiss.IO_FLAG_MMAP_IFC)

    return hold(shard, "faiss", open_flat)


def _selector(searched: Searchable) -> Any:
    """faiss's search parameters that leave out what is left out."""
    if searched.dead is None:
        return None
    faiss = _faiss()
    return faiss.SearchParameters(sel=faiss.IDSelectorBitmap(~searched.dead))


class Approximate(ByShard):
    """Engines that may miss rows. The scan answers queries for which they find fewer than k."""

    exact = False

    def nearest(self, view: View, queries_QW: Codes, k: int, where: Filter | None) -> scan.Nearest:
        """See Engine."""
        best = self.merge(view, queries_QW, k, where)
        short = np.flatnonzero(best.counts_Q < k)
        if not len(short):
            return best
        width, shape = best.rows_QK.shape[1], (len(queries_QW), k)
        distances, ids = np.empty(shape, np.int32), np.empty(shape, np.int64)
        distances[:, :width], ids[:, :width] = best.distances_QK, best.rows_QK
        exact = scanning.nearest(view, queries_QW[short], k, where)
        distances[short], ids[short] = exact.distances_QK, exact.rows_QK
        return scan.Nearest(distances, ids, np.full(len(queries_QW), k))


@dataclass(frozen=True)
class Ivf(Approximate):
    """`IndexBinaryIVF` per shard.

    Args:
        probes: lists looked at per query and shard.
        lists: number of lists of a shard; 0 = about the square root of its rows.
    """

    probes: int = 16
    lists: int = 0
    by_radius = False  # faiss takes no number of probes there

    def __post_init__(self) -> None:
        if self.probes < 1 or self.lists < 0:
            raise InvalidInput(f"probes must be at least 1 and lists at least 0, found {self.probes} and {self.lists}")

    def nearest_in(self, shard: Shard, searched: Searchable, queries_QW: Codes, k: int) -> scan.Nearest:
        """See ByShard."""
        lists = self.lists or max(1, isqrt(shard.rows))
        if shard.rows < 2 * lists or not _worth(shard, searched):
            return scan.nearest(searched.codes_NW, queries_QW, k, dead=searched.dead)
        index = hold(
            shard, f"ivf-{lists}", lambda: _load_or_build(shard, f"ivf-{lists}", lambda: _ivf(shard.codes, lists))
        )
        parameters = _faiss().SearchParametersIVF(nprobe=min(self.probes, lists))
        return _more_and_more(
            lambda queries, ask: index.search(queries, ask, params=parameters), searched, queries_QW, k
        )


def _ivf(codes_NW: Codes, lists: int) -> Any:
    """Trained on rows drawn evenly; rows are sorted by id, which is a hash."""
    faiss = _faiss()
    bits = 8 * codes_NW.shape[1]
    quantizer = faiss.IndexBinaryFlat(bits)
    index = faiss.IndexBinaryIVF(quantizer, bits, lists)
    index.cp.seed, index.cp.min_points_per_centroid = _SEED, 1
    index.train(np.ascontiguousarray(codes_NW[:: max(1, len(codes_NW) // (_SAMPLE_PER_LIST * lists))]))
    index.add(np.ascontiguousarray(codes_NW))
    return index


@dataclass(frozen=True)
class MultiHash(Approximate):
    """`IndexBinaryMultiHash` per shard: a hash table on each of several pieces of the code.

    A code within radius r differs in at most r // tables bits of some piece, so with as many flips (which is what a
    radius search takes) nothing within r is missed.

    Args:
        flips: bits of each piece that may differ, for the k nearest.
        piece: bits of a piece; 0 = about log2 of the shard's rows.
    """

    flips: int = 1
    piece: int = 0

    def __post_init__(self) -> None:
        if self.flips < 0 or self.piece < 0:
            raise InvalidInput(f"flips and piece must be at least 0, found {self.flips} and {self.piece}")

    def nearest_in(self, shard: Shard, searched: Searchable, queries_QW: Codes, k: int) -> scan.Nearest:
        """See ByShard."""
        if not _worth(shard, searched):
            return scan.nearest(searched.codes_NW, queries_QW, k, dead=searched.dead)
        index = self._index(shard, self.flips)
        return _more_and_more(lambda queries, ask: index.search(queries, ask), searched, queries_QW, k)

    def within_in(self, shard: Shard, searched: Searchable, queries_QW: Codes, radius: int) -> scan.Ball:
        """See ByShard."""
        tables, piece = self._shape(shard)
        if not _worth(shard, searched) or radius // tables >= piece:
            return scan.within(searched.codes_NW, queries_QW, radius, dead=searched.dead)
        offsets, distances, rows = self._index(shard, radius // tables).range_search(queries_QW, radius + 1)
        live = _alive(searched, rows)
        return _ball(
            [
                (distances[a:b][live[a:b]].astype(np.int32), rows[a:b][live[a:b]])
                for a, b in zip(offsets[:-1].astype(np.int64), offsets[1:].astype(np.int64), strict=True)
            ]
        )

    def _shape(self, shard: Shard) -> tuple[int, int]:
        bits = 8 * shard.codes.shape[1]
        piece = min(self.piece or max(4, shard.rows.bit_length() - 1), bits, 60)
        return bits // piece, piece

    def _index(self, shard: Shard, flips: int) -> Any:
        tables, piece = self._shape(shard)
        flips = min(flips, piece)
        name = f"multihash-{tables}x{piece}"

        def open_index() -> Any:
            index = _load_or_build(shard, name, lambda: _multihash(shard.codes, tables, piece))
            index.nflip = flips
            return index

        return hold(shard, f"{name}-{flips}", open_index)


def _multihash(codes_NW: Codes, tables: int, piece: int) -> Any:
    index = _faiss().IndexBinaryMultiHash(8 * codes_NW.shape[1], tables, piece)
    index.add(np.ascontiguousarray(codes_NW))
    return index


def _more_and_more(
    search: Callable[[Codes, int], tuple[NDArray[np.int32], NDArray[np.int64]]],
    searched: Searchable,
    queries_QW: Codes,
    k: int,
) -> scan.Nearest:
    """Ask for more until k live rows are found, or the engine has no more."""
    rows = len(searched.ids_N)
    ask = min(k if searched.dead is None else 2 * k, rows)
    while True:
        distances, found = search(queries_QW, ask)
        keep = _alive(searched, found)
        ended = (found < 0).any(1) | (ask == rows)
        if ((keep.sum(1) >= k) | ended).all():
            return first(distances, np.where(keep, found, -1), k)
        ask = min(4 * ask, rows)


def _worth(shard: Shard, searched: Searchable) -> bool:
    return searched.codes_NW is shard.codes and _left_out(searched) < _WORST_SHARE * shard.rows


def _ball(parts: list[tuple[NDArray[np.int32], NDArray[np.int64]]]) -> scan.Ball:
    """One query's (distances, rows) after the other, each put in order."""
    orders = [np.lexsort((rows, distances)) for distances, rows in parts]
    offsets = np.cumsum([0, *(len(rows) for _, rows in parts)]).astype(np.int64)
    rows = np.concatenate([rows[order] for (_, rows), order in zip(parts, orders, strict=True)] or [np.empty(0, int)])
    distances = [distances[order] for (distances, _), order in zip(parts, orders, strict=True)]
    return scan.Ball(offsets, rows, np.concatenate(distances or [np.empty(0, np.int32)]))


def _left_out(searched: Searchable) -> int:
    return 0 if searched.dead is None else int(np.bitwise_count(searched.dead[: -(-len(searched.ids_N) // 8)]).sum())


def _alive(searched: Searchable, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these rows (-1: none) are not left out."""
    return (rows >= 0) & scan.alive(searched.dead, rows.clip(min=0))


def _load_or_build(shard: Shard, name: str, build: Callable[[], Any]) -> Any:
    """A faiss index of a shard from the local cache; built, and put there, where it is not or is damaged."""
    faiss = _faiss()

    def write(index: Any, path: Path) -> Any:
        faiss.write_index_binary(index, str(path))
        return index

    return load_or_build(
        shard,
        "engines",
        f"{name}.faiss",
        read=lambda path: faiss.read_index_binary(str(path)),
        build=build,
        write=write,
        said=f"{name} of a shard is",
    )


def _faiss() -> Any:
    return importlib.import_module("faiss")
