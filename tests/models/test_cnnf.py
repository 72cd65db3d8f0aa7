"""CNN-F: sizes of its table, its arithmetic by hand, and the ways it is opened."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import FeatureSettings
from hashdist.models.cnnf import CnnF
from hashdist.models.networks import known_taps, open_network, weights_identity

RANDOM = FeatureSettings(backbone="cnnf", weights="random", precision="float32")


@pytest.fixture(scope="module")
def made() -> CnnF:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CnnF().eval()


def test_sizes_are_those_of_the_table(made: CnnF) -> None:
    found: list[tuple[int, ...]] = []
    convolutions = [made.conv1, made.conv2, made.conv3, made.conv4, made.conv5]
    hooks = [c.register_forward_hook(lambda *call: found.append(tuple(call[2].shape[1:]))) for c in convolutions]
    hooks += [
        c.register_forward_pre_hook(lambda _, inputs: found.append(tuple(inputs[0].shape[1:]))) for c in convolutions
    ]
    hooks.append(made.full6.register_forward_pre_hook(lambda _, inputs: found.append(tuple(inputs[0].shape[1:]))))
    with torch.inference_mode():
        features = made(torch.zeros(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    sides = [shape[-1] for shape in found]
    assert sides == [224, 54, 27, 27, 13, 13, 13, 13, 13, 13, 9216]
    assert [shape[0] for shape in found[1::2]] == [64, 256, 256, 256, 256]
    assert features.shape == (1, 4096)
    assert 6 * 6 * 256 == 9216


def test_response_normalisation_is_that_of_krizhevsky_2012(made: CnnF) -> None:
    a = np.random.default_rng(0).random((12, 2, 2)) * 100
    expected = np.empty_like(a)
    for c in range(12):
        near = range(max(0, c - 2), min(12, c + 3))
        expected[c] = a[c] / (2 + 1e-4 * sum(a[j] ** 2 for j in near)) ** 0.75
    np.testing.assert_allclose(made.norm(torch.from_numpy(a)[None])[0].numpy(), expected, rtol=1e-12)


def test_signal_keeps_its_scale_with_random_weights(made: CnnF) -> None:
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 60
    with torch.inference_mode():
        features = made(x)
    assert 0.1 < float(features.std()) < 100


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), np.uint8)


@pytest.mark.parametrize(("tap", "width"), [("", 4096), ("relu7", 4096), ("relu6", 4096), ("pool", 9216)])
def test_taps_and_input(tap: str, width: int) -> None:
    opened = open_network(replace(RANDOM, tap=tap))
    assert opened.width == width
    assert opened.preprocess(np.zeros((60, 90, 3), np.uint8)).shape == (224, 224, 3)
    images = pixels(2)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() - mean
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        expected = _until(CnnF().eval(), x, tap or "relu7")
        assert torch.allclose(opened(torch.from_numpy(images)), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def _until(made: CnnF, x: Tensor, tap: str) -> Tensor:
    found: list[Tensor] = []
    named: dict[str, nn.Module] = {"relu7": made.relu7, "relu6": made.relu6, "pool": made.flat}
    named[tap].register_forward_hook(lambda *call: found.append(call[2]))
    made(x)
    return found[0]


def test_weights_come_from_a_file_or_not_at_all(tmp_path: Path, made: CnnF) -> None:
    state: dict[str, Any] = dict(made.state_dict())
    state["full7.bias"] = torch.full((4096,), 3.0)
    path = tmp_path / "cnnf.pth"
    torch.save(state, path)
    opened = open_network(replace(RANDOM, weights=str(path)))
    assert float(opened.body.state_dict()["full7.bias"][0]) == 3.0
    assert weights_identity(replace(RANDOM, weights=str(path))) != weights_identity(RANDOM)
    del state["conv3.weight"]
    torch.save(state, path)
    with pytest.raises(InvalidInput, match=r"1 missing \(conv3.weight\)"):
        open_network(replace(RANDOM, weights=str(path)))
    for use in (open_network, weights_identity):
        with pytest.raises(InvalidInput, match=r"--features\.weights random, or take `alexnet`"):
            use(replace(RANDOM, weights="hub"))


def test_known_taps_name_the_default_first() -> None:
    assert next(iter(known_taps("cnnf"))) == "relu7"
