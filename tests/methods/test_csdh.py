"""CSDH against plain double loops in float64, the gradients printed in the paper, and finite differences."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import log_loss
from torch import Tensor

from hashdist.ground.errors import InvalidInput
from hashdist.ground.permutation import rank_slice
from hashdist.methods import csdh
from hashdist.methods.contract import Batch, Place, TrainingData, method_settings
from hashdist.methods.parts.communicator import SingleProcess
from tests.worlds.training import on_ranks, tiny_data

PAPER = csdh.PRESETS["paper"]


def embeddings(n: int, bits: int, seed: int = 0) -> Tensor:
    z = torch.randn(n, bits, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.softsign(z + 0.3)


def random_labels(n: int, classes: int, seed: int = 0, single: bool = False) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    own = np.eye(classes, dtype=bool)[rng.integers(0, classes, n)]
    return own if single else own | (rng.random((n, classes)) < 0.2)


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(sum(a * b) / math.sqrt(sum(a**2)) / math.sqrt(sum(b**2)))


def pairs_by_loops(z: NDArray[np.float64], labels: NDArray[np.bool_], distance: str) -> float:
    """Eqs 8 to 11 over ordered pairs, the diagonal among them."""
    size, bits = z.shape
    total = 0.0
    for i in range(size):
        for j in range(size):
            d = 1 - cosine(z[i], z[j]) if distance == "cosine" else bits / 2 * (1 - cosine(z[i], z[j]))
            total += d if any(labels[i] & labels[j]) else max(0.0, 1 - d)
    return total / size**2


def as_float(labels: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(labels).double()


def place(data: TrainingData, comm: Any = None, frozen: bool = True) -> Place:
    return Place(8, frozen, data, comm or SingleProcess(), dtype=torch.float64)


def labelled(labels: NDArray[np.bool_]) -> TrainingData:
    return TrainingData(np.arange(len(labels)), features=np.zeros((len(labels), 2), np.float32), labels=labels)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("distance", ["cosine", "hamming"])
def test_pair_term_equals_plain_loops(distance: str, single: bool) -> None:
    z, labels = embeddings(13, 8), random_labels(13, 4, single=single)
    found = csdh.pair_term(z, as_float(labels), distance)
    assert float(found) == pytest.approx(pairs_by_loops(z.numpy(), labels, distance), rel=1e-12)


@pytest.mark.parametrize("distance", ["cosine", "hamming"])
def test_gradient_equals_finite_differences(distance: str) -> None:
    z, labels = embeddings(7, 8).requires_grad_(), as_float(random_labels(7, 3))
    assert torch.autograd.gradcheck(lambda x: csdh.pair_term(x, labels, distance), (z,), eps=1e-6, atol=1e-8)


def test_gradient_is_twice_equations_12_and_13() -> None:
    """They are derivatives in the first argument only: minus d cos where similar, d cos where not and cos > 0."""
    size, z, labels = 9, embeddings(9, 8), random_labels(9, 4)
    live = z.clone().requires_grad_()
    csdh.pair_term(live, as_float(labels), "cosine").backward()
    h, expected = z.numpy(), np.zeros((size, 8))
    kinds = set()
    for i in range(size):
        for j in range(size):
            cos, length = cosine(h[i], h[j]), math.sqrt(sum(h[i] ** 2))
            d_cos = h[j] / length / math.sqrt(sum(h[j] ** 2)) - cos * h[i] / length**2
            if any(labels[i] & labels[j]):
                expected[i] += -d_cos
                kinds.add("similar")
            elif cos > 0:
                expected[i] += d_cos
                kinds.add("dissimilar")
            else:
                kinds.add("satisfied")
    assert kinds == {"similar", "dissimilar", "satisfied"}
    assert live.grad is not None
    assert live.grad.numpy() * size**2 == pytest.approx(2 * expected, rel=1e-12, abs=1e-14)


def test_dissimilar_pairs_at_or_below_cosine_zero_have_no_gradient() -> None:
    z = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    term = csdh.pair_term(z, torch.eye(3, dtype=torch.float64), "cosine")
    term.backward()
    assert float(term.detach()) == pytest.approx(0, abs=1e-15)
    assert z.grad is not None
    assert (z.grad == 0).all()


def test_the_hamming_form_lets_dissimilar_pairs_go_two_bits_apart() -> None:
    """Eq 10 to the letter: max(0, 1 - dist_H) is 0 from cos = 1 - 2 / L on; the similar term is bits that differ."""
    angle = math.acos(1 - 2 / 16)
    for factor, zero in ((1.01, True), (0.99, False)):
        z = torch.zeros(2, 16, dtype=torch.float64)
        z[0, 0], z[1, 0], z[1, 1] = 1.0, math.cos(factor * angle), math.sin(factor * angle)
        assert (float(csdh.pair_term(z, torch.eye(2).double(), "hamming")) < 1e-9) == zero
    codes = torch.tensor([[1.0] * 8, [1.0] * 5 + [-1.0] * 3], dtype=torch.float64)
    assert float(csdh.pair_term(codes, torch.ones(2, 1).double(), "hamming")) * 4 == pytest.approx(2 * 3)


def test_a_zero_row_has_zero_gradient_and_spoils_nothing() -> None:
    z = embeddings(6, 8)
    z[2] = 0
    z.requires_grad_()
    csdh.pair_term(z, as_float(random_labels(6, 3)), "cosine").backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert (z.grad[2] == 0).all()
    assert (z.grad[0] != 0).any()


def test_single_label_classification_is_the_mean_softmax_cross_entropy() -> None:
    logits, labels = embeddings(11, 5, 3) * 4, random_labels(11, 5, single=True)
    probabilities = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    found = csdh.classification(logits, as_float(labels), multi=False)
    assert float(found) == pytest.approx(log_loss(labels.argmax(1), probabilities, labels=range(5)), rel=1e-10)


def test_multi_label_classification_is_the_mean_over_images_and_classes_of_the_sigmoid_cross_entropy() -> None:
    logits, labels = embeddings(11, 5, 3) * 4, random_labels(11, 5)
    found = csdh.classification(logits, as_float(labels), multi=True)
    total = 0.0
    for i in range(11):
        for c in range(5):
            p = 1 / (1 + math.exp(-float(logits[i, c])))
            total -= math.log(p if labels[i, c] else 1 - p)
    assert float(found) == pytest.approx(total / 55, rel=1e-12)


@pytest.mark.parametrize(
    ("chosen", "single", "multi"),
    [("auto", True, False), ("auto", False, True), ("multi", True, True), ("single", True, False)],
)
def test_the_form_of_classification_follows_the_labels_or_the_option(chosen: Any, single: bool, multi: bool) -> None:
    assert csdh.is_multi(chosen, random_labels(20, 4, single=single)) == multi


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"distance": "hamming", "gamma": 0.5}, {"classification": "multi"}])
def test_ranks_together_give_the_gradient_of_the_whole_batch(options: dict[str, Any], world_size: int) -> None:
    size, chosen = 13, replace(PAPER, **options)
    multi = options.get("classification") == "multi"
    labels = random_labels(40, 4, 1, single=not multi)
    rows, z, logits = np.random.default_rng(1).permutation(40)[:size], embeddings(size, 8), embeddings(size, 4, 5)
    whole = [z.clone().requires_grad_(), logits.clone().requires_grad_()]
    expected_classes = csdh.classification(whole[1], as_float(labels[rows]), multi)
    expected_pairs = csdh.pair_term(whole[0], as_float(labels[rows]), chosen.distance)
    (expected_classes + chosen.gamma * expected_pairs).backward()
    slices = [rank_slice(size, r, world_size) for r in range(world_size)]
    sizes = tuple(s.stop - s.start for s in slices)

    def work(comm):  # type: ignore[no-untyped-def]
        method = csdh.Method(chosen, place(labelled(labels), comm))
        own = [v[slices[comm.rank]].clone().requires_grad_() for v in (z, logits)]
        loss = method.loss({"z": own[0], "classes": own[1]}, Batch(rows, slices[comm.rank], sizes, 0))
        loss.backward.backward()
        return [v.grad for v in own], {name: float(value) for name, value in loss.terms.items()}

    found = on_ranks(world_size, work)
    for k in range(2):
        assert torch.allclose(torch.cat([g[k] for g, _ in found]), whole[k].grad, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]
    pairs, classes = float(expected_pairs.detach()), float(expected_classes.detach())
    for _, terms in found:
        expected = {"pair": pairs, "classification": classes, "loss": classes + chosen.gamma * pairs}
        assert terms == pytest.approx(expected, rel=1e-12)


def test_csdh_minus_is_classification_alone() -> None:
    labels = random_labels(20, 4, single=True)
    method = csdh.Method(replace(PAPER, gamma=0.0), place(labelled(labels)))
    z = embeddings(13, 8).requires_grad_()
    outputs = {"z": z, "classes": z.detach()[:, :4].clone().requires_grad_()}
    loss = method.loss(outputs, Batch(np.arange(13), slice(0, 13), (13,), 0))
    assert float(loss.terms["loss"]) == float(loss.terms["classification"])
    assert float(loss.terms["pair"]) > 0
    loss.backward.backward()
    assert z.grad is not None
    assert (z.grad == 0).all()


def test_head_is_softsign_of_a_linear_layer_and_a_linear_layer_on_it() -> None:
    head = csdh.network(PAPER, 40, 16, torch.Generator().manual_seed(5), classes=7).double()
    assert isinstance(head, csdh.Head)
    for layer in (head.hash, head.predict):
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.2)
        assert (layer.bias == 0).all()
    x = torch.randn(3, 40, dtype=torch.float64)
    outputs = head(x)
    a = x.numpy() @ head.hash.weight.detach().numpy().T
    h = a / (1 + np.abs(a))
    assert outputs["z"].detach().numpy() == pytest.approx(h, rel=1e-12)
    assert outputs["classes"].detach().numpy() == pytest.approx(h @ head.predict.weight.detach().numpy().T, rel=1e-12)


def test_dropout_only_where_the_backbone_is_trained() -> None:
    frozen, whole = (csdh.network(PAPER, 8, 8, torch.Generator(), frozen=f, classes=2) for f in (True, False))
    assert isinstance(frozen, csdh.Head)
    assert isinstance(whole, csdh.Head)
    assert (frozen.dropout.p, whole.dropout.p) == (0.0, 0.5)


@pytest.mark.parametrize(("repeat", "last"), [(False, 1e-4), (True, 1e-6)])
def test_the_learning_rate_falls_after_forty_epochs(repeat: bool, last: float) -> None:
    data = tiny_data()
    method = csdh.Method(replace(PAPER, repeat_decay=repeat), place(data))
    steps = data.n // PAPER.batch
    optimizer = method.optimizer([torch.nn.Parameter(torch.zeros(2))])
    rates = []
    for step in (0, 40 * steps - 1, 40 * steps, 80 * steps - 1, 125 * steps):
        method.adjust(optimizer, step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, last])


def test_frozen_features_are_centred_and_scaled_but_those_of_a_backbone_in_training_are_not() -> None:
    data = tiny_data()
    assert data.features is not None
    bare = replace(PAPER, feature_length=0.0)
    for chosen, frozen, length in ((PAPER, True, PAPER.feature_length), (PAPER, False, 0.0), (bare, True, 0.0)):
        head = csdh.Head(12, 8, 5, torch.Generator())
        csdh.Method(chosen, place(data, frozen=frozen)).prepare(head, lambda: torch.zeros(0))
        x = head.standardize(torch.from_numpy(data.features))
        if length:
            assert float(x.square().sum(1).mean().sqrt()) == pytest.approx(length, rel=1e-5)
        else:
            assert torch.equal(x, torch.from_numpy(data.features))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1}, "gamma must be at least 0, found -1"),
        ({"gamma": "nan"}, "gamma must be at least 0, found nan"),
        ({"decay_epochs": 0}, "decay_epochs must be at least 1"),
        ({"distance": "euclidean"}, "option distance of method csdh must be one of 'cosine', 'hamming'"),
        ({"classification": "single"}, "needs one label an image, found .* of 30 with several"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        csdh.Method(method_settings(csdh, "paper", options), place(labelled(random_labels(30, 4))))


def test_missing_and_empty_labels_are_refused() -> None:
    labels = random_labels(30, 4)
    with pytest.raises(InvalidInput, match="learns from labels"):
        csdh.Method(PAPER, place(replace(labelled(labels), labels=None)))
    labels[4] = False
    with pytest.raises(InvalidInput, match="at least one label for every training image, found 1 of 30"):
        csdh.Method(PAPER, place(labelled(labels)))
    with pytest.raises(InvalidInput, match="needs at least one"):
        csdh.network(PAPER, 8, 8, torch.Generator())
