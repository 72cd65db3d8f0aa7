"""Tables as lines of text: columns stand below each other, numbers to the right, nothing wider than the terminal."""

import io
import re
import sys
from collections.abc import Iterable, Sequence
from shutil import get_terminal_size
from typing import Any

from hashdist.ground.progress import plain

_NUMBER = re.compile(r"-|[-+]?[\d.,]+(e[-+]?\d+)?%?")
_LOG_COLUMNS = 10_000  # a row of a log is one line, however long


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows below their headings, numbers as `number` writes them, None as a dash.

    On a terminal, cells that do not fit are folded; elsewhere every row is one line.
    """
    # a tenth of a second, which a command that prints JSON does without
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = get_terminal_size().columns if sys.stdout.isatty() else _LOG_COLUMNS
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    cells = [[cell(value) for value in row] for row in rows]
    for place, name in enumerate(head):
        numeric = all(_NUMBER.fullmatch(row[place]) for row in cells)
        made.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        made.add_row(*map(Text, row))
    sink = io.StringIO()
    Console(file=sink, width=columns, color_system=None).print(made)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    return number(value) if isinstance(value, float) else plain(str(value))


def number(value: float) -> str:
    """A number with four digits that say something, and none of them in an exponent where it is large."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
