"""Random histories of writers with every kind of fault, against a dict: what is told to a writer is what is so."""

import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hashdist.ground.errors import NotFound, OutcomeUnknown, Unavailable
from hashdist.store import Store, commit, open_store
from hashdist.store.base import Contended, Exists
from hashdist.store.commit import Artefact, CommitLost, Log, read_file, write_file
from tests.worlds.faults import CREATE_FAULTS, Crash, FaultyStore

FATES = st.lists(st.sampled_from([*CREATE_FAULTS, "crash", "crash-after"]), max_size=4)
READS = st.lists(st.sampled_from(["ok", "away"]), max_size=3)
WRITERS = st.integers(0, 3)
COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def no_sleep(seconds: float) -> None:
    pass


def new_root(kind: str) -> str:
    """The URI of an empty root."""
    return f"memory://{uuid4().hex}" if kind == "memory" else tempfile.mkdtemp(prefix="hashdist-machine-")


class CommitMachine(RuleBasedStateMachine):
    """Four writers on one log and one artefact.

    The model is two dicts, of versions and of parts, filled in from what writers were told: "won" and "lost" must
    be so at once and for ever; a writer that was told nothing (unknown outcome, crash) may have won or not.
    """

    kind = "local"

    @initialize()
    def start(self) -> None:
        self.root = new_root(self.kind)
        self.store: Store = open_store(self.root)
        self.versions: dict[int, int] = {}
        self.parts: dict[int, int] = {}
        self.payload = itertools.count()
        self.maybe: set[int] = set()
        self.never: set[int] = set()
        self.late: list[FaultyStore] = []
        self.seen = dict.fromkeys(range(4), 0)

    def faulty(self, creates: list[str], reads: list[str]) -> FaultyStore:
        made = FaultyStore(self.store, list(creates), list(reads))
        self.late.append(made)
        return made

    @rule(writer=WRITERS, creates=FATES, reads=READS)
    def commit_version(self, writer: int, creates: list[str], reads: list[str]) -> None:
        log, payload, parent = Log(self.faulty(creates, reads)), next(self.payload), self.seen[writer]
        try:
            entry = write_file(log.store, log.new_name("data", ".bin"), str(payload).encode())
            version = log.commit({"payload": payload, "file": entry}, parent, sleep=no_sleep)
        except CommitLost as lost:
            self.never.add(payload)
            self.told(self.versions, lost.winner.number, lost.winner.manifest["payload"])
            self.seen[writer] = lost.winner.number
        except (OutcomeUnknown, Crash):
            self.maybe.add(payload)
        except Unavailable:
            self.never.add(payload)
        else:
            assert version.number == parent + 1
            assert version.manifest["payload"] == payload
            self.told(self.versions, version.number, payload)
            self.seen[writer] = version.number

    @rule(part=st.integers(0, 2), creates=FATES, reads=READS)
    def publish_part(self, part: int, creates: list[str], reads: list[str]) -> None:
        made, payload = Artefact(self.faulty(creates, reads), "codes", "x"), next(self.payload)
        try:
            entry = write_file(made.store, made.new_name(".bin"), str(payload).encode())
            record = made.publish_part(part, {"payload": payload, "file": entry})
        except (OutcomeUnknown, Crash):
            self.maybe.add(payload)
        except Unavailable:
            self.never.add(payload)
        else:
            self.told(self.parts, part, record["payload"])
            if record["payload"] != payload:
                self.never.add(payload)

    def told(self, model: dict[int, int], place: int, payload: int) -> None:
        """A writer has learnt that `payload` stands at `place`."""
        assert model.setdefault(place, payload) == payload
        assert payload not in self.never

    @rule(writer=WRITERS)
    def look(self, writer: int) -> None:
        latest = Log(self.store).latest()
        if latest is not None:
            self.told(self.versions, latest.number, latest.manifest["payload"])
            self.seen[writer] = latest.number

    @rule()
    def requests_on_their_way_arrive(self) -> None:
        for store in self.late:
            store.land()
        self.late.clear()

    @invariant()
    def the_log_is_what_writers_were_told(self) -> None:
        if not hasattr(self, "store"):
            return
        log = Log(self.store)
        numbers = log.numbers()
        assert numbers == list(range(1, len(numbers) + 1))
        assert set(self.versions) <= set(numbers)
        for number in numbers:
            manifest = log.read(number).manifest
            self.holds(self.versions, number, manifest)
            assert manifest["parent"] == number - 1

    @invariant()
    def the_parts_are_what_writers_were_told(self) -> None:
        if not hasattr(self, "store"):
            return
        made = Artefact(self.store, "codes", "x")
        parts = made.parts()
        assert set(self.parts) <= set(parts)
        for part, record in parts.items():
            self.holds(self.parts, part, record, made.store)

    def holds(self, model: dict[int, int], place: int, record: dict[str, Any], store: Store | None = None) -> None:
        """A record is the one that was told, or one of those of which nothing was told; and its data are whole."""
        payload = record["payload"]
        assert payload == model[place] if place in model else payload in self.maybe
        assert read_file(store or self.store, record["file"]) == str(payload).encode()

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root, ignore_errors=self.kind != "local")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_pause_s", lambda attempt: 0.0)


class InMemory(CommitMachine):
    """The same on another kind of store."""

    kind = "memory"


@pytest.mark.parametrize("machine", [CommitMachine, InMemory])
def test_random_histories(machine: type[CommitMachine]) -> None:
    _run(machine, examples=40, steps=25)


@pytest.mark.full
def test_many_random_histories() -> None:
    _run(CommitMachine, examples=400, steps=60)


def _run(machine: type[CommitMachine], examples: int, steps: int, **more: Any) -> None:
    chosen = settings(COMMON, max_examples=examples, stateful_step_count=steps, **more)
    run_state_machine_as_test(machine, settings=chosen)


# The machine must notice a protocol that is wrong


def wrong_protocol(wrong: str) -> Callable[..., tuple[dict[str, Any], bool]]:
    """`create_record` as one might write it at first."""

    def create_record(store: Store, name: str, body: dict[str, Any], **more: Any) -> tuple[dict[str, Any], bool]:
        data, record = commit._encode({**body, "write_id": "w"})
        try:
            store.create(name, data, "w")
        except Exists:
            try:
                standing = commit.read_record(store, name)
            except Unavailable as error:
                raise OutcomeUnknown("refused, and the read-back failed") from error
            return standing, wrong != "no read-back" and standing == record
        except Contended:
            if wrong != "409 is lost":
                raise
            return {**record, "payload": -1}, False
        except OutcomeUnknown:
            if wrong != "no answer is won":
                raise
        return record, True

    return create_record


@pytest.mark.parametrize("wrong", ["no read-back", "409 is lost", "no answer is won"])
def test_a_wrong_protocol_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "create_record", wrong_protocol(wrong))
    with pytest.raises(AssertionError):
        _run(CommitMachine, examples=300, steps=25, phases=[Phase.generate], report_multiple_bugs=False, database=None)


def test_a_plain_but_right_protocol_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "create_record", wrong_protocol("nothing"))
    _run(CommitMachine, examples=40, steps=25, database=None)


# A crash at every call


def publish_everything(store: Store) -> None:
    """A small stage: two parts, a manifest, a version."""
    made = Artefact(store, "codes", "x")
    entries = []
    for part in range(2):
        entry = write_file(made.store, made.new_name(".bin"), b"part")
        entries.append(made.publish_part(part, {"file": entry})["file"])
    made.publish({"files": entries})
    log = Log(store.child("indexes/y"))
    latest = log.latest()
    if latest is None:
        log.commit({"files": [write_file(log.store, log.new_name("shards", ".bin"), b"shard")]}, 0)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_crash_at_any_call_leaves_nothing_half_done_and_a_second_run_finishes(kind: str, tmp_path: Path) -> None:
    base = str(tmp_path) if kind == "local" else new_root(kind)
    for crash_at in itertools.count():
        root = open_store(f"{base}/{crash_at}")
        calls = itertools.count()

        def die(name: str, calls: Any = calls, crash_at: int = crash_at) -> None:
            if next(calls) == crash_at:
                raise Crash(name)

        finished = False
        try:
            publish_everything(FaultyStore(root, calls=die))
            finished = True
        except Crash:
            pass
        seen_by_a_reader(root)
        publish_everything(root)
        assert seen_by_a_reader(root) == (2, 1)
        if finished:
            break
    assert crash_at == 8  # every call of a whole run was hit


def seen_by_a_reader(root: Store) -> tuple[int, int]:
    """Files of the committed artefact and versions of the log, every byte read."""
    made, log = Artefact(root, "codes", "x"), Log(root.child("indexes/y"))
    try:
        files = made.manifest()["files"]
    except NotFound:
        files = []
    assert all(read_file(made.store, entry) == b"part" for entry in files)
    for number in log.numbers():
        assert [read_file(log.store, entry) for entry in log.read(number).manifest["files"]] == [b"shard"]
    return len(files), len(log.numbers())
