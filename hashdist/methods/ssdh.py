"""SSDH: Erkun Yang, Cheng Deng, Tongliang Liu, Wei Liu, Dacheng Tao, "Semantic Structure-based Unsupervised Deep
Hashing", IJCAI 2018. Unsupervised; only pairs whose features are clearly near or clearly far are learned from.

| paper | here | shape | where |
|---|---|---|---|
| d_ij = 1 - cos(f_i, f_j), pre-trained features | `distances` of `data.features` | [B, B] | section 3.2 |
| m_l = m_r, sigma_l, sigma_r: two half Gaussians | `Halves` | numbers | section 3.2 |
| d_l = m_l - alpha sigma_l, d_r = m_r + beta sigma_r | `structure` | numbers | Eq 1 |
| s_ij = 1 (d <= d_l), -1 (d >= d_r), 0 | `structure` | [B, B] | Eq 2 |
| h_i, tanh | `outputs["z"]` | [b, L] | section 3.3 |
| sum abs(s_ij) (h_i.h_j / L - s_ij)^2 | `loss` | number | Eqs 3-4 |

The fit as re-implementations do it: m is the lower edge of the fullest bin, .01 wide, of the histogram of distances.
The distances below it are mirrored at it, and so are those above, which makes sigma the root mean square distance from
m on either side. It is taken from sums per bin in one pass over at most `fit_images` images, evenly spaced.
alpha = beta = 2 as in the paper. Not checked against anything: batch 24, SGD and its rate in preset `paper`.
The structure comes from committed features, so training from images needs them beside the images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ranges import blocks
from hashdist.methods import contract
from hashdist.methods.contract import Batch, Encode, Loss, Outputs, Place
from hashdist.methods.parts import heads
from hashdist.methods.parts.heads import HeadSettings, HeadTraining
from hashdist.methods.parts.pairs import unit, with_own_rows

NAME = "ssdh"
CITATION = "Yang et al., Semantic Structure-based Unsupervised Deep Hashing, IJCAI 2018"
USES: Literal["graph", "labels", "features"] = "features"
GRAPH: contract.GraphRule = "none"

BINS = 200
"""Of width .01, over the range of 1 - cos."""


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        alpha: how many sigma_l below the mode a pair is similar.
        beta: how many sigma_r above the mode a pair is dissimilar.
        fit_images: at most this many images are compared to fit the two half Gaussians.
    """

    batch: int = 24
    epochs: int = 60
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    alpha: float = 2.0
    beta: float = 2.0
    fit_images: int = 10_000


PRESETS = {
    "paper": Settings(),
    # the rate and length of the lowest training loss (CIFAR-10, 32 bits); no label used
    "frozen": Settings(
        epochs=30,
        batch=128,
        optimizer="adam",
        lr=3e-3,
        lr_last=3e-5,
        weight_decay=0.0,
        feature_length=16.0,
        fit_images=2000,
    ),
}

network = heads.tanh


@dataclass(frozen=True)
class Halves:
    """Two half Gaussians that meet at the mode."""

    mode: float
    sigma_left: float
    sigma_right: float


def distances(x_BD: Tensor, y_ND: Tensor) -> Tensor:
    """1 - cos, [B, N]."""
    return 1 - unit(x_BD) @ unit(y_ND).T


def fit_halves(features_ND: NDArray[np.floating], images: int) -> Halves:
    """Section 3.2, from all pairs i != j of at most `images` images."""
    rows = np.unique(np.linspace(0, len(features_ND) - 1, min(images, len(features_ND))).astype(np.int64))
    x_MD = unit(torch.from_numpy(features_ND[rows].astype(np.float32))).numpy()
    sums = np.zeros((3, BINS))
    for start, stop in blocks(len(rows), 1024):
        d = 1 - (x_MD[start:stop] @ x_MD.T).astype(np.float64)
        d = d[np.arange(start, stop)[:, None] != np.arange(len(rows))]
        bins = np.clip((d * BINS / 2).astype(np.int64), 0, BINS - 1)
        sums += [np.bincount(bins, weights=d**power, minlength=BINS) for power in range(3)]
    return halves_of(sums)


def halves_of(sums: NDArray[np.float64]) -> Halves:
    """The fit from count, sum and sum of squares [3, BINS] of each bin's distances."""
    top = int(sums[0].argmax())
    mode = top * 2 / BINS
    around = sums[2] - 2 * mode * sums[1] + mode**2 * sums[0]  # sum of (d - mode)^2, by bin
    left, right = around[:top].sum(), around[top:].sum()
    below, above = max(1.0, sums[0][:top].sum()), max(1.0, sums[0][top:].sum())
    return Halves(mode, float((left / below) ** 0.5), float((right / above) ** 0.5))


def structure(d_BB: Tensor, halves: Halves, settings: Settings) -> Tensor:
    """Eqs 1-2: 1, -1 or 0 for every pair."""
    near = d_BB <= halves.mode - settings.alpha * halves.sigma_left
    far = d_BB >= halves.mode + settings.beta * halves.sigma_right
    return near.to(d_BB.dtype) - far.to(d_BB.dtype)


class Method(HeadTraining):
    """Eq 4 with the structure of Eqs 1-2."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        if place.data.features is None:
            raise InvalidInput("ssdh compares features of the training images, found none; commit features first")
        self.features_nD = place.data.features
        self.halves = Halves(0.0, 0.0, 0.0)

    def prepare(self, head: nn.Module, encode: Encode) -> None:
        """Constants of frozen features, and the two half Gaussians."""
        super().prepare(head, encode)
        self.halves = fit_halves(self.features_nD, self.settings.fit_images)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 4, a mean over the batch's pairs, the diagonal (s = 1) among them."""
        h_BL = with_own_rows(outputs["z"], batch.sizes, self.place.comm)
        x_BD = torch.from_numpy(self.features_nD[batch.rows_B]).to(h_BL.device, h_BL.dtype)
        s_BB = structure(distances(x_BD, x_BD), self.halves, self.settings)
        backward = (s_BB.abs() * (h_BL @ h_BL.T / self.place.bits - s_BB).square()).mean()
        shares = {"similar": (s_BB > 0), "dissimilar": (s_BB < 0)}
        return Loss(backward, {"loss": backward.detach(), **{k: v.to(h_BL.dtype).mean() for k, v in shares.items()}})

    def state_dict(self) -> dict[str, Any]:
        """The fit."""
        return {"halves": [self.halves.mode, self.halves.sigma_left, self.halves.sigma_right]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The fit."""
        self.halves = Halves(*state["halves"])
