"""The scan: exact Hamming search over packed codes at the speed of memory or of popcount, whichever ends first.

A kernel looks at a block of codes that fits the first-level cache, asks with vector instructions whether any of them
is nearer than the query's current cut, and only where one is looks at single codes. The cut falls as candidates
come in: once k rows at distance <= t are known, only rows nearer than t can matter, because rows are met in
ascending order and (distance, row) is the order of results. So at most k rows of any one distance are ever kept, and
codes that are all equal, or of three kinds, cost no more than random ones.

The kernels are compiled by numba without its own threads (its parallel mode aborts under concurrent callers) and
release the GIL; work is spread over one pool of this module: rows over threads for few queries, queries over threads
for many (histograms: always rows). Any number of Python threads may search at once.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, no_type_check

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from hashdist.errors import InvalidInput
from hashdist.kernel import kernel
from hashdist.order import blocks

_BLOCK = 512  # codes looked at together: 4 KiB of 64-bit codes
_GROUP = 64  # codes looked at together once their block has a hit
_COLUMNS_FROM = 4  # queries from which turning a block of wide codes word by word pays
_ROWS_PER_TASK = 1 << 16  # a task is not worth a thread's while below this many codes
_QUERIES_PER_TASK = 64
_BUFFER_BYTES = 64 << 20  # candidates kept per task
_TILE_BYTES = 1 << 18  # codes and labels that all queries pass together: they stay in the second-level cache
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


def nearest(
    codes_NW: NDArray[np.uint8],
    queries_QW: NDArray[np.uint8],
    k: int,
    *,
    dead: NDArray[np.uint8] | None = None,
    bound_Q: NDArray[np.int32] | None = None,
    threads: int = 0,
) -> Nearest:
    """The k nearest rows of every query by (Hamming distance, row), exactly.

    Args:
        codes_NW: packed codes; may be unaligned or memory-mapped.
        queries_QW: packed codes of the same width.
        k: rows per query at most, >= 1.
        dead: bitmap of rows to leave out, see `bitmap`.
        bound_Q: largest distance that still matters to each query; a caller who has k results of other shards
            passes their last distance.
        threads: 0 = all cores.

    Returns:
        Fewer than k rows only where there are no more live ones within the bound.

    Raises:
        InvalidInput: arrays of other types or widths, k < 1.
    """
    _check(codes_NW, queries_QW)
    if k < 1:
        raise InvalidInput(f"k must be at least 1, found {k}")
    rows, width = codes_NW.shape
    k = min(k, rows)
    levels = 8 * width + 1
    cuts_Q = np.full(len(queries_QW), levels, np.int64)
    if bound_Q is not None:
        cuts_Q = np.clip(bound_Q.astype(np.int64) + 1, 0, levels)
    out = _empty_nearest(len(queries_QW), k)
    if not out.rows_QK.size:
        return out
    capacity = 2 * k + _GROUP
    per_task = max(1, min(_QUERIES_PER_TASK, _BUFFER_BYTES // (capacity * 10)))
    ranges, batches = _split(rows, len(queries_QW), per_task, threads or _cores())
    codes, words_Q = np.ascontiguousarray(codes_NW), _words(queries_QW)
    mask = _NO_ROWS if dead is None else dead

    def search(row_range: tuple[int, int], batch: tuple[int, int], into: Nearest) -> None:
        q = slice(*batch)
        _nearest(codes.ctypes.data, *row_range, words_Q[q], *_form(words_Q[q]), mask, levels, cuts_Q[q], *_cut(into, q))

    if len(ranges) == 1:
        _spread([partial(search, ranges[0], batch, out) for batch in batches], threads)
        return out
    found = [_empty_nearest(len(queries_QW), k) for _ in ranges]
    _spread([partial(search, r, b, f) for r, f in zip(ranges, found, strict=True) for b in batches], threads)
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
    _check(codes_NW, queries_QW)
    if radius < 0:
        raise InvalidInput(f"the radius must be at least 0, found {radius}")
    rows, width = codes_NW.shape
    levels = min(radius, 8 * width) + 1
    ranges, batches = _split(rows, len(queries_QW), _QUERIES_PER_TASK, threads or _cores())
    codes, words_Q = np.ascontiguousarray(codes_NW), _words(queries_QW)
    mask = _NO_ROWS if dead is None else dead

    def search(row_range: tuple[int, int], batch: tuple[int, int]) -> tuple[NDArray[Any], ...]:
        words = words_Q[slice(*batch)]
        query, row, distance = _within(codes.ctypes.data, *row_range, words, *_form(words), mask, levels)
        return query + batch[0], row, distance

    found = _spread([partial(search, r, b) for r in ranges for b in batches], threads)
    if not found:
        return Ball(np.zeros(len(queries_QW) + 1, np.int64), np.empty(0, np.int64), np.empty(0, np.int32))
    query, row, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    # rows come in ascending order within (query, range) and ranges in order, so a stable sort is enough
    order = np.argsort(query * levels + distance, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=len(queries_QW)))]).astype(np.int64)
    return Ball(offsets, row[order], distance[order])


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

    Histograms of shards add up; all exact metrics come from their sum (hashdist/ranking.py).

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
    codes, words_Q = np.ascontiguousarray(codes_NW), _words(queries_QW)
    labels, query_labels = (np.require(m, np.uint64, ["C", "A", "W"]) for m in (labels_NM, query_labels_QM))
    mask = _NO_ROWS if dead is None else dead
    form, tile = (0,) * words_Q.shape[1], max(1, _TILE_BYTES // (_BLOCK * (width + 8 * labels.shape[1])))

    def count(row_range: tuple[int, int]) -> NDArray[np.int64]:
        counts = np.zeros((len(queries_QW), 2, 8 * width + 1), np.int64)
        _histogram(codes.ctypes.data, *row_range, words_Q, form, mask, labels, query_labels, tile, counts)
        return counts

    ranges = blocks(rows, max(_BLOCK, -(-rows // (threads or _cores())))) if rows else [(0, 0)]
    counts: NDArray[np.int64] = sum(_spread([partial(count, r) for r in ranges], threads))
    counts[:, 0] += counts[:, 1]
    return counts


def bitmap(rows: NDArray[np.int64], n: int) -> NDArray[np.uint8] | None:
    """Rows to leave out of a scan over n rows, one bit each; None if there are none."""
    if not len(rows):
        return None
    flags = np.zeros(n, np.bool_)
    flags[rows] = True
    return np.packbits(flags, bitorder="little")


_NO_ROWS = np.empty(0, np.uint8)


def _empty_nearest(queries: int, k: int) -> Nearest:
    shape = (queries, k)
    return Nearest(np.full(shape, -1, np.int32), np.full(shape, -1, np.int64), np.zeros(queries, np.int64))


def _check(codes_NW: NDArray[np.uint8], queries_QW: NDArray[np.uint8]) -> None:
    for name, array in (("codes", codes_NW), ("queries", queries_QW)):
        if array.dtype != np.uint8 or array.ndim != 2 or not array.shape[1]:
            raise InvalidInput(f"{name} must be uint8 [rows, bytes], found {array.dtype} {list(array.shape)}")
    if codes_NW.shape[1] != queries_QW.shape[1]:
        raise InvalidInput(f"queries must have {8 * codes_NW.shape[1]} bits, found {8 * queries_QW.shape[1]}")


def _words(queries_QW: NDArray[np.uint8]) -> NDArray[Any]:
    """The same bits in the widest words that divide a code; their type tells the kernels how to read codes."""
    word = next(size for size in (8, 4, 2, 1) if queries_QW.shape[1] % size == 0)
    return np.array(queries_QW, order="C").view(f"<u{word}")


def _form(words_QX: NDArray[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the kernels must know when they are compiled, as tuples whose lengths are part of their types.

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


# Threads


_pool_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_cores(), thread_name_prefix="hashdist-scan")
        return _pool


def _forget_pool() -> None:
    """A forked child has none of the parent's threads."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _spread(tasks: Iterable[Callable[[], Any]], threads: int) -> list[Any]:
    """Results of the tasks, in order; in this thread where one is enough."""
    todo = list(tasks)
    if len(todo) == 1 or threads == 1:
        return [task() for task in todo]
    return list(_threads().map(lambda task: task(), todo))


# Kernels. Codes are read by address, because a mapped file is neither aligned nor writable and every combination
# would be compiled on its own; callers hold the arrays. An index into an array that the compiler cannot prove to be
# non-negative would turn vector loads into gathers (numba's wrap-around), which addresses avoid as well.


@intrinsic
def _load(_typing: Any, address: Any, index: Any, like: Any) -> Any:
    """The word at `index` (in words of `like`'s type) from `address`, which need not be aligned."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = context.get_value_type(like.dtype)
        base = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.load(builder.gep(base, [arguments[1]]), align=1)

    return like.dtype(address, index, like), generate


@intrinsic
def _popcount(_typing: Any, word: Any) -> Any:
    """Bits set in an unsigned word: LLVM's ctpop, a vector instruction where there is one. Of bytes: as uint16."""
    result = types.uint16 if word == types.uint8 else word

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        count = builder.ctpop(arguments[0])
        return count if result == word else builder.zext(count, context.get_value_type(result))

    return result(word), generate


@intrinsic
def _narrow(_typing: Any, value: Any, like: Any) -> Any:
    """A small non-negative int64 in the type of `like`."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.trunc(arguments[0], context.get_value_type(like)) if like.bitwidth < 64 else arguments[0]

    return like(value, like), generate


@kernel
@no_type_check
def _distance(block, r, queries, q, form, turned):
    step, skip = (1, _BLOCK) if len(turned) else (len(form), 1)
    total = _popcount(_load(block, r * step, queries) ^ queries[q, 0])
    for w in range(1, len(form)):
        total += _popcount(_load(block, r * step + w * skip, queries) ^ queries[q, w])
    return total


@kernel
@no_type_check
def _any_below(block, start, stop, queries, q, form, turned, cut):
    limit = _narrow(cut, _popcount(queries[q, 0]))
    found = False
    for r in range(start, stop):
        found |= _distance(block, r, queries, q, form, turned) < limit
    return found


@kernel
@no_type_check
def _open_block(codes, start, stop, like, form, turned, buffer):
    """Address of the block and index of its first code there, turned into `buffer` where that is asked for."""
    if len(turned) == 0:
        return codes, start
    for r in range(stop - start):
        for w in range(len(form)):
            buffer[w, r] = _load(codes, (start + r) * len(form) + w, like)
    return buffer.ctypes.data, 0


@kernel
@no_type_check
def _is_dead(dead, row):
    return dead.size > 0 and (dead[row >> 3] >> (row & 7)) & 1 != 0


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
def _nearest(codes, row0, row1, queries, form, turned, dead, levels, cuts, out_distances, out_rows, out_counts):
    count, k = out_rows.shape
    rows = np.empty((count, 2 * k + _GROUP), np.int64)
    distances = np.empty((count, 2 * k + _GROUP), np.int16)
    held = np.zeros(count, np.int64)
    nearer = np.zeros(count, np.int64)  # candidates nearer than the cut
    seen = np.zeros((count, levels), np.int64)  # candidates per distance
    cut_of = cuts.copy()
    buffer = np.empty((len(form), _BLOCK), queries.dtype)
    for start in range(row0, row1, _BLOCK):
        stop = min(start + _BLOCK, row1)
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
                    d = np.int64(_distance(block, r, queries, q, form, turned))
                    row = start + r - first
                    if d >= cut or _is_dead(dead, row):
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
        out_counts[q] = have
        place = np.zeros(levels + 1, np.int64)
        for c in range(have):
            place[distances[q, c] + 1] += 1
        for d in range(levels):
            place[d + 1] += place[d]
        for c in range(have):  # counting sort: stable, so rows stay ascending within a distance
            d = distances[q, c]
            out_distances[q, place[d]] = d
            out_rows[q, place[d]] = rows[q, c]
            place[d] += 1


@kernel
@no_type_check
def _merge(a_distances, a_rows, a_counts, b_distances, b_rows, b_counts, distances, rows, counts):
    for q in range(len(counts)):
        i = j = 0
        for c in range(counts[q]):
            left = i < a_counts[q]
            if left and j < b_counts[q]:
                da, db = a_distances[q, i], b_distances[q, j]
                left = da < db or (da == db and a_rows[q, i] < b_rows[q, j])
            if left:
                distances[q, c], rows[q, c] = a_distances[q, i], a_rows[q, i]
                i += 1
            else:
                distances[q, c], rows[q, c] = b_distances[q, j], b_rows[q, j]
                j += 1


@kernel
@no_type_check
def _within(codes, row0, row1, queries, form, turned, dead, levels):
    found_queries = np.empty(1024, np.int64)
    found_rows = np.empty(1024, np.int64)
    found_distances = np.empty(1024, np.int32)
    held = 0
    buffer = np.empty((len(form), _BLOCK), queries.dtype)
    for start in range(row0, row1, _BLOCK):
        stop = min(start + _BLOCK, row1)
        block, first = _open_block(codes, start, stop, queries, form, turned, buffer)
        last = first + stop - start
        for q in range(len(queries)):
            if not _any_below(block, first, last, queries, q, form, turned, levels):
                continue
            for group in range(first, last, _GROUP):
                end = min(group + _GROUP, last)
                if not _any_below(block, group, end, queries, q, form, turned, levels):
                    continue
                if held + _GROUP > len(found_rows):
                    found_queries = np.concatenate((found_queries, np.empty_like(found_queries)))
                    found_rows = np.concatenate((found_rows, np.empty_like(found_rows)))
                    found_distances = np.concatenate((found_distances, np.empty_like(found_distances)))
                for r in range(group, end):
                    d = np.int64(_distance(block, r, queries, q, form, turned))
                    row = start + r - first
                    if d >= levels or _is_dead(dead, row):
                        continue
                    found_queries[held] = q
                    found_rows[held] = row
                    found_distances[held] = d
                    held += 1
    return found_queries[:held].copy(), found_rows[:held].copy(), found_distances[:held].copy()


@kernel
@no_type_check
def _open_tile(codes, row, row1, like, form, dead, labels, turned, turned_labels):
    """Fill a tile, blocks [blocks, words, _BLOCK] of codes and of label masks, with live rows from `row` on.

    Returns how many they are and the row after them.
    """
    held = 0
    while row < row1 and held < len(turned) * _BLOCK:
        if not _is_dead(dead, row):
            block, place = held // _BLOCK, held % _BLOCK
            for w in range(len(form)):
                turned[block, w, place] = _load(codes, row * len(form) + w, like)
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
                    distance = np.uint64(_distance(block, r, queries, q, form, (0,)))
                    places[r] = (distance * np.uint64(_LANES) + np.uint64(r % _LANES)) * np.uint64(2)
                _shares(turned_labels[start // _BLOCK], query_labels[q], places)
                for r in range(min(_BLOCK, held - start)):
                    table[places[r]] += 1
            for d in range(counts.shape[2]):
                for lane in range(_LANES):
                    counts[q, 0, d] += table[(d * _LANES + lane) * 2]
                    counts[q, 1, d] += table[(d * _LANES + lane) * 2 + 1]
