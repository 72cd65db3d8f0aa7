"""Searches over Ray actors against searches in one process; an index with features, built and measured."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from numpy.typing import NDArray

from hashdist.ground.bits import pack
from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.ground.ids import image_ids
from hashdist.ground.schema import to_vectors, vector_schema
from hashdist.ground.settings import EvaluateSettings, IndexSettings, Settings
from hashdist.index import Index, create_index, open_index
from hashdist.index.search.faiss import Faiss, MultiHash
from hashdist.index.search.filters import column, keys
from hashdist.stages import evaluate
from hashdist.stages import index as stage
from hashdist.stages.cluster.peers import Actors, SpreadIndex, place
from hashdist.store import open_store
from hashdist.store.commit import Artefact, digest, write_table

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

Codes = NDArray[np.uint8]
WIDTH = 12


def random_codes(n: int, seed: int = 0) -> Codes:
    """Of few kinds, so that ties are the rule."""
    return np.random.default_rng(1).integers(0, 256, (40, 2), dtype=np.uint8)[
        np.random.default_rng(seed).integers(0, 40, n)
    ]


def features_of(n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)


def made(uri: str, shards: int = 5) -> Index:
    index = create_index(uri, bits=16)
    for part in range(shards):
        names = [f"{part}-{row}" for row in range(60 + 10 * part)]
        rows = np.arange(len(names))
        index.apply(random_codes(len(names), part), names, {"row": rows}, rerank=features_of(len(names), part))
    index.delete([f"1-{row}" for row in range(20)])
    return index


def same(spread: Index, index: Index) -> None:
    queries, features = random_codes(7, seed=9), features_of(7, seed=9)
    for where in (None, "row < 30", keys(["0-1", "3-7", "nobody"]), column("row", ">", 1000)):
        for k in (1, 25, 1000):
            found, wanted = spread.search(queries, k, where), index.search(queries, k, where)
            np.testing.assert_array_equal(found.ids, wanted.ids)
            np.testing.assert_array_equal(found.distances, wanted.distances)
        assert spread.search(queries, 5, where).keys() == index.search(queries, 5, where).keys()
        near, ball = spread.search_within(queries, 4, where), index.search_within(queries, 4, where)
        np.testing.assert_array_equal(near.offsets, ball.offsets)
        np.testing.assert_array_equal(near.ids, ball.ids)
        np.testing.assert_array_equal(near.distances, ball.distances)
        assert near.keys() == ball.keys()
    single = np.concatenate([spread.search(query[None], 25).ids for query in queries])
    np.testing.assert_array_equal(single, index.search(queries, 25).ids)
    for engine in (Faiss(), "multihash", MultiHash(flips=16)):
        found = spread.search_within(queries, 3, engine=engine)
        np.testing.assert_array_equal(found.ids, index.search_within(queries, 3).ids)
    np.testing.assert_array_equal(spread.search(queries, 9, engine="faiss").ids, index.search(queries, 9).ids)
    ranked, by_cosine = (which.search(queries, 6, rerank=features) for which in (spread, index))
    np.testing.assert_array_equal(ranked.ids, by_cosine.ids)
    np.testing.assert_array_equal(ranked.scores, by_cosine.scores)  # type: ignore[arg-type]


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_actors_answer_as_one_process_does(tmp_path: Path, actors: int) -> None:
    index = made(str(tmp_path / "index"))
    with SpreadIndex(index, Actors(actors, 0.5)) as spread:
        same(spread, index)
        np.testing.assert_array_equal(spread.codes_of(["3-7", "0-1"]), index.codes_of(["3-7", "0-1"]))
        wanted = index.search(random_codes(4), 30, "row < 50")
        with ThreadPoolExecutor(8) as pool:
            for ids in pool.map(lambda _: spread.search(random_codes(4), 30, "row < 50").ids, range(16)):
                np.testing.assert_array_equal(ids, wanted.ids)
        with pytest.raises(NotFound, match="'nobody'"):
            spread.codes_of(["3-7", "nobody"])
        with pytest.raises(InvalidInput, match="no column `size` to filter by; the columns are: row"):
            spread.search(random_codes(1), 3, "size > 3")
        with pytest.raises(InvalidInput, match="open it without"):
            spread.delete(["3-7"])


def test_actors_on_s3_move_on_with_the_index_and_come_back_when_killed(s3_endpoint: str) -> None:
    index = made(f"s3://hashdist/actors-{os.urandom(4).hex()}/index")
    with SpreadIndex(open_index(index.uri), Actors(2, 0.5)) as spread:
        before = spread.search(random_codes(3), 1000).ids
        assert not spread.refresh()
        index.apply(random_codes(30, 77), [f"new-{row}" for row in range(30)], rerank=features_of(30))
        index.delete(["0-1", "0-2", "4-1"])
        np.testing.assert_array_equal(spread.search(random_codes(3), 1000).ids, before)
        assert spread.refresh()
        assert spread.version == index.version
        same(spread, index)
        for actor in spread._peers._actors:
            ray.kill(actor, no_restart=False)
        time.sleep(0.2)
        np.testing.assert_array_equal(spread.search(random_codes(3), 1000).ids, index.search(random_codes(3), 1000).ids)


def test_more_actors_than_shards_and_no_rows_at_all(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "index"), bits=16)
    with SpreadIndex(index, Actors(2, 0.5)) as spread:
        assert spread.search(random_codes(3), 4).ids.shape == (3, 0)
        assert spread.search_within(random_codes(3), 4).offsets.tolist() == [0, 0, 0, 0]
        index.append(random_codes(9), [str(row) for row in range(9)])
        assert spread.refresh()
        np.testing.assert_array_equal(spread.search(random_codes(3), 20).ids, index.search(random_codes(3), 20).ids)
    with pytest.raises(InvalidInput, match="at least one actor"):
        SpreadIndex(index, 0)


def test_shards_are_spread_evenly_and_stay_where_they_are() -> None:
    rows = {"a": 50, "b": 40, "c": 30, "d": 20, "e": 10}
    first = place(rows, 2, {})
    assert sorted(sum(rows[name] for name in rows if first[name] == actor) for actor in (0, 1)) == [70, 80]
    later = place({**rows, "f": 5, "g": 100}, 2, first)
    assert {name: later[name] for name in rows} == first
    assert place({"a": 1, "b": 1}, 2, {"a": 7})["a"] in (0, 1)


# An index with features: built, measured


class Made:
    """Features in clusters and codes made of them, in parts, one image unreadable."""

    def __init__(self, root: str, n: int = 300) -> None:
        rng = np.random.default_rng(0)
        self.keys = [f"{row:04d}.png" for row in range(n)]
        self.ids = image_ids(self.keys)
        self.features_ND = features_of(n) * 3
        self.present = np.arange(n) != 7
        codes_NW = pack(self.features_ND @ rng.standard_normal((WIDTH, 32)))
        self.features = self._write(root, "features", "feature", self.features_ND, {"inputs": {}, "width": WIDTH})
        inputs = {"features": {"uri": self.features.uri, "digest": self.features.name}}
        about = {"bits": 32, "model": "file:///models/m1", "model_digest": "m1", "inputs": inputs}
        self.codes = self._write(root, "codes", "code", codes_NW, about)

    def _write(self, root: str, kind: str, name: str, vectors: NDArray[Any], about: dict[str, Any]) -> Artefact:
        artefact = Artefact(open_store(root), kind, digest([kind, len(vectors)]))
        n = len(vectors)
        columns: list[Any] = [self.ids, self.keys, ["d"] * n, pa.nulls(n, pa.list_(pa.int32()))]
        columns += [["ok" if ok else "unreadable" for ok in self.present], pa.nulls(n, pa.string())]
        schema = vector_schema(name, vectors.dtype.name, vectors.shape[1])
        table = pa.table([*columns, to_vectors(vectors, self.present)], schema=schema)
        parts = np.array_split(np.random.default_rng(1).permutation(n), 4)
        files = [write_table(artefact.store, artefact.new_name(".parquet"), table.take(rows)) for rows in parts]
        artefact.publish({"rows": n, "failed": 1, "files": files, "collection": None, **about})
        return artefact


def settings_of(root: str, *, rerank: bool, shard_rows: int = 100) -> Settings:
    index = IndexSettings(name="photos", rerank=rerank, shard_rows=shard_rows)
    return Settings(root=root, index=index, evaluate=EvaluateSettings(recall_at=5, queries=40))


def test_build_keeps_features_beside_the_codes(tmp_path: Path) -> None:
    root_uri = tmp_path.as_uri()
    data = Made(root_uri)
    plain = stage.run(settings_of(root_uri, rerank=False), data.codes)
    assert not plain["skipped"]
    built = stage.run(settings_of(root_uri, rerank=True), data.codes)
    assert not built["skipped"]
    assert stage.run(settings_of(root_uri, rerank=True), data.codes)["skipped"]
    index = open_index(built["snapshot"])
    assert index.manifest["rerank"] == {"width": WIDTH, "features": data.features.uri}
    assert len(index.manifest["shards"]) > 1
    kept = index.view.features(data.ids[data.present])
    unit = data.features_ND[data.present] / np.linalg.norm(data.features_ND[data.present], axis=1, keepdims=True)
    np.testing.assert_allclose(kept, unit, atol=1e-3)
    hits = index.search(index.codes_of(data.keys[:3]), 1, rerank=data.features_ND[:3], candidates=299)
    assert hits.keys() == [[key] for key in data.keys[:3]]
    with pytest.raises(InvalidInput, match="keeps no features"):
        open_index(built["snapshot"], version=plain["version"]).search(
            index.codes_of(data.keys[:3]), 1, rerank=data.features_ND[:3]
        )


def test_build_with_features_needs_codes_made_of_features(tmp_path: Path) -> None:
    data = Made(tmp_path.as_uri())
    of_images = Artefact(data.codes.store, "codes", "of-images")
    manifest = {**data.codes.manifest(), "inputs": {"collections": {"uri": "file:///images", "digest": "d"}}}
    of_images.publish({name: manifest[name] for name in manifest if name not in ("kind", "created_at")})
    with pytest.raises(InvalidInput, match=r"train with train\.mode: frozen"):
        stage.run(settings_of(tmp_path.as_uri(), rerank=True), of_images)


def test_evaluation_says_what_ranking_by_features_gains(tmp_path: Path) -> None:
    data = Made(tmp_path.as_uri())
    plain = evaluate.run(settings_of(tmp_path.as_uri(), rerank=False), data.codes, data.features)["metrics"]
    ranked = evaluate.run(settings_of(tmp_path.as_uri(), rerank=True), data.codes, data.features)["metrics"]
    assert set(ranked) - set(plain) == {"recall@5_reranked"}
    assert {name: ranked[name] for name in plain} == plain
    # by brute force: the 50 nearest codes of each query, ordered by cosine
    rows = np.flatnonzero(data.present)
    rows = rows[np.argsort(data.ids[rows])]
    codes = np.random.default_rng(0).standard_normal((WIDTH, 32))
    bits = data.features_ND @ codes >= 0
    unit = data.features_ND.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    shares = []
    for row in rows[:40]:
        rest = rows[rows != row]
        near = rest[np.lexsort((data.ids[rest], (bits[rest] != bits[row]).sum(1)))][:50]
        exact = rest[np.argsort(-(unit[rest] @ unit[row]))][:5]
        best = near[np.argsort(-(unit[near] @ unit[row]))][:5]
        shares.append(len(set(best) & set(exact)) / 5)
    assert ranked["recall@5_reranked"] == pytest.approx(np.mean(shares), abs=0.011)  # float16 may swap near equals
    assert ranked["recall@5_reranked"] > plain["recall@5"] + 0.1


def test_rebuilding_without_features_drops_them(tmp_path: Path) -> None:
    data = Made(tmp_path.as_uri())
    stage.run(settings_of(tmp_path.as_uri(), rerank=True), data.codes)
    settings = settings_of(tmp_path.as_uri(), rerank=True)
    plain = stage.run(replace(settings, index=replace(settings.index, rerank=False)), data.codes)
    assert not plain["skipped"]
    assert open_index(plain["snapshot"]).manifest["rerank"] is None
