"""The local cache: bounded, shared by processes, never losing a file in use; and keys that are read by ranges."""

import errno
import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashdist.ground.errors import Corrupt, InvalidInput, NotFound, Unavailable
from hashdist.index import create_index, open_index
from hashdist.index.shards import keys as key_files
from hashdist.index.shards.keys import KeyFile
from hashdist.index.shards.shard import Shard, parts
from hashdist.store import cache, open_store
from hashdist.store.cache import local_file
from hashdist.store.commit import write_file
from hashdist.store.local import LocalStore
from tests import REPOSITORY


class Remote(LocalStore):
    """A folder that counts as far away. Appends every range that is asked for to a file beside it."""

    def local_path(self, name: str) -> Any:
        """The real path for the store's own use, none for the cache."""
        return None if sys._getframe(1).f_code.co_name == "local_file" else super().local_path(name)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        with (self._folder.parent / "requests").open("a") as log:
            log.write(f"{name} {start} {length}\n")
        return super().get(name, start, length)

    @property
    def requests(self) -> list[str]:
        log = self._folder.parent / "requests"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_RECENT_S", 0)


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path / "store")


def made(store: Remote, name: str, size: int = 1000) -> dict[str, Any]:
    return write_file(store, name, np.random.default_rng(len(name)).bytes(size - len(name)) + name.encode())


def held(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("??/*")}


# Bounded


class User:
    """Something that uses files."""


def test_the_least_recently_used_goes_and_what_is_in_use_stays(
    remote: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASHDIST_CACHE_GB", str(3500 / 1e9))
    files = [made(remote, name) for name in "abcdef"]
    user = User()
    in_use = local_file(remote, files[0], user)
    for entry in files[1:3]:
        local_file(remote, entry)
    local_file(remote, files[1])  # used again
    local_file(remote, files[3])
    assert held(own_cache) == {files[number]["sha256"] for number in (0, 1, 3)}
    content = in_use.read_bytes()
    for entry in files[1:]:
        local_file(remote, entry)
    assert held(own_cache) == {files[number]["sha256"] for number in (0, 4, 5)}
    assert hashlib.sha256(content).hexdigest() == files[0]["sha256"]
    del user
    gc.collect()
    local_file(remote, files[1])
    assert files[0]["sha256"] not in held(own_cache)
    assert len(held(own_cache)) == 3


def test_files_in_use_may_be_more_than_the_bound(
    remote: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASHDIST_CACHE_GB", str(1500 / 1e9))
    user = User()
    paths = [local_file(remote, made(remote, name), user) for name in "abc"]
    assert [path.read_bytes()[-1:] for path in paths] == [b"a", b"b", b"c"]
    del user
    gc.collect()
    local_file(remote, made(remote, "d"))
    assert len(held(own_cache)) == 1


def test_what_was_derived_from_files_counts_and_goes_too(
    remote: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASHDIST_CACHE_GB", str(3500 / 1e9))
    derived = [own_cache / "radius" / "a-3x20-b.npy", own_cache / "engines" / "a-ivf-b.faiss"]
    for path in derived:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 1500)
        os.utime(path, (1, 1))
    local_file(remote, made(remote, "a"))
    assert sum(path.exists() for path in derived) == 1
    for name in "bc":
        local_file(remote, made(remote, name))
    assert not any(path.exists() for path in derived)


def test_a_file_used_a_moment_ago_is_not_evicted(
    remote: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_RECENT_S", 60)
    monkeypatch.setenv("HASHDIST_CACHE_GB", str(1500 / 1e9))
    for name in "abc":
        local_file(remote, made(remote, name))
    assert len(held(own_cache)) == 3


@pytest.mark.parametrize("wrong", ["much", "0", "-1"])
def test_a_bound_that_is_none(remote: Remote, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("HASHDIST_CACHE_GB", wrong)
    with pytest.raises(InvalidInput, match="HASHDIST_CACHE_GB"):
        local_file(remote, made(remote, "a"))


# Shared

PROCESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
from tests.store.test_cache import Remote, User
from hashdist.store import cache
cache._RECENT_S = 0
cache._RANGE_BYTES = 100
store = Remote(Path({store!r}))
user = User()
for entry in {entries!r}:
    path = cache.local_file(store, entry, user)
    assert len(path.read_bytes()) == entry["bytes"]
print("here", flush=True)
if {stay!r}:
    time.sleep(600)
"""


def process(remote: Remote, entries: list[dict[str, Any]], *, stay: bool) -> subprocess.Popen[str]:
    script = PROCESS.format(repository=str(REPOSITORY), store=str(remote._folder), entries=entries, stay=stay)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_processes_fetch_a_file_once_and_one_of_them_keeps_it_from_all(
    remote: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [made(remote, name) for name in "abc"]
    several = [process(remote, entries, stay=False) for _ in range(3)]
    assert [p.wait(timeout=120) for p in several] == [0, 0, 0]
    assert sorted(remote.requests) == sorted(set(remote.requests))
    assert len(remote.requests) == 30
    assert held(own_cache) == {entry["sha256"] for entry in entries}
    monkeypatch.setenv("HASHDIST_CACHE_GB", str(1500 / 1e9))
    other = process(remote, entries[:1], stay=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        local_file(remote, made(remote, "d"))
        assert entries[0]["sha256"] in held(own_cache)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=60)
    local_file(remote, made(remote, "e"))
    assert entries[0]["sha256"] not in held(own_cache)
    assert len(list((own_cache / "in-use").iterdir())) == 1  # this process


def test_threads_wait_for_the_one_that_fetches(remote: Remote, own_cache: Path) -> None:
    entry, paths = made(remote, "a", 50_000), []
    threads = [threading.Thread(target=lambda: paths.append(local_file(remote, entry))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8
    assert len(remote.requests) == 1


def test_what_a_killed_process_left_is_no_obstacle(remote: Remote, own_cache: Path) -> None:
    entry = made(remote, "a")
    left = own_cache / entry["sha256"][:2] / f"{entry['sha256']}.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x" * 5000)
    assert local_file(remote, entry).read_bytes()[-1:] == b"a"
    stale = left.with_name("0" * 64 + ".part")
    stale.write_bytes(b"x")
    os.utime(stale, (0, 0))
    (own_cache / "in-use" / "dead").mkdir()
    (own_cache / "in-use" / "dead" / "alive").touch()
    cache._forget_the_dead(own_cache)
    assert not stale.exists()
    assert not (own_cache / "in-use" / "dead").exists()


# Damage, and what cannot be written


def test_what_is_cut_short_at_the_store_is_refused_and_leaves_nothing(
    remote: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_RANGE_BYTES", 300)
    entry = made(remote, "a")
    LocalStore(remote._folder).delete("a")
    with pytest.raises(NotFound):
        local_file(remote, entry)
    remote.put("a", b"short")
    with pytest.raises(Corrupt, match="was committed"):
        local_file(remote, entry)
    assert held(own_cache) == set()


def test_no_room(remote: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    entry = made(remote, "a")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(Unavailable, match="make room"):
            local_file(remote, entry)
    assert held(own_cache) == set()
    assert local_file(remote, entry).exists()


def test_a_cache_that_cannot_be_written(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "blocked"
    blocked.touch()  # not writable even for root
    monkeypatch.setenv("HASHDIST_CACHE", str(blocked / "cache"))
    entries = [made(remote, name) for name in "ab"]
    paths = [local_file(remote, entry) for entry in [*entries, *entries]]
    assert [path.read_bytes()[-1:] for path in paths] == [b"a", b"b", b"a", b"b"]
    assert len(remote.requests) == 2
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_copies_that_others_made_serve_where_nothing_can_be_written(
    remote: Remote, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = made(remote, "a")
    local_file(remote, entry)
    real = cache._Cache

    def refused(folder: Path) -> Any:
        if folder == own_cache:
            raise PermissionError(errno.EROFS, "Read-only file system", str(folder))
        return real(folder)

    monkeypatch.setattr(cache, "_Cache", refused)
    cache._open_once.cache_clear()
    user = User()
    assert local_file(remote, entry, user).read_bytes()[-1:] == b"a"
    assert len(remote.requests) == 1
    local_file(remote, made(remote, "b"))
    assert held(own_cache) == {entry["sha256"]}
    cache._open_once.cache_clear()


# Opening an index


def test_the_files_of_several_shards_are_fetched_at_the_same_time(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request for codes waits until three are under way: one after the other they would wait for ever."""
    from hashdist.store.s3 import S3Store

    uri = f"s3://hashdist/{tmp_path.name}-opening/index"
    index = create_index(uri, bits=64)
    codes = np.random.default_rng(0).integers(0, 256, (60, 8), dtype=np.uint8)
    for start in range(0, 60, 10):
        index.append(codes[start : start + 10], [f"k{i}" for i in range(start, start + 10)])
    waiting, get = threading.Barrier(3), S3Store.get

    def together(self: S3Store, name: str, start: int = 0, length: int | None = None) -> bytes:
        if name.endswith(".bin"):
            waiting.wait(timeout=60)
        return get(self, name, start, length)

    reader = open_index(uri)
    monkeypatch.setattr(S3Store, "get", together)
    hits = reader.search(codes[:3], 1)
    assert hits.keys() == [["k0"], ["k1"], ["k2"]]


def test_a_search_fetches_neither_columns_nor_keys(s3_endpoint: str, tmp_path: Path, own_cache: Path) -> None:
    uri = f"s3://hashdist/{tmp_path.name}-lean/index"
    index = create_index(uri, bits=64)
    index.append(np.zeros((5, 8), np.uint8), list("abcde"), {"digest": list("abcde")})
    hits = open_index(uri).search(np.zeros((1, 8), np.uint8), 3)
    entries = parts(index.manifest["shards"][0])
    assert held(own_cache) == {entries["codes"]["sha256"], entries["ids"]["sha256"]}
    hits.keys()
    assert held(own_cache) == {entries[part]["sha256"] for part in ("codes", "ids", "keys")}


# Keys


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_files, "BATCH_ROWS", 16)
    monkeypatch.setattr(key_files, "_SMALL_BYTES", 0)


def key_file(store: Remote, keys: list[str], name: str = "keys") -> tuple[KeyFile, dict[str, Any]]:
    entry = write_file(store, name, key_files.encode(pa.array(keys, pa.large_string())), len(keys))
    return KeyFile(store, entry, lambda: local_file(store, entry)), entry


@given(st.lists(st.text(max_size=9), min_size=1, max_size=90), st.data())
@settings(max_examples=60, deadline=None)
def test_any_rows_of_any_keys(tmp_path_factory: pytest.TempPathFactory, keys: list[str], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(key_files, "BATCH_ROWS", 16)
        patched.setattr(key_files, "_SMALL_BYTES", 0)
        file, entry = key_file(Remote(tmp_path_factory.mktemp("keys") / "store"), [f"{key}é" for key in keys])
        for _ in range(3):
            rows = data.draw(st.lists(st.integers(0, len(keys) - 1), max_size=20))
            assert file.take(np.array(rows, np.int64)) == [f"{keys[row]}é" for row in rows]
        assert [key.removesuffix("é") for key in file.open()["key"].to_pylist()] == keys
        assert entry["rows"] == len(keys)


@pytest.mark.usefixtures("small_batches")
def test_a_few_keys_take_their_ranges_and_many_take_the_file(remote: Remote) -> None:
    keys = [f"images/{number:06d}.jpeg" for number in range(4000)]
    file, entry = key_file(remote, keys)
    assert file.take(np.array([3999, 17, 0, 18])) == [keys[3999], keys[17], keys[0], keys[18]]
    asked = [line.split() for line in remote.requests]
    assert len(asked) == 1 + 3  # the head, three batches
    assert sum(int(length) for _, _, length in asked) < entry["bytes"] // 10
    assert not file.opened
    for start in range(0, 4000, 17):  # many requests for a few keys each come to the file as well
        assert file.take(np.array([start])) == [keys[start]]
        if file.opened:
            break
    assert start < 3900
    asked_then = len(remote.requests)
    assert file.take(np.arange(4000)) == keys
    assert len(remote.requests) == asked_then


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("at", ["head", "batch"])
def test_damage_is_seen_without_the_rest_of_the_file(remote: Remote, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"{number:09d}" for number in range(2000)]
    file, entry = key_file(remote, keys)
    get = remote.get
    once = []

    def damaged(name: str, start: int = 0, length: int | None = None) -> bytes:
        data = bytearray(get(name, start, length))
        if (start == 0) == (at == "head") and not once:
            once.append(1)
            data[len(data) // 2] ^= 1
        return bytes(data)

    monkeypatch.setattr(remote, "get", damaged)
    assert file.take(np.array([700, 1500])) == [keys[700], keys[1500]]  # on the way: the whole file was sound
    assert file.opened
    whole = bytearray(get("keys"))
    whole[whole.index((keys[999] + keys[1000]).encode()) + 9] ^= 1
    remote.put("bad", bytes(whole))
    bad = {**entry, "path": "bad"}
    broken = KeyFile(remote, bad, lambda: local_file(remote, bad))
    local_file(remote, entry).unlink()  # the same checksum stands for both
    assert broken.take(np.array([0])) == [keys[0]]
    with pytest.raises(Corrupt):
        broken.take(np.array([1000]))


@pytest.mark.usefixtures("small_batches")
def test_shards_are_searched_by_key_over_ranges(s3_endpoint: str, tmp_path: Path, own_cache: Path) -> None:
    uri = f"s3://hashdist/{tmp_path.name}-ranges/index"
    index = create_index(uri, bits=64)
    codes = np.random.default_rng(0).integers(0, 256, (3000, 8), dtype=np.uint8)
    keys = [f"a/rather/long/name/{i:07d}" for i in range(3000)]
    for start in range(0, 3000, 1000):
        index.append(codes[start : start + 1000], keys[start : start + 1000])
    reader = open_index(uri)
    assert reader.search(codes[:3000:500], 1).keys() == [[key] for key in keys[::500]]
    np.testing.assert_array_equal(reader.codes_of([keys[5], keys[2999]]), codes[[5, 2999]])
    entries = [parts(shard)["keys"]["sha256"] for shard in index.manifest["shards"]]
    assert not held(own_cache) & set(entries)
    shard = Shard(open_store(uri), index.manifest["shards"][1])
    assert sorted(shard.keys()) == keys[1000:2000]
