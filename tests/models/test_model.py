"""A committed model: one code per image whatever is beside it, and clear errors for what is no model."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import torch as safetensors

from hashdist.ground.bits import unpack
from hashdist.ground.errors import Corrupt, InvalidInput, NotFound
from hashdist.ground.settings import FeatureSettings
from hashdist.methods.contract import find_method, method_settings
from hashdist.models.backbones import build_backbone
from hashdist.models.model import HEAD_BATCH, Model, check_features, describe, load_model, pixels
from hashdist.store import open_store
from hashdist.store.commit import Artefact, create_record, write_file

BITS = 24
PIXELS = FeatureSettings(backbone="pixels")


def _committed(root: Path, width: int = 64, **changes: Any) -> Artefact:
    settings = method_settings(find_method("dsah"), "paper")
    head = find_method("dsah").network(settings, width, BITS, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in head.parameters():  # far from zero, where every image would have one code
            parameter.mul_(100)
    made = Artefact(open_store(root.as_uri()), "models", "0" * 32)
    fields: dict[str, Any] = {
        "method": "dsah",
        "options": {"gamma": "inf"},
        "bits": BITS,
        "mode": "frozen",
        "width": width,
        "classes": 0,
        "backbone": build_backbone(PIXELS).spec,
        "head": write_file(made.store, made.new_name(".safetensors"), safetensors.save(head.state_dict())),
        "backbone_weights": None,
    }
    made.publish({"stage": "train", **describe(**{**fields, **changes})})
    return made


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(_committed(tmp_path).uri)


@pytest.fixture(name="features_ND")
def random_features() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(3 * HEAD_BATCH + 5, 64)).astype(np.float32)


def test_codes_are_the_signs_of_the_head(model: Model, features_ND: NDArray[np.float32], tmp_path: Path) -> None:
    weights = {k: v.double() for k, v in safetensors.load_file(next(tmp_path.rglob("*.safetensors"))).items()}
    hidden = torch.from_numpy(features_ND).double() @ weights["hidden.weight"].T + weights["hidden.bias"]
    z_NL = (hidden @ weights["hash.weight"].T + weights["hash.bias"]).numpy()
    codes_NW = model.encode_features(features_ND)
    assert codes_NW.shape == (len(features_ND), BITS // 8)
    clear = np.abs(z_NL) > 1e-4
    assert clear.mean() > 0.99
    assert np.array_equal(unpack(codes_NW)[clear], (z_NL >= 0)[clear])


def test_a_code_does_not_depend_on_its_neighbours(model: Model, features_ND: NDArray[np.float32]) -> None:
    together = model.encode_features(features_ND)
    for row in (0, 1, HEAD_BATCH - 1, HEAD_BATCH, len(features_ND) - 1):
        assert np.array_equal(model.encode_features(features_ND[row : row + 1])[0], together[row])
    order = np.random.default_rng(1).permutation(len(features_ND))
    assert np.array_equal(model.encode_features(features_ND[order]), together[order])
    assert np.array_equal(model.encode_features(features_ND[::2]), together[::2])
    assert model.encode_features(features_ND[:0]).shape == (0, BITS // 8)


def test_images_may_be_given_in_any_way(model: Model, tmp_path: Path) -> None:
    array = np.random.default_rng(2).integers(0, 256, (20, 12, 3), np.uint8)
    path = tmp_path / "image.png"
    image = Image.fromarray(array)
    image.save(path)
    codes_NW = model.encode([path, str(path), path.read_bytes(), image, array])
    assert codes_NW.dtype == np.uint8
    assert (codes_NW == codes_NW[0]).all()
    grey = array[:, :, 0]
    assert np.array_equal(*model.encode([grey, Image.fromarray(grey)]))
    assert model.encode(image for image in ()).shape == (0, BITS // 8)


@pytest.mark.parametrize("mode", ["CMYK", "LA", "P", "1", "RGBA", "I;16"])
def test_pil_images_of_any_mode_become_rgb(mode: str) -> None:
    image = Image.new(mode, (5, 4))
    assert pixels(image).shape == (4, 5, 3)


def test_unreadable_images_are_named(model: Model, tmp_path: Path) -> None:
    good = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(InvalidInput, match=r"found number 1: .*not-an-image.*and 1 more"):
        model.encode([good, b"no image", b""])
    found = model.encode_readable([good, b"", good])
    assert [bool(reason) for reason in found.reasons] == [False, True, False]
    assert not found.codes[1].any()
    with pytest.raises(NotFound, match="nowhere"):
        model.encode([tmp_path / "nowhere.png"])
    with pytest.raises(InvalidInput, match=r"float64 \[4, 4, 3\]"):
        model.encode([np.zeros((4, 4, 3))])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match=r"shape \[N, 64\], found \[2, 63\]"):
        model.encode_features(np.zeros((2, 63), np.float32))


def test_it_travels_as_its_place(model: Model, features_ND: NDArray[np.float32]) -> None:
    codes_NW = model.encode_features(features_ND)
    sent = pickle.dumps(model)
    assert len(sent) < 2000
    there = pickle.loads(sent)
    assert there.digest == model.digest
    assert np.array_equal(there.encode_features(features_ND), codes_NW)


def test_what_is_no_model_is_refused(tmp_path: Path, features_ND: NDArray[np.float32]) -> None:
    with pytest.raises(NotFound):
        load_model((tmp_path / "nothing").as_uri())
    store = open_store(tmp_path.as_uri())
    Artefact(store, "codes", "c").publish({"bits": 8})
    with pytest.raises(InvalidInput, match="kind 'models' is required, found 'codes'"):
        load_model((tmp_path / "codes" / "c").as_uri())
    create_record(store, "models/newer/manifest.json", {"format_version": 99, "kind": "models"})
    with pytest.raises(InvalidInput, match="format_version 99"):
        load_model((tmp_path / "models" / "newer").as_uri())
    made = _committed(tmp_path)
    weights = tmp_path / "models" / ("0" * 32) / made.manifest()["head"]["path"]
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(Corrupt, match="SHA-256"):
        load_model(made.uri).encode_features(features_ND)


def test_weights_of_another_shape_are_corrupt(tmp_path: Path) -> None:
    made = _committed(tmp_path)
    other = Artefact(open_store(tmp_path.as_uri()), "models", "1" * 32)
    head = write_file(other.store, other.new_name(".safetensors"), safetensors.save({"a": torch.zeros(3)}))
    manifest = {k: v for k, v in made.manifest().items() if k not in ("write_id", "kind", "name")}
    other.publish({**manifest, "head": head})
    with pytest.raises(Corrupt, match="weights of dsah"):
        load_model(other.uri).encode_features(np.zeros((1, 64), np.float32))


def test_features_from_outside_have_no_images(tmp_path: Path) -> None:
    model = load_model(_committed(tmp_path, backbone={"backbone": "none"}).uri)
    assert model.encode_features(np.zeros((2, 64), np.float16)).shape == (2, BITS // 8)
    with pytest.raises(InvalidInput, match="trained on features from outside"):
        model.encode([np.zeros((4, 4, 3), np.uint8)])


def test_the_digest_follows_what_a_code_depends_on(tmp_path: Path) -> None:
    spec = build_backbone(PIXELS).spec
    digests = [
        _committed(tmp_path / str(number), **changes).manifest()["model_digest"]
        for number, changes in enumerate(
            [
                {},
                {"backbone": {**spec, "threads": 7, "batch": 9}},  # not decisive
                {"backbone": {**spec, "weights_digest": "other"}},
                {"backbone": {**spec, "precision": "float16"}},
                {"mode": "images"},
            ]
        )
    ]
    assert digests[0] == digests[1] == digests[4]
    assert len({digests[0], digests[2], digests[3]}) == 3


def test_check_features_names_what_differs() -> None:
    model = {"input_width": 64, "backbone": {"backbone": "pixels", "tap": "pixels", "batch": 64}}
    features = {"width": 64, "backbone": "pixels", "tap": "pixels", "batch": 8}
    check_features(model, features, "m", "f")
    with pytest.raises(InvalidInput, match="tap: 'pixels' wanted, 'relu7' found"):
        check_features(model, {**features, "tap": "relu7"}, "m", "f")
    with pytest.raises(InvalidInput, match="width 64, found width 65"):
        check_features(model, {**features, "width": 65}, "m", "f")
