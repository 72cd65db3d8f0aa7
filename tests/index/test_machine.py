"""Histories of an index with every kind of fault, against a dict: nothing lost, nothing torn, no version half there."""

import atexit
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from numpy.typing import NDArray

from hashdist.ground.errors import Corrupt, NotFound, OutcomeUnknown
from hashdist.index import Index, candidate, create_index, pins, promotion
from hashdist.index.upkeep import compaction, erasure, retention
from hashdist.index.view import View
from hashdist.store import Store, commit, open_store
from hashdist.store.base import Contended, Exists
from tests.worlds.faults import CREATE_FAULTS, Crash, FaultyStore
from tests.worlds.index import BITS, Contents, Effect, IndexWorld, Operation, codes_of, contents, unchanged, without


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_pause_s", lambda attempt: 0.0)
    monkeypatch.setattr("hashdist.index.index.time.sleep", lambda seconds: None)


# Operations and what they do to the contents


def put(rows: Contents) -> tuple[Operation, Effect]:
    """Add keys, and change those that are there."""

    def operation(index: Index) -> Any:
        keys = list(rows)
        digests = {"digest": [str(number) for number in rows.values()]}
        return index.append(codes_of(list(rows.values())), keys, digests, on_existing="replace")

    return operation, lambda before: before | rows


def remove(keys: list[str]) -> tuple[Operation, Effect]:
    return lambda index: index.delete(keys), lambda before: without(before, keys)


def compact() -> tuple[Operation, Effect]:
    return lambda index: compaction.compact(index, everything=True), unchanged


def tag(name: str, version: int | None = None) -> tuple[Operation, Effect]:
    return lambda index: retention.tag(index, name, version), unchanged


def untag(name: str) -> tuple[Operation, Effect]:
    return lambda index: retention.untag(index, name), unchanged


def vacuum() -> tuple[Operation, Effect]:
    """Everything that may go, whatever its age."""
    return lambda index: retention.vacuum(index, 0.0, force=True), unchanged


def purge(keys: list[str]) -> tuple[Operation, Effect]:
    return lambda index: erasure.purge(index, keys), lambda before: without(before, keys)


def rollback(to: int, then: Contents) -> tuple[Operation, Effect]:
    return lambda index: retention.rollback(index, to), lambda before: then


def refuse(served: View, proposed: View) -> dict[str, Any]:
    """A gate that nothing passes."""
    return {"passed": False, "checks": [{"name": "never", "passed": False, "text": "nothing passes"}]}


def stage(rows: Contents) -> tuple[Operation, Effect]:
    """Rows that the gate refuses: they wait as a candidate."""

    def operation(index: Index) -> Any:
        return index.apply(codes_of(list(rows.values())), list(rows), gate=refuse)

    return operation, unchanged


def promote(then: Contents) -> tuple[Operation, Effect]:
    return lambda index: promotion.promote(index, force=True), lambda before: then


def discard() -> tuple[Operation, Effect]:
    return promotion.discard, unchanged


# A crash at every call


def world(folder: Path) -> IndexWorld:
    uri = str(folder / "index")
    create_index(uri, BITS, model="m")
    return IndexWorld(open_store(uri), {1: {}})


@cache
def filled() -> IndexWorld:
    """An index with a history: shards, changed rows, removed rows, a tag, a candidate. To be copied."""
    folder = Path(tempfile.mkdtemp(prefix="hashdist-filled-"))
    atexit.register(shutil.rmtree, folder)
    made = world(folder)
    clean = FaultyStore(made.store)
    for operation, effect in (
        put({"a": 1, "b": 2, "c": 3}),
        put({"d": 4, "e": 5}),
        put({"a": 11}),
        remove(["b"]),
        tag("before"),
        put({"b": 22}),
        stage({"a": 5, "w": 6}),
    ):
        assert made.attempt(operation, effect, clean) == "done"
    return made


AT_THE_TAG = {"a": 11, "c": 3, "d": 4, "e": 5}
CANDIDATE = {**AT_THE_TAG, "a": 5, "b": 22, "w": 6}
OPERATIONS: dict[str, tuple[Operation, Effect]] = {
    "add": put({"x": 7}),
    "add and change": put({"a": 8, "y": 1}),
    "remove": remove(["a", "d"]),
    "compact": compact(),
    "tag": tag("now", 6),
    "untag": untag("before"),
    "vacuum": vacuum(),
    "purge": purge(["a", "b"]),
    "rollback": rollback(6, AT_THE_TAG),
    "stage": stage({"a": 2}),
    "promote": promote(CANDIDATE),
    "discard": discard(),
}
ONCE = {"untag", "promote", "discard"}
"""A second run of these finds that it is done already."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_crash_at_any_call_leaves_all_or_nothing_and_a_second_run_finishes(name: str, tmp_path: Path) -> None:
    operation, effect = OPERATIONS[name]
    hit: set[int] = set()
    for crash_at in itertools.count():
        made = filled().copy(tmp_path / str(crash_at))
        before = made.head()
        calls = itertools.count()

        def die(call: str, calls: Iterator[int] = calls, crash_at: int = crash_at) -> None:
            if next(calls) == crash_at:
                hit.add(crash_at)
                raise Crash(call)

        ended = made.attempt(operation, effect, FaultyStore(made.store, calls=die))
        erased = ["a", "b"] if name == "purge" else []
        made.check(maybe_erased=erased)
        again = made.attempt(operation, effect, FaultyStore(made.store))
        assert again == "done" or (name in ONCE and again == "NotFound")
        assert made.head() == effect(dict(before))
        made.erase(erased)
        made.check()
        if name == "vacuum":
            assert not made.litter()
        if ended == "done":
            break
    assert hit == set(range(crash_at)), "every call of a whole run was hit"
    assert crash_at >= 3


# Random histories

KEYS = st.sampled_from("abcdef")
TAGS = st.sampled_from(["one", "two"])
SOME_KEYS = st.lists(KEYS, min_size=1, max_size=3, unique=True)
ROWS = st.dictionaries(KEYS, st.integers(0, 7), min_size=1, max_size=4)
CREATES = st.lists(st.sampled_from([*CREATE_FAULTS, "crash", "crash-after"]), max_size=2)
PUTS = st.lists(st.sampled_from(["ok", "ok", "ok", "lost", "late", "twice", "away"]), max_size=4)
CRASH_AT = st.one_of(st.none(), st.none(), st.integers(0, 30))
COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


class IndexMachine(RuleBasedStateMachine):
    """Writers, readers and cleaners of one index; some writers act on a version that is no longer the newest."""

    @initialize(empty=st.booleans())
    def start(self, empty: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hashdist-machine-"))
        self.world = world(self.folder) if empty else filled().copy(self.folder / "index")
        self.stale: Index | None = None
        self.pins: list[tuple[View, Contents, ExitStack]] = []

    def attempt(
        self,
        operation: tuple[Operation, Effect],
        creates: list[str],
        puts: list[str],
        crash_at: int | None,
        stale: bool = False,
    ) -> str:
        calls = itertools.count()

        def die(call: str) -> None:
            if next(calls) == crash_at:
                raise Crash(call)

        faulty = FaultyStore(self.world.store, list(creates), calls=die, puts=list(puts))
        behind = None
        if stale and self.stale is not None:
            old = self.stale.view
            behind, self.stale = Index(commit.Log(faulty), old.version), None
        return self.world.attempt(*operation, faulty, behind)

    @rule(rows=ROWS, creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans())
    def put_rows(self, rows: Contents, **how: Any) -> None:
        self.attempt(put(rows), **how)

    @rule(
        keys=st.lists(KEYS, max_size=3, unique=True), creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans()
    )
    def remove_rows(self, keys: list[str], **how: Any) -> None:
        self.attempt(remove(keys), **how)

    @rule(creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans())
    def compact(self, **how: Any) -> None:
        self.attempt(compact(), **how)

    @rule(name=TAGS, creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans())
    def tag(self, name: str, **how: Any) -> None:
        self.attempt(tag(name), **how)

    @rule(name=TAGS, creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans())
    def untag(self, name: str, **how: Any) -> None:
        self.attempt(untag(name), **how)

    @rule(creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans())
    def vacuum(self, **how: Any) -> None:
        self.attempt(vacuum(), **how)

    @rule()
    def vacuum_to_the_end(self) -> None:
        self.world.land()
        assert self.attempt(vacuum(), [], [], None) == "done"
        assert bool(self.pins) or not self.world.litter()

    @rule(pick=st.integers(0, 50), creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans())
    def roll_back(self, pick: int, **how: Any) -> None:
        kept = self.world.kept()
        to = kept[pick % len(kept)]
        self.attempt(rollback(to, self.world.history[to]), **how)

    @rule(keys=SOME_KEYS, creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans())
    def purge(self, keys: list[str], **how: Any) -> None:
        self.unpin()
        self.world.land()
        self.attempt(purge(keys), **how)
        self.world.check(maybe_erased=keys)
        self.world.land()
        assert self.attempt(purge(keys), [], [], None) == "done"
        self.world.erase(keys)
        self.world.check()

    @rule(rows=ROWS, creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans())
    def stage(self, rows: Contents, **how: Any) -> None:
        self.attempt(stage(rows), **how)

    @rule(creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans())
    def promote(self, **how: Any) -> None:
        version = self.world.newest().view.version
        if "candidate" in version.manifest:
            waiting = contents(View(self.world.log, candidate.as_content(version, "")))
            self.attempt(promote(waiting), **how)

    @rule(creates=CREATES, puts=PUTS, crash_at=CRASH_AT, stale=st.booleans())
    def discard(self, **how: Any) -> None:
        self.attempt(discard(), **how)

    @rule()
    def pin(self) -> None:
        index, held = self.world.newest(), ExitStack()
        held.enter_context(pins.pinned(index, every_s=0))
        self.pins.append((index.view, self.world.head(), held))

    @rule()
    def unpin(self) -> None:
        for view, then, held in self.pins:
            assert contents(View(view.log, view.version)) == then, "a pinned version changed"
            held.close()
        self.pins.clear()

    @rule()
    def fall_behind(self) -> None:
        self.stale = self.world.newest()

    @rule()
    def requests_on_their_way_arrive(self) -> None:
        self.world.land()

    @precondition(lambda self: len(self.world.history) > 3)
    @rule()
    def every_version_answers_as_ever(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.unpin()
            self.world.land()
            self.world.check()
            shutil.rmtree(self.folder)


def _run(examples: int, steps: int, **more: Any) -> None:
    chosen = settings(COMMON, max_examples=examples, stateful_step_count=steps, **more)
    run_state_machine_as_test(IndexMachine, settings=chosen)


def test_random_histories_of_an_index() -> None:
    _run(examples=20, steps=15)


@pytest.mark.full
def test_many_random_histories_of_an_index() -> None:
    _run(examples=200, steps=40)


# The machine must notice a protocol that is wrong


def wrong_create(wrong: str) -> Callable[..., tuple[dict[str, Any], bool]]:
    """`create_record` as one might write it at first."""

    def create_record(store: Store, name: str, body: dict[str, Any], **more: Any) -> tuple[dict[str, Any], bool]:
        data, record = commit._encode({"format_version": 1, **body, "write_id": uuid4().hex})
        for _ in range(commit.TRIES):
            try:
                store.create(name, data, record["write_id"])
            except Contended:
                if wrong == "409 is read as exists":
                    return record, True  # "it exists, and I am the one who wrote"
                continue
            except (Exists, OutcomeUnknown):
                if wrong == "no read-back":
                    return record, True
                try:
                    standing = commit.read_record(store, name)
                except NotFound:
                    continue
                return standing, standing["write_id"] == record["write_id"]
            return record, True
        raise OutcomeUnknown("no answer")

    return create_record


def hidden_for_ever(view: View, number: int) -> NDArray[np.int64]:
    """Tombstones without version: an id that was hidden once stays hidden in every shard, whenever it came."""
    hidden = [ids for _, ids in view.tombstones]
    return view.shards[number].find(np.unique(np.concatenate(hidden)))[1] if hidden else np.empty(0, np.int64)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "no read-back": (commit, "create_record", wrong_create("no read-back")),
    "409 is read as exists": (commit, "create_record", wrong_create("409 is read as exists")),
    "tombstones without version": (View, "dead_rows", hidden_for_ever),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_protocol_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[mutant])
    with pytest.raises((AssertionError, Corrupt, NotFound)):
        _run(examples=300, steps=15, phases=[Phase.generate], report_multiple_bugs=False, derandomize=True)


def test_a_plain_but_right_protocol_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "create_record", wrong_create("nothing"))
    _run(examples=10, steps=15, database=None)
