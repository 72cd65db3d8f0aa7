"""RSDH: robust supervised discrete hashing: SDH (sdh.py) with a Cauchy loss where SDH has squared errors.

A baseline: learns from labels. An image whose labels no code explains, wrong ones say, weighs less.

    min sum_i c^2 log(1 + r_i / c^2) + lambda ||W||^2 + nu ||B - F(X)||^2,  r_i = ||y_i - W^T b_i||^2

| symbol | here | shape | |
|---|---|---|---|
| Y, B, W, P, phi | as in sdh.py | | |
| r_i | `squares_N` | [n] | squared error of the labels of an image |
| omega_i | `weights_N` | [n] | 1 / (1 + r_i / c^2) |
| c^2 | `scale` | | the mean of r after the first G-step |

As a function of r the loss lies below its tangents, whose slope is omega: lowering sum omega_i r_i lowers the loss.
With omega fixed, the G-step is SDH's on rows times sqrt(omega), the B-step SDH's with nu / omega_i. As c grows, it
becomes SDH.

Departure: the paper was not at hand, only the sentence "SDH with Cauchy loss on the label decomposition". The formula,
c and the constants (SDH's) are our reading of it, and no published figure could be compared. Checked is that every
step lowers the objective as written here, and that c without bound gives SDH.
"""

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.anchors import KernelProjection, anchor_kernel, check_images, draw_anchors
from hashdist.methods.parts.discrete import (
    ALTERNATIONS,
    ANCHORS,
    CLASSIFIER_RIDGE,
    Matrix,
    discrete_descent,
    hash_solver,
    ridge,
)
from hashdist.methods.parts.projections import signs

NAME = "rsdh"
CITATION = "Robust SDH with a Cauchy loss, after Shen, Shen, Liu and Shen, Supervised discrete hashing, CVPR 2015"
USES = "labels"


def fit(
    features_ND: NDArray[np.floating], bits: int, seed: int, labels_NC: NDArray[np.bool_], scale: float | None = None
) -> KernelProjection:
    """Codes and hash function by turns; `scale` is c^2. Raises InvalidInput without training images."""
    check_bits(bits)
    check_images("RSDH", len(features_ND), 2)
    kernel, kernel_NM = anchor_kernel(features_ND, draw_anchors(features_ND, ANCHORS, seed), centred=False)
    targets_NC = labels_NC.astype(np.float64)
    codes_NL = signs(np.random.default_rng([seed, 1]).standard_normal((len(features_ND), bits)))
    solver = hash_solver(kernel_NM.astype(np.float64))
    directions_ML = solver @ codes_NL
    weights_N = np.ones(len(features_ND))
    for _ in range(ALTERNATIONS):
        classifier_LC = weighted_ridge(codes_NL, targets_NC, weights_N)
        squares_N = errors(codes_NL, classifier_LC, targets_NC)
        if scale is None:
            scale = max(float(squares_N.mean()), 1e-12)
        weights_N = 1 / (1 + squares_N / scale)
        predicted_NL = kernel_NM @ directions_ML
        codes_NL = discrete_descent(codes_NL, classifier_LC, targets_NC, predicted_NL / weights_N[:, None])
        directions_ML = solver @ codes_NL
        weights_N = 1 / (1 + errors(codes_NL, classifier_LC, targets_NC) / scale)
    return KernelProjection(kernel, directions_ML.astype(np.float32))


def errors(codes_NL: Matrix, classifier_LC: Matrix, targets_NC: Matrix) -> Matrix:
    """r_i [n]."""
    squares_N: Matrix = ((targets_NC - codes_NL @ classifier_LC) ** 2).sum(1)
    return squares_N


def weighted_ridge(codes_NL: Matrix, targets_NC: Matrix, weights_N: Matrix) -> Matrix:
    """argmin over W of sum omega_i ||y_i - W^T b_i||^2 + lambda ||W||^2, [L, C]."""
    root_N1 = np.sqrt(weights_N)[:, None]
    return ridge(codes_NL * root_N1, targets_NC * root_N1, CLASSIFIER_RIDGE)
