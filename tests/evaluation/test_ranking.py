"""Metrics against brute force over every order of equal distances."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations, product

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from hashdist.evaluation import ranking
from hashdist.ground.errors import InvalidInput

Group = tuple[int, int]  # items, relevant items


def orders(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    """Relevance of every distinct ranking that keeps the groups in order, each as often as it is probable.

    Within a group all distinct arrangements are equally probable, so their product is a uniform list.
    """
    arrangements = [sorted(set(permutations([1] * r + [0] * (n - r)))) for n, r in groups]
    return [tuple(place for part in choice for place in part) for choice in product(*arrangements)]


def brute_ap(ranking_: Sequence[int], cut: int, by: str) -> Fraction:
    top = ranking_[:cut]
    numerator = sum((Fraction(sum(top[: i + 1]), i + 1) for i in range(len(top)) if top[i]), Fraction(0))
    below = {"found": sum(top), "all": sum(ranking_), "min": min(cut, sum(ranking_))}[by]
    return numerator / below if below else Fraction(0)


def histogram(groups: Sequence[Group]) -> NDArray[np.int64]:
    return np.array([[[n for n, _ in groups], [r for _, r in groups]]], np.int64)


CASES: list[list[Group]] = [
    list(case)
    for sizes in product([0, 1, 2, 4], [0, 1, 3], [1, 2])
    for case in product(*[[(n, r) for r in range(n + 1)] for n in sizes])
]


@pytest.mark.parametrize("by", ["found", "all", "min"])
def test_tie_expected_ap_is_the_mean_over_all_orders(by: ranking.Denominator) -> None:
    checked = 0
    for groups in CASES:
        items = sum(n for n, _ in groups)
        every = orders(groups)
        for cut in range(1, items + 2):
            wanted = sum((brute_ap(order, cut, by) for order in every), Fraction(0)) / len(every)
            got = ranking.tie_expected_ap(histogram(groups), cut, by)[0]
            assert got == pytest.approx(float(wanted), abs=1e-13), (groups, cut)
            checked += 1
    assert checked > 1000


def test_tie_expected_ap_of_the_whole_ranking() -> None:
    for groups in CASES:
        every = orders(groups)
        wanted = sum((brute_ap(order, 10**6, "all") for order in every), Fraction(0)) / len(every)
        assert ranking.tie_expected_ap(histogram(groups))[0] == pytest.approx(float(wanted), abs=1e-13)


def test_tie_expected_precision() -> None:
    for groups in CASES:
        every = orders(groups)
        for cut in range(1, 9):
            wanted = np.mean([sum(order[:cut]) / cut for order in every])
            assert ranking.tie_expected_precision(histogram(groups), cut)[0] == pytest.approx(wanted, abs=1e-13)


def test_queries_are_independent_and_shards_add_up() -> None:
    rng = np.random.default_rng(0)
    n = rng.integers(0, 30, (3, 20, 17))
    shards = np.stack([n, rng.binomial(n, 0.3)], axis=2)  # [shards, Q, 2, T]
    whole = shards.sum(0)
    for by in ("found", "all", "min"):
        together = ranking.tie_expected_ap(whole, 50, by)  # type: ignore[arg-type]
        alone = [ranking.tie_expected_ap(whole[q : q + 1], 50, by)[0] for q in range(20)]  # type: ignore[arg-type]
        np.testing.assert_array_equal(together, alone)


def test_large_groups_far_down_keep_their_accuracy() -> None:
    """Sums of reciprocals against exact fractions, where differences of digammas would cancel."""
    for before, places in [(0, 1), (0, 40), (5, 3), (31, 1), (31, 2), (33, 50), (10**6, 1), (10**6, 7), (10**9, 500)]:
        first, second = ranking._reciprocals(np.array([float(before)]), np.array([float(places)]))
        exact = sum(Fraction(1, before + q) for q in range(1, places + 1))
        exact_second = sum(Fraction(q - 1, before + q) for q in range(1, places + 1))
        assert first[0] == pytest.approx(float(exact), rel=2e-15)
        assert second[0] == pytest.approx(float(exact_second), abs=4e-15 * places, rel=1e-12)


def test_ranked_lists() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        order = (rng.random(12) < rng.random()).astype(int)
        for cut in (1, 3, 12, 20):
            for by in ("found", "all", "min"):
                if by == "min" and cut > 12:
                    continue  # R is then the length of the list
                got = ranking.ap_at(order[None, :cut].astype(bool), np.array([order.sum()]), by)[0]  # type: ignore[arg-type]
                assert got == pytest.approx(float(brute_ap(order.tolist(), cut, by)), abs=1e-14)
    np.testing.assert_allclose(ranking.precision_at(np.array([[True, False, True]]), 2), [0.5])
    np.testing.assert_allclose(ranking.precision_at(np.array([[True, False, True]]), 10), [0.2])


def test_by_radius() -> None:
    histograms = np.array([[[0, 2, 2], [0, 1, 2]], [[1, 0, 3], [1, 0, 0]], [[0, 0, 4], [0, 0, 0]]], np.int64)
    got = ranking.by_radius(histograms)
    np.testing.assert_allclose(got["precision"], [1.0, (1 / 2 + 1) / 2, (3 / 4 + 1 / 4 + 0) / 3])
    np.testing.assert_allclose(got["recall"], [1 / 2, (1 / 3 + 1) / 2, 1.0])  # the third query has no relevant image
    assert got["empty"] == [2, 1, 0]


def test_recall_at_k() -> None:
    found, exact = np.array([[1, 2, 3], [7, 8, 9]]), np.array([[3, 1, 5], [4, 5, 6]])
    np.testing.assert_allclose(ranking.recall_at(found, exact), [2 / 3, 0])
    lists = [np.array([3, 4, 1]), np.array([], np.int64)]
    np.testing.assert_allclose(ranking.recall_at(found, lists), [2 / 3, 0])


def test_label_masks_share_a_bit_where_images_share_a_label() -> None:
    labels = [[0], [64, 3], None, [], [3], [130]]
    masks = ranking.label_masks(labels, 131)
    assert masks.shape == (6, 3)
    shared = (masks[:, None] & masks[None]).any(2)
    wanted = [[bool(set(a or []) & set(b or [])) for b in labels] for a in labels]
    np.testing.assert_array_equal(shared, wanted)
    chunked = pa.chunked_array([pa.array(labels[:2], pa.list_(pa.int32())), pa.array(labels[2:], pa.list_(pa.int32()))])
    np.testing.assert_array_equal(ranking.label_masks(chunked, 131), masks)
    with pytest.raises(InvalidInput, match=r"\[0, 64\)"):
        ranking.label_masks(labels, 64)


def test_the_precision_curve_is_precision_at_each_n() -> None:
    relevant = np.random.default_rng(0).random((5, 1203)) < 0.3
    curve = ranking.precision_curve(relevant)
    assert curve["n"] == [1, *range(10, 1001, 10)]
    expected = [np.mean([row[:n].sum() / n for row in relevant]) for n in curve["n"]]
    np.testing.assert_allclose(curve["precision"], expected, rtol=0, atol=1e-14)
    assert ranking.precision_curve(relevant[:, :25])["n"] == [1, 10, 20]
