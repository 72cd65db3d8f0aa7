"""SP: sparse projections. Y. Xia, K. He, P. Kohli and J. Sun, Sparse projections for high-dimensional binary codes,
CVPR 2015.

A baseline: no labels. ITQ without its PCA, for long codes: one semi-orthogonal map R, most entries of which are zero.

    min ||X - B R||^2 + beta ||R - Rbar||^2,  B of -1 and +1,  R R^T = I,  Rbar with at most m entries that are not 0

| paper | here | shape | |
|---|---|---|---|
| X | `centred_ND`, scaled | [n, D] | rows are images |
| R | `rotation_LD` | [L, D] | orthonormal rows; B-step and R-step are ITQ's |
| Rbar | `sparse_LD` | [L, D] | the hash function, sgn(Rbar x) |
| m | `KEPT` L D | | entries kept |
| beta | `BETA` n | | raised from 0 to its value over the iterations |

With rows of R orthonormal, ||X - B R||^2 = const - 2 tr(B^T X R^T), so that every step has a closed form: B is
sgn(X R^T), R the semi-orthogonal matrix nearest to B^T X + beta Rbar, Rbar the largest entries of R.

Each step is checked for being its minimum. The schedule of beta and the scale of X (mean squared length L, that of the
codes) are ours: the paper's own could not be checked, nor could its figures.
"""

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.projections import Projection, centre, check_directions, principal_directions, signs

NAME = "sp"
CITATION = "Xia, He, Kohli and Sun, Sparse projections for high-dimensional binary codes, CVPR 2015"
USES = "features"
ITERATIONS = 50
KEPT = 0.1
BETA = 1.0

Matrix = NDArray[np.float64]


def fit(features_ND: NDArray[np.floating], bits: int, seed: int) -> Projection:
    """A sparse map, by turns of codes, map and its largest entries. Raises InvalidInput for too many bits."""
    check_bits(bits)
    check_directions("SP", bits, features_ND)
    mean_D, centred_ND = centre(features_ND)
    centred_ND *= np.float32(np.sqrt(bits / max(float((centred_ND**2).sum(1).mean(dtype=np.float64)), 1e-30)))
    start_LL, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((bits, bits)))
    rotation_LD = start_LL @ principal_directions(centred_ND, bits).T
    sparse_LD = largest(rotation_LD, KEPT)
    for step in range(ITERATIONS):
        beta = BETA * len(centred_ND) * step / ITERATIONS
        codes_NL = signs(centred_ND @ rotation_LD.T.astype(np.float32)).astype(np.float32)
        rotation_LD = nearest_rotation((codes_NL.T @ centred_ND).astype(np.float64) + beta * sparse_LD)
        sparse_LD = largest(rotation_LD, KEPT)
    return Projection(mean_D.astype(np.float32), sparse_LD.T.astype(np.float32))


def nearest_rotation(target_LD: Matrix) -> Matrix:
    """argmax tr(R^T target) over R R^T = I: U V^T of the target's singular value decomposition."""
    left, _, right = np.linalg.svd(target_LD, full_matrices=False)
    return np.asarray(left @ right, np.float64)


def largest(rotation_LD: Matrix, share: float) -> Matrix:
    """The nearest matrix with this share of entries: the largest of all, by size."""
    kept = max(1, round(share * rotation_LD.size))
    order = np.argsort(-abs(rotation_LD), axis=None, kind="stable")
    sparse_LD = np.zeros(rotation_LD.size)
    sparse_LD[order[:kept]] = rotation_LD.flat[order[:kept]]
    return sparse_LD.reshape(rotation_LD.shape)
