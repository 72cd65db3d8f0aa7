"""The loop on threads as ranks: order, resume with the same bits, both modes, bad input."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput
from hashdist.ground.permutation import permutation
from hashdist.methods.contract import TrainingData, deep_method, find_method
from hashdist.methods.parts.communicator import SingleProcess
from hashdist.methods.parts.standardize import Standardize
from hashdist.models.dropout import Counter, keep_mask, use_counter
from hashdist.models.training import Checkpoint, Trained, train
from tests.worlds.training import (
    Killed,
    largest_difference,
    on_ranks,
    run,
    same_bits,
    sparse,
    through_file,
    tiny_data,
    tiny_settings,
    weights,
    without_times,
)

ALONE = SingleProcess()
SIDE = 6


class Pictures(nn.Module):
    """A backbone with everything that could depend on the ranks: batch norm and two dropouts."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(4 * 16, 9), nn.ReLU(), nn.Dropout(0.25))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, 6, 6] -> [b, 9]."""
        x = images.to(self.convolution.weight.dtype) / 255
        return self.classifier(torch.relu(self.norm(self.convolution(x))).flatten(1))  # type: ignore[no-any-return]


def pictures() -> TrainingData:
    data = tiny_data(width=3 * SIDE * SIDE)
    assert data.features is not None
    pixels = torch.from_numpy(np.clip(data.features * 30 + 100, 0, 255).astype(np.uint8)).view(-1, 3, SIDE, SIDE)
    return replace(data, features=None, images=lambda rows: pixels[torch.from_numpy(rows)])


with torch.random.fork_rng():
    torch.manual_seed(0)
    FRESH = Pictures()


def backbone() -> Pictures:
    """The same initial weights every time, also from several threads at once."""
    return copy.deepcopy(FRESH)


def run_mode(mode: str, comm: Any, **more: Any) -> Any:
    """A run in either mode, of a fresh backbone in images mode."""
    settings = replace(tiny_settings(checkpoint_steps=3), mode=mode)
    if mode == "frozen":
        return run(comm, tiny_data(), settings, **more)
    return run(comm, pictures(), settings, backbone=backbone(), **more)


def test_history_reports_and_checkpoints_of_a_run() -> None:
    seen: list[dict[str, Any]] = []
    saved: list[Checkpoint] = []
    trained = run(ALONE, tiny_data(), tiny_settings(checkpoint_steps=3), save=saved.append, report=seen.append)
    assert [(s["event"], s["step"]) for s in seen] == [
        (e, 4 * n + s) for n in range(4) for e, s in (("checkpoint", 3), ("epoch", 4))
    ]
    assert [tuple(c.position.values()) for c in saved] == [
        (0, 0, 3), (0, 1, 0), (0, 1, 3), (1, 0, 0), (1, 0, 3), (1, 1, 0), (1, 1, 3), (2, 0, 0)
    ]  # fmt: skip
    assert [len(c.history) for c in saved] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert [h["epoch"] for h in trained.history] == [0, 1, 2, 3]
    assert {"loss", "pair", "quantisation", "images_per_s", "seconds", "round", "steps"} <= trained.history[0].keys()
    assert trained.history[1]["refresh"]["pairs"] > 0
    assert "refresh" not in trained.history[0]
    assert [r["round"] for r in trained.rounds] == [0, 1]
    for entry in trained.history:
        assert entry["loss"] == pytest.approx(entry["pair"] + 10 * entry["quantisation"], rel=1e-5)
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    assert not trained.network.training


def test_training_separates_clusters() -> None:
    data = tiny_data()
    trained = run(ALONE, data, tiny_settings(epochs=60, lr=1e-3))
    assert data.features is not None
    assert data.labels is not None
    with torch.no_grad():
        code = trained.network(torch.from_numpy(data.features))["z"] >= 0
    agreement = (code[:, None] == code[None]).float().mean(2).numpy()
    same = data.labels @ data.labels.T
    assert agreement[same].mean() > agreement[~same].mean() + 0.3


@pytest.mark.parametrize("mode", ["frozen", "images"])
def test_every_checkpoint_resumes_to_the_same_bits(mode: str) -> None:
    saved: list[Checkpoint] = []
    full = run_mode(mode, ALONE, save=saved.append)
    assert len(saved) == 8
    for checkpoint in saved:
        resumed = run_mode(mode, ALONE, resume=through_file(checkpoint))
        assert same_bits(weights(resumed), weights(full))
        assert without_times(resumed.history) == without_times(full.history)
        assert len(resumed.rounds) == 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_run_killed_on_several_ranks_resumes_to_the_same_bits(world_size: int) -> None:
    full = on_ranks(world_size, lambda comm: run_mode("frozen", comm))
    assert all(same_bits(weights(f), weights(full[0])) for f in full)
    for last in (1, 3, 4, 6):
        saved: list[Checkpoint] = []

        def save(checkpoint: Checkpoint, saved: list[Checkpoint] = saved, last: int = last) -> None:
            if len(saved) == last:
                raise Killed
            saved.append(checkpoint)

        with pytest.raises(Killed):
            on_ranks(world_size, lambda comm, save=save: run_mode("frozen", comm, save=save))  # type: ignore[misc]
        resume = through_file(saved[-1])
        resumed = on_ranks(world_size, lambda comm, resume=resume: run_mode("frozen", comm, resume=resume))  # type: ignore[misc]
        assert all(same_bits(weights(r), weights(full[0])) for r in resumed)


def test_an_error_of_report_ends_the_run_after_its_checkpoint() -> None:
    saved: list[Checkpoint] = []

    def report(_: dict[str, Any]) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(ALONE, tiny_data(), tiny_settings(), save=saved.append, report=report)
    assert [c.position for c in saved] == [{"round": 0, "epoch": 1, "step": 0}]


def test_a_finished_run_resumes_to_itself_without_a_step() -> None:
    saved: list[Checkpoint] = []
    full = run(ALONE, tiny_data(), tiny_settings(), save=saved.append)
    seen: list[dict[str, Any]] = []
    again = run(ALONE, tiny_data(), tiny_settings(), resume=through_file(saved[-1]), report=seen.append)
    assert same_bits(weights(again), weights(full))
    assert seen == []
    assert again.history == full.history
    assert again.seconds == full.seconds


def test_checkpoints_are_copies_that_training_leaves_alone() -> None:
    saved: list[tuple[Checkpoint, dict[str, Any]]] = []
    run(ALONE, tiny_data(), tiny_settings(), save=lambda c: saved.append((c, through_file(c))))
    for held, then in saved:
        assert same_bits(held.state["head"], then["state"]["head"])
        assert torch.equal(
            held.state["optimizer"]["state"][0]["exp_avg"], then["state"]["optimizer"]["state"][0]["exp_avg"]
        )
        assert held.history == then["history"]


@pytest.mark.parametrize("mode", ["frozen", "images"])
def test_world_sizes_agree_to_rounding(mode: str) -> None:
    def trained(world_size: int, dtype: torch.dtype) -> Trained:
        found = on_ranks(world_size, lambda comm: run_mode(mode, comm, dtype=dtype))
        assert all(same_bits(weights(f), weights(found[0])) for f in found)
        return found[0]  # type: ignore[no-any-return]

    exact, rounded = trained(1, torch.float64), trained(1, torch.float32)
    for world_size in (2, 3, 4):
        assert largest_difference(weights(exact), weights(trained(world_size, torch.float64))) <= 1e-9
        if mode == "frozen":  # the tiny network of images mode starts near z = 0, where float32 cosines are chaotic
            assert largest_difference(weights(rounded), weights(trained(world_size, torch.float32))) <= 1e-3


def test_only_rank_0_saves_and_all_report_alike() -> None:
    saved: list[int] = []
    seen: dict[int, list[Any]] = {0: [], 1: [], 2: []}

    def work(comm: Any) -> None:
        run_mode(
            "frozen",
            comm,
            save=lambda _: saved.append(comm.rank),
            report=lambda e: seen[comm.rank].append(without_times([e])),
        )

    on_ranks(3, work)
    assert set(saved) == {0}
    assert len(saved) == 8
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 8


def test_batch_norm_keeps_its_statistics_and_dropout_is_at_work() -> None:
    trained = run_mode("images", ALONE)
    assert isinstance(trained.backbone, Pictures)
    assert trained.backbone.norm.num_batches_tracked == 0
    assert torch.equal(trained.backbone.norm.running_mean, torch.zeros(4))
    assert not torch.equal(trained.backbone.convolution.weight, backbone().convolution.weight)
    without = backbone()
    without.classifier[0], without.classifier[3] = nn.Identity(), nn.Identity()
    settings = replace(tiny_settings(checkpoint_steps=3, dropout=0.0), mode="images")
    other = run(ALONE, pictures(), settings, backbone=without)
    assert not torch.equal(trained.network.state_dict()["hash.weight"], other.network.state_dict()["hash.weight"])


def test_dropout_masks_depend_on_image_and_step_alone() -> None:
    counter = Counter(seed=4)
    ids = torch.from_numpy(permutation(1000, 3)[:64] * 10**15)
    counter.set(7, ids)
    mask = keep_mask(counter, 0, 4096, 0.5, torch.device("cpu"))
    assert float(mask.float().mean()) == pytest.approx(0.5, abs=0.005)
    assert float(keep_mask(counter, 0, 4096, 0.25, torch.device("cpu")).float().mean()) == pytest.approx(
        0.75, abs=0.005
    )
    counter.set(7, ids[10:20])
    assert torch.equal(keep_mask(counter, 0, 4096, 0.5, torch.device("cpu")), mask[10:20])
    others = []
    for seed, step, layer in ((5, 7, 0), (4, 8, 0), (4, 7, 1)):
        other = Counter(seed)
        other.set(step, ids)
        others.append(keep_mask(other, layer, 4096, 0.5, torch.device("cpu")))
    for other_mask in (*others, mask.roll(1, 0)):
        assert float((other_mask == mask).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_counter_dropout_scales_what_it_keeps_and_is_the_identity_in_evaluation() -> None:
    network = nn.Sequential(nn.Linear(4, 1000), nn.Dropout(0.2))
    counter = use_counter(network, 0)
    counter.set(0, torch.arange(3))
    x = torch.ones(3, 4)
    dropped, whole = network(x), network.eval()(x)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], whole[kept] / 0.8)
    assert 0.7 < float(kept.float().mean()) < 0.9


class StochasticDepth(nn.Module):
    """Looks like torchvision's."""

    p, mode = 0.3, "row"


def test_branches_are_dropped_for_whole_images() -> None:
    network = nn.Sequential(StochasticDepth())
    counter = use_counter(network, 0)
    counter.set(0, torch.arange(500))
    dropped = network(torch.ones(500, 2, 3, 4)).flatten(1)
    assert ((dropped == 0).all(1) | torch.isclose(dropped, torch.tensor(1 / 0.7)).all(1)).all()
    assert float((dropped[:, 0] == 0).float().mean()) == pytest.approx(0.3, abs=0.06)


def test_other_randomness_of_a_backbone_follows_the_step_and_leaves_the_generator_alone() -> None:
    class Noisy(Pictures):
        def forward(self, images: Tensor) -> Tensor:
            found = super().forward(images)
            return found + torch.rand_like(found) if self.training else found

    def noisy(**more: Any) -> Trained:
        network = Noisy()
        network.load_state_dict(FRESH.state_dict())
        return run(ALONE, pictures(), settings, backbone=network, **more)

    settings = replace(tiny_settings(checkpoint_steps=3), mode="images")
    saved: list[Checkpoint] = []
    full = noisy(save=saved.append)
    assert same_bits(weights(noisy(resume=through_file(saved[2]))), weights(full))
    counter, before = Counter(1), torch.random.get_rng_state()
    with counter.seeded(torch.device("cpu")):
        first = torch.rand(3)
    with counter.seeded(torch.device("cpu")):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_heads_have_the_papers_dropout_only_with_a_backbone_in_training() -> None:
    module = deep_method(find_method("dsah"))
    for frozen, rate in ((True, 0.0), (False, 0.5)):
        head = module.network(module.PRESETS["paper"], 4, 8, torch.Generator(), frozen)
        assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [rate]


def test_images_are_asked_for_by_row_in_order_and_padded_blocks_repeat_the_last() -> None:
    data, asked = pictures(), []
    assert data.images is not None

    def images(rows: NDArray[np.int64]) -> Tensor:
        asked.append(rows.copy())
        return data.images(rows)  # type: ignore[misc]

    run(ALONE, replace(data, images=images), replace(tiny_settings(epochs=1), mode="images"), backbone=backbone())
    evaluated = [rows for rows in asked if len(rows) == 64]
    assert np.array_equal(np.concatenate(evaluated)[: data.n], np.arange(data.n))
    assert (np.concatenate(evaluated)[data.n :] == data.n - 1).all()
    assert [len(rows) for rows in asked if len(rows) not in (1, 64)] == [50] * 8


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_of_either_precision_and_in_a_file(dtype: type, tmp_path: Any) -> None:
    data = tiny_data(dtype=dtype)
    assert data.features is not None
    np.save(tmp_path / "features.npy", data.features)
    mapped = replace(data, features=np.load(tmp_path / "features.npy", mmap_mode="r"))
    assert same_bits(weights(run(ALONE, data, tiny_settings())), weights(run(ALONE, mapped, tiny_settings())))


def test_seeds_differ_and_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    a, b = (weights(run(ALONE, tiny_data(), replace(tiny_settings(seed=s), threads=before + 1))) for s in (0, 1))
    assert not same_bits(a, b)
    assert torch.get_num_threads() == before


def test_metrics_of_a_run_reach_the_sink() -> None:
    seen: dict[str, list[tuple[float, dict[str, str]]]] = {}

    class Sink:
        def observe(self, metric: telemetry.Metric, value: float, labels: dict[str, str]) -> None:
            seen.setdefault(metric.name, []).append((value, labels))

    telemetry.set_sink(Sink())
    try:
        run(ALONE, tiny_data(), tiny_settings())
    finally:
        telemetry.set_sink(telemetry.NoSink())
    assert sum(value for value, _ in seen[telemetry.TRAIN_STEPS.name]) == 16
    assert {labels["term"] for _, labels in seen[telemetry.TRAIN_LOSS.name]} == {"loss", "pair", "quantisation"}
    assert [value for value, _ in seen[telemetry.TRAIN_EPOCH.name]] == [1, 2, 3, 4]
    assert len(seen[telemetry.THRESHOLD.name]) == 1


def test_standardize_is_the_identity_until_fitted_and_survives_constant_features() -> None:
    module, features = Standardize(3), np.tile(np.array([1.0, 2.0, 3.0], np.float32), (10, 1))
    x = torch.from_numpy(features)
    assert torch.equal(module(x), x)
    module.fit(features, 64.0)
    assert torch.equal(module(x), torch.zeros(10, 3))


@pytest.mark.parametrize(
    ("world_size", "options", "message"),
    [
        (4, {"batch": 3}, "at least one image per worker: found batch 3 and 4 workers"),
        (1, {"batch": 231}, "full global batch of 231 images, found 230 training images"),
        (1, {"epochs": 0}, "epochs must be at least 1, found 0"),
        (1, {"learning_rate": 1}, "no option 'learning_rate'; its options are .*lr"),
    ],
)
def test_impossible_schedules_are_refused(world_size: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        on_ranks(world_size, lambda comm: run(comm, tiny_data(), tiny_settings(**options)))


def test_missing_inputs_are_named() -> None:
    data = tiny_data()
    with pytest.raises(InvalidInput, match="feature row for each of the 230 training images, found none"):
        run(ALONE, replace(data, features=None), tiny_settings())
    with pytest.raises(InvalidInput, match="needs the images and a backbone"):
        run(ALONE, data, replace(tiny_settings(), mode="images"))
    with pytest.raises(InvalidInput, match=r"into features \[1, D\], found"):
        run(ALONE, pictures(), replace(tiny_settings(), mode="images"), backbone=nn.Identity())
    with pytest.raises(InvalidInput, match="no preset 'best'; choose one of paper, release"):
        run(ALONE, data, replace(tiny_settings(), preset="best"))
    with pytest.raises(InvalidInput, match=r"no method is called 'dash'; choose one of .*dsah"):
        find_method("dash")
    with pytest.raises(InvalidInput, match="multiple of 8"):
        run(ALONE, data, replace(tiny_settings(), bits=12))


def test_a_checkpoint_of_another_run_is_refused_by_what_differs() -> None:
    saved: list[Checkpoint] = []
    data = tiny_data()
    run(ALONE, data, tiny_settings(), save=saved.append)
    resume = through_file(saved[0])
    others: list[tuple[TrainingData, Any, str]] = [
        (data, tiny_settings(seed=4), "seed: 4 here, 3 there"),
        (data, tiny_settings(epochs=3), "options: "),
        (data, replace(tiny_settings(), bits=24), "bits: 24 here, 16 there"),
        (replace(data, ids=data.ids + 1), tiny_settings(), "image ids: "),
        (replace(data, graph=sparse(np.eye(230, k=1, dtype=bool))), tiny_settings(), "graph: "),
        (tiny_data(width=13), tiny_settings(), "feature width: 13 here, 12 there"),
    ]
    for other, settings, message in others:
        with pytest.raises(InvalidInput, match=f"belongs to another run .*{message}"):
            run(ALONE, other, settings, resume=resume)


def test_shallow_methods_are_not_trained() -> None:
    with pytest.raises(InvalidInput, match="method 'lsh' is shallow"):
        train(find_method("lsh"), tiny_data(), tiny_settings(), ALONE, save=lambda _: None, report=lambda _: None)
