"""LFH: latent factor hashing. P. Zhang, W. Zhang, W.-J. Li and M. Guo, Supervised hashing with latent factor models,
SIGIR 2014.

A baseline: learns from labels. Each image has a latent factor whose inner products explain the pair labels; the bits
are the factors' signs, for new images by linear regression.

| paper | here | shape | |
|---|---|---|---|
| U | `factors_NL` | [n, L] | prior N(0, beta) |
| S | `shared_NS` | [n, S] | 1: a label is shared, 0: none is |
| Theta_ij | | | u_i . u_j / 2; p(s_ij = 1) = a_ij = 1 / (1 + exp(-Theta_ij)) |
| m | `bits` | | images drawn each turn, against whose factors all others are updated |
| H | `bound_LL` | [L, L] | a bound on the second derivative, not the derivative itself |
| W | `directions_DL` | [D, L] | ridge regression of U on the features, lambda_e = 1 |
| beta = 30 | `PRIOR` | | |

    log p(U | S) = sum over pairs of s Theta - log(1 + e^Theta)  -  ||U||^2 / (2 beta)

The paper's stochastic learning: a turn draws m images Omega and sees the pairs (i, j), j in Omega, in both orders. The
factors of the images outside Omega then depend on those in Omega alone, so that all of them are updated at once,
u_i <- u_i + H^-1 (gradient), which can only raise log p of these pairs. (Factors of Omega stand still for that turn.)

Features are scaled to a root mean square length of 1, else lambda_e would mean something else for every backbone.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.anchors import check_images
from hashdist.methods.parts.projections import Projection, centre

NAME = "lfh"
CITATION = "Zhang, Zhang, Li and Guo, Supervised hashing with latent factor models, SIGIR 2014"
USES = "labels"
TURNS = 50
PRIOR = 30.0
REGRESSION_RIDGE = 1.0

Matrix = NDArray[np.float64]


def fit(features_ND: NDArray[np.floating], bits: int, seed: int, labels_NC: NDArray[np.bool_]) -> Projection:
    """Factors of the training images, and the linear map to them. Raises InvalidInput for fewer images than bits."""
    check_bits(bits)
    check_images("LFH", len(features_ND), bits + 1)
    rng = np.random.default_rng(seed)
    factors_NL = rng.standard_normal((len(features_ND), bits))
    labels_NC = labels_NC.astype(np.float32)
    for _ in range(TURNS):
        drawn_S, others_R = np.split(rng.permutation(len(features_ND)), [bits])
        shared_RS = labels_NC[others_R] @ labels_NC[drawn_S].T > 0
        factors_NL[others_R] = ascend(factors_NL[others_R], factors_NL[drawn_S], shared_RS)
    mean_D, centred_ND = centre(features_ND)
    length = np.sqrt(float((centred_ND**2).sum(1).mean(dtype=np.float64))) or 1.0
    directions_DL = regression(centred_ND / np.float32(length), factors_NL) / length
    return Projection(mean_D.astype(np.float32), directions_DL.astype(np.float32))


def ascend(factors_RL: Matrix, drawn_SL: Matrix, shared_RS: NDArray[np.bool_]) -> Matrix:
    """The factors after one step up the log posterior of their pairs with the drawn images, each in both orders."""
    excess_RS = shared_RS - expit(factors_RL @ drawn_SL.T / 2)
    slope_RL = excess_RS @ drawn_SL - factors_RL / PRIOR
    # second derivative -sum_j a (1 - a) u_j u_j^T / 2 - I / beta, and a (1 - a) <= 1 / 4
    bound_LL = drawn_SL.T @ drawn_SL / 8 + np.eye(drawn_SL.shape[1]) / PRIOR
    return factors_RL + np.asarray(np.linalg.solve(bound_LL, slope_RL.T), np.float64).T


def regression(features_ND: NDArray[np.float32], factors_NL: Matrix) -> Matrix:
    """W = (X^T X + lambda_e I)^-1 X^T U, [D, L]."""
    gram_DD = (features_ND.T @ features_ND).astype(np.float64) + REGRESSION_RIDGE * np.eye(features_ND.shape[1])
    right_DL = features_ND.T.astype(np.float64) @ factors_NL
    return np.asarray(np.linalg.solve(gram_DD, right_DL), np.float64)
