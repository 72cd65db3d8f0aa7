"""The command line: settings from flags and files, clear refusals, exit codes."""

import json
import shlex
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from hashdist import cli
from hashdist.commands.catalogue import COMMANDS
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import Settings


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("root: /r\ntrain: {bits: 16, options: {lr: 0.01}}\nfeatures: {preprocess: {mean: [0.5]}}\n")
    settings, options = cli.parse("train", ["--config", str(file), "--train.bits", "32", "--train.options.lam=2"])
    assert options is None
    assert (settings.root, settings.train.bits, settings.features.preprocess.mean) == ("/r", 32, [0.5])
    assert settings.train.options == {"lr": 0.01, "lam": 2}


def test_a_command_has_options_of_its_own() -> None:
    settings, options = cli.parse("search", ["--key", "a.jpg", "--k=3", "--root", "/r"])
    assert (options.key, options.k, settings.root) == ("a.jpg", 3, "/r")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trian: {bits: 16}", "did you mean `train`"),
        ("train: {bit: 16}", "did you mean `train.bits`"),
        ("features: {preprocess: {sizes: 3}}", "did you mean `features.preprocess.size`"),
        ("- a\n- b\n", "must hold `setting: value` lines"),
        ("root: [", "not YAML"),
        ("train: {bits: many}", "train.bits"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=said):
        cli.parse("train", ["--config", str(file)])


def test_no_abbreviations() -> None:
    with pytest.raises(InvalidInput, match=r"train\.bit"):
        cli.parse("train", ["--train.bit", "16"])


def test_wrong_input_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean `train`" in capsys.readouterr().err


def test_the_root_is_said_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["index", "log", "--json"]) == 2
    streams = capsys.readouterr()
    assert str(tmp_path / "hashdist") in streams.err.splitlines()[0]
    assert "--root" in streams.err.splitlines()[0]
    assert f"{tmp_path}/hashdist/indexes/images" in json.loads(streams.out)["error"]["message"]
    for words in (
        ["index", "log", "--root", "r"],
        ["index", "log", "--index.uri", "r/indexes/i"],
        ["protocol", "make"],
    ):
        assert cli.main(words) == 2
        assert "the root is" not in capsys.readouterr().err


@pytest.mark.parametrize("why", ["job", "package"])
def test_there_is_no_root_in_a_job_or_in_a_package(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if why == "job":
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        monkeypatch.setattr(cli, "_observed", lambda settings: nullcontext())
    else:
        (tmp_path / "hashdist").mkdir()
        (tmp_path / "hashdist" / "__init__.py").touch()
    assert cli.main(["graph", "--json"]) == 2
    streams = capsys.readouterr()
    assert "--root" in streams.err
    assert json.loads(streams.out)["error"]["kind"] == "InvalidInput"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search", "--imgae", "a.jpg"], "did you mean `--image`"),
        (["search", "--where-", "a"], "did you mean `--where`"),
        (["pipeline", "--train.bitz=16"], "did you mean `--train.bits`"),
        (["pipeline", "--bits", "16"], "did you mean `--train.bits`"),
        (["train", "--mehtod", "itq"], "did you mean `--train.method`"),
        (["index", "log", "--collection.url", "x"], "did you mean `--collection.uri`"),
        (["search", "-q", "x"], "unknown setting `-q`"),
        (["search", "--key"], "--key must be followed by a value, found none"),
        (["search", "--key", "--k", "3"], "--key must be followed by a value, found --k"),
        (["search", "a", "b"], "takes one word"),
        (["serve", "now"], "takes flags only"),
        (["index"], "must be followed by what to do: index build, "),
        (["index", "--root", "r"], "must be followed by what to do"),
        (["index", "buld"], "did you mean `index build`"),
        (["serach", "a"], "did you mean `search`"),
    ],
)
def test_what_is_not_known_names_what_is(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


def test_words_without_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").touch()

    def options(*words: str) -> Any:
        name, rest = cli._split(words)
        settings, own = cli.parse(name, rest)
        return own or settings

    assert options("search", "photo.jpg").image == "photo.jpg"
    found = options("search", "-k", "5", "3/0003.jpg", "--exclude-self", "--radius", "-1")
    assert (found.image, found.key, found.k, found.exclude_self, found.radius) == ("", "3/0003.jpg", 5, True, -1)
    assert options("search", "-k=7", "--queries", "-").queries == "-"
    for name in ("pipeline", "collection", "features", "graph", "train", "encode", "index build", "evaluate"):
        assert options(*name.split(), "photos/").collection.uri == "photos/"
    assert cli.parse("reindex", ["photos/", "--plan"])[0].collection.uri == "photos/"
    assert options("index", "purge", "a b", "c,d", "--reason", "r").keys == ["a b", "c,d"]
    assert options("index", "rollback", "3").to == 3
    assert options("compare", "dsah", "itq:paper").methods == ["dsah", "itq:paper"]
    assert options("quickstart", "demo").folder == "demo"
    assert cli.parse("train", ["--method", "itq", "--options.lam", "2"])[0].train.method == "itq"


def test_a_file_of_all_sections_serves_every_command(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    sections = {
        field.name: {} if is_dataclass(getattr(Settings(), field.name)) else "text" for field in fields(Settings)
    }
    file.write_text(json.dumps({**sections, "service": {"port": 9000}, "train": {"bits": 16}}))
    for name in COMMANDS:
        settings, _ = cli.parse(name, ["--config", str(file)])
        assert (settings.root, settings.service.port, settings.train.bits) == ("text", 9000, 16)


def test_every_example_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("pipeline.yaml", "compare.yaml"):
        Path(file).write_text("root: r\n")
    for name, command in COMMANDS.items():
        assert 1 <= len(command.examples) <= 3
        for example in command.examples:
            words = shlex.split(example.partition(" > ")[0])
            found, rest = cli._split(words)
            assert found == name
            cli.parse(name, rest)


def test_every_command_names_something_that_exists() -> None:
    for command in COMMANDS.values():
        module, function = command.target.split(":")
        source = Path(cli.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert f"def {function}(" in source.read_text()


def test_every_job_is_a_command() -> None:
    jobs = Path(cli.__file__).parents[1] / "jobs"
    names = {path.stem for path in jobs.glob("*.py")}
    assert {"extract_features", "build_graph", "train_dsah", "encode", "build_index", "evaluate", "pipeline"} <= names
