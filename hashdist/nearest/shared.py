"""The shared-neighbour graph: overlaps of neighbour lists, and the similarities W0 that methods start from (D4).

Transpose, union and intersection of rows are kernels of this file rather than scipy's (docs/decisions.md, H133).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ranges import blocks
from hashdist.ground.threads import cores
from hashdist.nearest.cosine import read_only, sort_pairs
from hashdist.nearest.kernel import kernel

_LONGEST_LIST = 65_000  # overlaps are counted in 16 bits
_LAST_ROW = np.int32(2**31 - 1)  # no row has this number


# The shared-neighbour graph. N(i) = i and its k1 nearest others, in that order; c_ij = |N(i) n N(j)|.


class Inverted(NamedTuple):
    """Inverted lists: row t is in N(rows[i]) for rows[indptr[t]:indptr[t + 1]], ascending; int64 [n + 1], int32."""

    indptr: NDArray[np.int64]
    rows: NDArray[np.int32]


class Ranking(NamedTuple):
    """Per row the images whose neighbour lists overlap most, best first: int32 [M, k2], padded with -1, and c_ij."""

    rows_MK: NDArray[np.int32]
    counts_MK: NDArray[np.int32]


class Sparse(NamedTuple):
    """Rows of a 0/1 matrix without its diagonal: row i is indices[indptr[i]:indptr[i + 1]], ascending."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]


def inverted_lists(neighbours_NK: NDArray[np.int32]) -> Inverted:
    """Who has t in N: the transpose of the lists, each row's own number included."""
    n, k = neighbours_NK.shape
    neighbours_NK = read_only(neighbours_NK)
    indptr, rows = np.zeros(n + 1, np.int64), np.empty(n * (k + 1), np.int32)
    _invert(neighbours_NK, indptr, rows)
    return Inverted(indptr, rows)


def shared_neighbour_ranking(
    neighbours_NK: NDArray[np.int32],
    inverted: Inverted,
    k2: int,
    rows: tuple[int, int] | None = None,
    *,
    threads: int = 0,
) -> Ranking:
    """For rows i the top k2 images j by c_ij = |N(i) n N(j)| (DDH's T_i and Algorithm 1; DSAH Eq 8).

    Order: (c_ij descending, place of j in N(i) ascending, absent last, j ascending). Images without overlap are never
    listed, so a row may hold fewer than k2. N(i) includes i, whose overlap with itself is greatest, so i is always
    the first and takes one of the k2 places (docs/decisions.md, D1 and D4).

    Args:
        neighbours_NK: int32 [n, k1] as `self_nearest` gives them; may be memory-mapped.
        inverted: of the same lists.
        k2: >= 1.
        rows: [start, stop) of the rows wanted; None = all.
        threads: 0 = all cores.

    Raises:
        InvalidInput: k2 < 1, or more neighbours than 16-bit counts can hold.
    """
    if k2 < 1:
        raise InvalidInput(f"k2 must be at least 1, found {k2}; raise the setting graph.shared")
    if neighbours_NK.shape[1] > _LONGEST_LIST:
        raise InvalidInput(
            f"lists of at most {_LONGEST_LIST} neighbours can be compared, found {neighbours_NK.shape[1]}"
        )
    start, stop = rows or (0, len(neighbours_NK))
    neighbours_NK = read_only(neighbours_NK)
    found = Ranking(np.full((stop - start, k2), -1, np.int32), np.zeros((stop - start, k2), np.int32))

    def rank(part: tuple[int, int]) -> None:
        lo, hi = part
        _rank_overlap(start + lo, neighbours_NK, *inverted, found.rows_MK[lo:hi], found.counts_MK[lo:hi])

    with ThreadPoolExecutor(threads or cores()) as pool:
        list(pool.map(rank, blocks(stop - start, 512)))
    return found


def initial_similarity(
    neighbours_NK: NDArray[np.int32],
    inverted: Inverted,
    k2: int,
    rows: tuple[int, int] | None = None,
    *,
    threads: int = 0,
) -> Sparse:
    """Rows of DSAH's W0 before it is made symmetric: W_L and W_H (Eqs 7-9), the diagonal left out (it is +1).

    W_L is the k1 nearest by cosine, W_H the top k2 of `shared_neighbour_ranking`; arguments as there.
    """
    start, stop = rows or (0, len(neighbours_NK))
    neighbours_NK = read_only(neighbours_NK)
    parts = []
    for lo, hi in blocks(stop - start, 8192):
        ranking = shared_neighbour_ranking(neighbours_NK, inverted, k2, (start + lo, start + hi), threads=threads)
        degrees = np.empty(hi - lo, np.int64)
        indices = np.empty((hi - lo) * min(k2, neighbours_NK.shape[1]), np.int32)
        total = _intersect(start + lo, neighbours_NK, ranking.rows_MK, degrees, indices)
        parts.append((degrees, indices[:total].copy()))
    degrees = np.concatenate([np.zeros(1, np.int64), *(degrees for degrees, _ in parts)])
    return Sparse(np.cumsum(degrees), np.concatenate([np.empty(0, np.int32), *(indices for _, indices in parts)]))


def union_similarity(
    neighbours_NK: NDArray[np.int32],
    inverted: Inverted,
    k2: int,
    rows: tuple[int, int] | None = None,
    *,
    threads: int = 0,
) -> Sparse:
    """Rows of DDH's S before it is made symmetric (Eqs 1-3): row i is the union of N(k) over k in T_i, without i.

    N(k) is k and its K1 nearest by cosine, T_i the top K2 of `shared_neighbour_ranking`, i first among them; arguments
    as there (docs/decisions.md, D1).
    """
    start, stop = rows or (0, len(neighbours_NK))
    neighbours_NK = read_only(neighbours_NK)
    ranking = shared_neighbour_ranking(neighbours_NK, inverted, k2, (start, stop), threads=threads)
    degrees = np.empty(stop - start, np.int64)
    indices = np.empty((stop - start) * k2 * (neighbours_NK.shape[1] + 1), np.int32)
    total = _unite(start, neighbours_NK, ranking.rows_MK, degrees, indices)
    return Sparse(np.concatenate([np.zeros(1, np.int64), np.cumsum(degrees)]), indices[:total].copy())


def symmetric(w: Sparse, how: Literal["or", "and", "none"]) -> Sparse:
    """W or its transpose (the default, D4), W and its transpose, or W itself. O(edges) memory."""
    if how == "none":
        return w
    n = len(w.indptr) - 1
    turned = Sparse(np.zeros(n + 1, np.int64), np.empty_like(w.indices))
    _transpose(*w, *turned)
    degrees = np.empty(n, np.int64)
    _merge(*w, *turned, how == "or", degrees, np.empty(0, np.int32))
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(degrees)])
    indices = np.empty(indptr[-1], np.int32)
    _merge(*w, *turned, how == "or", degrees, indices)
    return Sparse(indptr, indices)


@kernel
def _invert(neighbours, indptr, rows):  # type: ignore[no-untyped-def]
    n, k = neighbours.shape
    for i in range(n):
        indptr[i + 1] += 1
        for c in range(k):
            indptr[neighbours[i, c] + 1] += 1
    for t in range(n):
        indptr[t + 1] += indptr[t]
    places = indptr[:n].copy()
    for i in range(n):
        rows[places[i]] = i
        places[i] += 1
        for c in range(k):
            t = neighbours[i, c]
            rows[places[t]] = i
            places[t] += 1


@kernel
def _count_overlap(i, neighbours, indptr, rows, counts):  # type: ignore[no-untyped-def]
    """counts[j] := |N(i) n N(j)|: one increment for every entry of the inverted lists of N(i)."""
    counts[:] = 0
    for c in range(-1, neighbours.shape[1]):
        t = i if c < 0 else np.int64(neighbours[i, c])
        for e in range(indptr[t], indptr[t + 1]):
            counts[np.uint32(rows[e])] += 1


@kernel
def _cut_of(candidates, counts, k2, histogram):  # type: ignore[no-untyped-def]
    """The least overlap >= 1 that the top k2 of the candidates have, and how many places are left for those at it."""
    histogram[:] = 0
    for j in candidates:
        histogram[counts[j]] += 1
    cut, above = len(histogram) - 1, 0
    while cut > 1 and above + histogram[cut] < k2:
        above += histogram[cut]
        cut -= 1
    return cut, k2 - above


@kernel
def _at_least(counts, least, out):  # type: ignore[no-untyped-def]
    """Numbers j with counts[j] >= least, ascending; most stretches of a large array have none."""
    found = 0
    for start in range(0, len(counts), 64):
        stop = min(start + 64, len(counts))
        reached = False
        for j in range(start, stop):
            reached |= counts[j] >= least
        if not reached:
            continue
        for j in range(start, stop):
            out[found] = j
            found += counts[j] >= least
    return out[:found]


@kernel
def _rank_overlap(first, neighbours, indptr, rows, out_rows, out_counts):  # type: ignore[no-untyped-def]
    n, k = neighbours.shape
    k2 = out_rows.shape[1]
    counts = np.empty(n, np.uint16)
    place = np.full(n, k + 1, np.int32)  # in N(i)
    histogram = np.zeros(k + 2, np.int64)
    buffer = np.empty(n + 1, np.int32)
    own = np.empty(k + 1, np.int32)
    for m in range(out_rows.shape[0]):
        i = first + m
        _count_overlap(i, neighbours, indptr, rows, counts)
        for c in range(k + 1):
            own[c] = neighbours[i, c - 1] if c else i
            place[own[c]] = c
        # the members of N(i) alone reach this cut, so nothing below it matters
        least = _cut_of(own, counts, k2, histogram)[0] if k2 <= k + 1 else 1
        candidates = _at_least(counts, np.uint16(least), buffer)
        cut, places = _cut_of(candidates, counts, k2, histogram)
        chosen = _above_and_at(candidates, counts, cut, places, place, k + 1)
        keys = np.empty(len(chosen), np.uint64)
        for c in range(len(chosen)):
            j = chosen[c]
            behind = np.uint64((k + 1 - np.int64(counts[j])) * (k + 2) + place[j])
            keys[c] = (behind << np.uint64(32)) | np.uint64(j)
        keys.sort()
        for c in range(len(keys)):
            out_rows[m, c] = np.int32(keys[c] & np.uint64(0xFFFFFFFF))
            out_counts[m, c] = counts[out_rows[m, c]]
        for c in range(k + 1):
            place[own[c]] = k + 1


@kernel
def _above_and_at(candidates, counts, cut, places, place, absent):  # type: ignore[no-untyped-def]
    """Candidates above the cut, and the first `places` of those at it by (place, number); in any order."""
    chosen, members = np.empty(len(candidates) + places, np.int32), np.empty(len(candidates), np.int32)
    count, listed = 0, 0
    for j in candidates:
        if counts[j] > cut:
            chosen[count] = j
            count += 1
        elif counts[j] == cut and place[j] != absent:
            members[listed] = j
            listed += 1
    earliness = np.empty(listed, np.int64)
    for c in range(listed):
        earliness[c] = -place[members[c]]
    sort_pairs(earliness, members[:listed])
    for c in range(min(listed, places)):
        chosen[count + c] = members[c]
    count += min(listed, places)
    places -= listed
    for j in candidates:
        if places <= 0:
            break
        if counts[j] == cut and place[j] == absent:
            chosen[count] = j
            count += 1
            places -= 1
    return chosen[:count]


@kernel
def _intersect(first, neighbours, ranked, degrees, indices):  # type: ignore[no-untyped-def]
    """Rows of both N(i) and the ranking, without i, ascending; returns how many in all."""
    inside = np.zeros(len(neighbours), np.bool_)
    equal = np.zeros(ranked.shape[1], np.int64)
    total = 0
    for m in range(len(ranked)):
        for c in range(neighbours.shape[1]):
            inside[neighbours[first + m, c]] = True
        start = total
        for c in range(ranked.shape[1]):
            if ranked[m, c] >= 0 and inside[ranked[m, c]]:
                indices[total] = ranked[m, c]
                total += 1
        sort_pairs(equal[: total - start], indices[start:total])
        degrees[m] = total - start
        for c in range(neighbours.shape[1]):
            inside[neighbours[first + m, c]] = False
    return total


@kernel
def _unite(first, neighbours, ranked, degrees, indices):  # type: ignore[no-untyped-def]
    """Union of the lists of the ranked images, ascending, without the row itself."""
    held = np.empty(ranked.shape[1] * (neighbours.shape[1] + 1), np.int32)
    total = 0
    for row in range(len(ranked)):
        count = 0
        for k in ranked[row]:
            if k < 0:
                break
            held[count] = k
            count += 1
            for j in neighbours[k]:
                held[count] = j
                count += 1
        ordered = np.sort(held[:count])
        before, degree = np.int32(-1), 0
        for j in ordered:
            if j != before and j != first + row:
                indices[total] = j
                total += 1
                degree += 1
            before = j
        degrees[row] = degree
    return total


@kernel
def _transpose(indptr, indices, out_indptr, out_indices):  # type: ignore[no-untyped-def]
    n = len(indptr) - 1
    for e in range(len(indices)):
        out_indptr[indices[e] + 1] += 1
    for t in range(n):
        out_indptr[t + 1] += out_indptr[t]
    places = out_indptr[:n].copy()
    for i in range(n):
        for e in range(indptr[i], indptr[i + 1]):
            out_indices[places[indices[e]]] = i
            places[indices[e]] += 1


@kernel
def _merge(indptr_a, indices_a, indptr_b, indices_b, either, degrees, out):  # type: ignore[no-untyped-def]
    """Union (`either`) or intersection of ascending rows; sizes only where `out` is empty."""
    total = 0
    for i in range(len(degrees)):
        a, b, start = indptr_a[i], indptr_b[i], total
        while a < indptr_a[i + 1] or b < indptr_b[i + 1]:
            left = indices_a[a] if a < indptr_a[i + 1] else _LAST_ROW
            right = indices_b[b] if b < indptr_b[i + 1] else _LAST_ROW
            if either or left == right:
                if len(out) > 0:
                    out[total] = min(left, right)
                total += 1
            a += left <= right
            b += right <= left
        degrees[i] = total - start
