"""GreedyHash, supervised: Shupeng Su, Chao Zhang, Kai Han, Yonghong Tian, "Greedy Hash: Towards Fast Optimization for
Accurate Hash Coding in CNN", NeurIPS 2018. A classifier on codes; the sign's gradient is passed on unchanged.

| paper | here | shape | where |
|---|---|---|---|
| H, input of the hash layer | `outputs["z"]` | [b, L] | section 3.2 |
| B = sgn(H) forward, dL/dH = dL/dB backward | `straight_through.sign` | [b, L] | Eqs 6-8, Algorithm 1 |
| classifier on B | `outputs["logits"]`, no bias | [b, C] | section 3.3 |
| L = cross-entropy(B) + alpha norm(H - sgn(H))_3^3 | `loss` | number | Eq 11 |

As released (pytorch): the penalty is the mean of abs(abs(h) - 1)^3, alpha = .1, SGD with momentum .9 and decay 5e-4,
batch 32, 50 epochs, the learning rate falling to a tenth (there at epoch 30, here log-spaced). Several labels an image:
binary cross-entropy of every class instead of the softmax's; the paper has one label only.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place, check_labels
from hashdist.methods.parts.heads import HashHead, HeadSettings, HeadTraining
from hashdist.methods.parts.likelihood import indicator
from hashdist.methods.parts.pairs import with_own_rows
from hashdist.methods.parts.straight_through import cubic, sign

NAME = "greedyhash"
CITATION = "Su et al., Greedy Hash: Towards Fast Optimization for Accurate Hash Coding in CNN, NeurIPS 2018"
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        alpha: weight of the cubic penalty.
    """

    epochs: int = 50
    batch: int = 32
    lr: float = 1e-3
    lr_last: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    alpha: float = 0.1


PRESETS = {
    "paper": Settings(),
    # rate by mAP within a held-out fifth of the training images (CIFAR-10, 32 bits); training labels only
    "frozen": Settings(epochs=30, batch=128, optimizer="adam", lr=3e-4, lr_last=3e-6, weight_decay=0.0),
}


class Head(HashHead):
    """features [b, D] -> z [b, L], and a classifier on their signs."""

    def __init__(self, width: int, bits: int, classes: int, generator: torch.Generator, dropout: float) -> None:
        super().__init__(width, bits, generator, dropout)
        self.classify = nn.Linear(bits, classes, bias=False)
        nn.init.uniform_(self.classify.weight, -(bits**-0.5), bits**-0.5, generator=generator)

    def forward(self, features_bD: Tensor) -> Outputs:
        """{"z": [b, L], "logits": [b, C]}."""
        outputs = super().forward(features_bD)
        return {**outputs, "logits": self.classify(sign(outputs["z"]))}


def network(
    settings: Settings, width: int, bits: int, generator: torch.Generator, frozen: bool = True, classes: int = 0
) -> nn.Module:
    """The hash layer and the classifier."""
    return Head(width, bits, classes, generator, dropout=0.0 if frozen else settings.dropout)


class Method(HeadTraining):
    """Eq 11."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        labels_nC = check_labels(NAME, place.data.labels)
        self.single = bool((labels_nC.sum(1) == 1).all())
        self.labels_nC = indicator(labels_nC, place.device).to(place.dtype)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 11 of the batch."""
        z_BL, logits_BC = (with_own_rows(outputs[k], batch.sizes, self.place.comm) for k in ("z", "logits"))
        labels_BC = self.labels_nC[torch.from_numpy(batch.rows_B)]
        if self.single:
            classification = functional.cross_entropy(logits_BC, labels_BC.argmax(1))
        else:
            classification = functional.binary_cross_entropy_with_logits(logits_BC, labels_BC)
        penalty = cubic(z_BL)
        backward = classification + self.settings.alpha * penalty
        terms = {"loss": backward, "classification": classification, "penalty": penalty}
        return Loss(backward, {name: term.detach() for name, term in terms.items()})
