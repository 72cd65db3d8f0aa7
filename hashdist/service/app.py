"""The search service on Ray Serve: which processes there are, and how one configuration file makes them.

`Search` answers HTTP: each replica maps all shards (or has them searched by the `Shards` deployments) and follows the
index by itself. `Encoder` turns pictures into codes, apart from it: torch, and bytes from strangers, stay out of the
process that searches. `build` is the import path of Serve's configuration files, `serve` the command.
"""

import asyncio
import os
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from ray import serve as ray_serve
from ray._common.tls_utils import add_port_to_grpc_server
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private import replica
from ray.serve._private.http_util import ASGIReceiveProxy
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import LoggingConfig
from ray.util import get_node_ip_address

from hashdist.cli import parse
from hashdist.collection.decode import BadImage, claimed_pixels, decode
from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput, Unavailable
from hashdist.ground.progress import say
from hashdist.ground.settings import ServiceSettings, Settings
from hashdist.index import Index
from hashdist.index.view import View
from hashdist.service.api import Backend, EncodedImage, make_app
from hashdist.service.batching import Batches
from hashdist.service.limits import App, Receive, Scope, Send
from hashdist.service.serving import Serving
from hashdist.stages.cluster import session
from hashdist.stages.cluster.peers import Call, Searcher, SpreadIndex
from hashdist.store.commit import Log, Version

NAME = "hashdist"
"""Of the Serve application."""

_GONE = (RayActorError, DeploymentUnavailableError, BackPressureError)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MODELS_HELD = 2
_SCANS_AT_ONCE = 2
_CALLS_AT_ONCE = 16
_DECODING_THREADS = 4


class Unfetched:
    """An application whose requests without a body do not have Serve fetch one.

    As soon as a handler waits for anything, Serve's replica asks the proxy by an actor call for the request's messages;
    for a GET nothing but "disconnected" can come, which the proxy says by cancelling the request too. That call takes
    about as long as all that this package does for a search.

    Args:
        app: what answers.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and scope["method"] == "GET" and isinstance(receive, ASGIReceiveProxy):
            receive._receive_asgi_messages = _nothing_comes
        await self._app(scope, receive, send)


async def _nothing_comes(_metadata: Any) -> bytes:
    found: bytes = await asyncio.get_running_loop().create_future()
    return found


def _on_own_address() -> None:
    """Let this replica's server for calls between replicas listen on its node's own address only.

    Ray 2.60 opens it on every interface, even where the node has the loopback's, and unpickles what comes in before it
    looks at it: who reaches the port runs code, unless RAY_AUTH_MODE is token. Nothing of ours calls it.
    """

    def inside(server: Any, address: str) -> Any:
        own = get_node_ip_address()  # type: ignore[no-untyped-call]
        return add_port_to_grpc_server(server, address.replace("[::]", own))  # type: ignore[no-untyped-call]

    vars(replica)["add_port_to_grpc_server"] = inside


class Encoder:
    """Pictures to codes, in batches; the last two models stay loaded.

    Args:
        max_pixels: of a picture.
        batch: pictures at once.
        device: where models run.
    """

    def __init__(self, max_pixels: int, batch: int, device: str) -> None:
        _on_own_address()
        telemetry.set_sink(session.RaySink())
        self._max_pixels, self._device = max_pixels, device
        self._models: OrderedDict[str, Any] = OrderedDict()
        self._loading = threading.Lock()
        self._threads = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="hashdist-decode")
        self._encode.set_max_batch_size(batch)  # type: ignore[attr-defined]

    async def prepare(self, uri: str) -> dict[str, Any]:
        """Load a model. Raises what `load_model` raises."""
        return await asyncio.to_thread(self._prepared, uri)

    async def encode(self, uri: str, data: bytes) -> tuple[bytes, int, int] | str:
        """A picture's code, width and height; or why it cannot be read."""
        found: tuple[bytes, int, int] | str = await self._encode((uri, data))
        return found

    @ray_serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def _encode(self, asked: list[tuple[str, bytes]]) -> list[Any]:
        return await asyncio.to_thread(self._encoded, asked)

    def _prepared(self, uri: str) -> dict[str, Any]:
        model = self._model(uri)
        try:
            encoded = model.encode_readable([np.zeros((8, 8, 3), np.uint8)])
        except InvalidInput as error:
            return {"reads_images": False, "reason": str(error)}
        return {"reads_images": encoded.reasons[0] is None, "reason": encoded.reasons[0] or ""}

    def _encoded(self, asked: list[tuple[str, bytes]]) -> list[Any]:
        return [answer for some in within(asked, self._max_pixels) for answer in self._together(some)]

    def _together(self, asked: list[tuple[str, bytes]]) -> list[Any]:
        answers: list[Any] = [None] * len(asked)
        pixels = list(self._threads.map(self._decoded, [data for _, data in asked]))
        for uri in dict.fromkeys(uri for uri, _ in asked):
            which = [number for number, one in enumerate(asked) if one[0] == uri]
            encoded = self._model(uri).encode_readable([pixels[number] for number in which])
            for number, code, reason in zip(which, encoded.codes, encoded.reasons, strict=True):
                height, width = (0, 0) if reason else pixels[number].shape[:2]
                answers[number] = reason or (code.tobytes(), width, height)
        return answers

    def _decoded(self, data: bytes) -> Any:
        try:
            return decode(data, self._max_pixels)
        except BadImage as error:
            return error

    def _model(self, uri: str) -> Any:
        with self._loading:
            if uri not in self._models:
                # brings torch with it, which a process that only names this class does without
                from hashdist.models.model import load_model

                self._models[uri] = load_model(uri, device=self._device)
            self._models.move_to_end(uri)
            while len(self._models) > _MODELS_HELD:
                self._models.popitem(last=False)
            return self._models[uri]


def within(asked: Iterable[tuple[str, bytes]], most: int) -> Iterator[list[tuple[str, bytes]]]:
    """Runs of pictures that have at most so many pixels together, or are one: what is decoded at the same time."""
    some: list[tuple[str, bytes]] = []
    pixels = 0
    for one in asked:
        claimed = claimed_pixels(one[1])
        if some and pixels + claimed > most:
            yield some
            some, pixels = [], 0
        some, pixels = [*some, one], pixels + claimed
    if some:
        yield some


class Shards(Searcher):
    """A `Searcher` as a deployment."""

    def __init__(self) -> None:
        _on_own_address()
        super().__init__()


class Deployments:
    """Peers (stages/search.py) that are deployments of one `Searcher` each: Serve starts one that dies again.

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
        _on_own_address()
        self._guarded = guarded
        telemetry.set_sink(session.RaySink())
        self._settings, self._encoder = settings, encoder
        self._serving = Serving(
            uri,
            refresh_s=settings.refresh_s,
            held_versions=settings.held_versions,
            prepare=self._prepare if encoder is not None else None,
            opened=self._opened if shards else None,
            pictures=settings.pictures,
        )
        self._peers = Deployments(shards)
        self._serving.start()

    def __serve_build_asgi_app__(self) -> Unfetched:
        encode = self._encode if self._encoder is not None else None
        self._batches = Batches(_SCANS_AT_ONCE, time.perf_counter)
        backend = Backend(self._serving, self._batches, encode, session.exported_metrics, self._settings)
        return Unfetched(make_app(backend, self._token()))

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

    def _opened(self, log: Log, version: Version, before: View | None) -> Index:
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
