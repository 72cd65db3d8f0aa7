"""Building, evaluating and growing an index on Ray, from codes that no model had to make."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from hashdist.evaluation.protocols import split
from hashdist.ground.bits import hamming, pack
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_ids
from hashdist.ground.schema import to_vectors, vector_schema
from hashdist.ground.settings import EvaluateSettings, IndexSettings, Settings
from hashdist.index import open_index
from hashdist.stages import evaluate, index
from hashdist.store import open_store
from hashdist.store.commit import Artefact, digest, write_file, write_table

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

BITS = 16


class Made:
    """Features in clusters and their codes, in parts whose rows are in no order, one image unreadable."""

    def __init__(
        self,
        root: str,
        n: int = 400,
        seed: int = 0,
        keys: list[str] | None = None,
        model: str = "m1",
        labelled: bool = True,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.labelled = labelled
        self.keys = keys or [f"{i:05d}.png" for i in range(n)]
        n = len(self.keys)
        self.labels = rng.integers(0, 5, n)
        self.features_ND = (rng.standard_normal((5, 24))[self.labels] * 1.5 + rng.standard_normal((n, 24))).astype("f4")
        self.present = np.arange(n) != 7
        self.codes_NW = pack(self.features_ND @ np.random.default_rng(9).standard_normal((24, BITS)))
        self.ids = image_ids(self.keys)
        order = rng.permutation(n)
        self.digests = [f"{seed}-{key}" for key in self.keys]
        made_from = {"collections": {"uri": "file:///images", "digest": "d"}}
        about = {"bits": BITS, "model": "file:///models/m1", "model_digest": model, "inputs": made_from}
        self.codes = self._write(root, "codes", "code", "uint8", self.codes_NW, order, seed, about)
        self.features = self._write(
            root, "features", "feature", "float32", self.features_ND, order, seed, {"inputs": {}}
        )

    def _write(
        self, root: str, kind: str, name: str, dtype: str, vectors: NDArray[Any], order: Any, seed: int, about: Any
    ) -> Artefact:
        made = Artefact(open_store(root), kind, digest([kind, seed, len(order), about]))
        columns = [
            self.ids,
            self.keys,
            self.digests,
            pa.array([[int(label)] if self.labelled else None for label in self.labels], pa.list_(pa.int32())),
            ["ok" if ok else "unreadable" for ok in self.present],
            pa.array([None if ok else "truncated" for ok in self.present], pa.string()),
        ]
        table = pa.table(
            [*columns, to_vectors(vectors, self.present)], schema=vector_schema(name, dtype, vectors.shape[1])
        )
        parts = [table.take(rows) for rows in np.array_split(order, 5)]
        files = [write_table(made.store, made.new_name(".parquet"), part) for part in parts]
        made.publish({"rows": len(order), "failed": int((~self.present).sum()), "files": files, **about})
        return made

    def dict(self) -> dict[str, NDArray[np.uint8]]:
        return {key: code for key, code, ok in zip(self.keys, self.codes_NW, self.present, strict=True) if ok}


def settings_of(root: str, **evaluation: Any) -> Settings:
    return Settings(root=root, index=IndexSettings(name="photos"), evaluate=EvaluateSettings(**evaluation))


def same_as(uri: str, wanted: dict[str, NDArray[np.uint8]]) -> None:
    opened = open_index(uri)
    assert sorted(opened.keys()) == sorted(wanted)
    keys = sorted(wanted)
    np.testing.assert_array_equal(opened.codes_of(keys), np.stack([wanted[key] for key in keys]))


@pytest.mark.parametrize("shard_rows", [8_000_000, 100])
def test_an_index_is_built_once_from_the_same_codes(root_uri: str, shard_rows: int) -> None:
    made = Made(root_uri)
    settings = replace(settings_of(root_uri), index=IndexSettings(name="photos", shard_rows=shard_rows))
    first = index.run(settings, made.codes)
    assert (first["rows"], first["failed"], first["version"], first["skipped"]) == (399, 1, 2, False)
    assert first["shards"] == (1 if shard_rows > 400 else 5)
    same_as(first["snapshot"], made.dict())
    second = index.run(settings, made.codes)
    assert second["skipped"]
    assert second["version"] == 2
    opened = open_index(first["snapshot"])
    assert (opened.model, opened.model_uri, opened.collection_uri) == ("m1", "file:///models/m1", "file:///images")
    other = Made(root_uri, seed=1, model="m2")
    third = index.run(settings, other.codes)
    assert (third["version"], third["skipped"]) == (3, False)
    same_as(first["snapshot"], other.dict())
    assert open_index(first["snapshot"]).model == "m2"
    assert open_index(first["snapshot"], version=2).model == "m1"


def test_salted_ids_are_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Salts are read off the ids, so that the index finds its keys again."""
    keys = [f"k{i}" for i in range(20)]
    ids = image_ids(keys, {"k3": 1, "k9": 2})
    assert index.salts_of(keys, ids.tolist()) == {"k3": 1, "k9": 2}
    with pytest.raises(InvalidInput, match="'k0' must be made from its key"):
        index.salts_of(keys, list(range(20)))


def brute(made: Made, queries: int, cut: int) -> dict[str, float]:
    """mAP and precision by sorting the whole database for every query, each query left out of its own list."""
    rows = np.flatnonzero(made.present)
    rows = rows[np.argsort(made.ids[rows])]
    aps, precisions, recalls = [], [], []
    for row in rows[:queries]:
        rest = rows[rows != row]
        ranked = rest[np.lexsort((made.ids[rest], hamming(made.codes_NW[row], made.codes_NW[rest])))]
        relevant = made.labels[ranked[:cut]] == made.labels[row]
        places = np.arange(1, len(relevant) + 1)
        aps.append((np.cumsum(relevant) / places * relevant).sum() / max(1, relevant.sum()))
        precisions.append((made.labels[ranked[:10]] == made.labels[row]).mean())
        x = made.features_ND.astype(np.float64)
        cosine = x[rest] @ x[row] / np.linalg.norm(x[rest], axis=1)
        exact = rest[np.argsort(-cosine, kind="stable")[:5]]
        recalls.append(len(set(exact) & set(ranked[:5])) / 5)
    return {
        f"map@{cut}": float(np.mean(aps)),
        "precision@10": float(np.mean(precisions)),
        "recall@5": float(np.mean(recalls)),
    }


@pytest.mark.parametrize("cut", [50, 5000])
def test_evaluation_without_protocol_equals_brute_force(tmp_path: Any, cut: int) -> None:
    made = Made(tmp_path.as_uri())
    wanted = {"cut": cut, "precision_at": 10, "recall_at": 5, "queries": 60, "baselines": ["itq", "lsh"]}
    result = evaluate.run(settings_of(tmp_path.as_uri(), **wanted), made.codes, made.features)
    for name, value in brute(made, 60, cut).items():
        assert result["metrics"][name] == pytest.approx(value, abs=1e-12), name
    assert (result["queries"], result["database"], result["without_relevant"]) == (60, 399, 0)
    assert list(result["by_method"]) == ["codes", "itq", "lsh"]
    assert result["by_method"]["codes"] == result["metrics"]
    assert set(result["by_method"]["itq"]) == set(result["metrics"])
    assert len(result["curves"]["lsh"]["precision"]) == BITS + 1
    curve = result["curves"]["codes"]["precision_at"]
    assert curve["n"] == [1, *range(10, 399, 10)]  # as far as 398 other images go
    assert curve["precision"][1] == pytest.approx(result["metrics"]["precision@10"], abs=1e-12)
    if cut == 5000:
        assert 0.2 < result["metrics"]["map_all_ties"] < 1


def test_evaluation_by_a_protocol_equals_brute_force(tmp_path: Any) -> None:
    made = Made(tmp_path.as_uri())
    settings = settings_of(tmp_path.as_uri(), protocol="digits", protocol_seed=3, cut=40, precision_at=10, recall_at=5)
    result = evaluate.run(settings, made.codes, made.features)
    rows = np.flatnonzero(made.present)
    rows = rows[np.argsort(made.ids[rows])]
    parts = split("digits", made.ids[rows], [[int(label)] for label in made.labels[rows]], 3)
    database = rows[parts.database]
    aps = []
    for row in rows[parts.query]:
        found = database[np.lexsort((made.ids[database], hamming(made.codes_NW[row], made.codes_NW[database])))][:40]
        relevant = made.labels[found] == made.labels[row]
        aps.append((np.cumsum(relevant) / np.arange(1, 41) * relevant).sum() / max(1, relevant.sum()))
    assert (result["queries"], result["database"]) == (100, 299)
    assert result["metrics"]["map@40"] == pytest.approx(float(np.mean(aps)), abs=1e-12)
    assert result["protocol"] == "digits"


def test_queries_that_were_trained_on_are_refused(tmp_path: Any) -> None:
    root = open_store(tmp_path.as_uri())
    made = Made(tmp_path.as_uri(), model="leaky")
    graph = Artefact(root, "graphs", "g")
    sink = io.BytesIO()
    np.save(sink, np.sort(made.ids[made.present]))
    graph.publish({"files": {"ids": write_file(graph.store, graph.new_name(".npy"), sink.getvalue())}})
    model = Artefact(root, "models", "m")
    model.publish({"method": "dsah", "inputs": {"graphs": {"uri": graph.uri, "digest": "g"}}})
    codes = Artefact(root, "codes", "trained")
    manifest = {**made.codes.manifest(), "model": model.uri}
    for file in manifest["files"]:
        codes.store.put(file["path"], made.codes.store.get(file["path"]))
    codes.publish(manifest)
    with pytest.raises(InvalidInput, match="trained on 100 of them"):
        evaluate.run(settings_of(tmp_path.as_uri(), protocol="digits"), codes, made.features)
    result = evaluate.run(settings_of(tmp_path.as_uri(), queries=10), codes, made.features)
    assert list(result["by_method"]) == ["dsah"]


def test_evaluation_of_codes_without_labels_measures_recall_only(tmp_path: Any) -> None:
    made = Made(tmp_path.as_uri(), labelled=False)
    wanted = {"recall_at": 5, "queries": 20}
    result = evaluate.run(settings_of(tmp_path.as_uri(), **wanted), made.codes, made.features)
    assert result["metrics"] == pytest.approx({"recall@5": brute(made, 20, 50)["recall@5"]})
    with pytest.raises(InvalidInput, match="found neither"):
        evaluate.run(settings_of(tmp_path.as_uri(), **wanted), made.codes)
    with pytest.raises(InvalidInput, match="baselines are fitted on features"):
        evaluate.run(settings_of(tmp_path.as_uri(), baselines=["itq"]), made.codes)
    with pytest.raises(InvalidInput, match=r"must be among .*itq, .*lsh, .*found pca"):
        evaluate.run(settings_of(tmp_path.as_uri(), baselines=["pca"]), made.codes, made.features)
