"""SPLH: sequential projection learning. J. Wang, S. Kumar and S.-F. Chang, Sequential projection learning for hashing
with compact codes, ICML 2010.

A baseline: learns from labels, semi-supervised: pair labels of a sample, variance of all. Every new direction attends
to the pairs that the last one got wrong, in what the last ones left of the features.

| paper | here | shape | |
|---|---|---|---|
| X | `left_ND` | [n, D] | centred features, less what the directions so far explain |
| X_l | `sample_SD` | [S, D] | S = 1000 labelled ones of them; not deflated, as in the paper |
| S^k | `pairs_SS` | [S, S] | at first +1: a label is shared, -1: none is |
| M^k | in `leading` | [D, D] | X_l^T S^k X_l + eta X^T X, its leading eigenvector is w_k |
| S~^k | `guess_SS` | [S, S] | X_l w w^T X_l^T |
| T | `wrong` | [S, S] | S~ where its sign is not that of S^k, 0 elsewhere |
| alpha, eta | `STEP`, `ETA` | | S^(k+1) = S^k - alpha T |

Departures: the paper leaves alpha and eta to the user and the scale of S~ to the features. Here S~ is divided by its
mean size, eta weighs both terms by their traces (of X_l^T X_l and X^T X), and alpha = eta = 1, without tuning. Its
figures were not compared; the sequence is checked against a plain loop.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.anchors import check_images
from hashdist.methods.parts.labels import pair_labels
from hashdist.methods.parts.projections import Projection, centre, check_directions

NAME = "splh"
CITATION = "Wang, Kumar and Chang, Sequential projection learning for hashing with compact codes, ICML 2010"
USES = "labels"
SAMPLE = 1000
STEP = 1.0
ETA = 1.0
"""Weight of the variance term."""

Matrix = NDArray[np.float64]


def fit(features_ND: NDArray[np.floating], bits: int, seed: int, labels_NC: NDArray[np.bool_]) -> Projection:
    """Directions one after the other. Raises InvalidInput for more bits than directions."""
    check_bits(bits)
    check_images("SPLH", len(features_ND), 2)
    check_directions("SPLH", bits, features_ND)
    mean_D, centred_ND = centre(features_ND)
    rows_S = np.random.default_rng(seed).permutation(len(features_ND))[:SAMPLE]
    scatter_DD = (centred_ND.T @ centred_ND).astype(np.float64)
    directions_DL = sequence(scatter_DD, centred_ND[rows_S].astype(np.float64), pair_labels(labels_NC[rows_S]), bits)
    return Projection(mean_D.astype(np.float32), directions_DL.astype(np.float32))


def sequence(scatter_DD: Matrix, sample_SD: Matrix, pairs_SS: Matrix, bits: int) -> Matrix:
    """w_1 ... w_L as columns [D, L]; `scatter_DD` is X^T X."""
    share = ETA * float((sample_SD**2).sum()) / max(float(np.trace(scatter_DD)), 1e-30)
    columns: list[Matrix] = []
    for _ in range(bits):
        w_D = leading(sample_SD, pairs_SS, share * scatter_DD)
        columns.append(w_D)
        score_S = sample_SD @ w_D
        guess_SS = np.outer(score_S, score_S)
        guess_SS /= max(float(abs(guess_SS).mean()), 1e-30)
        pairs_SS = pairs_SS - STEP * np.where(guess_SS * pairs_SS < 0, guess_SS, 0.0)
        scatter_DD = deflate(scatter_DD, w_D)
    return np.stack(columns, axis=1)


def leading(sample_SD: Matrix, pairs_SS: Matrix, variance_DD: Matrix) -> Matrix:
    """The leading unit eigenvector of X_l^T S X_l / S + variance, by Lanczos from a fixed start.

    The matrix itself would take longer to write down than its eigenvector takes to find.
    """
    width = len(variance_DD)

    def product(v_D: Matrix) -> Matrix:
        return sample_SD.T @ (pairs_SS @ (sample_SD @ v_D)) / len(sample_SD) + variance_DD @ v_D

    matrix = LinearOperator((width, width), matvec=product, dtype=np.float64)
    _, vectors = eigsh(matrix, k=1, which="LA", v0=np.ones(width))
    return np.asarray(vectors[:, 0], np.float64)


def deflate(scatter_DD: Matrix, w_D: Matrix) -> Matrix:
    """X^T X after X <- X - X w w^T: (I - w w^T) X^T X (I - w w^T) in D^2 steps."""
    image_D = scatter_DD @ w_D
    cross_DD = np.outer(w_D, image_D)
    return scatter_DD - cross_DD - cross_DD.T + (w_D @ image_D) * np.outer(w_D, w_D)
