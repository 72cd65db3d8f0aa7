"""Folded codes: every distinct code once, with the ids of its rows. Fewer codes to look at where codes collide.

Trained codes of few bits collide: a collection has fewer distinct codes than rows. Folded, a search looks at each
distinct code once (decision H104). Distinct codes are numbered in the order of their smallest live id. So the k
distinct codes that are first by (distance, number) are all that is needed: a row that belongs among the first k at
the last distance has fewer than k such codes before its own, since each of these has a row before it.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from numpy.typing import NDArray

from hashdist.nearest import scan
from hashdist.nearest.kernel import kernel

Codes = NDArray[np.uint8]


class Fold(NamedTuple):
    """Live rows by their codes.

    Attributes:
        codes_UW: the distinct codes, in the order of their smallest ids.
        starts_U: code u owns ids_N[starts_U[u] : stops_U[u]], ascending.
        stops_U: likewise.
        ids_N: the ids of all live rows.
    """

    codes_UW: Codes
    starts_U: NDArray[np.int64]
    stops_U: NDArray[np.int64]
    ids_N: NDArray[np.int64]


def fold(codes_NW: Codes, ids_N: NDArray[np.int64]) -> Fold:
    """Rows by their codes, in any order."""
    by_id = np.argsort(ids_N, kind="stable")
    codes_NW, ids_N = codes_NW[by_id], ids_N[by_id]
    words_NX = scan.in_words(codes_NW)
    by_code = np.lexsort(words_NX.T)  # stable: ids ascend within a code
    words_NX, ids_N = words_NX[by_code], ids_N[by_code]
    first = np.ones(len(ids_N), np.bool_)
    first[1:] = (words_NX[1:] != words_NX[:-1]).any(1)
    starts = np.flatnonzero(first)
    stops = np.append(starts[1:], len(ids_N))[: len(starts)]
    order = np.argsort(ids_N[starts])
    return Fold(codes_NW[by_code[starts[order]]], starts[order], stops[order], ids_N)


def nearest(folded: Fold, queries_QW: Codes, k: int) -> scan.Nearest:
    """The k nearest rows of every query by (distance, id); "rows" are ids. Raises InvalidInput as `scan.nearest`."""
    found = scan.nearest(folded.codes_UW, queries_QW, k)
    out = scan.Nearest(
        np.full((len(queries_QW), k), -1, np.int32),
        np.full((len(queries_QW), k), -1, np.int64),
        np.zeros(len(queries_QW), np.int64),
    )
    _unfold(*found, folded.starts_U, folded.stops_U, folded.ids_N, *out)
    return out


def within(folded: Fold, queries_QW: Codes, radius: int) -> scan.Ball:
    """Every row within the radius; "rows" are ids. Raises InvalidInput as `scan.within`."""
    ball = scan.within(folded.codes_UW, queries_QW, radius)
    starts, sizes = folded.starts_U[ball.rows], (folded.stops_U - folded.starts_U)[ball.rows]
    query = np.repeat(np.repeat(np.arange(len(queries_QW)), np.diff(ball.offsets)), sizes)
    distances = np.repeat(ball.distances, sizes)
    within_code = np.arange(len(distances)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    ids = folded.ids_N[np.repeat(starts, sizes) + within_code]
    order = np.lexsort((ids, distances, query))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=len(queries_QW)))]).astype(np.int64)
    return scan.Ball(offsets, ids[order], distances[order])


@kernel
@no_type_check
def _unfold(found_distances, numbers, counts, starts, stops, ids, out_distances, out_ids, out_counts):
    """The first rows by (distance, id) of codes that are in (distance, number) order."""
    k = out_ids.shape[1]
    for q in range(len(counts)):
        have = c = 0
        while c < counts[q] and have < k:
            distance = found_distances[q, c]
            end = c
            size = 0
            while end < counts[q] and found_distances[q, end] == distance:
                u = numbers[q, end]
                size += min(stops[u] - starts[u], k - have)  # ids ascend: no more of one code can be needed
                end += 1
            level = np.empty(size, np.int64)
            at = 0
            for e in range(c, end):
                u = numbers[q, e]
                for row in range(starts[u], starts[u] + min(stops[u] - starts[u], k - have)):
                    level[at] = ids[row]
                    at += 1
            level.sort()
            for row in range(min(size, k - have)):
                out_distances[q, have + row] = distance
                out_ids[q, have + row] = level[row]
            have += min(size, k - have)
            c = end
        out_counts[q] = have
