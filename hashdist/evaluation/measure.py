"""How good codes are: the metrics of one search by a set of queries, wherever it ran, by name.

A metric is a function of Results and Cuts, one value a query, and an entry of METRICS; the evaluate stage, in-process
comparisons and the tables of `hashdist compare` find it there. The arithmetic stands in hashdist/evaluation/ranking.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashdist.evaluation import ranking
from hashdist.ground.settings import EvaluateSettings
from hashdist.nearest import scan

Floats = NDArray[np.float64]


class Cuts(NamedTuple):
    """How deep metrics look.

    Attributes:
        cut: R of mAP@R.
        precision_at: N of precision@N.
        recall_at: k of the label-free recall@k.
    """

    cut: int = 5000
    precision_at: int = 100
    recall_at: int = 10

    @classmethod
    def of(cls, wanted: EvaluateSettings) -> "Cuts":
        """The cuts that the settings ask for."""
        return cls(wanted.cut, wanted.precision_at, wanted.recall_at)

    @property
    def depth(self) -> int:
        """Places of the ranked lists that metrics and curves need."""
        deepest: int = max(self.cut, self.precision_at, self.recall_at, *ranking.PRECISION_AT)
        return deepest


@dataclass(frozen=True)
class Results:
    """The results of Q queries in a database.

    Attributes:
        found_QR: int64 [Q, R], rows or ids of the nearest images in (distance, id) order.
        histograms: int64 [Q, 2, L + 1], all and relevant images by distance; None without labels.
        relevant: bool [Q, R], of those found; None without labels.
        exact_QK: int64 [Q, K], exact neighbours by features, numbered as `found_QR`; None without features.
    """

    found_QR: NDArray[np.int64]
    histograms: NDArray[np.int64] | None = None
    relevant: NDArray[np.bool_] | None = None
    exact_QK: NDArray[np.int64] | None = None

    @property
    def total(self) -> NDArray[np.int64]:
        """Relevant images of each query in the whole database, int64 [Q]."""
        assert self.histograms is not None
        total_Q: NDArray[np.int64] = self.histograms[:, 1].sum(1)
        return total_Q


@dataclass(frozen=True)
class Metric:
    """A number that says how good codes are.

    Args:
        name: with `{cut}`, `{precision_at}` or `{recall_at}` where it depends on them; names ending in `_ties` are
            tie-expected.
        values: one value a query, float64 [Q]; what is reported is their mean.
        needs: without labels, or without features, the metric is left out.
        tabled: `hashdist compare` makes a table of it.
        main: the table that comes first, and the figures.
    """

    name: str
    values: Callable[[Any, Cuts], Floats]
    needs: Literal["labels", "features"] = "labels"
    tabled: bool = True
    main: bool = False

    def title(self, cuts: Cuts) -> str:
        """The name under these cuts, as results carry it."""
        return self.name.format(**cuts._asdict())

    def known_of(self, results: Results) -> bool:
        """Whether there is what it needs."""
        return (results.histograms if self.needs == "labels" else results.exact_QK) is not None


def _ap(by: ranking.Denominator) -> Callable[[Any, Cuts], Floats]:
    return lambda results, cuts: ranking.ap_at(results.relevant[:, : cuts.cut], results.total, by)


def _ap_ties(by: ranking.Denominator) -> Callable[[Any, Cuts], Floats]:
    return lambda results, cuts: ranking.tie_expected_ap(results.histograms, cuts.cut, by)


METRICS: list[Metric] = [
    Metric("map_all_ties", lambda results, _: ranking.tie_expected_ap(results.histograms)),
    Metric("map@{cut}", _ap("found"), main=True),
    Metric("map@{cut}_all", _ap("all"), tabled=False),
    Metric("map@{cut}_min", _ap("min"), tabled=False),
    Metric("map@{cut}_ties", _ap_ties("found"), tabled=False),
    Metric("map@{cut}_all_ties", _ap_ties("all"), tabled=False),
    Metric("map@{cut}_min_ties", _ap_ties("min"), tabled=False),
    Metric("precision@{precision_at}", lambda results, cuts: ranking.precision_at(results.relevant, cuts.precision_at)),
    Metric(
        "precision@{precision_at}_ties",
        lambda results, cuts: ranking.tie_expected_precision(results.histograms, cuts.precision_at),
        tabled=False,
    ),
    Metric(
        "recall@{recall_at}",
        lambda results, _: ranking.recall_at(results.found_QR[:, : results.exact_QK.shape[1]], results.exact_QK),
        needs="features",
    ),
]
"""Every metric, in the order of results."""


def metrics(results: Results, cuts: Cuts) -> dict[str, float]:
    """The mean over the queries of every metric for which there is what it needs."""
    return {
        metric.title(cuts): float(metric.values(results, cuts).mean()) for metric in METRICS if metric.known_of(results)
    }


def tables(cuts: Cuts) -> list[str]:
    """Names of the metrics that tables show, the main one first."""
    shown = sorted((metric for metric in METRICS if metric.tabled), key=lambda metric: not metric.main)
    return [metric.title(cuts) for metric in shown]


def curves(results: Results) -> dict[str, Any]:
    """Precision and recall by radius, and precision@N; empty without labels."""
    if results.histograms is None or results.relevant is None:
        return {}
    return {
        "radius": ranking.by_radius(results.histograms),
        "precision_at": ranking.precision_curve(results.relevant),
    }


class Searched(NamedTuple):
    """One search of a whole database, or of a part of one."""

    histograms: NDArray[np.int64]
    nearest: scan.Nearest
    relevant: NDArray[np.bool_]


def search(
    codes_NW: NDArray[np.uint8],
    queries_QW: NDArray[np.uint8],
    masks_NM: NDArray[np.uint64],
    masks_QM: NDArray[np.uint64],
    depth: int,
    *,
    threads: int = 0,
) -> Searched:
    """Histograms, first results in (distance, row) order, and which of those share a label with the query.

    Args:
        codes_NW: of the database, by ascending id.
        queries_QW: codes of the queries.
        masks_NM: label masks of the database (`ranking.label_masks`).
        masks_QM: of the queries.
        depth: results wanted; where there are fewer rows, the places behind them are filled with row -1.
        threads: 0 = all cores.
    """
    histograms = scan.histograms(codes_NW, queries_QW, masks_NM, masks_QM, threads=threads)
    nearest = scan.nearest(codes_NW, queries_QW, depth, threads=threads)
    if not len(codes_NW):
        return Searched(histograms, nearest, np.zeros(nearest.rows_QK.shape, np.bool_))
    relevant = (masks_NM[nearest.rows_QK.clip(min=0)] & masks_QM[:, None]).any(2)
    return Searched(histograms, nearest, relevant)


def without_own(
    histograms: NDArray[np.int64], masks_QM: NDArray[np.uint64], inside_Q: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Histograms in which each query that is in the database (`inside_Q`) does not count itself."""
    others = histograms.copy()
    others[inside_Q, 0, 0] -= 1
    others[inside_Q & (masks_QM != 0).any(1), 1, 0] -= 1
    return others
