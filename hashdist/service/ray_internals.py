"""All that touches private parts of Ray, read against the version that the test names."""

import asyncio
from typing import Any

from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import replica
from ray.serve._private.http_util import ASGIReceiveProxy
from ray.util import get_node_ip_address

from hashdist.service.limits import App, Receive, Scope, Send

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


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


def on_own_address() -> None:
    """Let this replica's server for calls between replicas listen on its node's own address only.

    Ray 2.60 opens it on every interface, even where the node has the loopback's, and unpickles what comes in before it
    looks at it: who reaches the port runs code, unless RAY_AUTH_MODE is token. Nothing of ours calls it.
    """

    def inside(server: Any, address: str) -> Any:
        own = get_node_ip_address()  # type: ignore[no-untyped-call]
        return add_port_to_grpc_server(server, address.replace("[::]", own))  # type: ignore[no-untyped-call]

    vars(replica)["add_port_to_grpc_server"] = inside


async def _nothing_comes(_metadata: Any) -> bytes:
    found: bytes = await asyncio.get_running_loop().create_future()
    return found
