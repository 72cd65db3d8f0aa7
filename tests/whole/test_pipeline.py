"""Every stage on S3, from images to answers; what is done is skipped; growth; and what bad input is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hashdist import cli, open_index
from hashdist.stages.pipeline import STAGES, run_all

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 digits as FOLDER/<class>/<number>.png, and one file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    digits = load_digits()
    for number in range(400):
        path = folder / str(digits.target[number]) / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.rint(digits.images[number] * (255 / 16)).astype(np.uint8)).save(path)
    (folder / "0" / "broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def root(s3_endpoint: str) -> str:
    return "s3://hashdist/pipeline"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the one JSON object of a command."""
    code = cli.main([*words, "--json"])
    lines = capsys.readouterr().out.strip().splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return code, found


@pytest.fixture(scope="module")
def config(images: Path, root: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "pipeline.yaml"
    path.write_text(
        f"root: {root}\n"
        f"collection: {{uri: {images}, part_rows: 128}}\n"
        "graph: {protocol: digits}\n"
        "train: {bits: 16, workers: 1, options: {rounds: 2, epochs: 1, lr: 0.001}}\n"
        "index: {name: digits, shard_rows: 128, rerank: true}\n"
        "evaluate: {protocol: digits, cut: 100, baselines: [itq]}\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def stages(config: str) -> dict[str, Any]:
    """What every stage of the first run said."""
    settings, _ = cli.parse("pipeline", ["--config", config])
    found: dict[str, Any] = run_all(settings)["stages"]
    return found


def test_images_to_answers_on_s3(
    config: str,
    stages: dict[str, Any],
    root: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(stages) == list(STAGES)
    assert stages["collection"]["rows"] == 401
    assert (stages["features"]["rows"], stages["features"]["failed"]) == (401, 1)
    assert stages["encode"]["failed"] == 1
    assert set(stages["evaluate"]["by_method"]) == {"dsah", "itq"}
    assert 0.3 < stages["evaluate"]["metrics"]["map_all_ties"] <= 1

    code, again = run(capsys, "pipeline", "--config", config)
    assert code == 0
    skipped = {name for name, stage in again["stages"].items() if stage["skipped"]}
    assert skipped == set(STAGES) - {"evaluate"}
    assert again["stages"]["evaluate"]["metrics"] == stages["evaluate"]["metrics"]

    index = open_index(f"{root}/indexes/digits")
    assert (index.rows, index.bits) == (400, 16)
    query = images / "3" / "0003.png"
    code, by_image = run(capsys, "search", "--config", config, "--image", str(query), "--k=500")
    assert code == 0
    hits = [(hit["distance"], int(hit["id"])) for hit in by_image["hits"]]
    assert hits == sorted(hits)
    assert len(hits) == 400
    assert {"3/0003.png"} <= {hit["key"] for hit in by_image["hits"] if hit["distance"] == 0}
    sheet = tmp_path / "sheet.html"
    code, by_key = run(capsys, "search", "--config", config, "--key", "3/0003.png", "--k", "5", "--html", str(sheet))
    assert by_key["hits"] == by_image["hits"][:5]
    assert sheet.read_text().count("data:image/png;base64") == 6  # the query's own picture too
    assert by_key["hits"][0]["uri"] == f"{images.as_uri()}/3/0003.png"
    for given in (["--image", str(query)], ["--key", "3/0003.png"]):
        code, ranked = run(capsys, "search", "--config", config, *given, "--k", "5", "--rerank")
        assert code == 0
        assert ranked["hits"][0]["key"] == "3/0003.png"
        scores = [hit["score"] for hit in ranked["hits"]]
        assert scores == sorted(scores, reverse=True)
    assert {"recall@10", "recall@10_reranked"} <= set(stages["evaluate"]["metrics"])

    page = tmp_path / "report.html"
    other = tmp_path / "longer.json"
    other.write_text(json.dumps({"bits": 32, "by_method": stages["evaluate"]["by_method"]}))
    words = ["--out", str(page), "--queries", "2", "--evaluations", json.dumps([str(other)])]
    code, made = run(capsys, "report", "--config", config, *words)
    assert code == 0, made
    assert page.read_text().count("<figure") == 2 * 11
    assert "http" not in page.read_text()
    drawn = {"precision_recall", "precision_at", "map_over_bits", "training", "rounds", "codes", "tsne"}
    assert {path.name for path in Path(made["figures"]).iterdir()} == {
        f"{n}.{k}" for n in drawn for k in ("png", "svg")
    }
    assert Path(made["figures"]) == tmp_path / "report-figures"
    assert page.read_text().count('<img class="plot"') == len(drawn)

    (images / "1" / "0001.png").unlink()
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(images / "2" / "0002.png")
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(images / "2" / "new.png")
    code, grown = run(capsys, "reindex", "--config", config)
    assert code == 0
    assert [grown[name] for name in ("added", "changed", "removed", "unreadable", "encoded")] == [1, 1, 1, 1, 2]
    code, idle = run(capsys, "reindex", "--config", config)
    assert (idle["added"], idle["version"]) == (0, grown["version"])
    newest = open_index(index.uri)
    assert newest.rows == 400
    assert set(newest.keys()) == (set(index.keys()) - {"1/0001.png"}) | {"2/new.png"}
    code, log = run(capsys, "index", "log", "--config", config)
    assert [version["version"] for version in log["versions"]] == list(range(1, newest.version + 1))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["features", "--collection.uri", "{tmp}/nowhere"], "nowhere"),
        (["features", "--collection.uri", "{tmp}"], "image"),
        (["train", "--train.method", "dsahh"], "dsah,"),
        (["train", "--train.bits", "12"], "multiple of 8"),
        (["train", "--train.options.lamda", "1"], "lambda_"),
        (["train", "--train.options.batch", "2", "--train.workers", "4"], "4"),
        (["graph", "--graph.neighbours", "5000"], "5000"),
        (["graph", "--graph.protocol", "cifar-dsah"], "100"),
        (["evaluate", "--evaluate.protocol", "cifar"], "digits"),
        (["encode", "--train.seed", "7"], "hashdist train"),
        (["search", "--key", "nobody.png"], "nobody.png"),
        (["search", "--code", "ff"], "16 bits"),
        (["search", "--key", "a", "--code", "ff00"], "one of"),
        (["search", "--image", "{tmp}/nobody.png"], "nobody.png"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    config: str,
    stages: dict[str, Any],
    tmp_path: Path,
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # the collection as it was first: the test above changes it
    pinned = [] if words[0] == "features" else [f"--collection.snapshot={stages['collection']['snapshot']}"]
    given = [word.replace("{tmp}", str(tmp_path)) for word in words]
    code, result = run(capsys, given[0], "--config", config, *pinned, *given[1:])
    assert code == 2, result
    assert said in result["error"]["message"]


def test_a_graph_of_other_features_is_refused(
    config: str, stages: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = [f"--collection.snapshot={stages['collection']['snapshot']}", "--features.preprocess.size", "4"]
    code, _ = run(capsys, "features", "--config", config, *other)
    assert code == 0
    words = ["--graph.snapshot", stages["graph"]["snapshot"], *other]
    code, result = run(capsys, "train", "--config", config, *words)
    assert code == 2
    assert "graph" in result["error"]["message"]


def test_a_comparison_computes_each_cell_once_in_process_and_on_ray_train(
    config: str, stages: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = f"--collection.snapshot={stages['collection']['snapshot']}"
    out = tmp_path / "results"
    words = ["compare", "--config", config, pinned, "--bits", "[16]", "--evaluate.cut", "100", "--out", str(out)]
    code, first = run(capsys, *words, "--methods", "[itq,sdh]", "--seeds", "2", "--published", "[dsah-table1-cifar10]")
    assert code == 0, first
    assert (first["cells"], first["done"]) == (4, 4)
    scores = {row["name"]: row["metrics"]["map_all_ties"] for row in first["rows"]}
    assert scores["sdh"] > scores["itq"]
    table = (out / "table.md").read_text()
    assert "| itq |" in table
    assert "±" in table
    assert {"cells.json", "map_over_bits.png", "precision_recall_16.svg"} <= {path.name for path in out.iterdir()}

    twice = '{"plain": {"method": "itq"}}'
    code, again = run(capsys, *words, "--methods", "[itq]", "--variants", twice, "--seeds", "1")
    assert [row["name"] for row in again["rows"]] == ["itq", "plain"]  # one record under two names
    assert [row["metrics"] for row in again["rows"]] == [first["rows"][0]["metrics"]] * 2

    options = '{"still": {"method": "dsah", "options": {"gamma": "inf", "epochs": 1, "rounds": 2}}}'
    code, spread = run(capsys, *words, "--variants", options, "--seeds", "1", "--train.workers", "2")
    assert code == 0, spread
    code, alone = run(capsys, *words, "--variants", options, "--seeds", "1", "--train.workers", "1", "--fresh", "")
    assert len(json.loads((out / "cells.json").read_text())) == 1
    assert spread["rows"][0]["metrics"] == alone["rows"][0]["metrics"]  # the same cell, found committed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "[itk]"], "itk"),
        (["--methods", "[itq]", "--evaluate.protocol", "cifar"], "digits"),
        (["--methods", "[itq]", "--bits", "[12]"], "multiple of 8"),
        (["--methods", "[itq]", "--published", "[dsah-table9]"], "dsah-table1-cifar10"),
        (["--methods", "[]"], "methods or variants"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_its_first_cell(
    config: str, stages: dict[str, Any], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = f"--collection.snapshot={stages['collection']['snapshot']}"
    code, result = run(capsys, "compare", "--config", config, pinned, *words)
    assert code == 2, result
    assert said in result["error"]["message"]
