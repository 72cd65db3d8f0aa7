"""KMH: K-means hashing. K. He, F. Wen and J. Sun, K-means hashing: an affinity-preserving quantization method for
learning binary compact codes, CVPR 2013.

A baseline: no labels. K-means whose cells are numbered so that the Hamming distance of two numbers tells the distance
of their centres; in a product of subspaces, `BITS` bits each.

| paper | here | shape | |
|---|---|---|---|
| b, k = 2^b | `BITS`, `CELLS` | | bits and codewords of a subspace |
| c_i | `codewords_KD` | [K, d] | of one subspace |
| d_h(i, j) | `hamming_KK` | [K, K] | s sqrt(Hamming distance of i and j) |
| s | `scale` | | least squares fit of the first codewords' distances |
| w_ij | `weights_KK` | [K, K] | n_i n_j / n^2 |
| E_quan | | | mean ||x - c_i(x)||^2 |
| E_aff | | | sum over i, j of w_ij (||c_i - c_j|| - d_h(i, j))^2 |
| lambda = 10 | `AFFINITY` | | E = E_quan + lambda E_aff |

The first numbers are the signs of the leading principal coordinates of the subspace. Then by turns: every image to its
nearest codeword; all codewords together down E by L-BFGS (the paper moves one at a time, by a quasi-Newton method). The
subspaces share out the principal directions so that their products of variances are alike.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.anchors import in_blocks, squared_distances
from hashdist.methods.parts.projections import Projection, centre, check_directions, principal_directions

NAME = "kmh"
CITATION = "He, Wen and Sun, K-means hashing: an affinity-preserving quantization method, CVPR 2013"
USES = "features"
BITS = 4
CELLS = 2**BITS
AFFINITY = 10.0
TURNS = 30
STEPS = 20
"""L-BFGS iterations a turn."""

Matrix = NDArray[np.float64]
NUMBERS_KB = np.arange(CELLS)[:, None] >> np.arange(BITS) & 1
"""The bits of each cell's number."""
ROOTS_KK = np.sqrt((NUMBERS_KB[:, None] != NUMBERS_KB).sum(2))
"""Square roots of the Hamming distances of the numbers."""


@dataclass(frozen=True)
class ProductCells:
    """Features [N, D] to z [N, L] of -1 and +1: the bits of the nearest codeword's number in each subspace."""

    projection: Projection
    codewords: tuple[NDArray[np.float32], ...]

    def __call__(self, features_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """z, float32 [N, L]."""
        return in_blocks(self._block, features_ND)

    def _block(self, features_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        parts = np.split(self.projection(features_ND), len(self.codewords), axis=1)
        numbers = [NUMBERS_KB[nearest(part, words)] for part, words in zip(parts, self.codewords, strict=True)]
        return np.hstack(numbers).astype(np.float32) * 2 - 1


def fit(features_ND: NDArray[np.floating], bits: int, seed: int) -> ProductCells:  # noqa: ARG001
    """Codewords in bits / 4 subspaces. No randomness. Raises InvalidInput for more bits than directions."""
    check_bits(bits)
    check_directions("KMH", bits, features_ND)
    with threadpool_limits(1):  # many small steps magnify what threads do to the last digit
        return _fit_cells(features_ND, bits)


def _fit_cells(features_ND: NDArray[np.floating], bits: int) -> ProductCells:
    mean_D, centred_ND = centre(features_ND)
    subspaces = bits // BITS
    directions_DP = principal_directions(centred_ND, min(features_ND.shape) // subspaces * subspaces)
    variances_P = (centred_ND @ directions_DP.astype(np.float32)).var(0, dtype=np.float64)
    order_P = np.concatenate(allocation(variances_P, subspaces))
    projection = Projection(mean_D.astype(np.float32), directions_DP[:, order_P].astype(np.float32))
    parts = np.split(projection(features_ND), subspaces, axis=1)
    return ProductCells(projection, tuple(cells(part_ND).astype(np.float32) for part_ND in parts))


def allocation(variances_P: Matrix, subspaces: int) -> list[NDArray[np.int64]]:
    """Equally many directions for each subspace, falling, each to the one whose product of variances is smallest."""
    size = len(variances_P) // subspaces
    chosen: list[list[int]] = [[] for _ in range(subspaces)]
    logs = np.zeros(subspaces)
    shifted_P = np.log(variances_P.clip(1e-12 * max(float(variances_P.max()), 1e-30)))
    shifted_P -= shifted_P.min()  # products grow with every direction, so that the emptiest subspace comes first
    for direction in np.argsort(-variances_P, kind="stable"):
        free = [s for s in range(subspaces) if len(chosen[s]) < size]
        taker = min(free, key=lambda s: (logs[s], len(chosen[s])))
        chosen[taker].append(int(direction))
        logs[taker] += shifted_P[direction]
    return [np.array(directions) for directions in chosen]


def cells(part_ND: NDArray[np.float32]) -> Matrix:
    """Codewords [K, d] of one subspace, whose leading principal coordinates come first."""
    number_N = (part_ND[:, :BITS] >= 0) @ (1 << np.arange(BITS))
    means_KD, share_K = centres(part_ND, number_N, np.zeros((CELLS, part_ND.shape[1])))
    codewords_KD = means_KD
    scale = fitted_scale(codewords_KD, share_K)
    for _ in range(TURNS):
        number_before_N, number_N = number_N, nearest(part_ND, codewords_KD)
        means_KD, share_K = centres(part_ND, number_N, codewords_KD)
        codewords_KD = move(codewords_KD, means_KD, share_K, scale)
        if np.array_equal(number_N, number_before_N):
            break
    return codewords_KD


def nearest(part_ND: NDArray[np.floating], codewords_KD: NDArray[np.floating]) -> NDArray[np.int64]:
    """The number of each row's nearest codeword [N]."""
    found: NDArray[np.int64] = squared_distances(part_ND, codewords_KD).argmin(1)
    return found


def centres(part_ND: NDArray[np.float32], number_N: NDArray[np.int64], empty_KD: Matrix) -> tuple[Matrix, Matrix]:
    """The mean [K, d] of each cell, `empty_KD` where it has no image, and the cells' shares [K] of the images."""
    member_NK = number_N[:, None] == np.arange(CELLS)
    count_K = member_NK.sum(0)
    sums_KD = member_NK.T.astype(np.float64) @ part_ND
    return np.where(count_K[:, None] > 0, sums_KD / count_K.clip(1)[:, None], empty_KD), count_K / len(number_N)


def fitted_scale(codewords_KD: Matrix, share_K: Matrix) -> float:
    """s of least sum w_ij (||c_i - c_j|| - s sqrt(h_ij))^2."""
    weights_KK = np.outer(share_K, share_K)
    apart_KK = np.linalg.norm(codewords_KD[:, None] - codewords_KD, axis=2)
    return float((weights_KK * apart_KK * ROOTS_KK).sum() / max((weights_KK * ROOTS_KK**2).sum(), 1e-30))


def move(codewords_KD: Matrix, means_KD: Matrix, share_K: Matrix, scale: float) -> Matrix:
    """The codewords after STEPS of L-BFGS down E, the cells' images fixed."""
    found = minimize(
        lambda flat: energy(flat.reshape(codewords_KD.shape), means_KD, share_K, scale),
        codewords_KD.ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": STEPS},
    )
    return np.asarray(found.x, np.float64).reshape(codewords_KD.shape)


def energy(codewords_KD: Matrix, means_KD: Matrix, share_K: Matrix, scale: float) -> tuple[float, Matrix]:
    """E but for the spread within the cells, and its gradient, flat.

    E_quan = sum of share_i ||c_i - mean_i||^2 + constant.
    """
    off_KD = codewords_KD - means_KD
    between_KKD = codewords_KD[:, None] - codewords_KD
    apart_KK = np.linalg.norm(between_KKD, axis=2)
    gap_KK = apart_KK - scale * ROOTS_KK
    weights_KK = AFFINITY * np.outer(share_K, share_K)
    value = float(share_K @ (off_KD**2).sum(1) + (weights_KK * gap_KK**2).sum())
    pull_KK = weights_KK * gap_KK / np.where(apart_KK > 0, apart_KK, 1.0)
    slope_KD = 2 * share_K[:, None] * off_KD + 4 * (pull_KK[:, :, None] * between_KKD).sum(1)
    return value, slope_KD.ravel()
