"""Tables for radius search: multi-index hashing (Norouzi, Punjani and Fleet 2012, arXiv 1307.2982).

A code is cut into m pieces of at most log2 of the number of rows in bits, so that a bucket of rows with one piece in
common holds a few of them where codes are spread evenly. Of two codes that differ in at most r bits, some piece
differs in at most r // m; more sharply (the paper's proposition 2), if r = m a + b, then one of any b + 1 pieces
differs in at most a bits or one of the others in at most a - 1. Which pieces are those b + 1 is chosen per query, by
the sizes of their buckets. So for r < m no piece needs a flip, and only r + 1 of the pieces are looked up.

Rows found in the buckets are compared in full, and dead rows are left out: the answer is the scan's. Their number is
known from the offsets of the buckets before one of them is looked at. A query for which it would cost
more than the scan is left to the scan, so codes in a few heaps are no slower than without tables.

hashdist/index/search/tables.py decides which shards get tables, and keeps them.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import combinations
from math import comb
from typing import NamedTuple, no_type_check

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.ranges import blocks
from hashdist.ground.threads import spread
from hashdist.nearest import scan
from hashdist.nearest.kernel import AS_BYTE, AS_ID, AS_U32, address, is_dead, kernel, load

_MOST_PIECES = 8
_ROW_COST = 120  # comparing a row of a bucket, in rows scanned: it is far from the one before
_PROBE_COST = 40  # looking a bucket's size up, likewise
_PROBING = 0.1  # share of the scan's cost that finding out what a lookup costs may take
_GAIN = 0.8  # a lookup must cost less than this share of the scan
_QUERIES_PER_TASK = 32


class Tables(NamedTuple):
    """Buckets of rows by each piece of their code.

    Attributes:
        pieces: their number.
        bits: of a piece; bits of the code beyond pieces * bits are in none.
        data: uint32 [pieces, 2 ** bits + 1 + rows]: where each bucket starts, then the rows by bucket, ascending.
    """

    pieces: int
    bits: int
    data: NDArray[np.uint32]


def build(codes_NW: NDArray[np.uint8]) -> Tables:
    """Tables of these codes, uint8 [N, W], N < 2 ** 32."""
    pieces, bits = shape_of(*codes_NW.shape)
    codes = np.ascontiguousarray(codes_NW)
    data = np.empty((pieces, 2**bits + 1 + len(codes)), np.uint32)
    spread([partial(_build, codes.ctypes.data, *codes.shape, p * bits, bits, data[p]) for p in range(pieces)], 0)
    return Tables(pieces, bits, data)


def shape_of(rows: int, width: int) -> tuple[int, int]:
    """Number of pieces and bits of a piece for `rows` codes of `width` bytes."""
    longest = max(1, rows.bit_length() - 1)
    pieces = min(-(-8 * width // longest), _MOST_PIECES)
    return pieces, min(8 * width // pieces, longest)


def within_of(
    parts: Sequence[scan.Part],
    tables: Sequence[Tables | None],
    queries_QW: NDArray[np.uint8],
    radius: int,
    *,
    threads: int = 0,
) -> scan.Ball:
    """As `scan.within_of`, by the tables of the parts that have some, where they are faster than the scan."""
    have = [(part, own) for part, own in zip(parts, tables, strict=True) if own is not None]
    without = [part for part, own in zip(parts, tables, strict=True) if own is None]
    levels = min(radius, 8 * queries_QW.shape[1]) + 1
    rows, probes = sum(len(part.codes_NW) for part, _ in have), sum(_probes(own, levels - 1) for _, own in have)
    if not have or radius < 0 or probes * _PROBE_COST > _PROBING * rows:
        return scan.within_of(parts, queries_QW, radius, threads=threads)
    found, left_Q = _look_up(have, queries_QW, levels, int((_GAIN * rows - probes * _PROBE_COST) / _ROW_COST), threads)
    for some, which in ((without, np.flatnonzero(~left_Q)), (list(parts), np.flatnonzero(left_Q))):
        if some and len(which):
            ball = scan.within_of(some, queries_QW[which], radius, threads=threads)
            found.append(scan.Pairs(np.repeat(which, np.diff(ball.offsets)), ball.rows, ball.distances))
    return scan.ball(found, len(queries_QW), levels, threads=threads)


def _look_up(
    have: Sequence[tuple[scan.Part, Tables]],
    queries_QW: NDArray[np.uint8],
    levels: int,
    most_rows: int,
    threads: int,
) -> tuple[list[scan.Pairs], NDArray[np.bool_]]:
    """Pairs that the queries find by tables, and which queries would have to be compared with more than `most_rows`."""
    held = [(scan.addressable(part), own) for part, own in have]
    places_SX = np.array([_places(part, own) for part, own in held], np.int64)
    masks, upto = _masks(max(own.bits for _, own in have), max((levels - 1) // own.pieces for _, own in have))
    queries, words_Q = np.ascontiguousarray(queries_QW), scan.in_words(queries_QW)
    left_Q = np.zeros(len(queries), np.bool_)

    def search(first: int, stop: int) -> scan.Pairs:
        asked, words = queries[first:stop], words_Q[first:stop]
        numbers, ids, distances = _find(
            places_SX, asked, asked.ctypes.data, words, (0,) * words.shape[1], masks, upto, levels, most_rows,
            left_Q[first:stop],
        )  # fmt: skip
        return scan.Pairs(numbers + first, ids, distances)

    tasks = [partial(search, *batch) for batch in blocks(len(queries), _QUERIES_PER_TASK)]
    return spread(tasks, threads), left_Q


def _places(part: scan.Part, tables: Tables) -> tuple[int, ...]:
    """Addresses of codes, ids, dead rows (0 = none) and tables, then the shape of the tables."""
    shape = (tables.pieces, tables.bits, tables.data.shape[1])
    return (address(part.codes_NW), address(part.ids_N), address(part.dead), address(tables.data), *shape)


def _probes(tables: Tables, radius: int) -> int:
    """Buckets in which a query looks."""
    most, wide = divmod(radius, tables.pieces)
    return (wide + 1) * _balls(tables.bits, most) + (tables.pieces - wide - 1) * _balls(tables.bits, most - 1)


def _balls(bits: int, flips: int) -> int:
    """Number of pieces within `flips` flips of one."""
    return sum(comb(bits, f) for f in range(flips + 1))


@lru_cache(maxsize=64)
def _masks(bits: int, flips: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Pieces with at most `flips` bits set, the fewest first, and how many have at most 0, 1, ... of them."""
    masks = [sum(1 << bit for bit in chosen) for f in range(flips + 1) for chosen in combinations(range(bits), f)]
    return np.array(masks, np.uint32), np.array([_balls(bits, f) for f in range(flips + 1)], np.int64)


# Kernels


@kernel
@no_type_check
def _piece(code, width, first, bits):
    """`bits` bits of the code at an address from bit `first` on; reads no byte beyond the code."""
    start = first >> 3
    value = np.uint64(0)
    for byte in range(min(5, width - start)):
        value |= np.uint64(load(code, start + byte, AS_BYTE)) << np.uint64(8 * byte)
    return (value >> np.uint64(first & 7)) & np.uint64((1 << bits) - 1)


@kernel
@no_type_check
def _build(codes, rows, width, first, bits, table):
    """Counting sort of the rows by a piece, into [starts of 2 ** bits buckets, end, rows]."""
    buckets = 1 << bits
    own = np.empty(rows, np.uint32)
    table[: buckets + 1] = 0
    for r in range(rows):
        own[r] = _piece(codes + r * width, width, first, bits)
        table[np.int64(own[r]) + 1] += 1
    for b in range(buckets):
        table[b + 1] += table[b]
    place = table[:buckets].copy()
    for r in range(rows):
        b = np.int64(own[r])
        table[buckets + 1 + np.int64(place[b])] = r
        place[b] += 1


@kernel
@no_type_check
def _find(places_SX, queries_QW, address, words_Q, form, masks, upto, levels, most_rows, left_Q):
    """Plan each query in all shards, and look it up in all of them unless that is too much: then it is left."""
    width = queries_QW.shape[1]
    own_SP = np.empty((len(places_SX), _MOST_PIECES), np.int64)
    flips_SP = np.empty((len(places_SX), _MOST_PIECES), np.int64)
    found_queries = np.empty(256, np.int64)
    found_ids = np.empty(256, np.int64)
    found_distances = np.empty(256, np.int32)
    held = 0
    for q in range(len(queries_QW)):
        rows = 0
        for s in range(len(places_SX)):
            rows += _plan(places_SX[s], address + q * width, width, masks, upto, levels - 1, own_SP[s], flips_SP[s])
        if rows > most_rows:
            left_Q[q] = True
            continue
        while held + rows > len(found_ids):
            found_queries = np.concatenate((found_queries, np.empty_like(found_queries)))
            found_ids = np.concatenate((found_ids, np.empty_like(found_ids)))
            found_distances = np.concatenate((found_distances, np.empty_like(found_distances)))
        before = held
        for s in range(len(places_SX)):
            held = _collect(
                places_SX[s], width, own_SP[s], flips_SP[s], masks, upto, words_Q, form, q, levels,
                held, found_ids, found_distances,
            )  # fmt: skip
        found_queries[before:held] = q
    return found_queries[:held].copy(), found_ids[:held].copy(), found_distances[:held].copy()


@kernel
@no_type_check
def _plan(places_X, code, width, masks, upto, radius, own_P, flips_P):
    """Choose the pieces that may differ most: those whose further buckets hold the fewest rows. Rows to compare."""
    data, pieces, bits, stride = places_X[3], places_X[4], places_X[5], places_X[6]
    most, wide = radius // pieces, radius % pieces
    more = np.zeros(pieces, np.int64)
    rows = 0
    for p in range(pieces):
        own_P[p] = _piece(code, width, p * bits, bits)
        flips_P[p] = most - 1
        for m in range(upto[most]):
            bucket = own_P[p] ^ np.int64(masks[m])
            if bucket >> bits != 0:
                continue  # a mask of longer pieces than this shard's
            at = p * stride + bucket
            size = np.int64(load(data, at + 1, AS_U32)) - np.int64(load(data, at, AS_U32))
            if most > 0 and m < upto[most - 1]:
                rows += size
            else:
                more[p] += size
    for _ in range(wide + 1):
        least = -1
        for p in range(pieces):
            if flips_P[p] < most and (least < 0 or more[p] < more[least]):
                least = p
        flips_P[least] = most
        rows += more[least]
    return rows


@kernel
@no_type_check
def _collect(
    places_X, width, own_P, flips_P, masks, upto, words_Q, form, q, levels, held, found_ids, found_distances
):  # fmt: skip
    """Compare the rows of all buckets that are looked up; a row is taken at the first piece by which it is found."""
    codes, ids, dead, data, pieces, bits, stride = places_X
    for p in range(pieces):
        if flips_P[p] < 0:
            continue
        table = data + 4 * p * stride
        for m in range(upto[flips_P[p]]):
            bucket = own_P[p] ^ np.int64(masks[m])
            if bucket >> bits != 0:
                continue
            for at in range(load(table, bucket, AS_U32), load(table, bucket + 1, AS_U32)):
                row = np.int64(load(table, (1 << bits) + 1 + np.int64(at), AS_U32))
                d = np.int64(scan.distance_to(codes, row, words_Q, q, form, ()))
                if d >= levels or is_dead(dead, row):
                    continue
                if _found_before(codes + row * width, width, bits, own_P, flips_P, p):
                    continue
                found_ids[held] = load(ids, row, AS_ID) if ids != 0 else row
                found_distances[held] = d
                held += 1
    return held


@kernel
@no_type_check
def _found_before(code, width, bits, own_P, flips_P, piece):
    for p in range(piece):
        different = _piece(code, width, p * bits, bits) ^ np.uint64(own_P[p])
        count = 0
        while different != 0:
            different &= different - np.uint64(1)
            count += 1
        if count <= flips_P[p]:
            return True
    return False
