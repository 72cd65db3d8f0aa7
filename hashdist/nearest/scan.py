"""The scan: exact Hamming search over packed codes at the speed of memory or of popcount, whichever ends first.

A kernel looks at a block of codes that fits the first-level cache, asks with vector instructions whether any of them
is nearer than the query's current cut, and only where one is looks at single codes. The cut falls as candidates
come in: once k rows at distance <= t are known, only rows nearer than t can matter, because rows are met in
ascending order and (distance, row) is the order of results. So at most k rows of any one distance are ever kept, and
codes that are all equal, or of three kinds, cost no more than random ones.

The kernels are compiled by numba without its own threads (its parallel mode aborts under concurrent callers) and
release the GIL; work is spread over one pool of threads (hashdist/nearest/kernel.py): rows over threads for few
queries, queries over threads for many (histograms: always rows). Any number of Python threads may search at once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, no_type_check

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ranges import blocks
from hashdist.ground.threads import cores, spread
from hashdist.nearest.kernel import (
    AS_ID,
    address,
    differing,
    is_dead,
    kernel,
    load,
    mark_below,
    marked,
    narrow,
    plus,
    prefetch,
)

_BLOCK = 512  # codes looked at together: 4 KiB of 64-bit codes
_AHEAD_BYTES = 1024  # of the next block, prefetched for few queries: as many lines as a core fetches at once
_BLOCK_BYTES = 4096  # of a block that more queries look at
_LINE, _PAGE = 64, 4096  # bytes of a cache line and of a page
_GROUP = 64  # codes looked at together once their block has a hit
_COLUMNS_FROM = 4  # queries from which turning a block of wide codes word by word pays
_ROWS_PER_TASK = 1 << 16  # a task is not worth a thread's while below this many codes
_QUERIES_PER_TASK = 64
_BUFFER_BYTES = 64 << 20  # candidates kept per task
_TILE_BYTES = 1 << 18  # codes and labels that all queries pass together: they stay in the second-level cache
_SORTED_ALONE = 1 << 14  # matches that one thread puts in order
_LANES = 4  # counters per distance and relevance: an increment need not wait for the one before


class Nearest(NamedTuple):
    """The nearest rows of every query, in (distance, row) order.

    `rows_QK[q, : counts_Q[q]]` is valid, the rest of a row is padding (-1).
    """

    distances_QK: NDArray[np.int32]
    rows_QK: NDArray[np.int64]
    counts_Q: NDArray[np.int64]


class Ball(NamedTuple):
    """Every row within a radius: query q owns [offsets[q], offsets[q + 1]), in (distance, row) order."""

    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    distances: NDArray[np.int32]


class Part(NamedTuple):
    """Codes that are searched together with others: a shard.

    Attributes:
        codes_NW: packed codes; may be unaligned or memory-mapped.
        ids_N: int64, ascending; None where row numbers will do.
        dead: bitmap of rows to leave out, see `bitmap`.
    """

    codes_NW: NDArray[np.uint8]
    ids_N: NDArray[np.int64] | None = None
    dead: NDArray[np.uint8] | None = None


def nearest(
    codes_NW: NDArray[np.uint8],
    queries_QW: NDArray[np.uint8],
    k: int,
    *,
    dead: NDArray[np.uint8] | None = None,
    threads: int = 0,
) -> Nearest:
    """The k nearest rows of every query by (Hamming distance, row), exactly.

    Args:
        codes_NW: packed codes; may be unaligned or memory-mapped.
        queries_QW: packed codes of the same width.
        k: rows per query at most, >= 1.
        dead: bitmap of rows to leave out, see `bitmap`.
        threads: 0 = all cores.

    Returns:
        Fewer than k rows only where there are no more live ones.

    Raises:
        InvalidInput: arrays of other types or widths, k < 1.
    """
    return nearest_of([Part(codes_NW, None, dead)], queries_QW, k, threads=threads)


def nearest_of(parts: Sequence[Part], queries_QW: NDArray[np.uint8], k: int, *, threads: int = 0) -> Nearest:
    """The k nearest of the rows of all parts by (Hamming distance, id), exactly; "rows" of the result are ids.

    A thread goes through its share of all parts in one call of the kernel: rows found in one part are the bound
    in the next. Arguments and errors as in `nearest`.
    """
    for part in parts:
        _check(part.codes_NW, queries_QW)
    if k < 1:
        raise InvalidInput(f"k must be at least 1, found {k}")
    rows = sum(len(part.codes_NW) for part in parts)
    k = min(k, rows)
    out = _empty_nearest(len(queries_QW), k)
    if not out.rows_QK.size:
        return out
    per_task = max(1, min(_QUERIES_PER_TASK, _BUFFER_BYTES // ((2 * k + _GROUP) * 10)))
    ranges, batches = _split(rows, len(queries_QW), per_task, threads or cores())
    held = [addressable(part) for part in parts]
    words_Q = in_words(queries_QW)

    levels = 8 * queries_QW.shape[1] + 1

    def search(row_range: tuple[int, int], batch: tuple[int, int], into: Nearest) -> None:
        q = slice(*batch)
        _nearest(_pieces(held, *row_range), words_Q[q], *form_of(words_Q[q]), levels, *_cut(into, q))

    if len(ranges) == 1:
        spread([partial(search, ranges[0], batch, out) for batch in batches], threads)
        return out
    found = [_empty_nearest(len(queries_QW), k) for _ in ranges]
    spread([partial(search, r, b, f) for r, f in zip(ranges, found, strict=True) for b in batches], threads)
    best = found[0]
    for other in found[1:]:
        best = merge(best, other, k)
    return best


def merge(a: Nearest, b: Nearest, k: int) -> Nearest:
    """The first k of two results by (distance, row), per query; "row" may be any int64, such as an id."""
    counts_Q = np.minimum(a.counts_Q + b.counts_Q, k)
    out = _empty_nearest(len(counts_Q), int(counts_Q.max(initial=0)))
    out.counts_Q[:] = counts_Q
    _merge(*a, *b, *out)
    return out


def within(
    codes_NW: NDArray[np.uint8],
    queries_QW: NDArray[np.uint8],
    radius: int,
    *,
    dead: NDArray[np.uint8] | None = None,
    threads: int = 0,
) -> Ball:
    """Every row at a Hamming distance of at most `radius` from each query. Arguments and errors as in `nearest`."""
    return within_of([Part(codes_NW, None, dead)], queries_QW, radius, threads=threads)


def within_of(parts: Sequence[Part], queries_QW: NDArray[np.uint8], radius: int, *, threads: int = 0) -> Ball:
    """Every row of all parts within the radius; "rows" of the result are ids. Otherwise as `within`."""
    for part in parts:
        _check(part.codes_NW, queries_QW)
    if radius < 0:
        raise InvalidInput(f"the radius must be at least 0, found {radius}")
    levels = min(radius, 8 * queries_QW.shape[1]) + 1
    rows = sum(len(part.codes_NW) for part in parts)
    ranges, batches = _split(rows, len(queries_QW), _QUERIES_PER_TASK, threads or cores())
    held = [addressable(part) for part in parts]
    words_Q = in_words(queries_QW)

    def search(row_range: tuple[int, int], batch: tuple[int, int]) -> Pairs:
        words = words_Q[slice(*batch)]
        query, ids, distances = _within(_pieces(held, *row_range), words, *form_of(words), levels)
        return Pairs(query + batch[0], ids, distances)

    found = spread([partial(search, r, b) for r in ranges for b in batches], threads)
    return ball(found, len(queries_QW), levels, threads=threads)


class Pairs(NamedTuple):
    """Rows found by one task, in any order: query, row or id, distance."""

    queries: NDArray[np.int64]
    rows: NDArray[np.int64]
    distances: NDArray[np.int32]


def ball(found: Sequence[Pairs], queries: int, levels: int, *, threads: int = 0) -> Ball:
    """The pairs that several tasks have found, every (query, row) once, at distances below `levels`, in order."""
    starts = np.zeros(queries * levels + 1, np.int64)
    for part in found:
        _count(part.queries, part.distances, levels, starts)
    np.cumsum(starts, out=starts)
    rows, distances = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int32)
    place = starts[:-1].copy()
    for part in found:
        _put(*part, levels, place, rows, distances)
    groups = blocks(queries * levels, max(1, queries * levels // 16))
    if len(rows):
        spread(
            [partial(_sort, rows, starts[a : b + 1]) for a, b in groups], 1 if len(rows) < _SORTED_ALONE else threads
        )
    return Ball(starts[::levels].copy(), rows, distances)


def histograms(
    codes_NW: NDArray[np.uint8],
    queries_QW: NDArray[np.uint8],
    labels_NM: NDArray[np.uint64],
    query_labels_QM: NDArray[np.uint64],
    *,
    dead: NDArray[np.uint8] | None = None,
    threads: int = 0,
) -> NDArray[np.int64]:
    """Per query and distance, how many rows there are and how many of them share a label: int64 [Q, 2, L + 1].

    Histograms of shards add up; all exact metrics come from their sum (hashdist/evaluation/ranking.py).

    Args:
        codes_NW: packed codes; may be unaligned or memory-mapped.
        queries_QW: packed codes of the same width.
        labels_NM: label sets as bit masks, 64 labels a word (`ranking.label_masks`).
        query_labels_QM: likewise.
        dead: bitmap of rows to leave out, see `bitmap`.
        threads: 0 = all cores.

    Raises:
        InvalidInput: arrays of other types or widths, label masks that do not match.
    """
    _check(codes_NW, queries_QW)
    if labels_NM.shape != (len(codes_NW), query_labels_QM.shape[1]) or len(query_labels_QM) != len(queries_QW):
        raise InvalidInput(
            f"one label mask per code and per query is required, all of one width, found {labels_NM.shape} for "
            f"{len(codes_NW)} codes and {query_labels_QM.shape} for {len(queries_QW)} queries"
        )
    rows, width = codes_NW.shape
    codes, words_Q = np.ascontiguousarray(codes_NW), in_words(queries_QW)
    labels, query_labels = (np.require(m, np.uint64, ["C", "A", "W"]) for m in (labels_NM, query_labels_QM))
    mask = None if dead is None else np.ascontiguousarray(dead, np.uint8)
    hidden = address(mask)
    form, tile = (0,) * words_Q.shape[1], max(1, _TILE_BYTES // (_BLOCK * (width + 8 * labels.shape[1])))

    def count(row_range: tuple[int, int]) -> NDArray[np.int64]:
        counts = np.zeros((len(queries_QW), 2, 8 * width + 1), np.int64)
        _histogram(codes.ctypes.data, *row_range, words_Q, form, hidden, labels, query_labels, tile, counts)
        return counts

    ranges = blocks(rows, max(_BLOCK, -(-rows // (threads or cores())))) if rows else [(0, 0)]
    counts: NDArray[np.int64] = sum(spread([partial(count, r) for r in ranges], threads))
    counts[:, 0] += counts[:, 1]
    return counts


def bitmap(rows: NDArray[np.int64], n: int) -> NDArray[np.uint8] | None:
    """Rows to leave out of a scan over n rows, one bit each; None if there are none."""
    if not len(rows):
        return None
    flags = np.zeros(n, np.bool_)
    flags[rows] = True
    return np.packbits(flags, bitorder="little")


def alive(dead: NDArray[np.uint8] | None, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these rows the bitmap does not leave out."""
    if dead is None:
        return np.ones(rows.shape, np.bool_)
    flags: NDArray[np.bool_] = (dead[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 0
    return flags


def live(dead: NDArray[np.uint8] | None, n: int) -> NDArray[np.int64]:
    """The rows of n that the bitmap does not leave out, ascending."""
    return np.arange(n) if dead is None else np.flatnonzero(np.unpackbits(dead, count=n, bitorder="little") == 0)


def addressable(part: Part) -> Part:
    """The same with arrays that can be read by address."""
    codes_NW, ids_N, dead = part
    ids = None if ids_N is None else np.ascontiguousarray(ids_N, np.int64)
    return Part(np.ascontiguousarray(codes_NW), ids, None if dead is None else np.ascontiguousarray(dead, np.uint8))


def _pieces(parts: Sequence[Part], row0: int, row1: int) -> NDArray[np.int64]:
    """The rows of each part that lie in a range of the rows of all parts, int64 [parts, 5].

    Address of the codes, first row, row after the last, address of the ids (0 = rows will do), address of the bitmap
    of dead rows (0 = all live).
    """
    pieces, first = [], 0
    for codes_NW, ids_N, dead in parts:
        start, stop = max(row0 - first, 0), min(row1 - first, len(codes_NW))
        first += len(codes_NW)
        if start < stop:
            pieces.append((address(codes_NW), start, stop, address(ids_N), address(dead)))
    return np.array(pieces, np.int64).reshape(-1, 5)


def _empty_nearest(queries: int, k: int) -> Nearest:
    shape = (queries, k)
    return Nearest(np.full(shape, -1, np.int32), np.full(shape, -1, np.int64), np.zeros(queries, np.int64))


def _check(codes_NW: NDArray[np.uint8], queries_QW: NDArray[np.uint8]) -> None:
    for name, array in (("codes", codes_NW), ("queries", queries_QW)):
        if array.dtype != np.uint8 or array.ndim != 2 or not array.shape[1]:
            raise InvalidInput(f"{name} must be uint8 [rows, bytes], found {array.dtype} {list(array.shape)}")
    if codes_NW.shape[1] != queries_QW.shape[1]:
        raise InvalidInput(f"queries must have {8 * codes_NW.shape[1]} bits, found {8 * queries_QW.shape[1]}")


def in_words(queries_QW: NDArray[np.uint8]) -> NDArray[Any]:
    """The same bits in the widest words that divide a code; their type tells the kernels how to read codes."""
    word = next(size for size in (8, 4, 2, 1) if queries_QW.shape[1] % size == 0)
    return np.array(queries_QW, order="C").view(f"<u{word}")


def form_of(words_QX: NDArray[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Facts that the kernels are compiled for, as tuples whose lengths are part of their types.

    The first has one item per word of a code. The second is not empty if blocks are to be turned, so that each word
    of their codes is contiguous and wide codes vectorise as narrow ones do: that pays as soon as a few queries share
    a block.
    """
    queries, words = words_QX.shape
    return (0,) * words, ((0,) if words > 1 and queries >= _COLUMNS_FROM else ())


def _cut(found: Nearest, q: slice) -> Nearest:
    return Nearest(found.distances_QK[q], found.rows_QK[q], found.counts_Q[q])


def _split(rows: int, queries: int, per_task: int, threads: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Row ranges and query batches: queries over threads where there are enough of them, else rows too."""
    batches = list(blocks(queries, max(1, min(per_task, -(-queries // threads)))))
    if queries >= 8 * threads or threads == 1:
        return ([(0, rows)] if rows else []), batches
    batches = list(blocks(queries, per_task))
    count = max(1, min(threads, rows // _ROWS_PER_TASK))
    return list(blocks(rows, -(-rows // count))) if rows else [], batches


# Kernels. Codes are read by address, because a mapped file is neither aligned nor writable and every combination
# would be compiled on its own; callers hold the arrays. An index into an array that the compiler cannot prove to be
# non-negative would turn vector loads into gathers (numba's wrap-around), which addresses avoid as well.


@kernel
@no_type_check
def distance_to(block, r, queries, q, form, turned):
    """Distance of query q to code r of a block that starts at an address."""
    step, skip = (1, _BLOCK) if len(turned) else (len(form), 1)
    total = differing(load(block, r * step, queries), queries[q, 0])
    for w in range(1, len(form)):
        total = plus(total, differing(load(block, r * step + w * skip, queries), queries[q, w]))
    return total


@kernel
@no_type_check
def _any_below(block, start, stop, queries, q, form, turned, cut):
    limit = narrow(cut, differing(queries[q, 0], queries[q, 0]))
    marks = narrow(0, limit)
    for r in range(start, stop):
        marks = mark_below(marks, distance_to(block, r, queries, q, form, turned), limit)
    return marked(marks)


@kernel
@no_type_check
def _block_rows(like, form, turned):
    """Codes of a block, few enough to be prefetched at once."""
    size = _AHEAD_BYTES if len(like) < _COLUMNS_FROM else _BLOCK_BYTES
    return _BLOCK if len(turned) else max(_GROUP, min(_BLOCK, size // (len(form) * like.itemsize)))


@kernel
@no_type_check
def _lead(codes, row, like, form, turned, step):
    """Rows by which the first block is shorter, so that blocks end where pages of memory do, as prefetching does."""
    size = len(form) * like.itemsize
    return 0 if len(turned) else (codes + row * size) % _PAGE // size % step


@kernel
@no_type_check
def _open_block(codes, start, stop, like, form, turned, buffer):
    """Address of the block and index of its first code there, turned into `buffer` where that is asked for.

    A block that is not turned is looked at by few queries, faster than the memory's own guesses bring the next one.
    """
    if len(turned) == 0:
        size = len(form) * like.itemsize
        for line in range(stop * size, (2 * stop - start) * size, _LINE):
            prefetch(codes + line)
        return codes, start
    for r in range(stop - start):
        for w in range(len(form)):
            buffer[w, r] = load(codes, (start + r) * len(form) + w, like)
    return buffer.ctypes.data, 0


@kernel
@no_type_check
def _drop_far(rows, distances, held, k, cut, nearer):
    """Keep the candidates nearer than `cut`, and of those at it the first that are needed for k; their number."""
    spare = k - nearer
    kept = 0
    for c in range(held):
        at_cut = distances[c] == cut
        if distances[c] < cut or (at_cut and spare > 0):
            spare -= at_cut
            rows[kept] = rows[c]
            distances[kept] = distances[c]
            kept += 1
    return kept


@kernel
@no_type_check
def _seed(distances, count, seen, k):
    """Cut of the next part and the number of results nearer than it, from what was found in the parts before.

    One of those at distance d may come after a row at d by its id. So it counts as if it were at d + 1: then only rows
    that cannot matter are left out.
    """
    levels = len(seen)
    seen[:] = 0
    for c in range(count):
        if distances[c] + 1 < levels:
            seen[distances[c] + 1] += 1
    cut, near = levels, np.int64(0)
    for d in range(levels):
        if near + seen[d] >= k:
            cut = d
            break
        near += seen[d]
    return cut, near


@kernel
@no_type_check
def _by_distance(distances, rows, have, levels, sorted_distances, sorted_ids, ids):
    """Counting sort: stable, so rows stay ascending within a distance. Rows become ids."""
    place = np.zeros(levels + 1, np.int64)
    for c in range(have):
        place[distances[c] + 1] += 1
    for d in range(levels):
        place[d + 1] += place[d]
    for c in range(have):
        d = distances[c]
        sorted_distances[place[d]] = d
        sorted_ids[place[d]] = load(ids, rows[c], AS_ID) if ids != 0 else rows[c]
        place[d] += 1


@kernel
@no_type_check
def _nearest(pieces, queries, form, turned, levels, out_distances, out_ids, out_counts):
    """The nearest rows of all pieces (`_pieces`), merged into what stands in `out`."""
    count, k = out_ids.shape
    rows = np.empty((count, 2 * k + _GROUP), np.int64)
    distances = np.empty((count, 2 * k + _GROUP), np.int16)
    held = np.zeros(count, np.int64)
    cut_of = np.zeros(count, np.int64)
    nearer = np.zeros(count, np.int64)  # results nearer than the cut
    seen = np.zeros((count, levels), np.int64)  # results per distance
    old_distances, new_distances = np.empty(k, np.int32), np.empty(k, np.int32)
    old_ids, new_ids = np.empty(k, np.int64), np.empty(k, np.int64)
    buffer = np.empty((len(form), _BLOCK), queries.dtype)
    step = _block_rows(queries, form, turned)
    for p in range(len(pieces)):
        codes, row0, row1, ids, dead = pieces[p]
        for q in range(count):
            held[q] = 0
            cut_of[q], nearer[q] = _seed(out_distances[q], out_counts[q], seen[q], k)
        for place in range(row0 - _lead(codes, row0, queries, form, turned, step), row1, step):
            start, stop = max(place, row0), min(place + step, row1)
            block, first = _open_block(codes, start, stop, queries, form, turned, buffer)
            last = first + stop - start
            for q in range(count):
                if cut_of[q] == 0 or not _any_below(block, first, last, queries, q, form, turned, cut_of[q]):
                    continue
                for group in range(first, last, _GROUP):
                    end = min(group + _GROUP, last)
                    if not _any_below(block, group, end, queries, q, form, turned, cut_of[q]):
                        continue
                    cut = cut_of[q]
                    near = nearer[q]
                    have = held[q]
                    if have + _GROUP > rows.shape[1]:
                        have = _drop_far(rows[q], distances[q], have, k, cut, near)
                    for r in range(group, end):
                        d = np.int64(distance_to(block, r, queries, q, form, turned))
                        row = start + r - first
                        if d >= cut or is_dead(dead, row):
                            continue
                        rows[q, have] = row
                        distances[q, have] = d
                        have += 1
                        seen[q, d] += 1
                        near += 1
                        while near >= k:
                            cut -= 1
                            near -= seen[q, cut]
                    cut_of[q] = cut
                    nearer[q] = near
                    held[q] = have
        for q in range(count):
            have = _drop_far(rows[q], distances[q], held[q], k, cut_of[q], nearer[q])
            _by_distance(distances[q], rows[q], have, levels, new_distances, new_ids, ids)
            old = out_counts[q]
            for c in range(old):  # a slice would be a third of the time that numba takes to compile this
                old_distances[c] = out_distances[q, c]
                old_ids[c] = out_ids[q, c]
            out_counts[q] = _merge_two(
                old_distances, old_ids, old, new_distances, new_ids, have, out_distances[q], out_ids[q]
            )


@kernel
@no_type_check
def _merge_two(a_distances, a_ids, a_count, b_distances, b_ids, b_count, distances, ids):
    """Merge two lists by (distance, id) into one of at most len(ids); returns its length."""
    total = min(a_count + b_count, len(ids))
    i = j = 0
    for c in range(total):
        left = i < a_count
        if left and j < b_count:
            left = a_distances[i] < b_distances[j] or (a_distances[i] == b_distances[j] and a_ids[i] < b_ids[j])
        if left:
            distances[c], ids[c] = a_distances[i], a_ids[i]
            i += 1
        else:
            distances[c], ids[c] = b_distances[j], b_ids[j]
            j += 1
    return total


@kernel
@no_type_check
def _merge(a_distances, a_rows, a_counts, b_distances, b_rows, b_counts, distances, rows, counts):
    for q in range(len(counts)):
        _merge_two(
            a_distances[q], a_rows[q], a_counts[q], b_distances[q], b_rows[q], b_counts[q],
            distances[q, : counts[q]], rows[q, : counts[q]],
        )  # fmt: skip


@kernel
@no_type_check
def _within(pieces, queries, form, turned, levels):
    found_queries = np.empty(1024, np.int64)
    found_ids = np.empty(1024, np.int64)
    found_distances = np.empty(1024, np.int32)
    held = 0
    buffer = np.empty((len(form), _BLOCK), queries.dtype)
    step = _block_rows(queries, form, turned)
    for p in range(len(pieces)):
        codes, row0, row1, ids, dead = pieces[p]
        for place in range(row0 - _lead(codes, row0, queries, form, turned, step), row1, step):
            start, stop = max(place, row0), min(place + step, row1)
            block, first = _open_block(codes, start, stop, queries, form, turned, buffer)
            last = first + stop - start
            for q in range(len(queries)):
                if not _any_below(block, first, last, queries, q, form, turned, levels):
                    continue
                for group in range(first, last, _GROUP):
                    end = min(group + _GROUP, last)
                    if not _any_below(block, group, end, queries, q, form, turned, levels):
                        continue
                    if held + _GROUP > len(found_ids):
                        found_queries = np.concatenate((found_queries, np.empty_like(found_queries)))
                        found_ids = np.concatenate((found_ids, np.empty_like(found_ids)))
                        found_distances = np.concatenate((found_distances, np.empty_like(found_distances)))
                    for r in range(group, end):
                        d = np.int64(distance_to(block, r, queries, q, form, turned))
                        row = start + r - first
                        if d >= levels or is_dead(dead, row):
                            continue
                        found_queries[held] = q
                        found_ids[held] = load(ids, row, AS_ID) if ids != 0 else row
                        found_distances[held] = d
                        held += 1
    return found_queries[:held].copy(), found_ids[:held].copy(), found_distances[:held].copy()


@kernel
@no_type_check
def _count(queries, distances, levels, starts):
    """Count (query, distance) into starts[1 + query * levels + distance]."""
    for c in range(len(queries)):
        starts[1 + queries[c] * levels + distances[c]] += 1


@kernel
@no_type_check
def _put(queries, rows, distances, levels, place, out_rows, out_distances):
    for c in range(len(queries)):
        group = queries[c] * levels + distances[c]
        out_rows[place[group]] = rows[c]
        out_distances[place[group]] = distances[c]
        place[group] += 1


@kernel
@no_type_check
def _sort(rows, starts):
    """Sort each group; most came in order."""
    for g in range(len(starts) - 1):
        group = rows[starts[g] : starts[g + 1]]
        for c in range(1, len(group)):
            if group[c] < group[c - 1]:
                group.sort()
                break


@kernel
@no_type_check
def _open_tile(codes, row, row1, like, form, dead, labels, turned, turned_labels):
    """Fill a tile, blocks [blocks, words, _BLOCK] of codes and of label masks, with live rows from `row` on.

    Returns how many they are and the row after them.
    """
    held = 0
    while row < row1 and held < len(turned) * _BLOCK:
        if not is_dead(dead, row):
            block, place = held // _BLOCK, held % _BLOCK
            for w in range(len(form)):
                turned[block, w, place] = load(codes, row * len(form) + w, like)
            for m in range(labels.shape[1]):
                turned_labels[block, m, place] = labels[row, m]
            held += 1
        row += 1
    return held, row


@kernel
@no_type_check
def _shares(labels_MB, asked_M, places):
    """Add 1 to the place of every code that shares a label."""
    if len(asked_M) == 1:
        for r in range(_BLOCK):
            places[r] += np.uint64((labels_MB[0, r] & asked_M[0]) != 0)
    elif len(asked_M) == 2:
        for r in range(_BLOCK):
            places[r] += np.uint64(((labels_MB[0, r] & asked_M[0]) | (labels_MB[1, r] & asked_M[1])) != 0)
    else:
        shared = np.zeros(_BLOCK, np.uint64)
        for m in range(len(asked_M)):
            if asked_M[m] != 0:
                for r in range(_BLOCK):
                    shared[r] |= labels_MB[m, r] & asked_M[m]
        for r in range(_BLOCK):
            places[r] += np.uint64(shared[r] != 0)


@kernel
@no_type_check
def _histogram(codes, row, row1, queries, form, dead, labels, query_labels, tile, counts):
    """Add the rows of a range to counts [Q, not relevant or relevant, distance].

    The counter of a code is table[distance, lane, relevant], with the lane going round. Its place is found for a
    block at once, by vector instructions; what is left is one increment per code.
    """
    turned = np.empty((tile, len(form), _BLOCK), queries.dtype)
    turned_labels = np.empty((tile, labels.shape[1], _BLOCK), np.uint64)
    places = np.empty(_BLOCK, np.uint64)
    table = np.empty(counts.shape[2] * _LANES * 2, np.int64)
    while row < row1:
        held, row = _open_tile(codes, row, row1, queries, form, dead, labels, turned, turned_labels)
        for q in range(len(queries)):
            table[:] = 0
            for start in range(0, held, _BLOCK):
                block = turned[start // _BLOCK].ctypes.data
                for r in range(_BLOCK):
                    distance = np.uint64(distance_to(block, r, queries, q, form, (0,)))
                    places[r] = (distance * np.uint64(_LANES) + np.uint64(r % _LANES)) * np.uint64(2)
                _shares(turned_labels[start // _BLOCK], query_labels[q], places)
                for r in range(min(_BLOCK, held - start)):
                    table[places[r]] += 1
            for d in range(counts.shape[2]):
                for lane in range(_LANES):
                    counts[q, 0, d] += table[(d * _LANES + lane) * 2]
                    counts[q, 1, d] += table[(d * _LANES + lane) * 2 + 1]
