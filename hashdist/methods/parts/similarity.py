"""The similarity matrix W of DSAH without a matrix: exact at any n (docs/decisions.md, D6 and S5).

W only grows, and one threshold a round decides for all pairs, so w_ij = +1 iff (i, j) is in W0, or i = j, or a
past round t had cos(z_i^t, z_j^t) >= m^t. Kept are W0 as sparse rows and, for each past round, the embeddings and
m^t. Memory O(n k + R n L); nothing is enumerated, nothing approximated.

All arithmetic is free of order. Unit embeddings are stored as the integers q = rint(2048 z), so that every partial
sum of q_i.q_j stays below 2^24 and a float32 (or float64) product of them is exact in any blocking; s = q_i.q_j /
2^22. Count, sum and sum of squares are integers, and a pair is added iff q_i.q_j >= ceil(m 2^22). So the lookups of
a batch and the scan over all pairs can never disagree, and any number of ranks, threads or blocks, on CPU or GPU,
gives the same bits. A saturated code's cosine with itself may read 1.003: harmless, mu, sigma and m scale with it.
"""

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ranges import blocks
from hashdist.methods.parts.communicator import Communicator
from hashdist.methods.parts.pairs import NORM_FLOOR
from hashdist.methods.parts.threads import torch_threads
from hashdist.nearest.kernel import kernel

GRID = 2048
"""Unit embeddings are integers of this scale; products have scale GRID^2 = 2^22."""

ROW_BLOCK = 1024
"""Rows of the unit that is dealt to ranks."""

_SCALE = GRID * GRID
_NEVER, _ALWAYS = 1 << 24, -(1 << 24)  # beyond any product, and exact in float32
_STRIPE, _COLUMNS = 512, 1024  # one CPU tile: 2 MiB a product, near the caches
_GPU_COLUMNS = 1 << 15
_LOW_BITS = 20
_AGREEMENT_PAIRS, _AGREEMENT_ROWS = 1 << 25, 256
_LOW = (1 << _LOW_BITS) - 1

Integers = NDArray[np.int64]
"""Statistics as exact integers [4]: count, sum of s, sum of s^2 >> 20, sum of s^2 & (2^20 - 1), all of scaled s."""


def quantize(z_NL: Tensor) -> Tensor:
    """int16 [N, L] on the CPU: rint(2048 z / |z|); rows shorter than NORM_FLOOR are zero."""
    q_NL = torch.empty(z_NL.shape, dtype=torch.int16)
    for start, stop in blocks(len(z_NL), 1 << 14):
        z = z_NL[start:stop].detach().cpu().double()
        norm = z.square().sum(1, keepdim=True).sqrt()
        q_NL[start:stop] = torch.where(norm >= NORM_FLOOR, z * (GRID / norm.clamp_min(NORM_FLOOR)), 0.0).round()
    return q_NL


@dataclass(frozen=True)
class Refresh:
    """The result of one global similarity refresh (Eqs 10-12).

    Args:
        pairs: ordered pairs i != j with w = +1 before the update, n_+ of the paper.
        mu: their mean cosine.
        sigma: population standard deviation.
        m: mu + gamma sigma; None when there were no pairs and the update was skipped.
        threshold: the least q_i.q_j that is added, ceil(m 2^22).
        seconds: wall time.
    """

    pairs: int
    mu: float | None
    sigma: float | None
    m: float | None
    threshold: int
    seconds: float

    def report(self) -> dict[str, Any]:
        """As plain numbers; an infinite m is text, since JSON has none."""
        found = asdict(self)
        if self.m is not None and math.isinf(self.m):
            found["m"] = str(self.m)
        return found


@dataclass(frozen=True)
class Agreement:
    """How well W = +1 says that two images share a label; pairs i != j.

    Args:
        rows: rows i that were looked at, against all j; all n where that is affordable, else evenly spaced ones.
        positives: pairs with w = +1 in these rows.
        precision: share of them with a label in common.
        recall: share of the pairs with a label in common that have w = +1.
        f_w: harmonic mean of the two (DSAH, Fig 7; true positives only, not the agreeing negatives).
    """

    rows: int
    positives: int
    precision: float
    recall: float
    f_w: float


class ImplicitW:
    """W of one training run; every rank holds the same.

    Args:
        indptr: int64 [n + 1], rows of W0.
        indices: int32, ascending within a row; the diagonal is implied.
        device: where `block` delivers, and where the scan over all pairs runs.
        dtype: of `block`.
    """

    def __init__(
        self,
        indptr: NDArray[np.int64],
        indices: NDArray[np.int32],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(indptr) == 0 or int(indptr[0]) != 0 or int(indptr[-1]) != len(indices):
            raise InvalidInput(
                f"W0 needs row pointers from 0 to its {len(indices)} entries, found {indptr[:1]} to {indptr[-1:]}"
            )
        self.n = len(indptr) - 1
        self._indptr = np.ascontiguousarray(indptr, np.int64)
        self._indices = np.ascontiguousarray(indices, np.int32)
        self._device, self._dtype = torch.device(device), dtype
        self._place_n = np.full(self.n, -1, np.int32)
        self._past: list[tuple[Tensor, int]] = []

    @property
    def edges(self) -> int:
        """Ordered pairs of W0, without the diagonal."""
        return len(self._indices)

    @property
    def thresholds(self) -> list[int]:
        """The integer threshold of every past round."""
        return [threshold for _, threshold in self._past]

    def block(self, rows_M: NDArray[np.int64], columns_N: NDArray[np.int64] | None = None) -> Tensor:
        """w of `rows_M` against `columns_N` (the same rows if None), -1/+1 [M, N]; the columns must be distinct."""
        columns_N = rows_M if columns_N is None else columns_N
        w_MN = torch.empty((len(rows_M), len(columns_N)), dtype=self._dtype)
        _look_up(self._indptr, self._indices, self._place_n, rows_M, columns_N, w_MN.numpy())
        w_MN = w_MN.to(self._device)
        if self._past:
            rows = torch.from_numpy(rows_M).to(self._device)
            columns = rows if columns_N is rows_M else torch.from_numpy(columns_N).to(self._device)
        for q_nL, threshold in self._past:
            # float64 is exact whatever the caller allows float32 products to be computed in
            s_MN = q_nL[rows].double() @ q_nL[columns].double().T
            w_MN.masked_fill_(s_MN >= threshold, 1.0)
        return w_MN

    def refresh(self, q_nL: Tensor, gamma: float, comm: Communicator, threads: int = 1) -> Refresh:
        """Grow W by this round's embeddings (`quantize`): Eqs 10-12, over all pairs, exactly.

        mu and sigma are taken over the pairs with w = +1, i != j; every pair with s >= m = mu + gamma sigma
        becomes positive for good. gamma = +inf adds none, -inf all; without positive pairs nothing happens.
        All ranks must call it with the same arguments; `threads` may differ.
        """
        start = time.perf_counter()
        if q_nL.dtype != torch.int16 or len(q_nL) != self.n:
            raise InvalidInput(
                f"the refresh needs int16 embeddings of all {self.n} images, found {q_nL.dtype} {tuple(q_nL.shape)}"
            )
        q_nL = q_nL.to(self._device)
        count, total, squares = self._statistics(q_nL, comm, threads)
        if count == 0:
            return Refresh(0, None, None, None, _NEVER, time.perf_counter() - start)
        mu, sigma = _moments(count, total, squares)
        m = gamma if math.isinf(gamma) else mu + gamma * sigma
        threshold = _least(m)
        if threshold < _NEVER:
            self._past.append((q_nL, threshold))
        return Refresh(count, mu, sigma, m, threshold, time.perf_counter() - start)

    def agreement(self, labels_nC: NDArray[np.bool_], comm: Communicator) -> Agreement:
        """Precision, recall and F of W against labels. All ranks must call it; it is the same on each."""
        rows = np.unique(np.linspace(0, self.n - 1, min(self.n, max(1, _AGREEMENT_PAIRS // self.n))).astype(np.int64))
        labels = torch.from_numpy(np.ascontiguousarray(labels_nC)).to(self._device, torch.float32)
        counts = torch.zeros(3, dtype=torch.int64, device=self._device)
        for start, stop in list(blocks(len(rows), _AGREEMENT_ROWS))[comm.rank :: comm.world_size]:
            own = rows[start:stop]
            positive = self.block(own, np.arange(self.n)) > 0
            shared = labels[torch.from_numpy(own).to(self._device)] @ labels.T > 0
            positive[np.arange(len(own)), own] = shared[np.arange(len(own)), own] = False
            counts += torch.stack((positive.sum(), shared.sum(), (positive & shared).sum()))
        positives, relevant, both = torch.cat(comm.gather(counts[None], [1] * comm.world_size)).sum(0).tolist()
        f_w = 2 * both / max(1, positives + relevant)
        return Agreement(len(rows), positives, both / max(1, positives), both / max(1, relevant), f_w)

    def state_dict(self) -> dict[str, Any]:
        """Embeddings and thresholds of the past rounds (W0 is the graph's, and named by the run)."""
        return {"past": [{"embeddings": q.cpu().clone(), "threshold": threshold} for q, threshold in self._past]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The past of a `state_dict`."""
        self._past = [(p["embeddings"].to(self._device), int(p["threshold"])) for p in state["past"]]

    def _statistics(self, q_nL: Tensor, comm: Communicator, threads: int) -> tuple[int, int, int]:
        """Count, sum and sum of squares of scaled s over all ordered pairs with w = +1, i != j."""
        starts = list(range(0, self.n, ROW_BLOCK))
        dealt = [[b for i, b in enumerate(starts) if _owner(i, comm.world_size) == r] for r in range(comm.world_size)]
        own = torch.zeros((1, 4), dtype=torch.int64)
        stripes = [(a, b) for start in dealt[comm.rank] for a, b in _stripes(start, min(start + ROW_BLOCK, self.n))]
        for part in self._scan(q_nL, stripes, threads):
            own += torch.from_numpy(part)
        found = torch.cat(comm.gather(own, [1] * comm.world_size)).tolist()
        count, total, high, low = (sum(column) for column in zip(*found, strict=True))
        return count, total, (high << _LOW_BITS) + low

    def _scan(self, q_nL: Tensor, stripes: Sequence[tuple[int, int]], threads: int) -> Iterator[Integers]:
        if self._device.type != "cpu":
            with _exact_products():
                yield from (self._stripe_on_device(q_nL, start, stop) for start, stop in stripes)
            return
        with torch_threads(1), _exact_products(), ThreadPoolExecutor(threads) as pool:
            scan = _CpuScan(self._indptr, self._indices, q_nL, self._past)
            yield from pool.map(lambda stripe: scan.stripe(*stripe), stripes)

    def _stripe_on_device(self, q_nL: Tensor, start: int, stop: int) -> Integers:
        """The same integers as _CpuScan's, by the device's own products."""
        totals = torch.zeros(4, dtype=torch.int64, device=self._device)
        rows = torch.arange(start, stop, device=self._device)[:, None]
        if self._past:
            for a, b in ((a + start, b + start) for a, b in blocks(self.n - start, _GPU_COLUMNS)):
                later = torch.arange(a, b, device=self._device) > rows
                positive = later & self._past_positive(slice(start, stop), slice(a, b))
                totals += 2 * _masked_integers(_product(q_nL, slice(start, stop), slice(a, b)), positive)
        low, high = int(self._indptr[start]), int(self._indptr[stop])
        degrees = np.diff(self._indptr[start : stop + 1])
        edge_rows = torch.from_numpy(np.repeat(np.arange(start, stop), degrees)).to(self._device)
        edge_columns = torch.from_numpy(self._indices[low:high].astype(np.int64)).to(self._device)
        for a, b in blocks(high - low, 1 << 20):
            i, j = edge_rows[a:b], edge_columns[a:b]
            fresh = i != j
            for past, threshold in self._past:
                fresh &= _edge_products(past, i, j) < threshold
            totals += _masked_integers(_edge_products(q_nL, i, j)[None], fresh[None])
        return totals.cpu().numpy()

    def _past_positive(self, rows: slice, columns: slice) -> Tensor:
        """Pairs that a past round added, bool [rows, columns]."""
        first, *others = (_product(q, rows, columns) >= threshold for q, threshold in self._past)
        for other in others:
            first |= other
        return first


class _CpuScan:
    """Statistics of stripes of rows on the CPU, safe for several threads at once, each with its own tiles."""

    def __init__(
        self, indptr: NDArray[np.int64], indices: NDArray[np.int32], q_nL: Tensor, past: Sequence[tuple[Tensor, int]]
    ) -> None:
        self._indptr, self._indices = indptr, indices
        self._now, self._past = q_nL.contiguous(), past
        bits = q_nL.shape[1]
        self._now_and_past = (
            np.stack([q.numpy() for q in (self._now, *(q for q, _ in past))]) if past else self._now.numpy()[None]
        )
        self._thresholds = np.array([t for _, t in past], np.int64)
        self._bits = bits
        self._local = threading.local()

    def stripe(self, start: int, stop: int) -> Integers:
        """Rows start to stop: pairs with later columns that the past added, twice (both orders), and W0's others."""
        totals = np.zeros(4, np.int64)
        _edge_statistics(self._indptr, self._indices, self._now_and_past, self._thresholds, start, stop, totals)
        if self._past:
            found = np.zeros(4, np.int64)
            for a, b in blocks(self.n - start, _COLUMNS):
                self._tile(start, stop, start + a, start + b, found)
            totals += 2 * found
        return totals

    @property
    def n(self) -> int:
        """All rows."""
        return len(self._now)

    def _tile(self, start: int, stop: int, a: int, b: int, found: Integers) -> None:
        now = self._buffer("now", stop - start, b - a)
        gap = self._buffer("gap", stop - start, b - a)
        for t, (q_nL, threshold) in enumerate(self._past):
            into = gap if t == 0 else self._buffer("more", stop - start, b - a)
            self._multiply(q_nL, start, stop, a, b, into)
            if t == 0:
                gap_threshold = threshold
                if len(self._past) > 1:
                    gap -= threshold
                    gap_threshold = 0
            else:
                _largest_gap(gap.numpy(), into.numpy(), np.float32(threshold))
        self._multiply(self._now, start, stop, a, b, now)
        _tile_statistics(now.numpy(), gap.numpy(), np.float32(gap_threshold), start, a, found)

    def _multiply(self, q_nL: Tensor, start: int, stop: int, a: int, b: int, into: Tensor) -> None:
        left = self._buffer("left", stop - start, self._bits).copy_(q_nL[start:stop])
        right = self._buffer("right", b - a, self._bits).copy_(q_nL[a:b])
        torch.mm(left, right.T, out=into)

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """This thread's buffer of that name, as a contiguous float32 [rows, columns]."""
        held: Tensor | None = getattr(self._local, name, None)
        if held is None or held.numel() < rows * columns:
            held = torch.empty(rows * columns)
            setattr(self._local, name, held)
        return held[: rows * columns].view(rows, columns)


def _owner(block: int, world_size: int) -> int:
    """The rank of a row block: forth and back, since later row blocks have fewer columns to scan."""
    place = block % (2 * world_size)
    return min(place, 2 * world_size - 1 - place)


def _stripes(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return ((start + a, start + b) for a, b in blocks(stop - start, _STRIPE))


def _moments(count: int, total: int, squares: int) -> tuple[float, float]:
    """Mean and population standard deviation of s from exact integers of scaled s: no cancellation."""
    mean = Fraction(total, count * _SCALE)
    variance = Fraction(squares * count - total * total, (count * _SCALE) ** 2)
    return float(mean), math.sqrt(variance)


def _least(m: float) -> int:
    """The least scaled product that is at least m: ceil(m 2^22), within the range that no product reaches."""
    if math.isinf(m):
        return _NEVER if m > 0 else _ALWAYS
    return max(_ALWAYS, min(_NEVER, math.ceil(Fraction(m) * _SCALE)))


def _product(q_nL: Tensor, rows: slice, columns: slice) -> Tensor:
    return q_nL[rows].float() @ q_nL[columns].float().T


def _edge_products(q_nL: Tensor, i_E: Tensor, j_E: Tensor) -> Tensor:
    return (q_nL[i_E].float() * q_nL[j_E].float()).sum(1)


def _masked_integers(s_MN: Tensor, positive_MN: Tensor) -> Tensor:
    """Integers of the masked scaled products, on their device; a row's sum of squares fits int64 up to 2^17 columns."""
    s = torch.where(positive_MN, s_MN, 0.0).long()
    squares_M = torch.cat([chunk.square().sum(1) for chunk in torch.split(s, 1 << 16, dim=1)])
    return torch.stack((positive_MN.sum(), s.sum(), (squares_M >> _LOW_BITS).sum(), (squares_M & _LOW).sum()))


@contextmanager
def _exact_products() -> Iterator[None]:
    """float32 products in float32 proper: no TF32, no bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@kernel
def _look_up(indptr, indices, place_n, rows_M, columns_N, w_MN):  # type: ignore[no-untyped-def]
    """W0 and the diagonal of a block; `place_n` is all -1 before and after."""
    for j in range(len(columns_N)):
        place_n[columns_N[j]] = j
    w_MN[:, :] = -1
    for i in range(len(rows_M)):
        row = rows_M[i]
        if place_n[row] >= 0:
            w_MN[i, place_n[row]] = 1
        for e in range(indptr[row], indptr[row + 1]):
            j = place_n[indices[e]]
            if j >= 0:
                w_MN[i, j] = 1
    for j in range(len(columns_N)):
        place_n[columns_N[j]] = -1


@kernel
def _edge_statistics(indptr, indices, q_TnL, thresholds, start, stop, totals):  # type: ignore[no-untyped-def]
    """Entries of W0 in rows start to stop that no past round added; q_TnL holds this round first, then the past."""
    bits = q_TnL.shape[2]
    for i in range(start, stop):
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            fresh = i != j
            for t in range(len(thresholds)):
                if fresh:
                    s = np.int32(0)
                    for c in range(bits):
                        s += np.int32(q_TnL[t + 1, i, c]) * np.int32(q_TnL[t + 1, j, c])
                    fresh = s < thresholds[t]
            if fresh:
                s = np.int32(0)
                for c in range(bits):
                    s += np.int32(q_TnL[0, i, c]) * np.int32(q_TnL[0, j, c])
                square = np.int64(s) * np.int64(s)
                totals[0] += 1
                totals[1] += s
                totals[2] += square >> _LOW_BITS
                totals[3] += square & _LOW


@kernel
def _largest_gap(gap_MN, s_MN, threshold):  # type: ignore[no-untyped-def]
    """gap := max(gap, s - threshold), whose sign says whether any past round added the pair."""
    for i in range(gap_MN.shape[0]):
        for j in range(gap_MN.shape[1]):
            gap_MN[i, j] = max(gap_MN[i, j], s_MN[i, j] - threshold)


@kernel
def _tile_statistics(s_MN, gap_MN, threshold, first_row, first_column, totals):  # type: ignore[no-untyped-def]
    """Pairs of a tile above the diagonal with gap >= threshold; a row's squares fit int64 up to 2^17 columns."""
    for i in range(s_MN.shape[0]):
        count, total, squares = np.int64(0), np.int64(0), np.int64(0)
        # slices, so that the loop starts at 0 and the compiler sees that no index wraps around
        first = min(max(0, first_row + i + 1 - first_column), s_MN.shape[1])
        s_N, gap_N = s_MN[i, first:], gap_MN[i, first:]
        for j in range(len(s_N)):
            positive = gap_N[j] >= threshold
            s = np.int64(np.int32(s_N[j])) if positive else np.int64(0)
            count += np.int64(positive)
            total += s
            squares += s * s
        totals[0] += count
        totals[1] += total
        totals[2] += squares >> _LOW_BITS
        totals[3] += squares & _LOW
