"""A centred linear map from features to hash outputs: what the shallow methods are once they are fitted."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Projection:
    """Features [N, D] to z [N, L] = (features - mean) directions; the code is the sign of z."""

    mean_D: NDArray[np.float32]
    directions_DL: NDArray[np.float32]

    def __call__(self, features_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """z, float32 [N, L]."""
        centred_ND: NDArray[np.float32] = features_ND.astype(np.float32) - self.mean_D
        return centred_ND @ self.directions_DL


def signs(z_NL: NDArray[np.floating]) -> NDArray[np.float64]:
    """The codes of hash outputs as -1/+1 float64; sign(0) is +1."""
    return np.where(z_NL >= 0, 1.0, -1.0)
