"""DSH: Haomiao Liu, Ruiping Wang, Shiguang Shan, Xilin Chen, "Deep Supervised Hashing for Fast Image Retrieval", CVPR
2016. Supervised; contrastive: similar outputs together, others at least a margin apart.

| paper | here | shape | where |
|---|---|---|---|
| b_i, output of the network, relaxed | `outputs["z"]`, no squashing | [b, L] | section 3.2 |
| y = 0 similar, 1 not | 1 - `likelihood.similar` | [B, B] | Eq 1 |
| m = 2 L | `margin` times L | number | section 4 |
| (1 - y)/2 D + y/2 max(m - D, 0), D = norm(b_i - b_j)^2 | `contrastive` | [B, B] | Eq 3 |
| alpha (norm(abs(b_i) - 1)_1 + norm(abs(b_j) - 1)_1) | `loss` | number | Eq 3 |

All pairs i != j of a batch, as in the paper ("generated online"); the loss is a mean over pairs, in which the
regulariser appears once for either image. alpha = .01, batch 200, momentum .9, decay .004, rate 1e-3 are the paper's.
Frozen features are scaled to length 8: the quadratic loss overshoots where rate times length^2 is large.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place, check_labels
from hashdist.methods.parts import heads
from hashdist.methods.parts.heads import HeadSettings, HeadTraining
from hashdist.methods.parts.likelihood import indicator, similar
from hashdist.methods.parts.pairs import with_own_rows

NAME = "dsh"
CITATION = "Liu et al., Deep Supervised Hashing for Fast Image Retrieval, CVPR 2016"
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        alpha: weight of the regulariser.
        margin: m / L.
    """

    batch: int = 200
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 4e-3
    alpha: float = 0.01
    margin: float = 2.0
    feature_length: float = 8.0


PRESETS = {
    "paper": Settings(),
    # rate by mAP within a held-out fifth of the training images (CIFAR-10, 32 bits); training labels only
    "frozen": Settings(
        epochs=30, batch=128, optimizer="adam", lr=3e-2, lr_last=3e-4, weight_decay=0.0, feature_length=16.0
    ),
}

network = heads.linear


def contrastive(b_BL: Tensor, s_BB: Tensor, m: float) -> Tensor:
    """The first two terms of Eq 3 for every pair, [B, B]."""
    squares_B = b_BL.square().sum(1)
    d_BB = (squares_B[:, None] + squares_B - 2 * b_BL @ b_BL.T).clamp_min(0)
    return torch.where(s_BB > 0, d_BB, (m - d_BB).clamp_min(0)) / 2


class Method(HeadTraining):
    """Eq 3."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        self.labels_nC = indicator(check_labels(NAME, place.data.labels), place.device).to(place.dtype)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 3, a mean over the pairs i != j of the batch (the diagonal holds zeros)."""
        b_BL, size = with_own_rows(outputs["z"], batch.sizes, self.place.comm), len(batch.rows_B)
        labels_BC = self.labels_nC[torch.from_numpy(batch.rows_B)]
        pairs_BB = contrastive(b_BL, similar(labels_BC, labels_BC), self.settings.margin * self.place.bits)
        pair = pairs_BB.sum() / (size * (size - 1))
        regulariser = (b_BL.abs() - 1).abs().sum(1).mean()
        backward = pair + 2 * self.settings.alpha * regulariser
        terms = {"loss": backward, "pair": pair, "regulariser": regulariser}
        return Loss(backward, {name: term.detach() for name, term in terms.items()})
