"""Erasure: nothing under the root holds the image any more, and every version answers as before without it."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hashdist.ground import ids as ids_module
from hashdist.ground.errors import Conflict, InvalidInput, Refused
from hashdist.ground.settings import IndexSettings
from hashdist.index import Index, change, create_index, open_index, promotion
from hashdist.index.manifest import content, kept_numbers, successor
from hashdist.index.notes import SEEN
from hashdist.index.upkeep import retention, verification
from hashdist.index.upkeep.compaction import compact
from hashdist.index.upkeep.erasure import Erased, purge
from hashdist.store import open_store
from hashdist.store.commit import Log
from tests.worlds.faults import Crash, FaultyStore
from tests.worlds.index import check_answers, random_codes

History = dict[int, dict[str, Any]]


@pytest.fixture
def local(tmp_path: Path) -> str:
    return str(tmp_path / "local")


def check_history(uri: str, history: History, without: set[str]) -> None:
    for version, model in history.items():
        check_answers(
            open_index(uri, version=version), {key: code for key, code in model.items() if key not in without}
        )


def traces(root: str, *needles: bytes) -> list[str]:
    """Names of the objects under a root whose bytes hold one of the needles."""
    store = open_store(root)
    return [entry.name for entry in store.list() if any(needle in store.get(entry.name) for needle in needles)]


def needles(key: str, codes: Any, salt: int = 0) -> list[bytes]:
    """What an image would leave behind: key, id and codes."""
    number = ids_module.image_id(key, salt)
    return [key.encode(), str(number).encode(), number.to_bytes(8, "little"), *(code.tobytes() for code in codes)]


def grown(uri: str) -> tuple[Index, History, Any]:
    """`secret-one` joins, is changed, deleted, and joins again; `secret-two` stays; the last codes are theirs."""
    index = create_index(uri, bits=64)
    codes = random_codes(50)
    model: dict[str, Any] = {}
    history: History = {1: {}}

    def step(added: dict[str, Any], removed: tuple[str, ...] = ()) -> None:
        nonlocal model
        keys = list(added)
        table = {"digest": [f"digest of {key}" for key in keys], "labels": [[1]] * len(keys)}
        index.apply(np.stack([*added.values(), codes[0]])[: len(keys)], keys, table, removed=removed)
        model = {key: code for key, code in model.items() if key not in removed} | added
        history[index.version] = dict(model)

    step({f"a{i}": codes[i] for i in range(10)} | {"secret-one": codes[40]})
    step({"b1": codes[11], "secret-two": codes[41]}, ("a1", "a2"))
    step({"secret-one": codes[42], "b2": codes[12]})
    step({}, ("secret-one", "a3"))
    step({}, ("b2",))
    compact(index, IndexSettings(shard_rows=100))
    history[index.version] = dict(model)
    step({"c1": codes[13]})
    step({"secret-one": codes[43]})
    step({"secret-two": codes[44]})
    return index, history, codes[40:45]


def test_nothing_is_left_and_every_version_answers_without_it(uri: str, root_uri: str, own_cache: Path) -> None:
    index, history, codes = grown(uri)
    retention.tag(index, "release", 4)
    history[index.version] = history[index.version - 1]
    check_history(uri, history, set())
    secret = needles("secret-one", codes[[0, 2, 3]])
    assert len(traces(root_uri, *secret)) >= 6
    done = purge(index, ["secret-one"], reason="asked for on paper")
    assert (done.images, done.unnamed) == (1, 0)
    assert done.versions == sum("secret-one" in model for model in history.values())
    assert traces(root_uri, *secret) == []
    assert [
        path for path in own_cache.rglob("*") if path.is_file() and any(n in path.read_bytes() for n in secret)
    ] == []
    check_history(uri, history, {"secret-one"})
    assert "secret-one" not in list(open_index(uri, version="release").keys())
    check_answers(index, {key: code for key, code in history[max(history)].items() if key != "secret-one"})
    newest = open_index(uri).manifest
    assert newest["purge"]["reason"] == "asked for on paper"
    assert newest["purge"]["images"] == 1
    again = purge(open_index(uri), ["secret-one"])
    assert again == Erased(index.version, 0, 0, 0, 0, 0)


def test_life_goes_on_after_a_purge(local: str) -> None:
    """A second purge, a rollback to before the first, deletes, a compaction, and the key once more."""
    index, history, codes = grown(local)
    purge(index, ["secret-one"])
    first = index.version
    rewrites = set(index.manifest["rewrites"])
    index.delete(["a4"])
    done = purge(index, ["secret-two", "a5", "never"])
    assert done.images == 2
    assert traces(local, *needles("secret-two", codes[[1, 4]]), *needles("secret-one", codes[[0, 2, 3]])) == []
    without = {"secret-one", "secret-two", "a5"}
    check_history(local, history, without)
    assert rewrites - set(index.manifest["rewrites"]) == set()
    last = {key: code for key, code in history[max(history)].items() if key not in without}
    check_answers(open_index(local, version=first), last)
    retention.rollback(index, 3)
    check_answers(index, {key: code for key, code in history[3].items() if key not in without})
    compact(index, IndexSettings(shard_rows=100), everything=True)
    index.append(codes[:1], ["secret-one"])
    check_answers(
        open_index(local), {**{k: c for k, c in history[3].items() if k not in without}, "secret-one": codes[0]}
    )
    check_history(local, history, without)
    purge(index, ["secret-one"])
    assert traces(local, *needles("secret-one", codes[[0, 2, 3]])) == []
    check_history(local, history, without)


def test_an_image_that_is_everything(local: str) -> None:
    index = create_index(local, bits=64)
    codes = random_codes(2)
    index.append(codes[:1], ["secret-one"], {"digest": ["x"]})
    index.delete(["secret-one"])
    index.append(codes[1:], ["secret-one"], {"digest": ["y"]})
    purge(index, ["secret-one"])
    assert traces(local, *needles("secret-one", codes)) == []
    assert (index.manifest["shards"], index.manifest["tombstones"], index.rows) == ([], [], 0)
    for version in range(1, 6):
        check_answers(open_index(local, version=version), {})


def test_a_candidate_and_notes_are_erased_too(uri: str, root_uri: str) -> None:
    index, _, codes = grown(uri)
    notes = SEEN.empty_table().to_pylist()
    for key in ("secret-one", "other"):
        said = {"digest": "d", "size": 5, "stamp": "s", "status": "unreadable", "reason": "no image"}
        notes.append({"id": ids_module.image_id(key), "key": key, **said})
    notes.sort(key=lambda note: note["id"])
    index.apply(codes[:0], [], seen=pa.Table.from_pylist(notes, SEEN))

    def refuses(served: Any, proposed: Any) -> dict[str, Any]:
        return {"passed": False, "checks": [{"name": "no", "passed": False, "value": 0, "limit": 1, "text": "no"}]}

    with pytest.raises(Refused):
        index.apply(random_codes(2, seed=8), ["secret-three", "d1"], gate=refuses)
    index = open_index(uri)
    secret = [*needles("secret-three", random_codes(1, seed=8)), *needles("secret-one", codes[[0, 2, 3]])]
    purge(index, ["secret-one", "secret-three"])
    assert traces(root_uri, *secret) == []
    assert [row["key"] for row in index.view.notes(ids_module.image_ids(["secret-one", "other"])).to_pylist()] == [
        "other"
    ]
    candidate = open_index(uri, candidate=True)
    assert "d1" in list(candidate.keys())
    assert candidate.rows == len(list(candidate.keys()))
    promotion.discard(index)
    check_answers(open_index(uri), dict(zip(index.keys(), index.codes_of(list(index.keys())), strict=True)))


def test_former_candidates_and_expired_versions(local: str) -> None:
    """Files that only these name cannot be read by anybody, and go."""
    index, _, codes = grown(local)

    def refuses(served: Any, proposed: Any) -> dict[str, Any]:
        return {"passed": False, "checks": []}

    with pytest.raises(Refused):
        index.apply(random_codes(2, seed=8), ["secret-three", "d1"], gate=refuses)
    index = open_index(local)
    promotion.discard(index)
    secret = needles("secret-three", random_codes(1, seed=8))
    assert traces(local, *secret)
    done = purge(index, ["secret-three"])
    assert (done.images, traces(local, *secret)) == (0, [])
    log = index.versions
    head = index.view.version
    log.commit(successor(head, "vacuum", kept={"expired": [[1, head.number]]}), head.number)
    index.refresh()
    index.delete(["secret-two"])
    purge(index, ["secret-one", "secret-two"])
    assert traces(local, *needles("secret-one", codes[[0, 2, 3]]), *needles("secret-two", codes[[1, 4]])) == []
    assert index.rows == len(list(open_index(local).keys()))


def test_a_purge_after_a_vacuum(local: str) -> None:
    """What stood in the place of files of versions that are expired now is erased as well."""
    index, history, codes = grown(local)
    purge(index, ["secret-one"])
    purge(index, ["a4"])
    retention.tag(index, "kept", 5)
    retention.vacuum(index, 0.0, force=True)
    purge(index, ["secret-two"])
    assert traces(local, *needles("secret-one", codes[[0, 2, 3]]), *needles("secret-two", codes[[1, 4]])) == []
    check_history(local, {5: history[5]}, {"secret-one", "secret-two", "a4"})
    assert verification.verify(index).faults == []


def test_keys_with_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ids for a first try: erasing a key leaves its neighbours, and what hides their old rows, alone."""

    def crowded(key: str, salt: int = 0) -> int:
        return (sum(key.encode()) % 8) + 8 * salt

    monkeypatch.setattr(change, "image_id", crowded)
    monkeypatch.setattr(ids_module, "image_id", crowded)
    index = create_index(str(tmp_path / "i"), bits=64)
    codes, keys = random_codes(120), [f"{i:02d}" for i in range(40)]
    model: dict[str, Any] = {}
    history: History = {}
    rng = np.random.default_rng(3)
    for turn in range(8):
        part = rng.choice(40, 12, replace=False)
        index.append(codes[turn * 12 : turn * 12 + 12], [keys[i] for i in part], on_existing="replace")
        model |= {keys[i]: codes[turn * 12 + n] for n, i in enumerate(part)}
        history[index.version] = dict(model)
        gone = [keys[i] for i in rng.choice(40, 4, replace=False)]
        index.delete(gone)
        model = {key: code for key, code in model.items() if key not in gone}
        history[index.version] = dict(model)
    without: set[str] = set()
    for some in (["03"], ["11", "19", "04"], keys[20:30]):
        purge(index, some)
        without |= set(some)
        check_history(index.uri, history, without)
        assert not set(open_index(index.uri).view.salts) & without


def test_a_writer_that_was_first_is_searched_too(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, history, codes = grown(local)
    other = open_index(local)
    new = random_codes(2, seed=5)
    winners: Iterator[Callable[[], Any]] = iter(
        [lambda: other.append(new, ["secret-one", "z"], on_existing="replace"), lambda: other.delete(["secret-two"])]
    )
    commit = index._log.commit

    def late(*args: Any, **kwargs: Any) -> Any:
        next(winners, lambda: None)()
        return commit(*args, **kwargs)

    monkeypatch.setattr(index._log, "commit", late)
    purge(index, ["secret-one"])
    assert traces(local, *needles("secret-one", [*codes[[0, 2, 3]], new[0]])) == []
    check_history(local, history, {"secret-one"})
    last = {k: c for k, c in history[max(history)].items() if k not in ("secret-one", "secret-two")}
    check_answers(open_index(local), {**last, "z": new[1]})


def test_what_was_planned_before_a_purge_is_not_committed(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compaction plans again; a change keeps its rows; content of before is refused."""
    index, history, _ = grown(local)
    other, third = open_index(local), open_index(local)
    commit = index._log.commit
    winners = iter([lambda: purge(other, ["secret-one"])])

    def late(*args: Any, **kwargs: Any) -> Any:
        next(winners, lambda: None)()
        return commit(*args, **kwargs)

    monkeypatch.setattr(index._log, "commit", late)
    compact(index, IndexSettings(shard_rows=100), everything=True)
    last = {k: c for k, c in history[max(history)].items() if k != "secret-one"}
    check_answers(open_index(local), last)
    code = random_codes(1, seed=6)
    third.append(code, ["new"])
    check_answers(open_index(local), {**last, "new": code[0]})
    old = content(third.versions.read(3).manifest)
    with pytest.raises(Conflict, match="erased"):
        third.transact(lambda view, tried: successor(view.version, "restore", old))


def test_what_is_refused(local: str) -> None:
    index, _, _ = grown(local)
    with pytest.raises(InvalidInput, match="at least one key"):
        purge(index, [])
    with pytest.raises(InvalidInput, match="name no image"):
        purge(index, ["secret-one"], reason="secret-one asked for it")
    before = index.version
    assert purge(index, ["never was here"]) == Erased(before, 0, 0, 0, 0, 0)


def test_unnamed_files_are_counted(local: str) -> None:
    index, _, _ = grown(local)
    index.store.put(f"shards/{'0' * 32}/lost.bin", b"secret-one")
    assert purge(index, ["secret-one"]).unnamed == 1


def test_killed_at_any_storage_call_and_run_again(tmp_path: Path) -> None:
    made, history, codes = grown(str(tmp_path / "made"))
    some = {version: history[version] for version in (2, 6, max(history))}
    secret = needles("secret-one", codes[[0, 2, 3]])
    at, finished = 0, False
    while not finished:
        folder = str(shutil.copytree(tmp_path / "made", tmp_path / str(at)))
        calls = CrashesAt(at)
        index = Index(Log(FaultyStore(open_store(folder), calls=calls)), made.view.version)
        try:
            purge(index, ["secret-one"])
            finished = True
        except Crash:
            erased = open_index(folder).version > made.version
            check_history(folder, some, {"secret-one"} if erased else set())
        assert calls.seen == at + (not finished)
        purge(open_index(folder), ["secret-one"])
        assert traces(folder, *secret) == []
        check_history(folder, some if at % 10 else history, {"secret-one"})
        shutil.rmtree(folder)
        at += 1
    assert at > 30


class CrashesAt:
    """Lets so many storage calls through; after that the process is dead."""

    def __init__(self, calls: int) -> None:
        self.seen, self._calls, self._lock = 0, calls, threading.Lock()

    def __call__(self, _: str) -> None:
        with self._lock:
            dead = self.seen >= self._calls
            self.seen = min(self.seen + 1, self._calls + 1)
        if dead:
            raise Crash


KEYS = st.lists(st.sampled_from([f"k{i}" for i in range(8)]), min_size=1, max_size=5, unique=True)
STEPS = st.one_of(
    st.tuples(st.just("append"), KEYS),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("purge"), KEYS.map(lambda keys: keys[:2])),
    st.tuples(st.sampled_from(["compact", "rollback", "tag", "vacuum"]), st.just([])),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=14), seed=st.integers(0, 1000))
def test_any_history_equals_dicts(tmp_path_factory: Any, steps: list[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder = str(tmp_path_factory.mktemp("h") / "i")
    index = create_index(folder, bits=64)
    model: dict[str, Any] = {}
    history: History = {1: {}}
    codes_of: dict[str, list[Any]] = {}
    for verb, keys in steps:
        if verb == "append":
            codes = random_codes(len(keys), seed=int(rng.integers(1 << 30)))
            index.append(codes, keys, on_existing="replace")
            model |= dict(zip(keys, codes, strict=True))
            for key, code in zip(keys, codes, strict=True):
                codes_of.setdefault(key, []).append(code)
        elif verb == "delete":
            index.delete(keys)
            model = {key: code for key, code in model.items() if key not in keys}
        elif verb == "purge":
            purge(index, keys)
            model = {key: code for key, code in model.items() if key not in keys}
            history = {v: {k: c for k, c in then.items() if k not in keys} for v, then in history.items()}
            for key in keys:
                assert traces(folder, *needles(key, codes_of.pop(key, []))[1:]) == []
        elif verb == "compact":
            compact(index, IndexSettings(shard_rows=9), everything=bool(rng.integers(2)))
        elif verb == "rollback":
            to = int(rng.choice(list(history)))
            retention.rollback(index, to)
            model = dict(history[to])
        elif verb == "tag":
            retention.tag(index, f"t{index.version}", int(rng.choice(list(history))))
        else:
            retention.vacuum(index, 0.0, force=True)
            history = {version: history[version] for version in kept_numbers(index.manifest) if version in history}
        history[index.version] = dict(model)
        check_answers(open_index(folder), model)
    check_history(folder, history, set())
