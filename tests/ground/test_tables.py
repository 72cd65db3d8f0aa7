"""Tables: aligned, rounded, one line a row in a log, no wider than a terminal."""

import sys

import pytest

from hashdist.ground import tables
from hashdist.ground.tables import number, table


def test_numbers_stand_to_the_right_and_text_to_the_left() -> None:
    assert table(
        ["metric", "dsah", "n"], [("map", 0.7996357284062107, None), ("recall@10", 12.78956958699996, 60)]
    ) == ("metric       dsah   n\nmap        0.7996   -\nrecall@10   12.79  60")


def test_a_row_of_a_log_is_one_line_and_wide_characters_count_twice() -> None:
    key = "猫/" + "a" * 300
    lines = table(["key", "n"], [(key, 1), ("b\x1b[31m\n", 22)]).split("\n")
    assert len(lines) == 3
    assert lines[1].startswith(key)
    assert lines[2].startswith("b\\x1b[31m\\n ")
    assert lines[1].endswith("  1")


def test_a_row_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "get_terminal_size", lambda: __import__("os").terminal_size((40, 20)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lines = table(["key", "n"], [("a" * 100, 1)]).split("\n")
    assert max(map(len, lines)) <= 40
    assert sum(line.count("a") for line in lines) == 100


@pytest.mark.parametrize(
    ("value", "text"), [(0.18999999999999995, "0.19"), (12345.678, "12346"), (2e-9, "2e-09"), (0.0, "0"), (1.0, "1")]
)
def test_four_digits(value: float, text: str) -> None:
    assert number(value) == text
