"""IsoH: isotropic hashing. W. Kong and W.-J. Li, NIPS 2012, by their algorithm Lift and Projection.

A baseline: no labels. Principal components differ in variance, yet each gets one bit; a rotation makes all variances
equal.

| paper | here | shape | |
|---|---|---|---|
| W | `components_DL` | [D, L] | leading principal directions |
| Lambda | `variances_L` | [L] | their variances |
| a | `mean` | | tr(Lambda) / L, the variance that every bit shall have |
| T(a) | `flat_LL` | [L, L] | symmetric matrices with diagonal a |
| M(Lambda) | `lifted_LL` | [L, L] | symmetric matrices with eigenvalues Lambda |
| Q | `rotation_LL` | [L, L] | Q^T Lambda Q has diagonal a |

By Schur and Horn the two sets meet; by turns, the nearest point of one to the last point of the other is taken.
"""

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.projections import Projection, centre, check_directions, principal_directions

NAME = "isoh"
CITATION = "Kong and Li, Isotropic hashing, NIPS 2012"
USES = "features"
ITERATIONS = 2000
"""At most; a turn costs one eigen-decomposition of L x L."""
TOLERANCE = 1e-6
"""Of the variances, relative to their mean."""


def fit(features_ND: NDArray[np.floating], bits: int, seed: int) -> Projection:
    """PCA to `bits` dimensions and a rotation to equal variances. Raises InvalidInput for more bits than directions."""
    check_bits(bits)
    check_directions("IsoH", bits, features_ND)
    mean_D, centred_ND = centre(features_ND)
    components_DL = principal_directions(centred_ND, bits)
    variances_L = (centred_ND @ components_DL.astype(np.float32)).var(0, dtype=np.float64)
    rotation_LL = lift_and_project(variances_L, np.random.default_rng(seed))
    return Projection(mean_D.astype(np.float32), (components_DL @ rotation_LL).astype(np.float32))


def lift_and_project(variances_L: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """An orthogonal Q with all diagonal entries of Q^T diag(variances) Q equal."""
    mean = variances_L.mean()
    falling = np.argsort(-variances_L, kind="stable")
    rotation_LL, _ = np.linalg.qr(rng.standard_normal((len(variances_L), len(variances_L))))
    for _ in range(ITERATIONS):
        lifted_LL = rotation_LL.T @ (variances_L[:, None] * rotation_LL)
        if abs(lifted_LL.diagonal() - mean).max() <= TOLERANCE * mean:
            break
        # projection onto T(a): the diagonal is set
        flat_LL = lifted_LL - np.diag(lifted_LL.diagonal() - mean)
        # lift onto M(Lambda): the eigenvectors are kept, the eigenvalues become Lambda in the same order
        _, vectors = np.linalg.eigh(flat_LL)
        rotation_LL[falling] = vectors[:, ::-1].T
    return rotation_LL
