"""Backbones: taps, weights, preprocessing, and features that depend on nothing but the image."""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import torch as safetensors
from sklearn.datasets import load_digits
from torch import nn

from hashdist.collection.decode import decode
from hashdist.ground.errors import InvalidInput, NotFound, Unavailable
from hashdist.ground.settings import FeatureSettings, PreprocessSettings
from hashdist.models import backbones, networks
from hashdist.models.backbones import (
    build_backbone,
    check_images,
    cut_batch,
    fold_batch_norm,
    has_float16,
    largest_activation,
)
from hashdist.models.networks import (
    open_network,
    read_weights,
    resolve_preprocess,
    spec_settings,
    state_bytes,
    weights_digest,
    weights_identity,
)

SMALL = FeatureSettings(backbone="mobilenet_v2", weights="random", preprocess=PreprocessSettings(size=32), batch=16)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow where other work goes on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_state(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights, and batch norm statistics that are far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            state[name] = torch.rand(value.shape, generator=generator) + 0.5
        elif name.endswith("running_mean"):
            state[name] = torch.randn(value.shape, generator=generator) * 0.1
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.pth"
    torch.manual_seed(3)
    torch.save(random_state(torchvision.models.mobilenet_v2(weights=None)), path)
    return path


def reference(name: str, images: np.ndarray, settings: FeatureSettings) -> torch.Tensor:
    """Normalised float32 input as torchvision documents it: x / 255, less the mean, over the deviation."""
    own = resolve_preprocess(settings)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(own.mean)[:, None, None]) / torch.tensor(own.std)[:, None, None]


class TestPixels:
    def test_digits_are_their_own_raw_pixels(self) -> None:
        digits = np.rint(load_digits().images[:50] * (255 / 16)).astype(np.uint8)
        backbone = build_backbone(FeatureSettings(backbone="pixels"))
        images = []
        for digit in digits:
            file = BytesIO()
            Image.fromarray(digit).save(file, "PNG")
            images.append(backbone.prepare(decode(file.getvalue())))
        features = backbone.forward(np.stack(images))
        assert features.dtype == np.float32
        assert backbone.width == 64
        np.testing.assert_array_equal(features, digits.reshape(50, 64).astype(np.float32) / 255)

    def test_colours_become_luma_as_pillow_has_it(self) -> None:
        images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
        found = build_backbone(FeatureSettings(backbone="pixels")).forward(images) * 255
        grey = np.stack([np.asarray(Image.fromarray(i).convert("L")) for i in images])
        np.testing.assert_array_equal(np.rint(found), grey.reshape(20, 64))

    def test_size_is_a_setting_and_colours_are_not(self) -> None:
        settings = FeatureSettings(backbone="pixels", preprocess=PreprocessSettings(size=5))
        assert build_backbone(settings).width == 25
        for wrong in ({"mean": [0.5] * 3}, {"std": [0.5] * 3}):
            with pytest.raises(InvalidInput, match="takes no preprocess"):
                build_backbone(replace(settings, preprocess=PreprocessSettings(**wrong)))
        with pytest.raises(InvalidInput, match="no taps"):
            build_backbone(replace(settings, tap="pool"))


class TestTaps:
    @pytest.mark.parametrize(
        ("name", "tap", "size", "by_hand"),
        [
            ("vgg11", "relu7", 32, lambda m, x: m.classifier[:5](m.avgpool(m.features(x)).flatten(1))),
            ("alexnet", "relu6", 64, lambda m, x: m.classifier[:3](m.avgpool(m.features(x)).flatten(1))),
            ("alexnet", "relu7", 64, lambda m, x: m.classifier[:6](m.avgpool(m.features(x)).flatten(1))),
            ("mobilenet_v2", "pool", 32, lambda m, x: m.features(x).mean((2, 3))),
            ("resnet18", "pool", 32, lambda m, x: nn.Sequential(*list(m.children())[:-1])(x).flatten(1)),
            ("resnet18", "layer3", 32, lambda m, x: nn.Sequential(*list(m.children())[:7])(x).mean((2, 3))),
            ("efficientnet_b0", "pool", 32, lambda m, x: m.avgpool(m.features(x)).flatten(1)),
            ("convnext_tiny", "pool", 32, lambda m, x: m.avgpool(m.features(x)).flatten(1)),
            ("densenet121", "pool", 32, lambda m, x: torch.relu(m.features(x)).mean((2, 3))),
        ],
    )
    def test_a_tap_is_the_layer_it_names(self, name: str, tap: str, size: int, by_hand) -> None:
        settings = FeatureSettings(
            backbone=name, tap=tap, weights="random", preprocess=PreprocessSettings(size=size), precision="float32"
        )
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(0)
            model = torchvision.models.get_model(name, weights=None).eval()
            images = check_images(3, size)
            expected = by_hand(model, reference(name, images, settings)).numpy()
        found = build_backbone(settings).forward(images).astype(np.float32)
        # float16 storage rounds to 2 ** -11
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())

    def test_the_class_token_of_a_transformer(self) -> None:
        settings = FeatureSettings(backbone="vit_b_32", weights="random", precision="float32")
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(0)
            model = torchvision.models.vit_b_32(weights=None).eval()
            model.heads = nn.Identity()
            images = check_images(2, 224)
            expected = model(reference("vit_b_32", images, settings)).numpy()
        backbone = build_backbone(settings)
        assert backbone.spec["tap"] == "cls"
        np.testing.assert_allclose(backbone.forward(images), expected, rtol=2e-3, atol=2e-3)

    def test_vgg19_and_resnet50_have_the_widths_of_the_papers(self) -> None:
        with torch.device("meta"):
            vgg = torchvision.models.vgg19(weights=None)
        assert vgg.classifier[3].out_features == 4096
        assert networks.known_taps("vgg19")["relu7"].node == "classifier.4"
        assert build_backbone(replace(SMALL, backbone="resnet50")).width == 2048

    def test_an_unknown_tap_lists_the_known_ones(self) -> None:
        with pytest.raises(InvalidInput, match="relu7, relu6, pool") as raised:
            build_backbone(replace(SMALL, backbone="alexnet", tap="fc7", preprocess=PreprocessSettings(size=64)))
        assert "'fc7'" in str(raised.value)
        assert "classifier" in str(raised.value)

    def test_an_unknown_backbone_names_near_ones(self) -> None:
        with pytest.raises(InvalidInput, match="resnet50"):
            build_backbone(FeatureSettings(backbone="resnet500"))


class TestWeights:
    def test_half_precision_nested_and_data_parallel_files_load(self, tmp_path: Path, weights: Path) -> None:
        state = read_weights(str(weights))
        settings = replace(SMALL, weights=str(weights))
        expected = weights_digest(open_network(settings))
        halved = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "nested.pth")
        torch.save(halved, tmp_path / "half.pt")
        safetensors.save_file({k: v.clone() for k, v in state.items()}, tmp_path / "same.safetensors")
        for name in ("nested.pth", "same.safetensors"):
            assert weights_digest(open_network(replace(settings, weights=str(tmp_path / name)))) == expected
        half = open_network(replace(settings, weights=str(tmp_path / "half.pt")))
        assert {p.dtype for p in half.parameters()} == {torch.float32}
        assert weights_digest(half) != expected

    def test_weights_of_another_network_are_refused_by_name(self, tmp_path: Path, weights: Path) -> None:
        state = read_weights(str(weights))
        removed = state.pop("features.0.0.weight")
        state["something.else"] = removed
        state["classifier.1.bias"] = torch.zeros(7)
        torch.save(state, tmp_path / "wrong.pth")
        with pytest.raises(InvalidInput) as raised:
            build_backbone(replace(SMALL, weights=str(tmp_path / "wrong.pth")))
        message = str(raised.value)
        assert "1 missing (features.0.0.weight)" in message
        assert "1 unexpected (something.else)" in message
        assert "classifier.1.bias [7] instead of [1000]" in message

    def test_code_in_a_file_does_not_run(self, tmp_path: Path) -> None:
        torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
        with pytest.raises(InvalidInput, match="weights_only"):
            build_backbone(replace(SMALL, weights=str(tmp_path / "module.pth")))

    @pytest.mark.parametrize(
        ("name", "content"), [("a.pth", b"nonsense"), ("a.safetensors", b"nonsense"), ("a.bin", b"")]
    )
    def test_files_that_are_no_weights(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidInput, match="must be"):
            build_backbone(replace(SMALL, weights=str(tmp_path / name)))

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound):
            build_backbone(replace(SMALL, weights=str(tmp_path / "none.pth")))

    def test_random_weights_are_loud_and_the_same_everywhere(self, capsys: pytest.CaptureFixture[str]) -> None:
        torch.manual_seed(1)
        first = open_network(SMALL)
        build_backbone(SMALL)
        assert "RANDOM weights" in capsys.readouterr().err
        torch.manual_seed(2)
        assert weights_digest(open_network(SMALL)) == weights_digest(first)

    def test_a_failed_download_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*args: object, **kwargs: object) -> None:
            raise URLError("no route to host")

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
        with pytest.raises(Unavailable, match=r"--features\.weights FILE") as raised:
            build_backbone(replace(SMALL, weights="hub"))
        assert "mobilenet_v2" in str(raised.value)
        assert "checkpoints" in str(raised.value)

    def test_hub_weights_are_loaded(self, monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
        monkeypatch.setattr(
            "torchvision.models._api.load_state_dict_from_url", lambda *a, **k: read_weights(str(weights))
        )
        hub = open_network(replace(SMALL, weights="hub"))
        assert weights_digest(hub) == weights_digest(open_network(replace(SMALL, weights=str(weights))))

    def test_the_identity_follows_the_content_not_the_place(self, tmp_path: Path, weights: Path) -> None:
        copied = tmp_path / "elsewhere.pth"
        copied.write_bytes(weights.read_bytes())
        same = weights_identity(replace(SMALL, weights=str(weights)))
        assert weights_identity(replace(SMALL, weights=str(copied))) == same
        copied.write_bytes(weights.read_bytes() + b"\0")
        assert weights_identity(replace(SMALL, weights=str(copied))) != same
        assert weights_identity(FeatureSettings(backbone="pixels")) == ""


class TestPreprocess:
    @pytest.mark.parametrize(("height", "width"), [(57, 91), (91, 57), (64, 64), (300, 33)])
    def test_resize_and_crop_are_torchvisions(self, height: int, width: int) -> None:
        image = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
        own = resolve_preprocess(replace(SMALL, preprocess=PreprocessSettings(size=28, resize=32)))
        expected = torchvision.transforms.Compose(
            [torchvision.transforms.Resize(32), torchvision.transforms.CenterCrop(28)]
        )(Image.fromarray(image))
        np.testing.assert_array_equal(own(image), np.asarray(expected))

    def test_the_weights_own_values_are_the_default(self) -> None:
        own = resolve_preprocess(FeatureSettings(backbone="resnet50"))
        assert (own.size, own.resize, own.mean[0], own.std[0]) == (224, 232, 0.485, 0.229)
        direct = resolve_preprocess(FeatureSettings(backbone="resnet50", preprocess=PreprocessSettings(size=96)))
        assert (direct.size, direct.resize, direct.mean[0]) == (96, 0, 0.485)

    def test_rotation(self) -> None:
        image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
        upright = resolve_preprocess(SMALL)(image)
        turned = resolve_preprocess(replace(SMALL, preprocess=PreprocessSettings(size=32, rotate180=True)))(image)
        np.testing.assert_array_equal(turned, upright[::-1, ::-1])
        assert turned.flags.c_contiguous

    @pytest.mark.parametrize(
        "wrong",
        [{"mean": [0.5]}, {"std": [0.5, 0.5, 0.0]}, {"size": -1}, {"size": 32, "resize": 16}],
    )
    def test_bad_values(self, wrong: dict[str, object]) -> None:
        with pytest.raises(InvalidInput, match="preprocess"):
            build_backbone(replace(SMALL, preprocess=PreprocessSettings(**wrong)))  # type: ignore[arg-type]

    def test_a_size_that_the_network_does_not_take(self) -> None:
        with pytest.raises(InvalidInput, match=r"preprocess\.size"):
            build_backbone(replace(SMALL, backbone="vit_b_32", preprocess=PreprocessSettings(size=100)))


class TestInference:
    def test_a_feature_does_not_depend_on_its_neighbours(self, weights: Path) -> None:
        backbone = build_backbone(replace(SMALL, weights=str(weights)))
        images = check_images(53, 32)
        whole = backbone.forward(images)
        for size in (1, 7, 16, 17):
            parts = [backbone.forward(images[i : i + size]) for i in range(0, 53, size)]
            np.testing.assert_array_equal(np.concatenate(parts).view(np.uint16), whole.view(np.uint16))
        order = np.random.default_rng(0).permutation(53)
        np.testing.assert_array_equal(backbone.forward(images[order]).view(np.uint16), whole[order].view(np.uint16))

    def test_nor_with_two_threads(self, weights: Path) -> None:
        backbone = build_backbone(replace(SMALL, weights=str(weights)), threads=2)
        images = check_images(18, 32)
        whole = backbone.forward(images)
        for part in (slice(0, 1), slice(3, 18)):
            np.testing.assert_array_equal(backbone.forward(images[part]).view(np.uint16), whole[part].view(np.uint16))

    def test_no_images(self, weights: Path) -> None:
        backbone = build_backbone(replace(SMALL, weights=str(weights)))
        assert backbone.forward(np.empty((0, 32, 32, 3), np.uint8)).shape == (0, 1280)

    def test_the_callers_thread_count_is_left_alone(self, weights: Path) -> None:
        before = torch.get_num_threads()
        build_backbone(replace(SMALL, weights=str(weights)), threads=before + 1).forward(check_images(2, 32))
        assert torch.get_num_threads() == before

    @pytest.mark.parametrize(
        "name", ["mobilenet_v2", "resnet18", "densenet121", "efficientnet_b0", "shufflenet_v2_x0_5"]
    )
    def test_folding_changes_nothing(self, name: str) -> None:
        made = open_network(replace(SMALL, backbone=name))
        made.body.load_state_dict(random_state(made.body))
        images = torch.from_numpy(check_images(4, 32))
        with torch.inference_mode():
            expected = made(images)
            folded, note = fold_batch_norm(copy.deepcopy(made.body))
            found = made.pool(folded(made.inputs(images)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert not note.startswith("0 of")

    def test_a_network_that_cannot_be_traced_is_left_as_it_is(self) -> None:
        body = Untraceable()
        same, note = fold_batch_norm(body)
        assert same is body
        assert "cannot be traced" in note

    def test_a_norm_after_a_shared_convolution_is_not_folded(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.norm(self.conv(x)) + self.conv(x)

        body = Shared().eval()
        body.norm.running_mean.fill_(2.0)
        x = torch.rand(2, 3, 4, 4)
        expected = body(x)
        folded, note = fold_batch_norm(body)
        torch.testing.assert_close(folded(x), expected)
        assert note.startswith("0 of 1")

    def test_the_batch_keeps_activations_in_reach_of_the_allocator(self) -> None:
        made = open_network(replace(SMALL, preprocess=PreprocessSettings(size=96)))
        assert largest_activation(made) == 96 * 48 * 48 * 4
        assert cut_batch(made, 64) == 32
        assert cut_batch(made, 16) == 16
        assert cut_batch(open_network(replace(SMALL, preprocess=PreprocessSettings(size=224))), 64) == 8

    def test_bad_counts(self) -> None:
        with pytest.raises(InvalidInput, match="at least 1"):
            build_backbone(replace(SMALL, batch=0))


class TestPrecision:
    def test_float16_agrees_with_float32(self, weights: Path) -> None:
        settings = replace(SMALL, weights=str(weights))
        exact = build_backbone(replace(settings, precision="float32"))
        half = build_backbone(replace(settings, precision="float16"))
        assert half.spec["precision"] == "float16"
        a, b = exact.forward(check_images(20, 32)), half.forward(check_images(20, 32))
        assert not np.array_equal(a, b)
        assert a.dtype == b.dtype == np.float16
        a, b = a.astype(np.float64), b.astype(np.float64)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.mean() >= 0.999

    def test_auto_takes_float16_where_the_cpu_has_it(self, monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
        settings = replace(SMALL, weights=str(weights))
        monkeypatch.setattr(backbones, "has_float16", lambda: False)
        assert build_backbone(settings).precision == "float32"
        monkeypatch.setattr(backbones, "has_float16", lambda: True)
        made = build_backbone(settings)
        assert made.precision == "float16"
        np.testing.assert_array_equal(
            made.forward(check_images(3, 32)),
            build_backbone(replace(settings, precision="float16")).forward(check_images(3, 32)),
        )

    def test_features_that_float16_does_not_hold_are_stored_as_float32(self) -> None:
        # an untrained network without spread: its features are about 1e-9
        backbone = build_backbone(SMALL)
        assert backbone.dtype == np.float32
        assert any("stored as float32" in note for note in backbone.notes)
        assert (backbone.forward(check_images(3, 32)) > 0).any()

    def test_auto_stays_with_float32_where_float16_overflows(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Path
    ) -> None:
        state = read_weights(str(weights))
        state["features.0.1.weight"] *= 1e6  # beyond 65,504 before the first ReLU6
        state["features.17.conv.3.weight"] *= 1e8  # beyond it where nothing cuts it off
        torch.save(state, tmp_path / "large.pth")
        settings = replace(SMALL, weights=str(tmp_path / "large.pth"))
        monkeypatch.setattr(backbones, "has_float16", lambda: True)
        made = build_backbone(settings)
        assert made.precision == "float32"
        assert any("float16 does not agree" in note for note in made.notes)
        with pytest.raises(InvalidInput, match="must agree with float32"):
            build_backbone(replace(settings, precision="float16"))

    def test_flags_are_read_as_words(self, tmp_path: Path) -> None:
        for flags, expected in (("avx512f avx512_fp16 amx", True), ("avx512_fp16x avx512f", False), ("", False)):
            (tmp_path / "cpuinfo").write_text(f"model name : avx512_fp16\nflags\t\t: fpu {flags}\n")
            assert has_float16(tmp_path / "cpuinfo") is expected
        assert has_float16(tmp_path / "absent") is False

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
    def test_a_gpu_agrees_with_the_cpu(self, weights: Path) -> None:
        settings = replace(SMALL, weights=str(weights))
        images = check_images(20, 32)
        on_cpu = build_backbone(replace(settings, precision="float32")).forward(images).astype(np.float64)
        on_gpu = build_backbone(settings, device="cuda")
        assert on_gpu.precision == "float16"
        found = on_gpu.forward(images).astype(np.float64)
        cosine = (on_cpu * found).sum(1) / np.linalg.norm(on_cpu, axis=1) / np.linalg.norm(found, axis=1)
        assert cosine.min() >= 0.999


class TestBuiltAgain:
    def test_from_spec_and_state(self, weights: Path) -> None:
        settings = replace(SMALL, weights=str(weights), precision="float32")
        first = build_backbone(settings)
        spec = json.loads(json.dumps(first.spec))
        state = state_bytes(open_network(settings))
        again = build_backbone(spec_settings({**spec, "weights": "/nowhere.pth"}), state=state)
        assert again.weights_digest == first.weights_digest
        assert {**again.spec, "weights": spec["weights"]} == spec
        images = check_images(5, 32)
        np.testing.assert_array_equal(again.forward(images), first.forward(images))

    def test_pixels_from_spec(self) -> None:
        first = build_backbone(
            FeatureSettings(backbone="pixels", preprocess=PreprocessSettings(size=6, rotate180=True))
        )
        assert build_backbone(spec_settings(first.spec)).spec == first.spec

    def test_from_a_trained_network(self, weights: Path) -> None:
        settings = replace(SMALL, weights=str(weights), precision="float32")
        trained = open_network(settings)
        assert trained.width == 1280
        trained.train()
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        images = torch.from_numpy(np.stack([trained.preprocess(image) for image in check_images(4, 40)]))
        loss = trained(images).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters() if p.ndim == 4)
        optimizer.step()
        trained.eval()
        saved = safetensors.save({k: v.clone() for k, v in trained.state_dict().items()})
        loaded = build_backbone(settings, state=saved)
        with torch.inference_mode():
            expected = trained(images).numpy()
        np.testing.assert_allclose(loaded.forward(images.numpy()), expected, rtol=2e-3, atol=2e-3 * expected.max())
        assert loaded.weights_digest != build_backbone(settings).weights_digest

    def test_dropout_is_on_in_training_and_off_in_evaluation(self) -> None:
        net = open_network(replace(SMALL, backbone="alexnet", preprocess=PreprocessSettings(size=64)))
        images = torch.from_numpy(check_images(2, 64))
        with torch.inference_mode():
            assert torch.equal(net(images), net(images))
            net.train()
            assert not torch.equal(net(images), net(images))

    def test_float64_for_comparisons_of_gradients(self) -> None:
        net = open_network(SMALL)
        assert net.double()(torch.from_numpy(check_images(1, 32))).dtype == torch.float64


class Untraceable(nn.Module):
    """Its flow depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = x * 1.0
        return self.last(self.conv(x).mean((2, 3)))


FACTORIES = """
from torch import nn

class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        if x.sum() > 0:
            x = x * 1.0
        return self.last(self.conv(x).mean((2, 3)))

def simple():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def declared():
    return simple(), 5

def wrong():
    return simple(), 6

def nothing():
    return "a network"
"""


class TestFactories:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "users_networks.py").write_text(FACTORIES)
        monkeypatch.syspath_prepend(str(tmp_path))
        yield
        sys.modules.pop("users_networks", None)

    def settings(self, name: str, tap: str = "") -> FeatureSettings:
        return replace(SMALL, backbone=f"users_networks:{name}", weights="hub", tap=tap, precision="float32")

    @pytest.mark.parametrize("name", ["simple", "declared"])
    def test_a_module_or_a_module_and_its_width(self, name: str) -> None:
        backbone = build_backbone(self.settings(name))
        assert backbone.width == 5
        assert backbone.notes[0].startswith("1 of 1")
        assert backbone.forward(check_images(3, 32)).shape == (3, 5)

    def test_a_tap_inside_what_cannot_be_traced(self, capsys: pytest.CaptureFixture[str]) -> None:
        backbone = build_backbone(self.settings("Untraceable", tap="conv"))
        assert backbone.width == 6
        assert "read by a hook" in capsys.readouterr().err
        assert build_backbone(self.settings("Untraceable")).width == 4

    @pytest.mark.parametrize(
        ("name", "message"),
        [("wrong", r"\[1, 6\]"), ("nothing", "found str"), ("absent", "must be importable")],
    )
    def test_what_is_no_backbone(self, name: str, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            build_backbone(self.settings(name))

    def test_a_module_that_is_not_there(self) -> None:
        with pytest.raises(InvalidInput, match="PYTHONPATH"):
            build_backbone(FeatureSettings(backbone="no_such_module_here:factory"))


def test_real_images_lie_near_their_own_class(shared_data: Path) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(shared_data / "cifar10_jpg_test.parquet").slice(0, 300)
    settings = FeatureSettings(
        backbone="mobilenet_v2",
        weights=str(shared_data / "weights" / "mobilenet_v2_coral_rot180_fp16.pth"),
        preprocess=PreprocessSettings(size=96, mean=[0.5] * 3, std=[0.5] * 3, rotate180=True),
    )
    backbone = build_backbone(settings)
    images = np.stack([backbone.prepare(decode(data)) for data in rows["image"].to_pylist()])
    features = backbone.forward(images).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)
    labels = rows["label"].to_numpy()
    # by chance 0.1
    assert (labels[cosine.argmax(1)] == labels).mean() > 0.25
