"""GreedyHash, unsupervised: Shupeng Su, Chao Zhang, Kai Han, Yonghong Tian, "Greedy Hash: Towards Fast Optimization for
Accurate Hash Coding in CNN", NeurIPS 2018, section 4.3. Cosines of codes match cosines of features.

| paper | here | shape | where |
|---|---|---|---|
| X, output of VGG-16's last hidden layer | `outputs["features"]` | [b, D] | section 4.3 |
| H, input of the hash layer | `outputs["z"]` | [b, L] | section 3.2 |
| B = sgn(H), gradient passed on | `straight_through.sign` | [b, L] | Eqs 6-8 |
| (cos(B_1, B_2) - cos(X_1, X_2))^2 | `match` | number | section 4.3 |
| + alpha norm(H - sgn(H))_3^3 | `straight_through.cubic` | number | Eq 11 |

The paper does not say which pairs: preset `paper` takes every pair of the batch, preset `release` image i of its first
half with image i of its second, as released. The released code freezes VGG-16, which is mode `frozen` here; end to end
the backbone follows, and the target is held constant within a step. SGD 1e-4, momentum .9, decay 5e-4, batch 32, 60
epochs, alpha = .1 are the released code's. `centred` measures the features' cosines from their mean: the cosines of a
ReLU's outputs all lie near one value, which no balanced code can match.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs
from hashdist.methods.parts.heads import HashHead, HeadSettings, HeadTraining
from hashdist.methods.parts.pairs import all_rows, unit, with_own_rows
from hashdist.methods.parts.straight_through import cubic, sign

NAME = "greedyhash_unsupervised"
CITATION = "Su et al., Greedy Hash: Towards Fast Optimization for Accurate Hash Coding in CNN, NeurIPS 2018"
USES: Literal["graph", "labels", "features"] = "features"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        alpha: weight of the cubic penalty.
        pairs: "halves": image i of the first half with image i of the second; "all": every pair i != j.
        centred: cosines of features from their mean; needs frozen features and feature_length > 0.
    """

    epochs: int = 60
    batch: int = 32
    lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    alpha: float = 0.1
    pairs: Literal["halves", "all"] = "all"
    centred: bool = False


PRESETS = {
    "paper": Settings(),
    "release": Settings(pairs="halves"),
    # the rate and length of the lowest training loss (CIFAR-10, 32 bits); no label used
    "frozen": Settings(
        epochs=30,
        batch=128,
        optimizer="adam",
        lr=3e-3,
        lr_last=3e-5,
        weight_decay=0.0,
        feature_length=16.0,
        centred=True,
    ),
}


class Head(HashHead):
    """z, and the features whose cosines are the target."""

    def __init__(self, width: int, bits: int, generator: torch.Generator, dropout: float, centred: bool) -> None:
        super().__init__(width, bits, generator, dropout)
        self.centred = centred

    def forward(self, features_bD: Tensor) -> Outputs:
        """{"z": [b, L], "features": [b, D] without gradient}."""
        target_bD = (self.standardize(features_bD) if self.centred else features_bD).detach()
        return {**super().forward(features_bD), "features": target_bD}


def network(
    settings: Settings,
    width: int,
    bits: int,
    generator: torch.Generator,
    frozen: bool = True,
    classes: int = 0,  # noqa: ARG001
) -> nn.Module:
    """The hash layer beside the features themselves."""
    return Head(width, bits, generator, 0.0 if frozen else settings.dropout, settings.centred)


def match(b_BL: Tensor, x_BD: Tensor, pairs: str) -> Tensor:
    """Mean (cos(b_i, b_j) - cos(x_i, x_j))^2 over the chosen pairs."""
    b_BL, x_BD, size = unit(b_BL), unit(x_BD), len(b_BL)
    if pairs == "halves":
        first, second = slice(0, size // 2), slice(size // 2, 2 * (size // 2))
        return ((b_BL[first] * b_BL[second]).sum(1) - (x_BD[first] * x_BD[second]).sum(1)).square().mean()
    # the diagonal holds 1 - 1
    return (b_BL @ b_BL.T - x_BD @ x_BD.T).square().sum() / (size * (size - 1))


class Method(HeadTraining):
    """Section 4.3."""

    settings: Settings

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The match of the batch's pairs and the penalty."""
        chosen, comm = self.settings, self.place.comm
        z_BL = with_own_rows(outputs["z"], batch.sizes, comm)
        cosine = match(sign(z_BL), all_rows(outputs["features"], batch.sizes, comm), chosen.pairs)
        penalty = cubic(z_BL)
        backward = cosine + chosen.alpha * penalty
        terms = {"loss": backward, "match": cosine, "penalty": penalty}
        return Loss(backward, {name: term.detach() for name, term in terms.items()})
