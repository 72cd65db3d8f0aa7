"""DPSH: Wu-Jun Li, Sheng Wang, Wang-Cheng Kang, "Feature Learning based Deep Supervised Hashing with Pairwise Labels",
IJCAI 2016. Supervised; the first of the pair likelihoods.

| paper | here | shape | where |
|---|---|---|---|
| u_i = W^T phi(x_i) + v | `outputs["z"]`, no squashing | [b, L] | Eq 4 |
| b_i = sgn(u_i) | `pairs.signs` | [b, L] | Eq 5 |
| s_ij in {0, 1} | `likelihood.similar`: a class in common | [b, n] | section 2 |
| theta_ij = u_i.u_j / 2 | `likelihood.half_inner` | [b, n] | Eq 3 |
| U | `bank` | [n, L] | Algorithm 1 |
| -sum (s theta - log(1 + e^theta)) + eta sum norm(b - u)^2 | `loss` | number | Eq 5 |

What j runs over: Algorithm 1 keeps the outputs of all n images and takes a batch's gradient against all of them; so do
we (hashdist/methods/parts/bank.py), filled by one pass at the start. Eq 7 counts both roles of a pair, (i, j) and (j,
i), hence the 2 in `loss`. The released code divides by B n, so that the quantisation term has weight eta / n. Preset
`paper`: the released code's 150 epochs at rates from 1e-2 to 1e-6 (the paper tunes within these bounds), decay 5e-4,
eta = 10.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place, check_labels
from hashdist.methods.parts import heads
from hashdist.methods.parts.bank import BankTraining
from hashdist.methods.parts.heads import HeadSettings
from hashdist.methods.parts.likelihood import half_inner, indicator, negative_log_likelihood, similar
from hashdist.methods.parts.pairs import all_rows, signs, sum_over_ranks

NAME = "dpsh"
CITATION = "Li, Wang, Kang, Feature Learning based Deep Supervised Hashing with Pairwise Labels, IJCAI 2016"
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        eta: weight of the quantisation term beside the sum over n pairs.
    """

    lr_last: float = 1e-6
    weight_decay: float = 5e-4
    eta: float = 10.0


PRESETS = {
    "paper": Settings(),
    # rate by mAP within a held-out fifth of the training images (CIFAR-10, 32 bits); training labels only
    "frozen": Settings(epochs=20, optimizer="adam", lr=3e-3, lr_last=3e-5, weight_decay=0.0, feature_length=16.0),
}

network = heads.linear


class Method(BankTraining):
    """Algorithm 1."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        self.labels_nC = indicator(check_labels(NAME, place.data.labels), place.device).to(place.dtype)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 5 of the batch's rows against all n columns, a mean over B n pairs; its gradient is Eq 7."""
        z_bL, comm = outputs["z"], self.place.comm
        self.bank.write(batch.rows_B, all_rows(z_bL, batch.sizes, comm))
        n, size = self.place.data.n, len(batch.rows_B)
        s_bn = similar(self.labels_nC[torch.from_numpy(batch.rows_B[batch.own])], self.labels_nC)
        pair = negative_log_likelihood(half_inner(z_bL, self.bank.u_nL), s_bn).sum() / (size * n)
        quantisation = (z_bL - signs(z_bL)).square().sum() / size
        backward = 2 * pair + self.settings.eta / n * quantisation
        value, pair, quantisation = sum_over_ranks(torch.stack([backward, pair, quantisation]).detach(), comm)
        return Loss(backward, {"loss": value, "pair": pair, "quantisation": quantisation})
