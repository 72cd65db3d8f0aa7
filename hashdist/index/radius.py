"""Tables for radius search: multi-index hashing (Norouzi, Punjani and Fleet 2012, arXiv 1307.2982), per shard.

A code is cut into m pieces of at most log2 of the shard's rows in bits, so that a bucket of rows with one piece in
common holds a few of them where codes are spread evenly. Of two codes that differ in at most r bits, some piece
differs in at most r // m; more sharply (the paper's proposition 2), if r = m a + b, then one of any b + 1 pieces
differs in at most a bits or one of the others in at most a - 1. Which pieces are those b + 1 is chosen per query, by
the sizes of their buckets. So for r < m no piece needs a flip, and only r + 1 of the pieces are looked up.

What is found in the buckets is compared in full, and dead rows are left out: the answer is the scan's. How many rows
that will be is known from the offsets of the buckets before one of them is looked at. A query for which it would cost
more than the scan is left to the scan, so codes in a few heaps are no slower than without tables.

Building takes as long as a few hundred scans, so `auto` builds when a shard has been asked as many radius queries.
Tables lie in the local cache, named by the checksum of the shard's codes, and are mapped; where the cache cannot be
written, in memory.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Literal, NamedTuple, no_type_check
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from hashdist import scan
from hashdist.cache import cache_folder
from hashdist.kernel import AS_BYTE, AS_ID, AS_U32, cores, is_dead, kernel, load, spread
from hashdist.order import blocks
from hashdist.progress import say
from hashdist.shards import Shard, map_npy

Use = Literal["auto", "on", "off"]

_MOST_PIECES = 8
_FEWEST_ROWS = 1 << 14  # a smaller shard is scanned in microseconds
_BUILD_AFTER = 256  # radius queries that a shard is asked before `auto` builds
_ROW_COST = 120  # comparing a row of a bucket, in rows scanned: it is far from the one before
_PROBE_COST = 40  # looking a bucket's size up, likewise
_PROBING = 0.1  # share of the scan's cost that finding out what a lookup costs may take
_GAIN = 0.8  # a lookup must cost less than this share of the scan
_SPREAD_FROM = 1 << 16  # rows to compare from which threads pay
_QUERIES_PER_TASK = 16
_DIGEST = 16  # hexadecimal digits of a file's own checksum, in its name


class Tables(NamedTuple):
    """Buckets of a shard's rows by each piece of their code.

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
    """Number of pieces and bits of a piece for so many rows of so many bytes."""
    longest = max(1, rows.bit_length() - 1)
    pieces = min(-(-8 * width // longest), _MOST_PIECES)
    return pieces, min(8 * width // pieces, longest)


def tables_of(shard: Shard, queries: int, use: Use) -> Tables | None:
    """The tables of a shard that is asked so many radius queries now, if it has them or is worth having them."""
    if use == "off" or shard.rows < _FEWEST_ROWS:
        return None
    held = _held_of(shard)
    with held.lock:
        held.asked += queries
        if held.tables is None and (use == "on" or held.asked >= _BUILD_AFTER):
            held.tables = _cached(shard)
        return held.tables


def within_of(
    parts: Sequence[scan.Part],
    tables: Sequence[Tables | None],
    queries_QW: NDArray[np.uint8],
    radius: int,
    *,
    threads: int = 0,
) -> scan.Ball:
    """As `scan.within_of`, by the tables of the parts that have some, where they are faster than the scan."""
    have = [p for p, table in enumerate(tables) if table is not None]
    if not have or radius < 0:
        return scan.within_of(parts, queries_QW, radius, threads=threads)
    levels = min(radius, 8 * queries_QW.shape[1]) + 1
    lookups = [_Lookup.of(parts[p], tables[p], queries_QW, levels - 1) for p in have]  # type: ignore[arg-type]
    scanned_Q = np.full(len(queries_QW), sum(len(parts[p].codes_NW) for p in have), np.float64)
    cost_Q = sum((lookup.cost_Q for lookup in lookups), np.zeros(len(queries_QW)))
    by_table = cost_Q < _GAIN * scanned_Q
    asked, rest = np.flatnonzero(by_table), np.flatnonzero(~by_table)
    found = _look_up(lookups, queries_QW, asked, levels, threads)
    without = [part for p, part in enumerate(parts) if tables[p] is None]
    for some, which in ((without, asked), (list(parts), rest)):
        if some and len(which):
            ball = scan.within_of(some, queries_QW[which], radius, threads=threads)
            found.append(scan.Found(np.repeat(which, np.diff(ball.offsets)), ball.rows, ball.distances))
    return scan.ball(found, len(queries_QW), levels, threads=threads)


class _Lookup(NamedTuple):
    """What queries will look up in one part.

    Attributes:
        part: the codes, by address.
        tables: theirs.
        own_QP: the queries' pieces, uint32.
        flips_QP: how many bits of each piece may differ; -1 = the piece is not looked up.
        masks: bits to flip, the fewest first.
        upto: number of masks of at most so many bits.
        rows_Q: rows to compare.
        cost_Q: cost in rows scanned.
    """

    part: scan.Part
    tables: Tables
    own_QP: NDArray[np.uint32]
    flips_QP: NDArray[np.int64]
    masks: NDArray[np.uint32]
    upto: NDArray[np.int64]
    rows_Q: NDArray[np.int64]
    cost_Q: NDArray[np.float64]

    @staticmethod
    def of(part: scan.Part, tables: Tables, queries_QW: NDArray[np.uint8], radius: int) -> "_Lookup":
        """Planned: the sizes of the buckets are looked up, no row is."""
        pieces, bits, data = tables
        part, queries = scan.addressable(part), np.ascontiguousarray(queries_QW)
        own_QP = np.empty((len(queries), pieces), np.uint32)
        _cut(queries.ctypes.data, queries.shape[1], bits, own_QP)
        flips_QP, rows_Q = np.full(own_QP.shape, -1), np.zeros(len(queries), np.int64)
        most, wide = divmod(radius, pieces)
        probes = (wide + 1) * _balls(bits, most) + (pieces - wide - 1) * _balls(bits, most - 1)
        if most > bits or probes * _PROBE_COST > _PROBING * len(part.codes_NW):
            unknown = np.full(len(queries), np.inf)
            return _Lookup(part, tables, own_QP, flips_QP, _NO_MASKS, np.zeros(1, np.int64), rows_Q, unknown)
        masks, upto = _masks(bits, most)
        _plan(data.ctypes.data, data.shape[1], own_QP, masks, upto, wide, flips_QP, rows_Q)
        cost_Q = (probes * _PROBE_COST + rows_Q * _ROW_COST).astype(np.float64)
        return _Lookup(part, tables, own_QP, flips_QP, masks, upto, rows_Q, cost_Q)


def _look_up(
    lookups: Sequence[_Lookup], queries_QW: NDArray[np.uint8], asked: NDArray[np.int64], levels: int, threads: int
) -> list[scan.Found]:
    """What these queries find by tables."""
    words_Q = scan.in_words(queries_QW)
    form = (0,) * words_Q.shape[1]

    def search(lookup: _Lookup, which: NDArray[np.int64]) -> scan.Found:
        part, data = lookup.part, lookup.tables.data
        ids, dead = (0 if a is None else a.ctypes.data for a in (part.ids_N, part.dead))
        codes = (part.codes_NW.ctypes.data, part.codes_NW.shape[1], ids, dead)
        plan = (lookup.own_QP, lookup.flips_QP, lookup.masks, lookup.upto)
        room = int(lookup.rows_Q[which].sum())
        queries, rows, distances = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int32)
        held = _collect(
            *codes, data.ctypes.data, data.shape[1], lookup.tables.bits, *plan, words_Q, form, which, levels,
            queries, rows, distances,
        )  # fmt: skip
        return scan.Found(queries[:held], rows[:held], distances[:held])

    if not len(asked):
        return []
    rows = sum(int(lookup.rows_Q[asked].sum()) for lookup in lookups)
    groups = [asked[a:b] for a, b in blocks(len(asked), _QUERIES_PER_TASK if rows > _SPREAD_FROM else len(asked))]
    tasks = [partial(search, lookup, group) for lookup in lookups for group in groups]
    return spread(tasks, threads or cores() if rows > _SPREAD_FROM else 1)


_NO_MASKS = np.zeros(0, np.uint32)


def _balls(bits: int, flips: int) -> int:
    """Number of pieces within so many flips of one."""
    return sum(comb(bits, f) for f in range(flips + 1))


@lru_cache(maxsize=64)
def _masks(bits: int, flips: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Pieces with at most so many bits set, the fewest first, and how many have at most 0, 1, ... of them."""
    masks = [sum(1 << bit for bit in chosen) for f in range(flips + 1) for chosen in combinations(range(bits), f)]
    return np.array(masks, np.uint32), np.array([_balls(bits, f) for f in range(flips + 1)], np.int64)


# Of a shard, kept


class _Held:
    """What is known of a shard while it is open."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = 0
        self.tables: Tables | None = None


_holding = threading.Lock()
_held: WeakKeyDictionary[Shard, _Held] = WeakKeyDictionary()


def _held_of(shard: Shard) -> _Held:
    with _holding:
        return _held.setdefault(shard, _Held())


def _cached(shard: Shard) -> Tables:
    """From the local cache, checked; else built and put there."""
    pieces, bits = shape_of(*shard.codes.shape)
    stem, folder = f"{shard.digest('codes')}-{pieces}x{bits}-", cache_folder() / "radius"
    shape = (pieces, 2**bits + 1 + shard.rows)
    for path in sorted(folder.glob(f"{stem}*.npy")) if folder.is_dir() else []:
        if path.stem.removeprefix(stem) == _checksum(path):
            data = map_npy(path)
            if data.dtype == np.uint32 and data.shape == shape:
                return Tables(pieces, bits, data)
    tables = build(shard.codes)
    fresh = folder / f"{stem}{uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            np.save(file, tables.data)
        path = folder / f"{stem}{_checksum(fresh)}.npy"
        os.replace(fresh, path)
        return tables._replace(data=map_npy(path))
    except OSError as error:
        say(f"search: the radius tables of a shard are kept in memory only, {folder} cannot be written: {error}")
        return tables


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGEST]


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
def _cut(codes, width, bits, pieces_NP):
    for r in range(pieces_NP.shape[0]):
        for p in range(pieces_NP.shape[1]):
            pieces_NP[r, p] = _piece(codes + r * width, width, p * bits, bits)


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
def _plan(data, stride, own_QP, masks, upto, wide, flips_QP, rows_Q):
    """Choose the pieces that are looked up with the most flips: those whose further buckets hold the fewest rows."""
    pieces, most = own_QP.shape[1], len(upto) - 1
    fewer = np.empty(pieces, np.int64)
    more = np.empty(pieces, np.int64)
    for q in range(len(own_QP)):
        for p in range(pieces):
            fewer[p] = more[p] = 0
            for m in range(len(masks)):
                at = p * stride + np.int64(own_QP[q, p] ^ masks[m])
                size = np.int64(load(data, at + 1, AS_U32)) - np.int64(load(data, at, AS_U32))
                if most > 0 and m < upto[most - 1]:
                    fewer[p] += size
                else:
                    more[p] += size
            flips_QP[q, p] = most - 1
            rows_Q[q] += fewer[p]
        order = np.argsort(more)
        for i in range(wide + 1):
            flips_QP[q, order[i]] = most
            rows_Q[q] += more[order[i]]


@kernel
@no_type_check
def _collect(
    codes, width, ids, dead, data, stride, bits, own_QP, flips_QP, masks, upto, queries, form, which, levels,
    found_queries, found_rows, found_distances,
):  # fmt: skip
    """Compare the rows of all buckets that are looked up; a row is taken at the first piece by which it is found."""
    buckets = 1 << bits
    held = 0
    for q in which:
        for p in range(own_QP.shape[1]):
            if flips_QP[q, p] < 0:
                continue
            table = data + 4 * p * stride
            for m in range(upto[flips_QP[q, p]]):
                bucket = np.int64(own_QP[q, p] ^ masks[m])
                for at in range(load(table, bucket, AS_U32), load(table, bucket + 1, AS_U32)):
                    row = np.int64(load(table, buckets + 1 + at, AS_U32))
                    d = np.int64(scan.distance_to(codes, row, queries, q, form, ()))
                    if d >= levels or is_dead(dead, row):
                        continue
                    if _found_before(codes + row * width, width, bits, own_QP[q], flips_QP[q], p):
                        continue
                    found_queries[held] = q
                    found_rows[held] = load(ids, row, AS_ID) if ids != 0 else row
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
