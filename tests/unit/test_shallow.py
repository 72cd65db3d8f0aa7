"""Shallow methods without labels, each against what its paper says it is."""

from itertools import product

import faiss
import numpy as np
import pytest
from sklearn.decomposition import PCA

from hashdist.errors import InvalidInput
from hashdist.methods import itq, pcah, sh


def cloud(n: int = 500, width: int = 24, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Clusters with unequal variances, off the origin."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((6, width)) * 2
    noise = rng.standard_normal((n, width)) * np.linspace(2, 0.3, width)
    return (centres[rng.integers(0, 6, n)] + noise + 3).astype(dtype)


def up_to_sign(a_NL: np.ndarray, b_NL: np.ndarray) -> float:
    """The largest difference of two matrices whose columns may differ in sign, relative to the largest entry."""
    flips = np.where((a_NL * b_NL).sum(0) < 0, -1, 1)
    return float(abs(a_NL - b_NL * flips).max() / abs(a_NL).max())


class TestPcah:
    def test_outputs_are_the_scores_of_scikit_learn_and_faiss(self) -> None:
        features = cloud()
        z = pcah.fit(features, 8, 0)(features)
        assert up_to_sign(PCA(8, svd_solver="full").fit_transform(features.astype(np.float64)), z) < 1e-5
        reference = faiss.PCAMatrix(24, 8)
        reference.train(features)
        assert up_to_sign(reference.apply_py(features), z) < 1e-4

    def test_no_more_bits_than_directions(self) -> None:
        with pytest.raises(InvalidInput, match=r"PCAH finds at most min.* = 24 bits, found 32; use LSH"):
            pcah.fit(cloud(), 32, 0)
        with pytest.raises(InvalidInput, match="= 0 bits"):
            pcah.fit(cloud()[:0], 32, 0)


class TestSh:
    @pytest.mark.parametrize("bits", [8, 24, 48])
    def test_chosen_modes_have_the_smallest_analytic_eigenvalues(self, bits: int) -> None:
        range_P = np.random.default_rng(1).uniform(0.5, 9, 6)
        epsilon = 0.05
        eigenvalues = {
            (d, k): 1 - np.exp(-(epsilon**2) / 2 * (k * np.pi / range_P[d]) ** 2)
            for d, k in product(range(6), range(1, 200))
        }
        directions, half_waves = sh.smallest_modes(range_P, bits)
        wanted = sorted(eigenvalues, key=lambda mode: eigenvalues[mode])[:bits]
        assert list(zip(directions.tolist(), half_waves.tolist(), strict=True)) == wanted

    def test_outputs_are_the_paper_s_eigenfunctions_of_principal_coordinates(self) -> None:
        features = cloud()
        coordinates = PCA(16, svd_solver="full").fit_transform(features.astype(np.float64))
        encoder = sh.fit(features, 16, 0)
        z = encoder(features)
        low, high = coordinates.min(0), coordinates.max(0)
        directions, half_waves = sh.smallest_modes(high - low, 16)
        for bit, (d, k) in enumerate(zip(directions, half_waves, strict=True)):
            phase = k * np.pi / (high[d] - low[d]) * (coordinates[:, d] - low[d])
            mirrored = k * np.pi / (high[d] - low[d]) * (high[d] - coordinates[:, d])  # if PCA's sign differs
            wanted = [np.sin(np.pi / 2 + phase), np.sin(np.pi / 2 + mirrored)]
            assert min(abs(z[:, bit] - w).max() for w in wanted) < 1e-4

    def test_more_bits_than_directions_cut_a_direction_more_often(self) -> None:
        features = cloud(width=3)
        encoder = sh.fit(features, 16, 0)
        assert len(set(zip(encoder.coordinate_L, encoder.frequencies_L, strict=True))) == 16
        assert set(encoder.coordinate_L) == {0, 1, 2}

    def test_directions_without_variance_carry_no_bit(self) -> None:
        features = np.zeros((50, 5), np.float32)
        features[:, 2] = np.linspace(0, 1, 50)
        encoder = sh.fit(features, 8, 0)
        assert np.isfinite(encoder(features)).all()
        assert len(set(encoder.coordinate_L)) == 1

    def test_bad_input(self) -> None:
        with pytest.raises(InvalidInput, match="SH needs features that differ"):
            sh.fit(np.ones((20, 5), np.float32), 8, 0)
        with pytest.raises(InvalidInput, match="found none"):
            sh.fit(cloud()[:0], 8, 0)


def test_itq_reaches_the_objective_of_faiss() -> None:
    """||B - V R||^2 of both rotations of the same principal components."""
    features = cloud(2000)
    centred = features - features.mean(0, dtype=np.float64).astype(np.float32)
    z = itq.fit(features, 16, 0)(features)
    pca = pcah.fit(features, 16, 0).directions_DL
    reference = faiss.ITQMatrix(16)
    reference.train(centred @ pca)

    def loss(z_NL: np.ndarray) -> float:
        return float(((np.where(z_NL >= 0, 1, -1) - z_NL) ** 2).sum())

    assert loss(z) < 1.02 * loss(reference.apply_py(centred @ pca))
