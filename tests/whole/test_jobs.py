"""A real cluster (`ray start --head`) and real submissions (`ray job submit ... python jobs/train_dsah.py`)."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hashdist.commands.quickstart import write_digits
from tests import REPOSITORY
from tests.worlds.processes import descendants

pytestmark = pytest.mark.cluster

CONFIG = """
root: {root}
collection: {{uri: {images}, labels: true}}
features: {{backbone: pixels}}
graph: {{protocol: digits}}
train: {{method: dsah, bits: 16, workers: 2, options: {{rounds: 2, epochs: 2, lr: 0.001, lambda_: 1.0}}}}
evaluate: {{protocol: digits, cut: 500}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the job server of a cluster that this module starts, and stops with its process group."""
    port, dashboard, agent = _free_port(), _free_port(), _free_port()
    folder = f"/tmp/hdj{os.getpid()}"
    log = tmp_path_factory.mktemp("cluster") / "log"
    command = [
        *("ray", "start", "--head", "--block", "--num-cpus=4", "--object-store-memory=400000000"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *("--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--disable-usage-stats"),
        f"--dashboard-agent-listen-port={agent}",  # two Rays of a machine would share the default
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PATH": _path()}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_up(address, agent, process, log)
        yield address
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the cluster: `ray start --block` ends its own processes, in half a minute; what is left is killed."""
    begun = descendants(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for pid in begun:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.wait(10)


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_up(address: str, agent: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(120):
        if process.poll() is not None:
            break
        try:
            # the agent is what runs jobs, and comes last
            with (
                urllib.request.urlopen(f"{address}/api/jobs/", timeout=2),
                socket.create_connection(("127.0.0.1", agent), timeout=2),
            ):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the cluster did not come up:\n{log.read_text()}")


def submit(cluster: str, job: str, *words: str) -> tuple[int, str]:
    """`ray job submit` as the README has it; exit code and output."""
    command = [
        "ray",
        "job",
        "submit",
        "--address",
        cluster,
        "--working-dir",
        ".",
        "--",
        "python",
        f"jobs/{job}.py",
        *words,
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PATH": _path()}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def result(output: str) -> dict[str, object]:
    """The one JSON line of a job."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == 1, output
    found: dict[str, object] = json.loads(lines[0])
    return found


def _config(folder: Path) -> tuple[str, ...]:
    write_digits(folder / "images")
    config = folder / "pipeline.yaml"
    config.write_text(CONFIG.format(root=folder / "root", images=folder / "images"))
    return "--config", str(config), "--json"


def test_a_job_fails_and_says_what_is_missing_and_finds_what_another_has_made(cluster: str, tmp_path: Path) -> None:
    given = _config(tmp_path)
    code, output = submit(cluster, "train_dsah", *given)
    assert code != 0
    assert "needs a committed" in output
    assert "hashdist features" in output

    code, output = submit(cluster, "pipeline", *given)
    assert code == 0, output
    assert "succeeded" in output.lower()
    stages = result(output)["stages"]
    assert isinstance(stages, dict)
    assert not any(stages[name].get("skipped") for name in ("features", "graph", "train"))
    assert stages["evaluate"]["metrics"]["map_all_ties"] > 0.4

    code, output = submit(cluster, "train_dsah", *given)
    assert code == 0, output
    trained = result(output)
    assert trained["skipped"] is True
    assert stages["train"]["snapshot"] == trained["snapshot"]


@pytest.mark.full
def test_the_stages_as_jobs_end_succeeded(cluster: str, tmp_path: Path) -> None:
    given = _config(tmp_path)
    for job in ("extract_features", "build_graph", "train_dsah"):
        code, output = submit(cluster, job, *given)
        assert code == 0, output
        assert "succeeded" in output.lower()
    trained = result(output)
    assert trained["skipped"] is False

    code, output = submit(cluster, "pipeline", *given)
    assert code == 0, output
    stages = result(output)["stages"]
    assert isinstance(stages, dict)
    assert [stages[name].get("skipped") for name in ("collection", "features", "graph", "train")] == [True] * 4
    assert stages["train"]["snapshot"] == trained["snapshot"]
