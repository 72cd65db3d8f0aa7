"""Exact neighbours against float64 and rational arithmetic."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.nearest import cosine
from hashdist.nearest.cosine import nearest, score_error, self_nearest, similarity
from hashdist.nearest.shared import (
    inverted_lists,
    shared_neighbour_ranking,
)
from tests.worlds.features import like_features


def cosines(x_ND: NDArray[np.generic], y_ND: NDArray[np.generic]) -> NDArray[np.float64]:
    def unit(rows: NDArray[np.generic]) -> NDArray[np.float64]:
        wide = rows.astype(np.float64)
        norms = np.linalg.norm(wide, axis=1, keepdims=True)
        return np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)

    return unit(x_ND) @ unit(y_ND).T


def float64_search(x_ND: NDArray[np.generic], k: int) -> NDArray[np.int64]:
    scores = cosines(x_ND, x_ND)
    np.fill_diagonal(scores, -2)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def rational_search(x_ND: NDArray[np.generic], k: int) -> list[list[int]]:
    """Neighbours in exact arithmetic, for integer rows: order of cosines is that of sign(d) d^2 / (a b)."""
    rows = [[int(value) for value in row] for row in x_ND]
    norms = [sum(value * value for value in row) for row in rows]

    def key(i: int, j: int) -> tuple[Fraction, int]:
        dot = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        square = Fraction(dot * abs(dot), norms[i] * norms[j]) if norms[i] and norms[j] else Fraction(0)
        return -square, j

    n = len(rows)
    return [sorted((j for j in range(n) if j != i), key=lambda j: key(i, j))[:k] for i in range(n)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("n", "width", "k"), [(2, 1, 1), (300, 17, 5), (900, 129, 300), (700, 1280, 699)])
def test_self_join_equals_a_float64_search_whatever_the_blocks(n: int, width: int, k: int, dtype: type) -> None:
    rng = np.random.default_rng(n)
    for features_ND in (like_features(n, width).astype(dtype), rng.standard_normal((n, width)).astype(dtype)):
        if width == 1:
            features_ND = np.array([[1], [-2]], dtype)
        expected = float64_search(features_ND, k)
        for block, threads in ((512, 1), (64, 2), (100, 3)):
            found = self_nearest(features_ND, k, block=block, threads=threads)
            np.testing.assert_array_equal(found.rows_MK, expected)
        assert found.rows_MK.dtype == np.int32
        assert 0 <= found.rescored <= 2 * n * k + n


def test_parts_are_rows_of_the_whole() -> None:
    features_ND = like_features(400, 40)
    whole = self_nearest(features_ND, 30, block=64).rows_MK
    for start, stop in ((0, 400), (0, 1), (57, 200), (399, 400), (120, 120)):
        part = self_nearest(features_ND, 30, rows=(start, stop), block=64, threads=2).rows_MK
        np.testing.assert_array_equal(part, whole[start:stop])


def test_queries_against_a_base() -> None:
    features_ND = like_features(500, 33)
    queries_QD, base_ND = features_ND[:70], features_ND[50:]
    expected = np.argsort(-cosines(queries_QD, base_ND), axis=1, kind="stable")
    for k in (1, 20, 450):
        found = nearest(queries_QD, base_ND, k, block=64, threads=2)
        np.testing.assert_array_equal(found, expected[:, :k])
    assert (nearest(base_ND, base_ND, 1)[:, 0] == np.arange(450)).all()


def test_memory_mapped_and_strided_features(tmp_path: Path) -> None:
    features_ND = like_features(200, 24).astype(np.float16)
    np.save(tmp_path / "features.npy", features_ND)
    expected = float64_search(features_ND, 9)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    np.testing.assert_array_equal(self_nearest(mapped, 9).rows_MK, expected)
    wide = np.repeat(features_ND, 2, axis=1)
    np.testing.assert_array_equal(self_nearest(wide[:, ::2], 9).rows_MK, expected)
    np.testing.assert_array_equal(self_nearest(np.asfortranarray(features_ND), 9).rows_MK, expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(3, 24).flatmap(lambda n: arrays(np.int8, (n, 4), elements=st.integers(-3, 3))),
    k=st.integers(1, 8),
    block=st.sampled_from([2, 7, 64]),
    half=st.booleans(),
)
def test_ties_of_small_integers_are_those_of_real_numbers(
    rows: NDArray[np.int8], k: int, block: int, half: bool
) -> None:
    features_ND = rows.astype(np.float16 if half else np.float32)
    k = min(k, len(rows) - 1)
    assert self_nearest(features_ND, k, block=block, threads=2).rows_MK.tolist() == rational_search(rows, k)


@pytest.mark.parametrize("rows", [64, 1500])
def test_many_ties_and_full_lists(rows: int) -> None:
    """More equal scores than a list has room for: equal rows, zero rows, orthogonal rows, in any mixture."""
    rng = np.random.default_rng(1)
    k = 20
    same = np.tile(like_features(1, 30), (rows, 1))
    np.testing.assert_array_equal(self_nearest(same, k, block=50).rows_MK, _others(rows, k))
    np.testing.assert_array_equal(self_nearest(np.zeros((rows, 30), np.float32), k, block=50).rows_MK, _others(rows, k))
    kinds = np.eye(7, 30, dtype=np.float32)[rng.integers(0, 7, rows)] * rng.integers(0, 3, (rows, 1)).astype(np.float32)
    expected = np.argsort(-_exact_of_kinds(kinds), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(self_nearest(kinds, k, block=50, threads=2).rows_MK, expected)


def _others(n: int, k: int) -> NDArray[np.int64]:
    return np.array([[j for j in range(k + 1) if j != i][:k] for i in range(n)])


def _exact_of_kinds(kinds: NDArray[np.float32]) -> NDArray[np.float64]:
    scores = np.sign(kinds @ kinds.T).astype(np.float64)
    np.fill_diagonal(scores, -2)
    return scores


def test_near_ties_that_float32_cannot_tell_apart() -> None:
    """Copies of one row with one bit changed: their similarities differ by less than a float32 shows."""
    rng = np.random.default_rng(2)
    base = np.abs(rng.standard_normal(200)).astype(np.float32)
    features_ND = np.tile(base, (300, 1))
    for i in range(300):
        column = rng.integers(0, 200)
        features_ND[i, column] = np.nextafter(features_ND[i, column], np.float32(9), dtype=np.float32)
    found = self_nearest(features_ND, 40, block=64).rows_MK
    wide = features_ND.astype(np.longdouble)
    for i in range(0, 300, 37):
        values = similarity(np.repeat(features_ND[i : i + 1], 300, axis=0), features_ND)
        exact = (wide @ wide[i]) / np.sqrt((wide**2).sum(1) * (wide[i] ** 2).sum())
        np.testing.assert_allclose(values, exact.astype(np.float64), rtol=0, atol=4e-16)
        order = np.lexsort((np.arange(300), -values))
        np.testing.assert_array_equal(found[i], order[order != i][:40])


def test_scores_stay_within_the_stated_error() -> None:
    """On data that adds up rounding errors of one sign as far as it goes, and on ordinary data."""
    rng = np.random.default_rng(3)
    for width in (5, 128, 1280, 4096):
        assert score_error(width) < 3e-5
        growing = np.sort(rng.random((200, width)).astype(np.float32), axis=1)
        for features_ND in (growing, like_features(200, width), rng.standard_normal((200, width)).astype(np.float32)):
            base = cosine._Base.of(features_ND, 1)
            search = cosine._Search(base, base, 200, 10, 1, 256)
            units = base.units(0, 200)
            scores = search._product(units, units)
            assert np.abs(scores - cosines(features_ND, features_ND)).max() < score_error(width)


def test_similarity_is_exact_where_float64_is() -> None:
    x = np.array([[3, 4], [1, 0], [0, 0], [-1, 0], [65504, 0], [6e-8, 0]], np.float16)
    y = np.array([[4, 3], [0, 1], [1, 1], [2, 0], [65504, 0], [1, 0]], np.float16)
    np.testing.assert_array_equal(similarity(x, y), [24 / 25, 0, 0, -1, 1, 1])
    big = np.array([[3e38, -3e38], [1e-45, 0]], np.float32)
    np.testing.assert_array_equal(similarity(big, big), [1, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_that_are_not_finite_are_refused(bad: float, dtype: type) -> None:
    features_ND = like_features(50, 70).astype(dtype)
    features_ND[7, 69] = bad
    with pytest.raises(InvalidInput, match=r"in 1 of 50 rows \(the first: 7\)"):
        self_nearest(features_ND, 3)


def test_refusals() -> None:
    features_ND = like_features(10, 4)
    for k in (0, 10, 11):
        with pytest.raises(InvalidInput, match=f"found k = {k} and n = 10"):
            self_nearest(features_ND, k)
    with pytest.raises(InvalidInput, match="found k = 11 and n = 10"):
        nearest(features_ND, features_ND, 11)
    with pytest.raises(InvalidInput, match="float16 or float32"):
        self_nearest(features_ND.astype(np.float64), 3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="one dtype and width"):
        nearest(features_ND[:, :3], features_ND, 2)
    with pytest.raises(InvalidInput, match="rows must lie within"):
        self_nearest(features_ND, 2, rows=(3, 11))
    near = self_nearest(features_ND, 2).rows_MK
    with pytest.raises(InvalidInput, match="k2 must be at least 1"):
        shared_neighbour_ranking(near, inverted_lists(near), 0)


def test_kernels_work_where_nothing_can_be_cached(tmp_path: Path) -> None:
    """An installation that cannot be written to, by a user without a home."""
    root = Path(cosine.__file__).parents[2]
    code = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "import numpy as np; from hashdist.nearest import cosine\n"
        "x = np.eye(5, dtype='f4'); print(cosine.self_nearest(x, 2).rows_MK[4].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True
    )
    assert done.stdout.decode().strip() == "[0, 1]", done.stderr.decode()
