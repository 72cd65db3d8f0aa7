"""What every store must do, over all of them; and what only one kind must do."""

import errno
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from hashdist.ground.errors import AlreadyExists, HashdistError, InvalidInput, NotFound, OutcomeUnknown, Unavailable
from hashdist.store import Store, open_store
from hashdist.store import local as local_module
from hashdist.store.base import Contended, Exists
from hashdist.store.s3 import _answer
from tests import REPOSITORY
from tests.worlds.faults import FaultyProxy

NAMES = [
    "A",
    "a-b",
    "a.txt",
    "a/b-c/d",
    "a/b.x",
    "a/b/c",
    "a0",
    "b",
    "z/a",
    "é/x",
    "éa",
    "日本/本",
    "\U0001f600",
]


@pytest.fixture
def store(root_uri: str) -> Store:
    return open_store(root_uri)


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "root"))


class TestEveryStore:
    def test_what_is_put_is_got_whole_or_by_range(self, store: Store) -> None:
        store.put("x/data.bin", memoryview(b"0123456789"))
        assert store.get("x/data.bin") == b"0123456789"
        for start in range(12):
            for length in (None, 0, 1, 5, 20):
                stop = None if length is None else start + length
                assert store.get("x/data.bin", start, length) == b"0123456789"[start:stop]

    def test_an_empty_object(self, store: Store) -> None:
        store.put("empty", b"")
        assert store.get("empty") == b""
        assert [entry.size for entry in store.list()] == [0]

    def test_put_file(self, store: Store, tmp_path: Path) -> None:
        path = tmp_path / "source"
        path.write_bytes(os.urandom(9 << 20))
        store.put_file("big", path)
        assert store.get("big") == path.read_bytes()

    def test_what_is_not_there(self, store: Store) -> None:
        assert not store.exists("a")
        assert list(store.list()) == []
        assert list(store.list("a/b")) == []
        store.delete("a")
        with pytest.raises(NotFound, match=f"{store.uri}/a/b does not exist"):
            store.get("a/b")
        with pytest.raises(NotFound):
            store.get("a/b", 5, 5)

    def test_delete(self, store: Store) -> None:
        store.put("a/b", b"x")
        assert store.exists("a/b")
        assert not store.exists("a")
        store.delete("a/b")
        assert not store.exists("a/b")
        assert list(store.list()) == []

    def test_listings_are_in_byte_order_and_cut_by_prefix_and_start(self, store: Store) -> None:
        for name in NAMES:
            store.put(name, name.encode())
        model = sorted(NAMES, key=str.encode)
        assert [entry.name for entry in store.list()] == model
        for prefix in ["", *model, "a", "a/", "a/b", "a/b/", "é", "nothing", "a/nothing"]:
            for after in ["", *model, "a", "a/", "a/z", "zz", "é"]:
                expected = [n for n in model if n.startswith(prefix) and n.encode() > after.encode()]
                assert [entry.name for entry in store.list(prefix, after)] == expected, (prefix, after)

    def test_entries_say_size_stamp_and_age(self, store: Store) -> None:
        store.put("a", b"123")
        store.put("b", b"4567")
        first, second = store.list()
        assert (first.size, second.size) == (3, 4)
        assert first.stamp != second.stamp
        assert next(store.list("a")).stamp == first.stamp
        assert abs(first.modified - second.modified) < 60
        assert first.modified > 1_700_000_000

    def test_children(self, store: Store) -> None:
        child = store.child("x/y")
        child.put("z", b"1")
        assert child.uri == f"{store.uri}/x/y"
        assert store.get("x/y/z") == open_store(child.uri).get("z") == b"1"
        assert [entry.name for entry in child.list()] == ["z"]

    def test_copies_in_other_processes_see_the_same(self, store: Store) -> None:
        store.put("a", b"1")
        copy = pickle.loads(pickle.dumps(store))
        assert (copy.uri, copy.get("a")) == (store.uri, b"1")

    def test_bulk_reading(self, store: Store) -> None:
        store.put("x/a", b"12345")
        filesystem, base = store.filesystem()
        with filesystem.open_input_file(f"{base}/x/a") as file:
            assert file.read() == b"12345"
        assert filesystem.get_file_info(f"{base}/x/b").type == pyarrow.fs.FileType.NotFound
        path = store.local_path("x/a")
        assert path is None or path.read_bytes() == b"12345"

    @pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "a/../../b", "a\0b"])
    def test_names_stay_inside(self, store: Store, name: str) -> None:
        for call in (store.get, store.exists, store.delete, store.child, lambda n: store.put(n, b""), store.local_path):
            if getattr(call, "__name__", "") == "local_path" and call(" x") is None:
                continue
            with pytest.raises(InvalidInput, match="must be a relative path inside its store"):
                call(name)

    def test_create_refuses_a_name_in_use(self, store: Store) -> None:
        store.create("x/record", b"first", "id-1")
        with pytest.raises(Exists):
            store.create("x/record", b"second", "id-2")
        assert store.get("x/record") == b"first"
        assert [entry.name for entry in store.list()] == ["x/record"]

    def test_one_of_many_creates_wins(self, store: Store) -> None:
        for number in range(12):
            name = f"manifests/{number}"
            outcomes: list[str] = []
            together = threading.Barrier(8)

            def race(writer: int, name: str = name, together: Any = together, outcomes: Any = outcomes) -> None:
                together.wait()
                try:
                    store.create(name, f"{writer}".encode() * 1000, f"{writer}")
                    outcomes.append(f"{writer}")
                except (Exists, Contended):
                    outcomes.append("lost")

            threads = [threading.Thread(target=race, args=(writer,)) for writer in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            winners = [outcome for outcome in outcomes if outcome != "lost"]
            assert len(outcomes) == 8
            assert len(winners) == 1
            assert store.get(name) == winners[0].encode() * 1000


@pytest.mark.parametrize(
    "uri", ["", "gs://bucket/x", "http://host/x", "file://host/x", "s3://", "s3:///x", "s3://b//x"]
)
def test_uris_that_name_no_store(uri: str) -> None:
    with pytest.raises(InvalidInput, match="found"):
        open_store(uri)


def test_spellings_of_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uris = {
        open_store(text).uri
        for text in ("a b", "./a b", "x/../a b/", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b")
    }
    assert uris == {(tmp_path / "a b").as_uri()}
    assert {open_store(text).uri for text in ("s3://b/x", "s3://b/x/")} == {"s3://b/x"}
    assert open_store("s3://b").uri == "s3://b"


# Local


def test_put_never_overwrites(folder: Store) -> None:
    folder.put("a", b"1")
    with pytest.raises(AlreadyExists, match="never overwritten"):
        folder.put("a", b"2")
    assert folder.get("a") == b"1"
    assert [entry.name for entry in folder.list()] == ["a"]


def test_content_is_on_disk_before_the_name_and_the_name_before_success(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put("x/first", b"")
    calls: list[str] = []
    fsync, link = os.fsync, os.link

    def spy_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def spy_link(source: Any, target: Any) -> None:
        calls.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "link", spy_link)
    folder.create("x/second", b"1", "id")
    assert calls == ["file", "link", "folder"]


def test_new_folders_are_synced_into_their_parents(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = local_module._sync_folder
    monkeypatch.setattr(local_module, "_sync_folder", lambda path: (synced.append(path.name), sync(path)))
    folder.put("a/b/c", b"")
    assert synced[-4:] == [folder.local_path("x").parent.parent.name, "root", "a", "b"]  # type: ignore[union-attr]


KILLED = """
import os, sys
from hashdist.store import open_store
store = open_store(sys.argv[1])
os.link = lambda *names: os._exit(9)
store.create("manifests/1", b"never seen", "id")
"""


def test_a_writer_killed_before_the_name_leaves_nothing_to_be_seen(folder: Store) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", KILLED, folder.uri], env=environment, check=False)
    assert done.returncode == 9
    assert not folder.exists("manifests/1")
    assert list(folder.list()) == []
    left = folder.local_path("manifests")
    assert left is not None
    assert [path.name.startswith(local_module.TEMPORARY) for path in left.iterdir()] == [True]
    folder.create("manifests/1", b"the next writer", "id")
    assert [entry.name for entry in folder.list()] == ["manifests/1"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, Unavailable), (errno.EIO, Unavailable), (errno.EACCES, InvalidInput), (errno.EROFS, InvalidInput)],
)
def test_a_write_that_fails_leaves_nothing(
    folder: Store, number: int, kind: type[HashdistError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(local_module, "_make_folder", lambda path: path.mkdir(parents=True, exist_ok=True))
    with pytest.raises(kind, match=r"cannot be written|synced"):
        folder.put("a", b"1")
    monkeypatch.undo()
    path = folder.local_path("a")
    assert path is not None
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_synced_leaves_the_outcome_unknown(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put("first", b"")

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(local_module, "_sync_folder", fail)
    with pytest.raises(OutcomeUnknown, match="could not be synced"):
        folder.create("a", b"1", "id")
    assert folder.get("a") == b"1"


def test_a_file_system_without_links_is_refused(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Any, target: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(InvalidInput, match=r"commits with hard links.*use another folder, or an s3:// root"):
        folder.create("a", b"1", "id")
    assert list(folder.list()) == []


def test_a_file_where_a_folder_should_be(folder: Store) -> None:
    folder.put("a", b"1")
    assert not folder.exists("a/b")
    with pytest.raises(NotFound):
        folder.get("a/b")
    with pytest.raises(InvalidInput, match="cannot be written"):
        folder.put("a/b", b"1")
    folder.child("x").put("y", b"1")
    with pytest.raises(InvalidInput, match="cannot be read"):
        folder.get("x")


def test_links_are_followed_but_not_in_circles(folder: Store, tmp_path: Path) -> None:
    folder.put("real/a", b"1")
    base = folder.local_path("real")
    assert base is not None
    (base / "circle").symlink_to(base.parent)
    (base / "nothing").symlink_to(tmp_path / "gone")
    (base.parent / "alias").symlink_to(base)
    (tmp_path / "elsewhere").write_bytes(b"22")
    (base / "file").symlink_to(tmp_path / "elsewhere")
    assert [(e.name, e.size) for e in folder.list("real/")] == [("real/a", 1), ("real/file", 2)]
    assert [entry.name for entry in folder.list("alias/")] == ["alias/a", "alias/file"]


# S3


@pytest.fixture
def bucket(s3_endpoint: str, tmp_path: Path) -> Store:
    return open_store(f"s3://hashdist/{tmp_path.name}-{os.urandom(4).hex()}")


def test_listings_of_many_pages(bucket: Store) -> None:
    threads = [
        threading.Thread(target=lambda lane=lane: [bucket.put(f"{i:04d}", b"") for i in range(lane, 1100, 4)])
        for lane in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.name for entry in bucket.list()] == [f"{i:04d}" for i in range(1100)]
    assert [entry.name for entry in bucket.list("", "1097")] == ["1098", "1099"]


def test_the_write_id_is_beside_the_object(bucket: Store) -> None:
    import boto3

    bucket.create("a", b"{}", "the-id")
    name, _, key = bucket.uri.removeprefix("s3://").partition("/")
    assert boto3.client("s3").head_object(Bucket=name, Key=f"{key}/a")["Metadata"] == {"write-id": "the-id"}


def test_folder_marks_of_other_clients_are_no_objects(bucket: Store) -> None:
    import boto3

    name, _, key = bucket.uri.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=name, Key=f"{key}/x/", Body=b"")
    bucket.put("x/a", b"1")
    assert [entry.name for entry in bucket.list()] == ["x/a"]


def test_a_missing_bucket_is_the_callers_to_mend(s3_endpoint: str) -> None:
    store = open_store("s3://no-such-bucket/x")
    for call in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: list(store.list())):
        with pytest.raises(InvalidInput, match="the bucket does not exist; create it, or name another root"):
            call()


def test_credentials_are_required(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(InvalidInput, match="S3 credentials are required"):
        open_store("s3://hashdist/x").get("a")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hashdist.store.s3._ATTEMPTS", 1)


def test_a_server_that_is_away(s3_endpoint: str, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="the S3 endpoint cannot be reached"):
        open_store("s3://hashdist/x").put("a", b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    with pytest.raises(InvalidInput, match="AWS_ENDPOINT_URL must read"):
        open_store("s3://hashdist/x").get("a")


def test_an_answer_cut_short_is_asked_for_again(
    bucket: Store, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(300_000)
    bucket.put("a", data)
    with FaultyProxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.cut_gets = 3
        assert bucket.get("a", 5) == data[5:]
        assert proxy.cut_gets == 0
        proxy.cut_gets = 99
        with pytest.raises(Unavailable, match="broke in the middle of the object"):
            bucket.get("a")


@pytest.mark.parametrize(
    ("status", "code", "reading", "writing"),
    [
        (412, "PreconditionFailed", Exists, Exists),
        (409, "ConditionalRequestConflict", Contended, Contended),
        (409, "OperationAborted", Contended, Contended),
        (409, "409", Contended, Contended),
        (409, "BucketNotEmpty", InvalidInput, InvalidInput),
        (404, "NoSuchKey", NotFound, NotFound),
        (404, "NoSuchBucket", InvalidInput, InvalidInput),
        (403, "AccessDenied", InvalidInput, InvalidInput),
        (403, "InvalidAccessKeyId", InvalidInput, InvalidInput),
        (403, "RequestTimeTooSkewed", Unavailable, OutcomeUnknown),
        (400, "RequestTimeout", Unavailable, OutcomeUnknown),
        (429, "TooManyRequests", Unavailable, OutcomeUnknown),
        (500, "InternalError", Unavailable, OutcomeUnknown),
        (503, "SlowDown", Unavailable, OutcomeUnknown),
        (501, "NotImplemented", InvalidInput, InvalidInput),
        (400, "InvalidArgument", InvalidInput, InvalidInput),
    ],
)
def test_answers_are_told_apart_by_what_to_do_next(
    status: int, code: str, reading: type[HashdistError], writing: type[HashdistError]
) -> None:
    response = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert type(_answer(response, "s3://b/x", writes=False)) is reading
    assert type(_answer(response, "s3://b/x", writes=True)) is writing
