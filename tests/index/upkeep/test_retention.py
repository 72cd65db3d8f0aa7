"""The life of the log, on disk and on S3: tags, rollback, pins, expiry and vacuum, against a dict of every version."""

import contextlib
import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashdist
from hashdist.ground.errors import AlreadyExists, Conflict, Corrupt, InvalidInput, NotFound, OutcomeUnknown, Unavailable
from hashdist.index import Index, create_index, open_index, pins
from hashdist.index.manifest import content, files, is_expired
from hashdist.index.shards.shard import parts, write_ids
from hashdist.index.upkeep import compaction, erasure, retention, verification
from hashdist.index.view import View
from hashdist.store import Store, commit
from hashdist.store.commit import Log, write_file
from tests.worlds.faults import Crash, FaultyStore
from tests.worlds.index import Contents, codes_of, contents

DAY = 86_400.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_pause_s", lambda attempt: 0.0)


def days_later(days: float) -> Callable[[Store], float]:
    """The store's clock, so many days on: everything that is there now is that old."""
    return lambda store: pins.store_time(store) + days * DAY


def put(index: Index, **rows: int) -> int:
    return index.append(codes_of(list(rows.values())), list(rows), on_existing="replace")


HISTORY: dict[int, Contents] = {
    1: {},
    2: {"a": 1, "b": 2, "c": 3},
    3: {"a": 1, "b": 2, "c": 3, "d": 4},
    4: {"a": 9, "b": 2, "c": 3, "d": 4},
    5: {"a": 9, "c": 3, "d": 4},
}


def grown(uri: str) -> Index:
    """An index with the versions of HISTORY."""
    index = create_index(uri, bits=16)
    put(index, a=1, b=2, c=3)
    put(index, d=4)
    put(index, a=9)
    index.delete(["b"])
    return index


def answers(index: Index, number: int) -> Contents:
    return contents(open_index(index.uri, number).view)


def names(store: Store, *, data: bool = True) -> set[str]:
    """Names of all objects, or of data files only."""
    return {e.name for e in store.list() if not (data and e.name.startswith(("manifests/", "pins/")))}


def needed(index: Index) -> set[str]:
    """What the versions that can be opened name, worked out version by version."""
    head = open_index(index.uri).manifest
    numbers = [n for n in range(1, head["number"] + 1) if not is_expired(head, n)]
    old = {entry["path"] for n in numbers for entry in files(content(open_index(index.uri, n).manifest))}
    return old | {entry["path"] for entry in files(head)}


def check(index: Index, history: dict[int, Contents], expired: set[int]) -> None:
    """Every version answers as it did, or is refused; every file that one needs is there."""
    head = open_index(index.uri)
    for number, wanted in history.items():
        if number in expired:
            with pytest.raises(NotFound, match=f"version {number} was vacuumed.* the versions that remain are"):
                open_index(index.uri, number)
        else:
            assert answers(index, number) == wanted
    assert needed(head) <= names(head.store)


# Tags


def test_a_tag_names_a_version_and_opens_it(uri: str) -> None:
    index = grown(uri)
    assert retention.tag(index, "before", 3) == 3
    assert retention.tag(index, "now") == 6
    assert contents(open_index(uri, "before").view) == HISTORY[3]
    assert contents(open_index(uri, "3").view) == HISTORY[3]
    assert contents(open_index(uri, "now").view) == HISTORY[5]
    put(index, e=5)
    assert open_index(uri).manifest["tags"] == {"before": 3, "now": 6}
    assert {v["version"]: v["tags"] for v in index.log() if v["tags"]} == {3: ["before"], 6: ["now"]}
    assert retention.untag(index, "before") == 3
    assert retention.untag(index, "now") == 6
    assert "tags" not in open_index(uri).manifest
    with pytest.raises(NotFound, match="no tag 'before'"):
        open_index(uri, "before")


def test_a_tag_stays_where_it_is(uri: str) -> None:
    index = grown(uri)
    retention.tag(index, "gold", 2)
    version = index.version
    assert retention.tag(index, "gold", 2) == 2
    assert index.version == version
    with pytest.raises(AlreadyExists, match="names version 2; delete it first"):
        retention.tag(index, "gold", 3)


@pytest.mark.parametrize("name", ["", "12", "a b", "a\n", "x" * 101])
def test_what_is_no_tag_is_refused(tmp_path: Path, name: str) -> None:
    index = create_index(str(tmp_path / "index"), bits=16)
    with pytest.raises(InvalidInput, match="a tag must be"):
        retention.tag(index, name)
    with pytest.raises(NotFound, match="no version 7; the versions are 1 to 1"):
        retention.tag(index, "good", 7)
    with pytest.raises(NotFound):
        retention.untag(index, "1")


def test_tags_of_two_writers_are_both_kept(uri: str) -> None:
    index, other = grown(uri), open_index(uri)
    retention.tag(other, "theirs", 2)
    retention.tag(index, "mine")
    assert open_index(uri).manifest["tags"] == {"theirs": 2, "mine": 5}


# Rollback


def test_a_rollback_serves_old_content_as_a_new_version(uri: str) -> None:
    index = grown(uri)
    retention.tag(index, "start", 2)
    assert retention.rollback(index, "start") == 7
    assert contents(open_index(uri).view) == HISTORY[2]
    assert index.log()[-1]["operation"] == "rollback"
    assert open_index(uri).manifest["tags"] == {"start": 2}
    assert retention.rollback(index, 2) == 7
    put(index, b=7, z=1)
    index.delete(["a"])
    assert contents(open_index(uri).view) == {"b": 7, "c": 3, "z": 1}
    assert retention.rollback(index, 5) == 10
    assert contents(open_index(uri).view) == HISTORY[5]
    assert contents(open_index(uri, 9).view) == {"b": 7, "c": 3, "z": 1}
    check(index, HISTORY, set())


def test_fields_that_the_old_version_had_not_are_gone(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "index"), bits=16)
    index.apply(codes_of([1]), ["a"], model="m", lineage={"collection": "here"})
    index.apply(codes_of([2]), ["b"], lineage={"failed_in": ["codes"]})
    retention.rollback(index, 2)
    assert (index.model, index.collection_uri, "failed_in" in index.manifest) == ("m", "here", False)
    retention.rollback(index, 1)
    assert (index.model, index.collection_uri) == (None, None)


def test_a_rollback_does_not_undo_what_it_has_not_seen(uri: str) -> None:
    index, other = grown(uri), open_index(uri)
    retention.tag(other, "harmless", 1)
    put(other, new=1)
    with pytest.raises(Conflict, match=r"version 7 \(append\) was committed by another writer"):
        retention.rollback(index, 2)
    assert contents(open_index(uri).view) == HISTORY[5] | {"new": 1}
    index.refresh()
    retention.rollback(index, 2)
    assert contents(open_index(uri).view) == HISTORY[2]


def test_a_change_of_the_log_alone_does_not_stop_a_rollback(uri: str) -> None:
    index, other = grown(uri), open_index(uri)
    retention.tag(other, "harmless", 1)
    assert retention.rollback(index, 2) == 7
    assert open_index(uri).manifest["tags"] == {"harmless": 1}


def test_a_rollback_that_meets_a_vacuum_is_refused_or_comes_first(uri: str) -> None:
    index, other = grown(uri), open_index(uri)
    retention.vacuum(other, 7 * DAY, clock=days_later(8))
    with pytest.raises(NotFound, match="version 2 was vacuumed"):
        retention.rollback(index, 2)
    index, other = open_index(uri), open_index(uri)
    put(index, e=5)
    retention.rollback(index, 5)
    retention.vacuum(other, 7 * DAY, clock=days_later(8))
    assert contents(open_index(uri).view) == HISTORY[5]
    assert needed(index) == names(index.store)


# Vacuum


def test_what_nothing_needs_goes_and_everything_else_answers_as_before(uri: str) -> None:
    index = grown(uri)
    done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert done.expired == [1, 2, 3, 4]
    assert (done.revoked, done.unfinished, done.spared, done.version, index.version) == ([], "", 0, 6, 6)
    check(index, HISTORY, {1, 2, 3, 4})
    # nothing is compacted, so the newest version needs every file yet
    assert done.deleted == {}
    put(index, a=1)
    retention.rollback(index, 5)
    done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert done.expired == [5, 6, 7]
    assert done.deleted["expired"][0] == 4  # codes, ids and keys of a=1, and the tombstone
    assert names(index.store) == needed(index)
    assert contents(open_index(uri).view) == HISTORY[5]
    assert index.manifest["expired"] == [[1, 7]]
    again = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert (again.expired, again.version) == ([8], 10)
    assert [v["expired"] for v in index.log()] == [True] * 8 + [False] * 2


def replaced(uri: str) -> Index:
    """Three contents that have no file in common."""
    index = create_index(uri, bits=16)
    put(index, a=1)
    for number in (2, 3):
        retention.rollback(index, 1)
        put(index, a=number)
    return index


REPLACED: dict[int, Contents] = {1: {}, 2: {"a": 1}, 3: {}, 4: {"a": 2}, 5: {}, 6: {"a": 3}}


def test_tagged_versions_and_the_newest_are_kept(uri: str) -> None:
    index = replaced(uri)
    retention.tag(index, "old", 2)
    done = retention.vacuum(index, 7 * DAY, clock=days_later(100))
    assert done.expired == [1, 3, 4, 5, 6]
    check(index, REPLACED, {1, 3, 4, 5, 6})
    assert answers(index, 7) == {"a": 3}
    assert done.deleted == {"expired": [3, done.deleted["expired"][1]]}
    assert names(index.store) == needed(index)
    retention.rollback(index, "old")
    assert contents(open_index(uri).view) == {"a": 1}
    with pytest.raises(NotFound, match=r"version 4 was vacuumed.*remain are 2, 7 to 9"):
        retention.tag(index, "late", 4)


def test_what_was_superseded_lately_is_kept(uri: str) -> None:
    index = replaced(uri)
    before = names(index.store)
    done = retention.vacuum(index, 7 * DAY, clock=days_later(6.9))
    assert (done.expired, done.deleted, done.version, names(index.store)) == ([], {}, 6, before)
    check(index, REPLACED, set())


def test_age_counts_from_when_the_last_version_with_a_file_was_superseded(uri: str) -> None:
    """Stamps of manifests are put where they would be after ten days of work: version n at day n."""
    index = replaced(uri)
    stamps = StampedStore(index.store, {f"manifests/{n:020d}.json": n * DAY for n in range(1, 7)})
    stamped = Index(Log(stamps), index.view.version)
    done = retention.vacuum(stamped, 3 * DAY, clock=lambda store: 7 * DAY)
    assert done.expired == [1, 2, 3]  # superseded on days 2, 3 and 4; version 4 on day 5 only
    assert done.deleted["expired"][0] == 3
    check(index, REPLACED, {1, 2, 3})


class StampedStore(FaultyStore):
    """A store whose listing shows other stamps."""

    def __init__(self, inner: Store, stamps: dict[str, float]) -> None:
        super().__init__(inner)
        self.stamps = stamps

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[Any]:
        for entry in self.inner.list(prefix, start_after):
            yield entry._replace(modified=self.stamps.get(entry.name, entry.modified))


@pytest.mark.parametrize("stamp", [0.0, 9e12])
def test_what_has_no_known_age_is_left_alone(uri: str, stamp: float) -> None:
    index = replaced(uri)
    lost = write_file(index.store, f"shards/{'0' * 32}/x.bin", b"never committed")["path"]
    unknown = {f"manifests/{3:020d}.json": stamp, lost: stamp}
    stamped = Index(Log(StampedStore(index.store, unknown)), index.view.version)
    done = retention.vacuum(stamped, 7 * DAY, clock=days_later(8))
    assert done.expired == [1, 3, 4, 5]
    assert done.revoked == []
    assert lost in names(index.store)
    check(index, REPLACED, {1, 3, 4, 5})


def test_foreign_files_are_left_alone(uri: str) -> None:
    index = replaced(uri)
    foreign = ["README.md", "shards/notes.txt", "shards/today/x.bin", f"{'0' * 32}/x.bin", f"a/b/{'0' * 32}/c"]
    for name in foreign:
        index.store.put(name, b"mine")
    done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert done.foreign == len(foreign)
    assert set(foreign) <= names(index.store)


def test_clocks_of_writers_change_nothing(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the writers believe it is 1970, the other half 2100."""
    times = itertools.cycle(["1970-01-01T00:00:00+00:00", "2100-01-01T00:00:00+00:00"])
    monkeypatch.setattr(commit, "now", lambda: next(times))
    monkeypatch.setattr("time.time", lambda: 4e9)
    index = replaced(uri)
    assert retention.vacuum(index, 7 * DAY, clock=days_later(6)).expired == []
    check(index, REPLACED, set())
    assert retention.vacuum(index, 7 * DAY, clock=days_later(8)).expired == [1, 2, 3, 4, 5]
    check(index, REPLACED, {1, 2, 3, 4, 5})


@pytest.mark.parametrize("days", [-30, 30])
def test_a_store_whose_clock_is_wrong_changes_nothing(tmp_path: Path, days: float) -> None:
    class Skewed(FaultyStore):
        def list(self, prefix: str = "", start_after: str = "") -> Iterator[Any]:
            for entry in self.inner.list(prefix, start_after):
                yield entry._replace(modified=entry.modified + days * DAY)

    index = replaced(str(tmp_path / "index"))
    skewed = Index(Log(Skewed(index.store)), index.view.version)
    with pins.pinned(Index(Log(skewed.store), open_index(index.uri, 2).view.version, writable=False)):
        assert retention.vacuum(skewed, 7 * DAY).expired == []
        done = retention.vacuum(skewed, 0, force=True)
    assert (done.expired, done.pinned) == ([1, 3, 4, 5], [2])


def test_the_store_says_what_time_it_is(uri: str) -> None:
    index = create_index(uri, bits=16)
    first = pins.store_time(index.store)
    stamp = index.store.stat("manifests/00000000000000000001.json").modified
    assert 0 <= first - stamp < 60
    assert names(index.store, data=False) == {"manifests/00000000000000000001.json"}


def test_a_dry_run_changes_nothing_and_tells_what_a_run_does(uri: str) -> None:
    index = replaced(uri)
    write_file(index.store, f"shards/{'0' * 32}/x.bin", b"never committed")
    before = {e.name: (e.size, e.stamp) for e in index.store.list()}
    dry = retention.vacuum(index, 7 * DAY, dry_run=True, clock=days_later(8))
    assert {e.name: (e.size, e.stamp) for e in index.store.list()} == before
    done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert (dry.expired, dry.revoked, dry.deleted) == (done.expired, done.revoked, done.deleted)
    assert done.deleted["unfinished"] == [1, 15]
    assert names(index.store) == needed(index)


def test_a_young_age_must_be_forced(tmp_path: Path) -> None:
    index = replaced(str(tmp_path / "index"))
    with pytest.raises(InvalidInput, match=r"at least 1 hour is required, found 60 s.*--force"):
        retention.vacuum(index, 60)
    assert retention.vacuum(index, 0, force=True).expired == [1, 2, 3, 4, 5]
    assert contents(open_index(index.uri).view) == REPLACED[6]


# Writers that are killed or stalled


class Stalls:
    """Something else happens just before a writer's commit, once."""

    def __init__(self, index: Index, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], Any]) -> None:
        commit_, pending = index.versions.commit, [meanwhile]

        def stalled(*args: Any, **kwargs: Any) -> Any:
            if pending:
                pending.pop()()
            return commit_(*args, **kwargs)

        monkeypatch.setattr(index.versions, "commit", stalled)


def test_a_writer_that_slept_through_a_vacuum_fails_and_nothing_is_lost(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, cleaner = replaced(uri), open_index(uri)
    done: list[retention.Vacuumed] = []
    Stalls(index, monkeypatch, lambda: done.append(retention.vacuum(cleaner, 7 * DAY, clock=days_later(8))))
    with pytest.raises(Conflict, match="took this writer for dead"):
        put(index, late=1)
    assert done[0].deleted["unfinished"][0] == 3
    assert len(done[0].revoked) == 1
    assert contents(open_index(uri).view) == REPLACED[6]
    index.refresh()
    put(index, late=1)
    assert contents(open_index(uri).view) == REPLACED[6] | {"late": 1}
    assert names(index.store) == needed(index)


def test_a_writer_at_work_is_left_alone(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, cleaner = replaced(uri), open_index(uri)
    Stalls(index, monkeypatch, lambda: retention.vacuum(cleaner, 7 * DAY, clock=days_later(6)))
    put(index, late=1)
    assert contents(open_index(uri).view) == REPLACED[6] | {"late": 1}


def test_an_attempt_is_as_young_as_its_newest_file(uri: str) -> None:
    index = replaced(uri)
    old, new = (write_file(index.store, f"shards/{'a' * 32}/{name}.bin", b"1")["path"] for name in ("old", "new"))
    now = pins.store_time(index.store)
    stamped = StampedStore(index.store, {old: now - 30 * DAY})
    done = retention.vacuum(Index(Log(stamped), index.view.version), 7 * DAY, clock=lambda store: now)
    assert (done.revoked, {old, new} <= names(index.store)) == ([], True)
    stamped.stamps[new] = now - 8 * DAY
    done = retention.vacuum(Index(Log(stamped), index.view.version), 7 * DAY, clock=lambda store: now)
    assert (done.revoked, {old, new} & names(index.store)) == (["a" * 32], set())


def test_what_a_writer_left_over_when_it_came_second_is_collected(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes again where the winner has changed its plan; its attempt is committed, so nothing is revoked."""
    index, winner = replaced(uri), open_index(uri)
    Stalls(index, monkeypatch, lambda: put(winner, x=5))
    put(index, x=6, y=7)
    assert contents(open_index(uri).view) == {"a": 3, "x": 6, "y": 7}
    over = names(index.store) - needed(index)
    done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert done.revoked == []
    assert done.deleted.get("left over", [0])[0] == len(over)
    assert names(index.store) == needed(index)
    assert contents(open_index(uri).view) == {"a": 3, "x": 6, "y": 7}


def test_what_a_killed_writer_had_half_written_on_disk_is_collected(tmp_path: Path) -> None:
    index = replaced(str(tmp_path / "index"))
    half = tmp_path / "index" / "shards" / ("b" * 32) / ".hashdist-tmp-1"
    half.parent.mkdir()
    half.write_bytes(b"123")
    assert retention.vacuum(index, 7 * DAY, clock=days_later(6)).deleted == {}
    done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert (done.deleted["unfinished"], done.revoked) == ([1, 3], [])
    folders = {path.name for path in (tmp_path / "index" / "shards").iterdir()}
    assert folders == {name.split("/")[1] for name in needed(index) if name.startswith("shards/")}, "none is empty"


def test_a_dropped_candidate_ages_from_when_it_was_dropped(uri: str) -> None:
    index = replaced(uri)
    entry = write_file(index.store, f"salts/{'c' * 32}/x.json", b"{}")

    def with_candidate(view: View, tried: int) -> dict[str, Any]:
        return retention.successor(view.version, "candidate", kept={"candidate": {"rows": 0, "salts": [entry]}})

    index.transact(with_candidate)
    retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert entry["path"] in names(index.store)
    index.transact(lambda view, tried: retention.successor(view.version, "discard", kept={"candidate": None}))
    retention.vacuum(index, 7 * DAY, clock=days_later(6))
    assert entry["path"] in names(index.store)
    retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert entry["path"] not in names(index.store)


# Pins


def test_a_pinned_version_is_kept_and_goes_afterwards(uri: str) -> None:
    index = replaced(uri)
    old = open_index(uri, 2)
    with pins.pinned(old) as pin:
        assert pin.version == 2
        done = retention.vacuum(index, 7 * DAY, clock=lambda store: pins.store_time(store) + 1)
        assert done.pinned == [2]
        assert contents(old.view) == {"a": 1}
    assert pins.read_pins(index.store, pins.store_time(index.store)) == pins.Pins()


def test_pins_hold_by_the_stores_clock_only(uri: str) -> None:
    index = replaced(uri)
    with pins.pinned(open_index(uri, 2), held_s=9 * DAY):
        done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
        assert (done.expired, done.pinned) == ([1, 3, 4, 5], [2])
        check(index, REPLACED, {1, 3, 4, 5})
    assert retention.vacuum(index, 7 * DAY, clock=days_later(8)).expired == [2, 6]


def test_a_reader_that_pins_while_a_vacuum_commits_keeps_its_files(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = replaced(uri)
    reader = open_index(uri, 2)
    held: list[Any] = []

    def pin() -> None:
        held.append(pins.pinned(reader, held_s=9 * DAY))
        held[-1].__enter__()

    Stalls(index, monkeypatch, pin)
    done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert done.expired == [1, 2, 3, 4, 5]
    assert done.spared == 3
    assert contents(reader.view) == {"a": 1}
    with pytest.raises(NotFound):
        open_index(uri, 2)
    held[0].__exit__(None, None, None)
    done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert names(index.store) == needed(index)


def test_a_reader_that_pins_after_a_vacuum_is_told(uri: str) -> None:
    index = replaced(uri)
    reader = open_index(uri, 2)
    retention.vacuum(index, 7 * DAY, clock=days_later(8))
    with pytest.raises(NotFound, match="version 2 was vacuumed"), pins.pinned(reader):
        pass
    assert not list(index.store.list("pins/"))


def test_a_pin_is_renewed_while_it_is_held(tmp_path: Path) -> None:
    index = replaced(str(tmp_path / "index"))
    with pins.pinned(open_index(index.uri, 2), held_s=600, every_s=0.02) as pin:
        first = {entry.name for entry in index.store.list("pins/")}
        assert len(first) == 1
        wait_until(lambda: len(found := {e.name for e in index.store.list("pins/")}) == 1 and found != first)
        assert pin.written
    assert not list(index.store.list("pins/"))
    assert "hashdist-pin" not in {thread.name for thread in threading.enumerate()}


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(500):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came about")


def test_a_pin_that_is_over_holds_nothing_and_is_collected(uri: str) -> None:
    index = replaced(uri)
    pinned = pins.pinned(open_index(uri, 2), held_s=DAY)
    pinned.__enter__()  # and is killed
    done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert done.expired == [1, 2, 3, 4, 5]
    assert done.deleted["pins"][0] == 1
    assert not list(index.store.list("pins/"))
    with pytest.raises(NotFound):
        pinned.gen.gi_frame.f_locals["pin"].check()
    pinned.__exit__(None, None, None)


def test_a_pin_that_lapsed_is_checked_when_it_is_renewed(tmp_path: Path) -> None:
    index = replaced(str(tmp_path / "index"))
    with pins.pinned(open_index(index.uri, 2), held_s=0.0, every_s=0) as pin:
        pin.renew()
        retention.vacuum(index, 7 * DAY, clock=days_later(8))
        with pytest.raises(NotFound, match="version 2 was vacuumed"):
            pin.renew()


def test_a_broken_pin_stops_a_vacuum_before_it_does_anything(uri: str) -> None:
    index = replaced(uri)
    index.store.put("pins/x.json", b"{}")
    with pytest.raises(Corrupt, match=r"pins/x\.json must be a pin"):
        retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert index.version == 6


class ReadOnly(FaultyStore):
    """A store that may be read only."""

    def put(self, name: str, data: bytes | memoryview) -> None:
        raise InvalidInput("403")


def test_a_reader_without_permission_to_write_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = replaced(str(tmp_path / "index"))
    reader = Index(Log(ReadOnly(index.store)), open_index(index.uri, 2).view.version, writable=False)
    with pins.pinned(reader) as pin:
        assert not pin.written
        assert contents(open_index(index.uri, 2).view) == {"a": 1}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "version 2 cannot be pinned" in lines[0]
    retention.vacuum(index, 7 * DAY, clock=days_later(8))
    with pytest.raises(NotFound), pins.pinned(reader):
        pass
    dry = retention.vacuum(Index(Log(ReadOnly(index.store)), index.view.version), 7 * DAY, dry_run=True)
    assert dry.expired == []


# Kills and bad stores


def state(index: Index) -> tuple[set[str], Contents]:
    return names(index.store), contents(open_index(index.uri).view)


def test_a_vacuum_killed_at_any_call_is_finished_by_the_next(tmp_path: Path) -> None:
    world = replaced(str(tmp_path / "world"))
    retention.tag(world, "kept", 4)
    write_file(world.store, f"shards/{'a' * 32}/x.bin", b"killed")
    hit: set[int] = set()
    for crash_at in itertools.count():
        shutil.copytree(tmp_path / "world", tmp_path / str(crash_at))
        index = open_index(str(tmp_path / str(crash_at)))
        calls, dead = itertools.count(), threading.Event()

        def die(call: str, calls: Any = calls, dead: Any = dead, crash_at: int = crash_at) -> None:
            if next(calls) == crash_at:
                hit.add(crash_at)
                dead.set()
            if dead.is_set():
                raise Crash(call)

        faulty = Index(Log(FaultyStore(index.store, calls=die)), index.view.version)
        with contextlib.suppress(Crash):
            retention.vacuum(faulty, 7 * DAY, clock=days_later(8))
        newest = open_index(index.uri)
        assert needed(newest) <= names(index.store)
        assert answers(index, 4) == {"a": 2}
        assert contents(newest.view) == {"a": 3}
        retention.vacuum(newest, 7 * DAY, clock=days_later(8))
        assert names(index.store) == needed(newest)
        assert answers(index, 4) == {"a": 2}
        assert contents(newest.view) == {"a": 3}
        assert not list(index.store.list("pins/"))
        if not dead.is_set():
            break
    assert hit == set(range(crash_at)), "every call of a whole run was hit"
    assert crash_at > 15


@pytest.mark.parametrize("fate", ["lost", "late", "twice", "contended", "away", "crash-after"])
def test_a_vacuum_whose_commit_meets_faults(tmp_path: Path, fate: str) -> None:
    index = replaced(str(tmp_path / "index"))
    faulty = FaultyStore(index.store, [fate])
    with contextlib.suppress(Crash, Unavailable, OutcomeUnknown):
        retention.vacuum(Index(Log(faulty), index.view.version), 7 * DAY, clock=days_later(8))
    faulty.land()
    newest = open_index(index.uri)
    assert needed(newest) <= names(index.store)
    assert contents(newest.view) == {"a": 3}
    retention.vacuum(newest, 7 * DAY, clock=days_later(8))
    assert names(index.store) == needed(newest)


class NoDeletes(FaultyStore):
    """A store that takes no deletes of data now."""

    def delete(self, name: str) -> None:
        if name.startswith("shards/"):
            raise Unavailable(f"503 for {name}")
        super().delete(name)


def test_what_fails_after_the_commit_is_said_and_done_by_the_next(tmp_path: Path) -> None:
    index = replaced(str(tmp_path / "index"))
    done = retention.vacuum(Index(Log(NoDeletes(index.store)), index.view.version), 7 * DAY, clock=days_later(8))
    assert done.expired == [1, 2, 3, 4, 5]
    assert done.unfinished.startswith("503 for shards/")
    assert done.deleted == {}
    retention.vacuum(open_index(index.uri), 7 * DAY, clock=days_later(8))
    assert names(index.store) == needed(index)


def test_two_vacuums_and_writers_at_once_lose_nothing(uri: str) -> None:
    replaced(uri)
    failures: list[BaseException] = []
    written: dict[str, int] = {"a": 3}

    def run(work: Callable[[Index], Any], times: int) -> None:
        try:
            for _ in range(times):
                work(open_index(uri))
        except BaseException as error:
            failures.append(error)

    counter = itertools.count()

    def write(index: Index) -> None:
        number = next(counter)
        written[f"w{number}"] = number
        put(index, **{f"w{number}": number})

    def clean(index: Index) -> None:
        retention.vacuum(index, 7 * DAY, clock=lambda store: pins.store_time(store) + 1)

    threads = [threading.Thread(target=run, args=(work, 4)) for work in (write, write, clean, clean)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    index = open_index(uri)
    assert contents(index.view) == written
    retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert contents(open_index(uri).view) == written
    assert needed(index) == names(index.store)


def test_durations() -> None:
    spoken = {"90s": 90, "30m": 1800, "12h": 43_200, "7d": 7 * DAY, "2w": 14 * DAY, " 1.5 h ": 5400}
    assert {text: retention.seconds(text) for text in spoken} == spoken
    for text in ("7", "d", "-1d", "7 days", ""):
        with pytest.raises(InvalidInput, match="such as 7d"):
            retention.seconds(text)


# Verification


def test_a_sound_index_has_no_faults(uri: str) -> None:
    index = grown(uri)
    retention.tag(index, "b", 2)
    done = verification.verify(index)
    assert done.faults == []
    assert (done.versions, done.rows) == (6, 5)
    stored = {e.name: e.size for e in index.store.list() if not e.name.startswith("manifests/")}
    assert (done.files, done.bytes) == (len(stored), sum(stored.values()))
    index.append(codes_of([1]), ["z"])
    retention.rollback(index, 2)
    retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert verification.verify(open_index(uri)).versions == 3


def overwrite(store: Store, name: str, change: Callable[[bytes], bytes]) -> None:
    data = store.get(name)
    store.delete(name)
    store.put(name, change(data))


def test_every_fault_is_listed_with_the_versions_that_have_it(uri: str) -> None:
    index = grown(uri)
    hashdist.open_index(uri).search(codes_of([1]), 1)  # a good copy in the cache proves nothing
    shards = [parts(entry) for entry in index.manifest["shards"]]
    tombstones = [entry["path"] for entry in index.manifest["tombstones"]]
    flipped, cut, gone = shards[0]["codes"]["path"], shards[1]["keys"]["path"], shards[2]["ids"]["path"]
    overwrite(index.store, flipped, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    overwrite(index.store, cut, lambda data: data[:-3])
    index.store.delete(gone)
    overwrite(index.store, tombstones[0], lambda data: data + b"x")
    overwrite(index.store, "manifests/00000000000000000002.json", lambda data: data.replace(b'"rows":3', b'"rows":4'))
    faults = verification.verify(index).faults
    assert {fault.file: fault.versions for fault in faults if fault.file} == {
        flipped: ["3", "4", "5"],
        cut: ["3", "4", "5"],
        gone: ["4", "5"],
        tombstones[0]: ["4", "5"],
        "manifests/00000000000000000002.json": ["2"],
    }


def test_what_checksums_do_not_show_is_found_by_counting(uri: str) -> None:
    """Versions that a broken writer might have committed: every file is sound, and yet."""
    index = grown(uri)
    base = dict(index.manifest)

    def committed(**changed: Any) -> list[str]:
        index.transact(lambda view, tried: retention.successor(view.version, "broken", {**content(base), **changed}))
        return sorted(f.fault for f in verification.verify(index).faults if f.versions == [str(index.version)])

    assert committed() == []
    assert committed(rows=7) == ["7 live rows were committed, found 3"]
    first = base["shards"][0]
    twice = "1 ids live in two shards"
    assert committed(shards=[*base["shards"], first]) == [twice, "3 live rows were committed, found 4"]
    assert committed(tombstones=[]) == [twice, "3 live rows were committed, found 5"]
    unsorted = write_ids(index.store, f"tombstones/{'a' * 32}/x.npy", np.array([3, 1], np.int64))
    told = committed(tombstones=[*base["tombstones"], {**unsorted, "version": 9}])
    assert told == [
        "2 ascending int64 ids are required, found int64 [2]",
        "its live rows cannot be counted because of faults in its files",
    ]


def test_counting_in_spans_of_ids_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = create_index(str(tmp_path / "index"), bits=16)
    keys = [f"k{i}" for i in range(500)]
    index.append(codes_of(list(range(500))), keys)
    index.append(codes_of(list(range(100))), keys[:100], on_existing="replace")
    index.delete(keys[50:300])
    monkeypatch.setattr(verification, "_ROWS_AT_ONCE", 60)
    assert verification.verify(index).faults == []
    record = {**content(index.manifest), "tombstones": index.manifest["tombstones"][1:]}
    index.transact(lambda view, tried: retention.successor(view.version, "broken", record))
    told = [fault.fault for fault in verification.verify(index).faults]
    assert told == ["250 live rows were committed, found 300", "50 ids live in two shards"]


def test_a_gap_in_the_log_is_a_fault(uri: str) -> None:
    index = grown(uri)
    index.store.delete("manifests/00000000000000000003.json")
    faults = verification.verify(index).faults
    assert [(f.versions, f.fault) for f in faults] == [(["3"], "the record is missing")]


# With the other operations on the log


def test_a_purge_that_was_killed_before_it_deleted_is_finished_by_a_vacuum(uri: str) -> None:
    """At once, and whoever pins: what was erased is not to wait for an age."""
    index = grown(uri)
    calls = itertools.count()

    def die(call: str) -> None:
        if call == "delete" and next(calls) >= 0:
            raise Crash(call)

    with pytest.raises(Crash):
        erasure.purge(Index(Log(FaultyStore(index.store, calls=die)), index.view.version), ["a"])
    newest = open_index(uri)
    assert newest.manifest["operation"] == "purge"
    without = {number: {k: v for k, v in then.items() if k != "a"} for number, then in HISTORY.items()}
    check(newest, {number: then for number, then in without.items() if number > 2}, set())
    gone = set(newest.manifest["purge"]["delete"])
    assert gone <= names(newest.store)
    with pins.pinned(open_index(uri, 3)):
        done = retention.vacuum(newest, 7 * DAY)
    assert (done.expired, done.deleted["erased"][0]) == ([], len(gone))
    assert not gone & names(newest.store)
    assert verification.verify(newest).faults == []
    check(newest, without, set())
    retention.rollback(newest, 2)
    assert contents(open_index(uri).view) == {"b": 2, "c": 3}
    retention.vacuum(newest, 7 * DAY, clock=days_later(8))
    assert contents(open_index(uri).view) == {"b": 2, "c": 3}
    assert verification.verify(newest).faults == []


def test_what_was_compacted_away_goes_when_it_is_old(uri: str) -> None:
    index = grown(uri)
    compaction.compact(index, everything=True)
    done = retention.vacuum(index, 7 * DAY, clock=days_later(8))
    assert done.expired == [1, 2, 3, 4, 5]
    assert done.deleted["expired"][0] == 3 * 3 + 2
    assert len(names(index.store)) == 3
    check(index, HISTORY | {6: HISTORY[5]}, {1, 2, 3, 4, 5})
    assert verification.verify(index).faults == []
