"""What the command line says of itself: brief, complete, grouped; versions."""

import re
from pathlib import Path

import pytest

from hashdist import __version__, cli
from hashdist.commands import help
from hashdist.commands.catalogue import COMMANDS, GROUPS, families, flags
from hashdist.ground.settings import Settings


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(list(words)) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown(capsys, *name.split(), "--help")
    assert max(map(len, lines)) <= min(columns, 100)
    assert len(lines) <= 60 or columns < 100
    command, text = COMMANDS[name], "\n".join(lines)
    assert lines[2].endswith(".")
    places = [text.index(f"hashdist {example}") for example in command.examples]
    for flag in (*command.own, *command.shown):
        found = re.search(rf"^  (-\w, )?--{flag.replace('_', '-')}( |$)", text, re.MULTILINE)
        assert found
        places.append(found.start())
    assert places == sorted(places)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_has_what_the_command_reads_and_nothing_else(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, *name.split(), "--help-all")
    flagged = {found[1].replace("-", "_") for line in lines if (found := re.match(r"  (?:-\w, )?--([\w.-]+)", line))}
    command = COMMANDS[name]
    assert flagged == {*command.own, *command.settings, "config", "json"}
    assert set(command.shown) <= set(command.settings)


def test_every_reading_names_a_setting() -> None:
    known = {part for name, _ in flags(Settings) for part in (name, name.rpartition(".")[0], name.partition(".")[0])}
    for command in COMMANDS.values():
        assert set(command.reads) <= known


def test_every_setting_is_read_by_some_command() -> None:
    read = {name for command in COMMANDS.values() for name in command.settings}
    assert read == {name for name, _ in flags(Settings)}


def test_the_overview_groups_commands_by_what_people_want(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = shown(capsys, "--help")
    wanted = ["make an index", "ask it", "keep it fresh", "look after it", "compare methods", "run it"]
    assert [line[:-1] for line in lines if re.fullmatch(r"\w.*:", line)] == wanted == list(GROUPS)
    for heading, commands in GROUPS.items():
        below = lines[lines.index(f"{heading}:") + 1 :]
        for line, (name, command) in zip(below, commands.items(), strict=False):
            assert line.split("  ")[1].strip() == name
            assert line.endswith(command.help)
    assert max(map(len, lines)) <= 100
    assert shown(capsys) == lines == shown(capsys, "-h")


@pytest.mark.parametrize("first", families())
def test_a_family_lists_its_commands(first: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(shown(capsys, first, "--help"))
    assert all(f"\n  {name} " in text for name in families()[first])
    assert cli.main([first]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in families()[first])


def test_help_of_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serach", "--help"]) == 2
    assert "did you mean `search`" in capsys.readouterr().err


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "--version")
    assert lines[0] == f"hashdist {__version__}"
    assert {"ray", "torch"} <= {line.split()[0] for line in lines[1:]}
    assert any(line.startswith("faiss-") for line in lines)
    assert re.fullmatch(r"kernels: \w+, [\w-]+, .*(AVX|NEON|no vectors).*", lines[-1])


def test_versions_import_no_library() -> None:
    source = Path(help.__file__).read_text()
    assert not re.search(r"^(import|from) (ray|torch|faiss|numba|llvmlite)", source, re.MULTILINE)
