"""SADH: Zhengyang Yu, Zhihao Dou, Erwin M. Bakker, Song Wu, "Self-supervised asymmetric deep hashing with
margin-scalable constraint for image retrieval", arXiv 2012.03820, 2020 (later Neurocomputing 483, 2022). Supervised;
learns from labels alone: a network of labels (LabNet) says how similar codes and features of two images should be, then
a network of images (ImgNet) follows it.

| paper | here | shape | where |
|---|---|---|---|
| l_i, label vectors | `labels_BC`; distinct ones `sets_SC` | [n, C], [S, C] | section 3.1 |
| s_ij = 1 iff i and j share a class | `similar_BB`, `similar_bR` | [B, B], [b, R] | section 3.1 |
| F^l, H^l, Lhat^l of LabNet | outputs "features", "z", "classes" | [., 2048], [., L], [., C] | section 3.2 |
| Delta^l_ij, Gamma^l_ij: cosines of F^l and H^l | in `labnet_loss` | [S, S] | Eq 6 |
| U and Q, maps of codes and of features (D9) | `Guide.map_RX` of each | [R, L], [R, 2048] | section 3.2.2 |
| M, the margins | `Guide.pair_margins`, `Guide.map_margins` | [B, B], [b, R] | Eq 8 |
| F_i, H_i, Lhat_i of ImgNet | outputs "features", "z", "classes" | [b, 2048], [b, L], [b, C] | section 3.3 |
| v_i, b_i = sgn(H_i) | `signs(z)` | [b, L] | J6 |
| J1 to J6 | `Method.loss` | numbers | Eqs 7, 9 |
| m of LabNet; of SADH-mars | `labnet_margin`; `margin` | numbers | Eq 6 |
| Theta_ij = H_i . H_j of SADH-cos | in `pair_cost` | [B, B] | Eq 12 |
| alpha, lambda, gamma, mu, eta, beta | the same, `lambda_` | numbers | Eq 9 |
| K, C | L, C | | |

Departures carry the number of the decision (docs/decisions.md). Of the release, its augmentation (resize to 256, random
flip, random crop of 224; none on CIFAR-10) is not done: images are prepared alike in training and in encoding.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hashdist.ground.bits import check_bits
from hashdist.ground.errors import InvalidInput
from hashdist.ground.permutation import epoch_batches
from hashdist.ground.progress import say
from hashdist.methods import contract
from hashdist.methods.contract import Batch, Encode, Loss, Outputs, Place
from hashdist.methods.parts.labels import label_sets
from hashdist.methods.parts.pairs import signs, sum_over_ranks, unit, with_own_rows
from hashdist.methods.parts.standardize import Standardize

NAME = "sadh"
CITATION = (
    "Yu et al., Self-supervised asymmetric deep hashing with margin-scalable constraint for image retrieval, "
    "arXiv 2012.03820, 2020"
)
USES: Literal["graph", "labels", "features"] = "labels"
GRAPH: contract.GraphRule = "none"

Pair = Literal["scalable", "constant", "likelihood"]

_LABNET_STREAM = 0x4C61624E6574
"""Keeps LabNet's initial weights apart from those of the head, which come from the seed itself."""

_TABLE = 1 << 22
"""Most entries of a table in which the margins of all label sets are looked up; above, each batch computes them."""


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters. SADH-asm is gamma = mu = 0, SADH-mars pair = "constant", SADH-cos pair = "likelihood" (D17).

    Args:
        rounds: 1; nothing changes between rounds.
        epochs: passes of ImgNet over the training images.
        batch: images of a global batch.
        optimizer: of ImgNet.
        lr: its learning rate; the paper says "chosen from 1e-3 to 1e-8", no schedule (H50).
        lr_decay: factor on the learning rate after every `decay_epochs` epochs; 1 = constant.
        decay_epochs: see lr_decay.
        momentum: of SGD.
        weight_decay: on all weights that are trained.
        alpha: weight of J1, pairs of images in feature space.
        lambda_: of J2, pairs of images in code space.
        gamma: of J3, images and rows of the map Q in feature space.
        mu: of J4, images and rows of the map U in code space.
        eta: of J5, classification.
        beta: of J6, quantisation.
        pair: J1 to J4 as hinges with margins from LabNet ("scalable", Eqs 7 to 9), as hinges with the constant
            `margin` in the form of Eq 6 ("constant"), or as the likelihood of Eq 12, in LabNet too ("likelihood").
        margin: m of "constant".
        feature_theta: inner products of features in Eq 12 as they stand, or divided by their dimension.
        classification: J5 as squared error summed over the classes (D11), or as mean sigmoid cross-entropy (release).
        hash_from: the hash layer reads F (D11), or the pooled features below it (release).
        semantic: width of F.
        map_rows: one row of the maps for every distinct label set, or for every class alone (D9).
        binary_map: U is signed; in the paper and the release it is not.
        labnet_hidden: units of LabNet's hidden layer.
        labnet_epochs: passes of LabNet over the training images' labels.
        labnet_steps: end LabNet's training after this many steps, whatever labnet_epochs; 0 = not.
        labnet_batch: images whose labels are in a mini-batch of LabNet.
        labnet_unique: every step sees all label sets, each as often as it occurs: the objective over all images.
        labnet_lr: learning rate of LabNet's Adam; the paper does not say (H50).
        labnet_decay_from: LabNet's learning rate falls to a tenth at each of the epochs from this one (counted from
            0) to labnet_decay_to.
        labnet_decay_to: see labnet_decay_from; 0 = constant rate.
        labnet_weight_decay: of LabNet's Adam.
        labnet_margin: m of Eq 6.
        labnet_alpha: weight of the pair term of LabNet's features.
        labnet_lambda: of LabNet's codes.
        labnet_eta: of LabNet's classification.
        labnet_beta: of LabNet's quantisation.
        labnet_classification: squared error as a mean over images ("images"), or summed over the mini-batch and
            divided by C ("release").
        feature_length: typical length that frozen features are scaled to after centring; 0 = as they come, not
            centred either.
    """

    rounds: int = 1
    epochs: int = 120
    batch: int = 64
    optimizer: Literal["sgd", "rmsprop"] = "sgd"
    lr: float = 1e-3
    lr_decay: float = 1.0
    decay_epochs: int = 40
    momentum: float = 0.9
    weight_decay: float = 0.0
    alpha: float = 0.01
    lambda_: float = 1.0
    gamma: float = 0.01
    mu: float = 1.0
    eta: float = 2.0
    beta: float = 0.05
    pair: Pair = "scalable"
    margin: float = 0.0
    feature_theta: Literal["plain", "mean"] = "plain"
    classification: Literal["squared", "bce"] = "squared"
    hash_from: Literal["semantic", "pooled"] = "semantic"
    semantic: int = 2048
    map_rows: Literal["label_sets", "classes"] = "label_sets"
    binary_map: bool = False
    labnet_hidden: int = 4096
    labnet_epochs: int = 15
    labnet_steps: int = 0
    labnet_batch: int = 64
    labnet_unique: bool = False
    labnet_lr: float = 1e-3
    labnet_decay_from: int = 0
    labnet_decay_to: int = 0
    labnet_weight_decay: float = 0.0
    labnet_margin: float = 0.0
    labnet_alpha: float = 2.0
    labnet_lambda: float = 0.5
    labnet_eta: float = 0.5
    labnet_beta: float = 0.1
    labnet_classification: Literal["images", "release"] = "images"
    feature_length: float = 64.0


PRESETS = {
    "paper": Settings(),
    # the released scripts, whose hinges have no 1/2: their weights 1 are 2 here
    "release": Settings(
        epochs=30,
        batch=48,
        optimizer="rmsprop",
        lr=1e-5,
        weight_decay=1e-6,
        alpha=2.0,
        lambda_=2.0,
        gamma=2.0,
        mu=2.0,
        eta=0.1,
        beta=0.01,
        classification="bce",
        hash_from="pooled",
        labnet_lr=5e-3,
        labnet_decay_from=2,
        labnet_decay_to=6,
        labnet_weight_decay=5e-4,
        labnet_margin=0.2,
        labnet_alpha=2.0,
        labnet_lambda=2.0,
        labnet_eta=2.0,
        labnet_beta=0.1,
        labnet_classification="release",
    ),
    # H57: a head alone on frozen features; chosen on held-out training images
    "frozen": Settings(
        epochs=12, lr=2e-2, lr_decay=0.1, decay_epochs=8, weight_decay=2e-2, labnet_steps=120, feature_length=16.0
    ),
}


# ---- section 3.2: LabNet, from labels to codes ---------------------------------------------------------------------


class LabNet(nn.Module):
    """Label vectors [b, C] -> 4096, ReLU -> features [b, 2048] -> codes (tanh) [b, L] and classes [b, C].

    Four layers in the paper: two hidden ones and two heads. As released, the features have no activation, and all
    weights and biases start from N(0, .01).
    """

    def __init__(self, classes: int, bits: int, settings: Settings, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = nn.Linear(classes, settings.labnet_hidden)
        self.semantic = nn.Linear(settings.labnet_hidden, settings.semantic)
        self.hash = nn.Linear(settings.semantic, bits)
        self.classify = nn.Linear(settings.semantic, classes)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01, generator=generator)

    def forward(self, labels_bC: Tensor) -> Outputs:
        """{"features": F^l, "z": H^l, "classes": Lhat^l}."""
        features = self.semantic(torch.relu(self.hidden(labels_bC)))
        return {"features": features, "z": torch.tanh(self.hash(features)), "classes": self.classify(features)}


def pair_cost(form: Pair, similar: Tensor, margin: Tensor | float, x: Tensor) -> Tensor:
    """The cost of each pair, of x's shape; x are cosines, for "likelihood" inner products.

    Eqs 7 to 9: 1/2 max(M - x, 0) for similar pairs, 1/2 max(x - M, 0) for others (D10; Eq 11 as printed is minus its
    derivative). Eq 6 and SADH-mars: max(m + x, 0) for others. Eq 12: log(1 + e^x) - s x.
    """
    if form == "likelihood":
        return -functional.logsigmoid(-x) - torch.where(similar, x, 0.0)
    other = x - margin if form == "scalable" else x + margin
    return torch.relu(torch.where(similar, margin - x, other)) / 2


def comparable(rows_NX: Tensor, form: Pair, divisor: float = 1.0) -> Tensor:
    """Rows whose inner products are what `pair_cost` takes: unit rows, for "likelihood" the rows / sqrt(divisor)."""
    return rows_NX / divisor**0.5 if form == "likelihood" else unit(rows_NX)


def labnet_loss(outputs: Outputs, labels_SC: Tensor, weight_S: Tensor, settings: Settings, images: int) -> Tensor:
    """Eq 6 of images of which the share weight_S has the label set labels_SC, as means (D10).

    Images with the same labels have the same outputs, so that label sets with weights n_a / n and pairs of them with
    n_a n_b / n^2 are the objective over the images, in a mini-batch as over all.
    """
    form: Pair = "likelihood" if settings.pair == "likelihood" else "constant"
    similar_SS = labels_SC @ labels_SC.T > 0

    def pairs(rows_SX: Tensor, divisor: float) -> Tensor:
        x_SX = comparable(rows_SX, form, divisor)
        return weight_S @ pair_cost(form, similar_SS, settings.labnet_margin, x_SX @ x_SX.T) @ weight_S

    z_SL = outputs["z"]
    features = pairs(outputs["features"], _theta_divisor(settings))
    codes = pairs(z_SL, 1.0)
    classification = weight_S @ ((outputs["classes"] - labels_SC) ** 2).sum(1)
    if settings.labnet_classification == "release":
        classification = classification * images / labels_SC.shape[1]
    quantisation = weight_S @ ((z_SL - signs(z_SL)) ** 2).mean(1)
    return (
        settings.labnet_alpha * features
        + settings.labnet_lambda * codes
        + settings.labnet_eta * classification
        + settings.labnet_beta * quantisation
    )


def train_labnet(
    labnet: LabNet, sets_SC: Tensor, set_N: NDArray[np.int64], settings: Settings, seed: int
) -> tuple[float, float]:
    """Train in place on the labels sets_SC[set_N] of n images by Adam; the loss of the first and of the last step.

    Deterministic given the weights and the seed, which orders the mini-batches.
    """
    optimizer = torch.optim.Adam(
        labnet.parameters(), lr=settings.labnet_lr, weight_decay=settings.labnet_weight_decay, fused=True
    )
    first = last = torch.zeros(())
    for step, (epoch, rows_N) in enumerate(_labnet_batches(set_N, settings, seed)):
        optimizer.param_groups[0]["lr"] = labnet_rate(settings, epoch)
        sets, counts = np.unique(rows_N, return_counts=True)
        labels_SC = sets_SC[torch.from_numpy(sets).to(sets_SC.device)]
        weight_S = torch.from_numpy(counts / len(rows_N)).to(sets_SC)
        last = labnet_loss(labnet(labels_SC), labels_SC, weight_S, settings, len(rows_N))
        optimizer.zero_grad(set_to_none=True)
        last.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        first = first if step else last.detach()
    return float(first), float(last.detach())


def labnet_rate(settings: Settings, epoch: int) -> float:
    """LabNet's learning rate in an epoch."""
    if not settings.labnet_decay_to:
        return settings.labnet_lr
    decays = min(epoch, settings.labnet_decay_to) - settings.labnet_decay_from + 1
    return float(settings.labnet_lr * 0.1 ** max(0, decays))


def _labnet_batches(set_N: NDArray[np.int64], settings: Settings, seed: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(epoch, label set numbers of the images of a mini-batch), for every step."""
    size = min(settings.labnet_batch, len(set_N))

    def endless() -> Iterator[tuple[int, NDArray[np.int64]]]:
        epoch = 0
        while True:
            for rows in epoch_batches(len(set_N), size, seed, epoch):
                yield epoch, set_N if settings.labnet_unique else set_N[rows]
            epoch += 1

    return islice(endless(), settings.labnet_steps or settings.labnet_epochs * (len(set_N) // size))


# ---- section 3.2.2 and Eq 8: maps and margins ----------------------------------------------------------------------


class Guide:
    """Outputs of LabNet in one of its two spaces, codes or features: rows of the map, and margins. No gradient.

    Args:
        sets_SX: LabNet's output of every label set of the training images.
        map_RX: LabNet's output of every row of the map.
    """

    def __init__(self, sets_SX: Tensor, map_RX: Tensor) -> None:
        self.map_RX = map_RX
        self._sets_SX, self._rows_RX = unit(sets_SX), unit(map_RX)
        small = len(sets_SX) * max(len(sets_SX), len(map_RX)) <= _TABLE
        self._pairs_SS = _margins(self._sets_SX, self._sets_SX) if small else None
        self._map_SR = _margins(self._sets_SX, self._rows_RX) if small else None

    def pair_margins(self, set_B: Tensor) -> Tensor:
        """M [B, B] of images with these label sets: LabNet's cosines, not below 0."""
        if self._pairs_SS is None:
            return _margins(self._sets_SX[set_B], self._sets_SX[set_B])
        return self._pairs_SS[set_B][:, set_B]

    def map_margins(self, set_b: Tensor) -> Tensor:
        """M [b, R] of images with these label sets and the rows of the map."""
        return _margins(self._sets_SX[set_b], self._rows_RX) if self._map_SR is None else self._map_SR[set_b]


def _margins(a_NX: Tensor, b_MX: Tensor) -> Tensor:
    return (a_NX @ b_MX.T).clamp(0.0, 1.0)


# ---- section 3.3: ImgNet -------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Pooled features [b, D] -> F [b, 2048] -> codes (tanh) [b, L] and classes [b, C]; weights N(0, .01), biases 0.

    The extra layer is the release's (D11). ResNet-50 has no dropout. Frozen features are centred and scaled first
    (docs/decisions.md, H6).
    """

    def __init__(self, width: int, bits: int, classes: int, settings: Settings, generator: torch.Generator) -> None:
        super().__init__()
        self.pooled = settings.hash_from == "pooled"
        self.standardize = Standardize(width)
        self.semantic = nn.Linear(width, settings.semantic)
        self.hash = nn.Linear(width if self.pooled else settings.semantic, check_bits(bits))
        self.classify = nn.Linear(settings.semantic, classes)
        for layer in (self.semantic, self.hash, self.classify):
            nn.init.normal_(layer.weight, std=0.01, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, features_bD: Tensor) -> Outputs:
        """{"z": H, "features": F, "classes": Lhat}."""
        pooled = self.standardize(features_bD)
        semantic = self.semantic(pooled)
        z = torch.tanh(self.hash(pooled if self.pooled else semantic))
        return {"z": z, "features": semantic, "classes": self.classify(semantic)}


def network(
    settings: Settings,
    width: int,
    bits: int,
    generator: torch.Generator,
    frozen: bool = True,  # noqa: ARG001
    classes: int = 0,
) -> nn.Module:
    """The head on features of any width; 2048 are ResNet-50's of the paper."""
    if classes < 1:
        raise InvalidInput(f"sadh predicts the classes of its images and needs at least one, found {classes}")
    return Head(width, bits, classes, settings, generator)


# ---- training ------------------------------------------------------------------------------------------------------


class Method(contract.Method):
    """SADH in one run: LabNet and its maps before the first step, then Eq 9. LabNet never changes again."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        _check(settings)
        labels_NC = contract.check_labels(NAME, place.data.labels)
        self.sets, self.set_N = label_sets(labels_NC)
        rows = self.sets if settings.map_rows == "label_sets" else np.eye(labels_NC.shape[1], dtype=bool)
        self.sets_SC, self.map_RC = self._place(self.sets), self._place(rows)
        self.steps_per_epoch = max(1, place.data.n // settings.batch)
        self.learned: dict[str, Tensor] = {}
        self.codes: Guide
        self.features: Guide

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD with momentum; RMSprop as released."""
        chosen = self.settings
        if chosen.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay)
        return torch.optim.SGD(
            parameters, lr=chosen.lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay, fused=True
        )

    def adjust(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Decay in steps of epochs."""
        chosen = self.settings
        decays = step // self.steps_per_epoch // chosen.decay_epochs
        optimizer.param_groups[0]["lr"] = chosen.lr * chosen.lr_decay**decays

    def prepare(self, head: nn.Module, encode: Encode) -> None:
        """Constants of frozen features; LabNet, on rank 0, and what it says of every row, on all."""
        place, chosen = self.place, self.settings
        super().prepare(head, encode)
        rows_TC = torch.cat((self.sets_SC, self.map_RC)).float()
        learned_TX = torch.zeros(len(rows_TC), place.bits + chosen.semantic, device=place.device)
        if place.comm.rank == 0:
            outputs = self._labnet(rows_TC)
            learned_TX += torch.cat((outputs["z"], outputs["features"]), 1)
        place.comm.sum_(learned_TX)
        self._follow({"codes": learned_TX[:, : place.bits], "features": learned_TX[:, place.bits :]})

    def _labnet(self, rows_TC: Tensor) -> Outputs:
        """A trained LabNet's outputs of label vectors."""
        chosen, seed = self.settings, self.place.seed
        generator = torch.Generator().manual_seed(seed ^ _LABNET_STREAM)
        labnet = LabNet(rows_TC.shape[1], self.place.bits, chosen, generator).to(self.place.device)
        first, last = train_labnet(labnet, self.sets_SC.float(), self.set_N, chosen, seed)
        say(f"sadh: LabNet learned {len(self.sets)} label sets, loss {first:.3f} at first, {last:.3f} at last")
        with torch.no_grad():
            return labnet(rows_TC)  # type: ignore[no-any-return]

    def _follow(self, learned: Mapping[str, Tensor]) -> None:
        """Maps and margins from LabNet's outputs of label sets and map rows."""
        self.learned = dict(learned)
        count = len(self.sets)
        codes_TL, features_TX = (self._place(learned[name]) for name in ("codes", "features"))
        map_RL = signs(codes_TL[count:]) if self.settings.binary_map else codes_TL[count:]
        self.codes, self.features = Guide(codes_TL[:count], map_RL), Guide(features_TX[:count], features_TX[count:])

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 9 over the global batch, as means (D10): pairs of images by recipe C, the rest a rank's own share."""
        chosen, size, bits = self.settings, len(batch.rows_B), self.place.bits
        set_B = torch.from_numpy(self.set_N[batch.rows_B]).to(self.place.device)
        labels_BC = self.sets_SC[set_B]
        rows_BX = with_own_rows(torch.cat((outputs["z"], outputs["features"]), 1), batch.sizes, self.place.comm)
        z_bL, own_bC = outputs["z"], labels_BC[batch.own]
        similar_BB, similar_bR = labels_BC @ labels_BC.T > 0, own_bC @ self.map_RC.T > 0

        def pairs(guide: Guide, rows_BX: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
            """J1 and J3, or J2 and J4."""
            x_BX, map_RX = (comparable(rows, chosen.pair, divisor) for rows in (rows_BX, guide.map_RX))
            scalable = chosen.pair == "scalable"
            margin_BB = guide.pair_margins(set_B) if scalable else chosen.margin
            margin_bR = guide.map_margins(set_B[batch.own]) if scalable else chosen.margin
            images = pair_cost(chosen.pair, similar_BB, margin_BB, x_BX @ x_BX.T).mean()
            to_map = pair_cost(chosen.pair, similar_bR, margin_bR, x_BX[batch.own] @ map_RX.T).sum()
            return images, to_map / (size * len(map_RX))

        j1, j3 = pairs(self.features, rows_BX[:, bits:], _theta_divisor(chosen))
        j2, j4 = pairs(self.codes, rows_BX[:, :bits], 1.0)
        j5 = classification(outputs["classes"], own_bC, chosen.classification) / size
        j6 = ((z_bL - signs(z_bL)) ** 2).sum() / (size * bits)

        share = torch.stack((j3, j4, j5, j6))
        weights = share.new_tensor((chosen.gamma, chosen.mu, chosen.eta, chosen.beta))
        whole = chosen.alpha * j1 + chosen.lambda_ * j2
        found = sum_over_ranks(share.detach(), self.place.comm)
        terms = {
            "loss": whole.detach() + weights @ found,
            "pair_features": j1.detach(),
            "pair_codes": j2.detach(),
            "map_features": found[0],
            "map_codes": found[1],
            "classification": found[2],
            "quantisation": found[3],
        }
        return Loss(whole + weights @ share, terms)

    def state_dict(self) -> dict[str, Any]:
        """The label sets, and LabNet's codes and features of them and of the rows of the maps."""
        return {"sets": torch.from_numpy(self.sets), **self.learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The maps, instead of training LabNet again."""
        if not np.array_equal(state["sets"].numpy(), self.sets):
            raise InvalidInput(
                "sadh's maps belong to other label sets than the training images have; resume with the labels the run "
                "was started with, or start a new run"
            )
        self._follow({name: state[name].to(self.place.device) for name in ("codes", "features")})

    def _place(self, values: Tensor | NDArray[np.bool_]) -> Tensor:
        return torch.as_tensor(values).to(self.place.device, self.place.dtype)


def classification(logits_bC: Tensor, labels_bC: Tensor, form: str) -> Tensor:
    """J5 summed over images: squared error (D11), or the release's mean sigmoid cross-entropy."""
    if form == "squared":
        return ((logits_bC - labels_bC) ** 2).sum()
    return functional.binary_cross_entropy_with_logits(logits_bC, labels_bC, reduction="sum") / labels_bC.shape[1]


def _theta_divisor(settings: Settings) -> float:
    """The divisor of inner products of features in Eq 12."""
    return settings.semantic if settings.feature_theta == "mean" else 1.0


def _check(settings: Settings) -> None:
    for name in ("semantic", "decay_epochs", "labnet_hidden", "labnet_batch"):
        if getattr(settings, name) < 1:
            raise InvalidInput(f"{name} must be at least 1, found {getattr(settings, name)}")
    if settings.labnet_epochs < 0 or settings.labnet_steps < 0:
        raise InvalidInput(
            f"labnet_epochs and labnet_steps must not be negative, found {settings.labnet_epochs} and "
            f"{settings.labnet_steps}"
        )
    if not -1 <= settings.margin <= 1 or not -1 <= settings.labnet_margin <= 1:
        raise InvalidInput(
            f"margins are cosines and must lie between -1 and 1, found margin {settings.margin} and labnet_margin "
            f"{settings.labnet_margin}"
        )
