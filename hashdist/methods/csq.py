"""CSQ: Li Yuan, Tao Wang, Xiaopeng Zhang, Francis E. H. Tay, Zequn Jie, Wei Liu, Jiashi Feng, "Central Similarity
Quantization for Efficient Image and Video Retrieval", CVPR 2020. Supervised; codes go to centres that are fixed before.

| paper | here | shape | where |
|---|---|---|---|
| h_i in (0, 1) | sigmoid(2 z) = (tanh(z) + 1) / 2 | [b, L] | section 3 |
| C = {c_1, ..., c_q}, from a Hadamard matrix | `centres` | [C, L] | Definition 1, Algorithm 1 |
| c'_i, the centre of image i's classes | `centres_of_images` | [n, L] | section 3.2 |
| L_C = mean BCE(h_i, c'_i) | `central` | number | Eq 5 |
| L_Q = sum log cosh(abs(2 h - 1) - 1) | `quantisation` | number | Eq 7 |
| L_C + lambda_1 L_Q | `loss` | number | Eq 8 |

Both terms are means over the B L code elements, as in the released code. The cross-entropy is taken of 2 z with its
logarithm inside, so that saturated bits keep their gradient. Ties of the majority and the rows of the Hadamard matrix
are drawn from the run's seed; the released code takes the first rows, which repeat bits where C is well below L.
The weight 1e-4 and Adam are the re-implementation's (lambda_1 of the paper is chosen by validation).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hashdist.ground.bits import check_bits
from hashdist.methods import contract
from hashdist.methods.contract import Batch, Loss, Outputs, Place, check_labels
from hashdist.methods.parts import heads
from hashdist.methods.parts.heads import HeadSettings, HeadTraining
from hashdist.methods.parts.likelihood import log_cosh
from hashdist.methods.parts.pairs import with_own_rows

NAME = "csq"
CITATION = "Yuan et al., Central Similarity Quantization for Efficient Image and Video Retrieval, CVPR 2020"
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Hyper-parameters; the rest stands in heads.HeadSettings.

    Args:
        lambda_: weight of the quantisation term.
    """

    batch: int = 64
    epochs: int = 90
    optimizer: Literal["sgd", "rmsprop", "adam"] = "adam"
    lr: float = 1e-5
    lambda_: float = 1e-4


PRESETS = {
    "paper": Settings(),
    # rate by mAP within a held-out fifth of the training images (CIFAR-10, 32 bits); training labels only
    "frozen": Settings(epochs=30, batch=128, lr=1e-3, lr_last=1e-5),
}

network = heads.linear


def sylvester(size: int) -> NDArray[np.int8]:
    """The Hadamard matrix of a power of two, [size, size] of +-1: H_2k = [[H, H], [H, -H]]."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"Sylvester's construction needs a power of two, found {size}")
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def centres(classes: int, bits: int, rng: np.random.Generator) -> NDArray[np.int8]:
    """One centre a class, [C, L] of +-1 (Algorithm 1 of CSQ).

    Rows of H_L drawn without repetition where L is a power of two and C <= L: any two differ in L / 2 bits. Rows of
    [H; -H] where C <= 2 L: L / 2 or L bits. Independent fair signs otherwise: L / 2 bits on average.
    """
    check_bits(bits)
    if bits & (bits - 1) or classes > 2 * bits:
        return (2 * rng.integers(0, 2, (classes, bits)) - 1).astype(np.int8)
    rows: NDArray[np.int8] = sylvester(bits)
    if classes > bits:
        rows = np.concatenate([rows, -rows])
    return rows[rng.permutation(len(rows))[:classes]]


def centres_of_images(
    labels_NC: NDArray[np.bool_], centres_CL: NDArray[np.int8], rng: np.random.Generator
) -> NDArray[np.int8]:
    """The centre of every image, [N, L]: bit by bit the majority of its classes' centres, a tie the sign of one draw.

    The draw is one random code for all images, so that images with the same labels have the same centre.
    """
    votes_NL = labels_NC.astype(np.int32) @ centres_CL.astype(np.int32)
    tie_L = 2 * rng.integers(0, 2, centres_CL.shape[1]) - 1
    return np.where(2 * votes_NL + tie_L > 0, 1, -1).astype(np.int8)


def central(z_BL: Tensor, centres_BL: Tensor) -> Tensor:
    """Eq 5: cross-entropy of (tanh(z) + 1) / 2 = sigmoid(2 z) and the centre's bits, a mean over all elements."""
    return functional.binary_cross_entropy_with_logits(2 * z_BL, (centres_BL + 1) / 2)


def quantisation(z_BL: Tensor) -> Tensor:
    """Eq 7, a mean over all elements; 2 h - 1 = tanh(z)."""
    return log_cosh(torch.tanh(z_BL).abs() - 1).mean()


class Method(HeadTraining):
    """Eq 8."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        labels_nC = check_labels(NAME, place.data.labels)
        rng = np.random.default_rng([place.seed, 0xC5])
        centres_CL = centres(labels_nC.shape[1], place.bits, rng)
        self.centres_nL = torch.from_numpy(centres_of_images(labels_nC, centres_CL, rng)).to(place.device)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 8 of the batch."""
        z_BL = with_own_rows(outputs["z"], batch.sizes, self.place.comm)
        centres_BL = self.centres_nL[torch.from_numpy(batch.rows_B)].to(z_BL.dtype)
        center, quant = central(z_BL, centres_BL), quantisation(z_BL)
        backward = center + self.settings.lambda_ * quant
        terms = {"loss": backward, "central": center, "quantisation": quant}
        return Loss(backward, {name: term.detach() for name, term in terms.items()})
