"""Costs of a run: seconds, requests to stores and bytes, by phase."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hashdist.ground import telemetry

FREE: dict[str, Any] = {"seconds": 0.0, "requests": {}, "read": 0, "written": 0}
"""Costs of a phase that was not entered."""


class Costs:
    """A clock that runs for one phase at a time: a phase within another stops that one's clock.

    Attributes:
        phases: seconds, requests by operation, bytes read and bytes written of each phase.
    """

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, Any]] = {}
        self._running: str | None = None
        self._booked = time.perf_counter(), telemetry.traffic()

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Add the costs of the block to a phase."""
        outer = self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, phase: str | None) -> str | None:
        """Book what has been spent on the phase that runs, and let another one run; returns the first."""
        before, (then, moved_then) = self._running, self._booked
        self._running, self._booked = phase, (time.perf_counter(), telemetry.traffic())
        if before is not None:
            now, moved = self._booked
            spent, known = moved.since(moved_then), self.phases.get(before, FREE)
            self.phases[before] = {
                "seconds": known["seconds"] + now - then,
                "requests": dict(Counter(known["requests"]) + spent.requests),
                "read": known["read"] + spent.read,
                "written": known["written"] + spent.written,
            }
        return before

    def line(self) -> str:
        """All in one line."""
        return "; ".join(
            f"{name} {cost['seconds']:.2f} s, {sum(cost['requests'].values())} requests, {cost['read']} B read"
            for name, cost in self.phases.items()
        )

    def lines(self) -> list[str]:
        """A line for each phase."""
        return [
            f"{name:>8}  {cost['seconds']:8.2f} s  {sum(cost['requests'].values()):8} requests"
            f"  {cost['read']:>12} B read  {cost['written']:>10} B written"
            f"  {' '.join(f'{op} {count}' for op, count in sorted(cost['requests'].items()))}"
            for name, cost in self.phases.items()
        ]
