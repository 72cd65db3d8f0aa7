"""The scripts that complete commands and flags: their syntax, and what bash and zsh make of them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hashdist import cli
from hashdist.commands.catalogue import COMMANDS, families


@pytest.fixture
def script(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(["completion", request.param]) == 0
    path = tmp_path / "_hashdist"
    path.write_text(capsys.readouterr().out)
    return path


def needs(shell: str) -> None:
    """Skip where there is no such shell; fail where tests are run for a verdict."""
    if not shutil.which(shell):
        reason = f"{shell} is needed to check its completion, found none (apt-get install {shell})"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.mark.parametrize(("script", "shell"), [("bash", "bash"), ("zsh", "zsh")], indirect=["script"])
def test_the_shell_can_read_it(script: Path, shell: str) -> None:
    needs(shell)
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for name in COMMANDS:
        assert name.rpartition(" ")[2] in script.read_text()


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of some words."""
    count = len(words) - 1
    code = (
        f'source {script}; COMP_WORDS=("$@"); COMP_CWORD={count}; _shtab_hashdist 2>/dev/null; echo ${{COMPREPLY[*]}}'
    )
    done = subprocess.run(["bash", "-c", code, "bash", *words], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_bash_completes_commands_and_flags(script: Path) -> None:
    first = {name.partition(" ")[0] for name in COMMANDS}
    assert completed(script, "hashdist", "") == first
    assert completed(script, "hashdist", "index", "") == {name.partition(" ")[2] for name in families()["index"]}
    assert completed(script, "hashdist", "search", "--whe") == {"--where"}
    assert completed(script, "hashdist", "search", "--index.") == {"--index.name", "--index.uri"}
    assert completed(script, "hashdist", "search", "--train.") == set()
    assert completed(script, "hashdist", "index", "build", "--index.sh") == {"--index.shard-rows"}
    assert completed(script, "hashdist", "train", "--train.mode", "") == {"frozen", "images"}
    assert completed(script, "hashdist", "completion", "") == {"bash", "zsh"}


_ASK_ZSH = r"""
zmodload zsh/zpty
zpty shell "zsh -f -i"
zpty -w shell "PS1=; fpath=($1 \\$fpath); autoload -U compinit; compinit -u -D; echo re''ady"
zpty -r -m shell out "*ready*"
zpty -n -w shell $'echo _$(hashdist search --whe\t)'
zpty -r -m shell out "*--where*"
print -r -- "${out}"
zpty -d shell
"""


@pytest.mark.parametrize("script", ["zsh"], indirect=True)
def test_zsh_completes_a_flag(script: Path) -> None:
    needs("zsh")
    done = subprocess.run(
        ["zsh", "-f", "-c", _ASK_ZSH, "zsh", str(script.parent)], capture_output=True, text=True, timeout=120
    )
    assert "--where" in done.stdout, done.stderr


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "fish"]) == 2
    assert "bash or zsh" in capsys.readouterr().err
