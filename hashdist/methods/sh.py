"""SH: spectral hashing. Y. Weiss, A. Torralba and R. Fergus, Spectral hashing, NIPS 2008.

A baseline: numpy only, no labels, no randomness. If the features were uniform in a box along their principal
directions, the smoothest functions on them would be sinusoids of one coordinate, known without solving anything.

| paper (section 3) | here | shape | |
|---|---|---|---|
| a, b | `low_P`, `low_P + range_P` | [P] | the box |
| k pi / (b - a) | `frequencies_L` | [L] | the smallest; eigenvalue 1 - exp(-eps^2 frequency^2 / 2) |
| Phi_k | `Sinusoids` | [N, L] | sin(pi / 2 + frequency (x - a)) |

The eigenvalue grows with the frequency whatever eps is, so that the frequencies alone are compared. Only functions of
one direction are taken: a product of two would be a function of other bits (section 3).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.bits import check_bits
from hashdist.ground.errors import InvalidInput
from hashdist.methods.parts.projections import Projection, centre, principal_directions

NAME = "sh"
CITATION = "Weiss, Torralba and Fergus, Spectral hashing, NIPS 2008"
USES = "features"


@dataclass(frozen=True)
class Sinusoids:
    """Features [N, D] to z [N, L] = cos(frequency_L * (coordinate_L - low_L)), a coordinate being a principal one."""

    projection: Projection
    coordinate_L: NDArray[np.int64]
    low_L: NDArray[np.float32]
    frequencies_L: NDArray[np.float32]

    def __call__(self, features_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """z, float32 [N, L]; at the ends of the box the k-th sinusoid has made k half waves."""
        above_NL = self.projection(features_ND)[:, self.coordinate_L] - self.low_L
        z_NL: NDArray[np.float32] = np.cos(self.frequencies_L * above_NL)  # sin(pi / 2 + t) = cos t
        return z_NL


def fit(features_ND: NDArray[np.floating], bits: int, seed: int) -> Sinusoids:  # noqa: ARG001
    """The `bits` sinusoids of lowest frequency in the box of the leading principal coordinates.

    There may be more bits than directions: a long direction carries several. Raises InvalidInput where all features
    are equal.
    """
    check_bits(bits)
    if not len(features_ND):
        raise InvalidInput("SH needs features to find principal directions of, found none")
    mean_D, centred_ND = centre(features_ND)
    components_DP = principal_directions(centred_ND, min(bits, *features_ND.shape)).astype(np.float32)
    projection = Projection(mean_D.astype(np.float32), components_DP)
    coordinates_NP = projection(features_ND)
    low_P = coordinates_NP.min(0)
    range_P = coordinates_NP.max(0).astype(np.float64) - low_P
    if range_P.max() <= 0:
        raise InvalidInput("SH needs features that differ, found one and the same everywhere; use other features")
    coordinate_L, wave_L = smallest_modes(range_P, bits)
    frequencies_L = (wave_L * np.pi / range_P[coordinate_L]).astype(np.float32)
    return Sinusoids(projection, coordinate_L, low_P[coordinate_L], frequencies_L)


def smallest_modes(range_P: NDArray[np.float64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Directions and numbers k >= 1 of half waves of the `count` smallest k / (b - a).

    The constant function, k = 0, is no bit. Ties: the smaller k, then the earlier direction.
    """
    with np.errstate(divide="ignore"):
        frequencies_KP = np.arange(1, count + 1)[:, None] / range_P
    smallest = np.argsort(frequencies_KP, axis=None, kind="stable")[:count]
    half_waves, directions = np.unravel_index(smallest, frequencies_KP.shape)
    return directions, half_waves + 1
