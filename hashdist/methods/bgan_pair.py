"""BGAN's pair term: Jingkuan Song, Tao He, Lianli Gao, Xing Xu, Alan Hanjalic, Heng Tao Shen, "Binary Generative
Adversarial Networks for Image Retrieval", AAAI 2018. Unsupervised; the neighbourhood loss alone, without generator.

| paper | here | shape | where |
|---|---|---|---|
| S, neighbours' neighbours as in DDH | `data.graph`, by the graph stage | [n, n] | section 3.3 |
| s_ij, +1 or -1 | `ImplicitW.block` | [B, B] | section 3.3 |
| b_i = sgn(z_i), approximated while training | `b_BL` = tanh(beta z) | [B, L] | section 3.2 |
| 1/2 sum (b_i.b_j / L - s_ij)^2 | `loss` | number | neighbourhood loss |

Left out: generator and discriminator, which need images and bring the content and adversarial losses. beta rises from 1
to beta_last in equal ratios over the stages, in place of the paper's own smooth functions. The rates are not
checked against anything (the released code has Adam with an epsilon of 1, and pair weight 10, which with one term only
scales the rate).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from hashdist.ground.errors import InvalidInput
from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place
from hashdist.methods.parts import heads
from hashdist.methods.parts.heads import HeadSettings, HeadTraining
from hashdist.methods.parts.likelihood import hardness
from hashdist.methods.parts.pairs import with_own_rows
from hashdist.methods.parts.similarity import ImplicitW

NAME = "bgan_pair"
CITATION = "Song et al., Binary Generative Adversarial Networks for Image Retrieval, AAAI 2018"
USES: Literal["graph", "labels", "features"] = "graph"
GRAPH: contract.GraphRule = "union"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        beta_last: slope of tanh in the last stage; it is 1 in the first.
        stages: how many, evenly over the run.
    """

    epochs: int = 60
    optimizer: Literal["sgd", "rmsprop", "adam"] = "adam"
    lr: float = 1e-4
    beta_last: float = 10.0
    stages: int = 10


PRESETS = {
    "paper": Settings(),
    # not tuned
    "frozen": Settings(epochs=30, lr=1e-3, lr_last=1e-5),
}

network = heads.linear


class Method(HeadTraining):
    """The neighbourhood loss."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        graph = place.data.graph
        if graph is None:
            raise InvalidInput("bgan_pair needs the neighbour graph of its training images, found none; build it first")
        self.w = ImplicitW(graph.indptr, graph.indices, place.device, place.dtype)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Half the mean over the batch's pairs, the diagonal (s = 1) among them."""
        z_BL, chosen = with_own_rows(outputs["z"], batch.sizes, self.place.comm), self.settings
        b_BL = torch.tanh(hardness(batch.step, self.steps, chosen.stages, chosen.beta_last) * z_BL)
        backward = (b_BL @ b_BL.T / self.place.bits - self.w.block(batch.rows_B)).square().mean() / 2
        return Loss(backward, {"loss": backward.detach()})
