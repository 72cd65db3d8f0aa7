"""Ranks talking to each other: one small interface, alone in a process or over torch.distributed.

Shape suffixes as in the rest of the package: b rows of this rank, B rows of all ranks together, G ranks.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from hashdist.ground.errors import InvalidInput


class Communicator(Protocol):
    """The other ranks, as the loop, the pair losses and the similarity refresh see them."""

    @property
    def rank(self) -> int:
        """This rank, 0 <= rank < world_size."""

    @property
    def world_size(self) -> int:
        """G, the number of ranks."""

    def gather(self, block_bX: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Every rank's block, without gradient: G tensors, the r-th of sizes[r] rows.

        `sizes` is known to every rank beforehand and sizes[rank] is this block's number of rows. Any dtype, one
        or two dimensions, the last of which is not empty. All ranks must call it.
        """

    def sum_(self, flat: Tensor) -> None:
        """Replace `flat` by its sum over the ranks, the same bits on every rank. All ranks must call it."""


class SingleProcess:
    """A world of one rank."""

    rank = 0
    world_size = 1

    def gather(self, block_bX: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The block itself, detached."""
        _check_rows(block_bX, sizes, 0)
        return [block_bX.detach()]

    def sum_(self, flat: Tensor) -> None:
        """Nothing to add."""


class TorchDistributed:
    """The ranks of torch.distributed's default group, which must be initialised (gloo, or nccl with `device` a GPU).

    Args:
        device: where collectives take place; tensors from elsewhere travel there and back.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        if not dist.is_initialized():
            raise InvalidInput(
                "TorchDistributed needs an initialised torch.distributed process group, found none; "
                "call torch.distributed.init_process_group first, or use SingleProcess"
            )
        self._device = torch.device(device)
        self.rank: int = dist.get_rank()
        self.world_size: int = dist.get_world_size()

    def gather(self, block_bX: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Blocks padded to the largest, exchanged as bytes (gloo knows few dtypes), and cut back."""
        _check_rows(block_bX, sizes, self.rank)
        longest = max(sizes)
        padded = block_bX.new_zeros((longest, *block_bX.shape[1:]))
        padded[: sizes[self.rank]] = block_bX.detach()
        sent = padded.view(torch.uint8).to(self._device)
        received = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(received, sent)
        return [r.to(block_bX.device).view(block_bX.dtype)[:rows] for r, rows in zip(received, sizes, strict=True)]

    def sum_(self, flat: Tensor) -> None:
        """One all-reduce."""
        if flat.device.type == self._device.type:
            dist.all_reduce(flat)
            return
        there = flat.to(self._device)
        dist.all_reduce(there)
        flat.copy_(there)


def _check_rows(block_bX: Tensor, sizes: Sequence[int], rank: int) -> None:
    if len(block_bX) != sizes[rank]:
        raise InvalidInput(f"rank {rank} announced {sizes[rank]} rows to gather, found {len(block_bX)}")
