"""What stands around every request: sizes, times, ids, the token; and what errors say to strangers."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from hashdist.ground.errors import Corrupt, InvalidInput, Unavailable
from hashdist.ground.progress import plain
from hashdist.service import limits
from hashdist.service.api import share
from hashdist.service.limits import Border, Bucket

Sent = list[dict[str, Any]]


def asked(border: Border, headers: dict[str, str], receive: Any, path: str = "/search") -> tuple[int, dict[str, str]]:
    sent: Sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": raw}
    asyncio.run(border(scope, receive, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


async def reads_all(_scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the body to its end and answers 200."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def pieces(size: int, wait_s: float = 0) -> tuple[Callable[[], Awaitable[dict[str, Any]]], list[int]]:
    """A body without end, in pieces; and how many bytes of it were taken."""
    taken = [0]

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(wait_s)
        taken[0] += size
        return {"type": "http.request", "body": b"x" * size, "more_body": True}

    return receive, taken


def border(**settings: Any) -> Border:
    return Border(reads_all, **{"most_bytes": 1000, "most_at_once": 4, **settings})


def test_a_body_without_end_is_refused_and_not_read_on() -> None:
    receive, taken = pieces(100)
    status, headers = asked(border(), {}, receive)
    assert (status, headers["connection"], taken[0]) == (413, "close", 1100)


@pytest.mark.parametrize("length", ["1001", "9" * 18, "9" * 5000])
def test_a_body_that_says_it_is_too_large_is_not_read_at_all(length: str) -> None:
    receive, taken = pieces(100)
    assert asked(border(), {"Content-Length": length}, receive)[0] == 413
    assert taken[0] == 0


def test_who_sends_slowly_is_sent_away() -> None:
    receive, taken = pieces(1, wait_s=0.02)
    started = time.monotonic()
    status, headers = asked(border(body_s=0.1), {}, receive)
    assert (status, headers["connection"]) == (408, "close")
    assert time.monotonic() - started < 5
    assert taken[0] <= 10


def test_the_wait_for_a_client_to_leave_has_no_end() -> None:
    """A body that is complete is not late, however long its answer takes."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def waits(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.sleep(0.1)
        await receive()
        await send({"type": "http.response.start", "status": 204, "headers": []})

    assert asked(Border(waits, most_bytes=1, most_at_once=1, body_s=0.05), {}, receive)[0] == 204


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer other",
        "Bearer TOKEN",
        "Basic token",
        "token",
        "Bearer token x",
        "Bearer t\xf6ken",
    ],
)
def test_without_the_token_nothing_is_answered(given: str) -> None:
    receive, taken = pieces(100)
    status, headers = asked(border(token="token"), {"Authorization": given} if given else {}, receive)
    assert (status, headers["www-authenticate"], taken[0]) == (401, "Bearer", 0)


@pytest.mark.parametrize("given", ["Bearer token", "bearer token", "BEARER  token "])
def test_with_the_token_it_is(given: str) -> None:
    assert asked(border(token="token"), {"Authorization": given}, pieces(100)[0])[0] == 413


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return False

    monkeypatch.setattr(limits.hmac, "compare_digest", compare)
    assert asked(border(token="token"), {"Authorization": "Bearer token"}, pieces(1)[0])[0] == 401
    assert compared == [(b"token", b"token")]


@pytest.mark.parametrize(
    "path", ["/search", "//search", "/pictures/a", "/version", "/Search", "/docsx", "/metricsx/.."]
)
def test_no_spelling_of_a_path_gets_around_the_token(path: str) -> None:
    assert asked(border(token="token"), {}, pieces(1)[0], path)[0] == 401


@pytest.mark.parametrize("given", ["a b", "a\tb", "x" * 129, 'a"b', "a\x1b[31m", "{}", "\xe9"])
def test_an_id_that_is_not_sane_is_replaced(given: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve"):
        asked(border(), {"X-Request-ID": given}, pieces(1000)[0])
    (record,) = caplog.records
    assert len(record.__dict__["request"]) == 32
    assert given not in str(record.__dict__)


def test_what_is_logged_is_one_line_without_the_callers_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve"):
        asked(border(token="token"), {"Authorization": "Bearer secret"}, pieces(1)[0], "/x\nFORGED")
        asked(border(), {"X-Request-ID": "mine-1"}, pieces(1000)[0], "/search")
    assert [record.getMessage() for record in caplog.records] == ["POST other", "POST /search"]
    assert "secret" not in str([record.__dict__ for record in caplog.records])
    assert caplog.records[1].__dict__["request"] == "mine-1"


@pytest.mark.parametrize(
    "error",
    [
        Unavailable(
            's3://bucket/root/x: the S3 endpoint cannot be reached: Could not connect to "http://minio:9000/b"'
        ),
        Corrupt("/srv/root/shards/1.bin does not match its checksum; restore it"),
        InvalidInput("file:///srv/root/models/1 was trained on features from outside"),
    ],
)
def test_errors_name_no_place(error: Exception) -> None:
    said = limits.failure(error, "id")[2].decode()
    assert not any(word in said for word in ("srv", "bucket", "minio", "root"))


def test_an_error_that_was_not_foreseen_says_nothing_of_itself() -> None:
    status, _, body = limits.failure(KeyError("/srv/secret"), "id")
    assert status == 500
    assert b"secret" not in body


def test_other_words_stay() -> None:
    said = "k may be at most 10 here, found 11; and/or `label in 3,5` a/b/c.png"
    assert limits.public(said) == said


def test_decoding_has_a_rate() -> None:
    now = [0.0]
    bucket = Bucket(10, clock=lambda: now[0])
    assert [bucket.wait_s() for _ in range(20)] == [0.0] * 20
    assert bucket.wait_s() == pytest.approx(0.1)
    now[0] += 0.1
    assert [bucket.wait_s() > 0 for _ in range(2)] == [False, True]


def test_all_who_ask_share_one_scrape() -> None:
    made = []

    def scrape() -> str:
        made.append(1)
        time.sleep(0.05)
        return "text"

    async def ask() -> list[str]:
        scraped = share(scrape)
        found = await asyncio.gather(*(scraped() for _ in range(20)))
        return [*found, await scraped()]

    assert asyncio.run(ask()) == ["text"] * 21
    assert len(made) == 2


def test_a_line_is_one_plain_line() -> None:
    assert plain("a\nb\r\x1b[2Jc\u2028\udcff ü") == "a\\nb\\r\\x1b[2Jc\\u2028\\udcff ü"
