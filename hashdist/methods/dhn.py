"""DHN: Han Zhu, Mingsheng Long, Jianmin Wang, Yue Cao, "Deep Hashing Network for Efficient Similarity Retrieval",
AAAI 2016. Supervised; pair likelihood and a smooth penalty on outputs that are not near +-1.

| paper | here | shape | where |
|---|---|---|---|
| z_i, output of fch, tanh | `outputs["z"]` | [b, L] | section 3 |
| s_ij in {0, 1} | `likelihood.similar` | [B, B] | section 3 |
| <z_i, z_j>, halved as in DPSH | `likelihood.half_inner` | [B, B] | Eq 3 |
| L = sum log(1 + e^<z, z>) - s <z, z> | `pair` | number | Eq 4 |
| Q = sum log cosh(abs(z) - 1) | `likelihood.log_cosh` | number | Eq 6 |
| L + lambda Q | `loss` | number | Eq 7 |

Pairs are those of the batch. Both terms are means, over B^2 pairs and over B L code elements, so that lambda does not
depend on the batch; .1 is the weight of a re-implementation that takes such means (the paper chooses it by validation).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place, check_labels
from hashdist.methods.parts import heads
from hashdist.methods.parts.heads import HeadSettings, HeadTraining
from hashdist.methods.parts.likelihood import half_inner, indicator, log_cosh, negative_log_likelihood, similar
from hashdist.methods.parts.pairs import with_own_rows

NAME = "dhn"
CITATION = "Zhu et al., Deep Hashing Network for Efficient Similarity Retrieval, AAAI 2016"
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        lambda_: weight of the quantisation term.
    """

    batch: int = 64
    epochs: int = 100
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lambda_: float = 0.1


PRESETS = {
    "paper": Settings(),
    # rate by mAP within a held-out fifth of the training images (CIFAR-10, 32 bits); training labels only
    "frozen": Settings(
        epochs=30, batch=128, optimizer="adam", lr=1e-3, lr_last=1e-5, weight_decay=0.0, feature_length=16.0
    ),
}

network = heads.tanh


class Method(HeadTraining):
    """Eq 7."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        self.labels_nC = indicator(check_labels(NAME, place.data.labels), place.device).to(place.dtype)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 7 of the batch."""
        z_BL = with_own_rows(outputs["z"], batch.sizes, self.place.comm)
        labels_BC = self.labels_nC[torch.from_numpy(batch.rows_B)]
        pair = negative_log_likelihood(half_inner(z_BL, z_BL), similar(labels_BC, labels_BC)).mean()
        quantisation = log_cosh(z_BL.abs() - 1).mean()
        backward = pair + self.settings.lambda_ * quantisation
        terms = {"loss": backward, "pair": pair, "quantisation": quantisation}
        return Loss(backward, {name: term.detach() for name, term in terms.items()})
