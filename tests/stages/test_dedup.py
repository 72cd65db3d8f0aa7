"""Near-duplicates of an index over its shards, against all pairs; and from an earlier file, against a fresh run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from hashdist import cli
from hashdist.ground.bits import hamming
from hashdist.ground.errors import AlreadyExists, InvalidInput, NotFound
from hashdist.ground.options import DedupOptions
from hashdist.ground.settings import ClusterSettings
from hashdist.index import Index, create_index, open_index
from hashdist.index.upkeep.compaction import compact
from hashdist.stages import dedup
from hashdist.store import open_store

pytestmark = pytest.mark.cluster

HERE = ClusterSettings()


def codes_of(rng: np.random.Generator, n: int, planted: int, bits: int = 64) -> NDArray[np.uint8]:
    """Random codes; among them groups that are equal, near, or joined only by steps."""
    codes = rng.integers(0, 2, (n, bits), dtype=np.uint8)
    for row in range(planted):
        codes[row] = codes[rng.integers(planted, 2 * planted)]
        codes[row, rng.permutation(bits)[: rng.integers(0, 5)]] ^= 1
    return np.packbits(rng.permutation(codes), axis=1)


def model_of(index: Index) -> dict[str, tuple[int, NDArray[np.uint8]]]:
    keys = list(index.keys())
    ids = np.concatenate([table["id"].to_numpy() for table in index.tables([])])
    return dict(zip(keys, zip(ids.tolist(), index.codes_of(keys), strict=True), strict=True))


def brute(index: Index, radius: int) -> dict[str, tuple[int, int, int]]:
    """(cluster, id, distance to the image of that id) by key: all pairs, and a walk through the graph."""
    rows = model_of(index)
    keys, ids = list(rows), np.array([id_ for id_, _ in rows.values()])
    codes = np.stack([code for _, code in rows.values()])
    near = [np.flatnonzero(hamming(code, codes) <= radius) for code in codes]
    seen, result = np.zeros(len(keys), np.bool_), {}
    for start in range(len(keys)):
        if seen[start] or len(near[start]) == 1:
            continue
        group, waiting = [], [start]
        seen[start] = True
        while waiting:
            group.append(waiting.pop())
            fresh = near[group[-1]][~seen[near[group[-1]]]]
            seen[fresh] = True
            waiting += fresh.tolist()
        first = group[int(np.argmin(ids[group]))]
        for row in group:
            result[keys[row]] = (int(ids[first]), int(ids[row]), int(hamming(codes[first], codes[[row]])[0]))
    return result


def run(index: Index, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, tuple[int, int, int]]]:
    done = dedup.run(index, DedupOptions(out=str(out), **options), HERE)
    table = pq.read_table(out)
    assert table.column_names == ["cluster", "id", "key", "distance"]
    order = list(zip(table["cluster"].to_pylist(), table["id"].to_pylist(), strict=True))
    assert order == sorted(order)
    found = {row["key"]: (row["cluster"], row["id"], row["distance"]) for row in table.to_pylist()}
    assert len(found) == table.num_rows == done["clustered"]
    assert done["clusters"] == len({cluster for cluster, _, _ in found.values()})
    assert done["duplicates"] == done["clustered"] - done["clusters"]
    return done, found


def built(uri: str, rng: np.random.Generator, sizes: list[int], bits: int = 64) -> Index:
    index = create_index(uri, bits=bits)
    codes = codes_of(rng, sum(sizes), sum(sizes) // 8, bits)
    start = 0
    for size in sizes:
        index.append(codes[start : start + size], [f"k{i:06d}" for i in range(start, start + size)])
        start += size
    return index


@pytest.mark.parametrize(("radius", "bits"), [(0, 64), (2, 64), (3, 64), (6, 128), (1, 24)])
def test_clusters_are_those_of_all_pairs(root_uri: str, tmp_path: Path, radius: int, bits: int) -> None:
    rng = np.random.default_rng(radius)
    index = built(root_uri, rng, [500, 1, 300, 700], bits)
    index.delete([f"k{i:06d}" for i in rng.permutation(1501)[:100]])
    expected = brute(index, radius)
    done, found = run(index, tmp_path / "whole.parquet", radius=radius)
    assert found == expected
    assert (done["rows"], done["tasks"], done["joined"]) == (index.rows, 1, None)
    assert run(index, tmp_path / "blocks.parquet", radius=radius, block_rows=790)[1] == expected


def test_blocks_joined_by_ray_tasks_give_the_same_file(ray_session: None, root_uri: str, tmp_path: Path) -> None:
    index = built(root_uri, np.random.default_rng(0), [400, 90, 600])
    index.delete(["k000007", "k000500"])
    done, found = run(index, tmp_path / "tasks.parquet", radius=3, block_rows=250)
    assert done["tasks"] == 5 * 6 / 2
    assert found == brute(index, 3)
    run(index, tmp_path / "here.parquet", radius=3)
    files = [pq.read_table(tmp_path / name) for name in ("tasks.parquet", "here.parquet")]
    assert files[0].equals(files[1])
    assert files[0].schema.metadata == files[1].schema.metadata


def test_within_a_shard(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "index"), bits=64)
    code = np.zeros((2, 8), np.uint8)
    index.append(code, ["a", "b"])
    index.append(code, ["c", "d"])
    index.append(code[:1], ["e"])
    assert run(index, tmp_path / "all.parquet")[0]["largest"] == 5
    done, found = run(index, tmp_path / "within.parquet", within_shard=True)
    assert (done["clusters"], done["tasks"], set(found)) == (2, 3, set("abcd"))


@pytest.mark.parametrize("seed", range(3))
def test_from_an_earlier_file_comes_what_a_fresh_run_finds(tmp_path: Path, seed: int) -> None:
    """Rows added, changed, removed, brought back, moved by compaction: each step starts from the one before."""
    rng = np.random.default_rng(seed)
    index = built(str(tmp_path / "index"), rng, [150, 250, 40])
    # a chain whose middle can go: its ends are then apart, or still joined by others
    bits = np.zeros((5, 64), np.uint8)
    for row in range(5):
        bits[row, : 2 * row] = 1
    index.append(np.packbits(bits, axis=1), [f"chain{i}" for i in range(5)])
    before = tmp_path / "0.parquet"
    run(index, before)
    for step in range(1, 8):
        keys = sorted(index.keys())
        some = rng.permutation(keys)[: int(rng.integers(1, 40))].tolist()
        what = rng.integers(0, 4)
        if step == 1:
            index.delete(["chain2"])
        elif step == 4:
            compact(open_index(index.uri), everything=True)
        elif what == 0:
            index.delete(some)
        elif what == 1:
            index.append(index.codes_of(some)[::-1], some, on_existing="replace")
        else:
            near = np.unpackbits(index.codes_of(some), axis=1)
            near[:, rng.permutation(64)[:2]] ^= 1
            index.append(np.packbits(near, axis=1), [f"{step}-{i}" for i in range(len(some))])
        index = open_index(index.uri)
        out = tmp_path / f"{step}.parquet"
        done, found = run(index, out, previous=str(before), block_rows=int(rng.choice([30, 4_000_000])))
        anew = run(index, tmp_path / f"{step}-fresh.parquet")[1]
        assert found == anew == brute(index, 2)
        assert pq.read_table(out).equals(pq.read_table(tmp_path / f"{step}-fresh.parquet"))
        assert done["joined"] <= len(some) or step == 4
        before = out


def test_only_what_joined_is_compared(tmp_path: Path) -> None:
    index = built(str(tmp_path / "index"), np.random.default_rng(0), [300])
    run(index, tmp_path / "a.parquet")
    done, _ = run(index, tmp_path / "b.parquet", previous=str(tmp_path / "a.parquet"))
    assert (done["joined"], done["gone"], done["tasks"]) == (0, 0, 0)
    compact(index, everything=True)
    index = open_index(index.uri)
    index.append(np.zeros((3, 8), np.uint8), ["x", "y", "z"])
    done, found = run(index, tmp_path / "c.parquet", previous=str(tmp_path / "b.parquet"))
    assert (done["joined"], done["gone"], done["tasks"]) == (3, 0, 2)
    assert {"x", "y", "z"} <= set(found)


def test_where_the_earlier_version_is_gone_or_little_of_it_is_left_all_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = built(str(tmp_path / "index"), np.random.default_rng(0), [100])
    run(index, tmp_path / "a.parquet")
    index.append(np.zeros((150, 8), np.uint8), [f"new{i}" for i in range(150)])
    done, found = run(index, tmp_path / "b.parquet", previous=str(tmp_path / "a.parquet"))
    assert found == brute(index, 2)
    assert (done["joined"], done["gone"], done["tasks"]) == (150, 0, 1)

    def vacuumed(*_: Any, **__: Any) -> Index:
        raise NotFound("version 2 was vacuumed")

    monkeypatch.setattr(dedup, "open_index", vacuumed)
    done, found = run(index, tmp_path / "c.parquet", previous=str(tmp_path / "a.parquet"))
    assert found == brute(index, 2)
    assert done["joined"] is None
    assert "version 2 was vacuumed" in capsys.readouterr().err


def test_forests_are_cut_down_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "_EDGES_KEPT", 10)
    monkeypatch.setattr(dedup, "_TASKS_FOR_RAY", 1000)
    index = built(str(tmp_path / "index"), np.random.default_rng(0), [300, 200])
    done, found = run(index, tmp_path / "a.parquet", block_rows=100)
    assert done["tasks"] == 15
    assert found == brute(index, 2)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    index = built(str(tmp_path / "index"), np.random.default_rng(0), [50])
    other = built(str(tmp_path / "other"), np.random.default_rng(0), [50])
    run(index, tmp_path / "a.parquet")
    for wrong in ({"radius": 3}, {"within_shard": True}):
        with pytest.raises(InvalidInput, match="leave --previous out"):
            run(index, tmp_path / "b.parquet", previous=str(tmp_path / "a.parquet"), **wrong)
    with pytest.raises(InvalidInput, match="leave --previous out"):
        run(other, tmp_path / "b.parquet", previous=str(tmp_path / "a.parquet"))
    with pytest.raises(AlreadyExists):
        run(index, tmp_path / "a.parquet")
    for out in ("", "x.csv"):
        with pytest.raises(InvalidInput, match="--out"):
            dedup.run(index, DedupOptions(out=out), HERE)
    with pytest.raises(InvalidInput, match="radius"):
        dedup.run(index, replace(DedupOptions(out="x.parquet"), radius=-1), HERE)


def test_an_index_without_rows_and_the_command(root_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    create_index(f"{root_uri}/index", bits=64)
    line = [
        "dedup",
        "--index.uri",
        f"{root_uri}/index",
        "--radius",
        "1",
        "--out",
        f"{root_uri}/found/a.parquet",
        "--json",
    ]
    assert cli.main(line) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["clusters"], shown["rows"], shown["largest"]) == (0, 0, 0)
    assert open_store(f"{root_uri}/found").exists("a.parquet")
