"""What Ray says that nobody can do anything about is kept back."""

import subprocess
import sys

import pytest

from hashdist.stages.cluster import quiet

DEAD = """A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem,
check the logs for the dead worker. Lease ID: 00ca Worker ID: 2092 Node ID: a236 Worker IP address: 127.0.0.1 Worker
port: 38281 Worker PID: 19249 Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a
connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to
high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV."""


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (
            DEAD,
            "a worker process has ended (PID 19249: Worker unexpectedly exits with a connection error code 2); "
            "what it did is done again",
        ),
        ("Task work failed. There are infinite retries remaining, so the task will be retried. Error: ", None),
        (
            "Task f failed. There are infinite oom retries remaining: the node is low on memory",
            "Task f failed. There are infinite oom retries remaining: the node is low on memory",
        ),
        ("No available node\ncan hold {CPU: 99}", "No available node can hold {CPU: 99}"),
        ("x" * 900, "x" * 300 + " ..."),
    ],
)
def test_a_report_is_one_line_or_none(report: str, line: str | None) -> None:
    assert quiet.in_short(" ".join(report.split()) if line and "PID" in line else report) == line


_SCRIPT = """
import os, sys
from pathlib import Path
import ray
from hashdist.ground.settings import ClusterSettings
from hashdist.stages.cluster.session import session

class Restarted:
    def __init__(self, data):
        pass
    def work(self, mark):
        if not mark.exists():
            mark.touch()
            os._exit(1)
        return 3

with session(ClusterSettings(address="local", cpus=2, object_store_mb=100)):
    actor = ray.remote(max_restarts=-1, max_task_retries=-1)(Restarted).remote(ray.put(b"x" * 1_000_000))
    print(ray.get(actor.work.remote(Path(sys.argv[1]))))
"""


@pytest.mark.cluster
def test_a_worker_that_dies_is_said_in_one_line_and_stdout_is_left_alone(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, f"{tmp_path}/mark"], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout == "3\n"
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) <= 1, lines
    assert all(line.startswith("ray: a worker process has ended (PID ") and len(line) < 200 for line in lines)
