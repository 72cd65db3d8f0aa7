"""ITQ: iterative quantisation. Y. Gong and S. Lazebnik, A Procrustean approach to learning binary codes, CVPR 2011.

A baseline: numpy only, no labels.

| paper | here | shape | equation |
|---|---|---|---|
| X | centred features | [n, D] | section 2 |
| W | `components_DL`, leading principal directions | [D, L] | (1) |
| V = X W | `v_NL` | [n, L] | section 2.2 |
| B | `signs_NL` | [n, L] | (2) |
| R | `rotation_LL` | [L, L] | (2) |
"""

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.projections import Projection, centre, check_directions, principal_directions

NAME = "itq"
CITATION = "Gong and Lazebnik, A Procrustean approach to learning binary codes, CVPR 2011"
USES = "features"
ALTERNATIONS = 50
"""The paper: "we have found that 50 iterations are enough"."""


def fit(features_ND: NDArray[np.floating], bits: int, seed: int) -> Projection:
    """PCA to `bits` dimensions and the rotation that loses least when signs are taken.

    Args:
        features_ND: the training features.
        bits: L; PCA has no more than min(n, D) directions.
        seed: of the first rotation.

    Raises InvalidInput for more bits than directions.
    """
    check_bits(bits)
    check_directions("ITQ", bits, features_ND)
    mean_D, centred_ND = centre(features_ND)
    components_DL = principal_directions(centred_ND, bits)  # Eq (1)
    v_NL = (centred_ND @ components_DL.astype(np.float32)).astype(np.float64)
    rotation_LL = _rotation(v_NL, np.random.default_rng(seed))
    return Projection(mean_D.astype(np.float32), (components_DL @ rotation_LL).astype(np.float32))


def _rotation(v_NL: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Eq (2): minimise ||B - V R||^2 over signs B and rotations R, by turns."""
    rotation_LL, _ = np.linalg.qr(rng.standard_normal((v_NL.shape[1], v_NL.shape[1])))
    for _ in range(ALTERNATIONS):
        # fix R, update B: B = sgn(V R)
        signs_NL = np.where(v_NL @ rotation_LL >= 0, 1.0, -1.0)
        # fix B, update R: orthogonal Procrustes; B^T V = S O S'^T, R = S' S^T
        left, _, right = np.linalg.svd(signs_NL.T @ v_NL)
        rotation_LL = right.T @ left.T
    return rotation_LL
