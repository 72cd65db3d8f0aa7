"""Progress: plain lines in a log, about ten of them, and one live line on a terminal."""

import io
import sys

import pytest

from hashdist.ground import progress
from hashdist.ground.progress import Progress, say


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_a_log_has_ten_lines_however_long_it_takes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", 1000) as steps:
        for _ in range(1000):
            clock.now += 7
            steps.step()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "encode: 1000/1000"
    assert 10 <= len(lines) <= 11


def test_a_log_has_no_lines_of_what_ends_within_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("graph", 40) as steps:
        for _ in range(40):
            clock.now += 0.1
            steps.step()
    assert capsys.readouterr().err == ""


def test_a_log_has_no_two_lines_within_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("graph", 40) as steps:
        for _ in range(40):
            clock.now += 0.4
            steps.step(note="slow")
    assert capsys.readouterr().err.splitlines() == [
        "graph: 13/40 slow",
        "graph: 26/40 slow",
        "graph: 39/40 slow",
        "graph: 40/40 slow",
    ]


def test_a_line_of_ones_own_comes_at_the_first_and_the_last_step(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Progress("train", 60)
    for step in range(1, 61):
        steps.reach(step, line=f"train: step {step}")
    steps.close()
    assert capsys.readouterr().err.splitlines() == ["train: step 1", "train: step 60"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_live_line_and_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("train", 10) as steps:
        steps.reach(1, "loss 2", line="train: step 1")
        say("a warning")
        steps.reach(10, "loss 1", line="train: step 10")
    shown = terminal.getvalue()
    assert "a warning\n" in shown
    assert "train: step" not in shown
    assert shown.rpartition("\r")[2].strip() == ""  # the line is taken away at the end
    assert shown.count("\n") == 1
