"""What a shard and a version are made of, without a store's contract (see tests/index/test_index.py)."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hashdist.ground import ids as ids_module
from hashdist.ground.errors import Corrupt, InvalidInput
from hashdist.index import create_index, open_index
from hashdist.index import index as index_module
from hashdist.index.shards.shard import Rows, Shard, files, pack, parts, write_shard
from hashdist.store import cache, open_store


def rows_of(n: int) -> Rows:
    ids = np.random.default_rng(0).permutation(n).astype(np.int64) * 10
    codes = np.arange(n, dtype=np.uint8)[:, None].repeat(4, axis=1)
    return Rows(ids, codes, [f"k{i}" for i in range(n)], pa.table({"digest": [str(i) for i in range(n)]}))


def written(folder: Path, rows: Rows) -> Shard:
    store = open_store(str(folder))
    names = iter("abcdef")
    return Shard(store, write_shard(store, lambda suffix: f"{next(names)}{suffix}", rows))


def test_rows_are_sorted_by_id_in_every_file(tmp_path: Path) -> None:
    rows = rows_of(100)
    shard = written(tmp_path, rows)
    order = np.argsort(rows.ids)
    np.testing.assert_array_equal(shard.ids, np.arange(100) * 10)
    np.testing.assert_array_equal(shard.codes, rows.codes[order])
    assert shard.keys() == [f"k{i}" for i in order]
    some = np.array([5, 0, 99])
    assert shard.keys(some) == [f"k{order[i]}" for i in some]
    table = shard.columns(["digest", "absent"], some)
    assert table["digest"].to_pylist() == [str(order[i]) for i in some]
    assert table["absent"].to_pylist() == [None] * 3
    shard.verify()


def test_finding_ids(tmp_path: Path) -> None:
    shard = written(tmp_path, rows_of(100))
    which, rows = shard.find(np.array([995, 40, -3, 990, 0, 41]))
    assert which.tolist() == [1, 3, 4]
    assert rows.tolist() == [4, 99, 0]
    assert [len(part) for part in shard.find(np.empty(0, np.int64))] == [0, 0]


def test_a_shard_opens_only_what_is_asked_for(tmp_path: Path) -> None:
    shard = written(tmp_path, rows_of(10))
    for name in ("a.keys.arrow", "a.columns.arrow"):
        (tmp_path / name).unlink()
    assert len(shard.codes) == len(shard.ids) == 10


@pytest.mark.parametrize("part", ["codes", "ids"])
def test_a_file_that_is_not_what_the_manifest_says(tmp_path: Path, part: str) -> None:
    """The checksum is right, the content is not: a manifest that names another file."""
    store = open_store(str(tmp_path))
    entries = iter("abcdefgh")
    ten, nine = (write_shard(store, lambda suffix: f"{next(entries)}{suffix}", rows_of(n)) for n in (10, 9))
    with pytest.raises(Corrupt, match="must"):
        Shard(store, pack(ten, parts(ten) | {part: parts(nine)[part]})).verify()


def test_bad_rows_are_refused(tmp_path: Path) -> None:
    rows = rows_of(10)
    with pytest.raises(InvalidInput, match="own id"):
        written(tmp_path, rows._replace(ids=np.zeros(10, np.int64)))
    with pytest.raises(InvalidInput, match="as many codes"):
        written(tmp_path, rows._replace(codes=rows.codes[:9]))
    with pytest.raises(InvalidInput, match="10 rows"):
        written(tmp_path, rows._replace(columns=pa.table({"x": [1]})))


def test_large_appends_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SHARD_ROWS", 40)
    index = create_index(str(tmp_path), bits=8)
    codes = np.random.default_rng(0).integers(0, 256, (100, 1), dtype=np.uint8)
    index.append(codes, [f"k{i}" for i in range(100)], {"n": list(range(100))})
    assert [shard["rows"] for shard in index.manifest["shards"]] == [40, 40, 20]
    np.testing.assert_array_equal(index.codes_of(["k3", "k99", "k3"]), codes[[3, 99, 3]])
    rows = pa.concat_tables(index.tables(["n"])).to_pylist()
    assert {row["key"]: row["n"] for row in rows} == {f"k{i}": i for i in range(100)}


def test_publishing_replaces_everything_and_yields_to_others(tmp_path: Path) -> None:
    index = create_index(str(tmp_path), bits=8)
    index.append(np.zeros((1, 1), np.uint8), ["old"])
    keys = [f"k{i}" for i in range(5)]
    rows = Rows(ids_module.image_ids(keys), np.zeros((5, 2), np.uint8), keys, pa.table({}))
    names = iter("abcdef")
    entry = write_shard(index.store, lambda suffix: f"shards/x/{next(names)}{suffix}", rows)
    late = open_index(str(tmp_path))
    about = {"bits": 16, "salts": {}, "model": "m", "model_uri": "u", "lineage": {"built_from": "c"}}
    assert index.publish([entry], **about) == 3  # type: ignore[arg-type]
    assert (index.bits, index.rows, sorted(index.keys())) == (16, 5, keys)
    with pytest.raises(index_module.Conflict):
        late.publish([entry], **about)  # type: ignore[arg-type]
    with pytest.raises(index_module.InvalidInput, match="8 bits"):
        open_index(str(tmp_path), version=2).search(np.zeros((1, 2), np.uint8), 1)


def test_hits_can_be_sent_to_another_process(tmp_path: Path) -> None:
    index = create_index(str(tmp_path), bits=8)
    index.append(np.arange(5, dtype=np.uint8)[:, None], list("abcde"))
    hits = index.search(np.zeros((1, 1), np.uint8), 2)
    sent = pickle.loads(pickle.dumps(hits))
    assert sent.keys() == hits.keys()
    assert sent.keys()[0][0] == "a"
    again = pickle.loads(pickle.dumps(index))
    assert (again.version, again.rows) == (2, 5)
    again.delete(["a"])


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HASHDIST_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path
    monkeypatch.delenv("HASHDIST_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "hashdist"


def test_a_packed_entry_gives_its_files_back() -> None:
    def entry(path: str) -> dict[str, object]:
        return {"path": path, "bytes": len(path), "sha256": hashlib.sha256(path.encode()).hexdigest(), "rows": 7}

    made = {"codes": entry("shards/a/b.bin"), "keys": entry("shards/a/b.keys.arrow"), "rerank": entry("rerank/c/d.npy")}
    shard = pack({"rows": 7, "version": 3}, made)
    assert parts(shard) == made
    assert list(files(shard)) == list(made.values())
    assert (shard["path"], shard["version"]) == ("shards/a/b", 3)
    assert parts(pack(shard, parts(shard))) == made
    assert len(shard["parts"]["codes"]) == len(shard["parts"]["keys"]) == 2
