"""Progress on stderr: a bar on a terminal, a plain line every few seconds in a log."""

import sys
import time
from collections.abc import Callable
from typing import Self

from tqdm import tqdm

_LOG_EVERY_S = 5.0


class Progress:
    """Counts steps towards a known total.

    Args:
        label: what is being counted.
        total: steps in all.
        done: steps found done already.
    """

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._done = label, total, done
        self._bar = tqdm(total=total, initial=done, desc=label, file=sys.stderr) if sys.stderr.isatty() else None
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def step(self, count: int = 1, note: str = "") -> None:
        """Count `count` steps; `note` is shown behind the numbers."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            self._bar.set_postfix_str(note)
        elif time.monotonic() - self._last >= _LOG_EVERY_S or self._done >= self._total:
            self._last = time.monotonic()
            say(f"{self._label}: {self._done}/{self._total} {note}".rstrip())

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def say(line: str) -> None:
    """One line for the user: on stderr, or wherever `speak_to` has sent the lines of this process."""
    _speaker(plain(line))


def plain(line: str) -> str:
    """A line as one line of text: keys and what servers say may hold newlines and a terminal's control codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)


def speak_to(speaker: Callable[[str], None]) -> None:
    """Hand the lines of this process to `speaker`: a worker's stderr is read by nobody."""
    global _speaker
    _speaker = speaker


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


_speaker: Callable[[str], None] = _to_stderr
