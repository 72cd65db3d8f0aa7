"""SGH: stochastic generative hashing. B. Dai, R. Guo, S. Kumar, N. He and L. Song, ICML 2017. (Another SGH exists,
scalable graph hashing.)

A baseline: no labels. Codes are the shortest description of the features under a linear model: what it costs to name
the code, and then the rest.

| paper | here | shape | |
|---|---|---|---|
| x | `x_BD` | [B, D] | features, centred, mean variance 1 an entry |
| p(x given h) | | | N(U h, rho^2 I), h of 0 and 1 |
| U | `u_LD` | [L, D] | dictionary |
| p(h) | `prior_L` | [L] | Bernoulli(theta), as logits |
| q(h given x) | `w_DL` | [D, L] | Bernoulli(sigmoid(W^T x)); the code is its more likely h, W^T x >= 0 |
| h~(z, xi) | `neuron` | [B, L] | doubly stochastic neuron: 1 if sigmoid(z) >= xi, xi uniform |
| H | `helmholtz` | | E_q[-log p(x, h) + log q(h given x)], the Helmholtz free energy |

Gradients go through the neuron by its distributional derivative: a step of h~ is as likely as sigmoid'(z), so that
d/dz is estimated by sigmoid(z) (1 - sigmoid(z)) times dH/dh at the sampled h.

Departures: Adam instead of plain stochastic gradient steps, rho^2 is a trained constant too, and W starts from the
leading principal directions. No published figure was compared; checked are the objective (by adding up over all codes)
and the derivative (exact in expectation where H is linear in each bit).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from hashdist.ground.bits import check_bits
from hashdist.methods.parts.anchors import check_images
from hashdist.methods.parts.projections import Projection, centre, check_directions, principal_directions

NAME = "sgh"
CITATION = "Dai, Guo, Kumar, He and Song, Stochastic generative hashing, ICML 2017"
USES = "features"
STEPS = 600
BATCH = 500
RATE = 1e-2


def neuron(z_BL: Tensor, xi_BL: Tensor) -> Tensor:
    """h~(z, xi): 1 where sigmoid(z) >= xi, 0 elsewhere, with the derivative sigmoid'(z)."""
    p_BL = torch.sigmoid(z_BL)
    return (p_BL >= xi_BL).to(z_BL.dtype) + (p_BL - p_BL.detach())


def helmholtz(x_BD: Tensor, h_BL: Tensor, z_BL: Tensor, u_LD: Tensor, prior_L: Tensor, log_rho2: Tensor) -> Tensor:
    """-log p(x, h) + log q(h given x) of each sample [B], but for the constant (D / 2) log 2 pi."""
    rest_B = ((x_BD - h_BL @ u_LD) ** 2).sum(1) / (2 * log_rho2.exp()) + x_BD.shape[1] / 2 * log_rho2
    name_BL = binary_cross_entropy_with_logits(prior_L.expand_as(h_BL), h_BL, reduction="none")
    known_BL = binary_cross_entropy_with_logits(z_BL, h_BL, reduction="none")
    return rest_B + name_BL.sum(1) - known_BL.sum(1)


def fit(features_ND: NDArray[np.floating], bits: int, seed: int) -> Projection:
    """Dictionary and code by stochastic gradients. Raises InvalidInput for more bits than directions."""
    check_bits(bits)
    check_images("SGH", len(features_ND), 2)
    check_directions("SGH", bits, features_ND)
    mean_D, centred_ND = centre(features_ND)
    scale = float(np.sqrt(np.mean(centred_ND**2, dtype=np.float64))) or 1.0
    x_ND = torch.from_numpy(centred_ND / np.float32(scale))
    start_DL = torch.from_numpy(principal_directions(centred_ND, bits).astype(np.float32))
    w_DL = train(x_ND, start_DL, torch.Generator().manual_seed(seed))
    return Projection(mean_D.astype(np.float32), (w_DL.numpy() / scale).astype(np.float32))


def train(x_ND: Tensor, start_DL: Tensor, generator: torch.Generator) -> Tensor:
    """W [D, L]."""
    spread_L = (x_ND @ start_DL).std(0).clamp_min(1e-6)
    w_DL = (start_DL / spread_L).requires_grad_()
    u_LD = (start_DL * spread_L).T.clone().requires_grad_()
    prior_L, log_rho2 = torch.zeros(start_DL.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([w_DL, u_LD, prior_L, log_rho2], lr=RATE)
    for _ in range(STEPS):
        x_BD = x_ND[torch.randint(len(x_ND), (min(BATCH, len(x_ND)),), generator=generator)]
        z_BL = x_BD @ w_DL
        h_BL = neuron(z_BL, torch.rand(z_BL.shape, generator=generator))
        optimizer.zero_grad()
        helmholtz(x_BD, h_BL, z_BL, u_LD, prior_L, log_rho2).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return w_DL.detach()
