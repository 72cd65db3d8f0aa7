"""A collection of pictures, models, an index of their codes, and the search service over it as a process of its own.

`ServiceWorld(folder)` makes the first without Ray, with the project's own functions: a folder of PNG files, committed
as a collection; a model that nobody trained; version 2 of an index that names both. Its methods commit more versions.
`serving(world)` runs `hashdist serve` beside it. Every version can be asked what it has to answer: `world.at(version)`
is that version, opened here, and `world.model(digest)` the model with that digest.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray
from PIL import Image

from hashdist.collection.collection import KIND, assemble, plan, write_unit
from hashdist.collection.listing import list_collection, manifest_fields
from hashdist.collection.readers.reader import content_digest
from hashdist.collection.vocabulary import label_numbers
from hashdist.ground.settings import CollectionSettings
from hashdist.index import Index, create_index, open_index
from hashdist.index.shards.shard import Rows, parts, write_shard
from hashdist.index.upkeep.compaction import compact
from hashdist.index.upkeep.retention import rollback
from hashdist.models.model import Model, load_model
from hashdist.store import open_store
from hashdist.store.commit import Artefact
from tests.worlds import reindex as growth_world
from tests.worlds.processes import descendants

BITS = 64
PART_ROWS = 2048
ODD_KEY = "odd/a b#ü%2F.png"
"""One of the keys: whatever has to be quoted in a URL."""


class ServiceWorld:
    """A root at FOLDER/root with an index `photos` over the pictures in FOLDER/images, and what happens to it.

    Every method that commits returns the new version's number. `root` may be another one, such as s3://.

    Args:
        folder: empty.
        images: how many pictures at first.
        side: of a picture, in pixels.
        root: where everything is committed; FOLDER/root by default.
    """

    def __init__(self, folder: Path, images: int = 60, side: int = 24, root: str = "") -> None:
        self.images, self.root = folder / "images", root or str(folder / "root")
        self.uri = f"{self.root}/indexes/photos"
        self._side, self._named, self._drawn, self._models = side, 0, 0, 0
        self._opened: dict[int, Index] = {}
        self.models: dict[str, Model] = {}
        """Models by digest."""
        self.current = self.new_model()
        keys = [ODD_KEY, *(self._name() for _ in range(images - 1))]
        self._write(keys)
        self.collection = commit_collection(self.root, self.images).uri
        self.index = create_index(self.uri, BITS, self.current.uri)
        self._append(keys, "build", collection=self.collection)

    # What is there

    def keys(self) -> list[str]:
        """Keys of the newest version, sorted."""
        return sorted(self.index.keys())

    def picture(self, key: str) -> bytes:
        """The PNG file of a key as it is now."""
        return (self.images / key).read_bytes()

    def at(self, version: int) -> Index:
        """That version, opened apart from the service."""
        if version not in self._opened:
            self._opened[version] = open_index(self.uri, version)
        return self._opened[version]

    def model(self, digest: str) -> Model:
        """The model with that digest."""
        return self.models[digest]

    # What happens

    def add(self, count: int = 5) -> int:
        """New pictures, in one version."""
        keys = [self._name() for _ in range(count)]
        self._write(keys)
        return self._append(keys, "append")

    def replace(self, count: int = 5) -> int:
        """Other bytes, and so other codes, of some keys."""
        keys = self.keys()[:: max(1, len(self.keys()) // count)][:count]
        self._write(keys)
        return self._append(keys, "append")

    def delete(self, count: int = 5) -> int:
        """Some keys go; the pictures stay in the folder."""
        self.index.delete([key for key in self.keys() if key != ODD_KEY][-count:])
        return self.index.version

    def switch_model(self) -> int:
        """All pictures encoded again by another model, in one version; codes differ almost everywhere."""
        self.current = self.new_model()
        return self._publish(corrupt=False)

    def compact(self) -> int:
        """The same rows in one shard."""
        compact(self.index, everything=True)
        return self.index.version

    def rollback(self, to: int) -> int:
        """A version with the content of an older one."""
        rollback(self.index, to)
        self.current = self.models[str(self.index.model)]
        return self.index.version

    def corrupt(self) -> int:
        """The same rows in a new shard, of whose codes one bit was turned before the version was committed.

        Later versions have that shard too, but for `switch_model`, and `rollback` to an earlier one.
        """
        return self._publish(corrupt=True)

    def new_model(self) -> Model:
        """Another committed model, which no version names yet."""
        self._models += 1
        model = load_model(growth_world.committed_model(self.root, BITS, seed=self._models).uri)
        self.models[model.digest] = model
        return model

    # How

    def _name(self) -> str:
        self._named += 1
        return f"{('ants', 'bees')[self._named % 2]}/{self._named:05d}.png"

    def _write(self, keys: list[str]) -> None:
        for key in keys:
            self._drawn += 1
            growth_world.write(self.images, {key: blocks(self._drawn, self._side)})

    def _append(self, keys: list[str], operation: str, **lineage: Any) -> int:
        codes, columns = self._encoded(keys)
        self.index.apply(codes, keys, columns, model=self.current.uri, operation=operation, lineage=lineage)
        return self.index.version

    def _publish(self, *, corrupt: bool) -> int:
        keys = self.keys()
        codes, columns = self._encoded(keys)
        ids = {key: id_ for table in self.index.tables([]) for key, id_ in zip(*_columns(table), strict=True)}
        rows = Rows(np.array([ids[key] for key in keys], np.int64), codes, keys, columns)
        names = self.index.versions.new_attempt()
        shard = write_shard(self.index.store, partial(names.new, "shards"), rows)
        if corrupt:
            flip(Path(self.index.store.uri.removeprefix("file://")) / parts(shard)["codes"]["path"])
        return self.index.publish(
            [shard],
            bits=BITS,
            salts={},
            model=self.current.digest,
            model_uri=self.current.uri,
            lineage={"collection": self.collection},
        )

    def _encoded(self, keys: list[str]) -> tuple[NDArray[np.uint8], pa.Table]:
        data = [self.picture(key) for key in keys]
        labels = pa.array([[label_of(key)] for key in keys], pa.list_(pa.int32()))
        return self.current.encode(data), pa.table({"digest": [content_digest(one) for one in data], "labels": labels})


def label_of(key: str) -> int:
    """The one label of a key: 0, 1 or 2."""
    return zlib.crc32(key.encode()) % 3


def blocks(seed: int, side: int) -> bytes:
    """A PNG file of 4 x 4 blocks in bright colours: a function of its seed, with another code for nearly every seed."""
    pixels = np.random.default_rng(seed).integers(0, 2, (4, 4, 3), np.uint8) * np.uint8(255)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(sink, "PNG")
    return sink.getvalue()


def _columns(table: pa.Table) -> tuple[list[str], list[int]]:
    return table["key"].to_pylist(), table["id"].to_pylist()


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def commit_collection(root: str, images: Path) -> Artefact:
    """The folder as a committed collection, as `hashdist collection` commits it, in this process."""
    listing = list_collection(CollectionSettings(uri=str(images)))
    planned = plan(listing, PART_ROWS)
    made = Artefact(open_store(root), KIND, listing.digest)
    units = [write_unit(made, unit, planned.reader.scan(unit), PART_ROWS) for unit in planned.units]
    labels = label_numbers(planned.reader, units)
    fields = assemble(made, units, salts=planned.salts, labels=labels, part_rows=PART_ROWS)
    made.publish({"stage": "collection", "inputs": {}, "settings": {}, **manifest_fields(listing), **fields})
    return made


# The service


@dataclass(frozen=True)
class Service:
    """A running service.

    Attributes:
        url: without a slash at its end.
        process: `hashdist serve`.
        log: what it has written, stdout and stderr.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """GET a path: status, and the JSON or the text."""
        return ask(f"{self.url}/{path.lstrip('/')}", **headers)

    def wait(self, version: int, timeout_s: float = 30) -> None:
        """Until that version, or a newer one, is served."""
        until = time.monotonic() + timeout_s
        while self.get("version")[1]["index"]["version"] < version:
            assert time.monotonic() < until, f"version {version} is not served after {timeout_s} s: {self.said()}"
            time.sleep(0.05)

    def replicas(self) -> dict[int, str]:
        """Process id to deployment of the replicas on this machine that belong to this service."""
        found = {}
        for pid in descendants(self.process.pid):
            with suppress(OSError):
                name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
                if name.startswith("ray::ServeReplica:hashdist:"):
                    found[pid] = name.split(":")[4]
        return found

    def said(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-4000:]


def ask(url: str, **headers: str) -> tuple[int, Any]:
    """GET: status, and the JSON or the text; any status is an answer. No proxy is asked."""
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            status, kind, data = answer.status, answer.headers.get_content_type(), answer.read()
    except urllib.error.HTTPError as error:
        status, kind, data = error.code, error.headers.get_content_type(), error.read()
    return status, json.loads(data) if kind == "application/json" else data.decode()


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    world: ServiceWorld, folder: Path, *, environment: dict[str, str] | None = None, ready: bool = True, **settings: Any
) -> Iterator[Service]:
    """`hashdist serve` over the world's index, on a free port of the loopback, with a Ray of its own.

    Ended by SIGTERM; it must then end by itself, with exit code 0.

    Args:
        world: what it serves; or anything with `root`.
        folder: for its configuration, its cache and its log.
        environment: further environment variables.
        ready: wait for /readyz to be 200; else only for an answer.
        settings: of the service; refresh_s is 0.2 unless given.
    """
    port = free_port()
    config = folder / "service.yaml"
    cluster = {"address": "local", "cpus": 4, "object_store_mb": 100}
    service = {"port": port, "refresh_s": 0.2, **settings}
    config.write_text(
        yaml.safe_dump({"root": world.root, "index": {"name": "photos"}, "cluster": cluster, "service": service})
    )
    own = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HASHDIST_CACHE": str(folder / "cache"),
        **(environment or {}),
    }
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "HASHDIST_TOKEN")}
    log = folder / "service.log"
    command = [str(Path(sys.executable).with_name("hashdist")), "serve", "--config", str(config)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=inherited | own, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    running = Service(f"http://127.0.0.1:{port}", process, log)
    try:
        _until_up(running, ready)
        yield running
        assert process.poll() is None, f"the service has ended by itself:\n{running.said()}"
    finally:
        code = _stop(process)
    assert code == 0, f"the service ended with {code}:\n{running.said()}"


def _until_up(running: Service, ready: bool, timeout_s: float = 240) -> None:
    until = time.monotonic() + timeout_s
    while True:
        with suppress(OSError):
            if running.get("readyz" if ready else "healthz")[0] == 200:
                return
        assert running.process.poll() is None, f"the service has ended by itself:\n{running.said()}"
        assert time.monotonic() < until, f"not ready after {timeout_s} s:\n{running.said()}"
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes], timeout_s: float = 60) -> int:
    """SIGTERM; what has not ended in time is killed, with all that it started. Returns the exit code."""
    begun = descendants(process.pid) - {process.pid}
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        _end(begun)


def _end(pids: set[int], wait_s: float = 5) -> None:
    """Kill what is left of them once they had time to follow."""
    until = time.monotonic() + wait_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
