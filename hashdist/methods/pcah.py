"""PCAH: signs of the leading principal components. J. Wang, S. Kumar and S.-F. Chang, Semi-supervised hashing for
scalable image retrieval, CVPR 2010.

A baseline: the paper's method without any labelled pair, known as PCA hashing; numpy only, no randomness.

| paper | here | shape | |
|---|---|---|---|
| X | `centred_ND` | [n, D] | features less their mean |
| W | `components_DL` | [D, L] | max tr(W^T X^T X W), W^T W = I: their objective with no labelled pair |
"""

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.projections import Projection, centre, check_directions, principal_directions

NAME = "pcah"
CITATION = "Wang, Kumar and Chang, Semi-supervised hashing for scalable image retrieval, CVPR 2010"
USES = "features"


def fit(features_ND: NDArray[np.floating], bits: int, seed: int) -> Projection:  # noqa: ARG001
    """The `bits` directions of largest variance. Raises InvalidInput for more bits than directions."""
    check_bits(bits)
    check_directions("PCAH", bits, features_ND)
    mean_D, centred_ND = centre(features_ND)
    components_DL = principal_directions(centred_ND, bits)
    return Projection(mean_D.astype(np.float32), components_DL.astype(np.float32))
