"""k8s/submit_rayjob.py against a Kubernetes API on the loopback: what it asks, and what it makes of the answers."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests import REPOSITORY

PROGRAM = REPOSITORY / "k8s" / "submit_rayjob.py"
spec = importlib.util.spec_from_file_location("submit_rayjob", PROGRAM)
assert spec is not None
assert spec.loader is not None
submit_rayjob = importlib.util.module_from_spec(spec)
spec.loader.exec_module(submit_rayjob)

TEMPLATE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "reindex-template", "uid": "1", "resourceVersion": "7", "labels": {"part-of": "hashdist"}},
    "spec": {"entrypoint": "python jobs/reindex.py", "suspend": True, "backoffLimit": 2},
    "status": {"jobDeploymentStatus": "Suspended"},
}
RUN = "reindex-1-run"


class FakeApi(ThreadingHTTPServer):
    """RayJobs by name. `life`: what a run's status becomes, one step a question; `faults` are answered first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, dict[str, Any]] = {"reindex-template": TEMPLATE}
        self.life: list[dict[str, str]] = [{}, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}]
        self.faults: list[int] = []
        self.lose_reply_of: str = ""
        self.asked: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeApi

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refused(self) -> bool:
        self.server.asked.append((self.command, self.path))
        assert self.path.startswith("/apis/ray.io/v1/namespaces/photos/rayjobs")
        if self.headers["Authorization"] != "Bearer secret":
            self._answer(401, {"kind": "Status", "message": "Unauthorized"})
            return True
        if self.server.faults:
            self._answer(self.server.faults.pop(0), {"kind": "Status", "message": "rayjobs.ray.io is forbidden"})
            return True
        return False

    def do_GET(self) -> None:
        if self._refused():
            return
        name = self.path.rpartition("/")[2]
        job = self.server.jobs.get(name)
        if job is None:
            return self._answer(404, {"kind": "Status", "message": f'rayjobs.ray.io "{name}" not found'})
        if name == RUN and self.server.life:
            job["status"] = self.server.life.pop(0)
        self._answer(200, job)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        name = body["metadata"]["name"]
        if name in self.server.jobs:
            return self._answer(409, {"kind": "Status", "message": f'rayjobs.ray.io "{name}" already exists'})
        self.server.jobs[name] = body
        if self.server.lose_reply_of == "POST":
            self.server.lose_reply_of = ""
            self.close_connection = True
            return
        self._answer(201, body)


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "namespace").write_text("photos")
    return tmp_path


def words(api: FakeApi, account: Path, *more: str) -> list[str]:
    where = [f"--server={api.url}", f"--account={account}", "--pause=0.01", "--patience=5"]
    return ["--template=reindex-template", f"--name={RUN}", "--owner=reindex-1/uid-of-the-job", *where, *more]


def ends(api: FakeApi, deployment: str, job: str) -> None:
    api.life.append({"jobDeploymentStatus": deployment, "jobStatus": job, "message": "what happened"})


def test_a_run_is_a_copy_that_is_not_suspended_and_belongs_to_its_job(api: FakeApi, account: Path) -> None:
    ends(api, "Complete", "SUCCEEDED")
    assert submit_rayjob.main(words(api, account)) == 0
    run = api.jobs[RUN]
    assert run["spec"] == {"entrypoint": "python jobs/reindex.py", "backoffLimit": 2}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "reindex-1", "uid": "uid-of-the-job"}
    assert run["metadata"] == {"name": RUN, "labels": {"part-of": "hashdist"}, "ownerReferences": [owner]}
    assert api.jobs["reindex-template"] == TEMPLATE


@pytest.mark.parametrize(
    ("deployment", "job"), [("Complete", "FAILED"), ("Complete", "STOPPED"), ("Failed", ""), ("ValidationFailed", "")]
)
def test_a_run_that_failed_says_why(
    api: FakeApi, account: Path, deployment: str, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(api, deployment, job)
    assert submit_rayjob.main(words(api, account)) == 1
    assert "what happened" in capsys.readouterr().err


def test_a_doubled_run_is_one_run(api: FakeApi, account: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends(api, "Complete", "SUCCEEDED")
    assert submit_rayjob.main(words(api, account)) == 0
    assert submit_rayjob.main(words(api, account)) == 0
    assert "started already" in capsys.readouterr().err
    assert sorted(api.jobs) == [RUN, "reindex-template"]


def test_a_reply_that_is_lost_starts_nothing_twice(api: FakeApi, account: Path) -> None:
    api.lose_reply_of = "POST"
    ends(api, "Complete", "SUCCEEDED")
    assert submit_rayjob.main(words(api, account)) == 0
    assert [verb for verb, _ in api.asked].count("POST") == 2
    assert sorted(api.jobs) == [RUN, "reindex-template"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_what_the_account_needs(
    api: FakeApi, account: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    api.faults = [status]
    assert submit_rayjob.main(words(api, account)) == 2
    assert "get and create on rayjobs" in capsys.readouterr().err


def test_a_template_that_is_not_there_cannot_be_started(api: FakeApi, account: Path) -> None:
    assert submit_rayjob.main(words(api, account, "--template=other")) == 2
    assert len(api.asked) == 1


def test_a_run_that_is_deleted_has_failed(api: FakeApi, account: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timer = threading.Timer(0.2, lambda: api.jobs.pop(RUN))
    timer.start()
    assert submit_rayjob.main(words(api, account)) == 1
    timer.join()
    assert "deleted" in capsys.readouterr().err


def test_an_api_that_is_away_for_a_while_is_waited_for(api: FakeApi, account: Path) -> None:
    api.faults = [503, 429, 500, 504]
    ends(api, "Complete", "SUCCEEDED")
    assert submit_rayjob.main(words(api, account)) == 0


def test_an_api_that_stays_away_leaves_the_outcome_open(account: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeApi() as silent:  # listens, and answers nothing
        url = silent.url
    where = [f"--server={url}", f"--account={account}", "--pause=0.01", "--patience=0.1"]
    assert submit_rayjob.main(["--template=reindex-template", f"--name={RUN}", *where]) == submit_rayjob.UNKNOWN
    assert "may go on" in capsys.readouterr().err


def test_a_name_that_kuberay_refuses_is_refused_at_once(api: FakeApi, account: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        submit_rayjob.main(words(api, account, f"--name={'n' * 48}"))
    assert stopped.value.code == 2
    assert not api.asked


def test_stopping_it_leaves_the_run_and_the_next_call_finds_it(api: FakeApi, account: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[1])}
    command = [sys.executable, str(PROGRAM), *words(api, account)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 20
        while RUN not in api.jobs and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert process.returncode == submit_rayjob.STOPPED
    assert "goes on" in said
    ends(api, "Complete", "SUCCEEDED")
    assert submit_rayjob.main(words(api, account)) == 0
    assert sorted(api.jobs) == [RUN, "reindex-template"]
