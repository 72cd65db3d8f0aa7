"""A client that costs little, for benchmarks of a service: raw sockets, requests built before, one thread, no imports.

Reads one JSON object a line from stdin, and answers each with one on stdout:

- asked: {"port": of the loopback, "connections": N, "seconds": how long, or "count": of requests, "requests": texts}
- answered: {"latencies": seconds of every request, "seconds": all, "cpu_seconds": of this process, "failed": not 200}

Each connection is kept alive and has one request at a time, the next one of the list.
"""

import json
import selectors
import socket
import sys
import time
from itertools import cycle
from typing import Any


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(load(**json.loads(line))), flush=True)


def load(
    port: int, connections: int, requests: list[str], seconds: float = float("inf"), count: float = float("inf")
) -> dict[str, Any]:
    """Ask until the time is over or so many requests are answered."""
    texts = cycle([request.encode() for request in requests])
    latencies: list[float] = []
    failed, begun, busy = 0, 0, time.process_time()
    started = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for _ in range(connections):
            one = socket.create_connection(("127.0.0.1", port))
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.sendall(next(texts))
            begun += 1
            selector.register(one, selectors.EVENT_READ, [time.perf_counter(), b""])
        while selector.get_map():
            for key, _ in selector.select():
                one, state = key.fileobj, key.data
                assert isinstance(one, socket.socket)
                state[1] += one.recv(1 << 16)
                if not _whole(state[1]):
                    continue
                now = time.perf_counter()
                latencies.append(now - state[0])
                failed += not state[1].startswith(b"HTTP/1.1 200")
                if begun < count and now - started < seconds:
                    begun += 1
                    state[:] = time.perf_counter(), b""
                    one.sendall(next(texts))
                else:
                    selector.unregister(one)
                    one.close()
    return {
        "latencies": latencies,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
        "failed": failed,
    }


def _whole(data: bytes) -> bool:
    """Whether an answer with a Content-Length is there in full."""
    head, blank, body = data.partition(b"\r\n\r\n")
    if not blank:
        return False
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return len(body) >= int(length.partition(b":")[2])


if __name__ == "__main__":
    main()
