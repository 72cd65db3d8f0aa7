"""What earlier releases left on storage (write.py), unpacked, and the commands that go on from it."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hashdist import cli

HERE = Path(__file__).resolve().parent

Command = Callable[..., dict[str, Any]]


@pytest.fixture(params=sorted(HERE.glob("*.tar.xz")), ids=lambda path: path.name.removesuffix(".tar.xz"))
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was answered when a release wrote its folder, which is unpacked and worked in."""
    if not Path("/proc/self/cwd").exists():
        pytest.skip("URIs in what is stored begin with /proc/self/cwd, which is not on this system")
    with tarfile.open(request.param) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = json.loads(Path("written.json").read_text())
    return found


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """command(NAME, words...): the JSON object of a command that succeeds, by the stored configuration."""

    def run(name: str, *words: str) -> dict[str, Any]:
        first = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
        argv = [*name.split(), *words[:first], "--config", "pipeline.yaml", *words[first:], "--json"]
        code = cli.main(argv)
        said = capsys.readouterr()
        assert code == 0, said
        found: dict[str, Any] = json.loads(said.out.strip().splitlines()[-1])
        return found

    return run
