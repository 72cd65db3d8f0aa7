"""The deep baselines against what their papers imply: double loops, closed forms, brute force, finite differences."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_world import deep, tiny_data

from hashdist import likelihood
from hashdist.communicator import SingleProcess
from hashdist.methods.contract import Batch, Place, method_settings

N, L = 23, 16


def rows_of(count: int = 9, n: int = 230, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)[:count].astype(np.int64)


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def method(name: str, preset: str = "paper", **options: Any) -> Any:
    """The method on tiny_data, alone, in float64."""
    module = deep(name)
    chosen = method_settings(module, preset, options)
    return module.Method(chosen, Place(L, True, tiny_data(), SingleProcess(), dtype=torch.float64, seed=3))


def batch_of(rows: np.ndarray, step: int = 0) -> Batch:
    return Batch(rows, slice(0, len(rows)), (len(rows),), step)


def same_class(a: int, b: int) -> float:
    labels = tiny_data().labels
    assert labels is not None
    return float((labels[a] & labels[b]).any())


class TestLikelihood:
    def test_negative_log_likelihood_is_the_naive_one(self) -> None:
        theta, s = gaussian(5, 7, scale=6.0), (gaussian(5, 7, seed=1) > 0).double()
        found = likelihood.negative_log_likelihood(theta, s)
        for i in range(5):
            for j in range(7):
                p = 1 / (1 + np.exp(-float(theta[i, j])))
                naive = -np.log(p if s[i, j] else 1 - p)
                assert float(found[i, j]) == pytest.approx(naive, rel=1e-9)

    def test_large_theta_neither_overflows_nor_loses_its_gradient(self) -> None:
        theta = torch.tensor([-800.0, -50.0, 39.9, 40.1, 800.0], dtype=torch.float64, requires_grad=True)
        likelihood.softplus(theta).sum().backward()
        assert theta.grad is not None
        exact = torch.clamp(theta.detach(), min=0) + torch.log1p(torch.exp(-theta.detach().abs()))
        assert torch.allclose(likelihood.softplus(theta.detach()), exact, rtol=1e-15, atol=0)
        assert torch.allclose(theta.grad, torch.sigmoid(theta.detach()), rtol=1e-15, atol=0)

    def test_log_cosh(self) -> None:
        x = torch.tensor([-3.0, -1e-3, 0.0, 0.7, 20.0], dtype=torch.float64)
        assert torch.allclose(likelihood.log_cosh(x), torch.log(torch.cosh(x)), rtol=1e-12, atol=1e-16)
        assert float(likelihood.log_cosh(torch.tensor(900.0))) == pytest.approx(900 - np.log(2))

    def test_similar_is_a_class_in_common(self) -> None:
        labels = np.random.default_rng(0).random((12, 4)) < 0.3
        found = likelihood.similar(likelihood.indicator(labels[:5]), likelihood.indicator(labels))
        for i in range(5):
            for j in range(12):
                assert bool(found[i, j]) == bool(set(np.flatnonzero(labels[i])) & set(np.flatnonzero(labels[j])))


class TestDPSH:
    def test_loss_is_the_double_loop_over_batch_and_bank(self) -> None:
        own, rows, z = method("dpsh", eta=3.0), rows_of(), gaussian(9, L)
        bank = gaussian(230, L, seed=1)
        own.bank.u_nL.copy_(bank)
        found = own.loss({"z": z}, batch_of(rows))
        u = bank.clone()
        u[torch.from_numpy(rows)] = z
        total = 0.0
        for i, row in enumerate(rows):
            for j in range(230):
                theta = 0.5 * float(z[i] @ u[j])
                total += 2 * (float(np.log1p(np.exp(theta))) - same_class(row, j) * theta)
            total += 3.0 * float(((z[i] - torch.where(z[i] >= 0, 1.0, -1.0)) ** 2).sum())
        assert float(found.backward) == pytest.approx(total / (9 * 230), rel=1e-12)

    def test_gradient_is_that_of_the_released_code(self) -> None:
        """Eq 7: (A - S) U + 2 eta (u - sgn u), over B n, with A the probabilities."""
        own, rows, z = method("dpsh", eta=3.0), rows_of(), gaussian(9, L).requires_grad_()
        own.bank.u_nL.copy_(gaussian(230, L, seed=1))
        own.loss({"z": z}, batch_of(rows)).backward.backward()
        u, fixed = own.bank.u_nL, z.detach()
        s = torch.tensor([[same_class(i, j) for j in range(230)] for i in rows], dtype=torch.float64)
        a = torch.sigmoid(fixed @ u.T / 2)
        expected = (a - s) @ u + 2 * 3.0 * (fixed - torch.where(fixed >= 0, 1.0, -1.0))
        assert z.grad is not None
        assert torch.allclose(z.grad, expected / (9 * 230), rtol=1e-12)
