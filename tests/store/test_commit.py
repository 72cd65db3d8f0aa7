"""The commit over every store: one winner, no false conflict, no false success, nothing half-written to be seen."""

import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hashdist.ground import telemetry
from hashdist.ground.errors import Conflict, Corrupt, InvalidInput, NotFound, OutcomeUnknown, Unavailable
from hashdist.ground.schema import FORMAT_VERSION
from hashdist.store import Store, commit, open_store
from hashdist.store.commit import (
    TRIES,
    Artefact,
    CommitLost,
    Log,
    artefact,
    create_record,
    digest,
    open_artefact,
    prove_conditional_create,
    read_file,
    read_record,
    read_table,
    write_file,
    write_table,
)
from tests.worlds.faults import FaultyProxy, FaultyStore


@pytest.fixture
def store(root_uri: str) -> Store:
    return open_store(root_uri)


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "root"))


class Pauses(list[float]):
    """A sleep that takes no time, and remembers."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


class Counts:
    """A telemetry sink that counts."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], float] = {}

    def observe(self, metric: telemetry.Metric, value: float, labels: dict[str, str]) -> None:
        key = (metric.name, "".join(labels.values()))
        self.seen[key] = self.seen.get(key, 0) + value


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    sink = Counts()
    monkeypatch.setattr(telemetry, "_sink", sink)
    return sink


class TestRecords:
    def test_what_is_created_is_read(self, store: Store) -> None:
        record, ours = create_record(
            store, "r.json", {"b": [1, (2, 3)], "a": {"é": None}, "n": np.int64(7), "m": {10: 1, 2: 2}}
        )
        assert ours
        assert record == read_record(store, "r.json")
        assert record["b"] == [1, [2, 3]]
        assert (record["n"], record["m"], record["format_version"]) == (7, {"10": 1, "2": 2}, FORMAT_VERSION)
        assert len(record["write_id"]) == 32

    def test_the_first_stands(self, store: Store) -> None:
        first, _ = create_record(store, "r.json", {"v": 1})
        second, ours = create_record(store, "r.json", {"v": 2})
        assert not ours
        assert second == first == read_record(store, "r.json")

    def test_bytes_on_disk_are_canonical(self, store: Store) -> None:
        create_record(store, "r.json", {"z": 1, "a": "ü"})
        data = store.get("r.json")
        record = json.loads(data)
        assert list(record) == sorted(record)
        assert data == json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(record["checksum"]) == 64

    @pytest.mark.parametrize(
        "how", [lambda d: d[:-9], lambda d: d.replace(b'"v":1', b'"v":2'), lambda d: b"", lambda d: b"[]"]
    )
    def test_damage_is_found(self, store: Store, how: Callable[[bytes], bytes]) -> None:
        create_record(store, "good.json", {"v": 1})
        store.put("bad.json", how(store.get("good.json")))
        with pytest.raises(Corrupt, match=f"{store.uri}/bad.json"):
            read_record(store, "bad.json")
        with pytest.raises(Corrupt):
            create_record(store, "bad.json", {"v": 3})

    def test_a_newer_format_is_refused_by_name(self, store: Store) -> None:
        create_record(store, "r.json", {"format_version": FORMAT_VERSION + 1})
        with pytest.raises(InvalidInput, match=f"format_version {FORMAT_VERSION + 1}, .* reads up to {FORMAT_VERSION}"):
            read_record(store, "r.json")

    @pytest.mark.parametrize("body", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}])
    def test_what_is_not_json_is_refused_before_anything_is_written(self, store: Store, body: dict[str, Any]) -> None:
        with pytest.raises(InvalidInput, match="plain JSON with finite numbers"):
            create_record(store, "r.json", body)
        assert not store.exists("r.json")

    def test_one_of_many_writers_wins_and_all_agree(self, store: Store) -> None:
        for number in range(8):
            name, together = f"{number}.json", threading.Barrier(8)
            results: list[tuple[dict[str, Any], bool]] = []

            def race(writer: int, name: str = name, together: Any = together, results: Any = results) -> None:
                together.wait()
                results.append(create_record(store, name, {"writer": writer}))

            threads = [threading.Thread(target=race, args=(writer,)) for writer in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sum(ours for _, ours in results) == 1
            winner = next(record for record, ours in results if ours)
            assert len(results) == 8
            assert all(record == winner for record, _ in results)


@pytest.mark.parametrize(
    ("creates", "reads", "outcome"),
    [
        (["lost"], [], "recovered"),
        (["twice"], [], "recovered"),
        (["contended", "contended"], [], "won"),
        (["away", "contended", "lost"], [], "recovered"),
        (["away"] * (TRIES - 1), [], "won"),
        (["lost"], ["away", "away"], "recovered"),
        (["late"], [], "won"),
        (["twice"], ["away"], "recovered"),
    ],
)
def test_what_goes_wrong_on_the_way_does_not_change_who_won(
    folder: Store, creates: list[str], reads: list[str], outcome: str, counts: Counts
) -> None:
    faults, pauses = len(creates) + len(reads), Pauses()
    faulty = FaultyStore(folder, creates, reads)
    record, ours = create_record(faulty, "r.json", {"v": 1}, sleep=pauses)
    assert ours
    assert read_record(folder, "r.json") == record
    assert counts.seen["hashdist_commits_total", outcome] == 1
    assert len(pauses) <= faults
    assert sum(n for (name, _), n in counts.seen.items() if name == "hashdist_commit_retries_total") >= 1
    faulty.land()
    assert read_record(folder, "r.json") == record


@pytest.mark.parametrize("fault", ["lost", "contended", "away", "late"])
def test_a_lost_race_is_lost_whatever_goes_wrong(folder: Store, fault: str, counts: Counts) -> None:
    winner, _ = create_record(folder, "r.json", {"v": "winner"})
    faulty = FaultyStore(folder, [fault], ["away"])
    record, ours = create_record(faulty, "r.json", {"v": "loser"}, sleep=Pauses())
    assert (record, ours) == (winner, False)
    assert counts.seen["hashdist_commits_total", "lost"] == 1
    faulty.land()
    assert read_record(folder, "r.json") == winner


def test_giving_up_says_whether_anything_can_have_happened(folder: Store) -> None:
    pauses = Pauses()
    with pytest.raises(Unavailable, match=f"not created in {TRIES} tries"):
        create_record(FaultyStore(folder, ["away"] * TRIES), "a.json", {}, sleep=pauses)
    assert not folder.exists("a.json")
    assert len(pauses) == TRIES - 1
    assert max(pauses) <= 10
    faulty = FaultyStore(folder, ["late"] + ["away"] * TRIES)
    with pytest.raises(OutcomeUnknown, match="delete nothing"):
        create_record(faulty, "b.json", {"v": 1}, sleep=Pauses())
    faulty.land()
    assert read_record(folder, "b.json")["v"] == 1
    with pytest.raises(OutcomeUnknown):
        create_record(FaultyStore(folder, ["lost"], ["away"] * TRIES), "c.json", {}, sleep=Pauses())


class NotAllowed(FaultyStore):
    """A store whose permissions are withdrawn: to create after the first `creates`, or to read."""

    def __init__(self, inner: Store, creates: list[str], may_read: bool) -> None:
        super().__init__(inner, creates)
        self.may_read = may_read

    def create(self, name: str, data: bytes, write_id: str) -> None:
        if not self.creates:
            raise InvalidInput("403")
        super().create(name, data, write_id)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if not self.may_read:
            raise InvalidInput("403")
        raise Unavailable("503")


@pytest.mark.parametrize("creates", [["late"], ["lost"], ["late", "contended"], ["twice"]])
@pytest.mark.parametrize("may_read", [True, False])
def test_what_may_have_landed_is_not_called_refused(folder: Store, creates: list[str], may_read: bool) -> None:
    faulty = NotAllowed(folder, list(creates), may_read)
    with pytest.raises(OutcomeUnknown, match=r"403.*delete nothing"):
        create_record(faulty, "r.json", {"v": 1}, sleep=Pauses())
    faulty.land()
    assert read_record(folder, "r.json")["v"] == 1


def test_what_cannot_have_landed_is_called_refused(folder: Store) -> None:
    with pytest.raises(InvalidInput, match="403"):
        create_record(NotAllowed(folder, [], may_read=True), "a.json", {}, sleep=Pauses())
    with pytest.raises(InvalidInput, match="403"):
        create_record(NotAllowed(folder, ["away"], may_read=True), "b.json", {}, sleep=Pauses())
    assert list(folder.list()) == []


def test_a_name_that_is_taken_is_not_called_free_when_it_cannot_be_read(folder: Store) -> None:
    """412, the read-back fails, then 409 or 503 to the end: something stands there, and it may be one's own."""
    create_record(folder, "r.json", {"v": "other"})
    faulty = FaultyStore(folder, ["ok", *["contended"] * (TRIES - 1)], ["away"] * TRIES)
    with pytest.raises(OutcomeUnknown):
        create_record(faulty, "r.json", {"v": 1}, sleep=Pauses())


def test_a_request_that_lands_late_does_not_undo_a_later_one(folder: Store) -> None:
    faulty = FaultyStore(folder, ["late", *["away"] * (TRIES - 1)])
    with pytest.raises(OutcomeUnknown):
        create_record(faulty, "r.json", {"v": "sleeper"}, sleep=Pauses())
    other, ours = create_record(folder, "r.json", {"v": "other"})
    assert ours
    faulty.land()
    assert read_record(folder, "r.json") == other


# Over HTTP, through the client's own retries


@pytest.fixture
def proxied(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with FaultyProxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        commit.prove_conditional_create(open_store("s3://hashdist/probe"))
        yield proxy, open_store(f"s3://hashdist/{tmp_path.name}-{os.urandom(4).hex()}")


@pytest.mark.parametrize("fate", ["cut", "twice", "409", "503", "503-after"])
def test_a_bad_connection_neither_loses_nor_invents_a_commit(proxied: Any, fate: str) -> None:
    proxy, store = proxied
    create_record(store, "first.json", {})
    proxy.fates, before = [fate], proxy.conditional_puts
    record, ours = create_record(store, "r.json", {"v": 1}, sleep=Pauses())
    assert ours
    assert read_record(store, "r.json") == record
    assert proxy.conditional_puts - before == (1 if fate == "twice" else 2)
    proxy.fates = [fate]
    assert create_record(store, "r.json", {"v": 2}, sleep=Pauses()) == (record, False)


def test_a_contended_create_is_tried_again_not_taken_for_lost(proxied: Any, counts: Counts) -> None:
    proxy, store = proxied
    proxy.fates = []
    create_record(store, "warm.json", {})
    proxy.fates = ["409", "409", "409"]
    assert create_record(store, "r.json", {"v": 1}, sleep=Pauses())[1]
    assert counts.seen["hashdist_commit_retries_total", "contended"] == 3


def test_a_store_that_ignores_the_condition_is_refused(proxied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, store = proxied
    monkeypatch.setattr(commit, "_proved", set())
    proxy.always = "ignore"
    for _ in range(2):
        with pytest.raises(InvalidInput, match=r"a second create .* must be refused.*Use a local folder, AWS S3, or"):
            create_record(store, "r.json", {"v": 1}, sleep=Pauses())
    assert list(store.list()) == []
    proxy.always = "ok"
    assert create_record(store, "r.json", {"v": 1})[1]


def test_the_proof_is_made_once_and_leaves_nothing(proxied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, store = proxied
    monkeypatch.setattr(commit, "_proved", set())
    before = proxy.conditional_puts
    for number in range(3):
        create_record(store, f"{number}.json", {})
    assert proxy.conditional_puts - before == 3 + 2
    assert [entry.name for entry in store.list()] == ["0.json", "1.json", "2.json"]


@pytest.mark.parametrize(
    "creates", [["lost"], ["twice"], ["away", "contended"], ["ok", "lost"], ["ok", "away"], ["late"]]
)
def test_the_proof_stands_bad_connections(folder: Store, creates: list[str]) -> None:
    faulty = FaultyStore(folder, creates)
    prove_conditional_create(faulty, sleep=Pauses())
    assert list(folder.list()) == []


def test_the_proof_of_a_silent_store_is_put_off(folder: Store) -> None:
    with pytest.raises(Unavailable, match="no answer to"):
        prove_conditional_create(FaultyStore(folder, ["away"] * TRIES), sleep=Pauses())


# Data files


class TestDataFiles:
    def test_what_is_written_is_read(self, store: Store) -> None:
        entry = write_file(store, "a/b.bin", memoryview(b"12345"), rows=2)
        assert entry == {
            "path": "a/b.bin",
            "bytes": 5,
            "sha256": "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5",
            "rows": 2,
        }
        assert read_file(store, entry) == b"12345"

    def test_damage_is_found(self, store: Store) -> None:
        entry = write_file(store, "a.bin", b"12345")
        with pytest.raises(Corrupt, match=r"5 bytes .* were committed, found 5 bytes with"):
            read_file(store, {**entry, "sha256": "0" * 64})
        store.put("b.bin", b"1234")
        with pytest.raises(Corrupt, match="found 4 bytes"):
            read_file(store, {**entry, "path": "b.bin"})
        with pytest.raises(NotFound):
            read_file(store, {**entry, "path": "c.bin"})

    def test_a_manifest_cannot_point_outside(self, store: Store) -> None:
        entry = write_file(store, "a.bin", b"12345")
        with pytest.raises(InvalidInput, match="inside its store"):
            read_file(store, {**entry, "path": "../a.bin"})

    def test_tables_keep_types_nulls_and_metadata(self, store: Store) -> None:
        table = pa.table(
            {
                "id": pa.array([3, 1, 2], pa.int64()),
                "key": ["a", None, "c"],
                "labels": pa.array([[1], None, []], pa.list_(pa.int32())),
                "code": pa.array([b"ab", None, b"cd"], pa.binary(2)),
            }
        ).replace_schema_metadata({"width": "2"})
        entry = write_table(store, "t.parquet", table)
        assert entry["rows"] == 3
        found = read_table(store, entry)
        assert found.equals(table)
        assert found.schema.metadata == {b"width": b"2"}
        assert read_table(store, entry, ["code", "id"]).column_names == ["code", "id"]
        with pytest.raises(InvalidInput, match=r"must have the columns \['x'\], found"):
            read_table(store, entry, ["id", "x"])

    def test_rows_of_a_table(self, store: Store) -> None:
        table = pa.table({"id": list(range(100))})
        entry = write_table(store, "t.parquet", table, row_group_rows=7)
        for rows in ((0, 1), (0, 100), (6, 8), (7, 14), (13, 90), (99, 100), (5, 5)):
            assert read_table(store, entry, rows=rows)["id"].to_pylist() == list(range(*rows))

    def test_of_large_tables_only_the_pages_asked_for_are_read_and_checked(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(commit, "_WHOLE_FILE_BYTES", 1000)
        table = pa.table({"id": list(range(5000)), "x": pa.array([os.urandom(16) for _ in range(5000)], pa.binary(16))})
        entry = write_table(store, "t.parquet", table, row_group_rows=500)
        monkeypatch.setattr(type(store), "get", None)
        assert read_table(store, entry, ["id"]).equals(table.select(["id"]))
        assert read_table(store, entry, rows=(490, 1510)).equals(table.slice(490, 1020))
        monkeypatch.undo()
        monkeypatch.setattr(commit, "_WHOLE_FILE_BYTES", 1000)
        data = bytearray(store.get("t.parquet"))
        place = data.index(table["x"][4321].as_py())
        data[place] ^= 1
        store.put("damaged.parquet", bytes(data))
        damaged = {**entry, "path": "damaged.parquet"}
        assert read_table(store, damaged, ["id"]).num_rows == 5000
        with pytest.raises(Corrupt, match="is not the parquet file that was committed"):
            read_table(store, damaged, ["x"])
        with pytest.raises(Corrupt):
            read_table(store, damaged)
        store.put("short.parquet", bytes(data[:-100]))
        with pytest.raises(Corrupt, match="bytes were committed, found"):
            read_table(store, {**entry, "path": "short.parquet"}, ["id"])
        with pytest.raises(NotFound):
            read_table(store, {**entry, "path": "absent.parquet"}, ["id"])


# Artefacts


class TestArtefacts:
    def test_the_name_is_the_digest_of_what_it_is_made_from(self, store: Store) -> None:
        def name(**changes: Any) -> str:
            given = {"inputs": {"a": "1"}, "settings": {"x": 1, "y": [2.5]}, "revision": 1, **changes}
            return artefact(store, "features", **given).name

        first = name()
        assert len(first) == 32
        assert name(settings={"y": [2.5], "x": 1}) == first
        others = [name(inputs={"a": "2"}), name(settings={"x": 2}), name(revision=2), name(salt="s")]
        assert len({first, *others, artefact(store, "codes", inputs={}, settings={}, revision=1).name}) == 6
        assert artefact(store, "features", inputs={}, settings={}, revision=1).uri.startswith(f"{store.uri}/features/")

    def test_digests_do_not_change_between_releases(self) -> None:
        assert digest({"b": [1, 2.5, None, True], "a": "é"}) == digest({"a": "é", "b": [1, 2.5, None, True]})
        assert digest({"a": 1}) == "2c6b113b8dd15ffbded9860b43eb0c6c"

    def test_kinds_are_known(self, store: Store) -> None:
        with pytest.raises(InvalidInput, match="must be one of collections, features"):
            Artefact(store, "feature", "x")

    def test_nothing_is_there_before_the_manifest(self, store: Store) -> None:
        made = Artefact(store, "features", "x")
        entry = write_file(made.store, made.new_name(".bin"), b"1")
        made.publish_part(0, {"files": [entry]})
        assert not Artefact(store, "features", "x").exists()
        with pytest.raises(NotFound, match=r"is not committed; make it first \(hashdist features\)"):
            Artefact(store, "features", "x").manifest()
        with pytest.raises(NotFound, match=r"found no manifest\.json there"):
            open_artefact(made.uri, "features")
        made.publish({"files": [entry]})
        found = open_artefact(made.uri, "features")
        assert found.exists()
        assert (found.name, found.uri) == ("x", made.uri)
        assert read_file(found.store, found.manifest()["files"][0]) == b"1"
        assert found.manifest() == made.manifest()
        assert found.manifest()["code_version"]
        assert found.manifest()["created_at"].endswith("+00:00")
        with pytest.raises(InvalidInput, match="kind 'codes' is required, found 'features'"):
            open_artefact(made.uri, "codes")

    def test_the_first_part_and_the_first_manifest_stand(self, store: Store) -> None:
        one, other = Artefact(store, "codes", "x"), Artefact(store, "codes", "x")
        assert one.publish_part(7, {"v": 1}) == other.publish_part(7, {"v": 2})
        other.publish_part(12, {"v": 3})
        assert {part: record["v"] for part, record in one.parts().items()} == {7: 1, 12: 3}
        assert one.publish({"v": 1}) == other.publish({"v": 2}) == other.manifest()
        assert other.manifest()["v"] == 1

    def test_no_two_attempts_share_a_name(self, store: Store) -> None:
        one = Artefact(store, "codes", "x")
        names = [one.new_name(".a"), one.new_name(".a"), pickle.loads(pickle.dumps(one)).new_name(".a")]
        names.append(Artefact(store, "codes", "x").new_name(".a"))
        assert len(set(names)) == 4
        attempts = [name.split("/")[1] for name in names]
        assert attempts[0] == attempts[1]
        assert len(set(attempts)) == 3
        child, parent = os.pipe()
        if os.fork() == 0:
            os.write(parent, one.new_name(".a").split("/")[1].encode())
            os._exit(0)
        os.wait()
        assert os.read(child, 100).decode() not in attempts

    def test_many_parts(self, folder: Store) -> None:
        made = Artefact(folder, "codes", "x")
        for part in range(50):
            made.publish_part(part, {"rows": part})
        assert [record["rows"] for _, record in sorted(made.parts().items())] == list(range(50))


# Logs


class TestLogs:
    def test_versions_follow_each_other(self, store: Store) -> None:
        log = Log(store.child("indexes/x"))
        assert log.latest() is None
        assert log.numbers() == []
        first = log.commit({"rows": 0}, 0)
        second = log.commit({"rows": 5}, 1)
        assert (first.number, second.number) == (1, 2)
        assert (second.manifest["parent"], second.manifest["number"]) == (1, 2)
        for view in (log, Log(store.child("indexes/x")), pickle.loads(pickle.dumps(log))):
            assert view.latest() == second
            assert view.read(1) == first
            assert view.numbers() == [1, 2]
        assert store.exists("indexes/x/manifests/00000000000000000002.json")
        with pytest.raises(NotFound, match="has no version 3"):
            log.read(3)

    def test_the_loser_learns_the_winner(self, store: Store) -> None:
        one, other = Log(store), Log(store)
        one.commit({"v": "base"}, 0)
        winner = one.commit({"v": "one"}, 1)
        with pytest.raises(CommitLost, match="version 2 was committed by another writer") as caught:
            other.commit({"v": "other"}, 1)
        assert isinstance(caught.value, Conflict)
        assert caught.value.winner == winner
        assert pickle.loads(pickle.dumps(caught.value)).winner == winner
        assert other.commit({"v": "other"}, caught.value.winner.number).number == 3

    def test_there_are_no_gaps(self, store: Store) -> None:
        log = Log(store)
        for parent in (1, -1):
            with pytest.raises(NotFound, match=f"has no version {parent} to commit upon"):
                log.commit({}, parent)

    def test_another_ones_versions_are_seen(self, store: Store) -> None:
        one, other = Log(store), Log(store)
        one.commit({}, 0)
        assert other.latest() == one.latest()
        for number in range(1, 12):
            one.commit({}, number)
            latest = other.latest()
            assert latest is not None
            assert latest.number == number + 1

    def test_concurrent_writers_make_a_linear_history_that_holds_every_commit(self, store: Store) -> None:
        Log(store).commit({"writer": None}, 0)

        def write(writer: int) -> None:
            log = Log(store)
            for step in range(4):
                latest = log.latest()
                while latest is not None:
                    try:
                        log.commit({"writer": writer, "step": step}, latest.number)
                        break
                    except CommitLost as error:
                        latest = error.winner

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log = Log(store)
        assert log.numbers() == list(range(1, 26))
        history = [log.read(number).manifest for number in log.numbers()]
        assert [manifest["parent"] for manifest in history] == list(range(25))
        for writer in range(6):
            assert [m["step"] for m in history if m["writer"] == writer] == [0, 1, 2, 3]

    def test_names_of_data_files(self, store: Store) -> None:
        log = Log(store)
        name = log.new_name("shards", ".bin")
        assert name.startswith("shards/")
        assert name.endswith(".bin")
        assert log.new_attempt().attempt != log.new_attempt().attempt
        assert log.new_name("shards", ".bin") != log.new_name("shards", ".bin")
        assert pickle.loads(pickle.dumps(log)).new_name("shards", ".bin").split("/")[1] != name.split("/")[1]
