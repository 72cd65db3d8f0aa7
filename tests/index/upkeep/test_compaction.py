"""Compaction: the same answers from fewer, fuller shards, whatever other writers do meanwhile."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hashdist.ground import ids as ids_module
from hashdist.ground.errors import Conflict
from hashdist.ground.settings import IndexSettings
from hashdist.index import Index, create_index, open_index
from hashdist.index.shards.shard import Rows, write_shard
from hashdist.index.upkeep import compaction
from hashdist.index.upkeep.compaction import compact, due
from hashdist.store import open_store
from hashdist.store.commit import Log
from tests.worlds.faults import Crash, FaultyStore
from tests.worlds.index import check_answers, random_codes

FEW = IndexSettings(shard_rows=100, compact_small_shards=3)


def grown(uri: str, appends: int = 6, rows: int = 12) -> tuple[Index, dict[str, Any]]:
    """An index of several shards with deletes and changes between them."""
    index = create_index(uri, bits=64)
    codes = random_codes(appends * rows)
    model: dict[str, Any] = {}
    for part in range(appends):
        mine = range(part * rows, (part + 1) * rows)
        keys = [f"k{i}" for i in mine]
        index.append(codes[mine], keys, {"digest": keys})
        model |= dict(zip(keys, codes[mine], strict=True))
        if part:
            gone = [f"k{i}" for i in range((part - 1) * rows, (part - 1) * rows + 3)]
            index.delete(gone)
            model = {key: code for key, code in model.items() if key not in gone}
    index.append(codes[:2][::-1], ["k0", "k5"], {"digest": ["new", "new"]}, on_existing="replace")
    return index, model | {"k0": codes[1], "k5": codes[0]}


def test_small_shards_become_one_and_hidden_rows_go(uri: str) -> None:
    index, model = grown(uri)
    assert "7 shards of fewer than 25 rows" in str(due(index.manifest, replace(FEW, compact_dead_share=0.5)))
    assert "16 of 74 rows" in str(due(index.manifest, FEW))
    total = sum(shard["rows"] for shard in index.manifest["shards"])
    done = compact(index, FEW)
    assert (done.version, done.shards, done.merged) == (index.version, (7, 1), 7)
    assert done.dropped == total - len(model)
    assert done.tombstones[1] == 0 == len(index.manifest["tombstones"])
    assert due(index.manifest, FEW) is None
    for opened in (index, open_index(uri)):
        check_answers(opened, model)
    table = next(index.tables(["digest"]))
    assert dict(zip(table["key"].to_pylist(), table["digest"].to_pylist(), strict=True)) == {
        key: "new" if key in ("k0", "k5") else key for key in model
    }
    again = compact(index, FEW)
    assert (again.version, again.merged) == (done.version, 0)
    assert compact(index, FEW, everything=True).version == done.version


def test_older_versions_answer_as_before(uri: str) -> None:
    index, model = grown(uri)
    before = index.version
    compact(index, FEW)
    check_answers(open_index(uri, version=before), model)


def test_a_dry_run_changes_nothing(uri: str) -> None:
    index, model = grown(uri)
    stored = {entry.name for entry in open_store(uri).list()}
    planned = compact(index, FEW, dry_run=True)
    assert stored == {entry.name for entry in open_store(uri).list()}
    done = compact(index, FEW)
    assert planned[3:5] == done[3:5]
    assert planned.read == done.read
    check_answers(index, model)


def test_due_by_dead_rows_and_by_deletions(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "i"), bits=64)
    codes, keys = random_codes(100), [f"k{i}" for i in range(100)]
    index.append(codes, keys)
    assert due(index.manifest, FEW) is None
    index.delete(keys[:20])
    assert due(index.manifest, FEW) is None
    index.delete(keys[20:21])
    assert "21 of 100 rows" in str(due(index.manifest, FEW))
    compact(index, FEW)
    assert (due(index.manifest, FEW), index.manifest["shards"][0]["rows"]) == (None, 79)
    for key in keys[30:33]:
        index.delete([key])
    assert "3 files of deletions" in str(due(index.manifest, FEW))
    done = compact(index, FEW)
    assert (done.merged, done.tombstones) == (0, (3, 1))
    assert due(index.manifest, FEW) is None
    check_answers(index, {k: c for k, c in zip(keys[21:], codes[21:], strict=True) if k not in keys[30:33]})
    index.delete(keys)
    assert compact(index, FEW).shards == (1, 0)
    check_answers(open_index(index.uri), {})


def test_tombstones_of_shards_that_stay(tmp_path: Path) -> None:
    """A big shard between small ones keeps what hides its rows, and no more."""
    index = create_index(str(tmp_path / "i"), bits=64)
    codes = random_codes(130)
    keys = [f"k{i}" for i in range(130)]
    index.append(codes[:100], keys[:100])
    index.append(codes[100:110], keys[100:110])
    index.delete([keys[3], keys[100]])
    index.append(codes[110:120], keys[110:120])
    index.delete([keys[4], keys[101], keys[111]])
    index.append(codes[120:], keys[120:])
    index.append(codes[:1], [keys[4]])
    index.delete([keys[112]])
    done = compact(index, FEW)
    assert done.merged == 4
    assert done.tombstones == (3, 1)
    assert index.manifest["tombstones"][0]["rows"] == 2
    model = {k: c for i, (k, c) in enumerate(zip(keys, codes, strict=True)) if i not in (3, 4, 100, 101, 111, 112)}
    check_answers(open_index(index.uri), model | {keys[4]: codes[0]})


def test_no_shard_is_larger_than_the_setting_and_ids_ascend(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "i"), bits=64)
    codes, keys = random_codes(500), [f"k{i}" for i in range(500)]
    for part in np.array_split(np.arange(500), 23):
        index.append(codes[part], [keys[i] for i in part])
    compact(index, FEW)
    assert max(shard["rows"] for shard in index.manifest["shards"]) <= 100
    assert len(index.manifest["shards"]) <= 7
    compact(index, replace(FEW, shard_rows=30), everything=True)
    for number, shard in enumerate(index.view.shards):
        assert (np.diff(shard.ids) > 0).all()
        assert shard.rows == index.manifest["shards"][number]["rows"] <= 100
    compact(index, replace(FEW, shard_rows=1000), everything=True)
    assert len(index.manifest["shards"]) == 1
    check_answers(index, dict(zip(keys, codes, strict=True)))


def test_columns_are_united(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "i"), bits=64)
    codes = random_codes(8)
    index.append(codes[:1], ["a"])
    index.append(codes[1:2], ["b"], {"digest": ["1"], "labels": pa.array([[1]], pa.list_(pa.int32()))})
    index.append(codes[2:3], ["c"], {"labels": pa.array([[2, 3]], pa.list_(pa.int64())), "taken": [2020]})
    index.append(codes[3:4], ["d"], {"digest": pa.array([None], pa.string())})
    index.append(codes[4:5], ["e"], {"taken": ["a text"]})
    index.append(codes[5:6], ["f"], {"taken": [2.5]})
    names = ["digest", "labels", "taken"]

    def rows() -> dict[str, Any]:
        return {row["key"]: row for table in index.tables(names) for row in table.to_pylist()}

    before = rows()
    compact(index, FEW)
    assert len(index.manifest["shards"]) == 3  # texts and floats do not go with whole numbers
    assert rows() == before
    check_answers(index, dict(zip("abcdef", codes, strict=False)))


def test_further_files_of_a_shard_go_along(uri: str) -> None:
    """Float16 rows beside the codes, of two widths: each row keeps its own, and widths are not mixed."""
    index = create_index(uri, bits=64)
    names = index.versions.new_attempt()
    codes, features = random_codes(40), np.random.default_rng(1).normal(size=(40, 4)).astype(np.float16)
    shards = []
    for first in range(0, 40, 10):
        mine, keys = slice(first, first + 10), [f"k{i}" for i in range(first, first + 10)]
        arrays = {"rerank": features[mine, : 4 if first < 30 else 2]}
        rows = Rows(ids_module.image_ids(keys), codes[mine], keys, pa.table({}), arrays)
        shards.append(write_shard(index.store, lambda suffix: names.new("shards", suffix), rows))
    index.publish(shards, bits=64, salts={}, model="m", model_uri="", lineage={})
    index.delete(["k3", "k17"])
    compact(index, FEW, everything=True)
    assert sorted(shard.array("rerank").shape for shard in index.view.shards) == [(10, 2), (28, 4)]
    for shard in open_index(uri).view.shards:
        array = shard.array("rerank")
        for row, key in enumerate(shard.keys()):
            np.testing.assert_array_equal(array[row], features[int(key[1:]), : array.shape[1]])


def test_salts_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(key: str, salt: int = 0) -> int:
        return (sum(key.encode()) % 8) + 8 * salt

    from hashdist.index import change

    monkeypatch.setattr(change, "image_id", crowded)
    monkeypatch.setattr(ids_module, "image_id", crowded)
    index = create_index(str(tmp_path / "i"), bits=64)
    codes, keys = random_codes(40), [f"{i:02d}" for i in range(40)]
    for part in np.array_split(np.random.default_rng(0).permutation(40), 6):
        index.append(codes[part], [keys[i] for i in part])
    salts = dict(index.view.salts)
    assert len(index.manifest["salts"]) > 1
    compact(index, FEW)
    assert len(index.manifest["salts"]) == 1
    assert open_index(index.uri).view.salts == salts
    np.testing.assert_array_equal(index.codes_of(keys), codes)


# Random histories

KEYS = st.lists(st.sampled_from([f"k{i}" for i in range(12)]), min_size=1, max_size=8, unique=True)
STEPS = st.one_of(
    st.tuples(st.just("append"), KEYS, st.sampled_from(["replace", "skip"])),
    st.tuples(st.just("delete"), KEYS, st.just("")),
    st.tuples(st.just("compact"), st.just([]), st.sampled_from(["", "everything", "race"])),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=12), seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_any_history_equals_a_dict(tmp_path_factory: Any, steps: list[Any], seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    index = create_index(str(tmp_path_factory.mktemp("h") / "i"), bits=64)
    chosen = IndexSettings(shard_rows=9, compact_small_shards=2, compact_small_share=0.6, compact_dead_share=share)
    model: dict[str, Any] = {}
    history = {1: {}}
    for verb, keys, rule in steps:
        before = dict(model)
        if verb == "append":
            codes = random_codes(len(keys), seed=int(rng.integers(1 << 30)))
            index.append(codes, keys, on_existing=rule)
            model |= {key: code for key, code in zip(keys, codes, strict=True) if rule == "replace" or key not in model}
        elif verb == "delete":
            index.delete(keys)
            model = {key: code for key, code in model.items() if key not in keys}
        else:
            compact(index, chosen, everything=rule == "everything")
            assert due(index.manifest, chosen) is None or "files of deletions" in str(due(index.manifest, chosen))
        history |= {version: dict(before) for version in range(max(history) + 1, index.version)}
        history[index.version] = dict(model)
        check_answers(open_index(index.uri), model)
    for version, then in history.items():
        check_answers(open_index(index.uri, version=version), then)


# Writers that meet


def meets(index: Index, monkeypatch: pytest.MonkeyPatch, others: Iterator[Callable[[], Any]]) -> None:
    """Another writer commits just before this one's commit."""
    commit = index._log.commit

    def late(*args: Any, **kwargs: Any) -> Any:
        other = next(others, None)
        if other is not None:
            other()
        return commit(*args, **kwargs)

    monkeypatch.setattr(index._log, "commit", late)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The versions that were planned upon."""
    seen: list[int] = []
    of = compaction._CompactionPlan.of

    def counted(view: Any, *args: Any) -> Any:
        seen.append(view.number)
        return of(view, *args)

    monkeypatch.setattr(compaction._CompactionPlan, "of", counted)
    return seen


def test_an_append_meanwhile_does_not_matter(uri: str, monkeypatch: pytest.MonkeyPatch, plans: list[int]) -> None:
    index, model = grown(uri)
    codes, winner = random_codes(3, seed=5), open_index(uri)
    meets(index, monkeypatch, iter([lambda: winner.append(codes, ["x", "y", "z"])]))
    done = compact(index, FEW)
    assert (done.merged, len(plans), done.version) == (7, 1, index.version)
    check_answers(open_index(uri), model | dict(zip("xyz", codes, strict=True)))
    assert open_index(uri).delete(["x", "k8"]) == 2
    check_answers(open_index(uri), {k: c for k, c in (model | {"y": codes[1], "z": codes[2]}).items() if k != "k8"})


def test_a_delete_elsewhere_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plans: list[int]) -> None:
    index, model = grown(str(tmp_path / "i"))
    codes = random_codes(60, seed=5)
    index.append(codes, [f"big{i}" for i in range(60)])
    winner = open_index(index.uri)
    meets(index, monkeypatch, iter([lambda: winner.delete(["big7"])]))
    assert compact(index, FEW).merged == 7
    assert len(plans) == 1
    check_answers(open_index(index.uri), model | {f"big{i}": codes[i] for i in range(60) if i != 7})


@pytest.mark.parametrize("verb", ["delete", "replace", "delete and add again"])
def test_a_row_that_the_winner_hid_never_comes_back(
    uri: str, monkeypatch: pytest.MonkeyPatch, verb: str, plans: list[int]
) -> None:
    index, model = grown(uri)
    code, winner = random_codes(1, seed=5), open_index(uri)

    def other() -> None:
        if verb != "replace":
            winner.delete(["k8"])
        if verb != "delete":
            winner.append(code, ["k8"], on_existing="replace")

    meets(index, monkeypatch, iter([other]))
    first = index.versions.new_attempt
    attempts: list[Any] = []
    monkeypatch.setattr(index._log, "new_attempt", lambda: attempts.append(first()) or attempts[-1])
    done = compact(index, FEW)
    assert len(plans) == 2
    wanted = {key: c for key, c in model.items() if key != "k8"} | ({} if verb == "delete" else {"k8": code[0]})
    check_answers(open_index(uri), wanted)
    assert done.dropped == sum(s["rows"] for s in open_index(uri, plans[-1]).manifest["shards"]) - len(wanted)
    named = str(open_index(uri).manifest)
    assert attempts[0].attempt not in named
    assert attempts[1].attempt in named


def test_two_compactions_at_once(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, model = grown(uri)
    winner = open_index(uri)
    meets(index, monkeypatch, iter([lambda: compact(winner, FEW)]))
    done = compact(index, FEW)
    assert (done.version, done.merged) == (winner.version, 0)
    check_answers(open_index(uri), model)


def test_other_content_meanwhile(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build replaces all content, of another model: what was planned is forgotten."""
    index, _ = grown(uri)
    winner, code = open_index(uri), random_codes(1, seed=7)

    def build() -> None:
        names = winner.versions.new_attempt()
        rows = Rows(ids_module.image_ids(["n"]), code, ["n"], pa.table({}))
        shard = write_shard(winner.store, lambda suffix: names.new("shards", suffix), rows)
        winner.publish([shard], bits=64, salts={}, model="m2", model_uri="", lineage={})

    meets(index, monkeypatch, iter([build]))
    assert compact(index, FEW).merged == 0
    check_answers(open_index(uri), {"n": code[0]})
    assert open_index(uri).model == "m2"


def test_it_gives_up_where_its_inputs_change_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, model = grown(str(tmp_path / "i"))
    winner = open_index(index.uri)
    meets(index, monkeypatch, (lambda key=key: winner.delete([key]) for key in list(model)))
    with pytest.raises(Conflict, match="changed what was being compacted"):
        compact(index, FEW)
    check_answers(open_index(index.uri), {key: model[key] for key in list(model)[4:]})


# Crashes and memory


def test_killed_at_any_storage_call_and_run_again(tmp_path: Path) -> None:
    """At every call: the version before or the whole compaction, and the next run ends like one never killed."""
    calls = crash_at(tmp_path / "count", None)
    assert calls > 5
    for at in range(calls):
        assert crash_at(tmp_path / str(at), at) == at


def crash_at(folder: Path, at: int | None) -> int:
    """Compact an index of its own and die at storage call `at`; the number of calls before."""
    made, model = grown(str(folder), appends=3, rows=4)
    seen = 0

    def call(_: str) -> None:
        nonlocal seen
        if seen == at:
            raise Crash
        seen += 1

    log = Log(FaultyStore(open_store(made.uri), calls=call))
    index = Index(log, made.versions.read(made.version))
    try:
        done = compact(index, FEW)
        assert at is None or done.version
    except Crash:
        check_answers(open_index(made.uri), model)
    compact(open_index(made.uri), FEW)
    after = open_index(made.uri)
    assert len(after.manifest["shards"]) == 1
    check_answers(after, model)
    return seen


@pytest.mark.full
def test_memory_is_bounded_by_one_shard(tmp_path: Path) -> None:
    """Three times the shards, the same peak, in a process of its own."""
    peaks = [peak_mb(tmp_path / str(shards), shards) for shards in (2, 6)]
    assert peaks[1] < peaks[0] * 1.35 + 10, peaks


def peak_mb(folder: Path, outputs: int) -> float:
    """Peak of anonymous memory while compacting into so many shards of 50,000 rows."""
    import subprocess
    import sys

    work = f"""
import threading, time, numpy as np
from hashdist.index import create_index
from hashdist.index.upkeep.compaction import compact
from hashdist.ground.settings import IndexSettings
index = create_index({str(folder)!r}, bits=256)
codes = np.zeros((12_500, 32), np.uint8)
for part in range({outputs * 4}):
    keys = [f"a-rather-long-folder/of-images/{{part}}-{{i}}" for i in range(12_500)]
    index.append(codes, keys, {{"digest": keys}})
del keys, codes
def anonymous():
    return sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
made = compact(index, IndexSettings(shard_rows=50_000, compact_small_share=0.9))
done = True; thread.join()
assert made.shards[1] == {outputs}, made
print((peak - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", work], check=True, capture_output=True, text=True, env=dict(os.environ))
    return float(out.stdout)
