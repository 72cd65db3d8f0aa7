"""Progress on stderr: one live line on a terminal, at most some ten plain lines in a log."""

import sys
import time
from collections.abc import Callable
from typing import Self

from tqdm import tqdm

_LOG_EVERY_S = 5.0


class Progress:
    """Counts steps towards a known total.

    In a log there is a line at each tenth of the way, though not within seconds of the one before, and none of what
    ends within seconds.

    Args:
        label: what is being counted.
        total: steps in all.
        done: steps found done already.
    """

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._done = label, total, done
        live = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=label, file=sys.stderr, leave=False) if live else None
        self._last, self._tenth = time.monotonic(), -1

    def __enter__(self) -> Self:
        return self

    def step(self, count: int = 1, note: str = "") -> None:
        """Count `count` steps; `note` is shown behind the numbers."""
        self.reach(self._done + count, note)

    def reach(self, done: int, note: str = "", line: str = "") -> None:
        """Be at step `done`. `line`: what a log says instead of the numbers, at the first and the last step at once."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        if self._bar is None and self._is_due(bool(line)):
            say(line or f"{self._label}: {done}/{self._total} {note}".rstrip())

    def _is_due(self, at_once: bool) -> bool:
        tenth, now = 10 * self._done // max(1, self._total), time.monotonic()
        first, last = self._tenth < 0, self._done >= self._total
        due = tenth != self._tenth and (now - self._last >= _LOG_EVERY_S or (last and not first))
        due = due or (at_once and (first or last))
        if due:
            self._last, self._tenth = now, tenth
        return due

    def close(self) -> None:
        """Take the live line away."""
        if self._bar is not None:
            self._bar.close()

    def __exit__(self, *error: object) -> None:
        self.close()


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
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)  # above a live line
    else:
        print(line, file=sys.stderr, flush=True)  # noqa: T201


_speaker: Callable[[str], None] = _to_stderr
