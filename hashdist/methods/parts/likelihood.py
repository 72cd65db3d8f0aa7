"""Parts of losses over pairs: which pairs are similar, their likelihood, log cosh, and how codes harden.

The pair likelihood is that of DPSH (Li et al., IJCAI 2016, Eqs 1-2), which DHN, DSDH, DBDH and, weighted, HashNet take
up: p(s = 1 | theta) = 1 / (1 + e^-theta), so that -log p(s | theta) = log(1 + e^theta) - s theta.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_LINEAR_FROM = 40.0  # log(1 + e^x) = x + 4e-18 from here on: nothing in float64, and e^x is far from overflow


def indicator(labels_NC: NDArray[np.bool_], device: torch.device | str = "cpu") -> Tensor:
    """Labels as float32 [N, C], exact for products: counts of shared classes."""
    return torch.from_numpy(np.ascontiguousarray(labels_NC)).to(device, torch.float32)


def similar(labels_bC: Tensor, labels_NC: Tensor) -> Tensor:
    """s_ij = 1 where images share a class, else 0: [b, N] of the labels' dtype."""
    return ((labels_bC @ labels_NC.T) > 0).to(labels_bC.dtype)


def half_inner(z_bL: Tensor, u_NL: Tensor) -> Tensor:
    """theta_ij = z_i.u_j / 2, [b, N] (DPSH, below Eq 1)."""
    return 0.5 * z_bL @ u_NL.T


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) without overflow: what max(x, 0) + log(1 + e^-|x|) is, in one pass."""
    return functional.softplus(x, threshold=_LINEAR_FROM)


def negative_log_likelihood(theta_bN: Tensor, s_bN: Tensor) -> Tensor:
    """log(1 + e^theta) - s theta of every pair (DPSH, Eq 2)."""
    return softplus(theta_bN) - s_bN * theta_bN


def log_cosh(x: Tensor) -> Tensor:
    """log cosh x without overflow, the smooth |x| of DHN (Zhu et al., AAAI 2016, Eq 6)."""
    return x.abs() + softplus(-2 * x.abs()) - math.log(2)


def hardness(step: int, steps: int, stages: int, last: float) -> float:
    """beta of tanh(beta z): last^(t / (stages - 1)) in stage t, stages of equal length (HashNet, Algorithm 1)."""
    stage = min(step * stages // steps, stages - 1)
    return float(last ** (stage / max(1, stages - 1)))
