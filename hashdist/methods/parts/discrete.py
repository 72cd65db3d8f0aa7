"""Codes that stay signs while they are fitted to labels: the steps of SDH (Shen et al., CVPR 2015), by turns.

    min ||Y - B W||^2 + lambda ||W||^2 + nu ||B - F(X)||^2,  B [n, L] of -1 and +1,  F(x) = phi(x) P

G-step: W by ridge regression (`ridge`). F-step: P by least squares (`hash_solver`). B-step, discrete cyclic coordinate
descent (`discrete_descent`): with all bits but one fixed, Q = Y W^T + nu F(X), q its column of that bit, v the row of
the bit in W, and B', W' the others,  z = sgn(q - B' W' v).
"""

import numpy as np
from numpy.typing import NDArray

from hashdist.methods.parts.projections import signs

ANCHORS = 1000
ALTERNATIONS = 5
SWEEPS = 10
"""Most rounds over all bits in a B-step."""
CLASSIFIER_RIDGE = 1.0
NU = 1e-5
KERNEL_RIDGE = 1e-6
"""Of the mean diagonal of phi^T phi."""

Matrix = NDArray[np.float64]


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
