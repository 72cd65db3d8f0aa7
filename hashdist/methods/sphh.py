"""SphH: spherical hashing. J.-P. Heo, Y. Lee, J. He, S.-F. Chang and S.-E. Yoon, CVPR 2012.

A baseline: no labels. A bit says whether an image lies inside a hypersphere; the spheres hold half of the images each,
and any two of them a quarter in common.

| paper | here | shape | |
|---|---|---|---|
| p_k | `pivots_LD` | [L, D] | centres of the spheres |
| t_k | `radii_L` | [L] | the median distance of the images: half are inside |
| o_ij | `overlaps_LL` | [L, L] | images inside both spheres |
| f_i<-j | in `forces` | [L, D] | (1/2) (o_ij - n/4) / (n/4) (p_i - p_j); p_i moves by their mean over j |
| eps_m = 0.1, eps_s = 0.15 | `MEAN_ERROR`, `SPREAD_ERROR` | | of |o_ij - n/4|, relative to n/4, when to stop |

The paper compares codes by its spherical Hamming distance, |b xor b'| / |b and b'|. Here, as everywhere in hashdist,
by the plain Hamming distance: its figures with both can differ.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.anchors import check_images, in_blocks, squared_distances

NAME = "sphh"
CITATION = "Heo, Lee, He, Chang and Yoon, Spherical hashing, CVPR 2012"
USES = "features"
STARTERS = 5
"""Images whose mean is a sphere's first centre."""
ITERATIONS = 100
"""At most; the paper's loop ends by its tolerances alone."""
MEAN_ERROR, SPREAD_ERROR = 0.1, 0.15


@dataclass(frozen=True)
class Spheres:
    """Features [N, D] to z [N, L] = radius - distance to the pivot."""

    pivots_LD: NDArray[np.float32]
    radii_L: NDArray[np.float32]

    def __call__(self, features_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """z, float32 [N, L]."""
        return in_blocks(lambda block_ND: self.radii_L - distances(block_ND, self.pivots_LD), features_ND)


def distances(features_ND: NDArray[np.floating], pivots_LD: NDArray[np.floating]) -> NDArray[np.float32]:
    """Euclidean distances [N, L]."""
    return np.sqrt(squared_distances(features_ND, pivots_LD))


def fit(features_ND: NDArray[np.floating], bits: int, seed: int) -> Spheres:
    """Spheres pushed and pulled until they are balanced and independent. Raises InvalidInput for too few images."""
    check_bits(bits)
    n = len(features_ND)
    check_images("SphH", n, 4)
    features_ND = features_ND.astype(np.float32)
    rng = np.random.default_rng(seed)
    starters = [rng.choice(n, min(STARTERS, n // 2), replace=False) for _ in range(bits)]
    pivots_LD = np.stack([features_ND[rows].mean(0) for rows in starters])
    for _ in range(ITERATIONS):
        apart_NL = distances(features_ND, pivots_LD)
        inside_NL = (apart_NL <= np.median(apart_NL, axis=0)).astype(np.float32)
        overlaps_LL = inside_NL.T @ inside_NL
        if in_balance(overlaps_LL, n):
            break
        pivots_LD = pivots_LD + forces(overlaps_LL, n, pivots_LD)
    return Spheres(pivots_LD, np.median(distances(features_ND, pivots_LD), axis=0).astype(np.float32))


def in_balance(overlaps_LL: NDArray[np.float32], n: int) -> bool:
    """Whether mean and standard deviation of the overlaps of two spheres are within the tolerances."""
    pairs = overlaps_LL[np.triu_indices(len(overlaps_LL), 1)]
    return bool(abs(pairs - n / 4).mean() <= MEAN_ERROR * n / 4 and pairs.std() <= SPREAD_ERROR * n / 4)


def forces(overlaps_LL: NDArray[np.float32], n: int, pivots_LD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean force on every pivot: apart where spheres share too much, together where too little."""
    excess_LL = (overlaps_LL - n / 4) / (n / 4) / 2
    np.fill_diagonal(excess_LL, 0)
    # sum over j of e_ij (p_i - p_j), without an L x L x D array
    total_LD = excess_LL.sum(1)[:, None] * pivots_LD - excess_LL @ pivots_LD
    found: NDArray[np.float32] = (total_LD / len(pivots_LD)).astype(np.float32)
    return found
