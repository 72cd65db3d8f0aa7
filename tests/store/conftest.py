"""Every kind of store: a folder, S3, the one that docs/extend.md shows, and Azure's where Azurite is installed."""

import base64
import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hashdist.store import STORES
from tests.worlds import extensions

_STARTS_S = 30.0


@pytest.fixture(autouse=True)
def memory_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of docs/extend.md, registered as its text says."""
    monkeypatch.setitem(STORES, "memory", extensions.module("hashdist/store/memory.py").MemoryStore)


@pytest.fixture(scope="session")
def azurite() -> Iterator[str]:
    """Microsoft's emulator of Azure Blob Storage, with AZURE_STORAGE_* pointing at it, and a container `hashdist`."""
    command = shutil.which(os.environ.get("HASHDIST_TEST_AZURITE", "azurite-blob"))
    if command is None or importlib.util.find_spec("obstore") is None:
        pytest.skip("az:// is tested with the npm package azurite (or HASHDIST_TEST_AZURITE) and the extra `azure`")
    from hashdist.store.azure import _environment, _filesystem

    port, key = _free_port(), base64.b64encode(os.urandom(64)).decode()
    values = {
        "AZURE_STORAGE_ACCOUNT_NAME": "hashdist",
        "AZURE_STORAGE_ACCOUNT_KEY": key,
        "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/hashdist",
    }
    flags = [
        "--silent",
        "--disableTelemetry",
        "--skipApiVersionCheck",
        "--inMemoryPersistence",
        "--blobPort",
        str(port),
    ]
    server = subprocess.Popen(
        [command, *flags], env={**os.environ, "AZURITE_ACCOUNTS": f"hashdist:{key}"}, stdout=subprocess.DEVNULL
    )
    try:
        _wait_for(port)
        with pytest.MonkeyPatch.context() as environment:
            for name, value in values.items():
                environment.setenv(name, value)
            _filesystem(os.getpid(), _environment()).create_dir("hashdist")
            yield values["AZURE_STORAGE_ENDPOINT"]
    finally:
        server.terminate()
        server.wait()


def _free_port() -> int:
    with socket.socket() as asking:
        asking.bind(("127.0.0.1", 0))
        return int(asking.getsockname()[1])


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + _STARTS_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"Azurite did not answer on port {port} within {_STARTS_S:.0f} s")


@pytest.fixture(params=["local", "s3", "memory", "azure"])
def root_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty root in every kind of store."""
    name = f"{tmp_path.name}-{os.urandom(4).hex()}"
    if request.param == "local":
        return (tmp_path / "root").as_uri()
    if request.param == "memory":
        return f"memory://{name}"
    if request.param == "azure":
        request.getfixturevalue("azurite")
        return f"az://hashdist/{name}"
    request.getfixturevalue("s3_endpoint")
    return f"s3://hashdist/{name}"
