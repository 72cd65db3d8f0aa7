"""DSAH against plain double loops in float64, finite differences, and the identities of its reference."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hashdist.ground.errors import InvalidInput
from hashdist.ground.permutation import rank_slice
from hashdist.methods import dsah
from hashdist.methods.contract import Batch, Place, TrainingData, method_settings
from hashdist.methods.parts.communicator import SingleProcess
from hashdist.methods.parts.pairs import unit
from hashdist.methods.parts.similarity import ImplicitW, quantize
from tests.worlds.training import on_ranks, sparse, tiny_data

PAPER = dsah.PRESETS["paper"]
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "release": {"quant_on": "normalized"},
    "own batch": {"pic_ref_batch": 0},
    "other reference": {"pic_ref_batch": 200},
    "clamped": {"tau": 0.06, "pic_ref_batch": 2},
    "sharp": {"tau": 0.3, "lambda_": 0.5},
    "detached": {"detach": True},
    "PIC0": {"pic": "none"},
    "PIC-": {"pic": "minus"},
    "const": {"pic": "const"},
    "PIC- scaled": {"pic": "minus_scaled"},
}


def embeddings(n: int, bits: int, seed: int = 0) -> Tensor:
    z = torch.randn(n, bits, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(z + 0.5)


def random_w(n: int, seed: int = 0, symmetric: bool = True) -> Tensor:
    positive = np.random.default_rng(seed).random((n, n)) < 0.3
    positive |= positive.T if symmetric else False
    return torch.from_numpy(np.where(positive | np.eye(n, dtype=bool), 1.0, -1.0))


def by_loops(z: NDArray[np.float64], w: NDArray[np.float64], chosen: dsah.Settings) -> tuple[float, float]:
    """Eqs 4, 15, 16 and 17 pair by pair; exp and log as they stand, no logsumexp."""
    size, bits = z.shape
    s = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            s[i, j] = sum(z[i] * z[j]) / math.sqrt(sum(z[i] ** 2)) / math.sqrt(sum(z[j] ** 2))
    denominator = sum(math.exp(s[q, k] / chosen.tau) for q in range(size) for k in range(size))
    shift = 2 * math.log(size / chosen.pic_ref_batch) if chosen.pic_ref_batch else 0.0
    pic, minus = np.zeros((size, size)), np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            p = math.exp(s[i, j] / chosen.tau) / denominator
            pic[i, j] = max(0.0, -math.log(p) - shift)
            minus[i, j] = -math.log1p(-p)
    a = {
        "pic": pic,
        "none": np.ones((size, size)),
        "minus": minus,
        "const": np.full((size, size), pic.mean()),
        "minus_scaled": minus * pic.mean() / minus.mean(),
    }[chosen.pic]
    pair = sum(a[i, j] * (s[i, j] - w[i, j]) ** 2 for i in range(size) for j in range(size)) / size**2
    quantisation = 0.0
    for i in range(size):
        row = z[i] / math.sqrt(sum(z[i] ** 2)) if chosen.quant_on == "normalized" else z[i]
        for c in range(bits):
            quantisation += (row[c] - (1.0 if z[i, c] >= 0 else -1.0)) ** 2
    return pair, quantisation / (size * bits)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_equals_plain_loops(name: str, symmetric: bool) -> None:
    chosen, z, w = replace(PAPER, **VARIANTS[name]), embeddings(13, 8), random_w(13, symmetric=symmetric)
    found = dsah.global_loss(z, w, chosen)
    assert [float(f) for f in found] == pytest.approx(by_loops(z.numpy(), w.numpy(), chosen), rel=1e-12)


def test_the_clamp_of_that_variant_is_active() -> None:
    chosen, u = replace(PAPER, **VARIANTS["clamped"]), unit(embeddings(13, 8))
    s = u @ u.T
    a = dsah.pic(
        s, chosen.tau, dsah.Normaliser(torch.logsumexp((s / chosen.tau).flatten(), 0), dsah.shift_of(chosen, 13))
    )
    assert a.min() == 0
    assert a.max() > 0


@pytest.mark.parametrize("name", ["paper", "release", "own batch", "sharp", "PIC0", "PIC-"])
def test_gradient_equals_finite_differences(name: str) -> None:
    chosen, w = replace(PAPER, **VARIANTS[name]), random_w(7)
    z = embeddings(7, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dsah.global_loss(x, w, chosen), (z,), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["detached", "const"])
def test_detached_weights_are_constants_of_the_gradient(name: str) -> None:
    chosen, w, z = replace(PAPER, **VARIANTS[name]), random_w(7), embeddings(7, 8).requires_grad_()
    pair, _ = dsah.global_loss(z, w, chosen)
    (gradient,) = torch.autograd.grad(pair, z)
    with torch.no_grad():
        u = unit(z)
        a = dsah.pic(
            u @ u.T, chosen.tau, dsah.Normaliser(torch.logsumexp((u @ u.T).flatten(), 0), dsah.shift_of(chosen, 7))
        )
        a = a.mean().expand_as(a) if name == "const" else a
    fresh = z.detach().requires_grad_()
    u = fresh / fresh.norm(dim=1, keepdim=True)
    (expected,) = torch.autograd.grad((a * (u @ u.T - w) ** 2).mean(), fresh)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_zero_row_has_zero_gradient_and_spoils_nothing(name: str) -> None:
    chosen = replace(PAPER, lambda_=0.0, **{k: v for k, v in VARIANTS[name].items() if k != "lambda_"})
    z = embeddings(6, 8)
    z[2] = 0
    z.requires_grad_()
    pair, _ = dsah.global_loss(z, random_w(6), chosen)
    pair.backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert (z.grad[2] == 0).all()
    assert (z.grad[[0, 1, 3, 4, 5]] != 0).any()


def test_duplicating_a_batch_shifts_the_normaliser_by_two_log_two() -> None:
    z, w = embeddings(9, 8), random_w(9)
    s = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=2)
    twice = torch.cat((z, z))
    s2 = torch.nn.functional.cosine_similarity(twice[:, None], twice[None], dim=2)
    lse, lse2 = torch.logsumexp(s.flatten(), 0), torch.logsumexp(s2.flatten(), 0)
    assert float(lse2 - lse) == pytest.approx(2 * math.log(2), rel=1e-12)
    once = dsah.global_loss(z, w, PAPER)
    both = dsah.global_loss(twice, w.repeat(2, 2), PAPER)
    assert [float(b) for b in both] == pytest.approx([float(o) for o in once], rel=1e-12)


def test_at_the_reference_batch_weights_are_minus_log_softmax_and_positive() -> None:
    s = torch.rand(50, 50, dtype=torch.float64) * 2 - 1
    norm = dsah.Normaliser(torch.logsumexp(s.flatten(), 0), dsah.shift_of(PAPER, 50))
    a = dsah.pic(s, 1.0, norm)
    assert torch.allclose(a, -torch.log_softmax(s.flatten(), 0).view(50, 50), rtol=1e-13)
    assert (a > 0).all()


def test_quantisation_of_the_normalised_code_is_the_angle_to_its_signs() -> None:
    z = embeddings(11, 16)
    found = dsah.quantisation(z, replace(PAPER, quant_on="normalized")) / z.numel()
    b = torch.where(z >= 0, 1.0, -1.0)
    cosine = torch.nn.functional.cosine_similarity(z, b).mean()
    assert float(found) == pytest.approx(float(1 + 1 / 16 - 2 / 4 * cosine), rel=1e-12)


def test_head_is_affine_up_to_tanh_with_small_truncated_weights() -> None:
    head = dsah.network(PAPER, 40, 16, torch.Generator().manual_seed(5))
    assert isinstance(head, dsah.Head)
    values = torch.cat([p.detach().flatten() for p in head.parameters()])
    assert values.abs().max() <= 2e-3
    # a normal of deviation 1e-3 cut at two deviations has deviation .88e-3
    assert float(values.std()) == pytest.approx(0.88e-3, rel=0.02)
    again = dsah.network(PAPER, 40, 16, torch.Generator().manual_seed(5))
    other = dsah.network(PAPER, 40, 16, torch.Generator().manual_seed(6))
    assert torch.equal(again.hash.weight, head.hash.weight)
    assert not torch.equal(other.hash.weight, head.hash.weight)
    head = head.double()
    x = torch.randn(3, 40, dtype=torch.float64)
    a, b, middle = (torch.atanh(head(v)["z"]) for v in (x[:1], x[1:2], (x[:1] + x[1:2]) / 2))
    assert torch.allclose(middle, (a + b) / 2, atol=1e-12)
    assert head.hidden.out_features == 1000


def place(data: TrainingData, comm: Any = None, frozen: bool = True) -> Place:
    return Place(8, frozen, data, comm or SingleProcess(), dtype=torch.float64)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_both_recipes_give_the_gradient_of_the_whole_batch(name: str, symmetric: bool, world_size: int) -> None:
    size, chosen = 13, replace(PAPER, **VARIANTS[name])
    graph = sparse(random_w(40, 4, symmetric).numpy() > 0)
    data = TrainingData(np.arange(40), features=np.zeros((40, 2), np.float32), graph=graph)
    rows, z = np.random.default_rng(1).permutation(40)[:size], embeddings(size, 8)
    expected_z = z.clone().requires_grad_()
    w = ImplicitW(graph.indptr, graph.indices, dtype=torch.float64).block(rows)
    pair, quant = dsah.global_loss(expected_z, w, chosen)
    (pair + chosen.lambda_ * quant).backward()
    pair, quant = pair.detach(), quant.detach()
    slices = [rank_slice(size, r, world_size) for r in range(world_size)]
    sizes = tuple(s.stop - s.start for s in slices)
    for whole in (size, size - 1):

        def work(comm, whole=whole):  # type: ignore[no-untyped-def]
            method = dsah.Method(replace(chosen, gather_whole=whole), place(data, comm))
            own = z[slices[comm.rank]].clone().requires_grad_()
            loss = method.loss({"z": own}, Batch(rows, slices[comm.rank], sizes, 0))
            loss.backward.backward()
            return own.grad, {name: float(value) for name, value in loss.terms.items()}

        found = on_ranks(world_size, work)
        gradient = torch.cat([g for g, _ in found])
        assert expected_z.grad is not None
        assert float((gradient - expected_z.grad).abs().max() / expected_z.grad.abs().max()) < 1e-12
        for _, terms in found:
            assert terms["pair"] == pytest.approx(float(pair), rel=1e-12)
            assert terms["quantisation"] == pytest.approx(float(quant), rel=1e-12)
            assert terms["loss"] == pytest.approx(float(pair + chosen.lambda_ * quant), rel=1e-12)


def test_optimiser_of_the_release_is_tensorflows_adam_with_epsilon_hat() -> None:
    chosen = dsah.PRESETS["release"]
    method = dsah.Method(chosen, place(tiny_data()))
    start = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = method.optimizer([parameter])
    x, m, v = start.clone(), torch.zeros(3), torch.zeros(3)
    for step in range(450):
        gradient = torch.sin(x * (step + 1))
        parameter.grad = gradient.clone()
        method.adjust(optimizer, step)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = chosen.lr * 0.99 ** (step // 200) * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        x = x - rate * m / (v.sqrt() + 1.0)
    assert torch.allclose(parameter.detach(), x, rtol=1e-10)
    assert not torch.allclose(x, start, rtol=1e-5)


def test_rounds_grow_w_but_the_last_only_when_asked() -> None:
    data = tiny_data()
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(data.n, 8)))
    method = dsah.Method(replace(PAPER, rounds=2, gamma=-1.0), place(data))
    before = int((method.w.block(np.arange(data.n)) > 0).sum())
    found = method.end_of_round(0, lambda: z)
    assert found["pairs"] == before - data.n
    assert int((method.w.block(np.arange(data.n)) > 0).sum()) > before
    last = method.end_of_round(1, lambda: z)
    assert set(last) == {"rows", "positives", "precision", "recall", "f_w"}  # of labels only, nothing of a refresh
    bare = dsah.Method(replace(PAPER, rounds=2), place(replace(data, labels=None)))
    assert bare.end_of_round(1, lambda: z) == {}
    asked = dsah.Method(replace(PAPER, rounds=2, update_after_last=True), place(data))
    assert asked.end_of_round(1, lambda: z)["pairs"] == before - data.n
    assert method.w.thresholds == [
        ImplicitW(data.graph.indptr, data.graph.indices).refresh(quantize(z), -1.0, SingleProcess()).threshold
    ]  # type: ignore[union-attr]


def test_frozen_features_are_centred_and_scaled_but_those_of_a_backbone_in_training_are_not() -> None:
    data = tiny_data()
    assert data.features is not None
    head = dsah.Head(12, 8, torch.Generator())
    dsah.Method(PAPER, place(data)).prepare(head, lambda: torch.zeros(0))
    x = head.standardize(torch.from_numpy(data.features))
    assert float(x.mean(0).abs().max()) < 1e-4
    assert float(x.square().sum(1).mean().sqrt()) == pytest.approx(64, rel=1e-5)
    for chosen, frozen in ((PAPER, False), (replace(PAPER, feature_length=0.0), True)):
        head = dsah.Head(12, 8, torch.Generator())
        dsah.Method(chosen, place(data, frozen=frozen)).prepare(head, lambda: torch.zeros(0))
        assert torch.equal(head.standardize(torch.from_numpy(data.features)), torch.from_numpy(data.features))


def test_a_batch_with_hardly_any_positive_pair_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny_data()
    head = dsah.Head(12, 8, torch.Generator())
    dsah.Method(replace(PAPER, batch=8), place(data)).prepare(head, lambda: torch.zeros(0))
    assert "positive pairs on average, fewer than 20" in capsys.readouterr().err
    dsah.Method(replace(PAPER, batch=50), place(data)).prepare(head, lambda: torch.zeros(0))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0}, "tau must be positive, found 0"),
        ({"gamma": "nan"}, "gamma must be a number"),
        ({"pic_ref_batch": -1}, "pic_ref_batch must be at least 0"),
        ({"pic": "plus"}, "option pic of method dsah must be one of 'pic', 'none'"),
        ({"batch": 2.5}, "option batch of method dsah must be of type int"),
        ({"lr": "fast"}, "option lr of method dsah must be a number"),
        ({"lambda": 1}, "no option 'lambda'; its options are .*lambda_"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        dsah.Method(method_settings(dsah, "paper", options), place(tiny_data()))


def test_infinite_gamma_comes_in_as_text_or_number() -> None:
    assert method_settings(dsah, "paper", {"gamma": "-inf"}).gamma == -math.inf
    assert method_settings(dsah, "paper", {"gamma": 0}).gamma == 0.0


def test_the_graph_of_other_images_is_refused() -> None:
    data = tiny_data()
    with pytest.raises(InvalidInput, match="graph of its 230 training images, found one of 20 images"):
        dsah.Method(PAPER, place(replace(data, graph=sparse(np.ones((20, 20), bool)))))
    with pytest.raises(InvalidInput, match="found none"):
        dsah.Method(PAPER, place(replace(data, graph=None)))
