"""Drift: whether the images of an increment are like those that were there, seen through their codes.

- `shift`: how far a bit's mean among the new rows stands from its mean among the old ones, root mean square over the
  bits; what chance explains is subtracted.
- `lean`: the same of new rows against the old row nearest to each, in units of how far old rows lie apart (the share
  of bits in which an old row differs from its nearest). New images of kinds that are there differ from their nearest
  in any direction; of a new kind, all in one.
- `far`: share of the new rows that stand farther from their nearest old one than 95 % of the old rows do.
- `entropy` of a bit, mean, and `correlation` of two bits, root mean square, before and among the new.

A retraining is recommended where the score is 1 or more: the smaller of shift and lean, or far, each as a share of its
limit. Shift alone would also speak of an increment of a single class, lean alone is noisy in small ones; codes drawn
at random shift little and are far. The limits are fixed, and higher in small increments: twice what old rows come to
when they are measured against old ones. How they were chosen, and on what: docs/promotion.md.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashdist.evaluation.probes import smallest
from hashdist.ground import telemetry
from hashdist.ground.bits import unpack
from hashdist.index.search import scanning
from hashdist.index.view import View

SHIFT, LEAN, FAR = 0.15, 0.45, 0.25
"""The fixed limits of shift, lean and far."""

FEWEST_NEW, FEWEST_OLD = 10, 200
"""Rows below which nothing is said."""

_OLD = 20_000  # old rows whose bits are counted
_QUERIES = 500  # rows of either kind whose nearest old one is looked for
_COMPARISONS = 1 << 33  # codes compared for that at most, down to _FEWEST_QUERIES: seconds, at any size
_FEWEST_QUERIES = 50
_BLOCKS = 50  # of old rows, measured like an increment
_FAR_QUANTILE = 0.95
_LEAST_APART = 0.5  # bits by which old rows are taken to lie apart at least, where many have equal codes


def measure(before: View, codes_NW: NDArray[np.uint8]) -> dict[str, Any]:
    """The drift of an increment against the version that it is to join: the numbers of the module docstring.

    Args:
        before: the version; its codes are of the same model.
        codes_NW: of the new and changed images.

    Returns:
        JSON: the numbers, `means` by bit before and among the new, `limits`, `score`, `retrain_recommended`, and
        `text`, one line that says so. They are set as metrics too.

    Cost: at most 20,000 old rows are read, and each of 500 new and 500 old ones is compared with all old ones (fewer
    where the index holds more than 17 million rows, down to 50).
    """
    old_rows = int(before.manifest["rows"])
    if len(codes_NW) < FEWEST_NEW or old_rows < FEWEST_OLD:
        text = (
            f"drift: not measured: {FEWEST_NEW} new rows and {FEWEST_OLD} old ones are needed, found "
            f"{len(codes_NW)} and {old_rows}"
        )
        return {"rows": len(codes_NW), "score": None, "retrain_recommended": False, "text": text}
    places = smallest(before, _OLD)
    old_codes_MW = before.codes(places)
    old_ML, new_NL = unpack(old_codes_MW), unpack(codes_NW)
    p_L, q_L = old_ML.mean(0), new_NL.mean(0)
    shift, chance = _shift(p_L, q_L, len(new_NL)), _chance(old_ML, p_L, len(new_NL))
    nearest = _nearest(before, places.ids, old_codes_MW, codes_NW)
    limits = {
        "shift": max(SHIFT, 2 * chance),
        "lean": LEAN,
        "far": max(FAR, 2 * (1 - _FAR_QUANTILE) + 4 * np.sqrt((1 - _FAR_QUANTILE) / nearest["queries"])),
    }
    moved = min(shift / limits["shift"], nearest["lean"] / limits["lean"])
    score = max(moved, nearest["far"] / limits["far"])
    found = {
        "rows": len(codes_NW),
        "shift": shift,
        "shift_by_chance": chance,
        "entropy": {"before": _entropy(p_L), "new": _entropy(q_L)},
        "correlation": _correlations(old_ML, new_NL),
        "nearest": nearest,
        "means": {"before": p_L.round(3).tolist(), "new": q_L.round(3).tolist()},
        "limits": limits,
        "score": score,
        "retrain_recommended": bool(score >= 1),
    }
    _export(found)
    rounded: dict[str, Any] = _round(found)
    return {**rounded, "text": _text(rounded)}


# The numbers


def _shift(p_L: NDArray[np.float64], q_L: NDArray[np.float64], rows: int) -> float:
    """Root mean square of q - p, less what `rows` draws from p would give; 0 where that is more."""
    squared = (q_L - p_L) ** 2 - p_L * (1 - p_L) / rows
    return float(np.sqrt(max(0.0, squared.mean())))


def _chance(old_ML: NDArray[np.uint8], p_L: NDArray[np.float64], rows: int) -> float:
    """The largest shift of blocks of old rows, each as large as the increment, or smaller and so more scattered.

    Rows come by id, which is a hash: a block of them is a random sample.
    """
    size = min(rows, max(FEWEST_NEW, len(old_ML) // _BLOCKS))
    blocks = [old_ML[start : start + size] for start in range(0, len(old_ML) - size + 1, size)][:_BLOCKS]
    return max(_shift(p_L, block.mean(0), size) for block in blocks)


def _entropy(p_L: NDArray[np.float64]) -> float:
    inner = p_L[(p_L > 0) & (p_L < 1)]
    return float(-(inner * np.log2(inner) + (1 - inner) * np.log2(1 - inner)).sum() / len(p_L))


def _correlations(old_ML: NDArray[np.uint8], new_NL: NDArray[np.uint8]) -> dict[str, float]:
    before_LL, new_LL = _correlation(old_ML), _correlation(new_NL)
    if before_LL.shape[0] < 2:
        return {"before": 0.0, "new": 0.0, "shift": 0.0}
    pairs = np.triu_indices(len(before_LL), 1)
    noise = (1 - before_LL[pairs] ** 2) ** 2 * (1 / len(old_ML) + 1 / len(new_NL))
    difference = ((new_LL - before_LL)[pairs] ** 2 - noise).mean()
    return {
        "before": float(np.sqrt((before_LL[pairs] ** 2).mean())),
        "new": float(np.sqrt((new_LL[pairs] ** 2).mean())),
        "shift": float(np.sqrt(max(0.0, difference))),
    }


def _correlation(bits_NL: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Correlation of every two bits; 0 where one of them is constant."""
    centred = bits_NL - bits_NL.mean(0, dtype=np.float32)
    covariance_LL = (centred.T @ centred).astype(np.float64) / len(centred)
    deviation_L = np.sqrt(np.diag(covariance_LL))
    both = np.outer(deviation_L, deviation_L)
    correlation_LL: NDArray[np.float64] = np.divide(covariance_LL, both, out=np.zeros_like(both), where=both > 1e-12)
    return correlation_LL


def _nearest(
    before: View, ids: NDArray[np.int64], old_MW: NDArray[np.uint8], new_NW: NDArray[np.uint8]
) -> dict[str, Any]:
    """Distances to the nearest old row: of new rows, and of old ones, each itself left out."""
    most = max(_FEWEST_QUERIES, min(_QUERIES, _COMPARISONS // int(before.manifest["rows"])))
    new_QW = new_NW[np.unique(np.linspace(0, len(new_NW) - 1, min(most, len(new_NW))).astype(np.int64))]
    nearest = scanning.nearest(before, new_QW, 1)
    new_Q, beside_QW = nearest.distances_QK[:, 0], before.codes(before.locate(nearest.rows_QK[:, 0]))
    found = scanning.nearest(before, old_MW[:most], 2)
    own = found.rows_QK[:, 0] == ids[:most]
    old_Q = np.where(own, found.distances_QK[:, 1], found.distances_QK[:, 0])
    far = float(np.quantile(old_Q, _FAR_QUANTILE))
    return {
        "before": float(old_Q.mean()),
        "new": float(new_Q.mean()),
        "far_from": far,
        "far": float((new_Q > far).mean()),
        "lean": _lean(new_QW, beside_QW, max(_LEAST_APART, float(old_Q.mean()))),
        "queries": len(new_QW),
    }


def _lean(new_QW: NDArray[np.uint8], beside_QW: NDArray[np.uint8], apart: float) -> float:
    """Root mean square, over bits, of the mean difference of new rows and those beside them, less what chance gives,
    as a share of `apart`: the distance of rows to their nearest, in bits."""
    difference_QL = unpack(new_QW).astype(np.float64) - unpack(beside_QW)
    squared = difference_QL.mean(0) ** 2 - difference_QL.var(0) / len(new_QW)
    return float(np.sqrt(max(0.0, squared.mean())) / (apart / difference_QL.shape[1]))


# What is said of them


def _text(found: dict[str, Any]) -> str:
    entropy, nearest, limits = found["entropy"], found["nearest"], found["limits"]
    verdict = "retrain recommended" if found["retrain_recommended"] else "drift"
    return (
        f"{verdict}: the bits of {found['rows']} new images moved by {found['shift']:.3f} (limit "
        f"{limits['shift']:.3f}, by chance up to {found['shift_by_chance']:.3f}), away from what is near them by "
        f"{nearest['lean']:.2f} (limit {limits['lean']:.2f}), entropy {entropy['before']:.2f} -> {entropy['new']:.2f}, "
        f"nearest old image at {nearest['new']:.1f} bits (old ones: {nearest['before']:.1f}), {nearest['far']:.0%} of "
        f"them far off (limit {limits['far']:.0%}); score {found['score']:.2f}"
    )


def _export(found: dict[str, Any]) -> None:
    numbers = {
        "score": found["score"],
        "shift": found["shift"],
        "entropy": found["entropy"]["new"],
        "correlation": found["correlation"]["new"],
        "nearest": found["nearest"]["new"],
        "lean": found["nearest"]["lean"],
        "far": found["nearest"]["far"],
    }
    for name, value in numbers.items():
        telemetry.DRIFT.set(value, number=name)
    if found["retrain_recommended"]:
        telemetry.RETRAIN.inc()


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _round(item) for name, item in value.items()}
    return round(float(value), 4) if isinstance(value, float | np.floating) else value
