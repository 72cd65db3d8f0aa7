"""SADH against plain double loops in float64, finite differences, and the identities of its reference."""

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
from hashdist.methods import sadh
from hashdist.methods.contract import Batch, Outputs, Place, TrainingData, method_settings
from hashdist.methods.parts.communicator import SingleProcess
from tests.worlds.training import on_ranks, tiny_data

BITS, WIDTH, CLASSES = 8, 12, 5
PAPER = replace(sadh.PRESETS["paper"], semantic=WIDTH, labnet_hidden=16)
RELEASE = replace(sadh.PRESETS["release"], semantic=WIDTH, labnet_hidden=16)
VARIANTS: dict[str, sadh.Settings] = {
    "paper": PAPER,
    "release": RELEASE,
    "even": replace(PAPER, alpha=1.0, gamma=1.0, beta=1.0),
    "classes": replace(PAPER, map_rows="classes", gamma=1.0),
    "binary map": replace(PAPER, binary_map=True),
    "asm": replace(PAPER, gamma=0.0, mu=0.0),
    "mars": replace(PAPER, pair="constant", margin=0.2, alpha=1.0),
    "mars at 0": replace(PAPER, pair="constant"),
    "cos": replace(PAPER, pair="likelihood", alpha=1.0, gamma=1.0),
    "cos, mean": replace(PAPER, pair="likelihood", feature_theta="mean", alpha=1.0),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_labels(n: int, classes: int = CLASSES, seed: int = 0, single: bool = False) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    own = np.eye(classes, dtype=bool)[rng.integers(0, classes, n)]
    return own if single else own | (rng.random((n, classes)) < 0.2)


def labelled(labels: NDArray[np.bool_]) -> TrainingData:
    return TrainingData(np.arange(len(labels)), features=np.zeros((len(labels), 2), np.float32), labels=labels)


def place(data: TrainingData, comm: Any = None, frozen: bool = True, seed: int = 0) -> Place:
    return Place(BITS, frozen, data, comm or SingleProcess(), dtype=torch.float64, seed=seed)


def says(labels_TC: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """An untrained LabNet's (codes, features): any function of the label vectors."""
    x = torch.from_numpy(labels_TC).double()
    features = torch.tanh((x - 0.3) @ normal(labels_TC.shape[1], 20, seed=1)) @ normal(20, WIDTH, seed=2)
    return torch.tanh(features @ normal(WIDTH, BITS, seed=3) / 4), features


def guided(settings: sadh.Settings, labels: NDArray[np.bool_], comm: Any = None) -> sadh.Method:
    """A method whose LabNet is `says`."""
    method = sadh.Method(settings, place(labelled(labels), comm))
    rows = np.concatenate((method.sets, method.map_RC.numpy() > 0))
    codes, features = says(rows)
    method.load_state_dict({"sets": torch.from_numpy(method.sets), "codes": codes, "features": features})
    return method


def outputs_of(size: int) -> Outputs:
    return {
        "z": torch.tanh(normal(size, BITS, seed=4)),
        "features": normal(size, WIDTH, seed=5),
        "classes": normal(size, CLASSES, seed=6),
    }


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(sum(a * b) / math.sqrt(sum(a**2)) / math.sqrt(sum(b**2)))


def cost_by_loop(
    chosen: sadh.Settings,
    similar: bool,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    t: NDArray[np.float64],
    u: NDArray[np.float64],
    features: bool,
) -> float:
    """One pair of Eqs 7 and 9: a and b are compared, t and u are what LabNet says of the two."""
    if chosen.pair == "likelihood":
        theta = float(sum(a * b)) / (len(a) if features and chosen.feature_theta == "mean" else 1)
        return -((theta if similar else 0.0) - math.log(1 + math.exp(theta)))
    x = cosine(a, b)
    if chosen.pair == "constant":
        return 0.5 * (max(chosen.margin - x, 0) if similar else max(chosen.margin + x, 0))
    margin = max(0.0, cosine(t, u))
    return 0.5 * (max(margin - x, 0) if similar else max(x - margin, 0))


def terms_by_loops(chosen: sadh.Settings, outputs: Outputs, labels: NDArray[np.bool_]) -> dict[str, float]:
    """All of Eq 9 for a batch that is all there is: image by image, map row by map row."""
    z, f, o = (outputs[name].detach().numpy() for name in ("z", "features", "classes"))
    size = len(z)
    map_rows = sorted({tuple(row) for row in labels.tolist()})
    rows = np.array(map_rows) if chosen.map_rows == "label_sets" else np.eye(CLASSES, dtype=bool)
    own_codes, own_features = (v.numpy() for v in says(labels))
    u, q = (v.numpy() for v in says(rows))
    binary = np.where(u >= 0, 1.0, -1.0) if chosen.binary_map else u
    j1 = j2 = j3 = j4 = j5 = j6 = 0.0
    for i in range(size):
        for j in range(size):
            similar = any(labels[i] & labels[j])
            j1 += cost_by_loop(chosen, similar, f[i], f[j], own_features[i], own_features[j], True)
            j2 += cost_by_loop(chosen, similar, z[i], z[j], own_codes[i], own_codes[j], False)
        for c, row in enumerate(rows):
            similar = any(labels[i] & row)
            j3 += cost_by_loop(chosen, similar, f[i], q[c], own_features[i], q[c], True)
            j4 += cost_by_loop(chosen, similar, z[i], binary[c], own_codes[i], binary[c], False)
        for c in range(CLASSES):
            if chosen.classification == "squared":
                j5 += (o[i, c] - labels[i, c]) ** 2
            else:
                p = 1 / (1 + math.exp(-o[i, c]))
                j5 += -math.log(p if labels[i, c] else 1 - p) / CLASSES
        for k in range(BITS):
            j6 += (z[i, k] - (1.0 if z[i, k] >= 0 else -1.0)) ** 2
    found = {
        "pair_features": j1 / size**2,
        "pair_codes": j2 / size**2,
        "map_features": j3 / size / len(rows),
        "map_codes": j4 / size / len(rows),
        "classification": j5 / size,
        "quantisation": j6 / size / BITS,
    }
    weights = (chosen.alpha, chosen.lambda_, chosen.gamma, chosen.mu, chosen.eta, chosen.beta)
    return {"loss": sum(w * v for w, v in zip(weights, found.values(), strict=True)), **found}


def whole_batch(size: int) -> Batch:
    return Batch(np.arange(size), slice(0, size), (size,), 0)


# ---- ImgNet: the six terms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_term_equals_plain_loops(name: str, single: bool) -> None:
    chosen, labels, outputs = VARIANTS[name], random_labels(13, single=single), outputs_of(13)
    found = guided(chosen, labels).loss(outputs, whole_batch(13))
    assert {k: float(v) for k, v in found.terms.items()} == pytest.approx(
        terms_by_loops(chosen, outputs, labels), rel=1e-12
    )
    assert float(found.backward) == pytest.approx(float(found.terms["loss"]), rel=1e-14)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_equals_finite_differences(name: str) -> None:
    method = guided(VARIANTS[name], random_labels(6))
    start = outputs_of(6)
    names = list(start)

    def value(*values: Tensor) -> Tensor:
        return method.loss(dict(zip(names, values, strict=True)), whole_batch(6)).backward

    assert torch.autograd.gradcheck(value, [v.requires_grad_() for v in start.values()], eps=1e-6, atol=1e-8)


def test_gradient_of_a_dissimilar_pair_is_plus_half_that_of_its_cosine() -> None:
    """Eq 11 as printed has the other sign, and would pull dissimilar pairs together."""
    x = torch.tensor([0.9, 0.1, -0.5], dtype=torch.float64, requires_grad=True)
    margin, different = torch.full((3,), 0.3, dtype=torch.float64), torch.zeros(3, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(sadh.pair_cost("scalable", different, margin, x).sum(), x)
    assert gradient.tolist() == [0.5, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(sadh.pair_cost("scalable", ~different, margin, x).sum(), x)
    assert gradient.tolist() == [0.0, -0.5, -0.5]


@pytest.mark.parametrize("name", ["paper", "mars"])
def test_a_zero_row_has_zero_gradient_and_spoils_nothing(name: str) -> None:
    method = guided(replace(VARIANTS[name], eta=0.0, beta=0.0), random_labels(6))
    outputs = outputs_of(6)
    outputs["z"][2] = 0
    outputs["features"][3] = 0
    live = {k: v.requires_grad_() for k, v in outputs.items()}
    method.loss(live, whole_batch(6)).backward.backward()
    for key, row in (("z", 2), ("features", 3)):
        gradient = live[key].grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        assert (gradient[row] == 0).all()
        assert (gradient[0] != 0).any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_together_give_the_gradient_of_the_whole_batch(name: str, world_size: int) -> None:
    size, chosen, labels = 13, VARIANTS[name], random_labels(40, seed=2)
    rows, start = np.random.default_rng(1).permutation(40)[:size], outputs_of(size)
    whole = {k: v.clone().requires_grad_() for k, v in start.items()}
    expected = guided(chosen, labels).loss(whole, Batch(rows, slice(0, size), (size,), 0))
    expected.backward.backward()
    slices = [rank_slice(size, r, world_size) for r in range(world_size)]
    sizes = tuple(s.stop - s.start for s in slices)

    def work(comm):  # type: ignore[no-untyped-def]
        own = {k: v[slices[comm.rank]].clone().requires_grad_() for k, v in start.items()}
        loss = guided(chosen, labels, comm).loss(own, Batch(rows, slices[comm.rank], sizes, 0))
        loss.backward.backward()
        return {k: v.grad for k, v in own.items()}, {k: float(v) for k, v in loss.terms.items()}

    found = on_ranks(world_size, work)
    for key, value in whole.items():
        assert torch.allclose(torch.cat([g[key] for g, _ in found]), value.grad, rtol=1e-11, atol=1e-15)  # type: ignore[arg-type]
    for _, terms in found:
        assert terms == pytest.approx({k: float(v) for k, v in expected.terms.items()}, rel=1e-12)


def test_release_is_the_sum_of_its_scripts() -> None:
    """Their hinges have no 1/2, their weights are 1 (pairs and maps), .1 and .01; in LabNet 1, 1, 2 / C and .1."""
    labels, outputs = random_labels(17), outputs_of(17)
    x = torch.from_numpy(labels).double()
    sets = torch.unique(x, dim=0)
    (u, q), (own_u, own_q) = says(sets.numpy() > 0), says(labels)

    def hinges(a: Tensor, b: Tensor, margin: Tensor, similar: Tensor) -> Tensor:
        c = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
        return ((margin - c).clamp_min(0) * similar).mean() + ((c - margin).clamp_min(0) * (1 - similar)).mean()

    def margins(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2).clamp_min(0)

    share, to_sets = (x @ x.T > 0).double(), (x @ sets.T > 0).double()
    z, f = outputs["z"], outputs["features"]
    expected = sum(
        hinges(a, a, margins(own, own), share) + hinges(a, m, margins(own, m), to_sets)
        for a, own, m in ((z, own_u, u), (f, own_q, q))
    )
    expected = expected + 0.1 * torch.nn.functional.binary_cross_entropy_with_logits(outputs["classes"], x)
    expected = expected + 0.01 * (z - z.sign()).pow(2).mean()
    assert float(guided(RELEASE, labels).loss(outputs, whole_batch(17)).backward) == pytest.approx(float(expected))

    def fixed(a: Tensor) -> Tensor:
        c = torch.nn.functional.cosine_similarity(a[:, None], a[None], dim=2)
        return ((0.2 - c).clamp_min(0) * share).mean() + ((0.2 + c).clamp_min(0) * (1 - share)).mean()

    error = 2 * (outputs["classes"] - x).pow(2).sum() / CLASSES
    expected = fixed(z) + fixed(f) + error + 0.1 * (z - z.sign()).pow(2).mean()
    weight_S = torch.full((17,), 1 / 17, dtype=torch.float64)
    assert float(sadh.labnet_loss(outputs, x, weight_S, RELEASE, 17)) == pytest.approx(float(expected))


# ---- maps and margins ----------------------------------------------------------------------------------------------


def test_label_sets_are_the_distinct_rows_and_every_image_has_its_own() -> None:
    labels = random_labels(300, 11)
    sets, numbers = sadh.label_sets(labels)
    assert sorted(map(tuple, sets.tolist())) == sorted({tuple(row) for row in labels.tolist()})
    assert np.array_equal(sets[numbers], labels)


def test_identical_label_sets_have_margin_one() -> None:
    labels = random_labels(40, seed=3)
    method = guided(PAPER, labels)
    margins = [guide.pair_margins(torch.from_numpy(method.set_N)) for guide in (method.codes, method.features)]
    same = torch.from_numpy((labels[:, None] == labels[None]).all(2))
    assert 40 < int(same.sum()) < 1600
    for margin in margins:
        assert margin[same] == pytest.approx(1, abs=1e-12)
        assert float(margin[~same].max()) < 1 - 1e-3
        assert margin.min() == 0


@pytest.mark.parametrize("map_rows", ["label_sets", "classes"])
def test_margins_are_the_same_with_and_without_a_table(map_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, chosen = random_labels(40, seed=3), replace(PAPER, map_rows=map_rows)
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, len(sadh.label_sets(labels)[0]), 17))
    with_table = guided(chosen, labels).codes
    monkeypatch.setattr(sadh, "_TABLE", 0)
    without = guided(chosen, labels).codes
    assert torch.allclose(with_table.pair_margins(rows), without.pair_margins(rows), atol=1e-14)
    assert torch.allclose(with_table.map_margins(rows), without.map_margins(rows), atol=1e-14)
    assert with_table.map_margins(rows).shape == (17, len(without.map_RX))


def test_on_single_labels_maps_by_classes_and_by_label_sets_coincide() -> None:
    labels, outputs = random_labels(60, single=True), outputs_of(60)
    terms = []
    for map_rows in ("label_sets", "classes"):
        method = sadh.Method(replace(PAPER, map_rows=map_rows, labnet_epochs=2), place(labelled(labels)))
        method.prepare(sadh.network(PAPER, 2, BITS, torch.Generator(), classes=CLASSES), lambda: torch.zeros(0))
        terms.append({k: float(v) for k, v in method.loss(outputs, whole_batch(60)).terms.items()})
    assert terms[0] == pytest.approx(terms[1], rel=1e-6)  # LabNet's rows are float32 of another product shape


# ---- LabNet --------------------------------------------------------------------------------------------------------


def labnet(settings: sadh.Settings, seed: int = 0, classes: int = CLASSES) -> sadh.LabNet:
    return sadh.LabNet(classes, BITS, settings, torch.Generator().manual_seed(seed)).double()


def labnet_by_loops(outputs: Outputs, labels: NDArray[np.bool_], chosen: sadh.Settings) -> float:
    """Eq 6 image by image, as means."""
    z, f, o = (outputs[name].detach().numpy() for name in ("z", "features", "classes"))
    n, total = len(z), 0.0
    form = chosen if chosen.pair == "likelihood" else replace(chosen, pair="constant", margin=chosen.labnet_margin)
    for i in range(n):
        for j in range(n):
            similar = any(labels[i] & labels[j])
            total += chosen.labnet_alpha * cost_by_loop(form, similar, f[i], f[j], f[i], f[j], True) / n**2
            total += chosen.labnet_lambda * cost_by_loop(form, similar, z[i], z[j], z[i], z[j], False) / n**2
        error = sum((o[i, c] - labels[i, c]) ** 2 for c in range(CLASSES))
        total += chosen.labnet_eta * error / (n if chosen.labnet_classification == "images" else CLASSES)
        total += chosen.labnet_beta * sum((v - (1.0 if v >= 0 else -1.0)) ** 2 for v in z[i]) / n / BITS
    return total


@pytest.mark.parametrize("name", VARIANTS)
def test_labnets_loss_on_weighted_label_sets_is_that_over_the_images(name: str) -> None:
    """Mini-batches and labnet_unique alike: the exact objective over the images with repeated labels."""
    chosen, labels = VARIANTS[name], random_labels(23, seed=5)
    network = labnet(chosen)
    for parameter in network.parameters():
        parameter.data *= 30  # away from the origin, where all codes look alike
    sets, numbers = sadh.label_sets(labels)
    assert len(sets) < 23
    sets_SC = torch.from_numpy(sets).double()
    weight_S = torch.from_numpy(np.bincount(numbers) / 23)
    found = sadh.labnet_loss(network(sets_SC), sets_SC, weight_S, chosen, 23)
    expected = labnet_by_loops(network(torch.from_numpy(labels).double()), labels, chosen)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-12)


def test_labnet_unique_takes_the_steps_of_the_whole_data() -> None:
    """Against Adam written out on a batch of all images, each a row of its own."""
    chosen = replace(PAPER, labnet_unique=True, labnet_steps=4, labnet_batch=10, labnet_margin=0.1)
    labels = random_labels(30, seed=5)
    network, plain = labnet(chosen), labnet(chosen)
    sets, numbers = sadh.label_sets(labels)
    first, last = sadh.train_labnet(network, torch.from_numpy(sets).double(), numbers, chosen, seed=1)
    x = torch.from_numpy(labels).double()
    similar = x @ x.T > 0
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in plain.parameters()]
    values = []
    for step in range(4):
        out = plain(x)

        def hinge(v: Tensor) -> Tensor:
            c = torch.nn.functional.cosine_similarity(v[:, None], v[None], dim=2)
            return torch.where(similar, (0.1 - c).clamp_min(0), (0.1 + c).clamp_min(0)).mean() / 2

        quantisation = (out["z"] - torch.where(out["z"] >= 0, 1.0, -1.0)).square().mean()
        error = (out["classes"] - x).square().sum(1).mean()
        loss = 2 * hinge(out["features"]) + 0.5 * hinge(out["z"]) + 0.5 * error + 0.1 * quantisation
        values.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        for p, g, (m, v) in zip(plain.parameters(), gradients, moments, strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).add_(g * g, alpha=0.001)
            p.data -= chosen.labnet_lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    assert (first, last) == pytest.approx((values[0], values[-1]), rel=1e-9)
    for a, b in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-9)


def test_labnet_separates_single_labels_so_that_margins_are_one_and_zero() -> None:
    """What makes the scalable margin the plain rule "similar at cosine 1, others not above 0" on such data."""
    labels = random_labels(300, single=True)
    chosen = replace(PAPER, labnet_hidden=64, semantic=32, labnet_lr=1e-2, labnet_epochs=30)
    method = sadh.Method(chosen, place(labelled(labels)))
    method.prepare(sadh.network(chosen, 2, BITS, torch.Generator(), classes=CLASSES), lambda: torch.zeros(0))
    for guide in (method.codes, method.features):
        margins = guide.pair_margins(torch.arange(CLASSES))
        assert float((margins - torch.eye(CLASSES)).abs().max()) < 0.15


def test_permuting_classes_leaves_the_margins_as_they_were() -> None:
    """LabNet retrained from correspondingly permuted initial weights; without retraining the margins are others'."""
    labels, chosen = random_labels(60, seed=5), replace(PAPER, labnet_epochs=10, labnet_batch=20, labnet_lr=1e-2)
    order = np.array([3, 0, 4, 1, 2])
    plain, permuted = labnet(chosen), labnet(chosen)
    with torch.no_grad():
        permuted.hidden.weight.copy_(plain.hidden.weight[:, order])
        permuted.classify.weight.copy_(plain.classify.weight[order])
        permuted.classify.bias.copy_(plain.classify.bias[order])
    found = []
    for network, own in ((plain, labels), (permuted, labels[:, order])):
        sets, numbers = sadh.label_sets(own)
        sets_SC = torch.from_numpy(sets).double()
        sadh.train_labnet(network, sets_SC, numbers, chosen, seed=1)
        codes = network(sets_SC)["z"].detach()
        found.append(sadh.Guide(codes, codes).pair_margins(torch.from_numpy(numbers)))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-6)
    sets, numbers = sadh.label_sets(labels[:, order])
    codes = plain(torch.from_numpy(sets).double())["z"].detach()
    other = sadh.Guide(codes, codes).pair_margins(torch.from_numpy(numbers))
    assert float((other - found[0]).abs().max()) > 1e-3


def test_labnet_starts_from_small_weights_and_biases_and_has_no_activation_on_its_features() -> None:
    network = sadh.LabNet(40, BITS, sadh.PRESETS["paper"], torch.Generator().manual_seed(1))
    assert (network.hidden.out_features, network.semantic.out_features) == (4096, 2048)
    for parameter in network.parameters():
        if parameter.numel() > 1000:
            assert float(parameter.detach().std()) == pytest.approx(0.01, rel=0.1)
    small = labnet(PAPER)
    x = torch.eye(CLASSES).double()
    out = small(x)
    w = {k: v.detach().numpy() for k, v in small.named_parameters()}
    h = np.maximum(x.numpy() @ w["hidden.weight"].T + w["hidden.bias"], 0)
    f = h @ w["semantic.weight"].T + w["semantic.bias"]
    assert (f < 0).any()
    assert out["features"].detach().numpy() == pytest.approx(f, rel=1e-12)
    assert out["z"].detach().numpy() == pytest.approx(np.tanh(f @ w["hash.weight"].T + w["hash.bias"]), rel=1e-12)
    assert out["classes"].detach().numpy() == pytest.approx(f @ w["classify.weight"].T + w["classify.bias"], rel=1e-12)


def test_labnets_rate_of_the_release_falls_at_epochs_2_to_6_and_the_papers_stays() -> None:
    rates = [sadh.labnet_rate(sadh.PRESETS["release"], epoch) for epoch in range(9)]
    assert rates == pytest.approx([5e-3, 5e-3, 5e-4, 5e-5, 5e-6, 5e-7, 5e-8, 5e-8, 5e-8])
    assert {sadh.labnet_rate(PAPER, epoch) for epoch in range(15)} == {PAPER.labnet_lr}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_maps_are_the_same_bits_on_every_rank_of_every_world(world_size: int) -> None:
    labels, chosen = random_labels(60, seed=5), replace(PAPER, labnet_epochs=2)

    def work(comm):  # type: ignore[no-untyped-def]
        method = sadh.Method(chosen, place(labelled(labels), comm, seed=4))
        method.prepare(sadh.network(chosen, 2, BITS, torch.Generator(), classes=CLASSES), lambda: torch.zeros(0))
        return method.state_dict()

    alone = on_ranks(1, work)[0]
    for state in on_ranks(world_size, work):
        assert state.keys() == {"sets", "codes", "features"}
        assert all(torch.equal(value, alone[name]) for name, value in state.items())


# ---- the run -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_follows_the_same_maps() -> None:
    labels, outputs = random_labels(30), outputs_of(30)
    method, other = guided(PAPER, labels), sadh.Method(PAPER, place(labelled(labels)))
    other.load_state_dict(method.state_dict())
    batch = whole_batch(30)
    assert method.loss(outputs, batch).terms["loss"] == other.loss(outputs, batch).terms["loss"]
    elsewhere = sadh.Method(PAPER, place(labelled(random_labels(30, seed=9))))
    with pytest.raises(InvalidInput, match="maps belong to other label sets"):
        elsewhere.load_state_dict(method.state_dict())


@pytest.mark.parametrize("name", ["paper", "release"])
def test_head_of_the_paper_hashes_the_semantic_features_and_that_of_the_release_the_pooled_ones(name: str) -> None:
    chosen = VARIANTS[name]
    head = sadh.network(chosen, 40, BITS, torch.Generator().manual_seed(5), classes=CLASSES).double()
    assert isinstance(head, sadh.Head)
    x = normal(3, 40)
    w = {k: v.detach().numpy() for k, v in head.named_parameters()}
    f = x.numpy() @ w["semantic.weight"].T
    z = np.tanh((f if name == "paper" else x.numpy()) @ w["hash.weight"].T)
    found = {k: v.detach().numpy() for k, v in head(x).items()}
    assert found["features"] == pytest.approx(f, rel=1e-12)
    assert found["z"] == pytest.approx(z, rel=1e-12)
    assert found["classes"] == pytest.approx(f @ w["classify.weight"].T, rel=1e-12)
    assert all((layer.bias == 0).all() for layer in (head.semantic, head.hash, head.classify))


def test_optimisers_are_those_of_the_paper_and_of_the_release() -> None:
    data = tiny_data()
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    paper = sadh.Method(PAPER, place(data)).optimizer(parameters)
    assert isinstance(paper, torch.optim.SGD)
    assert (paper.param_groups[0]["lr"], paper.param_groups[0]["momentum"]) == (PAPER.lr, 0.9)
    release = sadh.Method(RELEASE, place(data)).optimizer(parameters)
    assert isinstance(release, torch.optim.RMSprop)
    assert (release.param_groups[0]["lr"], release.param_groups[0]["weight_decay"]) == (1e-5, 1e-6)
    decaying = sadh.Method(replace(PAPER, lr_decay=0.5, decay_epochs=3), place(data))
    rates = []
    for step in (0, 3 * (230 // 64) - 1, 3 * (230 // 64), 6 * (230 // 64)):
        decaying.adjust(paper, step)
        rates.append(paper.param_groups[0]["lr"] / PAPER.lr)
    assert rates == pytest.approx([1, 1, 0.5, 0.25])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semantic": 0}, "semantic must be at least 1, found 0"),
        ({"labnet_steps": -1}, "must not be negative"),
        ({"margin": 2}, "margins are cosines and must lie between -1 and 1, found margin 2"),
        ({"pair": "hinge"}, "option pair of method sadh must be one of 'scalable', 'constant', 'likelihood'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        sadh.Method(method_settings(sadh, "paper", options), place(tiny_data()))


def test_missing_and_empty_labels_are_refused() -> None:
    labels = random_labels(30)
    with pytest.raises(InvalidInput, match="learns from labels"):
        sadh.Method(PAPER, place(replace(labelled(labels), labels=None)))
    labels[4] = False
    with pytest.raises(InvalidInput, match="at least one label for every training image, found 1 of 30"):
        sadh.Method(PAPER, place(labelled(labels)))
    with pytest.raises(InvalidInput, match="needs at least one"):
        sadh.network(PAPER, 8, 8, torch.Generator())
