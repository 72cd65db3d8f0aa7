"""LSH and ITQ: what makes them what they are."""

import numpy as np
import pytest

from hashdist.ground.bits import hamming, pack
from hashdist.ground.errors import InvalidInput
from hashdist.methods import itq, lsh
from hashdist.methods.parts.projections import principal_directions


def clusters(n: int = 600, width: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((6, width)) * 2
    labels = rng.integers(0, 6, n)
    return (centres[labels] + rng.standard_normal((n, width)) + 5).astype(np.float32), labels


@pytest.mark.parametrize("method", [lsh, itq])
def test_same_seed_same_codes_and_other_seeds_others(method) -> None:
    features, _ = clusters()
    codes = [pack(method.fit(features, 16, seed)(features)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()
    assert method.fit(features, 16, 0)(features[:3]).shape == (3, 16)


def test_lsh_distances_estimate_angles() -> None:
    """The probability that a bit differs is angle / pi."""
    features, _ = clusters(50)
    encoder = lsh.fit(features, 4096, 0)
    centred = features - features.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    codes = pack(encoder(features))
    angles = np.arccos(np.clip(unit[0] @ unit[1:].T, -1, 1)) / np.pi
    np.testing.assert_allclose(hamming(codes[0], codes[1:]) / 4096, angles, atol=0.04)


def test_itq_projects_on_the_leading_directions_and_only_rotates_them() -> None:
    features, _ = clusters()
    encoder = itq.fit(features, 8, 0)
    weights = encoder.directions_DL.astype(np.float64)
    np.testing.assert_allclose(weights.T @ weights, np.eye(8), atol=1e-5)
    centred = features - features.mean(0)
    _, _, right = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(right[:8].T @ right[:8], weights @ weights.T, atol=1e-4)


def test_itq_loses_less_when_signs_are_taken_than_pca_does() -> None:
    features, _ = clusters()
    centred = (features - features.mean(0)).astype(np.float64)
    v = centred @ principal_directions(centred.astype(np.float32), 16)
    rotated = v @ itq._rotation(v, np.random.default_rng(0))

    def loss(z: np.ndarray) -> float:
        return float(((np.sign(z) - z) ** 2).sum())

    assert loss(rotated) < 0.98 * loss(v)


def test_itq_with_fewer_images_than_dimensions() -> None:
    features, _ = clusters(30, width=90)
    weights = itq.fit(features, 16, 0).directions_DL.astype(np.float64)
    np.testing.assert_allclose(weights.T @ weights, np.eye(16), atol=1e-4)


def test_itq_separates_clusters_better_than_lsh() -> None:
    features, labels = clusters()

    def gap(method) -> float:
        codes = pack(method.fit(features, 16, 0)(features))
        distances = np.stack([hamming(code, codes) for code in codes])
        same = labels[:, None] == labels
        return float(distances[~same].mean() - distances[same].mean())

    assert gap(itq) > gap(lsh) > 1


def test_bad_input() -> None:
    features, _ = clusters(20, 10)
    with pytest.raises(InvalidInput, match="at most min"):
        itq.fit(features, 16, 0)
    with pytest.raises(InvalidInput, match="multiple of 8"):
        lsh.fit(features, 12, 0)
    with pytest.raises(InvalidInput, match="found none"):
        lsh.fit(features[:0], 16, 0)
