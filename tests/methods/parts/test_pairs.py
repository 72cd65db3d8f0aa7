from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from hashdist.ground.errors import InvalidInput
from hashdist.ground.permutation import rank_slice
from hashdist.methods.parts.communicator import SingleProcess
from hashdist.methods.parts.pairs import NORM_FLOOR, FlatGradients, all_rows, signs, sum_over_ranks, unit, with_own_rows
from tests.worlds.training import on_ranks


def test_unit_has_length_one_and_the_right_gradient() -> None:
    z = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.allclose(unit(z).norm(dim=1), torch.ones(7, dtype=torch.float64), atol=1e-15)
    assert torch.autograd.gradcheck(unit, (z,))


@pytest.mark.parametrize("length", [0.0, NORM_FLOOR / 10])
def test_rows_without_direction_are_zero_and_pass_no_gradient(length: float) -> None:
    z = torch.ones(3, 4, dtype=torch.float64)
    z[1] = length / 2
    z.requires_grad_()
    u = unit(z)
    u.sum().backward()
    assert torch.equal(u[1], torch.zeros(4, dtype=torch.float64))
    assert z.grad is not None
    assert torch.equal(z.grad[1], torch.zeros(4, dtype=torch.float64))
    assert torch.isfinite(z.grad).all()


def test_sign_of_zero_is_plus_one_without_gradient() -> None:
    z = torch.tensor([[0.0, -0.0, -1.0, 2.0]], requires_grad=True)
    found = signs(z)
    assert found.tolist() == [[1.0, 1.0, -1.0, 1.0]]
    assert not found.requires_grad


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_gathered_rows_stand_in_global_order_with_the_own_ones_live(world_size: int) -> None:
    z_BL = torch.arange(14.0).reshape(7, 2)
    slices = [rank_slice(7, r, world_size) for r in range(world_size)]
    sizes = [s.stop - s.start for s in slices]

    def work(comm):  # type: ignore[no-untyped-def]
        own = z_BL[slices[comm.rank]].clone().requires_grad_()
        live = with_own_rows(own, sizes, comm)
        (live * z_BL).sum().backward()
        return live.detach(), all_rows(own, sizes, comm), own.grad

    for rank, (live, constant, gradient) in enumerate(on_ranks(world_size, work)):
        assert torch.equal(live, z_BL)
        assert torch.equal(constant, z_BL)
        assert not constant.requires_grad
        assert torch.equal(gradient, z_BL[slices[rank]])


def test_sum_over_ranks_is_the_same_on_every_rank() -> None:
    found = on_ranks(3, lambda comm: sum_over_ranks(torch.tensor([0.1, float(comm.rank)]), comm))
    assert all(torch.equal(f, found[0]) for f in found)
    assert torch.allclose(found[0], torch.tensor([0.3, 3.0]))


class _Recorder:
    """Two ranks, of which the other contributes 100 everywhere."""

    rank, world_size = 0, 2

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def gather(self, block_bX: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        raise NotImplementedError

    def sum_(self, flat: Tensor) -> None:
        self.seen.append(flat.clone())
        flat += 100


def test_flat_gradients_keep_one_layout_and_count_missing_ones_as_zero() -> None:
    layers = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False), nn.Linear(1, 1, bias=False)])
    a, b, c = layers.parameters()
    c.requires_grad_(False)
    gradients, comm = FlatGradients(layers.parameters()), _Recorder()
    a.grad = torch.tensor([[1.0, 2.0]])
    gradients.reduce(comm)
    assert a.grad.tolist() == [[101.0, 102.0]]
    assert b.grad is not None
    assert b.grad.tolist() == [[100.0, 100.0, 100.0]]
    assert c.grad is None
    a.grad, b.grad = None, torch.tensor([[3.0, 4.0, 5.0]])
    gradients.reduce(comm)
    assert [s.tolist() for s in comm.seen] == [[1.0, 2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0, 5.0]]
    assert b.grad.tolist() == [[103.0, 104.0, 105.0]]


def test_one_rank_keeps_its_gradients_as_they_are() -> None:
    layer = nn.Linear(2, 1)
    given = torch.ones(1, 2)
    layer.weight.grad = given
    FlatGradients(layer.parameters()).reduce(SingleProcess())
    assert layer.weight.grad is given
    assert layer.bias.grad is None


def test_gathering_other_rows_than_announced_is_refused() -> None:
    with pytest.raises(InvalidInput, match="announced 3 rows to gather, found 2"):
        SingleProcess().gather(torch.zeros(2, 1), [3])
