"""GreedyHash's hash layer (Su et al., NeurIPS 2018): signs whose gradient is the identity's, and their penalty."""

from typing import Any

import torch
from torch import Tensor


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # noqa: ARG004
        return (z >= 0).to(z.dtype) * 2 - 1

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004
        return gradients[0]


def sign(z: Tensor) -> Tensor:
    """-1/+1 with sign(0) = +1 forward, the identity backward."""
    signs: Tensor = _Sign.apply(z)
    return signs


def cubic(z: Tensor) -> Tensor:
    """The mean of abs(z - sgn z)^3: keeps z where passing the gradient on does little harm (Eq 11)."""
    return (z.abs() - 1).abs().pow(3).mean()
