"""What the report computes beside its figures; the page itself is made in tests/whole/test_pipeline.py."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import torch as safetensors

from hashdist.commands import report
from hashdist.ground.bits import pack
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import FeatureSettings, PreprocessSettings
from hashdist.methods.contract import deep_method, find_method, method_settings
from hashdist.models.backbones import build_backbone
from hashdist.models.model import describe
from hashdist.models.networks import open_network, state_bytes
from hashdist.store import open_store
from hashdist.store.commit import Artefact, write_file


def evaluation(bits: int, **methods: float) -> dict[str, Any]:
    by_method = {name: {"map@5000": 0.0, "map_all_ties": value} for name, value in methods.items()}
    return {"bits": bits, "by_method": by_method}


def test_map_over_bits_takes_values_of_one_length_as_seeds() -> None:
    found = report.over_bits(
        [evaluation(16, dsah=0.2, itq=0.1), evaluation(32, dsah=0.4), evaluation(16, dsah=0.4, itq=0.1)]
    )
    axes = found.axes[0]
    lines = {bar.get_label(): bar.lines[0].get_xydata() for bar in axes.containers}
    np.testing.assert_allclose(lines["dsah"], [[16, 0.3], [32, 0.4]])
    np.testing.assert_allclose(lines["itq"], [[16, 0.1]])
    assert axes.get_ylabel() == "map_all_ties"
    unlabelled = report.over_bits([{"bits": 8, "by_method": {"codes": {"recall@10": 0.5}}}])
    assert unlabelled.axes[0].get_ylabel() == "recall@10"


def test_only_results_of_evaluate_are_read(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text(json.dumps(evaluation(16, dsah=0.2)))
    assert report.read_evaluation(str(good))["bits"] == 16
    for name, text in (
        ("other.json", '{"bits": 16}'),
        ("broken.json", "{"),
        ("list.json", "[1]"),
        ("number.json", "1"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidInput, match="hashdist evaluate --json"):
            report.read_evaluation(str(tmp_path / name))
    with pytest.raises(InvalidInput, match="nowhere"):
        report.read_evaluation(str(tmp_path / "nowhere.json"))


def test_statistics_of_codes_by_counting() -> None:
    """Six images: one code three times, one twice, one once."""
    rows = np.array([[1, 1, 1, 1, 0, 0, 0, 0]] * 3 + [[1, 0, 1, 0, 1, 0, 1, 0]] * 2 + [[0, 0, 0, 0, 0, 0, 0, 0]])
    facts = dict(report.code_facts(pack(rows - 0.5)))
    assert facts["distinct codes"].startswith("3 (50.00%")
    assert facts["images that share their code"] == "5, at most 3 one code"
    assert facts["collisions: pairs of images with one code"].startswith(f"{4 / 15:.3g} of all pairs (0.00391")
    expected = -(0.5 * np.log2(1 / 2) + np.log2(1 / 3) / 3 + np.log2(1 / 6) / 6)
    assert facts["entropy of the codes"] == f"{expected:.2f} bits (at most {np.log2(6):.2f} for so many images)"
    share = rows.mean(0)
    assert facts["balance: |share of ones - 1/2|"].startswith(f"{np.abs(share - 0.5).mean():.4f} on average")
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.nan_to_num(np.corrcoef(rows.T))
    off = np.abs(correlation[~np.eye(8, dtype=bool)])
    assert facts["|correlation| of two bits"] == f"{off.mean():.4f} on average, {off.max():.4f} at most"


def test_tsne_keeps_clusters_apart_and_is_the_same_every_time() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    centres = np.where(rng.random((3, 32)) < 0.5, 1.0, -1.0)
    codes = pack(np.where(rng.random((90, 32)) < 0.05, -1, 1) * centres[labels])
    sets = [[int(label)] for label in labels]
    groups = {g.get_label(): np.asarray(g.get_offsets()) for g in report.tsne_figure(codes, sets).axes[0].collections}
    assert sum(map(len, groups.values())) == 90
    means = {name: points.mean(0) for name, points in groups.items()}
    for name, points in groups.items():
        distances = {other: np.linalg.norm(points - mean, axis=1) for other, mean in means.items()}
        assert all((distances[name] < distances[other]).mean() > 0.95 for other in means if other != name)
    again = report.tsne_figure(codes, sets).axes[0].collections
    for group in again:
        np.testing.assert_array_equal(group.get_offsets(), groups[group.get_label()])
    report.tsne_figure(codes[:2], [None, [1]])


def png(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(sink, "PNG")
    return sink.getvalue()


def image_model(root: str, backbone: FeatureSettings) -> Artefact:
    """A committed end-to-end model that nobody has trained."""
    network, method = open_network(backbone), deep_method(find_method("dsah"))
    head = method.network(method_settings(method, "paper"), network.width, 16, torch.Generator(), frozen=False)
    made = Artefact(open_store(root), "models", "0" * 32)
    described = describe(
        method="dsah",
        options={},
        bits=16,
        mode="images",
        width=network.width,
        classes=0,
        backbone=build_backbone(backbone).spec,
        head=write_file(made.store, made.new_name(".safetensors"), safetensors.save(head.state_dict())),
        backbone_weights=write_file(made.store, made.new_name(".safetensors"), state_bytes(network)),
    )
    made.publish({"stage": "train", **described})
    return made


def test_grad_cam_of_queries_and_of_what_they_find(tmp_path: Path) -> None:
    """Overlays for the query and its results; a picture that is gone or broken is left out, a query with its row."""
    backbone = FeatureSettings(
        "squeezenet1_1", weights="random", preprocess=PreprocessSettings(size=32), precision="float32", batch=8
    )
    model = image_model(tmp_path.as_uri(), backbone)
    pictures = {f"{i}.png": png(i) for i in range(4)} | {"broken.png": b"no picture"}
    results = [("1.png", 1, True), ("gone.png", 2, None), ("broken.png", 2, None), ("2.png", 3, False)]
    codes = np.random.default_rng(0).integers(0, 256, (3, 2), np.uint8)
    found = report._Retrieved(["0.png", "broken.png", "3.png"], codes, [results, results, results[:1]], pictures)
    figure = report._gradcam_figure(model, found)
    captions = [axes.get_title() for axes in figure.axes if axes.images]
    assert captions == ["query", "query", "1 bits", "3 bits", "query", "query", "1 bits"]
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert all(image.shape == (32, 32, 3) for image in images)
    assert (images[0] != images[1]).any()
    plot = report._Plots(tmp_path / "figures")
    assert "data:image/png;base64," in report._gradcam(plot, model, found)
    assert (tmp_path / "figures" / "gradcam.svg").exists()
