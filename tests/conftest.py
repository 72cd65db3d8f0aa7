"""Fixtures that every test folder shares: a Ray session, an S3 server, and where real data lies if it is there."""

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import REPOSITORY

pytest_plugins = ["tests.worlds.features"]

# Processes and Ray's workers share few cores: a second thread inside an operation waits for its turn at every barrier.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # tests wait for what workers report

settings.register_profile("hashdist", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("hashdist")

STAGES_FOLLOW = {"features.source", "features.snapshot", "train.mode"}
"""Settings by which the order of all stages is known; a command that is not about them reads them for that alone."""

_OF_CELLS = ("method", "bits", "seed", "options", "preset", "snapshot", "fresh")
GIVEN = {"compare": {f"train.{name}" for name in _OF_CELLS}}
"""Settings that a command itself gives to the stages, whatever else is set: each cell of a comparison has its own."""

SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def reads() -> Iterator[dict[str, set[str]]]:
    """The settings that each command has read in this session; a command that reads what it does not declare fails."""
    from hashdist import cli
    from tests.worlds.reads import watched

    found: dict[str, set[str]] = {}
    run, with_root = cli._run, cli._with_root

    def watch(name: str, words: Sequence[str]) -> dict[str, Any]:
        read = found.setdefault(name, set())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "_with_root", lambda command, settings: watched(with_root(command, settings), read))
            result = run(name, words)
        assert read - STAGES_FOLLOW - GIVEN.get(name, set()) <= set(cli.COMMANDS[name].settings), name
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_run", watch)
        yield found


@pytest.fixture(scope="session", autouse=True)
def _no_cache_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what is made once for many tests, and for the workers of the Ray session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASHDIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of copies and of derived files for each test; compiled kernels are kept elsewhere, and for all."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HASHDIST_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights; tests that want it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("real images are not here: ../shared/data is absent")
    return SHARED


@pytest.fixture(scope="session")
def ray_session(s3_endpoint: str) -> Iterator[None]:
    """One local Ray for the whole test session: 4 logical CPUs, a bounded object store.

    The S3 server comes first, since workers get the AWS_* variables that are set when their session starts.
    """
    from hashdist.ground.settings import ClusterSettings
    from hashdist.stages.cluster import session

    with session.session(ClusterSettings(address="local", cpus=4, object_store_mb=400)):
        yield


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server, with AWS_* pointing at it for this process and its children.

    A moto server on the loopback; or the one that HASHDIST_TEST_S3=1 says AWS_* points at already.
    """
    import boto3

    if os.environ.get("HASHDIST_TEST_S3"):
        with suppress(boto3.client("s3").exceptions.BucketAlreadyOwnedByYou):
            boto3.client("s3").create_bucket(Bucket="hashdist")
        yield os.environ["AWS_ENDPOINT_URL"]
        return
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    server._server.app = _one_write_at_a_time(server._server.app)
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    values = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    boto3.client("s3").create_bucket(Bucket="hashdist")
    yield endpoint
    server.stop()
    for name, value in old.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _one_write_at_a_time(app: Any) -> Any:
    """The WSGI application behind a lock: moto looks, then stores: two creates of a name could both win."""
    writing = threading.Lock()

    def locked(environ: dict[str, Any], start_response: Any) -> Any:
        with writing if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE") else nullcontext():
            return app(environ, start_response)

    return locked


@pytest.fixture(params=["local", "s3"])
def root_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty root, once on local disk and once on S3."""
    if request.param == "local":
        return (tmp_path / "root").as_uri()
    request.getfixturevalue("s3_endpoint")
    return f"s3://hashdist/{tmp_path.name}-{os.urandom(4).hex()}"
