"""DH: Venice Erin Liong, Jiwen Lu, Gang Wang, Pierre Moulin, Jie Zhou, "Deep Hashing for Compact Binary Codes
Learning", CVPR 2015. Unsupervised; small tanh layers whose outputs are near their signs, spread, and independent.

| paper | here | shape | where |
|---|---|---|---|
| h^m = tanh(W^m h^(m-1) + c^m), m = 1..3 | `Head` | [b, p_m] | Eq 3 |
| H, output of the last layer | `outputs["z"]` | [b, L] | Eq 4 |
| B = sgn(H) | `pairs.signs` | [b, L] | Eq 4 |
| J_1 = 1/2 norm(B - H)_F^2 | `quantisation` | number | Eq 5 |
| J_2 = 1/(2 N) tr(H H^T) | `spread` | number | Eq 5 |
| J_3 = 1/2 sum_m norm(W^m W^m^T - I)_F^2 | `outputs["orthogonality"]` | number | Eq 5 |
| J_4 = 1/2 sum_m norm(W^m)^2 + norm(c^m)^2 | `weight_decay` | | Eq 5 |
| J_1 - lambda_1 J_2 + lambda_2 J_3 + lambda_3 J_4 | `loss` | number | Eq 5 |

J_1 and J_2 are means over the batch's images, of which the paper sums the first over all at once. Weights start
orthogonal. The layer sizes are those for 64 bits; they, the weights and the rate are not checked against anything.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from hashdist.bits import check_bits
from hashdist.heads import HeadSettings, HeadTraining
from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs
from hashdist.pairs import signs, with_own_rows
from hashdist.standardize import Standardize

NAME = "dh"
CITATION = "Liong et al., Deep Hashing for Compact Binary Codes Learning, CVPR 2015"
USES: Literal["graph", "labels", "features"] = "features"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        first: p_1, units of the first layer.
        second: p_2, of the second; the third has L.
        lambda_1: weight of the spread; with 1 it only takes back what J_1 holds of norm(H)^2.
        lambda_2: weight of the orthogonality.
    """

    epochs: int = 60
    lr: float = 1e-2
    weight_decay: float = 1e-3
    feature_length: float = 8.0
    first: int = 100
    second: int = 80
    lambda_1: float = 1.0
    lambda_2: float = 1e-3


PRESETS = {
    "paper": Settings(),
    # not tuned
    "frozen": Settings(epochs=30, optimizer="adam", lr=1e-3, lr_last=1e-5, weight_decay=0.0),
}


class Head(nn.Module):
    """Three layers of tanh; frozen features are standardised first."""

    def __init__(self, widths: list[int], generator: torch.Generator, dropout: float) -> None:
        super().__init__()
        self.standardize = Standardize(widths[0])
        self.dropout = nn.Dropout(dropout)
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, features_bD: Tensor) -> Outputs:
        """{"z": [b, L], "orthogonality": J_3, the same in every row [b]}."""
        h = self.dropout(self.standardize(features_bD))
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return {"z": h, "orthogonality": self.orthogonality().expand(len(h))}

    def orthogonality(self) -> Tensor:
        """J_3 of Eq 5."""
        weights = [w for name, w in self.named_parameters() if name.endswith("weight")]
        excess = [w @ w.T - torch.eye(len(w), dtype=w.dtype, device=w.device) for w in weights]
        return 0.5 * torch.stack([e.square().sum() for e in excess]).sum()


def network(
    settings: Settings,
    width: int,
    bits: int,
    generator: torch.Generator,
    frozen: bool = True,
    classes: int = 0,  # noqa: ARG001
) -> nn.Module:
    """Eq 3 on features of any width (512 numbers of GIST in the paper)."""
    widths = [width, settings.first, settings.second, check_bits(bits)]
    return Head(widths, generator, dropout=0.0 if frozen else settings.dropout)


class Method(HeadTraining, contract.Method):
    """Eq 5."""

    settings: Settings

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 5 of the batch; J_3 depends on no image, and each row carries 1 / B of it."""
        h_BL = with_own_rows(outputs["z"], batch.sizes, self.place.comm)
        orthogonality = with_own_rows(outputs["orthogonality"], batch.sizes, self.place.comm).mean()
        quantisation = 0.5 * (signs(h_BL) - h_BL).square().sum(1).mean()
        spread = 0.5 * h_BL.square().sum(1).mean()
        backward = quantisation - self.settings.lambda_1 * spread + self.settings.lambda_2 * orthogonality
        terms = {"loss": backward, "quantisation": quantisation, "spread": spread, "orthogonality": orthogonality}
        return Loss(backward, {name: term.detach() for name, term in terms.items()})
