"""Training over Ray: a run ends with the same weights whatever was killed on the way, and says early what is wrong."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from hashdist.ground.errors import Conflict, InvalidInput
from hashdist.ground.schema import from_vectors
from hashdist.ground.settings import CollectionSettings, FeatureSettings, PreprocessSettings, Settings, TrainSettings
from hashdist.models.model import load_model
from hashdist.stages import collection, encode, features, train
from hashdist.stages.cluster import workers as ray_workers
from hashdist.store import open_store
from hashdist.store.commit import Artefact, Log, Version, open_artefact, read_table, write_table
from hashdist.store.vectors import read_vectors
from tests import REPOSITORY

pytestmark = pytest.mark.cluster

EPOCHS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "dsah": {"epochs": EPOCHS, "rounds": 3, "lr": 1e-3},
    "ddh": {"epochs": 3 * EPOCHS, "batch": 50},
    "sadh": {"epochs": 3 * EPOCHS, "semantic": 32, "labnet_hidden": 64},
    "csdh": {"epochs": 3 * EPOCHS},
}
OTHERS = [name for name in OPTIONS if name != "dsah"]

DRIVER = """
import sys
from hashdist.ground.settings import ClusterSettings, Settings, TrainSettings
from hashdist.stages import train
from hashdist.stages.cluster import session
from hashdist.store.commit import open_artefact

root, address, workers, graph, features = sys.argv[1:]
settings = Settings(root=root, train=TrainSettings(**{train_settings}, workers=int(workers)))
with session.session(ClusterSettings(address=address)):
    train.run(settings, open_artefact(graph, "graphs"), open_artefact(features, "features"))
"""


def _settings(root: str, workers: int = 2, method: str = "dsah", **changes: Any) -> Settings:
    return Settings(root=root, train=TrainSettings(**{**_train_settings(method), **changes}, workers=workers))


def _train_settings(method: str = "dsah") -> dict[str, Any]:
    return {"method": method, "bits": 16, "options": OPTIONS.get(method, {}), "checkpoint_steps": 4}


def _head(result: dict[str, Any]) -> str:
    """SHA-256 of the trained weights."""
    return str(open_artefact(result["snapshot"], "models").manifest()["head"]["sha256"])


def _log(settings: Settings, made: Any) -> Log:
    name = train.snapshot(settings, made.graph, made.features).name
    return Log(open_store(settings.root).child(f"runs/{name}"))


def _wait_for(log: Log, number: int, timeout_s: float = 120) -> Version:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        newest = log.latest()
        if newest is not None and newest.number >= number:
            return newest
        time.sleep(0.02)
    raise TimeoutError(f"no version {number} in {timeout_s} s")


@pytest.fixture(scope="module")
def undisturbed(ray_session: None) -> dict[tuple[int, str], str]:
    """Weights of runs that nothing disturbed, by workers and method, as far as there are any."""
    return {}


@pytest.fixture(scope="module")
def uninterrupted(
    undisturbed: dict[tuple[int, str], str], made: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """uninterrupted(workers, method): weights of a run that nothing disturbed."""

    def of(workers: int, method: str = "dsah") -> str:
        if (workers, method) not in undisturbed:
            root = tmp_path_factory.mktemp("uninterrupted").as_uri()
            there = made(root)
            result = train.run(_settings(root, workers, method), there.graph, there.features)
            undisturbed[workers, method] = _head(result)
        return undisturbed[workers, method]

    return of


def _worker_killed(root: str, made: Callable[..., Any], workers: int, method: str = "dsah") -> tuple[str, list[str]]:
    """Weights, and attempts seen in the log, of a run whose rank 0 was killed in the middle."""
    there, settings = made(root), _settings(root, workers, method)
    log = _log(settings, there)
    killed: list[int] = []

    def kill() -> None:
        pid = _wait_for(log, 5).manifest["worker"]["pid"]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    result = train.run(settings, there.graph, there.features)
    killer.join()
    assert killed
    versions = [log.read(number).manifest for number in log.numbers()]
    assert [version["number"] for version in versions] == list(range(1, len(versions) + 1))
    return _head(result), list(dict.fromkeys(str(version["worker"]["pid"]) for version in versions))


def _driver_killed(root: str, made: Callable[..., Any], workers: int, method: str = "dsah") -> tuple[str, list[str]]:
    """Weights, and attempts seen in the log, of a run whose driver was killed and which was then submitted again."""
    there, settings = made(root), _settings(root, workers, method)
    log = _log(settings, there)
    script = DRIVER.replace("{train_settings}", repr(_train_settings(method)))
    address = ray.get_runtime_context().gcs_address
    arguments = [root, address, str(workers), there.graph.uri, there.features.uri]
    # the tests' Ray listens on the loopback only, and Ray turns a loopback address into the machine's own unless told
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    driver = subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment)
    try:
        newest = _wait_for(log, 5)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not newest.manifest["finished"]
    result = train.run(settings, there.graph, there.features)
    versions = [log.read(number).manifest for number in log.numbers()]
    return _head(result), list(dict.fromkeys(version["attempt"] for version in versions))


def test_the_run_tells_where_it_stands_and_is_not_done_again(
    undisturbed: dict[tuple[int, str], str],
    made: Callable[..., Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    there, settings = made(tmp_path.as_uri()), _settings(tmp_path.as_uri())
    result = train.run(settings, there.graph, there.features)
    undisturbed[2, "dsah"] = _head(result)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train: epoch")]
    assert lines
    assert "loss" in lines[-1]
    assert f"epoch {3 * EPOCHS}/{3 * EPOCHS}" in lines[-1]

    log = _log(settings, there)
    versions = [log.read(number).manifest for number in log.numbers()]
    epochs = [len(version["history"]) for version in versions]
    assert epochs == sorted(epochs)
    assert {len(version["history"]) for version in versions} == {*range(3 * EPOCHS + 1)}
    assert [version["finished"] for version in versions] == [False] * (len(versions) - 1) + [True]
    states = {entry.name for entry in log.store.list("states/")}
    assert states == {version["state"]["path"] for version in versions[-3:]}

    manifest = open_artefact(result["snapshot"], "models").manifest()
    assert [entry["epoch"] for entry in manifest["history"]] == list(range(3 * EPOCHS))
    assert [entry["round"] for entry in manifest["rounds"]] == [0, 1, 2]
    assert manifest["inputs"]["graphs"]["digest"] == there.graph.name
    assert train.run(settings, there.graph, there.features)["skipped"]

    # a run that is finished but for the model's manifest is not trained again
    (Path(result["snapshot"].removeprefix("file://")) / "manifest.json").unlink()
    started = time.monotonic()
    again = train.run(settings, there.graph, there.features)
    assert time.monotonic() - started < 5
    assert again["model_digest"] == result["model_digest"]
    assert log.numbers() == list(range(1, len(versions) + 1))


def test_a_killed_worker_changes_no_bit(uninterrupted: Any, made: Callable[..., Any], tmp_path: Path) -> None:
    head, workers = _worker_killed(tmp_path.as_uri(), made, 2)
    assert len(workers) == 2
    assert head == uninterrupted(2)


def test_a_killed_driver_changes_no_bit(uninterrupted: Any, made: Callable[..., Any], tmp_path: Path) -> None:
    head, attempts = _driver_killed(tmp_path.as_uri(), made, 2)
    assert len(attempts) == 2
    assert head == uninterrupted(2)


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 4])
def test_kills_change_no_bit_at_other_world_sizes(
    uninterrupted: Any, made: Callable[..., Any], tmp_path: Path, workers: int
) -> None:
    assert _worker_killed((tmp_path / "worker").as_uri(), made, workers)[0] == uninterrupted(workers)
    assert _driver_killed((tmp_path / "driver").as_uri(), made, workers)[0] == uninterrupted(workers)


@pytest.mark.full
@pytest.mark.parametrize("method", OTHERS)
def test_kills_change_no_bit_of_the_other_methods(
    uninterrupted: Any, made: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    assert _worker_killed((tmp_path / "worker").as_uri(), made, 2, method)[0] == uninterrupted(2, method)
    assert _driver_killed((tmp_path / "driver").as_uri(), made, 2, method)[0] == uninterrupted(2, method)


@pytest.mark.parametrize("method", ["sadh", *(pytest.param(name, marks=pytest.mark.full) for name in ("ddh", "csdh"))])
def test_the_other_methods_train_on_two_workers_and_encode(
    ray_session: None, made: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    options = {**OPTIONS[method], "epochs": EPOCHS}
    there, settings = made(tmp_path.as_uri()), _settings(tmp_path.as_uri(), method=method, options=options)
    result = train.run(settings, there.graph, there.features)
    manifest = open_artefact(result["snapshot"], "models").manifest()
    assert manifest["classes"] == 5
    assert manifest["history"][-1]["loss"] < manifest["history"][0]["loss"]
    codes = load_model(result["snapshot"]).encode_features(there.features_ND)
    assert len(np.unique(codes, axis=0)) > 1


def test_an_attempt_that_loses_a_commit_stops(ray_session: None, made: Callable[..., Any], tmp_path: Path) -> None:
    there, settings = made(tmp_path.as_uri()), _settings(tmp_path.as_uri())
    log = _log(settings, there)

    def intrude() -> None:
        while True:
            newest = _wait_for(log, 3)
            try:
                log.commit({**newest.manifest, "attempt": "intruder"}, newest.number)
            except Conflict:
                continue
            return

    intruder = threading.Thread(target=intrude)
    intruder.start()
    with pytest.raises(Conflict, match=r"intruder.*trained twice"):
        train.run(settings, there.graph, there.features)
    intruder.join()
    assert log.read(log.numbers()[-1]).manifest["attempt"] == "intruder"


def test_on_s3(s3_endpoint: str, uninterrupted: Any, made: Callable[..., Any], tmp_path: Path) -> None:
    root = f"s3://hashdist/{tmp_path.name}-{os.urandom(4).hex()}"
    there = made(root)
    result = train.run(_settings(root), there.graph, there.features)
    assert _head(result) == uninterrupted(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 12}, "multiple of 8"),
        ({"method": "dhs"}, "choose one of"),
        ({"options": {"epoch": 3}}, "its options are"),
        ({"options": {"batch": 1}}, "batch 1 and 2 workers"),
        ({"options": {"batch": 400}}, "found 300 training images"),
        ({"mode": "images"}, "needs the collection"),
        ({"workers": 40}, "40 training workers need 40 CPU"),
    ],
)
def test_wrong_settings_end_before_workers_start(
    ray_session: None, made: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    there = made(tmp_path.as_uri())
    settings = _settings(tmp_path.as_uri(), changes.pop("workers", 2), **changes)
    with pytest.raises(InvalidInput, match=message):
        train.run(settings, there.graph, there.features)
    assert not list(tmp_path.glob("models/*/manifest.json"))


@pytest.mark.parametrize(("labels", "message"), [("none", "have none"), ("some empty", "3 of 300 .* empty label set")])
def test_images_without_labels_cannot_train_a_supervised_method(
    ray_session: None, made: Callable[..., Any], tmp_path: Path, labels: str, message: str
) -> None:
    there = made(tmp_path.as_uri())
    manifest = there.graph.manifest()
    table = read_table(there.graph.store, manifest["files"]["labels"])
    lists = [[] if row < 3 else label for row, label in enumerate(table["labels"].to_pylist())]
    table = table.set_column(2, "labels", pa.array(lists, pa.list_(pa.int32())))
    other = Artefact(open_store(tmp_path.as_uri()), "graphs", "1" * 32)
    entry = None if labels == "none" else write_table(other.store, other.new_name(".parquet"), table)
    fields = {name: manifest[name] for name in ("stage", "inputs", "settings", "rule", "n", "rows", "failed")}
    other.publish({**fields, "files": {"labels": entry}})
    with pytest.raises(InvalidInput, match=message):
        train.run(_settings(tmp_path.as_uri(), method="csdh"), other, there.features)


def test_ranks_talk_over_the_interface_of_their_node() -> None:
    assert ray_workers._interface("127.0.0.1") == ("lo" if sys.platform == "linux" else None)
    assert ray_workers._interface("203.0.113.9") is None


def test_ranks_that_do_not_leave_are_not_waited_for(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a rank has gone and the other sits in a collective with it."""
    asleep = [ray.remote(lambda: time.sleep(60)).options(num_cpus=0).remote() for _ in range(2)]

    class Stuck(list[Any]):
        def execute_async(self, leave: Callable[[], None]) -> list[Any]:
            return list(self)

    monkeypatch.setattr(ray_workers, "_LEAVE_S", 0.2)
    group = ray_workers.GlooConfig()
    group.backend_cls().on_shutdown(Stuck(asleep), group)
    assert ray.wait(asleep, num_returns=2, timeout=0)[0] == []
    for reference in asleep:
        ray.cancel(reference)


def test_a_graph_of_other_features_is_refused(ray_session: None, made: Callable[..., Any], tmp_path: Path) -> None:
    there, other = made(tmp_path.as_uri()), made(tmp_path.as_uri(), seed=1)
    with pytest.raises(InvalidInput, match="must be made from the features"):
        train.run(_settings(tmp_path.as_uri()), there.graph, other.features)


def test_a_checkpoint_of_another_model_is_refused(ray_session: None, made: Callable[..., Any], tmp_path: Path) -> None:
    there, settings = made(tmp_path.as_uri()), _settings(tmp_path.as_uri())
    other = replace(settings, train=replace(settings.train, bits=8))
    foreign = _log(other, there).commit({"stage": "train", "model": "another", "finished": False}, 0)
    wrong = Log(open_store(settings.root).child(f"runs/{train.snapshot(settings, there.graph, there.features).name}"))
    wrong.commit({**foreign.manifest}, 0)
    with pytest.raises(InvalidInput, match="another"):
        train.run(settings, there.graph, there.features)


@pytest.mark.parametrize("method", ["dsah", *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def test_end_to_end_from_images(
    ray_session: None, made_graph: Callable[[Artefact], Artefact], tmp_path: Path, method: str
) -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC)
        path = tmp_path / "images" / str(number % 3) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    small = {"semantic": 32, "labnet_hidden": 64} if method == "sadh" else {}
    options = {"epochs": 2, "rounds": 2, "batch": 7, **small}
    chosen = PreprocessSettings(size=32)
    backbone = FeatureSettings("squeezenet1_1", weights="random", preprocess=chosen, precision="float32", batch=8)
    settings = replace(
        _settings((tmp_path / "root").as_uri(), method=method, mode="images", options=options),
        collection=CollectionSettings(uri=(tmp_path / "images").as_uri(), part_rows=16),
        features=backbone,
    )
    listed = open_artefact(collection.run(settings)["snapshot"], "collections")
    vectors = open_artefact(features.run(settings, listed)["snapshot"], "features")
    graph = made_graph(vectors)
    result = train.run(settings, graph, vectors, listed)
    model = load_model(result["snapshot"])
    assert model.mode == "images"
    assert model.backbone["weights_digest"] not in ("", vectors.manifest()["weights_digest"])

    encoded = open_artefact(encode.run(settings, open_artefact(model.uri, "models"), listed)["snapshot"], "codes")
    table = read_vectors(encoded, ["key", "code"])
    codes_NW = model.encode([tmp_path / "images" / key for key in table["key"].to_pylist()])
    assert np.array_equal(codes_NW, from_vectors(table["code"], table.schema))
