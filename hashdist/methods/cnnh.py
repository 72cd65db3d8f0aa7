"""CNNH: Rongkai Xia, Yan Pan, Hanjiang Lai, Cong Liu, Shuicheng Yan, "Supervised Hashing for Image Retrieval via Image
Representation Learning", AAAI 2014. Supervised, in two stages: codes from the labels alone, then a network to them.

| paper | here | shape | where |
|---|---|---|---|
| S, +1 where two images share a class, else -1 | `s_GG`, of label sets | [G, G] | Eq 1 |
| H in [-1, 1], min norm(S - H H^T / q)_F^2 | `codes_GL`, of label sets | [G, L] | Eqs 2-3 |
| d = max(-1 - H_ij, min(-g' / g'', 1 - H_ij)) | `factorise` | number | Eqs 4-7 |
| sgn(H), target of stage 2 | `targets_nL` | [n, L] | section 3.2 |
| outputs of the network | `outputs["z"]` | [b, L] | section 3.2 |

Departure: images with the same label set have the same code. S is the same for them, so that the n x n problem becomes
one over the G label sets, each weighted by its images (a pair of an image with itself counts as any other of its set).
Coordinates are visited in a random order of the run's seed, `sweeps` times. Stage 2 is a logistic regression of every
bit (the paper's loss of stage 2 is the network's own; CNNH+ adds the classes). `factorise` is checked by brute force.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from hashdist.methods import contract
from hashdist.methods.contract import Batch, Encode, Loss, Outputs, Place, check_labels
from hashdist.methods.parts import heads
from hashdist.methods.parts.heads import HeadSettings, HeadTraining
from hashdist.methods.parts.labels import label_sets
from hashdist.methods.parts.pairs import with_own_rows

NAME = "cnnh"
CITATION = "Xia et al., Supervised Hashing for Image Retrieval via Image Representation Learning, AAAI 2014"
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        sweeps: T, times over all coordinates in stage 1.
    """

    batch: int = 128
    epochs: int = 100
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    sweeps: int = 5


PRESETS = {
    "paper": Settings(),
    # rate by mAP within a held-out fifth of the training images (CIFAR-10, 32 bits); training labels only
    "frozen": Settings(epochs=30, optimizer="adam", lr=1e-3, lr_last=1e-5, momentum=0.0, weight_decay=0.0),
}

network = heads.linear


def factorise(
    s_GG: NDArray[np.float64], counts_G: NDArray[np.int64], bits: int, sweeps: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Stage 1: H [G, L] in [-1, 1] by Newton steps of one coordinate, cut off at the box (Eqs 4-7)."""
    h_GL, weights_G = rng.uniform(-1, 1, (len(s_GG), bits)), counts_G.astype(np.float64)
    residual_GG = h_GL @ h_GL.T - bits * s_GG  # L of the paper
    for _ in range(sweeps):
        for place in rng.permutation(h_GL.size):
            i, k = divmod(int(place), bits)
            column_G = h_GL[:, k]
            # H_ik + d changes row and column i by d H_.k, and the diagonal by d^2 besides
            slope = 4 * (weights_G * residual_GG[i]) @ column_G
            bend = 4 * ((weights_G * column_G) @ column_G + weights_G[i] * (column_G[i] ** 2 + residual_GG[i, i]))
            step = -slope / bend if bend > 0 else -np.sign(slope)
            step = min(max(step, -1 - column_G[i]), 1 - column_G[i])
            residual_GG[i] += step * column_G
            residual_GG[:, i] += step * column_G
            residual_GG[i, i] += step**2
            h_GL[i, k] += step
    return h_GL


class Method(HeadTraining):
    """Stage 2; stage 1 is done once, before it."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        self.labels_nC = check_labels(NAME, place.data.labels)
        self.targets_nL = torch.ones((place.data.n, place.bits), dtype=torch.int8, device=place.device)

    def prepare(self, head: nn.Module, encode: Encode) -> None:
        """Constants of frozen features, and stage 1."""
        super().prepare(head, encode)
        sets_GC, set_n = label_sets(self.labels_nC)
        share_GG = sets_GC.astype(np.int32) @ sets_GC.T.astype(np.int32) > 0
        rng = np.random.default_rng([self.place.seed, 0xC44])
        h_GL = factorise(np.where(share_GG, 1.0, -1.0), np.bincount(set_n), self.place.bits, self.settings.sweeps, rng)
        codes_GL = np.where(h_GL >= 0, 1, -1).astype(np.int8)
        self.targets_nL.copy_(torch.from_numpy(codes_GL[set_n]))

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Cross-entropy of every bit, a mean over B L code elements."""
        z_BL = with_own_rows(outputs["z"], batch.sizes, self.place.comm)
        targets_BL = self.targets_nL[torch.from_numpy(batch.rows_B)].to(z_BL.dtype)
        backward = functional.binary_cross_entropy_with_logits(z_BL, (targets_BL + 1) / 2)
        return Loss(backward, {"loss": backward.detach()})

    def state_dict(self) -> dict[str, Any]:
        """The codes of stage 1."""
        return {"targets": self.targets_nL}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The codes of stage 1."""
        self.targets_nL.copy_(state["targets"])
