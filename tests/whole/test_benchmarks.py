"""Benchmarks are run by hand: here, that each finds what it imports, and says what it takes."""

import runpy
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY

FOLDER = REPOSITORY / "benchmarks"
NO_PROGRAMS = {"timing.py", "http_load.py"}
"""What the others share, and a client that one of them starts."""


@pytest.mark.parametrize(
    "path", sorted(path for path in FOLDER.glob("*.py") if path.name not in NO_PROGRAMS), ids=lambda path: path.stem
)
def test_a_benchmark_says_what_it_takes(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(path), run_name="__main__")
    assert not left.value.code
    assert "show this help" in capsys.readouterr().out
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()
