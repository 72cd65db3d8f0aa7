"""What Ray prints that a user can do nothing about is kept back; what matters is said in one line on stderr.

Read against Ray 2.60, whose private parts this needs: `worker.print_to_stdstream` prints the reports of raylets on
stdout, where one JSON object belongs, and the core library logs errors that it recovers from to stderr, whatever level
Ray is told. Where a later Ray has these no more, it prints what it prints. RAY_BACKEND_LOG_LEVEL in the environment
leaves everything to Ray.
"""

import ctypes
import logging
import os
import re
from contextlib import suppress
from typing import Any

from ray import _raylet
from ray._private import worker

from hashdist.ground.progress import say

_LEVEL = "_ZN3ray6RayLog19severity_threshold_E"  # ray::RayLog::severity_threshold_
_FATAL = 3
_DEAD = re.compile(r"Worker PID: (\d+) .*Worker exit detail: ([^.]*)", re.DOTALL)
_MOST = 300  # characters of a report that is not known here


def is_asked_for() -> bool:
    """Whether all that Ray says is wanted."""
    return "RAY_BACKEND_LOG_LEVEL" in os.environ


def keep_reports() -> None:
    """Before ray.init: reports of raylets go to stderr, in one line each, and notices of Ray's libraries go nowhere."""
    if not is_asked_for():
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        worker.print_to_stdstream = _say_report


def keep_core_log() -> None:
    """After ray.init, which sets the level: of the core library in this process only fatal errors are logged."""
    if not is_asked_for():
        with suppress(OSError, ValueError):
            ctypes.c_int.in_dll(ctypes.CDLL(_raylet.__file__), _LEVEL).value = _FATAL


def _say_report(data: dict[str, Any], ignore_prefix: bool = False) -> None:  # noqa: ARG001
    for report in data["lines"]:
        line = in_short(report)
        if line:
            say(f"ray: {line}")


def in_short(report: str) -> str | None:
    """A report of a raylet as one line; None for one that only says that Ray goes on."""
    dead = _DEAD.search(report)
    if dead:
        return f"a worker process has ended (PID {dead[1]}: {dead[2]}); what it did is done again"
    if "retries remaining" in report and "memory" not in report:
        return None
    line = " ".join(report.split())
    return line if len(line) <= _MOST else f"{line[:_MOST]} ..."
