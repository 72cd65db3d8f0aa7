"""The command line: settings from flags and files, clear refusals, exit codes."""

import json
from pathlib import Path

import pytest

from hashdist import cli
from hashdist.ground.errors import InvalidInput


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


def test_a_stage_without_a_root_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["graph", "--json"]) == 2
    streams = capsys.readouterr()
    assert "--root" in streams.err
    assert json.loads(streams.out)["error"]["kind"] == "InvalidInput"


def test_help_lists_commands_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--train.bits" in shown
    assert "code length" in shown


def test_every_command_names_something_that_exists() -> None:
    for command in cli.COMMANDS.values():
        module, function = command.target.split(":")
        source = Path(cli.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert f"def {function}(" in source.read_text()


def test_every_job_is_a_command() -> None:
    jobs = Path(cli.__file__).parents[1] / "jobs"
    names = {path.stem for path in jobs.glob("*.py")}
    assert {"extract_features", "build_graph", "train_dsah", "encode", "build_index", "evaluate", "pipeline"} <= names
