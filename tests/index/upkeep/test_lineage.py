"""Artefacts that no kept version was made from: what is reached, what is withdrawn, in which order; killed anywhere."""

import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hashdist import cli
from hashdist.ground.errors import NotFound
from hashdist.index import Index, create_index, open_index, pins
from hashdist.index.upkeep import retention
from hashdist.index.upkeep.lineage import Withdrawn, vacuum_artefacts
from hashdist.store import Store, commit, open_store
from hashdist.store.commit import Artefact, Log, artefact, read_file, write_file
from tests.worlds.faults import Crash, FaultyStore
from tests.worlds.index import codes_of

DAY = 86_400.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_pause_s", lambda attempt: 0.0)


@pytest.fixture
def root(root_uri: str) -> Store:
    return open_store(root_uri)


def later(days: float) -> Callable[[Store], float]:
    return lambda store: pins.store_time(store) + days * DAY


def made(root: Store, kind: str, *inputs: Artefact, salt: str = "") -> Artefact:
    """An artefact of two parts, committed as a stage does it."""
    one = artefact(root, kind, inputs={a.kind: a.name for a in inputs}, settings={}, revision=1, salt=salt)
    records = [one.publish_part(n, {"file": write_file(one.store, one.new_name(".bin"), b"part")}) for n in range(2)]
    lineage = {a.kind: {"uri": a.uri, "digest": a.name} for a in inputs}
    one.publish({"inputs": lineage, "rows": 2, "files": [record["file"] for record in records]})
    return one


def chain(root: Store, salt: str = "") -> list[Artefact]:
    """Collection, features, graph, model, codes."""
    collection = made(root, "collections", salt=salt)
    features = made(root, "features", collection)
    graph = made(root, "graphs", features)
    model = made(root, "models", graph, features)
    return [collection, features, graph, model, made(root, "codes", model, features)]


def index_of(root: Store, codes: Artefact, model: Artefact, collection: Artefact, name: str = "a") -> Index:
    index = create_index(root.child(f"indexes/{name}").uri, bits=16)
    about = {"built_from": codes.name, "collection": collection.uri, "model_uri": model.uri}
    index.apply(codes_of([1]), ["a"], lineage=about)
    return index


def whole(one: Artefact) -> bool:
    """Whether it can be read in full; an error where it is there in part."""
    fresh = Artefact.at(one.store, one.kind, one.name)
    if not fresh.exists():
        return False
    assert all(read_file(fresh.store, entry) == b"part" for entry in fresh.manifest()["files"])
    return True


def names(root: Store, one: Artefact) -> list[str]:
    return [entry.name for entry in root.list(f"{one.kind}/{one.name}/")]


def test_what_a_kept_version_was_made_from_stays_and_the_rest_goes_in_two_steps(root: Store) -> None:
    used, unused = chain(root, "used"), chain(root, "unused")
    index_of(root, used[4], used[3], used[0])
    done = vacuum_artefacts(root, 7 * DAY, clock=later(6))
    assert (done.withdrawn, done.reached) == ([], 10)
    dry = vacuum_artefacts(root, 7 * DAY, dry_run=True, clock=later(8))
    assert all(map(whole, used + unused))
    done = vacuum_artefacts(root, 7 * DAY, clock=later(8))
    assert done.withdrawn == dry.withdrawn
    assert set(done.withdrawn) == {f"{one.kind}/{one.name}" for one in unused}
    assert (done.reached, done.deleted, done.blocked) == (5, {}, "")
    assert all(map(whole, used))
    assert not any(map(whole, unused))
    kept_by_readers = [name for one in unused for name in names(root, one) if "/data/" in name]
    assert len(kept_by_readers) == 10
    done = vacuum_artefacts(root, 7 * DAY, clock=later(6))
    assert (done.withdrawn, done.deleted, done.waiting) == ([], {}, 40)
    done = vacuum_artefacts(root, 7 * DAY, clock=later(8))
    assert done.deleted["withdrawn"][0] == 15  # 10 files, 5 marks
    assert [names(root, one) for one in unused] == [[]] * 5
    assert all(map(whole, used))
    assert vacuum_artefacts(root, 7 * DAY, clock=later(30)) == Withdrawn(reached=5)


def test_versions_that_can_be_opened_reach_what_they_were_made_from(root: Store) -> None:
    """Three versions from three codes; a tag holds one, another index a fourth, a caller a fifth."""
    codes = [made(root, "codes", salt=str(n)) for n in range(6)]
    index = create_index(root.child("indexes/a").uri, bits=16)
    for n in range(3):
        index.apply(codes_of([n]), [f"k{n}"], lineage={"built_from": codes[n].name})
    retention.tag(index, "old", 2)
    other = create_index(root.child("indexes/deep/b").uri, bits=16)
    other.apply(codes_of([1]), ["a"], lineage={"failed_in": [codes[3].uri]})
    done = vacuum_artefacts(root, 7 * DAY, keep=[codes[4].uri], clock=later(8))
    assert done.withdrawn == [f"codes/{codes[5].name}"]
    retention.vacuum(index, 7 * DAY, clock=later(8))
    done = vacuum_artefacts(root, 7 * DAY, keep=[codes[4].name], clock=later(8))
    assert done.withdrawn == [f"codes/{codes[1].name}"]
    assert [whole(one) for one in codes] == [True, False, True, True, True, False]
    with pytest.raises(NotFound, match="is to be kept, found 0"):
        vacuum_artefacts(root, 7 * DAY, keep=["nothing"], clock=later(8))


def test_an_index_elsewhere_is_reached_where_it_is_named(root: Store, tmp_path: Path) -> None:
    parts = chain(root)
    index = create_index(str(tmp_path / "elsewhere"), bits=16)
    index.apply(codes_of([1]), ["a"], lineage={"built_from": parts[4].name})
    assert vacuum_artefacts(root, 7 * DAY, also=[index.versions], clock=later(8)).withdrawn == []
    assert len(vacuum_artefacts(root, 7 * DAY, clock=later(8)).withdrawn) == 5


class Stamped(FaultyStore):
    """Some objects are older than they are."""

    def __init__(self, inner: Store, older: Callable[[str], float]) -> None:
        super().__init__(inner)
        self.older = older

    def list(self, prefix: str = "", start_after: str = "") -> Any:
        for entry in self.inner.list(prefix, start_after):
            yield entry._replace(modified=entry.modified - self.older(entry.name))


def test_what_is_young_stays_with_all_that_it_names(root: Store) -> None:
    parts, old = chain(root), made(root, "features", salt="old")
    aged = Stamped(root, lambda name: 0.0 if name.startswith(("codes/", "pins/")) else 8 * DAY)
    done = vacuum_artefacts(aged, 7 * DAY)
    assert done.withdrawn == [f"features/{old.name}"]
    assert all(map(whole, parts))


@pytest.mark.parametrize("what", ["stage", "run"])
def test_nothing_is_withdrawn_while_it_cannot_be_told_what_is_needed(root: Store, what: str) -> None:
    parts = chain(root)
    if what == "stage":
        unfinished = artefact(root, "codes", inputs={}, settings={}, revision=1)
        unfinished.publish_part(0, {"rows": 0})
    else:
        Log(root.child("runs/abc")).commit({"finished": False}, 0)
    aged = Stamped(root, lambda name: 8 * DAY if any(one.name in name for one in parts) else 0.0)
    done = vacuum_artefacts(aged, 7 * DAY)
    assert done.withdrawn == []
    assert "is being " in done.blocked
    assert all(map(whole, parts))
    done = vacuum_artefacts(aged, 7 * DAY, clock=later(8))
    assert len(done.withdrawn) == (6 if what == "stage" else 5)


def test_dead_attempts_of_artefacts_are_collected(root: Store) -> None:
    one = made(root, "codes", salt="1")
    index = create_index(root.child("indexes/a").uri, bits=16)
    index.apply(codes_of([1]), ["a"], lineage={"built_from": one.name})
    dead = Artefact.at(one.store, one.kind, one.name)
    lost = [write_file(dead.store, dead.new_name(".bin"), b"lost")["path"] for _ in range(2)]
    assert vacuum_artefacts(root, 7 * DAY, clock=later(6)).deleted == {}
    assert vacuum_artefacts(root, 7 * DAY, clock=later(8)).deleted == {"unfinished": [2, 8]}
    assert not any(one.store.exists(path) for path in lost)
    assert whole(one)


def test_a_stage_that_found_its_parts_before_they_were_withdrawn_keeps_their_data(root: Store) -> None:
    one = made(root, "codes")
    found = one.parts()
    vacuum_artefacts(root, 7 * DAY, clock=later(8))
    again = Artefact.at(one.store, one.kind, one.name)
    assert not again.exists()
    again.publish({"files": [record["file"] for record in found.values()]})
    index = create_index(root.child("indexes/a").uri, bits=16)
    index.apply(codes_of([1]), ["a"], lineage={"built_from": one.name})
    vacuum_artefacts(root, 7 * DAY, clock=later(8))
    assert whole(one)
    assert not [name for name in names(root, one) if "withdrawn/" in name]


def test_what_is_made_again_is_whole_and_its_old_data_goes(root: Store) -> None:
    one = made(root, "codes")
    old = {name for name in names(root, one) if "/data/" in name}
    vacuum_artefacts(root, 7 * DAY, clock=later(8))
    assert made(root, "codes").uri == one.uri
    index = create_index(root.child("indexes/a").uri, bits=16)
    index.apply(codes_of([1]), ["a"], lineage={"built_from": one.name})
    done = vacuum_artefacts(root, 7 * DAY, clock=later(8))
    assert done.deleted["withdrawn"][0] == 3
    assert whole(one)
    assert not old & set(names(root, one))


def test_a_vacuum_killed_at_any_call_leaves_nothing_half(tmp_path: Path) -> None:
    hit: set[int] = set()
    root = open_store(str(tmp_path / "world"))
    used, unused = [made(root, "codes", salt="used")], [made(root, "features"), made(root, "codes")]
    index = create_index(root.child("indexes/a").uri, bits=16)
    index.apply(codes_of([1]), ["a"], lineage={"built_from": used[0].name})
    made_once = used, unused
    for crash_at in itertools.count():
        shutil.copytree(tmp_path / "world", tmp_path / str(crash_at))
        root = open_store(str(tmp_path / str(crash_at)))
        used, unused = ([Artefact(root, one.kind, one.name) for one in group] for group in made_once)
        calls, dead = itertools.count(), threading.Event()

        def die(call: str, calls: Any = calls, dead: Any = dead, crash_at: int = crash_at) -> None:
            if next(calls) == crash_at:
                hit.add(crash_at)
                dead.set()
            if dead.is_set():
                raise Crash(call)

        faulty = FaultyStore(root, calls=die)
        try:
            vacuum_artefacts(faulty, 7 * DAY, clock=later(8))
            vacuum_artefacts(faulty, 7 * DAY, clock=later(16))
        except Crash:
            pass
        assert all(map(whole, used))
        for one in unused:
            whole(one)
            assert all(one.store.exists(record["file"]["path"]) for record in one.parts().values())
        vacuum_artefacts(root, 7 * DAY, clock=later(8))
        vacuum_artefacts(root, 7 * DAY, clock=later(16))
        assert all(map(whole, used))
        assert [names(root, one) for one in unused] == [[]] * 2
        if not dead.is_set():
            break
    assert hit == set(range(crash_at))
    assert crash_at > 30


def test_of_training_runs_only_what_no_resumption_needs_goes(root: Store) -> None:
    store = root.child("runs/m")
    log = Log(store)
    states = [write_file(store, log.new_name("states", ".pt"), str(n).encode()) for n in range(4)]
    for number, state in enumerate(states[:3]):
        log.commit({"model": "m", "finished": False, "state": state}, number)
    store.put("ray/m-1/checkpoint.json", b"{}")
    assert vacuum_artefacts(root, 7 * DAY, clock=later(6)).deleted == {}
    done = vacuum_artefacts(root, 7 * DAY, clock=later(8))
    assert done.deleted == {"training": [3, 4]}
    assert {e.name for e in store.list()} == {
        *(f"manifests/{n:020d}.json" for n in (1, 2, 3)), states[1]["path"], states[2]["path"]
    }  # fmt: skip


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = open_store(str(tmp_path / "root"))
    used, unused = chain(root, "used"), chain(root, "unused")
    index = index_of(root, used[4], used[3], used[0], "images")
    monkeypatch.setattr(vacuum_artefacts, "__kwdefaults__", vacuum_artefacts.__kwdefaults__ | {"clock": later(8)})
    words = ["index", "vacuum", "--artefacts", "--root", root.uri]
    assert cli.main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "5 artefacts would be withdrawn, 5 are needed or young" in told
    assert all(f"  {one.kind}/{one.name}" in told for one in unused)
    assert all(map(whole, used + unused))
    assert cli.main([*words, "--keep", f"[{unused[4].name}]"]) == 0
    assert all(map(whole, used + unused))
    assert cli.main(words) == 0
    assert [whole(one) for one in used + unused] == [True] * 5 + [False] * 5
    assert cli.main(["index", "vacuum", "--artefacts", "--index.uri", index.uri]) == 2
    assert open_index(index.uri).version == 2
