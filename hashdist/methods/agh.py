"""AGH: anchor graph hashing. W. Liu, J. Wang, S. Kumar and S.-F. Chang, Hashing with graphs, ICML 2011.

A baseline: no labels. Each image is a mixture of its few nearest anchors; two images are as near as their mixtures are
alike. The graph this makes, A = Z Lambda^-1 Z^T, has rank M, so that the eigenvectors of its Laplacian I - A, the
smoothest functions on it, come from an M x M problem, and reach new images through their own mixtures.

| paper | here | shape | |
|---|---|---|---|
| u_1 ... u_m | `anchors_MD` | [M, D] | k-means centres |
| s, t | `NEAREST`, `spread` | | anchors of a mixture; width of its kernel |
| Z | `mixtures` | [N, M] | exp(-distance^2 / t) over the s nearest, rows add up to 1 |
| Lambda | `mass_M` | [M] | diag(Z^T 1) |
| M | `inner_MM` | [M, M] | Lambda^-1/2 Z^T Z Lambda^-1/2, eigenvalues those of A |
| V, Sigma | `vectors_MR`, `values_R` | [M, R], [R] | its leading eigenpairs but the trivial one |
| W | `weights_MR` | [M, R] | sqrt(n) Lambda^-1/2 V Sigma^-1/2 |
| Y = Z W | `y_NR` | [N, R] | graph Laplacian eigenvectors, length sqrt(n) |
| b+, b- | `thresholds_2R` | [2, R] | second layer: where the two sides of a function are cut again |

Two-layer AGH (2-AGH) is the default, as in most comparisons: R = L / 2 functions, two bits each. `fit(..., layers=1)`
gives 1-AGH: R = L functions, one bit each.

The paper leaves t open; here it is the squared mean distance to the s-th nearest anchor, which needs no labels.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from hashdist.ground.bits import check_bits
from hashdist.ground.errors import InvalidInput
from hashdist.methods.parts.anchors import check_images, in_blocks, k_means, squared_distances

NAME = "agh"
CITATION = "Liu, Wang, Kumar and Chang, Hashing with graphs, ICML 2011"
USES = "features"
ANCHORS = 300
"""The paper's m."""
NEAREST = 5
"""The paper's s on photos (2 on digits)."""
ITERATIONS = 10
"""Of k-means; anchors need not be optimal."""


@dataclass(frozen=True)
class AnchorGraphFunctions:
    """Features [N, D] to z [N, L]: the eigenfunctions y, and with thresholds their second layer behind them."""

    anchors_MD: NDArray[np.float32]
    spread: float
    weights_MR: NDArray[np.float64]
    thresholds_2R: NDArray[np.float64] | None

    def __call__(self, features_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """z, float32 [N, L]."""
        return in_blocks(self._block, features_ND)

    def _block(self, features_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        y_NR = mixtures(squared_distances(features_ND, self.anchors_MD), self.spread) @ self.weights_MR
        if self.thresholds_2R is None:
            return y_NR.astype(np.float32)
        above_R, below_R = self.thresholds_2R
        second_NR = np.where(y_NR >= 0, y_NR - above_R, -y_NR + below_R)
        return np.hstack([y_NR, second_NR]).astype(np.float32)


def fit(features_ND: NDArray[np.floating], bits: int, seed: int, layers: Literal[1, 2] = 2) -> AnchorGraphFunctions:
    """The smoothest functions on the anchor graph of these features.

    Args:
        features_ND: the training features.
        bits: L; at most layers * (M - 1), M being 300 or half the images.
        seed: of k-means.
        layers: bits of each function.

    Raises InvalidInput for more bits than the graph has functions.
    """
    check_bits(bits)
    count = bits // layers
    if count >= ANCHORS:
        raise InvalidInput(f"AGH finds at most {layers * (ANCHORS - 1)} bits with {ANCHORS} anchors, found {bits}")
    check_images("AGH", len(features_ND), 2 * (count + 1))
    with threadpool_limits(1):  # eigenvalues may be alike, and threads then choose among their eigenvectors
        anchors_MD = k_means(features_ND, min(ANCHORS, len(features_ND) // 2), seed, ITERATIONS)
        distances_NM = squared_distances(features_ND, anchors_MD)
        spread = _spread(distances_NM)
        z_NM = mixtures(distances_NM, spread)
        used_M = z_NM.any(0)  # the last step of k-means can leave an anchor without an image
        z_NM = z_NM[:, used_M]
        weights_MR = eigenfunctions(z_NM, count)
        thresholds_2R = second_layer(z_NM, z_NM @ weights_MR) if layers == 2 else None
    return AnchorGraphFunctions(anchors_MD[used_M], spread, weights_MR, thresholds_2R)


def _spread(distances_NM: NDArray[np.float32]) -> float:
    """t: the squared mean distance to the s-th nearest anchor."""
    last = min(NEAREST, distances_NM.shape[1]) - 1
    return float(np.sqrt(np.partition(distances_NM, last, axis=1)[:, last]).mean(dtype=np.float64)) ** 2 or 1.0


def mixtures(distances_NM: NDArray[np.float32], spread: float) -> NDArray[np.float64]:
    """Z: weights exp(-distance^2 / t) of the s nearest anchors, as shares of 1."""
    nearest_NS = np.argsort(distances_NM, axis=1, kind="stable")[:, :NEAREST]
    squares_NS = np.take_along_axis(distances_NM, nearest_NS, axis=1).astype(np.float64)
    shares_NS = np.exp((squares_NS[:, :1] - squares_NS) / spread)  # the common factor cancels, and cannot underflow
    z_NM = np.zeros(distances_NM.shape)
    np.put_along_axis(z_NM, nearest_NS, shares_NS / shares_NS.sum(1, keepdims=True), axis=1)
    return z_NM


def eigenfunctions(z_NM: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """W [M, count]: Z W are eigenvectors of A = Z Lambda^-1 Z^T by falling eigenvalue, without the constant one."""
    mass_M = z_NM.sum(0)
    scaled_NM = z_NM / np.sqrt(mass_M)
    trivial_M = np.sqrt(mass_M / len(z_NM))  # eigenvalue 1, the constant function; where the graph falls
    inner_MM = scaled_NM.T @ scaled_NM - np.outer(trivial_M, trivial_M)  # apart it is not alone, so it is taken off
    values, vectors = np.linalg.eigh(inner_MM)
    values_R, vectors_MR = values[::-1][:count], vectors[:, ::-1][:, :count]
    if len(values_R) < count or values_R[-1] <= 1e-12:
        raise InvalidInput(
            f"AGH needs {count} functions of positive eigenvalue on its graph of {len(mass_M)} anchors, found "
            f"{int((values > 1e-12).sum())}; use fewer bits, or features with fewer duplicates"
        )
    weights_MR: NDArray[np.float64] = np.sqrt(len(z_NM) / mass_M)[:, None] * vectors_MR / np.sqrt(values_R)
    return weights_MR


def second_layer(z_NM: NDArray[np.float64], y_NR: NDArray[np.float64]) -> NDArray[np.float64]:
    """b+ and b- [2, R]: where to cut y above and below zero (section on hierarchical hashing).

    The second bit's function f is y - b+ where y >= 0 and b- - y elsewhere, that is |y| - b+ e + b- (1 - e) with e the
    indicator of y >= 0. Of all b+, b- with balance, 1^T f = 0, the smoothest f, least f^T (I - A) f, has

        b+ + b- = e^T (I - A) |y| / e^T (I - A) e           as (I - A) 1 = 0
        b+      = mean |y| + (b+ + b-) (share of y < 0)     from the balance.
    """
    above_NR = (y_NR >= 0).astype(np.float64)
    size_NR = abs(y_NR)
    scaled_NM = z_NM / np.sqrt(z_NM.sum(0))
    e_MR, y_MR = scaled_NM.T @ above_NR, scaled_NM.T @ size_NR
    cut_R = (above_NR * above_NR).sum(0) - (e_MR * e_MR).sum(0)
    slope_R = (above_NR * size_NR).sum(0) - (e_MR * y_MR).sum(0)
    # a cut of no edges leaves the sum free: the means of both sides then
    free_R = cut_R <= 1e-12 * len(z_NM)
    share_R = above_NR.mean(0)
    sum_R = np.where(free_R, 0.0, slope_R / np.where(free_R, 1.0, cut_R))
    plus_R = size_NR.mean(0) + sum_R * (1 - share_R)
    plus_R = np.where(free_R, (above_NR * size_NR).sum(0) / above_NR.sum(0).clip(1), plus_R)
    minus_R = np.where(free_R, -((1 - above_NR) * size_NR).sum(0) / (1 - above_NR).sum(0).clip(1), sum_R - plus_R)
    return np.stack([plus_R, minus_R])
