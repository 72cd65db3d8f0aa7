"""All that touches private parts of Ray, in stages and in the service.

Read against the Ray of READ_AGAINST: tests/stages/cluster/test_internals.py fails by name on another one. Then read
each place below again, in Ray's source, and write the new version here.
"""

import asyncio
import ctypes
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray import _raylet
from ray._private import ray_constants, worker
from ray._private.state import state
from ray.util import get_node_ip_address

READ_AGAINST = "2.60.0"

LOOPBACK_VARIABLE = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
"""Says "0" to the processes that Ray starts: no clusters, so that they listen on the loopback."""

Application = Callable[[Any, Any, Any], Awaitable[None]]
"""ASGI."""


# The session


def on_loopback(folder: str) -> dict[str, Any]:
    """Arguments of `ray.init` that only tests of Ray use: the node's address, and the folder of its files."""
    return {"_node_ip_address": "127.0.0.1", "_temp_dir": folder}


@contextmanager
def loopback() -> Iterator[None]:
    """Let Ray's servers listen on the loopback only.

    Ray replaces a loopback address by the machine's own, and then listens on every interface, unless it is told, as it
    is on desktop systems, that it makes no clusters. LOOPBACK_VARIABLE says it to the processes that it starts.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


# What Ray prints

DATA_PROGRESS_LOGGER = "ray.data._internal.progress"
"""The logger by which Ray Data says that it shows no progress bars."""

_LOG_LEVEL = "_ZN3ray6RayLog19severity_threshold_E"  # ray::RayLog::severity_threshold_
_FATAL = 3


def give_reports_to(say: Callable[[dict[str, Any]], None]) -> None:
    """Before `ray.init`: reports of raylets, which Ray prints on stdout, where one JSON object belongs, go to `say`.

    It takes Ray's own record of a report, whose `lines` are a list of texts.
    """
    vars(worker)["print_to_stdstream"] = lambda data, *_, **__: say(data)


def log_fatal_errors_only() -> None:
    """After `ray.init`, which sets the level: the core library of this process logs errors that end it, no others.

    It logs those that it recovers from as well, whatever level Ray is told.
    """
    with suppress(OSError, ValueError):
        ctypes.c_int.in_dll(ctypes.CDLL(_raylet.__file__), _LOG_LEVEL).value = _FATAL


# Training


def autoscaler_limits() -> dict[str, float]:
    """Resources of the cluster, grown as far as its autoscaler may grow it; empty where it has none.

    Ray Train asks the same before it waits for workers.
    """
    return dict(state.get_max_resources_from_cluster_config() or {})


def free_address() -> tuple[str, int]:
    """This node's address, and a port that is free."""
    from ray.train._internal.utils import get_address_and_port  # Ray Train is loaded by the workers alone

    host, port = get_address_and_port()
    return str(host), int(port)


# Serve, which only the service loads


class WithoutBodies:
    """An application whose requests without a body do not have Serve fetch one.

    As soon as a handler waits for anything, Serve's replica asks the proxy by an actor call for the request's messages;
    for a GET nothing but "disconnected" can come, which the proxy says by cancelling the request too. That call takes
    about as long as all that this package does for a search.

    Args:
        app: what answers.
    """

    def __init__(self, app: Application) -> None:
        from ray.serve._private.http_util import ASGIReceiveProxy

        self._app, self._proxy = app, ASGIReceiveProxy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] == "http" and scope["method"] == "GET" and isinstance(receive, self._proxy):
            receive._receive_asgi_messages = _wait_for_ever
        await self._app(scope, receive, send)


async def _wait_for_ever(_metadata: Any) -> bytes:
    found: bytes = await asyncio.get_running_loop().create_future()
    return found


def listen_on_own_address() -> None:
    """Let this replica's server for calls between replicas listen on its node's own address only.

    Ray opens it on every interface, even where the node has the loopback's, and unpickles what comes in before it
    looks at it: who reaches the port runs code, unless RAY_AUTH_MODE is token. Nothing of ours calls it.
    """
    from ray._common.tls_utils import add_port_to_grpc_server
    from ray.serve._private import replica

    def inside(server: Any, address: str) -> Any:
        own = get_node_ip_address()  # type: ignore[no-untyped-call]
        return add_port_to_grpc_server(server, address.replace("[::]", own))  # type: ignore[no-untyped-call]

    vars(replica)["add_port_to_grpc_server"] = inside
