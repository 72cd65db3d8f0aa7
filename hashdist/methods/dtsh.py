"""DTSH: Xiaofang Wang, Yi Shi, Kris M. Kitani, "Deep Supervised Hashing with Triplet Labels", ACCV 2016. Supervised:
the likelihood that an image is nearer to one that shares a class than to one that does not.

| paper | here | shape | where |
|---|---|---|---|
| u_i, output of the network | `outputs["z"]`, no squashing | [b, L] | section 3 |
| Theta_ij = u_i.u_j / 2 | `likelihood.half_inner` | [B, B] | section 3 |
| triplets (q, p, n): q and p share a class, q and n none | `triplet_losses` | [P, B] | section 3 |
| p = sigmoid(Theta_qp - Theta_qn - alpha) | `triplet_losses` | [P, B] | Eq 3 |
| -sum log p + lambda sum norm(b - u)^2 | `loss` | number | Eq 6 |

All triplets of a batch, p != q. Both terms are means, over the triplets and over B L code elements. alpha = 5 and
lambda = 1 are those of a re-implementation, which takes means too but inner products that are not halved.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place, check_labels
from hashdist.methods.parts import heads
from hashdist.methods.parts.heads import HeadSettings, HeadTraining
from hashdist.methods.parts.likelihood import half_inner, indicator, similar, softplus
from hashdist.methods.parts.pairs import signs, with_own_rows

NAME = "dtsh"
CITATION = "Wang, Shi, Kitani, Deep Supervised Hashing with Triplet Labels, ACCV 2016"
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        alpha: margin.
        lambda_: weight of the quantisation term.
    """

    epochs: int = 150
    lr: float = 1e-3
    weight_decay: float = 5e-4
    alpha: float = 5.0
    lambda_: float = 1.0


PRESETS = {
    "paper": Settings(),
    # rate by mAP within a held-out fifth of the training images (CIFAR-10, 32 bits); training labels only
    "frozen": Settings(epochs=30, batch=64, optimizer="adam", lr=1e-3, lr_last=1e-5, weight_decay=0.0),
}

network = heads.linear


def triplet_losses(theta_BB: Tensor, s_BB: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """-log sigmoid(Theta_qp - Theta_qn - alpha): its sum over all triplets of the batch, and how many there are."""
    itself = torch.eye(len(s_BB), dtype=torch.bool, device=s_BB.device)
    q_P, p_P = torch.nonzero((s_BB > 0) & ~itself, as_tuple=True)
    negative_PB = s_BB[q_P] == 0
    margin_PB = theta_BB[q_P, p_P][:, None] - theta_BB[q_P] - alpha
    return (softplus(-margin_PB) * negative_PB).sum(), negative_PB.sum()


class Method(HeadTraining):
    """Eq 6."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        self.labels_nC = indicator(check_labels(NAME, place.data.labels), place.device).to(place.dtype)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 6 of the batch; a batch without a triplet has the quantisation term alone."""
        u_BL = with_own_rows(outputs["z"], batch.sizes, self.place.comm)
        labels_BC = self.labels_nC[torch.from_numpy(batch.rows_B)]
        total, count = triplet_losses(half_inner(u_BL, u_BL), similar(labels_BC, labels_BC), self.settings.alpha)
        triplet = total / count.clamp_min(1)
        quantisation = (u_BL - signs(u_BL)).square().mean()
        backward = triplet + self.settings.lambda_ * quantisation
        terms = {"loss": backward, "triplet": triplet, "quantisation": quantisation}
        return Loss(backward, {name: term.detach() for name, term in terms.items()})
