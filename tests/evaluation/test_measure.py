"""Metrics of one search, by name: the registry, and what it gives where labels or features are missing."""

import time

import numpy as np
import pytest

from hashdist.evaluation import measure, ranking
from hashdist.evaluation.measure import Cuts, Metric, Results


def results(histograms: np.ndarray, relevant: np.ndarray, exact: np.ndarray | None = None) -> Results:
    found = np.tile(np.arange(relevant.shape[1]), (len(relevant), 1))
    return Results(found, histograms, relevant, exact)


def tied(exact: np.ndarray | None = None) -> Results:
    """Three queries, 60 images at 9 distances."""
    rng = np.random.default_rng(0)
    n = rng.multinomial(60, rng.dirichlet(np.ones(9)), 3)
    return results(np.stack([n, rng.binomial(n, 0.4)], axis=1), rng.random((3, 40)) < 0.4, exact)


def test_without_ties_the_ranked_list_and_the_histogram_agree() -> None:
    order = np.random.default_rng(2).random(60) < 0.3
    groups = np.stack([np.ones(60, np.int64), order.astype(np.int64)])[None]
    got = measure.metrics(results(groups, order[None]), Cuts(25, 10))
    for name in ("map@25", "map@25_all", "map@25_min", "precision@10"):
        assert got[name] == pytest.approx(got[f"{name}_ties"], abs=1e-14)
    assert got["map_all_ties"] == pytest.approx(ranking.ap_at(order[None], np.array([order.sum()]), "all")[0])


def test_a_thousand_queries_take_seconds() -> None:
    """No timing is asserted beyond an order of magnitude: 1,000 queries, 59,000 images, R = 5,000."""
    rng = np.random.default_rng(0)
    n = rng.multinomial(59_000, rng.dirichlet(np.ones(65)), 1000)
    histograms = np.stack([n, rng.binomial(n, 0.1)], axis=1)
    started = time.perf_counter()
    measure.metrics(results(histograms, rng.random((1000, 5000)) < 0.1), Cuts(5000, 100))
    assert time.perf_counter() - started < 60


def test_names_carry_their_cuts_and_come_in_the_order_of_results() -> None:
    names = list(measure.metrics(tied(np.zeros((3, 2), np.int64)), Cuts(20, 7, 2)))
    ap = ["map@20", "map@20_all", "map@20_min", "map@20_ties", "map@20_all_ties", "map@20_min_ties"]
    assert names == ["map_all_ties", *ap, "precision@7", "precision@7_ties", "recall@2"]
    assert measure.tables(Cuts(20, 7, 2)) == ["map@20", "map_all_ties", "precision@7", "recall@2"]


def test_a_metric_is_left_out_without_what_it_needs() -> None:
    assert "recall@10" not in measure.metrics(tied(), Cuts())
    found = np.array([[3, 1, 2]])
    bare = Results(found, exact_QK=np.array([[1, 3]]))
    assert measure.metrics(bare, Cuts()) == {"recall@10": 1.0}
    assert measure.curves(bare) == {}


def test_a_new_metric_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_relevant(found: Results, cuts: Cuts) -> np.ndarray:
        """1 / rank of the first relevant image among the first R, 0 without one."""
        assert found.relevant is not None
        top = found.relevant[:, : cuts.cut]
        return np.where(top.any(1), 1 / (1 + top.argmax(1)), 0.0)

    monkeypatch.setattr(measure, "METRICS", [*measure.METRICS, Metric("mrr@{cut}", first_relevant)])
    found = results(np.zeros((2, 2, 9), np.int64), np.array([[False, True, True], [False, False, False]]))
    assert measure.metrics(found, Cuts(3))["mrr@3"] == 0.25
    assert "mrr@3" in measure.tables(Cuts(3))


def test_a_query_in_the_database_does_not_count_itself() -> None:
    histograms = np.full((3, 2, 5), 4)
    masks = np.array([[1], [0], [1]], np.uint64)
    others = measure.without_own(histograms, masks, np.array([True, True, False]))
    np.testing.assert_array_equal((histograms - others)[:, :, 0], [[1, 1], [1, 0], [0, 0]])
    assert (histograms == 4).all()
    assert (others[:, :, 1:] == 4).all()


def test_a_search_of_a_small_part_fills_its_lists_and_of_none_finds_nothing() -> None:
    rng = np.random.default_rng(1)
    codes, queries = rng.integers(0, 256, (5, 2), np.uint8), rng.integers(0, 256, (3, 2), np.uint8)
    masks, own = rng.integers(0, 4, (5, 1)).astype(np.uint64), rng.integers(0, 4, (3, 1)).astype(np.uint64)
    found = measure.search(codes, queries, masks, own, 9)
    assert found.nearest.rows_QK.shape == (3, 5)
    np.testing.assert_array_equal(found.relevant, (masks[found.nearest.rows_QK] & own[:, None]).any(2))
    assert found.histograms[:, 1].sum(1).tolist() == ((masks[:, 0] & own) != 0).sum(1).tolist()
    empty = measure.search(codes[:0], queries, masks[:0], own, 9)
    assert empty.relevant.shape == empty.nearest.rows_QK.shape == (3, 0)
    assert not empty.histograms.any()
    assert ranking.recall_at(empty.nearest.rows_QK, empty.nearest.rows_QK).tolist() == [0, 0, 0]
