"""MLS3RDUH: Rong-Cheng Tu, Xian-Ling Mao, Wei Wei, "MLS3RDUH: Deep Unsupervised Hashing via Manifold based Local
Semantic Similarity Structure Reconstructing", IJCAI 2020. Unsupervised; cosines corrected by what diffusion says.

| symbol | here | shape |
|---|---|---|
| cosines of features, each image's k nearest | `cosine_nn`, `near_nn` | [n, n] |
| A: cosines of mutual neighbours; D^-1/2 A D^-1/2 | `diffusion` | [n, n] |
| manifold similarity (1 - a) (I - a A)^-1, a = .99 | `diffusion` | [n, n] |
| cosine neighbours near on the manifold: 1; others of them: 0; all other pairs: their cosine | `reconstruct` | [n, n] |
| made symmetric (1 before 0), S = 2 s - 1 | `reconstruct` | [n, n] |
| z_i, tanh | `outputs["z"]` | [b, L] |
| mean log cosh(z_i.z_j / L - s_ij) | `loss` | number |

As released (k = 6 % of n, 1.5 k nearest on the manifold, SGD .04, decay 1e-5, batch 128, 150 epochs; images without a
mutual neighbour keep their cosines), and not checked against the paper's own equations, which were not at hand.
Dense in n: at most `MOST` training images. Features must be committed, also when training from images.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hashdist.ground.errors import InvalidInput
from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place
from hashdist.methods.parts import heads
from hashdist.methods.parts.heads import HeadSettings, HeadTraining
from hashdist.methods.parts.likelihood import log_cosh
from hashdist.methods.parts.pairs import unit, with_own_rows

NAME = "mls3rduh"
CITATION = "Tu, Mao, Wei, MLS3RDUH: Manifold based Local Semantic Similarity Structure Reconstructing, IJCAI 2020"
USES: Literal["graph", "labels", "features"] = "features"
GRAPH: contract.GraphRule = "none"

MOST = 12_000
"""Training images: four n x n matrices of float32 are held at once, and one is inverted."""


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        share: cosine neighbours of an image, as a share of n.
        wider: neighbours on the manifold, times as many.
        diffuse: a, how far diffusion goes.
    """

    lr: float = 0.04
    weight_decay: float = 1e-5
    share: float = 0.06
    wider: float = 1.5
    diffuse: float = 0.99


PRESETS = {
    "paper": Settings(),
    # the rate and length of the lowest training loss (CIFAR-10, 32 bits); no label used
    "frozen": Settings(epochs=30, optimizer="adam", lr=3e-3, lr_last=3e-5, weight_decay=0.0, feature_length=16.0),
}

network = heads.tanh


def nearest(similarity_nn: Tensor, count: int) -> Tensor:
    """bool [n, n]: each row's `count` largest."""
    columns_nK = similarity_nn.topk(min(count, len(similarity_nn)), dim=1).indices
    return torch.zeros_like(similarity_nn, dtype=torch.bool).scatter_(1, columns_nK, True)


def diffusion(cosine_nn: Tensor, near_nn: Tensor, a: float) -> Tensor:
    """(1 - a) (I - a D^-1/2 A D^-1/2)^-1 of the mutual neighbours' positive cosines; rows of images without are 0."""
    w_nn = cosine_nn * (near_nn & near_nn.T & (cosine_nn > 1e-4))
    degree_n = w_nn.sum(1)
    scale_n = torch.where(degree_n > 0, degree_n, 1.0).rsqrt()
    system_nn = torch.eye(len(w_nn), dtype=w_nn.dtype) - a * scale_n[:, None] * w_nn * scale_n
    inverse_nn = torch.cholesky_inverse(torch.linalg.cholesky(system_nn))
    return (1 - a) * inverse_nn * (degree_n > 0)


def reconstruct(features_nD: NDArray[np.floating], settings: Settings) -> Tensor:
    """S [n, n] in [-1, 1]."""
    x_nD = unit(torch.from_numpy(np.asarray(features_nD, np.float32)))
    k = max(1, int(len(x_nD) * settings.share))
    cosine_nn = x_nD @ x_nD.T
    off_nn = cosine_nn.clone().fill_diagonal_(0)
    near_nn = nearest(off_nn, k)
    manifold_nn = diffusion(off_nn, near_nn, settings.diffuse)
    reached_n = manifold_nn.diagonal() > 0
    close_nn = nearest(manifold_nn, max(1, int(len(x_nD) * settings.share * settings.wider)))
    known_nn = near_nn & reached_n[:, None] & reached_n
    ones_nn, zeros_nn = known_nn & close_nn, known_nn & ~close_nn
    s_nn = cosine_nn.masked_fill_(zeros_nn | zeros_nn.T | (cosine_nn < 1e-4), 0).masked_fill_(ones_nn | ones_nn.T, 1)
    return 2 * s_nn - 1


class Method(HeadTraining):
    """The loss on the reconstructed similarity."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        if place.data.features is None:
            raise InvalidInput("mls3rduh compares features of the training images, found none; commit features first")
        if place.data.n > MOST:
            raise InvalidInput(
                f"mls3rduh keeps a similarity of every pair and takes at most {MOST} training images, found "
                f"{place.data.n}; train on fewer images"
            )
        self.features_nD = place.data.features

    @cached_property
    def s_nn(self) -> Tensor:
        """A function of the features alone, so that a resumed run makes it anew instead of reading it."""
        return reconstruct(self.features_nD, self.settings)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The mean over the batch's pairs."""
        z_BL = with_own_rows(outputs["z"], batch.sizes, self.place.comm)
        rows_B = torch.from_numpy(batch.rows_B)
        s_BB = self.s_nn[rows_B[:, None], rows_B].to(z_BL.device, z_BL.dtype)
        backward = log_cosh(z_BL @ z_BL.T / self.place.bits - s_BB).mean()
        return Loss(backward, {"loss": backward.detach()})
