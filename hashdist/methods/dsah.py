"""DSAH: Qinghong Lin, Xiaojun Chen, Qin Zhang, Shangxuan Tian, Yudong Chen, "Deep Self-Adaptive Hashing for Image
Retrieval", CIKM 2021. Unsupervised; learns from a neighbour graph that grows with the codes themselves.

| paper | here | shape | where |
|---|---|---|---|
| x_i | features of VGG-19's relu7 (frozen mode: any committed features) | [n, D] | section 3.1 |
| z_i = tanh(...) | `z_BL` | [B, L] | section 3.1 |
| b_i = sgn(z_i), sgn(0) = +1 | `pairs.signs(z_BL)` | [B, L] | Eq 1 |
| l | `bits`, L | | |
| s_ij = cos(z_i, z_j) | `s_BB` | [B, B] | Eq 4 |
| W_L, W_H, W0 = W_L AND W_H | `data.graph` (made by the graph stage) | sparse [n, n] | Eqs 7-9 |
| mu, sigma, m = mu + gamma sigma | `similarity.Refresh` | numbers | Eqs 10-11 |
| W^(r+1) | `ImplicitW` | implicit [n, n] | Eq 12 |
| p_ij, a_ij = -log p_ij | `weights_BB` | [B, B] | Eqs 15-16 |
| L = sum a (s - w)^2 + lambda norm(Z - B)^2 | `global_loss`, `own_rows_loss` | number | Eq 17 |
| R, T, tau, lambda, gamma | `rounds`, `epochs`, `tau`, `lambda_`, `gamma` | | Algorithm 1, section 4 |

Departures carry the number of the decision (docs/decisions.md).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hashdist.ground import telemetry
from hashdist.ground.bits import check_bits
from hashdist.ground.errors import InvalidInput
from hashdist.ground.progress import say
from hashdist.methods import contract
from hashdist.methods.contract import Batch, Encode, Loss, Outputs, Place
from hashdist.methods.parts.pairs import all_rows, signs, sum_over_ranks, unit, with_own_rows
from hashdist.methods.parts.similarity import ImplicitW, quantize
from hashdist.methods.parts.standardize import Standardize

NAME = "dsah"
CITATION = "Lin et al., Deep Self-Adaptive Hashing for Image Retrieval, CIKM 2021"
USES: Literal["graph", "labels", "features"] = "graph"
GRAPH: contract.GraphRule = "and"

Pic = Literal["pic", "none", "minus", "const", "minus_scaled"]


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters.

    Args:
        rounds: R; W grows between rounds.
        epochs: T, per round.
        batch: images of a global batch.
        lr: learning rate of Adam.
        lambda_: weight of the quantisation term.
        tau: temperature of PIC.
        gamma: how many standard deviations above the mean cosine of positive pairs a new pair must lie.
        pic: pair weights: "pic" -log p; "none" 1 (PIC0); "minus" -log(1 - p) (PIC-); and two controls of the
            same scale as PIC: "const" its mean over the batch; "minus_scaled" PIC- times the ratio of the means.
        pic_ref_batch: weights are those of a batch of this size, whatever `batch` is (D5); 0 = as they come.
        detach: no gradient through the weights.
        quant_on: distance to the code from z itself, or from z scaled to length 1 as released.
        adam_eps: epsilon of Adam.
        adam_eps_hat: epsilon in TensorFlow's form, added before the bias correction.
        lr_decay: factor on the learning rate every `lr_decay_steps` steps; 1 = constant.
        lr_decay_steps: see lr_decay.
        update_after_last: refresh W after the last round too; nothing is trained on it, its figures are reported.
        dropout: on the features when the backbone is trained too.
        feature_length: typical length that frozen features are scaled to after centring (64 is that of 4096
            features of variance 1); 0 = as they come, not centred either.
        gather_whole: largest global batch whose pairs every rank computes whole (recipe C); above it, own rows
            only (recipe E). The gradients are the same.
    """

    rounds: int = 3
    epochs: int = 10
    batch: int = 50
    lr: float = 1e-4
    lambda_: float = 10.0
    tau: float = 1.0
    gamma: float = 1.0
    pic: Pic = "pic"
    pic_ref_batch: int = 50
    detach: bool = False
    quant_on: Literal["tanh", "normalized"] = "tanh"
    adam_eps: float = 1e-8
    adam_eps_hat: bool = False
    lr_decay: float = 1.0
    lr_decay_steps: int = 200
    update_after_last: bool = False
    dropout: float = 0.5
    feature_length: float = 64.0
    gather_whole: int = 4096


PRESETS = {
    "paper": Settings(),
    # D8: the released script: epsilon 1, decay, quantisation of the normalised code
    "release": Settings(quant_on="normalized", adam_eps=1.0, adam_eps_hat=True, lr_decay=0.99),
}


# ---- section 3.1: the network --------------------------------------------------------------------------------------


class Head(nn.Module):
    """features [b, D] -> 1000 -> L, tanh. The paper names no activation after the 1000 units, the release has none.

    VGG-19's dropout behind relu7 comes first when the backbone is trained too. When it is not, features are centred
    and scaled instead (docs/decisions.md, H6).
    """

    def __init__(self, width: int, bits: int, generator: torch.Generator, dropout: float = 0.0) -> None:
        super().__init__()
        self.standardize = Standardize(width)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(width, 1000)
        self.hash = nn.Linear(1000, check_bits(bits))
        for parameter in self.parameters():
            # truncated normal at two standard deviations as in the release, biases too
            nn.init.trunc_normal_(parameter, std=1e-3, a=-2e-3, b=2e-3, generator=generator)

    def forward(self, features_bD: Tensor) -> Outputs:
        """{"z": tanh outputs [b, L]}."""
        return {"z": torch.tanh(self.hash(self.hidden(self.dropout(self.standardize(features_bD)))))}


def network(
    settings: Settings,
    width: int,
    bits: int,
    generator: torch.Generator,
    frozen: bool = True,
    classes: int = 0,  # noqa: ARG001
) -> nn.Module:
    """The head on features of any width; 4096 are VGG-19's relu7 of the paper."""
    return Head(width, bits, generator, dropout=0.0 if frozen else settings.dropout)


# ---- section 3.4, Eqs 15-16: pair weights ("PIC") ------------------------------------------------------------------


@dataclass(frozen=True)
class Normaliser:
    """All pairs of the batch, as far as the weights of one pair depend on them.

    Args:
        lse: log of the denominator of Eq 15 over the global batch (D5), diagonal included; carries gradient in
            recipe C.
        shift: 2 log(B / pic_ref_batch): the denominator grows with B^2, this takes it back (D5).
        mean_pic: mean of PIC's weights over the batch, detached; only where a control needs it.
        mean_minus: mean of PIC-'s weights, likewise.
    """

    lse: Tensor
    shift: float
    mean_pic: Tensor | None = None
    mean_minus: Tensor | None = None


def pic(s: Tensor, tau: float, norm: Normaliser) -> Tensor:
    """Eq 16: a = -log p = LSE - s / tau, at the level of a batch of pic_ref_batch, not below zero (D5)."""
    return (norm.lse - norm.shift - s / tau).clamp_min(0.0)


def minus(s: Tensor, tau: float, norm: Normaliser) -> Tensor:
    """PIC- of Fig 4: a = -log(1 - p)."""
    # p < 1 always, but rounds to 1 where one pair holds all the mass
    p = torch.exp(s / tau - norm.lse).clamp_max(1.0 - torch.finfo(s.dtype).eps)
    return -torch.log1p(-p)


def weights(s: Tensor, settings: Settings, norm: Normaliser) -> Tensor:
    """a_ij of the chosen form, of s's shape."""
    if settings.pic == "none":
        return torch.ones_like(s)
    if settings.pic == "const":
        assert norm.mean_pic is not None
        return norm.mean_pic.expand_as(s)
    if settings.pic == "pic":
        a = pic(s, settings.tau, norm)
    else:
        a = minus(s, settings.tau, norm)
        if settings.pic == "minus_scaled":
            assert norm.mean_pic is not None
            assert norm.mean_minus is not None
            a = a * (norm.mean_pic / norm.mean_minus)
    return a.detach() if settings.detach else a


def shift_of(settings: Settings, batch: int) -> float:
    """2 log(B / pic_ref_batch); 0 when weights are to be taken as they come."""
    return 2 * math.log(batch / settings.pic_ref_batch) if settings.pic_ref_batch else 0.0


# ---- section 3.5, Eq 17: the loss ----------------------------------------------------------------------------------


def quantisation(z_bL: Tensor, settings: Settings) -> Tensor:
    """Squared distances to the own code, summed over the rows given. b = sgn(z) of this same pass is a constant."""
    return (((unit(z_bL) if settings.quant_on == "normalized" else z_bL) - signs(z_bL)) ** 2).sum()


def global_loss(z_BL: Tensor, w_BB: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Eq 17 on a whole global batch: (pair term, quantisation term without lambda), as means (D7).

    D7: the paper sums; means over B^2 and B L are what its lambda belongs to, and do not depend on B.
    """
    batch, bits = z_BL.shape
    u_BL = unit(z_BL)
    s_BB = u_BL @ u_BL.T
    lse = torch.logsumexp((s_BB / settings.tau).flatten(), 0)
    norm = Normaliser(lse, shift_of(settings, batch))
    if settings.pic in ("const", "minus_scaled"):
        with torch.no_grad():
            means = pic(s_BB, settings.tau, norm).mean(), minus(s_BB, settings.tau, norm).mean()
        norm = Normaliser(lse, norm.shift, *means)
    pair = (weights(s_BB, settings, norm) * (s_BB - w_BB) ** 2).mean()
    return pair, quantisation(z_BL, settings) / (batch * bits)


def own_rows_loss(
    z_bL: Tensor, batch: Batch, w: ImplicitW, settings: Settings, place: Place
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq 17 from this rank's rows against all (recipe E): (to differentiate, value of the pair and quantisation terms).

    With zbar the batch without gradient, LSE and D = d(pair term)/d(LSE) are computed over all ranks first. Then
    the rows' share is  sum_ij a(s_ij; LSE) ((s_ij - w_ij)^2 + (s_ij - w_ji)^2) / B^2 + 2 D sum_ij exp(s_ij / tau -
    LSE):  the first sum plays both roles of a pair, the second is the gradient through LSE.
    """
    rows, size, comm = batch.rows_B, len(batch.rows_B), place.comm
    zbar_BL = all_rows(z_bL, batch.sizes, comm)
    s_bB = unit(z_bL) @ unit(zbar_BL).T
    to_others = (s_bB - w.block(rows[batch.own], rows)) ** 2
    from_others = (s_bB - w.block(rows, rows[batch.own]).T) ** 2
    norm = _normaliser(s_bB.detach(), size, settings, place)

    lse = norm.lse.clone().requires_grad_()
    leaf = Normaliser(lse, norm.shift, norm.mean_pic, norm.mean_minus)
    share = (weights(s_bB.detach(), settings, leaf) * to_others.detach()).sum() / size**2
    slope = torch.autograd.grad(share, lse)[0] if share.requires_grad else torch.zeros_like(share)

    own_quantisation = quantisation(z_bL, settings) / (size * z_bL.shape[1])
    pair, slope, quant = sum_over_ranks(torch.stack((share.detach(), slope, own_quantisation.detach())), comm)
    both_roles = (weights(s_bB, settings, norm) * (to_others + from_others)).sum() / size**2
    through_lse = 2 * slope * torch.exp(s_bB / settings.tau - norm.lse).sum()
    return both_roles + through_lse + settings.lambda_ * own_quantisation, pair, quant


def _normaliser(s_bB: Tensor, batch: int, settings: Settings, place: Place) -> Normaliser:
    """The batch's Normaliser from the rows of every rank, combined in rank order, without gradient."""
    own = torch.logsumexp((s_bB / settings.tau).flatten(), 0)
    lse = torch.logsumexp(torch.cat(place.comm.gather(own.reshape(1), [1] * place.comm.world_size)), 0)
    norm = Normaliser(lse, shift_of(settings, batch))
    if settings.pic not in ("const", "minus_scaled"):
        return norm
    sums = torch.stack((pic(s_bB, settings.tau, norm).sum(), minus(s_bB, settings.tau, norm).sum()))
    mean_pic, mean_minus = sum_over_ranks(sums, place.comm) / batch**2
    return Normaliser(lse, norm.shift, mean_pic, mean_minus)


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------


class Method(contract.Method):
    """DSAH in one run: W, the loss on it, Adam, and the growth of W between rounds."""

    settings: Settings

    def __init__(self, settings: Settings, place: Place) -> None:
        super().__init__(settings, place)
        _check(settings)
        graph = place.data.graph
        if graph is None or len(graph.indptr) != place.data.n + 1:
            found = "none" if graph is None else f"one of {len(graph.indptr) - 1} images"
            raise InvalidInput(
                f"dsah needs the neighbour graph of its {place.data.n} training images, found {found}; build it first"
            )
        self.w = ImplicitW(graph.indptr, graph.indices, place.device, place.dtype)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam (section 4)."""
        return torch.optim.Adam(parameters, lr=self.settings.lr, eps=self.settings.adam_eps, fused=True)

    def adjust(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """D8: decay in steps; TensorFlow adds epsilon before the second moment's bias correction, torch after it."""
        group, chosen = optimizer.param_groups[0], self.settings
        group["lr"] = chosen.lr * chosen.lr_decay ** (step // chosen.lr_decay_steps)
        if chosen.adam_eps_hat:
            group["eps"] = chosen.adam_eps / math.sqrt(1 - group["betas"][1] ** (step + 1))

    def prepare(self, head: nn.Module, encode: Encode) -> None:
        """Constants of frozen features; a warning where uniform batches can hardly hold a positive pair."""
        super().prepare(head, encode)
        n, batch = self.place.data.n, self.settings.batch
        expected = batch * (batch - 1) * self.w.edges / n / max(1, n - 1)
        if expected < 20 and self.place.comm.rank == 0:
            say(
                f"warning: a global batch of {batch} of {n} images holds {expected:.1f} positive pairs on average, "
                f"fewer than 20; train on fewer images, or raise the graph's neighbours or the option batch"
            )

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """Eq 17 over the global batch."""
        z_bL, chosen = outputs["z"], self.settings
        if len(batch.rows_B) <= chosen.gather_whole:
            z_BL = with_own_rows(z_bL, batch.sizes, self.place.comm)
            pair, quant = global_loss(z_BL, self.w.block(batch.rows_B), chosen)
            backward = pair + chosen.lambda_ * quant
            value = backward.detach()
        else:
            backward, pair, quant = own_rows_loss(z_bL, batch, self.w, chosen, self.place)
            value = pair + chosen.lambda_ * quant
        return Loss(backward, {"loss": value, "pair": pair.detach(), "quantisation": quant.detach()})

    def end_of_round(self, round_: int, encode: Encode) -> dict[str, Any]:
        """Eqs 10-12: grow W. D6: on cosines (Eq 4) of all pairs off the diagonal, population sigma, implicit W.

        The update after the last round trains nothing and is left out unless its figures are asked for. Where there are
        labels, how well the round's W agrees with them is reported, and used for nothing else (Fig 7: n_+, m, F_w).
        """
        labels_nC = self.place.data.labels
        agreed = {} if labels_nC is None else asdict(self.w.agreement(labels_nC, self.place.comm))
        if agreed and self.place.comm.rank == 0:
            telemetry.AGREEMENT.set(agreed["f_w"])
        if round_ + 1 == self.settings.rounds and not self.settings.update_after_last:
            return agreed
        found = self.w.refresh(quantize(encode()), self.settings.gamma, self.place.comm, self.place.threads)
        if self.place.comm.rank == 0:
            telemetry.REFRESH_SECONDS.observe(found.seconds)
            telemetry.POSITIVES.set(found.pairs / 2)
            if found.m is not None:
                telemetry.THRESHOLD.set(found.m)
        return {**agreed, **found.report()}

    def state_dict(self) -> dict[str, Any]:
        """The past of W."""
        return self.w.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The past of W."""
        self.w.load_state_dict(state)


def _check(settings: Settings) -> None:
    if not settings.tau > 0:
        raise InvalidInput(f"tau must be positive, found {settings.tau}")
    if math.isnan(settings.gamma):
        raise InvalidInput("gamma must be a number, inf or -inf, found nan")
    if settings.pic_ref_batch < 0 or settings.lr_decay_steps < 1:
        raise InvalidInput(
            f"pic_ref_batch must be at least 0 and lr_decay_steps at least 1, "
            f"found {settings.pic_ref_batch} and {settings.lr_decay_steps}"
        )
