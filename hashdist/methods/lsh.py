"""LSH: signs of random projections. M. Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002.

A baseline: numpy only, no training. For a direction w drawn from a Gaussian, two vectors at an angle t fall on
different sides of its hyperplane with probability t / pi, so the Hamming distance of L such signs estimates the angle.
The features are centred first, else most hyperplanes miss the cloud of features altogether.
"""

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits
from hashdist.ground.errors import InvalidInput
from hashdist.methods.parts.projections import Projection

NAME = "lsh"
CITATION = "Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002"
USES = "features"


def fit(features_ND: NDArray[np.floating], bits: int, seed: int) -> Projection:
    """Draw `bits` directions around the mean of these features. Raises InvalidInput without features."""
    check_bits(bits)
    if not len(features_ND):
        raise InvalidInput("LSH needs features to take the mean of, found none")
    mean_D = features_ND.mean(0, dtype=np.float64).astype(np.float32)
    directions_DL = np.random.default_rng(seed).standard_normal((features_ND.shape[1], bits)).astype(np.float32)
    return Projection(mean_D, directions_DL)
