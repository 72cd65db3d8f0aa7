"""Frozen features as a head likes them: centred, and of one typical length whatever their units.

The papers fine-tune the backbone, which can move its features where the head wants them; frozen ones stay where they
are. On features that are not centred (a ReLU's never are) all codes start on one side, and DSAH at 16 bits never
left that state on CIFAR-10 (docs/decisions.md, H6).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hashdist.ground.ranges import blocks

_ROWS = 8192


class Standardize(nn.Module):
    """x -> (x - center) * scale with constants that travel in the state_dict; the identity until `fit`."""

    center_D: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("center_D", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, features_bD: Tensor) -> Tensor:
        """Features [b, D] -> [b, D]."""
        return (features_bD - self.center_D) * self.scale

    def fit(self, features_ND: NDArray[np.floating], length: float) -> None:
        """Center on the mean and scale so that the root mean square length of a row is `length`.

        In float64 over fixed blocks of rows in order: the same on every rank, which each reads all features.
        """
        total_D, squares_D = np.zeros(features_ND.shape[1]), np.zeros(features_ND.shape[1])
        for start, stop in blocks(len(features_ND), _ROWS):
            block = features_ND[start:stop].astype(np.float64)
            total_D += block.sum(0)
            squares_D += (block**2).sum(0)
        mean_D = total_D / len(features_ND)
        variance = float((squares_D / len(features_ND) - mean_D**2).sum())
        self.center_D.copy_(torch.from_numpy(mean_D))
        self.scale.fill_(length / variance**0.5 if variance > 0 else 1.0)
