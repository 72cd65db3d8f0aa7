"""Losses over the pairs of a global batch whose rows lie on several ranks.

The convention everywhere in hashdist: every rank computes a loss whose gradients, **summed** over the ranks, are
the gradient of the loss of the whole global batch. No world size appears in any method: a pair term is divided
by B^2, a per-image term by B, never by the rows of one rank. (DDP averages instead, so that recipes written for
it carry a factor G; docs/decisions.md, D15, H4 and H7.) Two recipes are used:

- C: gather without gradient, put the own live rows in their place (`with_own_rows`), compute the whole loss on
  every rank. The live rows take both roles of a pair, so that the sum over the ranks is exact. B^2 work per rank.
- E: own live rows against all rows without gradient, both roles added: b B work per rank. Terms that depend on
  all pairs at once (PIC's normaliser) need a line of their own, see methods/dsah.py.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hashdist.methods.parts.communicator import Communicator

NORM_FLOOR = 1e-12
"""Vectors shorter than this have no direction: their unit vector and its gradient are zero."""


def unit(z_NL: Tensor) -> Tensor:
    """Rows scaled to length 1, [N, L]; rows shorter than NORM_FLOOR become zero and pass zero gradient.

    The selection comes before the division: clamping the norm would give such a row a gradient of 1e12, and the
    root of the sum of squares gives NaN at zero.
    """
    squares_N1 = (z_NL * z_NL).sum(1, keepdim=True)
    alive_N1 = squares_N1 >= NORM_FLOOR**2
    return z_NL * (torch.where(alive_N1, squares_N1, 1.0).rsqrt() * alive_N1)


def signs(z_NL: Tensor) -> Tensor:
    """-1/+1 of `z_NL`'s dtype without gradient; sign(0) is +1."""
    return (z_NL.detach() >= 0).to(z_NL.dtype) * 2 - 1


def all_rows(z_bL: Tensor, sizes: Sequence[int], comm: Communicator) -> Tensor:
    """The global batch [B, L] in its own order, without gradient, the same on every rank."""
    return torch.cat(comm.gather(z_bL, sizes))


def with_own_rows(z_bL: Tensor, sizes: Sequence[int], comm: Communicator) -> Tensor:
    """The global batch [B, L] in its own order: this rank's rows live, the others without gradient (recipe C)."""
    if comm.world_size == 1:
        return z_bL
    blocks = comm.gather(z_bL, sizes)
    blocks[comm.rank] = z_bL
    return torch.cat(blocks)


def sum_over_ranks(share_K: Tensor, comm: Communicator) -> Tensor:
    """The sum [K] of every rank's small vector, added in rank order, without gradient."""
    blocks = comm.gather(share_K.reshape(1, -1), [1] * comm.world_size)
    return torch.cat(blocks).sum(0)


class FlatGradients:
    """Gradients summed over the ranks in one flat buffer whose layout never changes.

    DDP packs gradients into buckets in the order of registration in its first step, and rebuilds them in the
    order in which they became ready from the second step on. A resumed run would start with the first layout
    where the uninterrupted one used the second, and an all-reduce adds in an order that depends on the place in
    the buffer: the bits differ. Here the layout is the order of `parameters`, always.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._flat: Tensor | None = None
        self._views: list[Tensor] = []

    def reduce(self, comm: Communicator) -> None:
        """Replace every parameter's gradient by the sum over the ranks (a missing one counts as zero)."""
        if comm.world_size == 1:
            return
        if self._flat is None:
            first = self._parameters[0]
            sizes = [p.numel() for p in self._parameters]
            self._flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
            parts = torch.split(self._flat, sizes)
            self._views = [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)]
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        comm.sum_(self._flat)
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
