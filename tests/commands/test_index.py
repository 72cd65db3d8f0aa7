"""The commands about the log of an index, and `storage check`: what they print, and with which exit code."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashdist import cli
from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.ground.options import TagOptions, VacuumOptions
from hashdist.index import Index, create_index, open_index
from hashdist.index.pins import store_time
from hashdist.index.shards.shard import parts
from hashdist.index.upkeep import retention
from hashdist.store import Store, check, commit, open_store
from hashdist.store.base import Entry
from tests.worlds.faults import FaultyStore

Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code and JSON result of a command; with `text=True` the text instead."""

    def call(*words: object, text: bool = False) -> tuple[int, Any]:
        code = cli.main([*map(str, words), *([] if text else ["--json"])])
        out = capsys.readouterr().out
        return code, out if text else json.loads(out)

    return call


@pytest.fixture
def index(tmp_path: Path) -> Index:
    made = create_index(str(tmp_path / "root" / "indexes" / "images"), bits=16)
    for number in range(3):
        made.append(np.full((1, 2), number, np.uint8), [f"k{number}"])
    return made


@pytest.fixture
def root(index: Index, tmp_path: Path) -> list[object]:
    return ["--root", tmp_path / "root"]


def test_flags_may_have_dashes_and_switches_stand_alone() -> None:
    words = ["--older-than", "2h", "--dry-run", "--force", "false", "--artefacts", "--root", "a-b"]
    settings, options = cli.parse("index vacuum", words)
    assert options == VacuumOptions(older_than="2h", dry_run=True, force=False, artefacts=True)
    assert settings.root == "a-b"
    assert cli.parse("index tag", ["gold", "--delete"])[1] == TagOptions(name="gold", delete=True)
    assert cli.parse("index rollback", ["--to", "gold"])[1].to == "gold"
    assert cli.parse("index rollback", ["--to=3"])[1].to == 3
    assert cli.parse("search", ["--version", "gold"])[1].version == "gold"
    assert cli.parse("search", ["--version", "2"])[1].version == 2


def test_tags_are_given_shown_used_and_taken_away(run: Run, root: list[object], index: Index) -> None:
    code, done = run("index", "tag", "gold", "--version", 2, *root)
    assert (code, done["version"], done["deleted"]) == (0, 2, False)
    assert run("index", "tag", "gold", *root)[0] == 2
    assert run("index", "tag", *root)[0] == 2
    _, log = run("index", "log", *root)
    assert [v["tags"] for v in log["versions"]] == [[], ["gold"], [], [], []]
    assert "append  [gold]" in run("index", "log", *root, text=True)[1]
    _, found = run("search", "--code", "0000", "--version", "gold", *root)
    assert [hit["key"] for hit in found["hits"]] == ["k0"]
    assert run("index", "tag", "gold", "--delete", *root)[1]["version"] == 2
    assert run("index", "tag", "gold", "--delete", *root)[0] == 2


def test_rollback(run: Run, root: list[object], index: Index) -> None:
    code, done = run("index", "rollback", "--to", 2, *root)
    assert (code, done["version"], done["rows"]) == (0, 5, 1)
    assert list(open_index(index.uri).keys()) == ["k0"]
    assert run("index", "rollback", *root)[0] == 2
    assert run("index", "rollback", "--to", "nothing", *root)[0] == 2
    assert run("index", "rollback", "--to", 9, *root)[0] == 2


def test_verify_ends_with_1_where_anything_is_wrong(run: Run, root: list[object], index: Index) -> None:
    code, done = run("index", "verify", *root)
    assert (code, done["faults"], done["versions"], done["rows"]) == (0, [], 4, 3)
    path = parts(index.manifest["shards"][0])["keys"]["path"]
    own = index.store.local_path(path)
    assert own is not None
    own.write_bytes(own.read_bytes()[:-1])
    code, done = run("index", "verify", *root)
    assert code == 1
    assert [fault["file"] for fault in done["faults"] if fault["file"]] == [path]
    text = run("index", "verify", *root, text=True)[1]
    assert f"  {path} (version 2, 3, 4): " in text


def test_vacuum(run: Run, root: list[object], index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    retention.rollback(index, 1)
    code, done = run("index", "vacuum", *root)
    assert (code, done["expired"], done["version"]) == (0, [], 5)
    assert run("index", "vacuum", "--older-than", "5m", *root)[0] == 2
    assert run("index", "vacuum", "--older-than", "soon", *root)[0] == 2
    later = retention.vacuum.__kwdefaults__ | {"clock": lambda store: store_time(store) + 8 * 86_400}
    monkeypatch.setattr(retention.vacuum, "__kwdefaults__", later)
    before = {entry.name for entry in index.store.list()}
    code, dry = run("index", "vacuum", "--dry-run", *root)
    assert (code, dry["expired"], dry["deleted"]["expired"]["files"]) == (0, [[1, 4]], 9)
    assert {entry.name for entry in index.store.list()} == before
    told = run("index", "vacuum", "--dry-run", *root, text=True)[1]
    assert "4 versions would be expired 1 to 4, 1 remain" in told
    code, done = run("index", "vacuum", *root)
    assert (code, done["expired"], done["deleted"]) == (0, [[1, 4]], dry["deleted"])
    assert not [entry for entry in index.store.list() if entry.name.startswith("shards/")]
    assert run("index", "rollback", "--to", 2, *root)[0] == 2
    assert "(vacuumed)" in run("index", "log", *root, text=True)[1]


# storage check


def test_a_good_store_passes_and_is_left_as_it_was(run: Run, root_uri: str) -> None:
    code, done = run("storage", "check", root_uri)
    assert (code, done["fit"], done["conditional_create"]) == (0, True, True)
    assert [one["name"] for one in done["checks"] if one["passed"]] == [name for name, _, _ in check._PROOFS]
    assert list(open_store(root_uri).list()) == []
    assert run("storage", "check", "--root", root_uri)[0] == 0
    assert run("storage", "check")[0] == 2


class Ignores(FaultyStore):
    """A store that ignores the condition of a create."""

    def create(self, name: str, data: bytes, write_id: str) -> None:
        self.inner.delete(name)
        self.inner.create(name, data, write_id)


class Forgets(FaultyStore):
    """A store whose listings lag."""

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[Entry]:
        return iter([entry for entry in self.inner.list(prefix, start_after) if "-list-" not in entry.name])


class Stale(FaultyStore):
    """A store that returns something older."""

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return b"old" if "-read-" in name else self.inner.get(name, start, length)


class Keeps(FaultyStore):
    """A store that deletes nothing."""

    def delete(self, name: str) -> None:
        pass


class Refuses(FaultyStore):
    """A store that may only be read."""

    def put(self, name: str, data: bytes | memoryview) -> None:
        raise InvalidInput("403")


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        (Ignores, "conditional create", r"Use a local folder, AWS S3, or an S3 server that honours"),
        (Forgets, "list after write", "not listed at once"),
        (Stale, "read after write", "not read back at once"),
        (Keeps, "delete", "still listed"),
        (Refuses, "write", "403"),
    ],
)
def test_what_a_store_does_not_do_is_named(tmp_path: Path, kind: type[FaultyStore], name: str, text: str) -> None:
    checks = {one.name: one for one in check.check(kind(open_store(str(tmp_path / "store"))))}
    assert checks[name].passed is False
    assert text in checks[name].text
    names = list(checks)
    before, after = names[: names.index(name)], names[names.index(name) + 1 :]
    assert all(checks[one].passed for one in before)
    expected = None if checks[name].required else True
    assert {checks[one].passed for one in after} == {expected}


def test_an_unfit_store_ends_with_2(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ignores(uri: str) -> Store:
        return Ignores(open_store(uri))

    monkeypatch.setattr("hashdist.commands.storage.open_store", ignores)
    monkeypatch.setattr(commit, "_pause_s", lambda attempt: 0.0)
    code, done = run("storage", "check", tmp_path / "store")
    assert (code, done["fit"], done["conditional_create"]) == (2, False, False)
    told = run("storage", "check", tmp_path / "store", text=True)[1]
    assert "NOT fit for commits" in told
    assert "FAILED  conditional create" in told
    assert "  -     one winner" in told


def test_an_index_that_is_not_there(run: Run, tmp_path: Path) -> None:
    for words in (["tag", "x"], ["rollback", "--to", "1"], ["verify"], ["vacuum"]):
        code, done = run("index", *words, "--root", tmp_path / "nowhere")
        assert (code, done["error"]["kind"]) == (2, NotFound.__name__)
