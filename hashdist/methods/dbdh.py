"""DBDH: Xiangtao Zheng, Yichao Zhang, Xiaoqiang Lu, "Deep balanced discrete hashing for image retrieval",
Neurocomputing 2020. Supervised; DPSH's likelihood of outputs cut off at +-1, and as many +1 as -1 in a code.

| symbol | here | shape |
|---|---|---|
| z_i, output of the network | `outputs["z"]`, no squashing | [b, L] |
| u_i = min(max(z_i, -1), 1) | `u_bL` | [b, L] |
| U, the newest u of all images | `bank` | [n, L] |
| theta_ij = u_i.u_j / 2, s_ij | `likelihood` | [b, n] |
| mean log(1 + e^theta) - s theta | `pair` | number |
| alpha mean_i (mean_k u_ik)^2 | `balance` | number |

Not checked against the paper, which was not at hand: this is the popular re-implementation (DeepHash-pytorch; pairs
against a bank of all n, alpha = .1, p = 2, RMSprop 1e-5), whose gradient stops where the cut-off does. Inside it is the
identity's, the "straight-through" gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place, check_labels
from hashdist.methods.parts import heads
from hashdist.methods.parts.bank import BankTraining
from hashdist.methods.parts.heads import HeadSettings
from hashdist.methods.parts.likelihood import half_inner, indicator, negative_log_likelihood, similar
from hashdist.methods.parts.pairs import all_rows, sum_over_ranks

NAME = "dbdh"
CITATION = "Zheng, Zhang, Lu, Deep balanced discrete hashing for image retrieval, Neurocomputing 2020"
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        alpha: weight of the balance term.
    """

    optimizer: Literal["sgd", "rmsprop", "adam"] = "rmsprop"
    lr: float = 1e-5
    lr_last: float = 1e-7
    weight_decay: float = 1e-5
    alpha: float = 0.1


PRESETS = {
    "paper": Settings(),
    # rate by mAP of a held-out fifth of the training images against the others (CIFAR-10, 32 bits)
    "frozen": Settings(epochs=20, optimizer="adam", lr=3e-3, lr_last=3e-5, weight_decay=0.0, feature_length=16.0),
}

network = heads.linear


class Method(BankTraining):
    """Likelihood and balance."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        self.labels_nC = indicator(check_labels(NAME, place.data.labels), place.device).to(place.dtype)

    def outputs_of(self, z_nL: Tensor) -> Tensor:
        """u, cut off at +-1."""
        return z_nL.clamp(-1, 1)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The batch's rows against all n columns, a mean over B n pairs."""
        u_bL, comm = self.outputs_of(outputs["z"]), self.place.comm
        self.bank.write(batch.rows_B, all_rows(u_bL, batch.sizes, comm))
        n, size = self.place.data.n, len(batch.rows_B)
        s_bn = similar(self.labels_nC[torch.from_numpy(batch.rows_B[batch.own])], self.labels_nC)
        pair = negative_log_likelihood(half_inner(u_bL, self.bank.u_nL), s_bn).sum() / (size * n)
        balance = u_bL.mean(1).square().sum() / size
        backward = pair + self.settings.alpha * balance
        value, pair, balance = sum_over_ranks(torch.stack([backward, pair, balance]).detach(), comm)
        return Loss(backward, {"loss": value, "pair": pair, "balance": balance})
