"""Codes of committed features and of images: the same as the model's own, in parts, with every failure kept."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import torch as safetensors

from hashdist.ground.errors import InvalidInput
from hashdist.ground.schema import OK, from_vectors
from hashdist.ground.settings import CollectionSettings, FeatureSettings, PreprocessSettings, Settings
from hashdist.methods.contract import find_method, method_settings
from hashdist.models.backbones import build_backbone
from hashdist.models.model import describe, load_model
from hashdist.models.networks import open_network, state_bytes
from hashdist.stages import collection, encode
from hashdist.store import open_store
from hashdist.store.commit import Artefact, digest, write_file
from hashdist.store.vectors import read_vectors

pytestmark = pytest.mark.cluster

BITS = 16
SQUEEZENET = FeatureSettings(
    backbone="squeezenet1_1", weights="random", preprocess=PreprocessSettings(size=32), precision="float32", batch=8
)


def _model(root: str, width: int, backbone: dict[str, Any], mode: str = "frozen", weights: bytes = b"") -> Artefact:
    """A committed DSAH model that nobody has trained."""
    settings = method_settings(find_method("dsah"), "paper")
    head = find_method("dsah").network(settings, width, BITS, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in head.parameters():  # far from zero, where every image would have one code
            parameter.mul_(100)
    made = Artefact(open_store(root), "models", digest({"mode": mode, "backbone": backbone}))
    described = describe(
        method="dsah",
        options={},
        bits=BITS,
        mode=mode,
        width=width,
        classes=0,
        backbone=backbone,
        head=write_file(made.store, made.new_name(".safetensors"), safetensors.save(head.state_dict())),
        backbone_weights=write_file(made.store, made.new_name(".safetensors"), weights) if weights else None,
    )
    made.publish({"stage": "train", **described})
    return made


def _image_model(root: str) -> Artefact:
    network = open_network(SQUEEZENET)
    spec = build_backbone(SQUEEZENET).spec
    return _model(root, network.width, spec, "images", state_bytes(network))


def _images(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")


def _codes(result: dict[str, Any]) -> Any:
    made = Artefact.at(open_store(result["snapshot"]), "codes", "")
    return read_vectors(made, ["id", "key", "labels", "status", "reason", "code"]), made.manifest()


def test_codes_of_features_are_the_models_own(
    ray_session: None, made: Callable[..., Any], root_uri: str, tmp_path: Path
) -> None:
    there = made(root_uri, n=200, failed=7)
    model = _model(root_uri, there.features.manifest()["width"], _backbone_of(there.features))
    result = encode.run(Settings(root=root_uri), model, there.features)
    assert (result["rows"], result["failed"], result["skipped"]) == (200, 7, False)

    table, manifest = _codes(result)
    codes_NW = from_vectors(table["code"], table.schema)
    assert np.array_equal(codes_NW[7:], load_model(model.uri).encode_features(there.features_ND[7:]))
    assert len(np.unique(codes_NW[7:], axis=0)) > 20
    assert table["status"].to_pylist() == ["unreadable"] * 7 + [OK] * 193
    assert table["reason"].to_pylist()[:8] == ["truncated: made so"] * 7 + [None]
    assert table["code"].null_count == 7
    assert manifest["model_digest"] == model.manifest()["model_digest"]
    assert encode.run(Settings(root=root_uri), model, there.features)["skipped"]


def _backbone_of(features: Artefact) -> dict[str, Any]:
    names = ("backbone", "tap", "weights_digest", "preprocess", "precision", "dtype", "width")
    return {name: features.manifest()[name] for name in names}


def test_only_missing_parts_are_encoded(ray_session: None, made: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path.as_uri()
    there = made(root, n=200, parts=4)
    model = _model(root, there.features.manifest()["width"], _backbone_of(there.features))
    settings = Settings(root=root)
    first = encode.run(settings, model, there.features)
    folder = Path(first["snapshot"].removeprefix("file://"))
    (folder / "manifest.json").unlink()
    (folder / "parts" / "00000002.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert not encode.run(settings, model, there.features)["skipped"]
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert len(before) == 4
    assert len(after) == 5
    assert before.items() <= after.items()


def test_codes_of_images_are_the_models_own(ray_session: None, tmp_path: Path) -> None:
    root = (tmp_path / "root").as_uri()
    _images(tmp_path / "images", 30)
    uri = (tmp_path / "images").as_uri()
    settings = Settings(root=root, collection=CollectionSettings(uri=uri, labels=False, part_rows=12))
    listed = Artefact.at(open_store(collection.run(settings)["snapshot"]), "collections", "listed")
    model = _image_model(root)
    result = encode.run(settings, model, listed)
    assert (result["rows"], result["failed"]) == (31, 1)

    table, manifest = _codes(result)
    assert len(manifest["files"]) == 3
    bad = table["key"].to_pylist().index("broken.png")
    assert table["status"].to_pylist()[bad] == "unreadable"
    assert table["reason"].to_pylist()[bad]
    codes_NW = from_vectors(table["code"], table.schema)
    good = [row for row in range(31) if row != bad]
    paths = [tmp_path / "images" / table["key"].to_pylist()[row] for row in good]
    opened = load_model(model.uri)
    assert np.array_equal(codes_NW[good], opened.encode(paths))
    assert np.array_equal(codes_NW[good[:1]], opened.encode([paths[0].read_bytes()]))
    assert len(np.unique(codes_NW[good], axis=0)) > 3


def test_features_of_another_backbone_are_refused(ray_session: None, made: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path.as_uri()
    there, other = made(root), made(root, weights_digest="ab" * 16)
    model = _model(root, there.features.manifest()["width"], _backbone_of(there.features))
    with pytest.raises(InvalidInput, match="weights_digest: '' wanted, 'abab"):
        encode.run(Settings(root=root), model, other.features)
    narrow = _model(root, 8, {**_backbone_of(there.features), "width": 8})
    with pytest.raises(InvalidInput, match="width 8, found width 16"):
        encode.run(Settings(root=root), narrow, there.features)
    assert not os.path.exists(tmp_path / "codes")


def test_a_source_that_does_not_fit_the_mode_is_refused(
    ray_session: None, made: Callable[..., Any], tmp_path: Path
) -> None:
    there = made(tmp_path.as_uri())
    with pytest.raises(InvalidInput, match="mode 'images' and encodes an artefact of kind 'collections'"):
        encode.run(Settings(root=tmp_path.as_uri()), _image_model(tmp_path.as_uri()), there.features)
