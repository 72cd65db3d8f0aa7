"""Protocol files from the command line to the stages: made, checked, applied, and refused with exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hashdist import cli
from hashdist.evaluation.protocols import read_protocol, split
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_ids
from hashdist.ground.schema import to_vectors, vector_schema
from hashdist.ground.settings import EvaluateSettings, GraphSettings, Settings
from hashdist.stages import evaluate, graph
from hashdist.store import open_store
from hashdist.store.commit import Artefact, write_table

Run = Callable[..., tuple[int, dict[str, Any], str]]

KEYS = [f"{'test' if number % 6 == 0 else 'train'}/{number:03d}.png" for number in range(240)]
LABELS = np.arange(240) % 4


def committed(root: Path, kind: str, keys: list[str], failed: int = 0) -> Artefact:
    """Vectors of the keys, committed; the last `failed` have none."""
    name, dtype, width = ("feature", "float32", 3) if kind == "features" else ("code", "uint8", 2)
    made = Artefact(open_store(str(root)), kind, f"{len(keys)}-{failed}")
    present = np.arange(len(keys)) < len(keys) - failed
    columns = [
        image_ids(keys),
        keys,
        pa.nulls(len(keys), pa.string()),
        pa.array([[int(label)] for label in LABELS[: len(keys)]], pa.list_(pa.int32())),
        np.where(present, "ok", "unusable"),
        pa.nulls(len(keys), pa.string()),
        to_vectors(np.ones((len(keys), width), dtype), present),
    ]
    table = pa.table(columns, schema=vector_schema(name, dtype, width))
    file = write_table(made.store, made.new_name(".parquet"), table)
    made.publish({"rows": len(keys), "failed": failed, "files": [file], "bits": 16})
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, JSON result and what was said."""

    def call(*words: object) -> tuple[int, dict[str, Any], str]:
        code = cli.main([*map(str, words), "--json"])
        streams = capsys.readouterr()
        return code, json.loads(streams.out), streams.err

    return call


@pytest.fixture
def lists(tmp_path: Path) -> dict[str, Path]:
    sets = {"query": ["a 1 0", "b 0 1"], "train": ["c 1 1"], "database": ["c 1 1", "d 0 0"], "more": ["e 0 1"]}
    for name, lines in sets.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    return {name: tmp_path / f"{name}.txt" for name in sets}


def test_a_protocol_of_lists(tmp_path: Path, lists: dict[str, Path], run: Run) -> None:
    words = ["protocol", "make", "--lists.query", lists["query"], "--lists.database"]
    code, made, _ = run(*words, f"{lists['database']},{lists['more']}", "--out", tmp_path / "p.parquet")
    assert code == 0
    assert made["counts"] == {"query": 2, "train": 3, "database": 3, "validation": 0}
    code, checked, _ = run("protocol", "check", tmp_path / "p.parquet")
    assert (code, checked["digest"]) == (0, made["digest"])
    assert read_protocol(made["file"]).keys == ["a", "b", "c", "d", "e"]
    code, made, _ = run(*words, lists["database"], "--lists.train", lists["train"], "--out", tmp_path / "q.parquet")
    assert made["counts"] == {"query": 2, "train": 1, "database": 2, "validation": 0}


def test_a_protocol_of_a_data_set_equals_that_of_its_features(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "list.txt"
    flags = np.eye(4, dtype=int)
    source.write_text("\n".join(f"{key} {' '.join(map(str, flags[LABELS[row]]))}" for row, key in enumerate(KEYS)))
    draw = ["protocol", "make", "--protocol", "digits", "--protocol_seed", "5"]
    code, from_lists, _ = run(*draw, "--layout", "flags", "--source", source, "--out", tmp_path / "a.parquet")
    assert code == 0
    features = committed(tmp_path, "features", KEYS)
    code, from_features, _ = run(*draw, "--features.snapshot", features.uri, "--out", tmp_path / "b.parquet")
    assert code == 0
    expected = split("digits", image_ids(KEYS), LABELS, 5)
    assert from_lists["digests"] == from_features["digests"] == expected.digests()
    assert from_lists["digest"] == expected.digest()
    code, checked, _ = run("protocol", "check", tmp_path / "a.parquet", "--features.snapshot", features.uri)
    assert (code, checked["features"]) == (0, features.uri)


def test_stages_take_the_sets_of_a_file(tmp_path: Path, run: Run) -> None:
    features, codes = committed(tmp_path, "features", KEYS), committed(tmp_path, "codes", KEYS)
    for name in ("digits", "uniform:30:100", "cifar-ddh-paper"):
        out = tmp_path / f"{name}.parquet"
        run("protocol", "make", "--protocol", name, "--features.snapshot", features.uri, "--out", out)
        sample = [graph._sample(GraphSettings(protocol=protocol), features) for protocol in (name, f"file:{out}")]
        np.testing.assert_array_equal(*sample)
        by_name, by_file = (
            evaluate._plan(Settings(evaluate=EvaluateSettings(protocol=protocol)), codes)
            for protocol in (name, f"file:{out}")
        )
        assert by_name.split == by_file.split == read_protocol(str(out)).split.digest()
        np.testing.assert_array_equal(by_name.queries, by_file.queries)
        np.testing.assert_array_equal(by_name.database, by_file.database)


def test_a_graph_is_named_by_the_sets_of_its_file(tmp_path: Path, run: Run) -> None:
    features = committed(tmp_path, "features", KEYS)

    def named(name: str, out: Path) -> str:
        run("protocol", "make", "--protocol", name, "--features.snapshot", features.uri, "--out", out)
        settings = Settings(root=str(tmp_path), graph=GraphSettings(protocol=f"file:{out}"))
        return graph.snapshot(settings, features).name

    assert named("uniform:9:9", tmp_path / "a.parquet") == named("uniform:9:9", tmp_path / "elsewhere" / "b.parquet")
    before = named("uniform:9:9", tmp_path / "c.parquet")
    (tmp_path / "c.parquet").unlink()
    assert named("uniform:9:10", tmp_path / "c.parquet") != before


def test_a_protocol_of_images_that_failed_is_refused(tmp_path: Path, run: Run) -> None:
    whole, partial = committed(tmp_path, "features", KEYS), committed(tmp_path, "features", KEYS, failed=2)
    run("protocol", "make", "--protocol", "digits", "--features.snapshot", whole.uri, "--out", tmp_path / "p.parquet")
    with pytest.raises(InvalidInput, match=r"images with a feature, 2 are not \(the first: 'train/238\.png'\)"):
        graph._sample(GraphSettings(protocol=f"file:{tmp_path / 'p.parquet'}"), partial)
    code, result, _ = run("protocol", "check", tmp_path / "p.parquet", "--features.snapshot", partial.uri)
    assert (code, result["error"]["kind"]) == (2, "InvalidInput")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("make --protocol digits", "give --out FILE"),
        ("make --out p", "give --protocol NAME or --lists.query FILE"),
        ("make --protocol digits --out p", "committed features (--root ROOT"),
        ("make --protocol digits --out p --layout cifar --source .", "one of cifar10, folder"),
        ("make --protocol digits --out p --layout cifar10 --source .", "data_batch_1"),
        ("make --protocol digits --out p --layout cifar10 --source none", "found nothing at 'none'"),
        ("make --protocol digit --out p --layout flags --source query.txt", "a known protocol is required"),
        ("make --protocol digits --out p --layout flags --source more.txt", "class 1 has only 1 images"),
        ("make --lists.query query.txt --out p", "found no train and no database"),
        ("make --lists.query query.txt --lists.database query.txt --out p", "found 2 that are (the first key: a)"),
        ("make --lists.query query.txt --lists.database no.txt --out p", "found nothing at 'no.txt'"),
        ("make --lists.query query.txt --source . --out p", "found both"),
        ("make --lists.query query.txt --lists.database database.txt --out more.txt", "choose another name"),
        ("check", "use `hashdist protocol check FILE`"),
        ("check none.parquet", "none.parquet"),
        ("check query.txt", "must be a protocol file"),
        ("chek query.txt", "did you mean `protocol check`"),
    ],
)
def test_wrong_input_exits_with_2(
    lists: dict[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.chdir(lists["query"].parent)
    code, result, spoken = run("protocol", *words.split())
    assert code == 2
    assert said in result["error"]["message"]
    assert said in spoken
    assert not Path("p").exists()


def test_a_changed_file_exits_with_2_before_anything_is_trained(tmp_path: Path, run: Run) -> None:
    features = committed(tmp_path, "features", KEYS)
    path = tmp_path / "p.parquet"
    run("protocol", "make", "--protocol", "digits", "--features.snapshot", features.uri, "--out", path)
    table = pq.read_table(path)
    train = np.array(table["train"])
    train[np.flatnonzero(train)[0]] = False
    pq.write_table(table.set_column(2, table.schema.field(2), [train]), path)
    code, result, _ = run("protocol", "check", path)
    assert (code, result["error"]["kind"]) == (2, "InvalidInput")
    assert "the train set must have the digest" in result["error"]["message"]
    with pytest.raises(InvalidInput, match="the train set must have the digest"):
        graph.snapshot(Settings(root=str(tmp_path), graph=GraphSettings(protocol=f"file:{path}")), features)


def test_a_data_set_is_converted(lists: dict[str, Path], run: Run) -> None:
    folder = lists["query"].parent
    (folder / "a").write_bytes(b"picture")
    words = ["dataset", "convert", "--layout", "flags", "--source", lists["query"], "--images", folder]
    code, result, _ = run(*words, "--out", folder / "c.parquet")
    assert (code, result["rows"], result["missing"]) == (0, 2, 1)
    assert pq.read_table(folder / "c.parquet")["labels"].to_pylist() == [[0], [1]]
    for out, said in [(["--out", folder / "c.parquet"], "choose another name"), ([], "give --out FILE")]:
        code, result, _ = run(*words, *out)
        assert code == 2
        assert said in result["error"]["message"]
