"""The contract of an index, on disk and on S3, against a plain dict and brute force."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import hashdist
from hashdist.ground import ids as ids_module
from hashdist.ground.errors import AlreadyExists, Conflict, Corrupt, InvalidInput, NotFound
from hashdist.index import Index, change, create_index, open_index
from hashdist.index import index as index_module
from hashdist.index.shards import shard as shard_files
from hashdist.store import cache, open_store
from tests.worlds.index import check_answers, names, random_codes

Codes = NDArray[np.uint8]


def test_a_new_index_is_empty_and_cannot_be_made_twice(uri: str) -> None:
    index = create_index(uri, bits=64, model="m1")
    assert (index.version, index.rows, index.bits, index.model) == (1, 0, 64, "m1")
    hits = index.search(random_codes(3), k=4)
    assert hits.ids.shape == hits.distances.shape == (3, 0)
    assert hits.keys() == [[], [], []]
    assert index.search_within(random_codes(3), 64).offsets.tolist() == [0, 0, 0, 0]
    with pytest.raises(AlreadyExists, match="holds an index already"):
        create_index(uri, bits=64)
    assert open_index(uri).version == 1


def test_append_search_and_reopen(uri: str) -> None:
    codes, keys = random_codes(300), names(300)
    index = create_index(uri, bits=64)
    assert index.append(codes, keys, {"digest": keys, "labels": [[i % 3] for i in range(300)]}) == 2
    model = dict(zip(keys, codes, strict=True))
    for opened in (index, open_index(uri), open_index(uri, version=2)):
        check_answers(opened, model, random_codes(4, seed=1))
    assert index.search(codes[:2], k=1000).ids.shape == (2, 300)
    table = next(open_index(uri).tables(["digest", "labels", "absent"]))
    assert table["digest"].to_pylist() == table["key"].to_pylist()
    assert table["absent"].null_count == 300


def test_older_versions_stay_as_they_were_and_cannot_be_changed(uri: str) -> None:
    codes, keys = random_codes(20), names(20)
    index = create_index(uri, bits=64)
    index.append(codes, keys)
    index.delete(keys[:5])
    index.append(codes[::-1][:4], keys[:4])
    old = open_index(uri, version=2)
    check_answers(old, dict(zip(keys, codes, strict=True)), random_codes(3, seed=1))
    check_answers(open_index(uri, version=3), dict(zip(keys[5:], codes[5:], strict=True)), random_codes(3, seed=1))
    with pytest.raises(InvalidInput, match="opened at version 2"):
        old.delete(keys)
    with pytest.raises(NotFound, match="no version 9"):
        open_index(uri, version=9)
    assert [v["operation"] for v in index.log()] == ["create", "append", "delete", "append"]
    assert [v["rows"] for v in index.log()] == [0, 20, 15, 19]


def test_a_deleted_key_may_come_back_and_be_deleted_again(uri: str) -> None:
    index = create_index(uri, bits=64)
    a, b = random_codes(2)
    for code in (a, b, a):
        index.append(code[None], ["x"])
        check_answers(index, {"x": code}, random_codes(2, seed=1))
        assert index.delete(["x", "never"]) == 1
        check_answers(index, {}, random_codes(2, seed=1))
    assert index.delete(["x", "never"]).unknown == 2


def test_deleting_what_is_not_there_commits_nothing(uri: str) -> None:
    index = create_index(uri, bits=64)
    removed = index.delete(["a", "b"])
    assert (removed, removed.unknown, index.version) == (0, 2, 1)


def test_existing_keys(uri: str) -> None:
    codes = random_codes(6)
    index = create_index(uri, bits=64)
    index.append(codes[:2], ["a", "b"])
    with pytest.raises(AlreadyExists, match="'b'"):
        index.append(codes[2:4], ["b", "c"])
    assert index.version == 2
    index.append(codes[2:4], ["b", "c"], on_existing="skip")
    check_answers(index, {"a": codes[0], "b": codes[1], "c": codes[3]}, codes)
    index.append(codes[4:6], ["b", "d"], on_existing="replace")
    check_answers(open_index(uri), {"a": codes[0], "b": codes[4], "c": codes[3], "d": codes[5]}, codes)
    assert index.append(codes[:1], ["a"], on_existing="skip") == index.version == 4


def test_apply_is_one_commit(uri: str) -> None:
    codes = random_codes(6)
    index = create_index(uri, bits=64)
    index.append(codes[:3], ["a", "b", "c"])
    done = index.apply(codes[3:5], ["b", "d"], removed=["a", "zz"], lineage={"collection": "here"})
    assert done == index_module.Applied(version=3, added=1, replaced=1, removed=1, unknown=1)
    check_answers(open_index(uri), {"b": codes[3], "c": codes[2], "d": codes[4]}, codes)
    assert index.collection_uri == "here"
    with pytest.raises(InvalidInput, match="added or removed, not both"):
        index.apply(codes[:1], ["b"], removed=["b"])


@pytest.mark.parametrize("pieces", [1, 50])
def test_the_number_of_shards_does_not_change_the_answers(tmp_path: Path, pieces: int) -> None:
    """Few distinct codes, so that nearly every place is decided by a tie, at the cut as well."""
    codes = random_codes(3, bits=16)[np.random.default_rng(5).integers(0, 3, 1000)]
    index = create_index(str(tmp_path / "index"), bits=16)
    for part in np.array_split(np.arange(1000), pieces):
        index.append(codes[part], [f"k{i}" for i in part])
    assert len(index.manifest["shards"]) == pieces
    check_answers(index, {f"k{i}": code for i, code in enumerate(codes)}, random_codes(3, bits=16), k=137)


def test_all_codes_equal(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "index"), bits=32)
    for part in range(3):
        index.append(np.zeros((400, 4), np.uint8), names(400, f"p{part}-"))
    index.delete(names(100, "p1-"))
    hits = index.search(np.zeros((1, 4), np.uint8), k=250)
    every = [f"p{part}-{i}" for part in range(3) for i in range(400) if part != 1 or i >= 100]
    np.testing.assert_array_equal(hits.ids[0], np.sort(ids_module.image_ids(every))[:250])


def test_batch_and_single_queries_give_the_same_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = create_index(str(tmp_path / "index"), bits=16)
    index.append(random_codes(500, bits=16), names(500))
    queries = random_codes(40, bits=16, seed=3)
    together = index.search(queries, k=30)
    single = [index.search(query[None], k=30).ids[0] for query in queries]
    np.testing.assert_array_equal(together.ids, np.stack(single))
    monkeypatch.setattr(index_module, "_RESULTS_AT_ONCE", 90)
    np.testing.assert_array_equal(together.ids, index.search(queries, k=30).ids)


@pytest.mark.parametrize("bits", [8, 16, 24, 64, 96, 1024])
def test_faiss_opens_the_shards_and_its_row_is_the_row_of_the_ids(tmp_path: Path, bits: int) -> None:
    codes, keys = random_codes(50, bits), names(50)
    index = create_index(str(tmp_path / "index"), bits=bits)
    index.append(codes, keys)
    entry = shard_files.parts(index.manifest["shards"][0])
    opened = faiss.read_index_binary(str(tmp_path / "index" / entry["codes"]["path"]))
    assert (opened.d, opened.ntotal) == (bits, 50)
    ids = np.load(tmp_path / "index" / entry["ids"]["path"])
    own = ids_module.image_ids(keys)
    np.testing.assert_array_equal(ids, np.sort(own))
    stored = np.stack([opened.reconstruct(row) for row in range(50)])
    np.testing.assert_array_equal(stored, codes[np.argsort(own)])
    distances, _ = opened.search(codes[:7], 10)
    np.testing.assert_array_equal(distances, index.search(codes[:7], 10).distances)


def test_what_is_written_is_what_faiss_writes(tmp_path: Path) -> None:
    codes = random_codes(33, bits=48)
    flat = faiss.IndexBinaryFlat(48)
    flat.add(codes)
    faiss.write_index_binary(flat, str(tmp_path / "faiss.bin"))
    assert (tmp_path / "faiss.bin").read_bytes() == shard_files.faiss_flat(codes)


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        (np.zeros((1, 4), np.uint8), r"uint8 \[N, 8\] for an index of 64 bits, found uint8 \[1, 4\]"),
        (np.full((1, 8), np.nan), "found float64"),
        (np.zeros((1, 8), np.int8), "found int8"),
        (np.zeros(8, np.uint8), r"found uint8 \[8\]"),
    ],
)
def test_codes_of_another_kind_are_refused(tmp_path: Path, codes: Any, told: str) -> None:
    index = create_index(str(tmp_path / "index"), bits=64)
    for call in (
        lambda: index.append(codes, ["a"]),
        lambda: index.search(codes, 1),
        lambda: index.search_within(codes, 1),
    ):
        with pytest.raises(InvalidInput, match=told):
            call()
    assert index.version == 1


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    codes = random_codes(2)
    index = create_index(str(tmp_path / "index"), bits=64, model="m1")
    bad: list[Callable[[], Any]] = [
        lambda: index.search(codes, 0),
        lambda: index.search(codes, -3),
        lambda: index.search(codes, 1.5),  # type: ignore[arg-type]
        lambda: index.search_within(codes, -1),
        lambda: index.append(codes, ["a"]),
        lambda: index.append(codes, ["a", "a"]),
        lambda: index.append(codes, ["a", ""]),
        lambda: index.append(codes, "ab"),
        lambda: index.append(codes, ["a", 3]),  # type: ignore[list-item]
        lambda: index.append(codes, ["a", "\ud800"]),
        lambda: index.append(codes, ["a", "b"], {"x": [1]}),
        lambda: index.append(codes, ["a", "b"], {"key": ["c", "d"]}),
        lambda: index.append(codes, ["a", "b"], model="m2"),
        lambda: index.append(codes, ["a", "b"], on_existing="maybe"),  # type: ignore[arg-type]
        lambda: create_index(str(tmp_path / "other"), bits=12),
    ]
    for call in bad:
        with pytest.raises(InvalidInput):
            call()
    assert open_index(str(tmp_path / "index")).version == 1
    with pytest.raises(NotFound, match="holds no index"):
        open_index(str(tmp_path / "nowhere"))
    with pytest.raises(NotFound, match="'zz'"):
        index.codes_of(["zz"])


def test_an_index_takes_the_model_of_its_first_rows(tmp_path: Path) -> None:
    codes = random_codes(4)
    index = create_index(str(tmp_path / "index"), bits=64)
    index.append(codes[:1], ["a"], model="m1")
    assert open_index(index.uri).model == "m1"
    with pytest.raises(InvalidInput, match="model m1, found codes of model m2"):
        index.append(codes[1:2], ["b"], model="m2")
    index.append(codes[2:3], ["c"])


def test_two_keys_with_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With eight ids for a first try, collisions are the rule: the later key takes the next salt, for good."""

    def crowded(key: str, salt: int = 0) -> int:
        return (sum(key.encode()) % 8) + 8 * salt

    monkeypatch.setattr(change, "image_id", crowded)
    monkeypatch.setattr(ids_module, "image_id", crowded)
    codes = random_codes(60)
    keys = [f"{i:02d}" for i in range(60)]
    index = create_index(str(tmp_path / "index"), bits=64)
    model: dict[str, Codes] = {}
    for part in np.array_split(np.random.default_rng(0).permutation(60), 7):
        index.append(codes[part], [keys[i] for i in part])
        model |= {keys[i]: codes[i] for i in part}
        check_answers(index, model, random_codes(2, seed=1), k=60)
    assert len(index.view.salts) >= 50
    assert index.delete(keys[:30]) == 30
    index.append(codes[:10], keys[:10])
    index.append(codes[::-1][:5], keys[55:], on_existing="replace")
    model = {**{k: c for k, c in model.items() if k >= "30"}, **dict(zip(keys[:10], codes[:10], strict=True))}
    model |= dict(zip(keys[55:], codes[::-1][:5], strict=True))
    check_answers(open_index(index.uri), model, random_codes(2, seed=1), k=60)


KEYS = st.lists(st.sampled_from([f"k{i}" for i in range(12)]), min_size=1, max_size=8, unique=True)
STEPS = st.one_of(
    st.tuples(st.just("append"), KEYS, st.sampled_from(["error", "replace", "skip"])),
    st.tuples(st.just("delete"), KEYS, st.just("")),
    st.tuples(st.just("apply"), KEYS, st.just("")),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=9), few=st.booleans(), seed=st.integers(0, 1000))
def test_any_history_equals_a_dict(tmp_path_factory: Any, steps: list[Any], few: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = random_codes(3 if few else 200, bits=16, seed=seed)
    index = create_index(str(tmp_path_factory.mktemp("h") / "index"), bits=16)
    model: dict[str, Codes] = {}
    for verb, keys, rule in steps:
        codes = pool[rng.integers(0, len(pool), len(keys))]
        if verb == "delete":
            assert index.delete(keys) == len(set(keys) & set(model))
            model = {key: code for key, code in model.items() if key not in keys}
        elif verb == "apply":
            half = len(keys) // 2
            index.apply(codes[:half], keys[:half], removed=keys[half:])
            model = {key: code for key, code in model.items() if key not in keys[half:]}
            model |= dict(zip(keys[:half], codes[:half], strict=True))
        elif rule == "error" and set(keys) & set(model):
            with pytest.raises(AlreadyExists):
                index.append(codes, keys)
        else:
            index.append(codes, keys, on_existing=rule)
            model |= {key: code for key, code in zip(keys, codes, strict=True) if rule != "skip" or key not in model}
        check_answers(open_index(index.uri), model, pool[:3], k=6)
    check_answers(index, model, pool[:3], k=6)


# Writers that meet


class Late:
    """Lets another writer commit first, just before this one's commit."""

    def __init__(self, index: Index, monkeypatch: pytest.MonkeyPatch, others: Iterator[Callable[[], Any]]) -> None:
        commit = index._log.commit

        def late(*args: Any, **kwargs: Any) -> Any:
            other = next(others, None)
            if other is not None:
                other()
            return commit(*args, **kwargs)

        monkeypatch.setattr(index._log, "commit", late)


def test_a_writer_that_comes_second_commits_upon_the_winner(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(8)
    index = create_index(uri, bits=64)
    winner = open_index(uri)
    Late(index, monkeypatch, iter([lambda: winner.append(codes[:2], ["a", "b"]), lambda: winner.delete(["a"])]))
    assert index.append(codes[2:4], ["c", "d"]) == 4
    check_answers(open_index(uri), {"b": codes[1], "c": codes[2], "d": codes[3]}, codes)


def test_a_writer_that_finds_nothing_to_do_looks_whether_that_is_still_so(uri: str) -> None:
    behind = create_index(uri, bits=64)
    open_index(uri).append(random_codes(1), ["a"])
    assert behind.delete(["a"]) == 1
    assert (behind.version, behind.rows) == (3, 0)


def test_what_the_winner_brought_already_is_dropped(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(8)
    index = create_index(uri, bits=64)
    winner = open_index(uri)
    Late(index, monkeypatch, iter([lambda: winner.append(codes[:2], ["a", "b"], {"digest": ["1", "2"]})]))
    index.append(codes[:3], ["a", "b", "c"], {"digest": ["1", "2", "3"]})
    check_answers(open_index(uri), dict(zip("abc", codes[:3], strict=True)), codes)
    assert [shard["rows"] for shard in open_index(uri).manifest["shards"]] == [2, 1]


@pytest.mark.parametrize("rule", ["error", "skip", "replace"])
def test_the_rule_for_existing_keys_is_applied_to_the_winners(
    uri: str, monkeypatch: pytest.MonkeyPatch, rule: Any
) -> None:
    codes = random_codes(8)
    index = create_index(uri, bits=64)
    winner = open_index(uri)
    Late(index, monkeypatch, iter([lambda: winner.append(codes[:2], ["a", "b"])]))
    if rule == "error":
        with pytest.raises(AlreadyExists):
            index.append(codes[4:6], ["b", "c"])
        check_answers(open_index(uri), {"a": codes[0], "b": codes[1]}, codes)
        return
    index.append(codes[4:6], ["b", "c"], on_existing=rule)
    check_answers(open_index(uri), {"a": codes[0], "b": codes[1 if rule == "skip" else 4], "c": codes[5]}, codes)


def test_two_models_conflict(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(2)
    index = create_index(uri, bits=64)
    winner = open_index(uri)
    Late(index, monkeypatch, iter([lambda: winner.append(codes[:1], ["a"], model="m1")]))
    with pytest.raises(Conflict, match="another model"):
        index.append(codes[1:], ["b"], model="m2")
    check_answers(open_index(uri), {"a": codes[0]}, codes)


def test_concurrent_appends_lose_nothing(uri: str) -> None:
    """Eight threads, some with an index of their own, some sharing one; keys overlap with equal content."""
    create_index(uri, bits=64)
    shared = open_index(uri)
    codes = random_codes(200)
    start = threading.Barrier(8)

    def write(writer: int) -> None:
        index = shared if writer % 2 else open_index(uri)
        start.wait()
        for turn in range(3):
            rows = np.arange(writer * 20 + turn * 7, writer * 20 + turn * 7 + 12)
            index.append(codes[rows], [f"k{i}" for i in rows], {"digest": [str(i) for i in rows]}, on_existing="skip")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    index = open_index(uri)
    wanted = {f"k{i}": codes[i] for w in range(8) for t in range(3) for i in range(w * 20 + t * 7, w * 20 + t * 7 + 12)}
    check_answers(index, wanted, random_codes(3, seed=1))
    assert [v["version"] for v in index.log()] == list(range(1, index.version + 1))
    check_answers(shared, wanted, random_codes(3, seed=1)) if shared.version == index.version else None


def test_searches_from_many_threads(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "index"), bits=64)
    for part in range(3):
        index.append(random_codes(2000, seed=part), names(2000, f"p{part}-"))
    index.delete(names(300, "p1-"))
    queries = random_codes(8, seed=9)
    alone = [open_index(index.uri).search(query[None], 20).ids for query in queries]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda query: index.search(query[None], 20).ids, queries))
            np.testing.assert_array_equal(found, alone)


# Files


def test_a_damaged_shard_is_found_when_it_is_opened(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "index"), bits=64)
    index.append(random_codes(100), names(100))
    path = tmp_path / "index" / shard_files.parts(index.manifest["shards"][0])["codes"]["path"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    with pytest.raises(Corrupt, match="checksum"):
        open_index(index.uri).search(random_codes(1), 1)
    path.unlink()
    with pytest.raises(NotFound, match="a committed version names it"):
        open_index(index.uri).search(random_codes(1), 1)


def test_a_damaged_cache_file_is_fetched_again(
    s3_endpoint: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://hashdist/{tmp_path.name}-cache/index"
    codes = random_codes(100)
    index = create_index(uri, bits=64)
    index.append(codes, names(100))
    monkeypatch.setattr(cache, "_RANGE_BYTES", 64)  # several ranges
    model = dict(zip(names(100), codes, strict=True))
    check_answers(open_index(uri), model, codes[:2])
    cached = sorted(path for path in own_cache.glob("??/*"))
    assert sorted(path.name for path in cached) == sorted(
        entry["sha256"] for entry in shard_files.files(index.manifest["shards"][0])
    )
    for path in cached:
        data = path.read_bytes()
        path.write_bytes(data[:-3] if path.name < "8" else bytes([data[0] ^ 1]) + data[1:])
    check_answers(open_index(uri), model, codes[:2])


def test_bytes_that_are_not_the_committed_ones_are_refused(s3_endpoint: str, tmp_path: Path) -> None:
    uri = f"s3://hashdist/{tmp_path.name}-bad/index"
    index = create_index(uri, bits=64)
    index.append(random_codes(10), names(10))
    name = shard_files.parts(index.manifest["shards"][0])["codes"]["path"]
    open_store(uri).put(name, b"something else")
    with pytest.raises(Corrupt, match="was committed, found"):
        open_index(uri).search(random_codes(1), 1)


def test_nothing_else_is_taken_for_an_index(tmp_path: Path) -> None:
    from hashdist.store.commit import Log

    Log(open_store(str(tmp_path / "run"))).commit({"kind": "run"}, 0)
    with pytest.raises(InvalidInput, match="kind 'run'"):
        open_index(str(tmp_path / "run"))


def test_the_public_names() -> None:
    assert hashdist.create_index is create_index
    assert hashdist.open_index is open_index
