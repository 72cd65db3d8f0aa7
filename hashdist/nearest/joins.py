"""Near-duplicates: which rows lie within a small distance of each other, and which of them hang together.

Rows are looked at in blocks. A pair of blocks is joined through buckets: the bits are dealt to m chunks, and two codes
that differ in at most r bits are equal in at least m - r chunks (pigeonhole; Manku et al., Detecting near-duplicates
for web crawling, 2007). So for each choice of m - r chunks the codes are sorted by these bits, and codes that agree in
them are compared. More chunks leave fewer comparisons and need more sorts; m is chosen by what a sample of the codes
says about both. With no bits at all (m = r) every code is compared with every other, which is the choice for large
radii.

Of the pairs a forest is kept: an edge is noted only where it joins two trees, so that edges never outnumber
rows. Rows of equal codes are a star around their smallest id and are compared with others once.
"""

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Any, NamedTuple, no_type_check

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.permutation import mix64
from hashdist.nearest.kernel import differing, kernel

Edges = NDArray[np.int64]
"""Pairs of ids, int64 [E, 2]."""

_CHUNKS_BEYOND = 4  # chunks tried: radius + 1 to radius + this many
_MOST_SORTS = 120
_SAMPLE = 4096
_SORT_NS = 400.0  # a code, hashed, sorted and gathered
_PAIR_NS = 0.6  # a word of a pair, compared
_FEW = 8  # rows are few if the others are this many times more: these are then searched, not sorted
_AT_ONCE = 256  # codes compared with one code before any of them is looked at


class Block(NamedTuple):
    """Rows to be joined: ids int64 [N], ascending and distinct; codes uint8 [N, W]."""

    ids: NDArray[np.int64]
    codes: NDArray[np.uint8]


def no_edges() -> Edges:
    """Edges of nothing."""
    return np.empty((0, 2), np.int64)


def within(block: Block, radius: int) -> Edges:
    """A forest that joins exactly the rows of a block that are joined by steps of at most `radius` bits."""
    firsts, stars = _distinct(block)
    return np.concatenate([stars, _joined(firsts.ids, firsts.codes, None, radius)])


def between(left: Block, right: Block, radius: int) -> Edges:
    """As `within`, of the pairs that have one row in each block. The same row may be in both."""
    few, many = sorted((left, right), key=lambda block: len(block.ids))
    a = _distinct(few)[0]
    b = _distinct(many)[0] if len(many.ids) < _FEW * len(few.ids) else many
    return _joined(np.concatenate([a.ids, b.ids]), np.concatenate([a.codes, b.codes]), len(a.ids), radius)


def components(edges: Edges) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids that edges join, ascending, and the smallest id that each of them hangs together with."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ids, ends = np.unique(edges, return_inverse=True)
    left, right = ends.reshape(-1, 2).T
    graph = coo_array((np.ones(len(left), np.bool_), (left, right)), shape=(len(ids), len(ids)))
    count, labels = connected_components(graph, directed=False)
    smallest = np.full(count, len(ids), np.int64)
    np.minimum.at(smallest, labels, np.arange(len(ids)))
    return ids, ids[smallest[labels]]


def stars(ids: NDArray[np.int64], clusters: NDArray[np.int64]) -> Edges:
    """The fewest edges that make these clusters: every id to its cluster's smallest."""
    others = ids != clusters
    return np.stack([clusters[others], ids[others]], axis=1)


# One pair of blocks


def _distinct(block: Block) -> tuple[Block, Edges]:
    """The first row of every code, and edges from it to the other rows of that code."""
    words_VN = _words(block.codes)
    order = np.lexsort(words_VN[::-1])  # stable, so that the smallest id of a code comes first
    new = np.ones(len(order), np.bool_)
    new[1:] = (words_VN[:, order[1:]] != words_VN[:, order[:-1]]).any(0)
    first = order[new][np.cumsum(new) - 1] if len(order) else order
    kept = np.sort(order[new])
    ids = block.ids
    return Block(ids[kept], block.codes[kept]), np.stack([ids[first[~new]], ids[order[~new]]], axis=1)


def _words(codes_NW: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Codes as 64-bit words, one after the other in memory: uint64 [ceil(W / 8), N]."""
    n, width = codes_NW.shape
    padded = np.zeros((n, -(-width // 8) * 8), np.uint8)
    padded[:, :width] = codes_NW
    words_VN: NDArray[np.uint64] = np.ascontiguousarray(padded.view(np.uint64).T)
    return words_VN


def _joined(ids: NDArray[np.int64], codes_NW: NDArray[np.uint8], left: int | None, radius: int) -> Edges:
    """A forest of the pairs within the radius; with `left`, of those between the first `left` rows and the others."""
    n = len(ids)
    if n < 2 or left in (0, n) or (radius == 0 and left is None):
        return no_edges()
    words_VN = _words(codes_NW)
    parents, found = np.arange(n), np.empty((n, 2), np.int64)
    count = 0
    for mask_V in _masks(words_VN, left, radius):
        keys_N = _keys(words_VN, mask_V)
        order = _sorted(keys_N, left)
        count = _join_buckets(keys_N[order], words_VN[:, order], order, left or 0, radius, parents, found, count)
    edges: Edges = ids[found[:count]]
    other: Edges = edges[edges[:, 0] != edges[:, 1]]  # a row may be on both sides
    return other


def _sorted(keys_N: NDArray[np.uint64], left: int | None) -> NDArray[np.int64]:
    """Rows by key; where few rows are joined with many, without those of the many whose key none of the few has."""
    if left is None or len(keys_N) < _FEW * left:
        return np.argsort(keys_N, kind="stable")
    wanted, keys = np.unique(keys_N[:left]), keys_N[left:]
    shared = np.flatnonzero(wanted[np.searchsorted(wanted, keys).clip(max=len(wanted) - 1)] == keys)
    rows = np.concatenate([np.arange(left), left + shared])
    return rows[np.argsort(keys_N[rows], kind="stable")]


def _keys(words_VN: NDArray[np.uint64], mask_V: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A word for each code, equal where the masked bits are; wide codes may share one by chance, which does no harm."""
    if len(words_VN) == 1:
        keys_N: NDArray[np.uint64] = words_VN[0] & mask_V[0]
        return keys_N
    keys_N = np.zeros(words_VN.shape[1], np.uint64)
    for word_N, mask in zip(words_VN, mask_V, strict=True):
        if mask:
            keys_N = mix64(keys_N ^ (word_N & mask))
    return keys_N


def _masks(words_VN: NDArray[np.uint64], left: int | None, radius: int) -> list[NDArray[np.uint64]]:
    """Sets of bits, uint64 [V] each, such that any two codes within the radius agree in all bits of one of them."""
    n = words_VN.shape[1]
    pairs = n * (n - 1) / 2 if left is None else left * (n - left)
    step = max(1, n // _SAMPLE)
    sample_VS = np.ascontiguousarray(words_VN[:, ::step][:, :_SAMPLE])
    bits_SL = np.unpackbits(np.ascontiguousarray(sample_VS.T).view(np.uint8), axis=1)
    varied = np.argsort(np.abs(bits_SL.mean(0) - 0.5), kind="stable")  # so that each chunk has its share of those
    everything = [np.zeros(len(words_VN), np.uint64)]
    best, cost = everything, pairs * _PAIR_NS * len(words_VN)
    for chunks in range(radius + 1, radius + 1 + _CHUNKS_BEYOND):
        sorts = comb(chunks, radius)
        if sorts > _MOST_SORTS or sorts * n * _SORT_NS >= cost:
            break
        masks = [_mask(varied, chunks, kept, len(words_VN)) for kept in combinations(range(chunks), chunks - radius)]
        compared = sum(_agreeing(sample_VS, mask) for mask in masks) * pairs
        costs = sorts * n * _SORT_NS + compared * _PAIR_NS * len(words_VN)
        if costs < cost:
            best, cost = masks, costs
    return best


def _mask(bits: NDArray[np.int64], chunks: int, kept: Sequence[int], words: int) -> NDArray[np.uint64]:
    """The bits of some chunks, where bits are dealt to chunks in turn."""
    chosen = np.zeros(words * 64, np.uint8)
    for chunk in kept:
        chosen[bits[chunk::chunks]] = 1
    return np.packbits(chosen).view(np.uint64)


def _agreeing(sample_VS: NDArray[np.uint64], mask_V: NDArray[np.uint64]) -> float:
    """Estimated share of pairs that agree in the masked bits; at least what independent even bits would give."""
    n = sample_VS.shape[1]
    sizes = np.unique(_keys(sample_VS, mask_V), return_counts=True)[1]
    bits = int(np.bitwise_count(mask_V).sum())
    return float(max((sizes * (sizes - 1)).sum() / max(1, n * (n - 1)), 2.0**-bits))


@kernel
def _join_buckets(
    keys_N: Any, words_VN: Any, rows_N: Any, left: int, radius: int, parents: Any, found: Any, count: int
) -> int:
    """Joins the trees of rows that share a key and lie within the radius; appends the edges that joined two trees.

    Everything is sorted by (key, row). With left > 0 only pairs of a row below it and one from it on count.
    """
    n, limit = len(keys_N), np.uint64(radius)
    distances = np.empty(_AT_ONCE, np.uint64)
    start = 0
    while start < n:
        stop = start + 1
        while stop < n and keys_N[stop] == keys_N[start]:
            stop += 1
        middle = stop
        if left:
            middle = start
            while middle < stop and rows_N[middle] < left:
                middle += 1
        for i in range(start, middle):
            first = middle if left else i + 1
            for from_ in range(first, stop, _AT_ONCE):
                size = min(_AT_ONCE, stop - from_)
                if _nearest_of(words_VN, i, from_, size, distances) <= limit:
                    for j in range(size):
                        if distances[j] <= limit:
                            count = _join(rows_N[i], rows_N[from_ + j], parents, found, count)
        start = stop
    return count


@kernel
@no_type_check
def _nearest_of(words_VN: Any, i: int, from_: int, size: int, distances: Any) -> int:
    """Distances of code i to `size` codes; returns the smallest."""
    nearest = np.uint64(1 << 20)
    code, others = words_VN[0, i], words_VN[0]
    for j in range(size):
        distances[j] = differing(code, others[from_ + j])
    for v in range(1, len(words_VN)):
        code, others = words_VN[v, i], words_VN[v]
        for j in range(size):
            distances[j] += differing(code, others[from_ + j])
    for j in range(size):
        nearest = min(nearest, distances[j])
    return nearest


@kernel
def _join(a: int, b: int, parents: Any, found: Any, count: int) -> int:
    root_a, root_b = _root(a, parents), _root(b, parents)
    if root_a == root_b:
        return count
    if root_a > root_b:
        root_a, root_b = root_b, root_a
    parents[root_b] = root_a
    found[count, 0], found[count, 1] = a, b
    return count + 1


@kernel
def _root(row: int, parents: Any) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row
