"""KSH: supervised hashing with kernels. W. Liu, J. Wang, R. Ji, Y.-G. Jiang and S.-F. Chang, CVPR 2012.

A baseline: learns from labels. The inner products of codes are fitted to the pair labels of a sample of the training
images, one bit after the other.

| paper | here | shape | |
|---|---|---|---|
| m = 300 | `ANCHORS` | | drawn from the training images |
| l = 1000 | `SAMPLE` | | labelled images, drawn likewise (all where there are fewer) |
| S | `similarity_SS` | [S, S] | +1: a label is shared, -1: none is |
| kbar(x) | `AnchorKernel`, `kernel_SM` | [S, M] | Gaussian kernel less its mean over the training images |
| A = [a_1 ... a_r] | `directions_ML` | [M, L] | h_k(x) = sgn(kbar(x)^T a_k) |
| R_k | `residue_SS` | [S, S] | r S - sum of h h^T over the bits so far, r = L |

The objective, ||H^T H / r - S||^2 over sign vectors, is treated greedily: bit k maximises h^T R_(k-1) h, first with
the sign left out (a generalised eigenvalue problem), then with 2 / (1 + e^-x) - 1 in its place (gradient steps from
there); the better of the two by the sign itself is taken.

The kernel's width is hashdist/methods/parts/anchors.py's, not tuned.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.anchors import KernelProjection, anchor_kernel, check_images, draw_anchors
from hashdist.methods.parts.labels import pair_labels
from hashdist.methods.parts.projections import signs

NAME = "ksh"
CITATION = "Liu, Wang, Ji, Jiang and Chang, Supervised hashing with kernels, CVPR 2012"
USES = "labels"
ANCHORS = 300
SAMPLE = 1000
STEPS = 50
"""Accelerated gradient steps a bit."""
RIDGE = 1e-6
"""Of the trace of Kbar^T Kbar, so that it can be inverted with duplicate anchors."""

Matrix = NDArray[np.float64]


def fit(features_ND: NDArray[np.floating], bits: int, seed: int, labels_NC: NDArray[np.bool_]) -> KernelProjection:
    """Greedy bits on the pairs of a sample. Raises InvalidInput without training images."""
    check_bits(bits)
    check_images("KSH", len(features_ND), 2)
    with threadpool_limits(1):  # greedy bits magnify what threads do to the last digit
        kernel, kernel_NM = anchor_kernel(features_ND, draw_anchors(features_ND, ANCHORS, seed), centred=True)
        rows_S = np.random.default_rng([seed, 1]).permutation(len(features_ND))[:SAMPLE]
        directions_ML = greedy_bits(kernel_NM[rows_S].astype(np.float64), pair_labels(labels_NC[rows_S]), bits)
    return KernelProjection(kernel, directions_ML.astype(np.float32))


def greedy_bits(kernel_SM: Matrix, similarity_SS: Matrix, bits: int) -> Matrix:
    """A [M, L], column by column."""
    residue_SS = bits * similarity_SS
    gram_MM = kernel_SM.T @ kernel_SM
    gram_MM += RIDGE * np.trace(gram_MM) * np.eye(len(gram_MM)) + 1e-12 * np.eye(len(gram_MM))
    columns = []
    for _ in range(bits):
        relaxed_M = spectral(kernel_SM, residue_SS, gram_MM)
        smooth_M = smooth(kernel_SM, residue_SS, relaxed_M)
        found_M = max(relaxed_M, smooth_M, key=lambda a_M: gain(kernel_SM, residue_SS, a_M))
        h_S = signs(kernel_SM @ found_M)
        residue_SS = residue_SS - np.outer(h_S, h_S)
        columns.append(found_M)
    return np.stack(columns, axis=1)


def gain(kernel_SM: Matrix, residue_SS: Matrix, a_M: Matrix) -> float:
    """h^T R h of the bit itself; the squared residue falls by 2 h^T R h - l^2 with it."""
    h_S = signs(kernel_SM @ a_M)
    return float(h_S @ residue_SS @ h_S)


def spectral(kernel_SM: Matrix, residue_SS: Matrix, gram_MM: Matrix) -> Matrix:
    """argmax a^T Kbar^T R Kbar a with a^T Kbar^T Kbar a = l: the leading generalised eigenvector."""
    last = len(gram_MM) - 1
    _, vectors = eigh(kernel_SM.T @ residue_SS @ kernel_SM, gram_MM, subset_by_index=[last, last])
    a_M: Matrix = vectors[:, 0] * np.sqrt(len(kernel_SM))
    return a_M


def smooth(kernel_SM: Matrix, residue_SS: Matrix, start_M: Matrix) -> Matrix:
    """Nesterov's steps down g(a) = -b^T R b with b = 2 / (1 + exp(-Kbar a)) - 1 = tanh(Kbar a / 2).

    The step is found by backtracking, starting from the last step's.
    """
    best_M = here_M = ahead_M = start_M
    weight, step = 1.0, 1.0 / max(float(abs(gradient(kernel_SM, residue_SS, start_M)[1]).max()), 1e-12)
    best = value = np.inf
    for _ in range(STEPS):
        value, slope_M = gradient(kernel_SM, residue_SS, ahead_M)
        slope2 = float(slope_M @ slope_M)
        for _ in range(30):
            next_M = ahead_M - step * slope_M
            lower, _ = gradient(kernel_SM, residue_SS, next_M)
            if lower <= value - step / 2 * slope2:
                break
            step /= 2
        if lower < best:
            best, best_M = lower, next_M
        grown = (1 + np.sqrt(1 + 4 * weight**2)) / 2
        ahead_M = next_M + (weight - 1) / grown * (next_M - here_M)
        here_M, weight, step = next_M, grown, step * 1.5
    return best_M


def gradient(kernel_SM: Matrix, residue_SS: Matrix, a_M: Matrix) -> tuple[float, Matrix]:
    """g and its gradient -Kbar^T ((R b) o (1 - b o b)); o is the product of entries."""
    b_S = np.tanh(kernel_SM @ a_M / 2)
    towards_S = residue_SS @ b_S
    return -float(b_S @ towards_S), -kernel_SM.T @ (towards_S * (1 - b_S * b_S))
