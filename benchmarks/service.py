"""The search service: what it adds to a search, what it answers a second, how it starts, and what it does under change.

    python benchmarks/service.py latency
    python benchmarks/service.py throughput
    python benchmarks/service.py cold
    python benchmarks/service.py swaps
    python benchmarks/service.py memory

latency and throughput: code queries (k = 10) over `--rows` codes of 64 bits in `--shards` shards, `--dead` of the rows
hidden. Peers, in turn, `--runs` times: `index.search` itself in this process, and `constant`, the same route (path,
parameters, limits, log line and metrics around it) in a deployment of its own on the same Serve that answers with a
constant body, one of the service's. `bare` is a FastAPI route on Serve with that body and nothing around it.

- latency: one client. (service - search) / constant for p50 and p99 of each run; asked at most 1.5.
- throughput: `--clients` clients. S = queries a second of `index.search` with as many codes at once, H = requests a
  second of `constant`. The service's over 1 / (1 / S + 1 / H); asked at least 0.8. The client (http_load.py) says what
  share of the time it was busy.
- cold: Ray and Serve run, the cache is empty, index and model lie on a moto S3 server in another process. Seconds from
  deploying until /readyz is 200, less those of the plain download of the same bytes; asked at most 15. Once with the
  compiled kernels on disk, once without them.
- swaps: `--seconds` of load with ten new versions and a new model; every answer checked (tests/worlds/load.py).
- memory: `--seconds` of load with four new versions a minute; MB a minute of each replica by least squares, the first
  fifth left out, and of the second half alone.

Prints one JSON line per measurement: medians and [lowest, highest] of the runs.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # peers of benchmarks; the load and its oracle are the tests'

import numpy as np  # noqa: E402
from fastapi import FastAPI, Query, Request  # noqa: E402
from fastapi.responses import Response  # noqa: E402
from open_index import build as build_on_s3  # noqa: E402
from open_index import downloaded, s3  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.schema import LoggingConfig  # noqa: E402
from search import build, random_codes  # noqa: E402
from timing import Work, in_turn, options, quotients, spread, timed  # noqa: E402

from hashdist.ground import telemetry  # noqa: E402
from hashdist.ground.settings import ClusterSettings, IndexSettings, ServiceSettings, Settings  # noqa: E402
from hashdist.index import Index, open_index  # noqa: E402
from hashdist.index.shards.shard import parts  # noqa: E402
from hashdist.service.api import SearchRequest  # noqa: E402
from hashdist.service.app import application  # noqa: E402
from hashdist.service.limits import Border  # noqa: E402
from hashdist.stages.cluster import metrics, session  # noqa: E402
from hashdist.stages.cluster.internals import listen_on_own_address  # noqa: E402
from tests.worlds.load import slope, under_load, watched  # noqa: E402
from tests.worlds.service import ServiceWorld, ask, free_port, serving  # noqa: E402

_K = 10
_LOGGING = LoggingConfig(encoding="JSON", enable_access_log=False)


def main() -> None:
    a = _arguments()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory(prefix="hashdist-service-", dir=a.folder) as folder:
        os.environ["HASHDIST_CACHE"] = f"{folder}/cache"
        for case in a.cases:
            for line in CASES[case](a, Path(folder)):
                print(json.dumps({"benchmark": "service", "case": case, **line}), flush=True)


# Beside a constant


@serve.ingress()
class Constant:
    """The route of a search, with all that stands around it, and a body that is there already."""

    def __init__(self, body: bytes) -> None:
        listen_on_own_address()
        telemetry.set_sink(metrics.RaySink())
        self._body = body

    def __serve_build_asgi_app__(self) -> Border:
        app, body = FastAPI(), self._body

        @app.get("/search")
        async def search(request: Request, asked: Annotated[SearchRequest, Query()]) -> Response:  # noqa: ARG001
            return Response(body, media_type="application/json")

        return Border(app, most_bytes=1_000_000, most_at_once=200)


@serve.ingress()
class Bare:
    """The body, and nothing else."""

    def __init__(self, body: bytes) -> None:
        listen_on_own_address()
        self._body = body

    def __serve_build_asgi_app__(self) -> FastAPI:
        app, body = FastAPI(), self._body

        @app.get("/search")
        async def search() -> Response:
            return Response(body, media_type="application/json")

        return app


def _deployed(kind: Any, body: bytes) -> Any:
    options = {"max_ongoing_requests": 400, "ray_actor_options": {"num_cpus": 1}, "logging_config": _LOGGING}
    return serve.deployment(name=kind.__name__, **options)(kind).bind(body)


class _Setup:
    """An index, the service over it and the constant routes on one Serve, and the client."""

    def __init__(self, a: argparse.Namespace, index: Index, port: int, client: "subprocess.Popen[str]") -> None:
        self.index, self._port, self._client = index, port, client
        self.codes = random_codes(max(a.requests, a.clients), 64, seed=2)

    def ask(self, route: str, **how: Any) -> dict[str, Any]:
        """What the client measured on a route: "", "constant" or "bare"."""
        paths = [f"/{route}/search?code={code.tobytes().hex()}&k={_K}".replace("//", "/") for code in self.codes]
        requests = [f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" for path in paths]
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.write(json.dumps({"port": self._port, "requests": requests, **how}) + "\n")
        self._client.stdin.flush()
        found: dict[str, Any] = json.loads(self._client.stdout.readline())
        assert not found["failed"], f"{found['failed']} requests of {route or 'the service'} were not answered with 200"
        return found


@contextmanager
def _setup(a: argparse.Namespace, folder: Path) -> Iterator[_Setup]:
    index = build(a, random_codes(a.rows, 64), folder)
    port = free_port()
    command = [sys.executable, str(HERE / "http_load.py")]
    with (
        session.session(ClusterSettings(address="local", cpus=4, object_store_mb=100)),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client,
    ):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = Settings(index=IndexSettings(uri=index.uri), service=ServiceSettings(encoders=0))
        serve.run(application(settings), name="hashdist", route_prefix="/")
        _until_ready(port)
        _, answer = ask(f"http://127.0.0.1:{port}/search?code={'00' * 8}&k={_K}")
        body = json.dumps(answer, separators=(",", ":")).encode()
        for kind in (Constant, Bare):
            serve.run(_deployed(kind, body), name=kind.__name__, route_prefix=f"/{kind.__name__.lower()}")
        setup = _Setup(a, index, port, client)
        setup.ask("", connections=1, count=20)
        yield setup
        client.stdin.close()  # type: ignore[union-attr]
        serve.shutdown()


def _until_ready(port: int, most_s: float = 300.0) -> None:
    until = time.monotonic() + most_s
    while True:
        try:
            status, body = ask(f"http://127.0.0.1:{port}/readyz")
        except OSError as error:
            status, body = 0, error
        if status == 200:
            return
        assert time.monotonic() < until, f"not ready after {most_s:.0f} s: {body}"
        time.sleep(0.02)


def latency(a: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    with _setup(a, folder) as setup:

        def search() -> list[float]:
            each = [code[None] for code in setup.codes[: a.requests]]
            return [timed(partial(setup.index.search, code, _K))[0] for code in each]

        def route(name: str) -> Callable[[], list[float]]:
            return lambda: list(setup.ask(name, connections=1, count=a.requests)["latencies"])

        works = {"search": search, **{name or "service": route(name) for name in ("", "constant", "bare")}}
        times = in_turn(a.runs, works)
    for name, share in (("p50", 50), ("p99", 99)):
        points = {peer: [float(np.percentile(run, share)) for run in runs] for peer, runs in times.items()}
        added = [a - b for a, b in zip(points["service"], points["search"], strict=True)]
        yield {
            "rows": a.rows, "clients": 1, "requests": a.requests, "runs": a.runs, "percentile": name,
            **{f"{peer}_ms": spread(values, 1e3) for peer, values in points.items()},
            "added_ms": spread(added, 1e3),
            "added_over_constant": spread(quotients(added, points["constant"])),
            "added_over_bare": spread(quotients(added, points["bare"])),
            "asked": 1.5,
        }  # fmt: skip


def throughput(a: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    busy: list[float] = []
    with _setup(a, folder) as setup:
        codes = setup.codes[: a.clients]

        def search() -> float:
            started, queries = time.perf_counter(), 0
            while time.perf_counter() - started < a.seconds_a_run:
                setup.index.search(codes, _K)
                queries += len(codes)
            return queries / (time.perf_counter() - started)

        def route(name: str) -> Callable[[], float]:
            def ask() -> float:
                found = setup.ask(name, connections=a.clients, seconds=a.seconds_a_run)
                busy.append(found["cpu_seconds"] / found["seconds"])
                return len(found["latencies"]) / found["seconds"]

            return ask

        rates = in_turn(a.runs, {"search": search, "service": route(""), "constant": route("constant")})
    possible = [1 / (1 / s + 1 / h) for s, h in zip(rates["search"], rates["constant"], strict=True)]
    yield {
        "rows": a.rows, "clients": a.clients, "seconds_a_run": a.seconds_a_run, "runs": a.runs,
        "search_queries_per_s": spread(rates["search"]), "constant_requests_per_s": spread(rates["constant"]),
        "service_queries_per_s": spread(rates["service"]), "possible_queries_per_s": spread(possible),
        "service_over_possible": spread(quotients(rates["service"], possible)), "asked": 0.8,
        "client_busy": round(max(busy), 2),
    }  # fmt: skip


# From nothing


def cold(a: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    kernels = folder / "kernels"
    os.environ["NUMBA_CACHE_DIR"] = str(kernels)
    with s3():
        uri = "s3://hashdist/cold"
        build_on_s3(uri, a.rows, a.shards, _model())
        entries = [entry for shard in open_index(uri).manifest["shards"] for entry in parts(shard).values()]
        settings = Settings(index=IndexSettings(uri=uri), service=ServiceSettings(refresh_s=0.5))
        port = free_port()
        with session.session(ClusterSettings(address="local", cpus=4, object_store_mb=100)):
            serve.start(http_options={"host": "127.0.0.1", "port": port})

            def started(*, compiled: bool) -> float:
                _away(Path(os.environ["HASHDIST_CACHE"]), *([] if compiled else [kernels]))
                began = time.perf_counter()
                serve.run(application(settings), name="hashdist", route_prefix="/")
                _until_ready(port)
                seconds = time.perf_counter() - began
                serve.delete("hashdist")
                return seconds

            works: dict[str, Work] = {
                "uncompiled": partial(started, compiled=False),
                "compiled": partial(started, compiled=True),
                "download": lambda: timed(lambda: downloaded("cold", entries))[0],
            }
            times = in_turn(a.runs, works)
            serve.shutdown()
    size = sum(entry["bytes"] for entry in entries)
    for kind in ("compiled", "uncompiled"):
        beyond = [a - b for a, b in zip(times[kind], times["download"], strict=True)]
        yield {
            "rows": a.rows, "runs": a.runs, "mb": round(size / 1e6, 1), "kernels": kind,
            "ready_s": spread(times[kind]),
            "download_s": spread(times["download"]), "beyond_download_s": spread(beyond), "asked": 15,
        }  # fmt: skip


def _model() -> str:
    """URI of a model of 64 bits on the S3 server."""
    from tests.worlds import reindex as growth_world

    return growth_world.committed_model("s3://hashdist/artefacts", 64).uri


def _away(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


# Under change


_UNBOUND = {"images_per_s": 10_000.0, "waiting": 200}
"""The load decodes more pictures than a replica lets strangers have decoded."""


def swaps(a: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    world = ServiceWorld(folder, images=500)
    rows = [world.add, world.replace, world.delete, world.compact, world.replace]
    with serving(world, folder, **_UNBOUND) as service:
        load = asyncio.run(
            under_load(world, service, [*rows, world.switch_model, *rows], clients=a.clients, seconds=a.seconds or 60)
        )
    yield {
        "seconds": a.seconds or 60, "clients": a.clients, "answers": sum(load.versions.values()),
        "by_kind": dict(load.asked), "swaps": len(load.swapped), "versions": len(load.versions),
        "failed": load.failed, "wrong": load.wrong, "failures": load.failures,
    }  # fmt: skip


def memory(a: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    seconds = a.seconds or 600
    world = ServiceWorld(folder, images=500)
    samples: dict[int, Any] = {}

    async def run(service: Any) -> Any:
        watching = asyncio.create_task(watched(list(service.replicas()), 1.0, samples))
        changes = [world.add, world.replace, world.delete, world.compact] * max(1, round(seconds / 60))
        load = await under_load(world, service, changes, clients=8, seconds=seconds, pause_s=0.02)
        watching.cancel()
        return load

    with serving(world, folder, **_UNBOUND) as service:
        names = service.replicas()
        load = asyncio.run(run(service))
    for pid, seen in samples.items():
        late = [one for one in seen if one.at_s >= seen[0].at_s + seconds / 5]
        yield {
            "seconds": seconds, "deployment": names[pid], "answers": sum(load.versions.values()),
            "failures": load.failures, "swaps": len(load.swapped),
            **{f"{what}_mb": [round(getattr(one, what), 1) for one in (late[0], late[-1])] for what in ("rss", "pss")},
            **{f"{what}_mb_a_minute": round(slope(late, what, 0), 3) for what in ("rss", "pss", "anonymous")},
            "rss_mb_a_minute_of_the_second_half": round(slope(seen, "rss", seconds / 2), 3),
        }  # fmt: skip


CASES: dict[str, Callable[[argparse.Namespace, Path], Iterator[dict[str, Any]]]] = {
    "latency": latency, "throughput": throughput, "cold": cold, "swaps": swaps, "memory": memory,
}  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, rows=10_000_000, shards=8, dead=0.01, runs=7, clients=32)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--requests", type=int, default=300, help="of one client in a run")
    parser.add_argument("--seconds-a-run", type=float, default=5.0, help="of many clients")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="of load while versions change; 60, or 600 for memory"
    )
    parser.add_argument("--folder", help="where everything is written; a temporary folder by default")
    return parser.parse_args()


if __name__ == "__main__":
    main()
