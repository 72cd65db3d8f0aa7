"""DDH: Jingkuan Song, Tao He, Hangbo Fan, Lianli Gao, "Deep Discrete Hashing with Self-supervised Pairwise Labels",
ECML PKDD 2017. Unsupervised; learns from pairs that a fixed graph, of neighbours' neighbours, calls similar or not.

| paper | here | shape | where |
|---|---|---|---|
| x_i | features of the neighbour graph: ResNet's pool5 (frozen mode: the committed ones) | [n, D] | Eq 1 |
| L_i, T_i, S = union over T_i of L_k | `data.graph`, by the graph stage (D1; K1 = 15, K2 = 6) | [n, n] | Eqs 1-3 |
| s_ij, +1 or -1 | `Similarity` | | Eqs 3, 5 |
| phi_i, output of full7 | `features_bD`, of CNN-F (hashdist/models/cnnf.py) or any backbone | [b, D] | Table 1 |
| z_i = W^T phi_i + c | `z_bL` | [b, L] | Table 1 |
| b_i = sgn(z_i), sgn(0) = +1 | `pairs.signs(z_bL)` | [b, L] | Eq 4 |
| J, over pairs | `bank_loss` (D3), or `batch_loss` | number | Eqs 5, 10, 12 |
| lambda1/2 sum_i norm(z_i - b_i)^2 | `quantisation` (D2) | number | Eq 12 |
| lambda2 (norm(W)^2 + norm(c)^2) | `weight_decay` of the optimiser | | Eq 12 |

The bank form (D3) keeps of all n images:

| symbol | here | shape |
|---|---|---|
| U, the latest output u_j of every image | `bank.u_nL` | [n, L] |
| t = sum_j u_j | `bank.t_L` | [L] |
| G = sum_j u_j u_j^T | `bank.g_LL` | [L, L] |
| P_i, images j with s_ij = +1, i among them | `Similarity.positive_sums` adds their u_j | |
| q_i = sum_j s_ij u_j = 2 sum_{j in P_i} u_j - t | `q_bL` | [b, L] |

Departures carry the number of the decision (docs/decisions.md).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hashdist.ground.bits import check_bits
from hashdist.ground.errors import InvalidInput
from hashdist.ground.progress import say
from hashdist.ground.ranges import blocks
from hashdist.methods import contract
from hashdist.methods.contract import Batch, Encode, Graph, Loss, Outputs, Place
from hashdist.methods.parts.labels import label_sets
from hashdist.methods.parts.pairs import all_rows, signs, sum_over_ranks, with_own_rows
from hashdist.methods.parts.similarity import ImplicitW
from hashdist.methods.parts.standardize import Standardize

NAME = "ddh"
CITATION = "Song et al., Deep Discrete Hashing with Self-supervised Pairwise Labels, ECML PKDD 2017"
USES: Literal["graph", "labels", "features"] = "graph"
GRAPH: contract.GraphRule = "union"

_ROWS = 8192  # of U that are summed at once
_FEW = 20  # positive pairs a batch


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters.

    Args:
        rounds: 1; the graph is fixed (the paper found no gain in making it again).
        epochs: passes over the training images.
        batch: images of a global batch.
        pairs: "bank" compares a batch with the latest outputs of all images (D3), "batch" with itself.
        similarity: "graph" is S of the paper; with "labels" s_ij = +1 iff i and j have a label in common.
        lambda1: quantisation weight; what counts is lambda1 / n_ref (D2).
        n_ref: see lambda1. 10000 is the release's n; 128 gives the literal sums over a batch of 128 and itself.
        optimizer: plain SGD, or Adam.
        lr: learning rate of the first epoch.
        lr_fall: learning rate of the last epoch over that of the first; log-spaced between them.
        weight_decay: lambda2.
        decay_on: what it is for: the hash layer (W, c), or all layers.
        feature_length: typical length that frozen features are scaled to after centring; 0 = as they come, not
            centred either.
    """

    rounds: int = 1
    epochs: int = 100
    batch: int = 128
    pairs: Literal["bank", "batch"] = "bank"
    similarity: Literal["graph", "labels"] = "graph"
    lambda1: float = 15.0
    n_ref: int = 10_000
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 1e-3
    lr_fall: float = 1e-4
    weight_decay: float = 1e-5
    decay_on: Literal["hash", "all"] = "hash"
    feature_length: float = 64.0


PRESETS = {
    # the paper names no number of epochs and no schedule: both are the release's, from the paper's learning rate on
    "paper": Settings(),
    # its graph has K1 = 20 and K2 = 30: --graph.neighbours 20 --graph.shared 30
    "release": Settings(batch=50, lr=1e-2, weight_decay=5e-4, decay_on="all"),
    # a head alone on frozen features (H40); chosen without labels: of the values tried, those with the lowest loss,
    # at 16 and 64 bits, on as many images that were not trained on, with their own graph
    "frozen": Settings(epochs=60, optimizer="adam", lr=1e-3, weight_decay=1e-3),
}


# ---- Table 1: the hash layer ---------------------------------------------------------------------------------------


class Head(nn.Module):
    """features [b, D] -> L, linear and not squashed. W and c start as 0.01 N(0, 1), as in the release.

    Frozen features are centred and scaled first (docs/decisions.md, H40).
    """

    def __init__(self, width: int, bits: int, generator: torch.Generator) -> None:
        super().__init__()
        self.standardize = Standardize(width)
        self.hash = nn.Linear(width, check_bits(bits))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01, generator=generator)

    def forward(self, features_bD: Tensor) -> Outputs:
        """{"z": outputs [b, L]}."""
        return {"z": self.hash(self.standardize(features_bD))}


def network(
    settings: Settings,  # noqa: ARG001
    width: int,
    bits: int,
    generator: torch.Generator,
    frozen: bool = True,  # noqa: ARG001
    classes: int = 0,  # noqa: ARG001
) -> nn.Module:
    """The head on features of any width; 4096 are those of the paper."""
    return Head(width, bits, generator)


# ---- Eqs 1-3: s_ij -------------------------------------------------------------------------------------------------


class Similarity(Protocol):
    """s_ij = +1 or -1 for any two of the n images, symmetric, s_ii = +1, without a matrix of n x n."""

    def positive_sums(self, rows_b: NDArray[np.int64], u_nL: Tensor) -> Tensor:
        """sum_{j in P_i} u_j for each i of the rows, [b, L]."""

    def block(self, rows_B: NDArray[np.int64]) -> Tensor:
        """s_ij of the rows, [B, B]."""

    def recompute(self, u_nL: Tensor) -> None:
        """Take anew what is summed over U."""

    def correct(self, rows_B: NDArray[np.int64], change_BL: Tensor) -> None:
        """These rows of U have changed by that much (float64)."""

    def state_dict(self) -> dict[str, Tensor]:
        """The sums over U."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with it."""


class GraphSimilarity:
    """S of Eq 3: P_i is row i of the graph, and i."""

    def __init__(self, graph: Graph, place: Place) -> None:
        # as plain arrays: slices of memory maps are slow to make
        self._indptr, self._indices = np.asarray(graph.indptr), np.asarray(graph.indices)
        self._s = ImplicitW(self._indptr, self._indices, place.device, place.dtype)
        self._device = place.device

    def positive_sums(self, rows_b: NDArray[np.int64], u_nL: Tensor) -> Tensor:
        """As many rows of U as there are positives, whatever n is."""
        starts, stops = self._indptr[rows_b], self._indptr[rows_b + 1]
        columns = np.concatenate([self._indices[a:b] for a, b in zip(starts, stops, strict=True)])
        bags = (stops - starts).cumsum() - (stops - starts)
        others_bL = functional.embedding_bag(self._on(columns), u_nL, self._on(bags.astype(np.int32)), mode="sum")
        return others_bL + u_nL[self._on(rows_b)]

    def block(self, rows_B: NDArray[np.int64]) -> Tensor:
        """Looked up in the rows of the graph."""
        return self._s.block(rows_B)

    def warn_of_starvation(self, batch: int) -> None:
        """Say so where the pairs of a uniform batch hold hardly any positive one."""
        n = self._s.n
        expected = batch * (batch - 1) * self._s.edges / n / max(1, n - 1)
        if expected < _FEW:
            say(
                f"warning: a global batch of {batch} of {n} images holds {expected:.1f} positive pairs on average, "
                f"fewer than {_FEW}; set the option pairs to bank, which compares with all images at the same cost"
            )

    def recompute(self, u_nL: Tensor) -> None:
        """Nothing is kept."""

    def correct(self, rows_B: NDArray[np.int64], change_BL: Tensor) -> None:
        """Nothing is kept."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is kept."""

    def _on(self, rows: NDArray[Any]) -> Tensor:
        return torch.from_numpy(rows).to(self._device)


class LabelSimilarity:
    """s_ij = +1 iff the images have a label in common: P_i is a union of classes of equal label sets.

    u_j is summed over each of the S distinct label sets, so that an image costs O(S L), not O(n L).
    """

    sums_SL: Tensor

    def __init__(self, labels_nC: NDArray[np.bool_], place: Place) -> None:
        sets_SC, self._set_n = label_sets(labels_nC)
        self._labels_SC = torch.from_numpy(sets_SC).to(place.device, torch.float32)
        self._dtype, self._device = place.dtype, place.device
        self.sums_SL = torch.zeros((len(sets_SC), place.bits), dtype=torch.float64, device=place.device)

    def positive_sums(self, rows_b: NDArray[np.int64], u_nL: Tensor) -> Tensor:
        """Sums of those label sets that share a label with the image's own."""
        shared_bS = self._labels(rows_b) @ self._labels_SC.T > 0
        return (shared_bS.double() @ self.sums_SL).to(u_nL.dtype)

    def block(self, rows_B: NDArray[np.int64]) -> Tensor:
        """From the labels of the rows."""
        labels_BC = self._labels(rows_B)
        return (labels_BC @ labels_BC.T > 0).to(self._dtype) * 2 - 1

    def recompute(self, u_nL: Tensor) -> None:
        """Sums over the label sets; on the CPU, where the order of additions is fixed."""
        sums_SL = torch.zeros(self.sums_SL.shape, dtype=torch.float64)
        for start, stop in blocks(len(u_nL), _ROWS):
            sums_SL.index_add_(0, torch.from_numpy(self._set_n[start:stop]), u_nL[start:stop].cpu().double())
        self.sums_SL = sums_SL.to(self._device)

    def correct(self, rows_B: NDArray[np.int64], change_BL: Tensor) -> None:
        """Add the changes to the sums of the batch's label sets, by a product: in a fixed order on any device."""
        sets, which_B = np.unique(self._set_n[rows_B], return_inverse=True)
        member_TB = torch.from_numpy(np.arange(len(sets))[:, None] == which_B).to(self._device, torch.float64)
        self.sums_SL[torch.from_numpy(sets).to(self._device)] += member_TB @ change_BL

    def state_dict(self) -> dict[str, Tensor]:
        """The sums."""
        return {"sums": self.sums_SL}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The sums."""
        self.sums_SL = state["sums"].to(self._device, copy=True)

    def _labels(self, rows: NDArray[np.int64]) -> Tensor:
        return self._labels_SC[torch.from_numpy(self._set_n[rows]).to(self._device)]


# ---- Eqs 5, 10 and 12: the loss ------------------------------------------------------------------------------------


def quantisation(z_bL: Tensor) -> Tensor:
    """1/2 sum_i norm(z_i - b_i)^2 over the rows given; b_i of this same pass is a constant."""
    return 0.5 * ((z_bL - signs(z_bL)) ** 2).sum()


def batch_loss(z_BL: Tensor, s_BB: Tensor) -> Tensor:
    """Eq 10 over the pairs of a batch, both roles live, i = j included: mean of 1/2 (z_i.z_j / L - s_ij)^2."""
    return 0.5 * ((z_BL @ z_BL.T / z_BL.shape[1] - s_BB) ** 2).mean()


def bank_loss(z_bL: Tensor, g_LL: Tensor, q_bL: Tensor, n: int) -> Tensor:
    """Eq 10 against all n columns of the bank, exactly: [b], for each i the mean over j of 1/2 (z_i.u_j / L - s_ij)^2.

    D3: u_j is a constant, and the square multiplied out needs no j:
    sum_j (z_i.u_j / L - s_ij)^2 = z_i^T G z_i / L^2 - (2 / L) z_i.q_i + n.
    """
    bits = z_bL.shape[1]
    mean_g_LL, mean_q_bL = (g_LL / n).to(z_bL.dtype), (q_bL / n).to(z_bL.dtype)
    z_bL = z_bL / bits
    return 0.5 * ((z_bL @ mean_g_LL * z_bL).sum(1) - 2 * (z_bL * mean_q_bL).sum(1) + 1)


class Bank:
    """The latest output of every image, U in the dtype of training, and its sums t and G in float64.

    Every rank holds the same one: 4 n L bytes.
    """

    t_L: Tensor
    g_LL: Tensor

    def __init__(self, u_nL: Tensor) -> None:
        self.u_nL = u_nL
        self.recompute()

    def recompute(self) -> None:
        """t and G from U, over fixed blocks of rows."""
        self.t_L = self.u_nL.new_zeros(self.u_nL.shape[1], dtype=torch.float64)
        self.g_LL = torch.diag(self.t_L)
        for start, stop in blocks(len(self.u_nL), _ROWS):
            u = self.u_nL[start:stop].double()
            self.t_L += u.sum(0)
            self.g_LL += u.T @ u

    def write(self, rows_B: NDArray[np.int64], z_BL: Tensor) -> Tensor:
        """Put fresh outputs of distinct rows into the bank; returns by how much the rows changed, float64 [B, L]."""
        at = torch.from_numpy(rows_B).to(self.u_nL.device)
        old, new = self.u_nL[at].double(), z_BL.double()
        self.u_nL[at] = z_BL
        self.t_L += (new - old).sum(0)
        self.g_LL += new.T @ new - old.T @ old
        return new - old

    def state_dict(self) -> dict[str, Tensor]:
        """U, t and G: summed anew, t and G would differ in the last bits."""
        return {"u": self.u_nL, "t": self.t_L, "g": self.g_LL}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], place: Place) -> "Bank":
        """From a state_dict."""
        bank = cls.__new__(cls)
        bank.u_nL = state["u"].to(place.device, place.dtype, copy=True)
        bank.t_L, bank.g_LL = (state[name].to(place.device, copy=True) for name in ("t", "g"))
        return bank


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------


class Method(contract.Method):
    """DDH in one run: the pairs, the bank, the loss and its optimiser."""

    settings: Settings
    bank: Bank

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        _check(settings)
        self.similarity = _similarity(settings, place)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD without momentum; lambda2 as weight decay of W and c, which come last, or of all."""
        chosen, (*others, weight, bias) = self.settings, list(parameters)
        groups = [{"params": [weight, bias], "weight_decay": chosen.weight_decay}]
        if others:
            groups.append({"params": others, "weight_decay": chosen.weight_decay * (chosen.decay_on == "all")})
        if chosen.optimizer == "adam":
            return torch.optim.Adam(groups, lr=chosen.lr, fused=True)
        return torch.optim.SGD(groups, lr=chosen.lr, fused=True)

    def adjust(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """The learning rate falls from epoch to epoch, evenly in its logarithm (the release)."""
        chosen = self.settings
        epoch = step // (self.place.data.n // chosen.batch)
        last = chosen.rounds * chosen.epochs - 1
        for group in optimizer.param_groups:
            group["lr"] = chosen.lr * chosen.lr_fall ** (epoch / max(1, last))

    def prepare(self, head: nn.Module, encode: Encode) -> None:
        """Constants of frozen features; the bank starts full, the release's starts at zero (D3)."""
        super().prepare(head, encode)
        if self.settings.pairs == "bank":
            self.bank = Bank(encode().to(self.place.device, self.place.dtype))
            self.similarity.recompute(self.bank.u_nL)
        elif self.place.comm.rank == 0 and isinstance(self.similarity, GraphSimilarity):
            self.similarity.warn_of_starvation(self.settings.batch)

    def start_epoch(self, epoch: int, encode: Encode) -> None:  # noqa: ARG002
        """Sums over the bank anew, so that roundings of corrections do not add up."""
        if self.settings.pairs == "bank":
            self.bank.recompute()
            self.similarity.recompute(self.bank.u_nL)

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 12 without its last term, as means over the batch (D2)."""
        z_bL, size = outputs["z"], len(batch.rows_B)
        if self.settings.pairs == "batch":
            z_BL = with_own_rows(z_bL, batch.sizes, self.place.comm)
            pair, quant = batch_loss(z_BL, self.similarity.block(batch.rows_B)), quantisation(z_BL) / size
            values = torch.stack((pair, quant)).detach()
        else:
            pair, quant = self._own_pairs(z_bL, batch) / size, quantisation(z_bL) / size
            values = sum_over_ranks(torch.stack((pair, quant)).detach(), self.place.comm)
        weight = self.settings.lambda1 / self.settings.n_ref
        terms = {"loss": values[0] + weight * values[1], "pair": values[0], "quantisation": values[1]}
        return Loss(pair + weight * quant, terms)

    def _own_pairs(self, z_bL: Tensor, batch: Batch) -> Tensor:
        """The own rows' pairs with the bank, summed over the rows; the batch is written into the bank first."""
        change_BL = self.bank.write(batch.rows_B, all_rows(z_bL, batch.sizes, self.place.comm))
        self.similarity.correct(batch.rows_B, change_BL)
        positive_bL = self.similarity.positive_sums(batch.rows_B[batch.own], self.bank.u_nL)
        q_bL = 2 * positive_bL.double() - self.bank.t_L
        return bank_loss(z_bL, self.bank.g_LL, q_bL, self.place.data.n).sum()

    def state_dict(self) -> dict[str, Any]:
        """The bank and the sums over it."""
        if self.settings.pairs == "batch":
            return {}
        return {"bank": self.bank.state_dict(), "similarity": self.similarity.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The bank and the sums over it."""
        if self.settings.pairs == "bank":
            self.bank = Bank.from_state(state["bank"], self.place)
            self.similarity.load_state_dict(state["similarity"])


def _similarity(settings: Settings, place: Place) -> Similarity:
    if settings.similarity == "labels":
        return LabelSimilarity(contract.check_labels(NAME, place.data.labels), place)
    graph = place.data.graph
    if graph is None or len(graph.indptr) != place.data.n + 1:
        found = "none" if graph is None else f"one of {len(graph.indptr) - 1} images"
        raise InvalidInput(
            f"ddh needs the neighbour graph of its {place.data.n} training images, found {found}; build it first, "
            f"or set the option similarity to labels"
        )
    return GraphSimilarity(graph, place)


def _check(settings: Settings) -> None:
    if settings.n_ref < 1 or settings.lambda1 < 0 or not settings.lr_fall > 0:
        raise InvalidInput(
            f"n_ref must be at least 1, lambda1 at least 0 and lr_fall positive, found {settings.n_ref}, "
            f"{settings.lambda1} and {settings.lr_fall}"
        )
