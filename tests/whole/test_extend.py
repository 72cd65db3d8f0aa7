"""The examples of docs/extend.md do what their text says."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

import hashdist.methods
from hashdist.collection.listing import list_collection
from hashdist.collection.readers import FORMATS
from hashdist.evaluation import measure
from hashdist.evaluation.experiment import Corpus, Experiment, Recipe
from hashdist.evaluation.measure import Cuts
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import CollectionSettings, GraphSettings
from hashdist.index import create_index, open_index
from hashdist.index.search import engines, filters
from hashdist.methods.parts import graph
from hashdist.models.model import load_model
from hashdist.reindex.run import reindex
from hashdist.store import STORES
from tests.worlds import extensions
from tests.worlds import reindex as world
from tests.worlds.training import tiny_data


@pytest.fixture
def zips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "zip", extensions.module("hashdist/collection/readers/zip.py").ZipReader)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STORES, "memory", extensions.module("hashdist/store/memory.py").MemoryStore)


def write_zip(path: Path, images: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in images.items():
            archive.writestr(name, data)


def test_an_index_follows_a_collection_of_the_new_format_in_the_new_store(
    zips: None, memory: None, tmp_path: Path
) -> None:
    root, images = "memory://extend", {f"{'ab'[i % 2]}/{i:02d}.png": world.png(i) for i in range(12)}
    write_zip(tmp_path / "1.zip", images)
    world.empty_index(root)
    settings = world.settings_of(root, tmp_path)
    assert reindex(settings)["added"] == 12
    write_zip(tmp_path / "2.zip", {"new.png": world.png(99)})
    grown = reindex(settings)
    assert [grown[name] for name in ("added", "changed", "removed")] == [1, 0, 0]
    images["new.png"] = world.png(99)
    index = open_index(f"{root}/indexes/photos")
    codes_NW = load_model(str(index.model_uri)).encode(list(images.values()))
    np.testing.assert_array_equal(index.codes_of(list(images)), codes_NW)


def test_what_is_no_file_of_the_new_format_is_told(zips: None, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip")
    listing = list_collection(CollectionSettings(uri=str(tmp_path)))
    reader = FORMATS[listing.format].open(listing.store, listing.files, **listing.options)
    with pytest.raises(InvalidInput, match=r"a\.zip must be a zip archive, found .*; repair it"):
        reader.scan(reader.units(4)[0])


def test_a_format_that_is_not_registered_is_refused_by_name(tmp_path: Path) -> None:
    wanted = CollectionSettings(uri=str(tmp_path), format="zip")
    with pytest.raises(InvalidInput, match="auto or one of folder, parquet, webdataset, found 'zip'"):
        list_collection(wanted)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    data = tiny_data(n=400)
    assert data.features is not None
    return Corpus("tiny", data.ids, data.features, data.labels)


def test_a_method_is_found_by_its_name(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    file = extensions.module("hashdist/methods/halves.py").__file__
    monkeypatch.setattr(hashdist.methods, "__path__", [*hashdist.methods.__path__, str(Path(str(file)).parent)])
    experiment = Experiment(corpus, "uniform:40:200", 1, GraphSettings(), cuts=Cuts(50, 10, 5))
    codes_NW = experiment.fit(Recipe("halves", "halves"), 8).codes
    ones = np.unpackbits(codes_NW, axis=1).mean(0)
    assert (abs(ones - 0.5) < 0.2).all()
    assert experiment.measure(codes_NW)["metrics"]["map@50"] > 0.3


@pytest.mark.parametrize("where", [None, filters.column("parity", "==", 0)])
def test_an_engine_answers_as_the_scan_does(
    where: filters.Filter | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engines.ENGINES, "plain", extensions.module("hashdist/index/search/plain.py").Plain)
    codes_NW = np.random.default_rng(0).integers(0, 4, (300, 2), np.uint8)  # many ties
    index = create_index(str(tmp_path / "index"), bits=16)
    for part in np.array_split(np.arange(300), 3):
        index.append(codes_NW[part], [str(row) for row in part], {"parity": [int(row % 2) for row in part]})
    index.delete([str(row) for row in range(0, 300, 7)])
    expected = index.search(codes_NW[:20], 15, where=where)
    found = index.search(codes_NW[:20], 15, where=where, engine="plain")
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)


def test_a_graph_is_built_by_the_rule(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    mutual_neighbours = extensions.module("hashdist/methods/parts/mutual.py").mutual_neighbours
    rule = graph.Rule(mutual_neighbours, lambda n: min(20, n - 1), lambda k1: k1)
    monkeypatch.setitem(graph.RULES, "mutual", rule)
    built = graph.build(corpus.features, GraphSettings(rule="mutual"))
    near = [set(own) for own in built.neighbours_NK.tolist()]
    expected = [sorted(j for j in near[i] if i in near[j]) for i in range(len(near))]
    indptr, indices = built.symmetric
    assert [indices[indptr[i] : indptr[i + 1]].tolist() for i in range(len(near))] == expected
    assert (built.k1, 0 < len(indices) < 20 * len(near)) == (20, True)


def test_a_metric_is_reported(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = extensions.module("hashdist/evaluation/reciprocal.py").reciprocal_rank
    metric = measure.Metric("mrr@{cut}", lambda results, cuts: rank(results.relevant[:, : cuts.cut]))
    monkeypatch.setattr(measure, "METRICS", [*measure.METRICS, metric])
    experiment = Experiment(corpus, "uniform:40:200", 1, GraphSettings(), cuts=Cuts(50, 10, 5))
    found = experiment.measure(experiment.fit(Recipe("itq", "itq"), 8).codes)["metrics"]
    assert found["precision@10"] / 10 < found["mrr@50"] <= 1
    np.testing.assert_allclose(rank(np.array([[False, True, True], [True, False, False], [False] * 3])), [0.5, 1, 0])
