"""The search service as a user starts it: `hashdist serve`, in processes of its own, asked over HTTP."""

import io
import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from PIL import Image

from tests.worlds.service import ODD_KEY, Service, ServiceWorld, ask, blocks, serving

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ServiceWorld:
    made = ServiceWorld(tmp_path_factory.mktemp("world"))
    made.add(10)  # a second shard
    return made


@pytest.fixture(scope="module")
def service(world: ServiceWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two replicas whose shards are spread over two processes, and an encoder."""
    settings = {"replicas": 2, "spread": 2, "cpus": 0.5, "max_k": 50, "max_body_mb": 0.2, "uris": True}
    with serving(world, tmp_path_factory.mktemp("service"), **settings) as running:
        yield running


def form(url: str, picture: bytes, token: str = "", **fields: str) -> tuple[int, Any]:
    """POST a picture and fields as a form."""
    mark = "----hashdist"
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode() for n, v in fields.items()
    ]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="q.png"\r\n\r\n'.encode()
    body = b"".join([*parts, head, picture, f"\r\n--{mark}--\r\n".encode()])
    return post(f"{url}/search", body, f"multipart/form-data; boundary={mark}", token)


def post(url: str, body: bytes, kind: str, token: str = "") -> tuple[int, Any]:
    headers = {"Content-Type": kind, **({"Authorization": f"Bearer {token}"} if token else {})}
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def expected(
    world: ServiceWorld, version: int, code: Any, k: int, where: str | None = None
) -> list[tuple[str, str, int]]:
    hits = world.at(version).search(code[None], k, where)
    rows = zip(hits.keys()[0], hits.ids[0].tolist(), hits.distances[0].tolist(), strict=True)
    return [(key, str(id_), distance) for key, id_, distance in rows]


def hits_of(answer: dict[str, Any]) -> list[tuple[str, str, int]]:
    return [(hit["key"], hit["id"], hit["distance"]) for hit in answer["hits"]]


def test_keys_codes_and_pictures_are_answered_as_the_index_answers(world: ServiceWorld, service: Service) -> None:
    version = world.index.version
    service.wait(version)
    for key in (ODD_KEY, *world.keys()[:5]):
        code = world.at(version).codes_of([key])[0]
        status, answer = service.get(f"search?{urlencode({'key': key, 'k': 7})}")
        assert status == 200
        assert hits_of(answer) == expected(world, version, code, 7)
        assert (answer["version"], answer["model"], answer["bits"]) == (version, world.current.digest, 64)
        assert answer["code"] == code.tobytes().hex()
        assert answer["query"] == {"key": key}
        assert set(answer["timings_ms"]) == {"encode", "search", "keys", "total"}
        assert answer["hits"][0]["uri"] == f"{world.images.as_uri()}/{answer['hits'][0]['key']}"
    code = np.random.default_rng(0).integers(0, 256, 8, np.uint8)
    body = {"code": code.tobytes().hex(), "k": 20, "where": "label in 1,2"}
    status, answer = post(f"{service.url}/search", json.dumps(body).encode(), "application/json")
    assert (status, hits_of(answer)) == (200, expected(world, version, code, 20, "label in 1,2"))
    stranger = blocks(99_999, 24)
    status, answer = form(service.url, stranger, k="9")
    assert status == 200
    assert answer["query"] == {"image": {"width": 24, "height": 24, "bytes": len(stranger)}}
    assert answer["code"] == world.current.encode([stranger])[0].tobytes().hex()
    assert hits_of(answer) == expected(world, version, world.current.encode([stranger])[0], 9)


def test_a_radius_keeps_what_is_near_and_says_where_it_was_cut(world: ServiceWorld, service: Service) -> None:
    version = world.index.version
    key = world.keys()[3]
    every = expected(world, version, world.at(version).codes_of([key])[0], 50)
    radius = every[20][2]
    _, answer = service.get(f"search?{urlencode({'key': key, 'radius': radius})}")
    near = [hit for hit in every if hit[2] <= radius]
    assert (hits_of(answer), answer["truncated"]) == (near, False)
    _, answer = service.get(f"search?{urlencode({'key': key, 'radius': radius, 'k': 5})}")
    assert (hits_of(answer), answer["truncated"]) == (near[:5], True)
    _, answer = service.get(f"search?{urlencode({'key': key, 'k': 5, 'exclude_self': 'true'})}")
    assert hits_of(answer) == [hit for hit in every if hit[0] != key][:5]


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("search", 400, "one of key, code or image is required, found none"),
        ("search?key=a&code=00", 400, "found key and code"),
        ("search?code=00ff", 400, "codes of 64 bits, found 16"),
        ("search?code=hello", 400, "hexadecimal"),
        ("search?key=nothing.png", 404, "no image of that key"),
        ("search?code=0000000000000000&k=51", 400, "at most 50"),
        ("search?code=0000000000000000&k=0", 400, "greater than or equal to 1"),
        ("search?code=0000000000000000&colour=red", 400, "colour"),
        ("search?code=0000000000000000&version=999", 404, "no version 999"),
        ("search?code=0000000000000000&version=first", 404, "no tag 'first'"),
        ("search?code=0000000000000000&where=nothing+>+3", 400, "nothing"),
        ("pictures/nothing.png", 404, "no image of that key"),
        ("pictures/..%2f..%2fetc%2fpasswd", 404, "no image of that key"),
        ("nowhere", 404, "Not Found"),
    ],
)
def test_what_cannot_be_answered_says_what_to_do(service: Service, path: str, status: int, said: str) -> None:
    found, answer = service.get(path)
    assert found == status
    assert said in answer["error"]["message"]
    assert answer["error"]["request_id"]


def test_bodies_have_limits_and_kinds(service: Service) -> None:
    assert form(service.url, b"\0" * 300_000)[0] == 413
    assert form(service.url, b"no picture")[0] == 400
    status, answer = post(f"{service.url}/search", b"{}", "text/plain")
    assert (status, answer["error"]["kind"]) == (415, "UnsupportedMediaType")
    status, answer = post(f"{service.url}/search", b'{"key": 3', "application/json")
    assert (status, answer["error"]["kind"]) == (400, "InvalidInput")


def test_pictures_come_by_key_and_small(world: ServiceWorld, service: Service) -> None:
    with urllib.request.urlopen(f"{service.url}/pictures/{quote(ODD_KEY)}?size=16", timeout=60) as answer:
        assert answer.headers["Content-Type"] == "image/jpeg"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.read()[:3] == b"\xff\xd8\xff"
        tag = answer.headers["ETag"]
    again = urllib.request.Request(f"{service.url}/pictures/{quote(ODD_KEY)}?size=16", headers={"If-None-Match": tag})
    statuses = set()
    for _ in range(40):  # a replica that has made it before says that it has not changed
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(again, timeout=60) as answer:
            statuses.add(answer.status)
            continue
        statuses.add(304)
        break
    assert 304 in statuses
    assert service.get(f"pictures/{quote(ODD_KEY)}?size=5000")[0] == 400


def test_older_versions_answer_when_they_are_named(world: ServiceWorld, service: Service) -> None:
    code = np.zeros(8, np.uint8)
    _, answer = service.get(f"search?code={'00' * 8}&k=50&version=2")
    assert (answer["version"], hits_of(answer)) == (2, expected(world, 2, code, 50))


def test_a_new_version_and_a_new_model_are_served_and_their_metrics_exported(
    world: ServiceWorld, service: Service
) -> None:
    for change in (world.add, world.switch_model):
        version = change()
        service.wait(version)
        key = world.keys()[0]
        picture = world.picture(key)
        until = time.monotonic() + 60
        while (answer := form(service.url, picture, k="1")[1])["version"] != version:  # the other replica
            assert time.monotonic() < until
        assert answer["code"] == world.current.encode([picture])[0].tobytes().hex()
        assert answer["model"] == world.current.digest
        assert answer["hits"][0]["distance"] == 0
    until = time.monotonic() + 60
    while "ray_hashdist_service_version{" not in (text := service.get("metrics")[1]):
        assert time.monotonic() < until
    assert "ray_hashdist_service_requests_total{" in text
    assert 'route="/search"' in text


def test_the_page_and_the_description_load_nothing_from_outside(service: Service) -> None:
    for path in ("", "page.js", "page.css", "docs", "openapi.json"):
        status, text = service.get(path)
        assert status == 200
        assert "//cdn" not in str(text)
    assert set(service.get("openapi.json")[1]["paths"]) >= {"/search", "/version", "/healthz", "/readyz", "/metrics"}


def test_requests_that_have_begun_are_answered_when_it_is_stopped(world: ServiceWorld, tmp_path: Path) -> None:
    """And a token is asked for where one is set; both with one start."""
    token = {"HASHDIST_TOKEN": "open sesame"}
    large = io.BytesIO()
    Image.new("RGB", (7000, 7000), (10, 200, 30)).save(large, "PNG")  # a while to decode
    with ThreadPoolExecutor(3) as pool:
        with serving(world, tmp_path, environment=token) as service:
            url = f"{service.url}/search?code={'00' * 8}&k=3"
            assert ask(url)[0] == 401
            assert ask(url, Authorization="Bearer open")[0] == 401
            assert ask(url, Authorization="Bearer open sesame")[0] == 200
            assert ask(f"{service.url}/readyz")[0] == 200
            begun = [pool.submit(form, service.url, large.getvalue(), "open sesame") for _ in range(3)]
            time.sleep(0.5)
            assert not any(one.done() for one in begun)
        assert [one.result()[0] for one in begun] == [200] * 3
    assert "open sesame" not in service.log.read_text(errors="replace")
