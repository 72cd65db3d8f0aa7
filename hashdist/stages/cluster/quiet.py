"""What Ray prints that a user can do nothing about is kept back; what matters is said in one line on stderr.

Where a later Ray prints by other ways, it prints what it prints. RAY_BACKEND_LOG_LEVEL in the environment leaves
everything to Ray.
"""

import logging
import os
import re
from typing import Any

from hashdist.ground.progress import say
from hashdist.stages.cluster import internals

_DEAD = re.compile(r"Worker PID: (\d+) .*Worker exit detail: ([^.]*)", re.DOTALL)
_MOST = 300  # characters of a report that is not known here


def is_asked_for() -> bool:
    """Whether all that Ray says is wanted."""
    return "RAY_BACKEND_LOG_LEVEL" in os.environ


def keep_reports() -> None:
    """Before ray.init: reports of raylets go to stderr, in one line each, and notices of Ray's libraries go nowhere."""
    if not is_asked_for():
        logging.getLogger(internals.DATA_PROGRESS_LOGGER).setLevel(logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        internals.give_reports_to(_say_report)


def keep_core_log() -> None:
    """After ray.init, which sets the level: of the core library in this process only fatal errors are logged."""
    if not is_asked_for():
        internals.log_fatal_errors_only()


def _say_report(data: dict[str, Any]) -> None:
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
