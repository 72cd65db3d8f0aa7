"""The search service on Ray Serve: which processes there are, and how one configuration file makes them.

`Search` answers HTTP: each replica maps all shards (or has them searched by the `Shards` deployments) and follows the
index by itself. `Encoder` turns pictures into codes, apart from it: torch, and bytes from strangers, stay out of the
process that searches. `build` is the import path of Serve's configuration files, `serve` the command.
"""

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import LoggingConfig

from hashdist.cli import parse
from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput, Unavailable
from hashdist.ground.progress import say
from hashdist.ground.settings import ServiceSettings, Settings
from hashdist.index import Index
from hashdist.index.view import View
from hashdist.service.api import Backend, EncodedImage, make_app
from hashdist.service.batching import Batches
from hashdist.service.encoder import Encoder
from hashdist.service.serving import Serving
from hashdist.stages.cluster import metrics, session
from hashdist.stages.cluster.internals import WithoutBodies, listen_on_own_address
from hashdist.stages.cluster.peers import Call, Searcher, SpreadIndex
from hashdist.store.commit import Log, Version

NAME = "hashdist"
"""Of the Serve application."""

_GONE = (RayActorError, DeploymentUnavailableError, BackPressureError)
_SCANS_AT_ONCE = 2
_CALLS_AT_ONCE = 16
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Shards(Searcher):
    """A `Searcher` as a deployment."""

    def __init__(self) -> None:
        listen_on_own_address()
        super().__init__()


class Deployments:
    """Peers (stages/cluster/peers.py) that are deployments of one `Searcher` each: Serve starts one that dies again.

    Args:
        handles: of the deployments.
    """

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def __len__(self) -> int:
        """How many."""
        return len(self._handles)

    def ask(self, calls: Sequence[Call]) -> list[Any]:
        """See Peers. Not to be called in an event loop."""
        asked = [getattr(self._handles[call.peer], call.what).remote(*call.arguments) for call in calls]
        try:
            return [answer.result() for answer in asked]
        except RayTaskError as error:
            raise error.cause from None
        except _GONE as error:
            raise Unavailable(f"shards are searched by a process that does not answer: {error}") from error

    def close(self) -> None:
        """Serve ends them."""


@ray_serve.ingress()
class Search:
    """The routes, and the version they answer from.

    Args:
        uri: of the index.
        settings: of the service.
        encoder: handle of `Encoder`; None = pictures are not read.
        shards: handles of `Shards`; none = this process searches.
        guarded: a token must be asked for.
    """

    def __init__(self, uri: str, settings: ServiceSettings, encoder: Any, shards: list[Any], guarded: bool) -> None:
        listen_on_own_address()
        self._guarded = guarded
        telemetry.set_sink(metrics.RaySink())
        self._settings, self._encoder = settings, encoder
        self._serving = Serving(
            uri,
            refresh_s=settings.refresh_s,
            held_versions=settings.held_versions,
            prepare=self._prepare if encoder is not None else None,
            open_version=self._open_spread if shards else None,
            pictures=settings.pictures,
        )
        self._peers = Deployments(shards)
        self._serving.start()

    def __serve_build_asgi_app__(self) -> WithoutBodies:
        encode = self._encode if self._encoder is not None else None
        self._batches = Batches(_SCANS_AT_ONCE, time.perf_counter)
        backend = Backend(self._serving, self._batches, encode, metrics.exported_metrics, self._settings)
        return WithoutBodies(make_app(backend, self._token()))

    def _token(self) -> str:
        """The token of this process's environment. Raises InvalidInput where there is none, but the driver had one."""
        token = os.environ.get(self._settings.token_env, "")
        if self._guarded and not token:
            raise InvalidInput(
                f"requests must carry a token, but {self._settings.token_env} is not set where the service runs; set "
                "it on every machine of the cluster, or call it HASHDIST_..., which is handed on"
            )
        return token

    def check_health(self) -> None:
        """Raises where the index is followed no longer."""
        if not self._serving.alive:
            raise RuntimeError("the thread that follows the index has ended")

    def _open_spread(self, log: Log, version: Version, before: View | None) -> Index:
        whole = Index(log, version, writable=False)
        return SpreadIndex(whole, self._peers, before)

    def _prepare(self, uri: str) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = self._encoder.prepare.remote(uri).result()
            return found
        except RayTaskError as error:
            raise error.cause from None
        except _GONE as error:
            raise Unavailable(f"no encoder answers: {error}") from error

    async def _encode(self, uri: str, data: bytes) -> EncodedImage:
        try:
            answer = await self._encoder.encode.remote(uri, data)
        except RayTaskError as error:
            raise error.cause from None
        except _GONE as error:
            raise Unavailable(f"no encoder answers now; send it again: {type(error).__name__}") from error
        if isinstance(answer, str):
            raise InvalidInput(f"the picture cannot be read: {answer}")
        code, width, height = answer
        return EncodedImage(np.frombuffer(code, np.uint8), width, height)

    def __del__(self) -> None:
        self._serving.close()


def build(args: Mapping[str, str]) -> Any:
    """The application of a configuration file, for Serve: `import_path: hashdist.service.app:build`.

    Args:
        args: config: path of the YAML file; further entries are settings by full name, as on the command line.
    """
    words = [word for name, value in args.items() for word in (f"--{name}", str(value))]
    settings, _ = parse("serve", words)
    return application(settings)


def application(settings: Settings) -> Any:
    """The Serve application of these settings."""
    service = settings.service
    handle = None
    if service.encoders:
        gpu = service.encoder_gpu == "yes" or (service.encoder_gpu == "auto" and _cluster_has_gpus())
        encoder = ray_serve.deployment(
            name="Encoder",
            num_replicas=service.encoders,
            max_ongoing_requests=4 * service.encode_batch,
            ray_actor_options={"num_cpus": 1, "num_gpus": int(gpu)},
            graceful_shutdown_timeout_s=service.drain_s,
        )(Encoder)
        handle = encoder.bind(service.max_pixels, service.encode_batch, "cuda" if gpu else "cpu")
    search = ray_serve.deployment(
        name="Search",
        num_replicas=service.replicas,
        # the replica counts for itself and answers in JSON; Serve's own limit lies above it
        max_ongoing_requests=4 * service.waiting,
        ray_actor_options={"num_cpus": service.cpus},
        graceful_shutdown_timeout_s=service.drain_s,
        logging_config=LoggingConfig(encoding="JSON", enable_access_log=False),
    )(Search)
    return search.bind(settings.index.location(settings.root), service, handle, _shards(service), is_guarded(service))


def _shards(service: ServiceSettings) -> list[Any]:
    """The deployments over which shards are spread, each a name of its own: a call is for one of them."""
    options: dict[str, Any] = {
        "max_ongoing_requests": _CALLS_AT_ONCE,
        "ray_actor_options": {"num_cpus": service.cpus},
        "graceful_shutdown_timeout_s": service.drain_s,
    }
    return [ray_serve.deployment(name=f"Shards-{number}", **options)(Shards).bind() for number in range(service.spread)]


def is_guarded(service: ServiceSettings) -> bool:
    """Whether this process's environment has a token for the service; warns where anyone may reach it without one."""
    guarded = bool(os.environ.get(service.token_env))
    if not guarded and service.host not in _LOOPBACK:
        say(f"serve: WARNING: {service.token_env} is not set: anyone who reaches {service.host} may search")
    return guarded


def _cluster_has_gpus() -> bool:
    return bool(ray.is_initialized() and session.gpus())


def serve(settings: Settings) -> dict[str, Any]:
    """Serve until SIGTERM or SIGINT: requests that have begun are answered, then the application is taken away."""
    service = settings.service
    ended = threading.Event()
    with session.session(settings.cluster):
        for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets its own
            signal.signal(number, lambda *_: ended.set())
        ray_serve.start(http_options={"host": service.host, "port": service.port})
        ray_serve.run(application(settings), name=NAME, route_prefix="/")
        say(f"serve: http://{service.host}:{service.port}/ (the API: /docs); stop with Ctrl-C")
        started = time.monotonic()
        ended.wait()
        say("serve: stopping; requests that have begun are answered")
        ray_serve.delete(NAME)
        if not ray_serve.status().applications:  # on a cluster there may be those of others
            ray_serve.shutdown()  # type: ignore[no-untyped-call]
    return {"seconds": round(time.monotonic() - started, 1), "text": "stopped"}
