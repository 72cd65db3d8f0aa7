"""What every method owes the training loop, run over all files in hashdist/methods: a new one is tested by existing."""

import pickle
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hashdist.ground.permutation import rank_slice
from hashdist.methods.contract import (
    Batch,
    MethodModule,
    Place,
    find_method,
    fit_shallow,
    known_methods,
    method_settings,
    settings_text,
)
from hashdist.methods.parts.communicator import Communicator, SingleProcess
from hashdist.methods.parts.graph import RULES
from hashdist.models.training import Checkpoint
from tests.worlds.training import (
    QUICK,
    Killed,
    deep,
    deep_methods,
    largest_difference,
    on_ranks,
    run,
    same_bits,
    through_file,
    tiny_data,
    tiny_settings,
    weights,
    without_times,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
DEEP = deep_methods()
SHALLOW = sorted(set(known_methods()) - set(DEEP))


@pytest.mark.parametrize("name", known_methods())
def test_a_file_says_what_it_is(name: str) -> None:
    module = find_method(name)
    assert name == module.NAME
    assert len(module.CITATION) > 10
    assert module.__doc__


@pytest.mark.parametrize("name", SHALLOW)
def test_a_shallow_method_fits_the_same_code_again(name: str) -> None:
    data = tiny_data(n=200)
    features = data.features
    assert features is not None
    encoders = [fit_shallow(find_method(name), features, data.labels, 8, seed) for seed in (0, 0)]
    codes = [pickle.loads(pickle.dumps(encode))(features[:50]) for encode in encoders]
    assert codes[0].shape == (50, 8)
    assert np.array_equal(codes[0], codes[1])
    assert 0 < (codes[0] >= 0).mean() < 1


@pytest.mark.parametrize("name", DEEP)
class TestDeepMethod:
    """The contract of hashdist/methods/contract.py."""

    def test_settings_are_values_with_a_paper_preset(self, name: str) -> None:
        module = deep(name)
        assert module.USES in ("graph", "labels", "features")
        assert module.GRAPH in RULES
        assert (module.USES == "graph") == (module.GRAPH != "none")
        assert "paper" in module.PRESETS
        for preset in module.PRESETS.values():
            assert isinstance(preset, module.Settings)
            assert is_dataclass(preset)
            assert {"rounds", "epochs", "batch"} <= {f.name for f in fields(preset)}
            assert settings_text(preset) == settings_text(replace(preset))
            with pytest.raises(AttributeError):
                preset.batch = 1

    def test_network_depends_on_its_generator_only(self, name: str) -> None:
        module = deep(name)
        settings = module.PRESETS["paper"]
        same = [head(module, settings, s).state_dict() for s in (1, 1, 2)]
        assert same_bits(same[0], same[1])
        assert not same_bits(same[0], same[2])

    def test_head_gives_one_row_of_bits_for_each_image_alone(self, name: str) -> None:
        module = deep(name)
        network = head(module, module.PRESETS["paper"]).double().eval()
        x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        outputs = network(x)
        assert outputs["z"].shape == (5, 16)
        assert all(len(value) == 5 for value in outputs.values())
        assert torch.allclose(network(x[3:4])["z"], outputs["z"][3:4], rtol=1e-12)

    @pytest.mark.parametrize("batch", [50, 13])
    def test_gradients_do_not_depend_on_the_number_of_ranks(self, name: str, batch: int) -> None:
        gradients = {world_size: loss_gradient(name, world_size, batch) for world_size in (1, 2, 4)}
        for world_size in (2, 4):
            values, terms = gradients[world_size]
            assert largest_difference(gradients[1][0], values) <= 1e-9
            assert terms == pytest.approx(gradients[1][1], rel=1e-9)
        assert any(float(g.abs().max()) > 0 for g in gradients[1][0].values())

    def test_terms_are_finite_numbers_with_the_loss_among_them(self, name: str) -> None:
        _, terms = loss_gradient(name, 1, 50)
        assert "loss" in terms
        assert all(np.isfinite(value) for value in terms.values())

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_a_killed_run_resumes_to_the_same_bits(self, name: str, world_size: int) -> None:
        settings = tiny_settings(name, checkpoint_steps=3)
        full = on_ranks(world_size, lambda comm: run(comm, tiny_data(), settings))
        for last in (1, 4):
            saved: list[Checkpoint] = []

            def save(checkpoint: Checkpoint, saved: list[Checkpoint] = saved, last: int = last) -> None:
                if len(saved) == last:
                    raise Killed
                saved.append(checkpoint)

            with pytest.raises(Killed):
                on_ranks(world_size, lambda comm, save=save: run(comm, tiny_data(), settings, save=save))  # type: ignore[misc]
            resume = through_file(saved[-1])
            resumed = on_ranks(world_size, lambda comm, resume=resume: run(comm, tiny_data(), settings, resume=resume))  # type: ignore[misc]
            assert all(same_bits(weights(r), weights(full[0])) for r in resumed)
            assert without_times(resumed[0].history) == without_times(full[0].history)

    def test_whole_runs_agree_at_every_world_size(self, name: str) -> None:
        def trained(world_size: int) -> dict[str, Tensor]:
            settings = tiny_settings(name)
            return weights(on_ranks(world_size, lambda comm: run(comm, tiny_data(), settings, dtype=torch.float64))[0])

        alone = trained(1)
        for world_size in (2, 4):
            assert largest_difference(alone, trained(world_size)) <= 1e-9

    def test_training_lowers_the_loss(self, name: str) -> None:
        trained = run(SingleProcess(), tiny_data(), tiny_settings(name, epochs=10))
        assert trained.history[-1]["loss"] < trained.history[0]["loss"]


def head(module: MethodModule, settings: Any, seed: int = 1) -> nn.Module:
    """A head for tiny_data."""
    return module.network(settings, 12, 16, torch.Generator().manual_seed(seed), classes=tiny_data().classes)


def loss_gradient(name: str, world_size: int, batch: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradient of one global batch, summed over the ranks, in the head's parameters; and the terms."""
    module, data = deep(name), tiny_data()
    chosen: Any = method_settings(module, "paper", {"batch": batch, **QUICK.get(name, {})})
    slices = [rank_slice(batch, r, world_size) for r in range(world_size)]
    rows = np.random.default_rng(2).permutation(data.n)[:batch]
    assert data.features is not None
    features = torch.from_numpy(data.features[rows]).double()

    def work(comm: Communicator) -> tuple[dict[str, Tensor], dict[str, float]]:
        network = head(module, chosen).double()
        method = module.Method(chosen, Place(16, True, data, comm, dtype=torch.float64, seed=3))

        def encode() -> Tensor:
            with torch.no_grad():
                return network(torch.from_numpy(data.features).double())["z"].float()  # type: ignore[no-any-return, arg-type]

        method.prepare(network, encode)
        method.start_epoch(0, encode)
        sizes = tuple(s.stop - s.start for s in slices)
        loss = method.loss(network(features[slices[comm.rank]]), Batch(rows, slices[comm.rank], sizes, 0))
        loss.backward.backward()
        own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in network.named_parameters()}
        return own, {term: float(value) for term, value in loss.terms.items()}

    found = on_ranks(world_size, work)
    assert all(terms == pytest.approx(found[0][1], rel=1e-12) for _, terms in found)
    return {n: torch.stack([own[n] for own, _ in found]).sum(0) for n in found[0][0]}, found[0][1]
