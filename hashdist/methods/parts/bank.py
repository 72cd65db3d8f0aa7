"""The newest outputs of all n training images, so that a batch can be compared with all of them.

Papers that state a loss over all pairs but train in batches compare the fresh outputs of a batch with the last known
outputs of everything else, held constant (DPSH, DSDH, DDH's release). The bank is the same on every rank.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hashdist.methods.contract import Encode, Place
from hashdist.methods.parts.heads import HeadSettings, HeadTraining


class Bank:
    """U [n, L], one row an image; zero until `fill`, and a zero row gives no gradient."""

    def __init__(self, n: int, bits: int, device: torch.device, dtype: torch.dtype) -> None:
        self.u_nL = torch.zeros((n, bits), device=device, dtype=dtype)

    def fill(self, encode: Callable[[], Tensor]) -> None:
        """All rows from one pass over the training images."""
        self.u_nL.copy_(encode())

    def write(self, rows_B: NDArray, z_BL: Tensor) -> None:  # type: ignore[type-arg]
        """The rows of a global batch; call it before the loss, as the released code does."""
        self.u_nL[torch.from_numpy(rows_B).to(self.u_nL.device)] = z_BL.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"u": self.u_nL}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """From a checkpoint."""
        self.u_nL.copy_(state["u"])


class BankTraining(HeadTraining):
    """A method that trains a head against the bank of all images' outputs, and keeps it in its checkpoints."""

    def __init__(self, settings: HeadSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.bank = Bank(place.data.n, place.bits, place.device, place.dtype)

    def outputs_of(self, z_nL: Tensor) -> Tensor:
        """The outputs that the bank holds, of those of the hash layer: they themselves."""
        return z_nL

    def prepare(self, head: nn.Module, encode: Encode) -> None:
        """Constants of frozen features, and the first outputs of all images."""
        super().prepare(head, encode)
        self.bank.fill(lambda: self.outputs_of(encode()))

    def state_dict(self) -> dict[str, Any]:
        """The bank."""
        return dict(self.bank.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The bank."""
        self.bank.load_state_dict(state)
