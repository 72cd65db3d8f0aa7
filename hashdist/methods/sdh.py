"""SDH: supervised discrete hashing. F. Shen, C. Shen, W. Liu and H. T. Shen, CVPR 2015.

A baseline: learns from labels. Codes from which a linear classifier can tell the labels, found as signs, not as
relaxed ones, together with a hash function that predicts them.

    min ||Y - W^T B||^2 + lambda ||W||^2 + nu ||B - F(X)||^2,  B of -1 and +1,  F(x) = P^T phi(x)

| paper | here | shape | |
|---|---|---|---|
| phi(x) | `AnchorKernel`, `kernel_NM` | [n, M] | Gaussian kernel to m = 1000 anchors drawn from the images |
| Y | `labels_NC` | [n, C] | 0/1; several ones where an image has several labels |
| B | `codes_NL` | [n, L] | -1/+1 (rows are images here, columns there) |
| W | `classifier_LC` | [L, C] | G-step: ridge regression |
| P | `directions_ML` | [M, L] | F-step: least squares |
| lambda = 1, nu = 1e-5 | `discrete.CLASSIFIER_RIDGE`, `discrete.NU` | | |

The three steps are those of hashdist/methods/parts/discrete.py. The kernel's width is that of
hashdist/methods/parts/anchors.py, not tuned; the least squares of P have a small ridge, for anchors that are alike.
"""

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.anchors import KernelProjection, anchor_kernel, check_images, draw_anchors
from hashdist.methods.parts.discrete import (
    ALTERNATIONS,
    ANCHORS,
    CLASSIFIER_RIDGE,
    discrete_descent,
    hash_solver,
    ridge,
)
from hashdist.methods.parts.projections import signs

NAME = "sdh"
CITATION = "Shen, Shen, Liu and Shen, Supervised discrete hashing, CVPR 2015"
USES = "labels"


def fit(features_ND: NDArray[np.floating], bits: int, seed: int, labels_NC: NDArray[np.bool_]) -> KernelProjection:
    """Codes and hash function by turns. Raises InvalidInput without training images."""
    check_bits(bits)
    check_images("SDH", len(features_ND), 2)
    kernel, kernel_NM = anchor_kernel(features_ND, draw_anchors(features_ND, ANCHORS, seed), centred=False)
    targets_NC = labels_NC.astype(np.float64)
    codes_NL = signs(np.random.default_rng([seed, 1]).standard_normal((len(features_ND), bits)))
    solver = hash_solver(kernel_NM.astype(np.float64))
    directions_ML = solver @ codes_NL
    for _ in range(ALTERNATIONS):
        classifier_LC = ridge(codes_NL, targets_NC, CLASSIFIER_RIDGE)
        codes_NL = discrete_descent(codes_NL, classifier_LC, targets_NC, kernel_NM @ directions_ML)
        directions_ML = solver @ codes_NL
    return KernelProjection(kernel, directions_ML.astype(np.float32))
