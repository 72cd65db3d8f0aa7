"""The head most baselines share, one linear layer, and how it is trained: optimiser, learning rate, frozen features.

The papers replace the last layer of a network by L units drawn from N(0, 0.01^2) and fine-tune everything. On frozen
features this layer is all there is; features are centred and scaled before it then
(hashdist/methods/parts/standardize.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hashdist.ground.bits import check_bits
from hashdist.methods import contract
from hashdist.methods.parts.standardize import Standardize


@dataclass(frozen=True)
class HeadSettings:
    """Hyper-parameters of training such a head; a method's Settings add its own.

    Args:
        rounds: 1; nothing happens between rounds.
        epochs: over the training images.
        batch: images of a global batch.
        optimizer: SGD with momentum, RMSprop or Adam.
        lr: learning rate of the first epoch.
        lr_last: of the last epoch, log-spaced between them (DPSH's release); 0 = constant.
        momentum: of SGD.
        weight_decay: L2 decay of all weights, added to the gradient.
        dropout: on the features when the backbone is trained too.
        feature_length: typical length that frozen features are scaled to after centring; 0 = as they come.
    """

    rounds: int = 1
    epochs: int = 150
    batch: int = 128
    optimizer: Literal["sgd", "rmsprop", "adam"] = "sgd"
    lr: float = 1e-2
    lr_last: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    dropout: float = 0.5
    feature_length: float = 64.0


class HashHead(nn.Module):
    """features [b, D] -> z [b, L]; frozen features are standardised first.

    Args:
        width: D.
        bits: L.
        generator: draws the weights from N(0, 0.01^2); biases are 0.
        dropout: on the features.
        squash: applied to the L units; must keep the sign.
    """

    def __init__(
        self,
        width: int,
        bits: int,
        generator: torch.Generator,
        dropout: float = 0.0,
        squash: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.standardize = Standardize(width)
        self.dropout = nn.Dropout(dropout)
        self.hash = nn.Linear(width, check_bits(bits))
        self.squash = squash
        nn.init.normal_(self.hash.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.hash.bias)

    def forward(self, features_bD: Tensor) -> dict[str, Tensor]:
        """{"z": [b, L]}."""
        z_bL = self.hash(self.dropout(self.standardize(features_bD)))
        return {"z": z_bL if self.squash is None else self.squash(z_bL)}


def plain(squash: Callable[[Tensor], Tensor] | None = None) -> Callable[..., nn.Module]:
    """`network` of methods whose head is a HashHead and nothing else."""

    def network(
        settings: HeadSettings,
        width: int,
        bits: int,
        generator: torch.Generator,
        frozen: bool = True,
        classes: int = 0,  # noqa: ARG001
    ) -> nn.Module:
        return HashHead(width, bits, generator, dropout=0.0 if frozen else settings.dropout, squash=squash)

    return network


linear = plain()
"""`network` of methods whose z is the linear layer itself."""

tanh = plain(torch.tanh)
"""`network` of methods whose z is tanh of the linear layer."""


class HeadTraining(contract.Method):
    """A method that trains such a head: the hooks that are the same for all of them."""

    settings: HeadSettings

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        chosen = self.settings
        return max(1, chosen.rounds * chosen.epochs * (self.place.data.n // chosen.batch))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """As the settings say."""
        chosen = self.settings
        if chosen.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay, fused=True)
        if chosen.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay)
        return torch.optim.SGD(
            parameters, lr=chosen.lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay, fused=True
        )

    def adjust(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Log-spaced learning rates, one an epoch."""
        optimizer.param_groups[0]["lr"] = learning_rate(self.settings, step, self.place.data.n)


def learning_rate(settings: HeadSettings, step: int, n: int) -> float:
    """From lr to lr_last, evenly in their logarithms, one value an epoch."""
    epochs = settings.rounds * settings.epochs
    if settings.lr_last <= 0 or epochs == 1:
        return settings.lr
    epoch = step // max(1, n // settings.batch)
    return float(settings.lr * (settings.lr_last / settings.lr) ** (epoch / (epochs - 1)))
