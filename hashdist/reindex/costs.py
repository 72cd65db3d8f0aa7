"""Costs of a run: seconds, requests and bytes, by phase."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hashdist.ground import telemetry
from hashdist.ground.telemetry import NO_TRAFFIC, Traffic

if TYPE_CHECKING:  # brings torch with it, which a listing does without
    pass

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # brings torch with it, which a listing does without
    pass


# What it costs


class Costs:
    """Seconds, requests to stores and bytes of each phase of a run; a phase within another is counted on its own."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, Any]] = {}
        self._within: list[tuple[float, Traffic]] = [(0.0, NO_TRAFFIC)]

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Add what the block costs to a phase."""
        started, before = time.perf_counter(), telemetry.traffic()
        self._within.append((0.0, NO_TRAFFIC))
        try:
            yield
        finally:
            seconds, moved = time.perf_counter() - started, telemetry.traffic().since(before)
            inner_seconds, inner = self._within.pop()
            outer_seconds, outer = self._within.pop()
            self._within.append((outer_seconds + seconds, outer.plus(moved)))
            spent = moved.since(inner)
            known = self.phases.setdefault(phase, {"seconds": 0.0, "requests": {}, "read": 0, "written": 0})
            known["seconds"] += seconds - inner_seconds
            known["requests"] = dict(Counter(known["requests"]) + spent.requests)
            known["read"] += spent.read
            known["written"] += spent.written

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


AT_ONCE = 8192  # rows of the difference as Python values at a time
