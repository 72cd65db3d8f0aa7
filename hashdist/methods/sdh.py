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
| lambda = 1, nu = 1e-5 | `CLASSIFIER_RIDGE`, `NU` | | |

B-step, discrete cyclic coordinate descent: with all bits but one fixed, Q = Y W^T + nu F(X), q its column of that bit,
v the bit's row of W and B', W' the others,  z = sgn(q - B' W' v).

The kernel's width is hashdist/methods/parts/anchors.py's, not tuned; the least squares of P have a small ridge, for
anchors that are alike.
"""

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.anchors import KernelProjection, anchor_kernel, check_images, sampled
from hashdist.methods.parts.projections import signs

NAME = "sdh"
CITATION = "Shen, Shen, Liu and Shen, Supervised discrete hashing, CVPR 2015"
USES = "labels"
ANCHORS = 1000
ALTERNATIONS = 5
SWEEPS = 10
"""Most rounds over all bits in a B-step."""
CLASSIFIER_RIDGE = 1.0
NU = 1e-5
KERNEL_RIDGE = 1e-6
"""Of the mean diagonal of phi^T phi."""

Matrix = NDArray[np.float64]


def fit(features_ND: NDArray[np.floating], bits: int, seed: int, labels_NC: NDArray[np.bool_]) -> KernelProjection:
    """Codes and hash function by turns. Raises InvalidInput without training images."""
    check_bits(bits)
    check_images("SDH", len(features_ND), 2)
    kernel, kernel_NM = anchor_kernel(features_ND, sampled(features_ND, ANCHORS, seed), centred=False)
    targets_NC = labels_NC.astype(np.float64)
    codes_NL = signs(np.random.default_rng([seed, 1]).standard_normal((len(features_ND), bits)))
    solver = hash_solver(kernel_NM.astype(np.float64))
    directions_ML = solver @ codes_NL
    for _ in range(ALTERNATIONS):
        classifier_LC = ridge(codes_NL, targets_NC, CLASSIFIER_RIDGE)
        codes_NL = discrete_descent(codes_NL, classifier_LC, targets_NC, kernel_NM @ directions_ML)
        directions_ML = solver @ codes_NL
    return KernelProjection(kernel, directions_ML.astype(np.float32))


def ridge(a_NK: Matrix, b_NJ: Matrix, weight: float) -> Matrix:
    """argmin ||b - a w||^2 + weight ||w||^2 = (a^T a + weight I)^-1 a^T b, [K, J]."""
    gram_KK = a_NK.T @ a_NK + weight * np.eye(a_NK.shape[1])
    return np.asarray(np.linalg.solve(gram_KK, a_NK.T @ b_NJ), np.float64)


def hash_solver(kernel_NM: Matrix) -> Matrix:
    """(phi^T phi)^-1 phi^T, [M, n]: P of any codes is this times the codes."""
    gram_MM = kernel_NM.T @ kernel_NM
    gram_MM += KERNEL_RIDGE * np.trace(gram_MM) / len(gram_MM) * np.eye(len(gram_MM))
    return np.asarray(np.linalg.solve(gram_MM, kernel_NM.T), np.float64)


def discrete_descent(codes_NL: Matrix, classifier_LC: Matrix, targets_NC: Matrix, predicted_NL: Matrix) -> Matrix:
    """The B-step: rounds over the bits until none changes, or SWEEPS of them."""
    codes_NL = codes_NL.copy()
    q_NL = targets_NC @ classifier_LC.T + NU * predicted_NL
    inner_LL = classifier_LC @ classifier_LC.T
    for _ in range(SWEEPS):
        before_NL = codes_NL.copy()
        for bit in range(codes_NL.shape[1]):
            others_N = codes_NL @ inner_LL[:, bit] - codes_NL[:, bit] * inner_LL[bit, bit]
            codes_NL[:, bit] = signs(q_NL[:, bit] - others_N)
        if np.array_equal(codes_NL, before_NL):
            break
    return codes_NL
