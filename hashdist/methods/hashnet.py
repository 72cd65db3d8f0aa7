"""HashNet: Zhangjie Cao, Mingsheng Long, Jianmin Wang, Philip S. Yu, "HashNet: Deep Learning to Hash by Continuation",
ICCV 2017. Supervised; a pair likelihood that weighs rare similar pairs up, and tanh(beta z) that hardens to sgn.

| paper | here | shape | where |
|---|---|---|---|
| z_i, output of the hash layer | `outputs["z"]`, no squashing | [b, L] | section 3 |
| h_i = sgn(z_i), by continuation g_i = tanh(beta z_i) | `g_BL` | [B, L] | Eqs 5-6 |
| s_ij in {0, 1} | `likelihood.similar` | [B, B] | section 3 |
| w_ij = c_ij norm(S) / norm(S_s) | `pair_weights` | [B, B] | Eq 2 |
| c_ij | 1, or shared / all classes of a similar pair | [B, B] | below Eq 2 |
| p(s = 1) = sigmoid(alpha <h_i, h_j>) | `alpha` / L times inner products | [B, B] | Eq 3 |
| sum w (log(1 + e^(alpha <h, h>)) - alpha s <h, h>) | `loss` | number | Eq 4 |
| beta_0 = 1 < ... < beta_m | `likelihood.hardness` | number | Algorithm 1 |

Pairs are those of the batch, as in Eq 4 and the released code, the diagonal among them; the loss is a weighted mean.
norm(S), norm(S_1) and norm(S_0) are counted over all pairs of training images, as Eq 2 says (the released code counts a
batch's). alpha = 10 / L and SGD with momentum .9 and decay 5e-4 are the released code's. The paper raises beta
exponentially from 1 to 10 in 10 stages, each to convergence; here the stages share the run's steps evenly.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place, check_labels
from hashdist.methods.parts import heads
from hashdist.methods.parts.heads import HeadSettings, HeadTraining
from hashdist.methods.parts.labels import similar_pairs
from hashdist.methods.parts.likelihood import hardness, indicator, negative_log_likelihood, similar
from hashdist.methods.parts.pairs import with_own_rows

NAME = "hashnet"
CITATION = "Cao et al., HashNet: Deep Learning to Hash by Continuation, ICCV 2017"
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        alpha: times 1 / L, the slope of the sigmoid.
        beta_last: slope of tanh in the last stage; it is 1 in the first.
        stages: how many, evenly over the run.
    """

    batch: int = 256
    epochs: int = 100
    lr: float = 3e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    alpha: float = 10.0
    beta_last: float = 10.0
    stages: int = 10


PRESETS = {
    "paper": Settings(),
    # rate by mAP within a held-out fifth of the training images (CIFAR-10, 32 bits); training labels only
    "frozen": Settings(epochs=30, batch=128, optimizer="adam", lr=1e-3, lr_last=1e-5, weight_decay=0.0),
}

network = heads.linear


def similar_share(labels_NC: NDArray[np.bool_]) -> float:
    """norm(S_1) / norm(S) over all ordered pairs."""
    return similar_pairs(labels_NC) / len(labels_NC) ** 2


def pair_weights(labels_BC: Tensor, share: float) -> Tensor:
    """Eq 2: c_ij norm(S) / norm(S_1) for similar pairs, norm(S) / norm(S_0) for the others."""
    both_BB, sizes_B = labels_BC @ labels_BC.T, labels_BC.sum(1)
    c_BB = both_BB / (sizes_B[:, None] + sizes_B - both_BB)
    return torch.where(both_BB > 0, c_BB / share, 1 / max(1 - share, 1e-12))


class Method(HeadTraining):
    """Algorithm 1."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        labels_nC = check_labels(NAME, place.data.labels)
        self.labels_nC = indicator(labels_nC, place.device).to(place.dtype)
        self.share = similar_share(labels_nC)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 4, a mean over the batch's pairs."""
        z_BL = with_own_rows(outputs["z"], batch.sizes, self.place.comm)
        chosen = self.settings
        g_BL = torch.tanh(hardness(batch.step, self.steps, chosen.stages, chosen.beta_last) * z_BL)
        labels_BC = self.labels_nC[torch.from_numpy(batch.rows_B)]
        theta_BB = chosen.alpha / self.place.bits * g_BL @ g_BL.T
        pairs_BB = negative_log_likelihood(theta_BB, similar(labels_BC, labels_BC))
        backward = (pair_weights(labels_BC, self.share) * pairs_BB).mean()
        return Loss(backward, {"loss": backward.detach()})
