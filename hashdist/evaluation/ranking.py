"""Retrieval metrics, from histograms of distances and from ranked lists: numpy, no state.

Two views of the same codes:

- **Histograms** `int64 [Q, 2, L + 1]`: per query and Hamming distance, how many database images there are and how many
  of them are relevant. They add up over shards and workers, and hold everything that does not depend on the order
  within a distance. From them come *tie-expected* metrics: the mean over all orders of equal distances, in closed form.
  It is what the codes deserve.
- **Ranked lists** `bool [Q, R]`: relevance of the first R results in (distance, id) order: what a user gets, and what
  the papers report.

AP@R = sum over r <= R of precision(r) relevant(r), divided by D. The papers differ in D, so it is part of the name:

| name | D |
|---|---|
| `map@R` | relevant images among the first R (released code of DSAH, SADH, DeepHash; Eq 16 of CSDH) |
| `map@R_all` | all relevant images (text of SADH) |
| `map@R_min` | min(R, all relevant images) |

A query without relevant images has AP 0 and stays in the mean.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput

Denominator = Literal["found", "all", "min"]
Floats = NDArray[np.float64]

PRECISION_AT = (1, *range(10, 1001, 10))
"""N of the precision@N curve."""


# Relevance


def label_masks(
    labels: pa.ChunkedArray | pa.Array | Sequence[Sequence[int] | None], classes: int
) -> NDArray[np.uint64]:
    """Label sets as bit masks uint64 [N, ceil(classes / 64)]; no labels, or null: no bit. Two images that share a bit
    are relevant to each other.

    Raises InvalidInput for a label outside [0, classes).
    """
    column = labels if isinstance(labels, pa.Array | pa.ChunkedArray) else pa.array(labels, pa.list_(pa.int32()))
    parents = pc.list_parent_indices(column).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.int64)
    if len(flat) and (flat.min() < 0 or flat.max() >= classes):
        raise InvalidInput(f"labels must lie in [0, {classes}), found {flat.min()} to {flat.max()}")
    masks = np.zeros((len(column), max(1, -(-classes // 64))), np.uint64)
    np.bitwise_or.at(masks, (parents, flat >> 6), np.uint64(1) << (flat & 63).astype(np.uint64))
    return masks


# From histograms


def tie_expected_ap(histograms_Q2T: NDArray[np.int64], cut: int | None = None, by: Denominator = "all") -> Floats:
    """Mean of AP@R over all orders of equal distances, per query: float64 [Q].

    Args:
        histograms_Q2T: (all, relevant) per distance.
        cut: R; None = the whole ranking.
        by: the denominator D, see the module.

    Within a group of n_t items at one distance, r_t of them relevant, with C items and Rl relevant ones before it,
    place q is relevant with probability r_t / n_t, and then (q - 1) (r_t - 1) / (n_t - 1) relevant ones of the group
    stand before it on average. Summing (Rl + 1 + that) / (C + q) over the visible places gives the numerator.
    """
    n, r = histograms_Q2T[:, 0].astype(np.float64), histograms_Q2T[:, 1].astype(np.float64)
    before, found = np.cumsum(n, 1) - n, np.cumsum(r, 1) - r
    end = np.inf if cut is None else float(cut)
    visible = np.clip(end - before, 0, n)
    terms = _group_sum(r, n, visible, before, found)
    total = r.sum(1)
    if by == "found" and cut is not None and (n.sum(1) > cut).any():
        return _expected_over_found(n, r, before, found, terms, end)
    below = total if by != "min" else np.minimum(total, end)
    return _ratio(terms.sum(1), below)


def _group_sum(relevant: Floats, items: Floats, visible: Floats, before: Floats, found: Floats) -> Floats:
    """Expected sum of precision over the relevant ones among the first `visible` places of a group."""
    first, second = _reciprocals(before, visible)
    pair = np.divide(relevant - 1, items - 1, out=np.zeros_like(relevant), where=items > 1)
    share = np.divide(relevant, items, out=np.zeros_like(relevant), where=items > 0)
    return share * ((found + 1) * first + pair * second)


def _expected_over_found(n: Floats, r: Floats, before: Floats, found: Floats, terms: Floats, end: float) -> Floats:
    """AP@R divided by the relevant ones among the top R, a number that itself depends on the order in the group that
    the cut falls into: x of its m visible places are relevant, x being hypergeometric; given x the visible part is a
    group of its own. (The ratio of the expectations is another, wrong number.)
    """
    out = np.empty(len(n))
    for q in range(len(n)):
        group = int(np.searchsorted(before[q] + n[q], end))
        if group == n.shape[1]:  # fewer items than the cut
            out[q] = _ratio(terms[q].sum(keepdims=True), r[q].sum(keepdims=True))[0]
            continue
        m = end - before[q, group]
        x, probability = _hypergeometric(n[q, group], r[q, group], m)
        size, start, have = (np.full_like(x, value) for value in (m, before[q, group], found[q, group]))
        inside = _group_sum(x, size, size, start, have)
        out[q] = probability @ _ratio(terms[q, :group].sum() + inside, have + x)
    return out


def _hypergeometric(items: float, relevant: float, drawn: float) -> tuple[Floats, Floats]:
    """How many of `drawn` out of `items` may be relevant, and how probable each number is."""
    x = np.arange(max(0.0, drawn - (items - relevant)), min(drawn, relevant) + 1)
    ratios = np.log((relevant - x[:-1]) * (drawn - x[:-1])) - np.log(x[1:] * (items - relevant - drawn + x[1:]))
    weights = np.concatenate([[0.0], np.cumsum(ratios)])
    weights = np.exp(weights - weights.max())
    return x, weights / weights.sum()


def _reciprocals(before: Floats, places: Floats) -> tuple[Floats, Floats]:
    """sum over q = 1..m of 1 / (C + q), and of (q - 1) / (C + q) = m - (C + 1) times the first.

    The first is a difference of digammas, taken so that it keeps its relative accuracy for any C: below 32 from a
    table, above by the asymptotic series (error under 1e-17), with the logarithms as one log1p.
    """
    first = _TABLE[np.minimum(before + places, _SERIES_FROM).astype(np.int64)]
    first = first - _TABLE[np.minimum(before, _SERIES_FROM).astype(np.int64)]
    x = np.maximum(before, _SERIES_FROM) + 1
    y = np.maximum(before + places, _SERIES_FROM) + 1
    series = np.log1p((y - x) / x) + (y - x) / (2 * x * y)
    for power, factor in ((2, -1 / 12), (4, 1 / 120), (6, -1 / 252), (8, 1 / 240)):
        series = series + factor * (y**-power - x**-power)
    first = first + series
    return first, np.where(places > 1, places - (before + 1) * first, 0.0)


_SERIES_FROM = 32
_TABLE = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, _SERIES_FROM + 1))])


def tie_expected_precision(histograms_Q2T: NDArray[np.int64], cut: int) -> Floats:
    """Mean of precision@N over all orders of equal distances, per query: relevant in the top N, over N."""
    n, r = histograms_Q2T[:, 0].astype(np.float64), histograms_Q2T[:, 1].astype(np.float64)
    before = np.cumsum(n, 1) - n
    visible = np.clip(cut - before, 0, n)
    seen: Floats = np.divide(visible * r, n, out=np.zeros_like(n), where=n > 0).sum(1)
    return seen / cut


def by_radius(histograms_Q2T: NDArray[np.int64]) -> dict[str, list[float] | list[int]]:
    """Precision and recall of lookups within radius 0..L, as means over queries; free of ties.

    Returns lists over the radius: `precision` (over queries that find anything), `recall` (over queries that have
    relevant images), and `empty`, how many queries find nothing.
    """
    items, relevant = np.cumsum(histograms_Q2T, axis=2).swapaxes(0, 1)
    total = relevant[:, -1:]
    some = items > 0
    precision = np.divide(relevant, items, out=np.zeros(items.shape), where=some).sum(0) / np.maximum(some.sum(0), 1)
    known = total[:, 0] > 0
    recall = (relevant[known] / total[known]).mean(0) if known.any() else np.zeros(items.shape[1])
    return {"precision": precision.tolist(), "recall": recall.tolist(), "empty": (~some).sum(0).tolist()}


# From ranked lists


def ap_at(relevant_QR: NDArray[np.bool_], total_Q: NDArray[np.int64], by: Denominator = "found") -> Floats:
    """AP@R of ranked lists of length R (or of the whole database where that is shorter), per query: float64 [Q].

    Args:
        relevant_QR: relevance in canonical order.
        total_Q: relevant images of each query in the whole database.
        by: the denominator, see the module.
    """
    hits = relevant_QR.astype(np.float64)
    ranks = np.arange(1, hits.shape[1] + 1)
    numerator = (np.cumsum(hits, 1) / ranks * hits).sum(1)
    choices: dict[Denominator, Callable[[], Any]] = {
        "found": lambda: hits.sum(1),
        "all": lambda: total_Q,
        "min": lambda: np.minimum(total_Q, hits.shape[1]),
    }
    return _ratio(numerator, choices[by]().astype(np.float64))


def precision_at(relevant_QR: NDArray[np.bool_], cut: int) -> Floats:
    """Relevant images in the top N over N, per query; needs lists of at least min(N, database) places."""
    precision: Floats = relevant_QR[:, :cut].sum(1) / cut
    return precision


def precision_curve(relevant_QR: NDArray[np.bool_]) -> dict[str, list[int] | list[float]]:
    """Mean over queries of precision@N at N = 1, 10, 20, ... 1000, as far as the lists go: lists `n`, `precision`."""
    ranks = np.arange(1, relevant_QR.shape[1] + 1)
    precision = (relevant_QR.cumsum(1) / ranks).mean(0)
    places = [n for n in PRECISION_AT if n <= len(ranks)]
    return {"n": places, "precision": [float(precision[n - 1]) for n in places]}


def recall_at(found_QK: Iterable[NDArray[np.int64]], exact_QK: Iterable[NDArray[np.int64]]) -> Floats:
    """Share of each query's exact neighbours that are among those found: float64 [Q]; lists may differ in length."""
    pairs = zip(found_QK, exact_QK, strict=True)
    return np.array([len(np.intersect1d(found, exact)) / max(1, len(exact)) for found, exact in pairs], np.float64)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
