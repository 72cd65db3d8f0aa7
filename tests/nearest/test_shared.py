"""Rankings and W0 of the shared-neighbour graph against dense matrices."""

import numpy as np
import pytest
from numpy.typing import NDArray

from hashdist.nearest.cosine import self_nearest
from hashdist.nearest.shared import (
    Sparse,
    initial_similarity,
    inverted_lists,
    shared_neighbour_ranking,
    symmetric,
    union_similarity,
)
from tests.worlds.features import like_features


def dense_ranking(near_NK: NDArray[np.int32], k2: int) -> list[list[int]]:
    """Top k2 by (overlap, place in N(i), number) from a dense incidence matrix."""
    n, k1 = near_NK.shape
    lists = np.concatenate([np.arange(n)[:, None], near_NK], axis=1)
    member = np.zeros((n, n), np.int64)
    member[np.arange(n)[:, None], lists] = 1
    overlap = member @ member.T
    place = np.full((n, n), k1 + 1)
    place[np.arange(n)[:, None], lists] = np.arange(k1 + 1)
    orders = [np.lexsort((np.arange(n), place[i], -overlap[i])) for i in range(n)]
    return [[int(j) for j in order if overlap[i, j]][:k2] for i, order in enumerate(orders)]


def as_dense(w: Sparse) -> NDArray[np.bool_]:
    n = len(w.indptr) - 1
    dense = np.zeros((n, n), np.bool_)
    for i in range(n):
        row = w.indices[w.indptr[i] : w.indptr[i + 1]]
        assert (np.diff(row) > 0).all()
        dense[i, row] = True
    return dense


@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (15, 6), (20, 30), (40, 40), (5, 250), (249, 249), (100, 20)])
def test_ranking_and_w0_equal_dense_matrices(k1: int, k2: int) -> None:
    n = 250
    near_NK = self_nearest(like_features(n, 8, seed=k1), k1).rows_MK
    inverted = inverted_lists(near_NK)
    expected = dense_ranking(near_NK, k2)
    ranking = shared_neighbour_ranking(near_NK, inverted, k2, threads=2)
    for i in range(n):
        row = ranking.rows_MK[i]
        assert row[row >= 0].tolist() == expected[i]
        assert (row[len(expected[i]) :] == -1).all()
        assert row[0] == i
        assert ranking.counts_MK[i, 0] == k1 + 1
        assert (np.diff(ranking.counts_MK[i]) <= 0).all()
    plain = np.zeros((n, n), np.bool_)
    for i in range(n):
        plain[i, [j for j in expected[i] if j in near_NK[i]]] = True
    w = initial_similarity(near_NK, inverted, k2)
    np.testing.assert_array_equal(as_dense(w), plain)
    np.testing.assert_array_equal(as_dense(symmetric(w, "or")), plain | plain.T)
    np.testing.assert_array_equal(as_dense(symmetric(w, "and")), plain & plain.T)
    np.testing.assert_array_equal(as_dense(symmetric(w, "none")), plain)


def test_rows_of_w0_do_not_depend_on_the_part() -> None:
    near_NK = self_nearest(like_features(200, 8), 12).rows_MK
    inverted = inverted_lists(near_NK)
    whole = as_dense(initial_similarity(near_NK, inverted, 9))
    for start, stop in ((0, 70), (70, 71), (71, 200), (5, 5)):
        part = initial_similarity(near_NK, inverted, 9, (start, stop), threads=3)
        degrees = np.diff(part.indptr)
        assert len(degrees) == stop - start
        np.testing.assert_array_equal(degrees, whole[start:stop].sum(1))
        np.testing.assert_array_equal(part.indices, np.nonzero(whole[start:stop])[1])


def test_the_papers_distance_ranks_as_the_overlap_does() -> None:
    """1 / (1 + |W_i - W_j|) of rows of +1 and -1 (DSAH, Eq 8) falls where the overlap falls."""
    near_NK = self_nearest(like_features(150, 8), 10).rows_MK
    ranking = shared_neighbour_ranking(near_NK, inverted_lists(near_NK), 150)
    w = -np.ones((150, 150))
    np.put_along_axis(w, near_NK.astype(np.int64), 1, axis=1)
    np.fill_diagonal(w, 1)
    for i in range(150):
        row = ranking.rows_MK[i][ranking.rows_MK[i] >= 0]
        paper = 1 / (1 + np.linalg.norm(w[i] - w[row], axis=1))
        assert (np.diff(paper) <= 1e-12).all()


def test_w0_without_edges() -> None:
    empty = Sparse(np.zeros(4, np.int64), np.empty(0, np.int32))
    assert as_dense(symmetric(empty, "or")).sum() == 0
    lonely = np.array([[1], [2], [0]], np.int32)
    alone = initial_similarity(lonely, inverted_lists(lonely), 1)
    assert as_dense(alone).sum() == 0  # the one place goes to the image itself


def test_union_is_that_of_the_lists_of_the_most_overlapping_images() -> None:
    n, k1, k2 = 300, 9, 5
    near = self_nearest(np.random.default_rng(3).normal(size=(n, 6)).astype(np.float32), k1).rows_MK
    listed = np.eye(n, dtype=bool)
    np.put_along_axis(listed, near.astype(np.int64), True, axis=1)
    ranked = shared_neighbour_ranking(near, inverted_lists(near), k2).rows_MK
    dense = np.stack([listed[row[row >= 0]].any(0) for row in ranked]) & ~np.eye(n, dtype=bool)
    for start, stop in ((0, n), (37, 200)):
        found = union_similarity(near, inverted_lists(near), k2, (start, stop))
        assert np.array_equal(np.diff(found.indptr), dense[start:stop].sum(1))
        assert np.array_equal(found.indices, np.nonzero(dense[start:stop])[1])
    assert (dense[np.arange(n)[:, None], near]).all()  # S contains every image's own list
