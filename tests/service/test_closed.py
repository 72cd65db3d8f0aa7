"""What a running service shows to the network, and what Ray's job API lets in: docs/security.md."""

import json
import os
import pickle
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from tests.worlds.processes import LOOPBACK, descendants, listening
from tests.worlds.service import Service, ServiceWorld, free_port, serving

pytestmark = pytest.mark.cluster

TOKEN = "s3cret-Token"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("closed")
    world = ServiceWorld(folder / "world", images=10)
    with serving(world, folder, environment={"HASHDIST_TOKEN": TOKEN}, max_body_mb=0.5) as running:
        yield running


def raw(url: str, data: bytes, wait_s: float = 20) -> bytes:
    """All that comes back for these bytes until the other side closes."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.settimeout(wait_s)
        connection.sendall(data)
        answer = b""
        while more := connection.recv(65_536):
            answer += more
    return answer


class Malicious:
    """What makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self._made = str(made)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self._made,)


@pytest.mark.full
def test_nothing_listens_but_on_the_loopback(service: Service) -> None:
    open_to = listening(descendants(service.process.pid))
    assert len(open_to) > 3
    assert {address for address, _ in open_to} <= LOOPBACK


@pytest.mark.full
def test_a_body_without_end_is_not_read_on(service: Service) -> None:
    """413, and the connection is closed."""
    head = f"POST /search HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as connection:
        connection.settimeout(20)
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        with suppress(BrokenPipeError, ConnectionResetError):
            while sent < 200_000_000:
                connection.sendall(b"10000\r\n" + bytes(65_536) + b"\r\n")
                sent += 65_536
    assert sent < 20_000_000


@pytest.mark.full
def test_logs_are_lines_without_secrets(service: Service) -> None:
    """Newlines of a path start no line, the token stands nowhere; a search is one JSON object with its id."""
    asked = f"Authorization: Bearer {TOKEN}\r\nX-Request-ID: mine-7\r\nConnection: close\r\n\r\n"
    for target in (f"/x%0aFORGED?token={TOKEN}", "/search?key=%0aFORGED", "/version"):
        raw(service.url, f"GET {target} HTTP/1.1\r\nHost: x\r\n{asked}".encode())
    time.sleep(1)
    places = {Path(os.readlink(link)) for pid in descendants(service.process.pid) for link in _files_of(pid)}
    logs = [path for path in places if path.suffix in (".log", ".out", ".err") and path.is_file()]
    texts = {path: path.read_text(errors="replace") for path in [*logs, service.log]}
    assert any("mine-7" in text for text in texts.values())
    for path, text in texts.items():
        assert TOKEN not in text, path
        assert not any(line.startswith("FORGED") for line in text.splitlines()), path
    lines = [line for text in texts.values() for line in text.splitlines() if line.startswith("{") and "mine-7" in line]
    assert [json.loads(line)["request"] for line in lines] == ["mine-7"] * 3


def _files_of(pid: int) -> list[Path]:
    with suppress(OSError):
        return [link for link in Path(f"/proc/{pid}/fd").iterdir() if _is_file(link)]
    return []


def _is_file(link: Path) -> bool:
    with suppress(OSError):
        return os.readlink(link).startswith("/")
    return False


@contextmanager
def ray_head(folder: Path, token: str) -> Iterator[str]:
    """`ray start --head` with a token, on ports and in a folder of its own; its job API's URL."""
    (folder / "token").write_text(token)
    port, sessions = free_port(), tempfile.mkdtemp(prefix="hd", dir="/tmp")  # paths of sockets must be short
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={free_port()}", f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", "--num-cpus=1"]
    command += ["--object-store-memory=80000000", f"--temp-dir={sessions}", "--include-dashboard=true"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
    log = (folder / "ray.log").open("wb")
    process = subprocess.Popen(command, env=inherited | own, stdout=log, stderr=log, start_new_session=True)
    started = {process.pid}
    try:
        until = time.monotonic() + 240
        while _status(f"http://127.0.0.1:{port}/api/version") is None:
            assert process.poll() is None, (folder / "ray.log").read_text()
            assert time.monotonic() < until, (folder / "ray.log").read_text()
            time.sleep(0.2)
        started |= descendants(process.pid)
        yield f"http://127.0.0.1:{port}"
    finally:
        started |= descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for pid in started:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        log.close()
        shutil.rmtree(sessions, ignore_errors=True)


def _status(url: str, token: str = "", body: dict[str, Any] | None = None) -> int | None:
    """Status of a request to Ray's HTTP API; None where nobody answers."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.mark.full
def test_a_job_without_the_token_is_refused(tmp_path: Path) -> None:
    """RAY_AUTH_MODE=token: without it whoever reaches the job API runs what he likes."""
    token, made = secrets.token_hex(32), tmp_path / "made"
    with ray_head(tmp_path, token) as url:
        job = {"entrypoint": f"mkdir {made}"}
        assert _status(f"{url}/api/jobs/", body=job) in (401, 403)
        assert _status(f"{url}/api/jobs/", token=secrets.token_hex(32), body=job) in (401, 403)
        assert _status(f"{url}/api/jobs/") in (401, 403)
        assert not made.exists()
        until = time.monotonic() + 120
        while _status(f"{url}/api/jobs/", token=token, body=job) not in (
            200,
            None,
        ):  # the agent that runs jobs comes last
            assert time.monotonic() < until
            time.sleep(1)
        while not made.exists():
            assert time.monotonic() < until
            time.sleep(0.2)


@pytest.mark.full
def test_the_port_between_replicas_lets_nobody_in_from_outside(service: Service, tmp_path: Path) -> None:
    """On the loopback it runs what it is sent (Ray unpickles it): that it is not reachable is all that stands here."""
    addresses = [entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    outside = [address for address in addresses if not address.startswith("127.")]
    body = ASGIRequest(pickled_request_metadata=pickle.dumps(Malicious(tmp_path / "made")))
    for _, port in listening(descendants(service.process.pid)):
        for address in outside:
            with grpc.insecure_channel(f"{address}:{port}") as channel, suppress(grpc.RpcError):
                ASGIServiceStub(channel).HandleRequest(body, timeout=5)
    assert not (tmp_path / "made").exists()
