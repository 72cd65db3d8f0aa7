"""The border around every request: its id, its token, its size, how many at once; and the one line that is logged.

`Border` is plain ASGI (one call a request, nothing allocated per chunk), because what it costs every search pays.
"""

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from uuid import uuid4

from hashdist.ground import telemetry
from hashdist.ground.errors import HashdistError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("ray.serve")
"""Serve's own logger: it writes to the replica's log file, as JSON lines where app.py says so."""

OPEN = frozenset(("", "page.js", "page.css", "healthz", "readyz", "metrics", "docs", "openapi.json"))
"""First words of the paths that need no token: none of them says anything about an image."""

_STATIC = "static-offline-docs"
BODY_S = 30.0
_DIGITS = 18
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_QUIET = frozenset(("healthz", "readyz", "metrics"))
_ROUTES = OPEN | {"search", "pictures", "version", _STATIC}


class TooLarge(HashdistError):
    """A body beyond the limit: send less."""


class TooSlow(HashdistError):
    """A body that did not come in time: send it faster, or a smaller one."""


class TooMany(HashdistError):
    """More than this replica works on at once: send it again, later."""

    def __init__(self, message: str, after_s: float) -> None:
        super().__init__(message)
        self.after_s = after_s


class Unauthorized(HashdistError):
    """No token, or another one."""


class Bucket:
    """A rate, and a burst of a few seconds' worth of it: for work that is costly, such as decoding.

    Args:
        per_s: tokens a second.
        seconds: how many seconds' worth may be taken at once.
        clock: seconds, monotonic.
    """

    def __init__(self, per_s: float, seconds: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._most, self._clock = per_s, max(1.0, per_s * seconds), clock
        self._left, self._at = self._most, clock()

    def wait_s(self) -> float:
        """Takes one and returns 0; or takes none and returns in how many seconds there is one."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self._per_s
        self._left -= 1
        return 0.0


class Border:
    """An application within its limits.

    Behind Serve a request has an id already, which Serve's proxy adds to the answer too.

    Args:
        app: the routes.
        most_bytes: of a body.
        most_at_once: requests in work; further ones get 503.
        body_s: a body must have come after so long, or who sends slowly would keep the others out.
        token: what requests must carry as a bearer token; empty = nothing.
    """

    def __init__(
        self, app: App, *, most_bytes: int, most_at_once: int, body_s: float = BODY_S, token: str = ""
    ) -> None:
        self._app, self._most_bytes, self._most_at_once, self._body_s = app, most_bytes, most_at_once, body_s
        self._token = token.encode()
        self._in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        self._in_work += 1
        try:
            self._check(scope)
            await self._app(scope, self._bound(receive), answer.send)
        except HashdistError as error:
            await answer.error(error)
        except Exception as error:
            log.exception("%s", type(error).__name__)
            await answer.error(error)
        finally:
            self._in_work -= 1
            answer.done()

    def _check(self, scope: Scope) -> None:
        """Raises TooMany, Unauthorized, TooLarge."""
        word = _first_word(scope)
        headers = dict(scope["headers"])
        if self._in_work > self._most_at_once and word not in _QUIET:
            raise TooMany(f"this replica works on {self._most_at_once} requests at once; send it again later", 1.0)
        if self._token and word not in OPEN and word != _STATIC:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                raise Unauthorized("a bearer token is required: send the header `Authorization: Bearer TOKEN`")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > _DIGITS or int(length) > self._most_bytes):
            raise self._too_large(f"{length[:_DIGITS].decode()} bytes")

    def _bound(self, receive: Receive) -> Receive:
        """`receive` that raises TooLarge once more than the limit has come, whatever the headers said, or TooSlow."""
        came, until = 0, time.monotonic() + self._body_s
        coming = True

        async def bounded() -> Message:
            nonlocal came, coming
            if not coming:  # what comes now is that the client has gone
                return await receive()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise TooSlow(f"a body must come within {self._body_s:g} seconds; send a smaller picture") from None
            came += len(message.get("body", b""))
            coming = bool(message.get("more_body"))
            if came > self._most_bytes:
                raise self._too_large("more")
            return message

        return bounded

    def _too_large(self, found: str) -> TooLarge:
        return TooLarge(f"a body may have at most {self._most_bytes} bytes, found {found}; send a smaller picture")


class _Answer:
    """The answer to one request: its headers, its status, its line in the log."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        self._given = bool(given)
        self.request_id = given if _SANE_ID.fullmatch(given) else uuid4().hex
        self._scope, self._send, self._started = scope, send, time.perf_counter()
        self._status = 0
        self.noted: dict[str, Any] = {}
        scope["hashdist"] = self

    async def send(self, message: Message) -> None:
        """Send a message of the application on."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            own = [(b"x-content-type-options", b"nosniff")]
            if not self._given:
                own.append((b"x-request-id", self.request_id.encode()))
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await self._send(message)

    async def error(self, error: Exception) -> None:
        """Send an error, unless the answer has begun."""
        if self._status:
            return
        status, headers, body = failure(error, self.request_id)
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        raw += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})

    def done(self) -> None:
        """Count it and log it."""
        word = _first_word(self._scope)
        seconds = time.perf_counter() - self._started
        route = f"/{word}" if word in _ROUTES else "other"
        telemetry.REQUESTS.inc(route=route, status=str(self._status or 499))
        telemetry.REQUEST_SECONDS.observe(seconds, route=route)
        if word not in _QUIET:
            about = {"request": self.request_id, "route": route, "status": self._status, "ms": round(seconds * 1e3, 2)}
            log.info("%s %s", self._scope["method"], route, extra={**about, **self.noted})


def _first_word(scope: Scope) -> str:
    path: str = scope["path"]
    root = scope.get("root_path", "")
    return path.removeprefix(root).strip("/").partition("/")[0]


_STATUS = {
    "InvalidInput": 400,
    "Unauthorized": 401,
    "NotFound": 404,
    "TooSlow": 408,
    "AlreadyExists": 409,
    "TooLarge": 413,
    "TooMany": 503,
    "Busy": 429,
    "Unavailable": 503,
    "Conflict": 503,
    "Corrupt": 503,
}
"""HTTP status by kind of error: what the caller can mend is 4xx, what time mends is 503."""

_RETRY_S = 5


class Busy(TooMany):
    """The caller asks for more than its share: wait as long as the answer says."""


def failure(error: Exception, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and JSON body that say an error; one that was not raised on purpose says nothing of itself."""
    kind = type(error).__name__ if isinstance(error, HashdistError) else "InternalError"
    message = public(str(error)) if isinstance(error, HashdistError) else "the service failed; its log says why"
    status = _STATUS.get(kind, 500)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if status in (408, 413):  # the rest of the body is not read
        headers["Connection"] = "close"
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, round(getattr(error, "after_s", _RETRY_S))))
    return status, headers, error_body(kind, message, request_id)


_PLACES = re.compile(r"""[A-Za-z][\w+.-]*://[^\s'"`;,)]+|(?<![\w/.])/(?:[^\s'"`;:,/]+/)+[^\s'"`;:,)]*""")


def public(message: str) -> str:
    """A message without URIs and absolute paths: where things lie is for the log, not for callers."""
    return _PLACES.sub("...", message)


def error_body(kind: str, message: str, request_id: str) -> bytes:
    """The JSON of every error."""
    return json.dumps({"error": {"kind": kind, "message": message, "request_id": request_id}}).encode()
