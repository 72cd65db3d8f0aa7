"""DSDH: Qi Li, Zhenan Sun, Ran He, Tieniu Tan, "Deep Supervised Discrete Hashing", NeurIPS 2017. Supervised; DPSH's
pair likelihood, and codes that are updated bit by bit so that a linear classifier reads the labels off them.

| paper | here | shape | where |
|---|---|---|---|
| h_i, output of the network | `outputs["z"]`, no squashing | [b, L] | Eq 6 |
| H (transposed) | `bank` | [n, L] | Eq 9 |
| B (transposed) | `codes_nL` | [n, L] | Eq 9 |
| Y (transposed) | `labels_nC` | [n, C] | Eq 5 |
| W | `w_LC` | [L, C] | Eq 5 |
| theta_ij = h_i.h_j / 2, s_ij | `likelihood` | [b, n] | Eq 2 |
| -sum (s theta - log(1 + e^theta)) + mu norm(Y - W^T B)^2 + nu norm(W)^2 + eta norm(B - H)^2 | `loss` | | Eq 9 |
| W = (B B^T + nu / mu I)^-1 B Y^T | `classifier` | [L, C] | Eq 13 |
| b_k = sgn(p_k - B'^T W' w_k), P = W Y + eta / mu H (DCC) | `discrete_codes` | [n, L] | Eqs 15-16 |

By turns as in Algorithm 1: the network for an epoch with B fixed, then W, then B bit by bit until nothing changes, both
over all n images. (The released code solves W and B anew for each batch from the batch alone; nu = .1, eta = 55, at
most 10 sweeps and the rates are its.) Pairs, both their roles and the division by B n are as in methods/dpsh.py. The
classification term reaches the network through B alone; it is reported beside the loss. Frozen features are scaled to
length 16: at these rates a step of the eta term overshoots where lr eta / n length^2 nears 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hashdist.methods import contract
from hashdist.methods.contract import Batch, Encode, Loss, Outputs, Place, check_labels
from hashdist.methods.parts import heads
from hashdist.methods.parts.bank import BankTraining
from hashdist.methods.parts.heads import HeadSettings
from hashdist.methods.parts.likelihood import half_inner, indicator, negative_log_likelihood, similar
from hashdist.methods.parts.pairs import all_rows, signs, sum_over_ranks

NAME = "dsdh"
CITATION = "Li, Sun, He, Tan, Deep Supervised Discrete Hashing, NeurIPS 2017"
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        mu: weight of the classification term.
        nu: weight of the classifier's norm.
        eta: weight of the distance between codes and outputs.
        sweeps: at most this many times over the bits an epoch.
    """

    lr_last: float = 1e-6
    weight_decay: float = 5e-4
    mu: float = 1.0
    nu: float = 0.1
    eta: float = 55.0
    sweeps: int = 10
    feature_length: float = 16.0


PRESETS = {
    "paper": Settings(),
    # rate by mAP within a held-out fifth of the training images (CIFAR-10, 32 bits); training labels only
    # (as dpsh's; eta by the held-out fifth against the other four: .52 with 10, .42 with 55)
    "frozen": Settings(epochs=20, optimizer="adam", lr=3e-3, lr_last=3e-5, weight_decay=0.0, eta=10.0),
}

network = heads.linear


def classifier(codes_nL: Tensor, labels_nC: Tensor, ridge: float) -> Tensor:
    """Eq 13: W [L, C] of the regularised least squares from codes to labels, ridge = nu / mu."""
    gram_LL = codes_nL.T @ codes_nL
    gram_LL = gram_LL + ridge * torch.eye(len(gram_LL), dtype=gram_LL.dtype, device=gram_LL.device)
    w_LC: Tensor = torch.linalg.solve(gram_LL, codes_nL.T @ labels_nC)
    return w_LC.contiguous()  # solve gives columns; products of another layout round differently after a resumption


def discrete_codes(
    codes_nL: Tensor, w_LC: Tensor, labels_nC: Tensor, h_nL: Tensor, ratio: float, sweeps: int
) -> Tensor:
    """Eqs 15-16: cyclic coordinate descent on norm(Y - B W)^2 + ratio norm(B - H)^2, ratio = eta / mu."""
    codes_nL = codes_nL.clone()
    predicted_nC = codes_nL @ w_LC
    for _ in range(sweeps):
        before = codes_nL.clone()
        for k in range(codes_nL.shape[1]):
            others_nC = predicted_nC - codes_nL[:, k, None] * w_LC[k]
            codes_nL[:, k] = signs((labels_nC - others_nC) @ w_LC[k] + ratio * h_nL[:, k])
            predicted_nC = others_nC + codes_nL[:, k, None] * w_LC[k]
        if torch.equal(before, codes_nL):
            break
    return codes_nL


class Method(BankTraining):
    """Algorithm 1."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        self.labels_nC = indicator(check_labels(NAME, place.data.labels), place.device).to(place.dtype)
        self.codes_nL = torch.ones_like(self.bank.u_nL)
        self.w_LC = self.labels_nC.new_zeros((place.bits, place.data.classes))

    def prepare(self, head: nn.Module, encode: Encode) -> None:
        """Constants of frozen features, the first outputs of all images, and their signs as the first codes."""
        super().prepare(head, encode)
        self.codes_nL = signs(self.bank.u_nL)

    def start_epoch(self, epoch: int, encode: Encode) -> None:  # noqa: ARG002
        """W, then B, in float64, the same on every rank."""
        chosen = self.settings
        codes, labels, h = self.codes_nL.double(), self.labels_nC.double(), self.bank.u_nL.double()
        w = classifier(codes, labels, chosen.nu / chosen.mu)
        codes = discrete_codes(codes, w, labels, h, chosen.eta / chosen.mu, chosen.sweeps)
        self.w_LC, self.codes_nL = w.to(self.w_LC.dtype), codes.to(self.codes_nL.dtype)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 9 of the batch's rows, pairs against all n columns, divided by B n."""
        h_bL, comm = outputs["z"], self.place.comm
        self.bank.write(batch.rows_B, all_rows(h_bL, batch.sizes, comm))
        n, size, rows_b = self.place.data.n, len(batch.rows_B), torch.from_numpy(batch.rows_B[batch.own])
        labels_bC, codes_bL = self.labels_nC[rows_b], self.codes_nL[rows_b]
        s_bn = similar(labels_bC, self.labels_nC)
        pair = negative_log_likelihood(half_inner(h_bL, self.bank.u_nL), s_bn).sum() / (size * n)
        distance = (codes_bL - h_bL).square().sum() / size
        classification = (labels_bC - codes_bL @ self.w_LC).square().sum() / size
        backward = 2 * pair + self.settings.eta / n * distance
        terms = torch.stack([backward, pair, distance, classification]).detach()
        names = ("loss", "pair", "quantisation", "classification")
        return Loss(backward, dict(zip(names, sum_over_ranks(terms, comm), strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """H, B and W."""
        return {**super().state_dict(), "codes": self.codes_nL, "w": self.w_LC}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """H, B and W."""
        super().load_state_dict(state)
        self.codes_nL.copy_(state["codes"])
        self.w_LC.copy_(state["w"])
