"""Anchors: a few points that stand for all training images, and kernels to them. What shallow methods share that see
features only through their distances to anchors."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ranges import blocks

ROWS = 8192
"""Rows that an encoder treats at a time: a kernel has more columns than a code has bits."""


def check_images(name: str, n: int, least: int) -> None:
    """InvalidInput where there are too few training images for a method."""
    if n < least:
        raise InvalidInput(f"{name} needs at least {least} training images for this many bits, found {n}; use LSH")


def squared_distances(a_ND: NDArray[np.floating], b_MD: NDArray[np.floating]) -> NDArray[np.float32]:
    """||a - b||^2, float32 [N, M]; rounding is relative to the spread of b, wherever the origin lies."""
    origin_D = b_MD.mean(0, dtype=np.float64).astype(np.float32)
    a_ND, b_MD = a_ND.astype(np.float32) - origin_D, b_MD.astype(np.float32) - origin_D
    squares_NM: NDArray[np.float32] = (a_ND**2).sum(1)[:, None] + (b_MD**2).sum(1) - 2 * (a_ND @ b_MD.T)
    np.maximum(squares_NM, 0, out=squares_NM)
    return squares_NM


def k_means(features_ND: NDArray[np.floating], count: int, seed: int, iterations: int) -> NDArray[np.float32]:
    """min(count, distinct features) centres [M, D].

    From random images: k-means++ takes ten times as long, for 1% less distortion. On one thread, for scikit-learn
    adds up the threads' shares in any order.
    """
    distinct_ND = np.unique(features_ND, axis=0).astype(np.float32)
    start_MD = distinct_ND[np.random.default_rng(seed).permutation(len(distinct_ND))[:count]]
    with threadpool_limits(1):
        means = KMeans(len(start_MD), init=start_MD, n_init=1, max_iter=iterations).fit(features_ND.astype(np.float32))
    centres_MD: NDArray[np.float32] = means.cluster_centers_
    return centres_MD


def draw_anchors(features_ND: NDArray[np.floating], count: int, seed: int) -> NDArray[np.float32]:
    """min(count, n) of the features, drawn without replacement, as anchors [M, D]."""
    rows = np.random.default_rng(seed).permutation(len(features_ND))[:count]
    return features_ND[rows].astype(np.float32)


def in_blocks(
    encode: Callable[[NDArray[np.floating]], NDArray[np.float32]], features_ND: NDArray[np.floating]
) -> NDArray[np.float32]:
    """encode(features), ROWS rows at a time."""
    if len(features_ND) <= ROWS:
        return encode(features_ND)
    return np.concatenate([encode(features_ND[start:stop]) for start, stop in blocks(len(features_ND), ROWS)])


@dataclass(frozen=True)
class AnchorKernel:
    """Features [N, D] to k [N, M] = exp(-||x - anchor_M||^2 / spread) - offset_M."""

    anchors_MD: NDArray[np.float32]
    spread: float
    offset_M: NDArray[np.float32]

    def __call__(self, features_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """k, float32 [N, M]."""
        kernel_NM: NDArray[np.float32] = np.exp(squared_distances(features_ND, self.anchors_MD) / -self.spread)
        return kernel_NM - self.offset_M


def anchor_kernel(
    features_ND: NDArray[np.floating], anchors_MD: NDArray[np.float32], centred: bool
) -> tuple[AnchorKernel, NDArray[np.float32]]:
    """The kernel to these anchors, and its values [n, M] on the training features.

    The papers tune its width on labels or by hand. Here spread = 2 sigma^2 with sigma^2 the mean squared distance of
    features and anchors, which needs neither. `centred` takes the training mean off every column.
    """
    distances_NM = squared_distances(features_ND, anchors_MD)
    spread = 2 * float(distances_NM.mean(dtype=np.float64)) or 1.0
    kernel_NM = np.exp(distances_NM / -spread)
    mean_M = kernel_NM.mean(0, dtype=np.float64).astype(np.float32)
    offset_M = mean_M if centred else np.zeros_like(mean_M)
    return AnchorKernel(anchors_MD, spread, offset_M), kernel_NM - offset_M


@dataclass(frozen=True)
class KernelProjection:
    """Features [N, D] to z [N, L] = k(features) directions."""

    kernel: AnchorKernel
    directions_ML: NDArray[np.float32]

    def __call__(self, features_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """z, float32 [N, L]."""
        return in_blocks(lambda block_ND: self.kernel(block_ND) @ self.directions_ML, features_ND)
