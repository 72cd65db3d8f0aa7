"""Exact cosine neighbours (docs/decisions.md, S18).

**The similarity.** For rows x, y of float16 or float32, with d = x.y, a = x.x, b = y.y taken in float64 over 32
interleaved lanes that are then added in halves (lane l sums the elements l, l + 32, ...; 16 + 16, 8 + 8, ...),

    s(x, y) = sign(d) sqrt(d d / (a b)),  and 0 where x or y is zero.

The product of two float32 is exact in float64, so s is the same on every machine, with or without fused
multiply-add. Equal rows have equal s, and so have rows of small integers whose cosines are equal as real numbers
(which is why it is not d / (sqrt(a) sqrt(b))). Neighbours are ordered by (s descending, row ascending).

**The search.** Blocks of float32 matrix products of unit rows give approximate scores t with |t - s| <= e. A list
per row keeps every score not below (k-th best so far) - 2e: whatever is dropped has k rows surely before it. At the
end scores are sorted; a run of scores whose gaps are at most 2e, or one that the cut falls into, is computed again as
s and ordered by it; everything else is already in the order of s. So block shapes, threads and parts cannot change
the answer. A self-join multiplies the upper triangle only: a block serves its rows and its columns.

**The bound e.** With u = 2^-24: a unit row is rounded once, so a score of exact products of rounded rows differs from
s by at most (2u + u^2) |x|.|y|, and |x|.|y| <= 1 for unit rows (Cauchy-Schwarz). The product is taken over chunks of
C columns which are added up, so each term passes at most one multiplication, C - 1 additions inside its chunk in any
order, and (number of chunks - 1) additions outside: the sum is off by at most gamma(C + chunks - 1) |x|.|y|, with
gamma(m) = m u / (1 - m u) (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 3.1; it holds for any
order, blocking and fused operations, for any library that sums plain products). `score_error` adds the error of s
itself and one per cent for second-order terms and underflow: 8.6e-6 for 1,280 columns. Chunks are what makes it
small: one product over all columns allows 7.7e-5, and then almost every entry would have to be computed again.

bfloat16 products are four times as fast here but allow 6e-3: every list would have to be computed again, at more than
the product's own price.

**Memory**: the unit rows of one part, 8 bytes for each of about 2k list places per row of the part, a few blocks per
thread. Never rows x rows.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ranges import blocks
from hashdist.ground.threads import cores
from hashdist.nearest.kernel import kernel

_BLOCK = 512  # rows and columns of one product
_CHUNK = 128  # feature columns added up at once: see "The bound"
_SEGMENT = 64  # scores looked at between two checks that the list has room
_GROUP = 1024  # lists finished together
_QUERIES = 16_384  # queries searched at once
_UNIT_ROUNDOFF = 2.0**-24
_BINS = 256  # of the histogram that finds a list's cut
_TILE_BYTES = 8 << 20  # rows of the base that stay in the cache while entries are computed again
_BELOW_ALL = np.float32(-2)  # under every score
_NEVER = np.float32(-3)  # under every floor

_blas = threading.Lock()
Vectors = NDArray[np.float32] | NDArray[np.float16]


class Lists(NamedTuple):
    """Neighbours int32 [M, K] by (similarity descending, row ascending), and how many entries needed float64."""

    rows_MK: NDArray[np.int32]
    rescored: int


def score_error(width: int) -> float:
    """e: how far a score may be from the similarity of two rows of `width` columns (module docstring)."""
    chunks = -(-width // _CHUNK)
    roundings = min(width, _CHUNK) + chunks + 1
    return 1.01 * roundings * _UNIT_ROUNDOFF + width * 2.0**-52


def self_nearest(
    features_ND: Vectors, k: int, *, rows: tuple[int, int] | None = None, threads: int = 0, block: int = _BLOCK
) -> Lists:
    """The k nearest other rows of every row, exactly.

    Args:
        features_ND: float16 or float32, finite; may be memory-mapped. Need not be normalised.
        k: neighbours per row, 1 <= k < N; a row is never its own neighbour.
        rows: [start, stop) of the rows wanted (a part); None = all.
        threads: 0 = all cores. Products run on these threads too.
        block: rows and columns of one product; changes the speed only.

    Raises:
        InvalidInput: another dtype or shape, values that are not finite, k out of range.
    """
    base = _Base.of(features_ND, threads or cores())
    start, stop = rows or (0, len(features_ND))
    if not 1 <= k < len(features_ND):
        raise InvalidInput(
            f"every row needs k other rows: 1 <= k < n is required, found k = {k} and n = {len(features_ND)}; "
            f"use a smaller k or more images"
        )
    if not 0 <= start <= stop <= len(features_ND):
        raise InvalidInput(f"rows must lie within [0, {len(features_ND)}), found [{start}, {stop})")
    search = _Search(base, _part(base, start, stop), stop - start, k, threads or cores(), block)
    return search.self_join(start)


def nearest(
    queries_QD: Vectors, base_ND: Vectors, k: int, *, threads: int = 0, block: int = _BLOCK
) -> NDArray[np.int32]:
    """The k rows of `base_ND` nearest to every query, int32 [Q, k], exactly; queries in the base find themselves.

    Args:
        queries_QD: same dtype and width as the base.
        base_ND: as in `self_nearest`.
        k: 1 <= k <= N.
        threads: 0 = all cores.
        block: changes the speed only.

    Raises:
        InvalidInput: as `self_nearest`.
    """
    if queries_QD.dtype != base_ND.dtype or queries_QD.shape[1:] != base_ND.shape[1:]:
        raise InvalidInput(
            f"queries and base must have one dtype and width, found {queries_QD.dtype} {queries_QD.shape} and "
            f"{base_ND.dtype} {base_ND.shape}; use features of the same backbone"
        )
    if not 1 <= k <= len(base_ND):
        raise InvalidInput(f"1 <= k <= n is required, found k = {k} and n = {len(base_ND)}; use a smaller k")
    workers = threads or cores()
    base = _Base.of(base_ND, workers)
    found = np.empty((len(queries_QD), k), np.int32)
    for start, stop in blocks(len(queries_QD), _QUERIES):
        part = _Base.of(queries_QD[start:stop], workers)
        found[start:stop] = _Search(base, part, stop - start, k, workers, block).against_base().rows_MK
    return found


def similarity(x_ND: Vectors, y_ND: Vectors) -> NDArray[np.float64]:
    """s of row i of one array and row i of the other, float64 [N]: the definition, for checks and reports."""
    x, y = _Base.of(x_ND, 1), _Base.of(y_ND, 1)
    out = np.empty(len(x_ND), np.float64)
    _pairwise(x.bits, x.squares, y.bits, y.squares, out)
    return out


@dataclass(frozen=True)
class _Base:
    """Rows to search: their raw bits (float16 as uint16), squared norms, and for each the first row equal to it."""

    bits: NDArray[Any]
    squares: NDArray[np.float64]
    first: NDArray[np.int32]

    @classmethod
    def of(cls, features_ND: Vectors, threads: int) -> "_Base":
        if features_ND.ndim != 2 or features_ND.dtype not in (np.float16, np.float32) or not features_ND.shape[1]:
            raise InvalidInput(
                f"features must be float16 or float32 [N, D], found {features_ND.dtype} {features_ND.shape}; convert"
            )
        if len(features_ND) >= 2**31:
            raise InvalidInput(f"at most 2^31 - 1 rows can be searched at once, found {len(features_ND)}")
        bits = _bits(features_ND)
        squares, hashes = np.empty(len(bits), np.float64), np.empty(len(bits), np.uint64)
        largest = float(np.finfo(features_ND.dtype).max)

        def measure(rows: tuple[int, int]) -> None:
            at = slice(*rows)
            _measure(bits[at], largest, squares[at], hashes[at])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(measure, blocks(len(bits), _BLOCK)))
        if not np.isfinite(squares).all():
            bad = np.flatnonzero(~np.isfinite(squares))
            raise InvalidInput(
                f"features must be finite, found NaN or infinity in {len(bad)} of {len(bits)} rows (the first: "
                f"{bad[0]}); leave those rows out"
            )
        _, at, group = np.unique(hashes, return_index=True, return_inverse=True)
        first = at[group].astype(np.int32)
        _keep_equal(bits, first)
        return cls(bits, squares, first)

    def units(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop scaled to length 1, each element rounded once; zero rows stay zero."""
        out = np.empty((stop - start, self.bits.shape[1]), np.float32)
        _scale(self.bits[start:stop], self.squares[start:stop], out)
        return out


def _bits(features_ND: Vectors) -> NDArray[Any]:
    rows = read_only(features_ND)
    return rows.view(np.uint16) if rows.dtype == np.float16 else rows


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """The array in one form, whether it was mapped, sliced or made: kernels are compiled for one form only."""
    view: NDArray[Any] = np.ascontiguousarray(array).view(np.ndarray)
    view.flags.writeable = False
    return view


def _part(base: _Base, start: int, stop: int) -> _Base:
    return _Base(base.bits[start:stop], base.squares[start:stop], base.first[start:stop])


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Products in the calling thread only: this module brings its own threads. One search of a process at a time."""
    with _blas, threadpool_limits(1, user_api="blas"):
        yield


class _Scratch(threading.local):
    """Two score blocks of a thread."""

    def blocks(self, size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if getattr(self, "size", 0) != size:
            self.size, self.made = size, (np.empty((size, size), np.float32), np.empty((size, size), np.float32))
        return self.made


class _Search:
    """Lists of the rows of one part while blocks of scores come in, in any order and from several threads."""

    def __init__(self, base: _Base, part: _Base, rows: int, k: int, threads: int, block: int) -> None:
        self._base, self._part, self._k, self._threads, self._block = base, part, k, threads, block
        room = k + max(k, 4 * _SEGMENT) + _SEGMENT
        self._scores = np.empty((rows, room), np.float32)
        self._rows = np.empty((rows, room), np.int32)
        self._held = np.zeros(rows, np.int64)
        self._floors = np.full(rows, _BELOW_ALL)
        width = base.bits.shape[1]
        self._slack = np.float32(2 * score_error(width) + 4 * _UNIT_ROUNDOFF)  # 4u: thresholds are float32 themselves
        self._blocks = list(blocks(rows, block))
        self._locks = [threading.Lock() for _ in self._blocks]
        self._scratch = _Scratch()
        self._units = np.empty((0, width), np.float32)

    def self_join(self, start: int) -> Lists:
        """Neighbours of rows start, start + 1, ... of the base among all its other rows."""
        n, stop = len(self._base.bits), start + len(self._held)
        outside = [(lo + a, lo + b) for lo, hi in ((0, start), (stop, n)) for a, b in blocks(hi - lo, self._block)]
        tasks: list[Callable[[], None]] = [lambda c=columns: self._rectangle(c) for columns in outside]  # type: ignore[misc]
        tasks += [lambda j=j: self._triangle(j, start) for j in reversed(range(len(self._blocks)))]  # type: ignore[misc]
        return self._run(tasks)

    def against_base(self) -> Lists:
        """Neighbours of the part's rows among all rows of the base."""
        columns = blocks(len(self._base.bits), self._block)
        return self._run([lambda c=c: self._rectangle(c) for c in columns])  # type: ignore[misc]

    def _run(self, tasks: list[Callable[[], None]]) -> Lists:
        self._units = np.empty((len(self._held), self._base.bits.shape[1]), np.float32)
        out = np.empty((len(self._held), self._k), np.int32)
        with _one_blas_thread(), ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(self._fill_units, self._blocks))
            list(pool.map(lambda task: task(), tasks))
            rescored = pool.map(lambda group: self._finish(group, out), blocks(len(out), _GROUP))
            return Lists(out, sum(rescored))

    def _fill_units(self, rows: tuple[int, int]) -> None:
        self._units[slice(*rows)] = self._part.units(*rows)

    def _rectangle(self, columns: tuple[int, int]) -> None:
        """All rows of the part against a block of the base."""
        units = self._base.units(*columns)
        for i in self._order(columns[0] // self._block, len(self._blocks)):
            lo, hi = self._blocks[i]
            scores = self._product(self._units[lo:hi], units)
            self._offer(i, scores, columns[0])

    def _triangle(self, j: int, start: int) -> None:
        """Block j of the part against itself and all blocks before it; a block of scores serves both its sides."""
        lo_j, hi_j = self._blocks[j]
        for i in self._order(j, j + 1):
            lo_i, hi_i = self._blocks[i]
            scores = self._product(self._units[lo_i:hi_i], self._units[lo_j:hi_j])
            if i == j:
                np.fill_diagonal(scores, _NEVER)
            else:
                with self._locks[j]:
                    _offer_columns(scores, lo_j, start + lo_i, *self._state())
            self._offer(i, scores, start + lo_j)

    @staticmethod
    def _order(task: int, count: int) -> range:
        """List blocks up and down in turn: tasks side by side would wait for the same lock again and again."""
        return range(count) if task % 2 else range(count - 1, -1, -1)

    def _offer(self, i: int, scores: NDArray[np.float32], first_column: int) -> None:
        with self._locks[i]:
            _offer_rows(scores, self._blocks[i][0], first_column, *self._state())

    def _product(self, a_MD: NDArray[np.float32], b_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores of unit rows, the feature columns added up chunk by chunk."""
        total, term = (s[: len(a_MD), : len(b_ND)] for s in self._scratch.blocks(self._block))
        for lo, hi in blocks(a_MD.shape[1], _CHUNK):
            np.matmul(a_MD[:, lo:hi], b_ND[:, lo:hi].T, out=term if lo else total)
            if lo:
                np.add(total, term, out=total)
        return total

    def _state(self) -> tuple[Any, ...]:
        base, part = self._base, self._part
        exact = (part.bits, part.squares, base.bits, base.squares, base.first)
        return self._scores, self._rows, self._held, self._floors, self._k, self._slack, exact

    def _finish(self, group: tuple[int, int], out: NDArray[np.int32]) -> int:
        tile = max(1, _TILE_BYTES // self._base.bits[:1].nbytes)
        return int(_finish(*group, out, tile, *self._state()))


# Kernels of the search. Row p of the part has scores[p, :held[p]] of base rows[p, :held[p]], every score at or above
# floors[p]; `exact` holds what `_exact` needs.


def _make_real(_typing: Any, element: Any) -> Any:
    """A float32, or the bits of a float16, as float64, exactly and in vector instructions on any machine."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        double, word = ir.DoubleType(), ir.IntType(32)
        if element == types.float32:
            return builder.fpext(arguments[0], double)
        half = builder.zext(arguments[0], word)
        sign = builder.shl(builder.and_(half, word(0x8000)), word(16))
        rest = builder.shl(builder.and_(half, word(0x7FFF)), word(13))
        single = builder.bitcast(builder.or_(sign, rest), ir.FloatType())
        # exponents of float16 are biased by 15, of float32 by 127; infinity and NaN become numbers of 2^16 and more
        return builder.fmul(builder.fpext(single, double), double(2.0**112))

    return types.float64(element), generate


_real: Any = intrinsic(_make_real)


@kernel
def _widen(row, out):  # type: ignore[no-untyped-def]
    for d in range(len(row)):
        out[d] = _real(row[d])


@kernel
def _dot(x, y, lanes):  # type: ignore[no-untyped-def]
    """x.y in the fixed order; x float64, y raw, lanes float64 [32] scratch."""
    whole = len(x) // 32 * 32
    for l in range(32):  # noqa: E741
        lanes[l] = 0.0
    for d in range(0, whole, 32):
        for l in range(32):  # noqa: E741
            lanes[l] += x[d + l] * _real(y[d + l])
    for d in range(whole, len(x)):
        lanes[d - whole] += x[d] * _real(y[d])
    for half in (16, 8, 4, 2, 1):
        for l in range(half):  # noqa: E741
            lanes[l] += lanes[l + half]
    return lanes[0]


@kernel
def _cosine(dot, square_x, square_y):  # type: ignore[no-untyped-def]
    if square_x == 0.0 or square_y == 0.0:
        return 0.0
    size = np.sqrt(dot * dot / (square_x * square_y))
    return size if dot >= 0.0 else -size


@kernel
def _pairwise(x_bits, x_squares, y_bits, y_squares, out):  # type: ignore[no-untyped-def]
    x, lanes = np.empty(x_bits.shape[1], np.float64), np.empty(32, np.float64)
    for i in range(len(out)):
        _widen(x_bits[i], x)
        out[i] = _cosine(_dot(x, y_bits[i], lanes), x_squares[i], y_squares[i])


@kernel
def _measure(bits, largest, squares, hashes):  # type: ignore[no-untyped-def]
    """Squared norms in the fixed order (infinite where a row is not finite), and a hash of every row."""
    width = bits.shape[1]
    x, lanes = np.empty(width, np.float64), np.empty(32, np.float64)
    words = x.view(np.uint64)
    for i in range(len(squares)):
        _widen(bits[i], x)
        squares[i] = _dot(x, bits[i], lanes)
        state = np.uint64(width)
        over = False
        for d in range(width):
            over |= abs(x[d]) > largest
            state = (state ^ words[d]) * np.uint64(0x9E3779B97F4A7C15)
            state ^= state >> np.uint64(29)
        hashes[i] = state
        if over:
            squares[i] = np.inf


@kernel
def _keep_equal(bits, first):  # type: ignore[no-untyped-def]
    """first[i] := i where row i only shares a hash with row first[i]."""
    for i in range(len(first)):
        same = True
        for d in range(bits.shape[1]):
            same &= bits[i, d] == bits[first[i], d]
        if not same:
            first[i] = i


@kernel
def _scale(bits, squares, out):  # type: ignore[no-untyped-def]
    for i in range(len(squares)):
        factor = 1.0 / np.sqrt(squares[i]) if squares[i] > 0.0 else 0.0
        for d in range(bits.shape[1]):
            out[i, d] = np.float32(_real(bits[i, d]) * factor)


@kernel
def _exact(lists, columns, order, values, exact):  # type: ignore[no-untyped-def]
    """values[e] := s of row lists[e] of the part and base row columns[e], for e in `order`.

    Equal base rows that follow each other are computed once.
    """
    part_bits, part_squares, base_bits, base_squares, first = exact
    x, lanes = np.empty(base_bits.shape[1]), np.empty(32)
    widened, last, value = np.int64(-1), np.int64(-1), 0.0
    for e in order:
        p, j = lists[e], columns[e]
        if p != widened:
            _widen(part_bits[p], x)
            widened, last = np.int64(p), np.int64(-1)
        if first[j] != last:
            last, value = np.int64(first[j]), 0.0
            if part_squares[p] > 0.0 and base_squares[j] > 0.0:
                value = _cosine(_dot(x, base_bits[j], lanes), part_squares[p], base_squares[j])
        values[e] = value


@kernel
def _kth_largest(values, count, k):  # type: ignore[no-untyped-def]
    """The k-th largest of values[:count], which are reordered (Hoare's selection; docs/decisions.md, H134)."""
    lo, hi, wanted = 0, count - 1, k - 1
    while lo < hi:
        pivot = values[(lo + hi) >> 1]
        i, j = lo, hi
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if wanted <= j:
            hi = j
        elif wanted >= i:
            lo = i
        else:
            break
    return values[wanted]


@kernel
def _about_kth_largest(values, count, k):  # type: ignore[no-untyped-def]
    """A value that at least k of values[:count] reach, and few more: by a histogram, five times as fast as the k-th."""
    lo, hi = values[0], values[0]
    for c in range(1, count):
        lo, hi = min(lo, values[c]), max(hi, values[c])
    scale = np.float32((_BINS - 1) / (hi - lo)) if hi > lo else np.float32(0)
    histogram = np.zeros(_BINS, np.int64)
    for c in range(count):
        histogram[np.uint32((values[c] - lo) * scale)] += 1  # monotonic in the value, rounding included
    bin_, reached = _BINS - 1, histogram[_BINS - 1]
    while reached < k:
        bin_ -= 1
        reached += histogram[bin_]
    least = hi
    for c in range(count):
        if np.uint32((values[c] - lo) * scale) >= bin_:
            least = min(least, values[c])
    return least


@kernel
def _drop_below(p, floor, scores, rows, held):  # type: ignore[no-untyped-def]
    kept = 0
    for c in range(held[p]):
        score, row = scores[p, c], rows[p, c]
        scores[p, kept] = score
        rows[p, kept] = row
        kept += score >= floor
    held[p] = kept


@kernel
def _shrink(p, scores, rows, held, floors, k, slack, exact):  # type: ignore[no-untyped-def]
    """Drop what has k rows surely before it; if that leaves no room, what has k rows before it by s."""
    room = scores.shape[1] - _SEGMENT
    floors[p] = _about_kth_largest(scores[p], held[p], k) - slack
    _drop_below(p, floors[p], scores, rows, held)
    if held[p] > room - _SEGMENT:
        kth = _kth_largest(scores[p, : held[p]].copy(), held[p], k)
        floors[p] = kth - slack
        _drop_below(p, floors[p], scores, rows, held)
        if held[p] > room:
            _settle(p, kth, scores, rows, held, k, slack, exact)


@kernel
def _settle(p, kth, scores, rows, held, k, slack, exact):  # type: ignore[no-untyped-def]
    """Keep exactly k: those surely above the cut, and the best of the rest by (s, row)."""
    count = held[p]
    sure = 0
    for c in range(count):
        if scores[p, c] > kth + slack:
            scores[p, c], scores[p, sure] = scores[p, sure], scores[p, c]
            rows[p, c], rows[p, sure] = rows[p, sure], rows[p, c]
            sure += 1
    lists, order = np.empty(count - sure, np.int64), np.empty(count - sure, np.int64)
    for c in range(count - sure):
        lists[c], order[c] = p, c
    values = np.empty(count - sure)
    _exact(lists, rows[p, sure:count], order, values, exact)
    sort_pairs(values, rows[p, sure:count])
    for c in range(sure, k):
        scores[p, c] = values[c - sure]  # s itself is within e of s
    held[p] = k


@kernel
def sort_pairs(values, rows):  # type: ignore[no-untyped-def]
    """Sort by (value descending, row ascending), in place (Shell's sort: short to compile, fast on short runs)."""
    gap = 1
    while gap < len(rows) // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for c in range(gap, len(rows)):
            value, row = values[c], rows[c]
            at = c
            while at >= gap and (values[at - gap] < value or (values[at - gap] == value and rows[at - gap] > row)):
                values[at], rows[at] = values[at - gap], rows[at - gap]
                at -= gap
            values[at], rows[at] = value, row
        gap //= 3


@kernel
def _offer_rows(block, first_list, first_row, scores, rows, held, floors, k, slack, exact):  # type: ignore[no-untyped-def]
    """block[i, j] is the score of list first_list + i and base row first_row + j."""
    room = scores.shape[1]
    for i in range(block.shape[0]):
        p = first_list + i
        for start in range(0, block.shape[1], _SEGMENT):
            if held[p] + _SEGMENT > room:
                _shrink(p, scores, rows, held, floors, k, slack, exact)
            count, floor = held[p], floors[p]
            for j in range(start, min(start + _SEGMENT, block.shape[1])):
                # written in any case, counted if it belongs: no branch to mispredict
                scores[p, count] = block[i, j]
                rows[p, count] = first_row + j
                count += block[i, j] >= floor
            held[p] = count


@kernel
def _offer_columns(block, first_list, first_row, scores, rows, held, floors, k, slack, exact):  # type: ignore[no-untyped-def]
    """block[i, j] is the score of list first_list + j and base row first_row + i."""
    room, width = scores.shape[1], block.shape[1]
    hits = np.empty(width + 1, np.int64)
    for i in range(block.shape[0]):
        found = 0
        for j in range(width):
            hits[found] = j
            found += block[i, j] >= floors[first_list + j]
        for h in range(found):
            p = first_list + hits[h]
            if held[p] + _SEGMENT > room:
                _shrink(p, scores, rows, held, floors, k, slack, exact)
            scores[p, held[p]] = block[i, hits[h]]
            rows[p, held[p]] = first_row + i
            held[p] += 1


@kernel
def _sort_list(scores, rows):  # type: ignore[no-untyped-def]
    """Sort a list by (score descending, row ascending): score and row as one integer, twice as fast as pairs."""
    sign, low = np.uint32(1 << 31), np.uint64(0xFFFFFFFF)
    words = scores.view(np.uint32)
    keys = np.empty(len(rows), np.uint64)
    for c in range(len(rows)):
        falling = words[c] if words[c] & sign else ~words[c] & ~sign
        keys[c] = (np.uint64(falling) << np.uint64(32)) | np.uint64(rows[c])
    keys.sort()
    for c in range(len(rows)):
        falling = np.uint32(keys[c] >> np.uint64(32))
        words[c] = falling if falling & sign else ~falling & ~sign
        rows[c] = np.int32(keys[c] & low)


@kernel
def _run_end(ordered, start, count, slack):  # type: ignore[no-untyped-def]
    """End of the run of scores from `start` that rounding may have put in the wrong order."""
    end = start + 1
    while end < count and ordered[end - 1] - ordered[end] <= slack:
        end += 1
    return end


@kernel
def _by_tile(columns, tile, tiles):  # type: ignore[no-untyped-def]
    """Order of the entries by tile of the base, stable (counting sort)."""
    places = np.zeros(tiles + 1, np.int64)
    for e in range(len(columns)):
        places[columns[e] // tile + 1] += 1
    for t in range(tiles):
        places[t + 1] += places[t]
    order = np.empty(len(columns), np.int64)
    for e in range(len(columns)):
        t = columns[e] // tile
        order[places[t]] = e
        places[t] += 1
    return order


@kernel
def _finish(first, stop, out, tile, scores, rows, held, _floors, k, slack, exact):  # type: ignore[no-untyped-def]
    """out[p] := the first k by (s, row), first <= p < stop; returns how many entries were computed in float64.

    These are computed tile by tile of the base, because each row would else come from main memory.
    """
    unsure = 0
    for p in range(first, stop):
        kth = _kth_largest(scores[p, : held[p]].copy(), held[p], k)
        _drop_below(p, kth - slack, scores, rows, held)
        _sort_list(scores[p, : held[p]], rows[p, : held[p]])
        unsure += held[p]
    lists, columns = np.empty(unsure, np.int64), np.empty(unsure, np.int32)
    unsure = 0
    for p in range(first, stop):
        start = 0
        while start < k:
            end = _run_end(scores[p], start, held[p], slack)
            if end - start > 1:
                for c in range(start, end):
                    lists[unsure], columns[unsure] = p, rows[p, c]
                    unsure += 1
            start = end
    values = np.empty(unsure)
    tiles = len(exact[3]) // tile + 1
    _exact(lists, columns, _by_tile(columns[:unsure], tile, tiles), values, exact)
    done = 0
    for p in range(first, stop):
        start = 0
        while start < k:
            end = _run_end(scores[p], start, held[p], slack)
            if end - start > 1:
                sort_pairs(values[done : done + end - start], rows[p, start:end])
                done += end - start
            start = end
        out[p] = rows[p, :k]
    return unsure
