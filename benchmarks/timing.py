"""What the benchmarks share: options, runs in turn, and what is said of them."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Key = TypeVar("Key")
Work = Callable[[], Any]


def options(about: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with one option for each default, of its type; where that is a list, of one value or more."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        one, more = (value[0], {"nargs": "+"}) if isinstance(value, list) else (value, {})
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(one), default=value, **more)
    return parser


def timed(work: Work) -> tuple[float, Any]:
    """Wall seconds of a call, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def in_turn(runs: int, works: Mapping[Key, Work], warm: bool = True) -> dict[Key, list[Any]]:
    """Results of every run of each, one after the other; the first of each only warms up, unless all are warm."""
    found: dict[Key, list[Any]] = {name: [] for name in works}
    for run in range(runs + warm):
        for name, work in works.items():
            value = work()
            if run or not warm:
                found[name].append(value)
    return found


def seconds_in_turn(runs: int, works: Mapping[Key, Work], warm: bool = True) -> dict[Key, list[float]]:
    """Wall seconds of every run of each, as `in_turn`."""
    return in_turn(runs, {name: lambda work=work: timed(work)[0] for name, work in works.items()}, warm)


def medians(runs: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """Of the runs of each."""
    return {name: statistics.median(values) for name, values in runs.items()}


def spread(values: Sequence[float], factor: float = 1.0, digits: int = 3) -> dict[str, Any]:
    """Median and [lowest, highest], times a factor."""
    shown = [round(factor * value, digits) for value in (statistics.median(values), min(values), max(values))]
    return {"median": shown[0], "range": shown[1:]}


def milliseconds(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The spread of each, by NAME_ms."""
    return {f"{name}_ms": spread(own, 1e3) for name, own in times.items()}


def quotients(values: Sequence[float], peers: Sequence[float]) -> list[float]:
    """Value over peer, run by run."""
    return [value / peer for value, peer in zip(values, peers, strict=True)]


def ratios(values: Sequence[float], peers: Sequence[float]) -> list[float]:
    """Value over peer, run by run: median, lowest, highest."""
    found = quotients(values, peers)
    return [round(value, 2) for value in (statistics.median(found), min(found), max(found))]


def memory_bytes(field: str) -> int:
    """A field of this process's memory status: VmRSS now, VmHWM at its peak, RssAnon without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
