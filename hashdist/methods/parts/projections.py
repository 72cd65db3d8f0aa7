"""Centred linear maps from features to hash outputs, which most shallow methods are, and principal directions, where
many of them start."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput


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


def check_directions(name: str, bits: int, features_ND: NDArray[np.floating]) -> None:
    """InvalidInput if a method that needs a principal direction a bit is asked for more bits than there are."""
    n, width = features_ND.shape
    if bits > min(n, width):
        raise InvalidInput(
            f"{name} finds at most min(images, feature width) = {min(n, width)} bits, found {bits}; use LSH"
        )


def centre(features_ND: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """The mean [D] of the features, and the features without it [n, D]."""
    mean_D = features_ND.mean(0, dtype=np.float64)
    return mean_D, (features_ND - mean_D).astype(np.float32)


def principal_directions(centred_ND: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """The `count` orthonormal directions W [D, count] with the largest tr(W^T X^T X W), the largest first."""
    n, width = centred_ND.shape
    if n >= width:
        _, vectors = np.linalg.eigh((centred_ND.T @ centred_ND).astype(np.float64))
        leading: NDArray[np.float64] = vectors[:, ::-1][:, :count]
        return leading
    # fewer images than dimensions: the same directions from the smaller n x n problem
    values, vectors = np.linalg.eigh((centred_ND @ centred_ND.T).astype(np.float64))
    directions = centred_ND.T.astype(np.float64) @ vectors[:, ::-1][:, :count]
    unit: NDArray[np.float64] = directions / np.sqrt(values[::-1][:count].clip(1e-12))
    return unit
