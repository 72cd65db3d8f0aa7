"""A command looks for every artefact once: one LIST of the collection, one reading of the file of weights."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hashdist.commands import report
from hashdist.ground.ids import image_ids
from hashdist.ground.options import ReportOptions
from hashdist.ground.schema import OK, to_vectors, vector_schema
from hashdist.ground.settings import CollectionSettings, FeatureSettings, Settings, TrainSettings
from hashdist.index import create_index
from hashdist.models import networks
from hashdist.stages import pipeline as pipelines
from hashdist.stages.pipeline import STAGES, Pipeline
from hashdist.store.commit import Artefact, write_table
from hashdist.store.local import LocalStore
from tests.worlds.reindex import png, write

MODES = ("frozen", "images")
KEYS = [f"{number}.png" for number in range(6)]
CODES = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8)
MODEL = {
    "model_digest": "m",
    "mode": "frozen",
    "method": "dsah",
    "preset": "paper",
    "bits": 64,
    "options": {},
    "history": [],
    "rounds": [],
}
SCORES = {"bits": 64, "queries": 1, "by_method": {"dsah": {"map_all_ties": 0.5}}}


def settings_of(folder: Path, mode: Any) -> Settings:
    (folder / "weights.pth").write_bytes(b"weights")
    write(folder / "images", {key: png(number) for number, key in enumerate(KEYS)})
    return Settings(
        root=(folder / "root").as_uri(),
        collection=CollectionSettings(uri=str(folder / "images")),
        features=FeatureSettings(backbone="vgg19", weights=str(folder / "weights.pth")),
        train=TrainSettings(mode=mode),
    )


def commit_all(settings: Settings) -> None:
    """Manifests of all artefacts, as if every stage had run."""
    found = Pipeline(settings)
    for stage in ("collection", "features", "graph", "train", "encode"):
        artefact = found.artefact(stage)
        more: dict[str, Any] = {"train": MODEL, "encode": {"files": [codes_of(artefact)]}}.get(stage, {})
        artefact.publish({"rows": 6, "failed": 0, **more})


def codes_of(artefact: Artefact) -> dict[str, Any]:
    """The entry of a file with a code for every image."""
    nothing = [None] * len(KEYS)
    columns = [image_ids(KEYS), KEYS, nothing, nothing, [OK] * len(KEYS), nothing]
    codes = to_vectors(CODES, np.ones(len(KEYS), np.bool_))
    table = pa.table([*columns, codes], schema=vector_schema("code", "uint8", CODES.shape[1])).sort_by("id")
    return write_table(artefact.store, artefact.new_name(".parquet"), table)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counter[str]:
    """How often the folder of images was listed, and the file of weights read, in whatever way."""
    counts: Counter[str] = Counter()
    entries, read = LocalStore.list, networks._read

    def listed(store: LocalStore, *arguments: Any, **more: Any) -> Any:
        counts["list"] += store.uri == (tmp_path / "images").as_uri()
        return entries(store, *arguments, **more)

    def read_whole(uri: str) -> bytes:
        counts["weights"] += 1
        return read(uri)

    monkeypatch.setattr(LocalStore, "list", listed)
    monkeypatch.setattr(networks, "_read", read_whole)
    monkeypatch.setattr(pipelines.session, "observed_session", lambda _: nullcontext())
    monkeypatch.setattr(report, "observed_session", lambda _: nullcontext())
    return counts


def does_nothing(committed: Any) -> Callable[..., dict[str, Any]]:
    """A stage that finds its work done."""
    return lambda settings, *inputs: {"snapshot": committed.uri, "skipped": True, **SCORES}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", ["graph", "train", "encode", "index", "evaluate"])
def test_a_stage_lists_the_collection_once_and_reads_the_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Counter[str], mode: str, stage: str
) -> None:
    settings = settings_of(tmp_path, mode)
    commit_all(settings)
    made = Pipeline(settings).artefact("encode" if stage in ("index", "evaluate") else stage)
    monkeypatch.setattr(STAGES[stage], "run", does_nothing(made))
    looks.clear()
    pipelines.run_stage(settings, stage)
    assert looks == {"list": 1, "weights": 1}


@pytest.mark.parametrize("mode", MODES)
def test_a_report_lists_the_collection_once_and_reads_the_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Counter[str], mode: str
) -> None:
    settings = settings_of(tmp_path, mode)
    commit_all(settings)
    create_index(settings.index.location(settings.root), 64).append(CODES, KEYS)
    monkeypatch.setattr(STAGES["evaluate"], "run", does_nothing(Pipeline(settings).artefact("encode")))
    monkeypatch.setattr(report, "open_collection", lambda uri: type("Empty", (), {"fetch": lambda self, keys: {}})())
    looks.clear()
    report.write(settings, ReportOptions(out=str(tmp_path / "report.html")))
    assert looks == {"list": 1, "weights": 1}


def test_images_that_arrive_while_a_command_runs_belong_to_the_next_one(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "frozen")
    commit_all(settings)
    pipeline = Pipeline(settings)
    before = pipeline.artefact("encode").uri
    write(tmp_path / "images", {"late.png": png(99)})
    assert pipeline.artefact("encode").uri == before
    assert Pipeline(settings).artefact("collection").uri != pipeline.artefact("collection").uri


def test_features_that_are_named_are_taken_as_they_are(tmp_path: Path, looks: Counter[str]) -> None:
    settings = settings_of(tmp_path, "frozen")
    commit_all(settings)
    features = Pipeline(settings).artefact("features").uri
    looks.clear()
    named = replace(settings, features=replace(settings.features, snapshot=features))
    assert Pipeline(named).inputs("graph")[0].uri == features
    assert not looks.total()
