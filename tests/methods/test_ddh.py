"""DDH against plain double loops in float64, finite differences, and a bank that is made anew."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hashdist.ground.errors import InvalidInput
from hashdist.ground.permutation import epoch_batches, rank_slice
from hashdist.methods import ddh
from hashdist.methods.contract import Batch, Place, TrainingData, method_settings
from hashdist.methods.parts.communicator import SingleProcess
from hashdist.models.training import Checkpoint
from tests.worlds.training import on_ranks, run, sparse, through_file, tiny_data, tiny_settings

PAPER = ddh.PRESETS["paper"]
N, BITS = 40, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_labels(n: int = N, classes: int = 4, seed: int = 0) -> NDArray[np.bool_]:
    """Label sets of which none is empty, some are equal and some overlap."""
    rng = np.random.default_rng(seed)
    labels = rng.random((n, classes)) < 0.3
    labels[np.arange(n), rng.integers(0, classes, n)] = True
    return labels


def random_positive(n: int = N, seed: int = 0) -> NDArray[np.bool_]:
    """A symmetric relation without its diagonal; one row is empty."""
    positive = np.random.default_rng(seed).random((n, n)) < 0.2
    positive |= positive.T
    positive[3] = positive[:, 3] = False
    np.fill_diagonal(positive, False)
    return positive


def small_data() -> TrainingData:
    features = np.zeros((N, 2), np.float32)
    return TrainingData(np.arange(N), features, labels=random_labels(), graph=sparse(random_positive()))


def dense_s(similarity: str) -> NDArray[np.float64]:
    """s_ij of small_data by definition, pair by pair."""
    labels, positive = random_labels(), random_positive()
    s = -np.ones((N, N))
    for i in range(N):
        for j in range(N):
            alike = bool((labels[i] & labels[j]).any()) if similarity == "labels" else i == j or bool(positive[i, j])
            s[i, j] = 1.0 if alike else -1.0
    return s


def place(data: TrainingData, comm: Any = None, frozen: bool = True) -> Place:
    return Place(BITS, frozen, data, comm or SingleProcess(), dtype=torch.float64)


def prepared(chosen: ddh.Settings, u: Tensor, comm: Any = None) -> ddh.Method:
    """A method whose bank holds u."""
    method = ddh.Method(chosen, place(small_data(), comm))
    method.prepare(ddh.Head(2, BITS, torch.Generator()), u.clone)
    return method


def whole(rows: NDArray[np.int64], step: int = 0) -> Batch:
    return Batch(rows, slice(0, len(rows)), (len(rows),), step)


def by_loops(z: NDArray[Any], columns: NDArray[Any], s: NDArray[Any], chosen: ddh.Settings) -> tuple[float, float]:
    """Means of both terms, pair by pair (Eqs 10 and 12, D2)."""
    bits = z.shape[1]
    pair = sum((sum(a * b) / bits - s[i, j]) ** 2 / 2 for i, a in enumerate(z) for j, b in enumerate(columns))
    code_gap = sum((value - (1.0 if value >= 0 else -1.0)) ** 2 / 2 for row in z for value in row)
    return pair / len(z) / len(columns), code_gap / len(z)


@pytest.mark.parametrize("similarity", ["graph", "labels"])
def test_closed_form_equals_all_pairs_and_so_does_its_gradient(similarity: str) -> None:
    chosen, rows = replace(PAPER, similarity=similarity, n_ref=20), np.random.default_rng(1).permutation(N)[:13]
    u, z = 1.5 * normal(N, BITS), normal(13, BITS, seed=1).requires_grad_()
    loss = prepared(chosen, u).loss({"z": z}, whole(rows))
    bank = u.clone()
    bank[rows] = z.detach()  # fresh rows are in the bank before the loss
    s = dense_s(similarity)[rows]
    pair, quant = by_loops(z.detach().numpy(), bank.numpy(), s, chosen)
    assert float(loss.terms["pair"]) == pytest.approx(pair, rel=1e-12)
    assert float(loss.terms["quantisation"]) == pytest.approx(quant, rel=1e-12)
    assert float(loss.terms["loss"]) == pytest.approx(pair + 15 / 20 * quant, rel=1e-12)
    assert float(loss.backward.detach()) == pytest.approx(pair + 15 / 20 * quant, rel=1e-12)
    loss.backward.backward()
    again = z.detach().clone().requires_grad_()
    gaps = again @ bank.T / BITS - torch.from_numpy(s)
    codes = torch.where(again.detach() >= 0, 1.0, -1.0)
    dense = (gaps**2).sum() / 2 / 13 / N + 15 / 20 * ((again - codes) ** 2).sum() / 2 / 13
    dense.backward()
    assert torch.allclose(z.grad, again.grad, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]


def test_gradients_equal_finite_differences() -> None:
    u, z, s = normal(N, BITS), normal(7, BITS, seed=1).requires_grad_(), torch.from_numpy(dense_s("graph"))
    q = s[:7] @ u
    assert torch.autograd.gradcheck(lambda x: ddh.bank_loss(x, u.T @ u, q, N), (z,), eps=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(lambda x: ddh.batch_loss(x, s[:7, :7]), (z,), eps=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(ddh.quantisation, (z,), eps=1e-6, atol=1e-8)


def test_gradient_of_one_image_is_equation_13() -> None:
    u, rows = normal(N, BITS), np.array([5])
    z = normal(1, BITS, seed=1).requires_grad_()
    prepared(PAPER, u).loss({"z": z}, whole(rows)).backward.backward()
    bank, s = u.clone().numpy(), dense_s("graph")[5]
    row = z.detach().numpy()[0]
    bank[5] = row
    expected = sum((row @ bank[j]) * bank[j] / BITS**2 - s[j] * bank[j] / BITS for j in range(N)) / N
    expected += 15 / 10_000 * (row - np.where(row >= 0, 1, -1))
    np.testing.assert_allclose(z.grad.numpy()[0], expected, rtol=1e-12)  # type: ignore[union-attr]


@pytest.mark.parametrize("similarity", ["graph", "labels"])
def test_after_many_steps_sums_are_those_of_the_bank(similarity: str) -> None:
    method = prepared(replace(PAPER, similarity=similarity), normal(N, BITS))
    expected = normal(N, BITS)
    for step in range(200):
        rows = epoch_batches(N, 13, 0, step)[0]
        z = (1 + step / 100) * normal(13, BITS, seed=step + 1)
        method.loss({"z": z.clone().requires_grad_()}, whole(rows, step))
        expected[rows] = z
    assert torch.equal(method.bank.u_nL, expected)
    assert torch.allclose(method.bank.t_L, expected.sum(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(method.bank.g_LL, expected.T @ expected, rtol=1e-12, atol=1e-11)
    positive = torch.from_numpy((dense_s(similarity) > 0).astype(float))
    found = method.similarity.positive_sums(np.arange(N), method.bank.u_nL)
    assert torch.allclose(found, positive @ expected, rtol=1e-12, atol=1e-12)
    corrected = method.bank.t_L.clone()
    method.start_epoch(1, expected.clone)
    assert torch.allclose(method.bank.t_L, corrected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("similarity", ["graph", "labels"])
def test_batch_form_equals_plain_loops_with_both_roles_live(similarity: str) -> None:
    chosen = replace(PAPER, pairs="batch", similarity=similarity, n_ref=20)
    rows, z = np.random.default_rng(1).permutation(N)[:13], normal(13, BITS, seed=1).requires_grad_()
    loss = prepared(chosen, normal(N, BITS)).loss({"z": z}, whole(rows))
    s = dense_s(similarity)[np.ix_(rows, rows)]
    pair, quant = by_loops(z.detach().numpy(), z.detach().numpy(), s, chosen)
    assert float(loss.terms["pair"]) == pytest.approx(pair, rel=1e-12)
    assert float(loss.terms["loss"]) == pytest.approx(pair + 15 / 20 * quant, rel=1e-12)
    loss.backward.backward()
    v, gaps = z.detach(), z.detach() @ z.detach().T / BITS - torch.from_numpy(s)
    expected = 2 * gaps @ v / BITS / 13**2 + 15 / 20 * (v - torch.where(v >= 0, 1.0, -1.0)) / 13
    assert torch.allclose(z.grad, expected, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]


def test_with_n_ref_128_a_batch_of_128_has_the_sums_of_the_paper() -> None:
    chosen = replace(PAPER, pairs="batch", n_ref=128)
    z, s = normal(128, BITS), torch.ones(128, 128, dtype=torch.float64)
    paper = 0.5 * ((z @ z.T / BITS - s) ** 2).sum() + 15 * ddh.quantisation(z)
    ours = ddh.batch_loss(z, s) + chosen.lambda1 / chosen.n_ref * ddh.quantisation(z) / 128
    assert float(ours) == pytest.approx(float(paper) / 128**2, rel=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("pairs", ["bank", "batch"])
@pytest.mark.parametrize("similarity", ["graph", "labels"])
def test_ranks_add_up_to_the_whole_batch(similarity: str, pairs: str, world_size: int) -> None:
    chosen, rows, z = replace(PAPER, similarity=similarity, pairs=pairs), np.arange(5, 18), normal(13, BITS, seed=1)
    u = normal(N, BITS)
    alone = z.clone().requires_grad_()
    loss = prepared(chosen, u).loss({"z": alone}, whole(rows))
    loss.backward.backward()
    slices = [rank_slice(13, r, world_size) for r in range(world_size)]
    sizes = tuple(s.stop - s.start for s in slices)

    def work(comm: Any) -> tuple[Tensor, float, Any]:
        method = prepared(chosen, u, comm)
        own = z[slices[comm.rank]].clone().requires_grad_()
        found = method.loss({"z": own}, Batch(rows, slices[comm.rank], sizes, 0))
        found.backward.backward()
        assert own.grad is not None
        return own.grad, float(found.terms["loss"]), method.state_dict()

    found = on_ranks(world_size, work)
    assert torch.allclose(torch.cat([g for g, _, _ in found]), alone.grad, rtol=1e-12, atol=1e-16)  # type: ignore[arg-type]
    assert all(value == pytest.approx(float(loss.terms["loss"]), rel=1e-12) for _, value, _ in found)
    if pairs == "bank":
        assert all(torch.equal(state["bank"]["g"], found[0][2]["bank"]["g"]) for _, _, state in found)
        assert all(torch.equal(state["bank"]["u"][5:18], z) for _, _, state in found)


@pytest.mark.parametrize("similarity", ["graph", "labels"])
@pytest.mark.parametrize("pairs", ["bank", "batch"])
def test_resuming_within_an_epoch_gives_the_same_bits(pairs: str, similarity: str) -> None:
    settings = tiny_settings("ddh", checkpoint_steps=3, rounds=1, pairs=pairs, similarity=similarity, lr=1e-2)
    saved: list[Checkpoint] = []
    full = run(SingleProcess(), tiny_data(), settings, save=saved.append)
    assert saved[0].position["step"] == 3
    resumed = run(SingleProcess(), tiny_data(), settings, resume=through_file(saved[0]))
    assert torch.equal(resumed.network.hash.weight, full.network.hash.weight)  # type: ignore[union-attr, arg-type]


def test_head_is_linear_and_starts_as_the_release_says() -> None:
    head = ddh.network(PAPER, 400, 64, torch.Generator().manual_seed(5))
    assert isinstance(head, ddh.Head)
    assert float(head.hash.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert float(head.hash.bias.detach().std()) == pytest.approx(0.01, rel=0.3)
    x = normal(3, 400).float()
    assert torch.allclose(head(x)["z"], x @ head.hash.weight.T + head.hash.bias, atol=1e-6)


def test_learning_rate_is_log_spaced_from_first_to_last_epoch() -> None:
    method = ddh.Method(replace(PAPER, batch=10), place(small_data()))
    optimizer = method.optimizer(ddh.Head(2, BITS, torch.Generator()).parameters())
    rates = []
    for step in range(400):
        method.adjust(optimizer, step)
        rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, np.repeat(np.logspace(-3, -7, 100), 4), rtol=1e-12)
    once = ddh.Method(replace(PAPER, epochs=1), place(tiny_data()))
    once.adjust(optimizer, 0)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("decay_on", ["hash", "all"])
def test_weight_decay_is_lambda2_on_the_layers_it_is_for(decay_on: str) -> None:
    chosen = replace(PAPER, weight_decay=0.5, lr=0.1, decay_on=decay_on)
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = ddh.Method(chosen, place(small_data())).optimizer(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros(2)
    optimizer.step()
    backbone, weight, bias = (float(p.detach()[0]) for p in parameters)
    assert weight == bias == pytest.approx(0.95)
    assert backbone == pytest.approx(0.95 if decay_on == "all" else 1.0)


def test_frozen_features_are_centred_and_scaled_but_those_of_a_backbone_in_training_are_not() -> None:
    data = tiny_data()
    assert data.features is not None
    head = ddh.Head(12, BITS, torch.Generator())
    ddh.Method(PAPER, place(data)).prepare(head, lambda: normal(data.n, BITS))
    assert float(head.standardize(torch.from_numpy(data.features)).square().sum(1).mean().sqrt()) == pytest.approx(64)
    head = ddh.Head(12, BITS, torch.Generator())
    ddh.Method(PAPER, place(data, frozen=False)).prepare(head, lambda: normal(data.n, BITS))
    assert torch.equal(head.standardize(torch.from_numpy(data.features)), torch.from_numpy(data.features))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ref": 0}, "n_ref must be at least 1"),
        ({"lambda1": -1}, "lambda1 at least 0"),
        ({"lr_fall": 0}, "lr_fall positive"),
        ({"pairs": "all"}, "option pairs of method ddh must be one of 'bank', 'batch'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ddh.Method(method_settings(ddh, "paper", options), place(small_data()))


def test_without_a_graph_or_labels_it_says_what_to_do() -> None:
    data = small_data()
    with pytest.raises(InvalidInput, match="graph of its 40 training images, found none; build it first"):
        ddh.Method(PAPER, place(replace(data, graph=None)))
    with pytest.raises(InvalidInput, match="found one of 3 images"):
        ddh.Method(PAPER, place(replace(data, graph=sparse(np.ones((3, 3), bool)))))
    with pytest.raises(InvalidInput, match="ddh learns from labels"):
        ddh.Method(replace(PAPER, similarity="labels"), place(replace(data, labels=None)))
    ddh.Method(replace(PAPER, similarity="labels"), place(replace(data, graph=None)))


def test_batches_with_hardly_any_positive_pair_are_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    for chosen in (replace(PAPER, pairs="batch", batch=5), replace(PAPER, pairs="batch", batch=40), PAPER):
        prepared(chosen, normal(N, BITS))
        said = capsys.readouterr().err
        assert ("positive pairs on average, fewer than 20; set the option pairs to bank" in said) == (chosen.batch == 5)


def test_float32_training_loss_stays_close_to_float64() -> None:
    """The terms of the closed form cancel; in float32 the loss must still be good to six digits."""
    u, rows = normal(N, BITS), np.arange(13)
    exact = prepared(PAPER, u).loss({"z": normal(13, BITS, seed=1)}, whole(rows)).terms["loss"]
    single = ddh.Method(PAPER, replace(place(small_data()), dtype=torch.float32))
    single.prepare(ddh.Head(2, BITS, torch.Generator()), u.float)
    found = single.loss({"z": normal(13, BITS, seed=1).float()}, whole(rows)).terms["loss"]
    assert math.isclose(float(found), float(exact), rel_tol=1e-5)
