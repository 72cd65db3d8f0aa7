"""The features stage on Ray: what is committed, bad images, resumption after a kill, and features from outside."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from hashdist.collection.decode import decode
from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.ground.ids import image_ids
from hashdist.ground.schema import from_vectors
from hashdist.ground.settings import CollectionSettings, FeatureSettings, PreprocessSettings, Settings
from hashdist.models.backbones import build_backbone
from hashdist.models.networks import spec_settings
from hashdist.stages import collection, features
from hashdist.store.commit import Artefact, read_file
from hashdist.store.vectors import read_vectors
from tests import REPOSITORY

pytestmark = pytest.mark.cluster

NETWORK = FeatureSettings(backbone="mobilenet_v2", weights="random", preprocess=PreprocessSettings(size=32), batch=16)


def picture(number: int, side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 images in two classes, of which one is cut short and one is text."""
    for number in range(40):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    cut = tmp_path / "images" / "class0" / "004.png"
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "images" / "class1" / "007.png").write_text("not an image")
    return tmp_path / "images"


def settings(root: str, folder: Path, chosen: FeatureSettings, part_rows: int = 9) -> Settings:
    return Settings(root=root, collection=CollectionSettings(uri=str(folder), part_rows=part_rows), features=chosen)


def made(run: Settings) -> tuple[dict[str, object], Artefact]:
    collection.run(run)
    upstream = collection.snapshot(run)
    return features.run(run, upstream), features.snapshot(run, upstream)


def by_hand(artefact: Artefact, folder: Path) -> tuple[list[str], np.ndarray]:
    """Keys by id, and the features that the manifest's own backbone gives them."""
    manifest = artefact.manifest()
    entry = manifest["weights_file"]
    state = read_file(artefact.store, entry) if entry else None
    backbone = build_backbone(spec_settings(manifest), threads=manifest["threads"], state=state)
    table = read_vectors(artefact, ["key", "status"])
    good = [key for key, status in zip(*table.to_pydict().values(), strict=True) if status == "ok"]
    pixels = [backbone.prepare(decode((folder / key).read_bytes())) for key in good]
    return good, backbone.forward(np.stack(pixels))


@pytest.mark.usefixtures("ray_session")
class TestExtraction:
    def test_local_and_s3(self, root_uri: str, folder: Path) -> None:
        run = settings(root_uri, folder, FeatureSettings(backbone="pixels"))
        result, artefact = made(run)
        assert (result["rows"], result["failed"], result["decoded"], result["skipped"]) == (40, 2, 40, False)
        manifest = artefact.manifest()
        assert (manifest["width"], manifest["dtype"], manifest["weights_file"]) == (64, "float32", None)
        assert manifest["reasons"] == {"truncated": 1, "not-an-image": 1}
        assert len(manifest["files"]) == 5
        table = read_vectors(artefact, ["id", "key", "digest", "labels", "status", "reason", "feature"])
        bad = {row["key"]: row for row in table.to_pylist() if row["status"] != "ok"}
        assert set(bad) == {"class0/004.png", "class1/007.png"}
        assert all(row["feature"] is None and row["reason"] for row in bad.values())
        assert sorted(table["id"].to_pylist()) == sorted(image_ids(table["key"].to_pylist()).tolist())
        assert {tuple(labels) for labels in table["labels"].to_pylist()} == {(0,), (1,)}
        good, expected = by_hand(artefact, folder)
        found = table.filter(pa.array([status == "ok" for status in table["status"].to_pylist()]))
        assert found["key"].to_pylist() == good
        np.testing.assert_array_equal(from_vectors(found["feature"], found.schema), expected)
        again, _ = made(run)
        assert again["skipped"]
        assert again["decoded"] == 0
        assert again["rows"] == 40

    def test_a_network_is_self_contained_and_independent_of_parts(self, tmp_path: Path, folder: Path) -> None:
        tables = []
        for part_rows, workers in ((9, 1), (40, 2), (3, 2)):
            run = settings(str(tmp_path / "root"), folder, replace(NETWORK, workers=workers), part_rows)
            _, artefact = made(run)
            tables.append(read_vectors(artefact, ["key", "status", "feature"]))
        assert tables[0].equals(tables[1])
        assert tables[0].equals(tables[2])
        manifest = artefact.manifest()
        # untrained, this network's features are too small for float16
        assert {n: manifest[n] for n in ("width", "dtype", "batch", "threads")} == {
            "width": 1280,
            "dtype": "float32",
            "batch": 16,
            "threads": 1,
        }
        _, expected = by_hand(artefact, folder)
        found = tables[0].filter(pa.array([status == "ok" for status in tables[0]["status"].to_pylist()]))
        np.testing.assert_array_equal(from_vectors(found["feature"], found.schema), expected)

    def test_what_can_change_a_feature_changes_the_name(self, tmp_path: Path, folder: Path) -> None:
        run = settings(str(tmp_path / "root"), folder, NETWORK)
        collection.run(run)
        upstream = collection.snapshot(run)

        def name(**changes: object) -> str:
            return features.snapshot(replace(run, features=replace(NETWORK, **changes)), upstream).name

        first = name()
        assert name(workers=3, threads=2) == first
        others = [name(tap="features.5"), name(batch=8), name(precision="float32"), name(backbone="mobilenet_v3_small")]
        others.append(name(preprocess=PreprocessSettings(size=32, rotate180=True)))
        assert len({first, *others}) == 6

    def test_nothing_but_bad_images(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        for name in "abc":
            (tmp_path / "images" / f"{name}.jpg").write_text("no")
        result, artefact = made(
            settings(str(tmp_path / "root"), tmp_path / "images", FeatureSettings(backbone="pixels"))
        )
        assert (result["rows"], result["failed"]) == (3, 3)
        assert read_vectors(artefact, ["feature"])["feature"].null_count == 3

    def test_random_weights_are_said_loudly(
        self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made(settings(str(tmp_path / "root"), folder, NETWORK))
        assert "RANDOM weights" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("chosen", "error"),
        [
            (FeatureSettings(backbone="resnet9000"), InvalidInput),
            (replace(NETWORK, weights="/no/such/file.pth"), NotFound),
            (replace(NETWORK, tap="nowhere"), InvalidInput),
            (replace(NETWORK, batch=0), InvalidInput),
        ],
    )
    def test_bad_settings_commit_nothing(
        self, tmp_path: Path, folder: Path, chosen: FeatureSettings, error: type[Exception]
    ) -> None:
        run = settings(str(tmp_path / "root"), folder, chosen)
        collection.run(run)
        with pytest.raises(error):
            features.run(run, collection.snapshot(run))
        assert not list((tmp_path / "root" / "features").glob("*/manifest.json"))

    def test_a_snapshot_is_used_as_it_is(self, tmp_path: Path, folder: Path) -> None:
        run = settings(str(tmp_path / "root"), folder, FeatureSettings(backbone="pixels"))
        _, artefact = made(run)
        named = replace(run, features=FeatureSettings(snapshot=artefact.uri))
        assert features.run(named)["snapshot"] == artefact.uri
        assert features.run(named)["skipped"]


DRIVER = """
import sys
from tests_settings import run
from hashdist.ground.settings import ClusterSettings
from hashdist.stages import collection, features
from hashdist.stages.cluster import session

with session.session(ClusterSettings(address=sys.argv[1])):
    features.run(run, collection.snapshot(run))
"""


def test_a_killed_run_decodes_only_what_is_missing(tmp_path: Path, ray_session: None) -> None:
    images, parts_of = 160, 8
    (tmp_path / "images").mkdir()
    for number in range(images):
        picture(number, 12).save(tmp_path / "images" / f"{number:04d}.png")
    # slow enough to be killed in the middle
    chosen = FeatureSettings(backbone="resnet50", weights="random", preprocess=PreprocessSettings(size=96), batch=16)
    run = settings(str(tmp_path / "root"), tmp_path / "images", chosen, parts_of)
    collection.run(run)
    upstream = collection.snapshot(run)
    target = features.snapshot(run, upstream)
    names = "Settings, CollectionSettings, FeatureSettings, PreprocessSettings, GraphSettings, TrainSettings"
    (tmp_path / "tests_settings.py").write_text(f"from hashdist.ground.settings import *\n# {names}\nrun = {run!r}\n")
    (tmp_path / "driver.py").write_text(DRIVER)
    # the tests' Ray listens on the loopback only, and Ray turns a loopback address into the machine's own unless told
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    command = [sys.executable, str(tmp_path / "driver.py"), ray.get_runtime_context().gcs_address]
    driver = subprocess.Popen(command, env=environment)
    try:
        until(lambda: len(target.parts()) >= images // parts_of // 4 or driver.poll() is not None)
        assert driver.poll() is None, "the run ended before it could be killed"
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    # its workers end by themselves; a part they were in the middle of may still be committed
    settled = until_settled(lambda: len(target.parts()))
    missing = images - sum(record["rows"] for record in target.parts().values())
    assert not target.exists()
    assert 0 < missing < images
    before = target.parts()
    result = features.run(run, upstream)
    assert result["rows"] == images
    assert missing <= result["decoded"] <= 1.2 * missing
    assert settled == len(before)
    after = target.parts()
    assert {part: after[part] for part in before} == before
    table = read_vectors(target, ["id", "status", "feature"])
    assert len(set(table["id"].to_pylist())) == images
    assert set(table["status"].to_pylist()) == {"ok"}
    _, expected = by_hand(target, tmp_path / "images")
    assert target.manifest()["dtype"] == "float16"
    np.testing.assert_array_equal(from_vectors(table["feature"], table.schema), expected)


def until(condition, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def until_settled(value, seconds: float = 3) -> int:
    """The value once it has not changed for that long."""
    last, since = value(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.1)
        if value() != last:
            last, since = value(), time.monotonic()
    return last


@pytest.mark.usefixtures("ray_session")
class TestGiven:
    def test_they_become_features_like_any_other(self, root_uri: str, tmp_path: Path) -> None:
        vectors = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
        vectors[11] = 0
        keys = [f"{i}.jpg" for i in range(50)]
        source = tmp_path / "given"
        source.mkdir()
        for number in range(2):
            rows = slice(25 * number, 25 * number + 25)
            table = {"key": keys[rows], "embedding": list(vectors[rows]), "label": np.arange(50)[rows]}
            pq.write_table(pa.table(table), source / f"{number}.parquet")
        run = Settings(root=root_uri, features=FeatureSettings(source=str(source)))
        result = features.run(run)
        assert (result["rows"], result["failed"], result["skipped"], result["width"]) == (50, 1, False, 7)
        artefact = features.snapshot(run)
        table = read_vectors(artefact, ["id", "key", "labels", "status", "feature"])
        assert table["id"].to_pylist() == sorted(image_ids(keys).tolist())
        rows = [keys.index(key) for key in table["key"].to_pylist()]
        assert table["labels"].to_pylist() == [[row] for row in rows]
        np.testing.assert_array_equal(from_vectors(table["feature"], table.schema), vectors[rows])
        assert artefact.manifest()["reasons"] == {"zero": 1}
        assert artefact.manifest()["backbone"] == "none"
        assert features.run(run)["skipped"]

    def test_duplicates_commit_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "given").mkdir()
        table = pa.table({"key": ["a", "b", "a"], "feature": [[1.0], [2.0], [3.0]]})
        pq.write_table(table, tmp_path / "given" / "x.parquet")
        run = Settings(root=str(tmp_path / "root"), features=FeatureSettings(source=str(tmp_path / "given")))
        with pytest.raises(InvalidInput, match="'a'"):
            features.run(run)
        assert not list((tmp_path / "root").glob("features/*/parts/*"))
