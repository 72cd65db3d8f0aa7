"""Stores and servers that misbehave on request: for tests of everything that commits."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs

from hashdist.ground.errors import AlreadyExists, OutcomeUnknown, Unavailable
from hashdist.store.base import Contended, Entry, Exists, Store

CREATE_FAULTS = ("ok", "lost", "twice", "late", "contended", "away")
"""What can happen to a conditional create: carried out and said so; carried out, the answer lost; carried out twice,
the second one's answer seen; not carried out yet, but later, the caller left in the dark; refused because of a
competing request; refused because the server is away."""


class Crash(BaseException):
    """The process dies here: nothing of its own may run any more."""


class FaultyStore(Store):
    """A store whose creates and reads go wrong as a script says; everything else passes through.

    Args:
        inner: the store that works.
        creates: the fate of each create, one of CREATE_FAULTS or "crash" (before) or "crash-after"; "ok" at the end.
        reads: of each get, "ok" or "away".
        puts: of each put, "ok", "lost", "late", "twice" or "away", as for creates.
        calls: called with the name of every operation before it happens.
    """

    def __init__(
        self,
        inner: Store,
        creates: list[str] | None = None,
        reads: list[str] | None = None,
        calls: Callable[[str], None] = lambda name: None,
        puts: list[str] | None = None,
    ) -> None:
        self.inner, self.uri = inner, inner.uri
        self.creates, self.reads, self.calls, self.puts = creates or [], reads or [], calls, puts or []
        self.late: list[tuple[Store, str, bytes, str]] = []

    def child(self, path: str) -> Store:
        child = FaultyStore(self.inner.child(path), calls=self.calls)
        child.creates, child.reads, child.puts, child.late = self.creates, self.reads, self.puts, self.late
        return child

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self.calls("get")
        if self.reads and self.reads.pop(0) == "away":
            raise Unavailable("no answer to a read")
        return self.inner.get(name, start, length)

    def create(self, name: str, data: bytes, write_id: str) -> None:
        self.calls("create")
        fate = self.creates.pop(0) if self.creates else "ok"
        if fate == "crash":
            raise Crash
        if fate == "contended":
            raise Contended("a competing request")
        if fate == "away":
            raise Unavailable("503")
        if fate == "late":
            self.late.append((self.inner, name, data, write_id))
            raise OutcomeUnknown("timed out on its way")
        try:
            self.inner.create(name, data, write_id)
        except Exists:
            if fate == "lost":
                raise OutcomeUnknown("refused, and the answer lost") from None
            raise
        if fate == "twice":
            self.inner.create(name, data, write_id)
        if fate == "lost":
            raise OutcomeUnknown("carried out, and the answer lost")
        if fate == "crash-after":
            raise Crash

    def land(self) -> None:
        """Requests that were on their way arrive now."""
        while self.late:
            store, name, data, write_id = self.late.pop(0)
            with suppress(Exists):
                store.create(name, data, write_id) if write_id else store.put(name, data)

    def put(self, name: str, data: bytes | memoryview) -> None:
        self.calls("put")
        fate = self.puts.pop(0) if self.puts else "ok"
        if fate == "away":
            raise Unavailable("503")
        if fate == "late":
            self.late.append((self.inner, name, bytes(data), ""))
            raise OutcomeUnknown("timed out on its way")
        self.inner.put(name, data)
        if fate == "twice":
            with suppress(AlreadyExists):  # a local store refuses it, S3 writes the same bytes again
                self.inner.put(name, data)
        if fate == "lost":
            raise OutcomeUnknown("carried out, and the answer lost")

    def put_file(self, name: str, path: Path) -> None:
        self.calls("put_file")
        self.inner.put_file(name, path)

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[Entry]:
        self.calls("list")
        return self.inner.list(prefix, start_after)

    def exists(self, name: str) -> bool:
        self.calls("exists")
        return self.inner.exists(name)

    def delete(self, name: str) -> None:
        self.calls("delete")
        self.inner.delete(name)

    def filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        return self.inner.filesystem()

    def local_path(self, name: str) -> Path | None:
        return self.inner.local_path(name)

    def proof_scope(self) -> str | None:
        return self.inner.proof_scope()


class FaultyProxy:
    """An HTTP server in front of an S3 server, on the loopback; conditional PUTs go wrong as a script says.

    Fates: "ok"; "cut" (carried out, the connection closed without an answer); "twice"; "409"; "503" (not carried
    out); "503-after" (carried out, then 503); "ignore" (the condition is dropped on its way). The next `cut_gets`
    answers to GETs break off in the middle. While `away`, every connection is closed without an answer.
    """

    def __init__(self, upstream: str, fates: list[str] | None = None) -> None:
        self.fates = fates or []
        self.always = "ok"
        self.cut_gets = 0
        self.away = False
        self.conditional_puts = 0
        address = urlsplit(upstream).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def handle_any(self) -> None:
                proxy.handle(self, address)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

        proxy = self
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handle(self, request: BaseHTTPRequestHandler, address: str) -> None:
        """Forward one request, or do to it what the script says."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if self.away:
            request.close_connection = True
            return
        headers = dict(request.headers.items())
        fate = "ok"
        if request.command == "PUT" and "If-None-Match" in headers:
            self.conditional_puts += 1
            fate = self.fates.pop(0) if self.fates else self.always
        if fate in ("409", "503"):
            code = {"409": "ConditionalRequestConflict", "503": "ServiceUnavailable"}[fate]
            self._answer(request, int(fate), {}, f"<Error><Code>{code}</Code></Error>".encode())
            return
        if fate == "ignore":
            headers = {name: value for name, value in headers.items() if name != "If-None-Match"}
        for _ in range(2 if fate == "twice" else 1):
            answer = self._forward(request, address, headers, body)
        if request.command == "GET" and self.cut_gets and len(answer[2]) > 1:
            self.cut_gets -= 1
            request.close_connection = True
            self._answer(request, *answer, cut=True)
        elif fate == "cut":
            request.close_connection = True
        elif fate == "503-after":
            self._answer(request, 503, {}, b"<Error><Code>ServiceUnavailable</Code></Error>")
        else:
            self._answer(request, *answer)

    @staticmethod
    def _forward(
        request: BaseHTTPRequestHandler, address: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(address, timeout=30)
        try:
            connection.request(request.command, request.path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    @staticmethod
    def _answer(
        request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, cut: bool = False
    ) -> None:
        dropped = {"connection", "transfer-encoding", "date", "server"}
        request.send_response(status)
        for name, value in headers.items():
            if name.lower() not in dropped and not (name.lower() == "content-length" and request.command != "HEAD"):
                request.send_header(name, value)
        if request.command != "HEAD":
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[: len(body) // 2] if cut else body)
