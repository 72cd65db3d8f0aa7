"""CSDH: Huawen Liu, Zongda Wu, Minghao Yin, Donghua Yu, Xinzhong Zhu, Jungang Lou, "An improved deep hashing model for
image retrieval with binary code similarities", Journal of Big Data 11:54, 2024. Supervised; learns from labels alone.

| paper | here | shape | where |
|---|---|---|---|
| fc7 features of AlexNet | features (frozen mode: any committed features) | [n, D] | section "Network" |
| h_i = x / (1 + abs(x)), the hash layer ("b_i" in Eq 5) | `z_BL` | [B, L] | Eq 5 |
| b_i, "activated" h_i | bit = (z >= 0) | [L] | |
| o_i = W h_i + v, the prediction layer | `logits_BC` | [B, C] | |
| y_i | `labels_BC` | [B, C] | |
| s_ij = 1 iff i and j share a class | `similar_BB` | [B, B] | |
| l_E: softmax or sigmoid cross-entropy | `classification` | number | Eqs 6, 7 |
| dist_H = k/2 (1 - cos(h_i, h_j)) | inside `pair_term` | [B, B] | Eq 8 |
| H_ij, l_H = mean of H_ij over S | `pair_term` | number | Eqs 9-11 |
| l = l_E + gamma l_H | `Method.loss` | number | Eq 14 |
| k, l (number of classes), gamma | L, C, `gamma` | | |

No code was released. Departures and choices carry the number of the decision (docs/decisions.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hashdist.ground.bits import check_bits
from hashdist.ground.errors import InvalidInput
from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place
from hashdist.methods.parts.pairs import unit, with_own_rows
from hashdist.methods.parts.standardize import Standardize

NAME = "csdh"
CITATION = (
    "Liu et al., An improved deep hashing model for image retrieval with binary code similarities, "
    "Journal of Big Data 11:54, 2024"
)
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"

Classification = Literal["auto", "single", "multi"]


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters.

    Args:
        rounds: 1; nothing changes between rounds.
        epochs: passes over the training images (D13: the paper does not say how many).
        batch: images of a global batch.
        lr: learning rate of SGD.
        momentum: of SGD.
        weight_decay: of SGD, on all weights that are trained.
        lr_decay: factor on the learning rate after `decay_epochs` epochs (D13: the paper does not say which).
        decay_epochs: see lr_decay.
        repeat_decay: again after every `decay_epochs` more epochs; else once.
        gamma: weight of the pair term (D12: the paper does not say); 0 is the ablation CSDH-.
        distance: "cosine": the pair term that Eqs 12 and 13 differentiate (D12); "hamming": Eq 10 to the letter.
        classification: "single": softmax cross-entropy; "multi": sigmoid cross-entropy; "auto": multi where any
            training image has more than one label.
        dropout: on the features when the backbone is trained too.
        feature_length: typical length that frozen features are scaled to after centring; 0 = as they come, not
            centred either.
    """

    rounds: int = 1
    epochs: int = 80
    batch: int = 32
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr_decay: float = 0.1
    decay_epochs: int = 40
    repeat_decay: bool = False
    gamma: float = 1.0
    distance: Literal["cosine", "hamming"] = "cosine"
    classification: Classification = "auto"
    dropout: float = 0.5
    feature_length: float = 64.0


PRESETS = {
    "paper": Settings(),
    # H57: a head alone on frozen features; chosen on held-out training images
    "frozen": Settings(epochs=30, lr=5e-3, decay_epochs=20, weight_decay=2e-2, feature_length=16.0),
}


# ---- the network ---------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """features [b, D] -> L, softsign -> C. Initial weights N(0, .01), biases 0: the paper does not say.

    AlexNet's dropout behind relu7 comes first when the backbone is trained too. When it is not, features are centred
    and scaled instead (docs/decisions.md, H6).
    """

    def __init__(self, width: int, bits: int, classes: int, generator: torch.Generator, dropout: float = 0.0) -> None:
        super().__init__()
        self.standardize = Standardize(width)
        self.dropout = nn.Dropout(dropout)
        self.hash = nn.Linear(width, check_bits(bits))
        self.predict = nn.Linear(bits, classes)
        for layer in (self.hash, self.predict):
            nn.init.normal_(layer.weight, std=0.01, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, features_bD: Tensor) -> Outputs:
        """{"z": softsign outputs [b, L], "classes": logits [b, C]}."""
        z_bL = functional.softsign(self.hash(self.dropout(self.standardize(features_bD))))
        return {"z": z_bL, "classes": self.predict(z_bL)}


def network(
    settings: Settings, width: int, bits: int, generator: torch.Generator, frozen: bool = True, classes: int = 0
) -> nn.Module:
    """The head on features of any width; 4096 are AlexNet's relu7 of the paper."""
    if classes < 1:
        raise InvalidInput(f"csdh predicts the classes of its images and needs at least one, found {classes}")
    return Head(width, bits, classes, generator, dropout=0.0 if frozen else settings.dropout)


# ---- Eqs 6, 7: classification --------------------------------------------------------------------------------------


def classification(logits_BC: Tensor, labels_BC: Tensor, multi: bool) -> Tensor:
    """l_E: mean over images of the softmax cross-entropy, or mean over B C of the sigmoid cross-entropy.

    `labels_BC` holds 0 and 1, in the dtype of the logits.
    """
    if multi:
        return functional.binary_cross_entropy_with_logits(logits_BC, labels_BC)
    return functional.cross_entropy(logits_BC, labels_BC.argmax(1))


# ---- Eqs 8-11: the pair term ---------------------------------------------------------------------------------------


def pair_term(z_BL: Tensor, labels_BC: Tensor, distance: str) -> Tensor:
    """l_H: mean over the B^2 ordered pairs, those of an image with itself counted.

    D12: Eqs 12 and 13 are gradients of 1 - cos where a class is shared and of max(0, cos) where none is. Eq 10 to the
    letter has dist_H = L/2 (1 - cos) and max(0, 1 - dist_H) in their places, which grows with L and lets a dissimilar
    pair go at a cosine of 1 - 2 / L.
    """
    u_BL = unit(z_BL)
    cos_BB = u_BL @ u_BL.T
    similar_BB = (labels_BC @ labels_BC.T) > 0
    if distance == "cosine":
        return torch.where(similar_BB, 1 - cos_BB, torch.relu(cos_BB)).mean()
    hamming_BB = z_BL.shape[1] / 2 * (1 - cos_BB)
    return torch.where(similar_BB, hamming_BB, torch.relu(1 - hamming_BB)).mean()


# ---- training ------------------------------------------------------------------------------------------------------


class Method(contract.Method):
    """CSDH in one run: Eq 14 by SGD. Nothing is kept besides the weights."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        _check(settings)
        self.labels_NC = contract.check_labels(NAME, place.data.labels)
        self.multi = is_multi(settings.classification, self.labels_NC)
        self.steps_per_epoch = max(1, place.data.n // settings.batch)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Stochastic gradient descent with momentum."""
        chosen = self.settings
        return torch.optim.SGD(
            parameters, lr=chosen.lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay, fused=True
        )

    def adjust(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """D13: "decayed once after 40 epochs"."""
        chosen = self.settings
        decays = step // self.steps_per_epoch // chosen.decay_epochs
        if not chosen.repeat_decay:
            decays = min(decays, 1)
        optimizer.param_groups[0]["lr"] = chosen.lr * chosen.lr_decay**decays

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 14 over the global batch; recipe C for both terms, in one exchange."""
        rows_BX = with_own_rows(torch.cat((outputs["z"], outputs["classes"]), 1), batch.sizes, self.place.comm)
        z_BL, logits_BC = rows_BX[:, : self.place.bits], rows_BX[:, self.place.bits :]
        labels_BC = torch.from_numpy(self.labels_NC[batch.rows_B]).to(z_BL)
        classes = classification(logits_BC, labels_BC, self.multi)
        pairs = pair_term(z_BL, labels_BC, self.settings.distance)
        backward = classes + self.settings.gamma * pairs
        terms = {"loss": backward.detach(), "classification": classes.detach(), "pair": pairs.detach()}
        return Loss(backward, terms)


def is_multi(chosen: Classification, labels_NC: NDArray[np.bool_]) -> bool:
    """Whether the sigmoid form is used. InvalidInput where the softmax is asked for and an image has several labels."""
    several = np.flatnonzero(labels_NC.sum(1) > 1)
    if chosen == "single" and len(several):
        raise InvalidInput(
            f"csdh with classification single needs one label an image, found {len(several)} of {len(labels_NC)} with "
            f"several (the first: row {several[0]}); use classification auto or multi"
        )
    return chosen == "multi" or (chosen == "auto" and len(several) > 0)


def _check(settings: Settings) -> None:
    if settings.decay_epochs < 1:
        raise InvalidInput(f"decay_epochs must be at least 1, found {settings.decay_epochs}")
    if not settings.gamma >= 0:
        raise InvalidInput(f"gamma must be at least 0, found {settings.gamma}")
