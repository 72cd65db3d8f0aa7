"""What strangers may send, and what lies in buckets: docs/security.md says what bounds each; here it is tried.

The service's routes over a real index, collection and store, without Ray; every file that is opened and every
connection that is made meanwhile is watched by Python's own audit events.
"""

import asyncio
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hashdist.collection.decode import BadImage, claimed_pixels, decode
from hashdist.collection.readers.reader import Lost, Unit
from hashdist.collection.readers.tar import TarReader
from hashdist.collection.vectors import list_source, plan
from hashdist.commands.pictures import picture_tag
from hashdist.ground.errors import Corrupt, InvalidInput
from hashdist.ground.settings import CollectionSettings, ServiceSettings
from hashdist.index import create_index
from hashdist.index.shards.shard import map_npy
from hashdist.models.networks import Preprocess, read_weights
from hashdist.service import api
from hashdist.service.api import Backend, EncodedImage, make_app
from hashdist.service.batching import Batches
from hashdist.service.limits import Border
from hashdist.service.serving import Serving
from hashdist.store import cache, open_store
from tests.worlds import bombs
from tests.worlds import reindex as growth_world
from tests.worlds.service import commit_collection

TOKEN = "s3cret-token"
SECRET = growth_world.png(99, side=40)
"""A picture outside the collection."""

WICKED = [
    "../secret.png",
    "../../secret.png",
    "/etc/passwd",
    "//host/x.png",
    "a/../../secret.png",
    "./x.png",
    "a\nb.png",
    "\x1b[31m.png",
    "..\\secret.png",
    "<script>alert(1)</script>.png",
    "http://127.0.0.1:9/x.png",
    "nul\0.png",
]
"""Keys that an index may have, since a parquet file or a tar may give an image any name."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def message(self) -> str:
        return str(json.loads(self.body)["error"]["message"])


class Watched:
    """Files opened and connections made while `watch` is on."""

    def __init__(self) -> None:
        self.on = False
        self.opened: list[str] = []
        self.connected: list[Any] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            self.opened.append(os.fsdecode(arguments[0]))
        elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
            self.connected.append(arguments)

    def outside(self, site: "Site") -> list[str]:
        """What was opened that no request may reach."""
        places = [os.path.realpath(path) for path in self.opened]
        return [place for place in places if place.startswith("/etc/") or place == str(site.folder / "secret.png")]


class Site:
    """The service over an index whose keys are some pictures of a folder, and WICKED."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"
        growth_world.write(self.images, {f"a/{i}.png": growth_world.png(i) for i in range(12)})
        (folder / "secret.png").write_bytes(SECRET)
        root = str(folder / "root")
        collection = commit_collection(root, self.images).uri
        index = create_index(f"{root}/index", 16, growth_world.committed_model(root, 16).uri)
        self.keys = [f"a/{i}.png" for i in range(12)] + WICKED
        codes = np.random.default_rng(0).integers(0, 256, (len(self.keys), 2), np.uint8)
        columns = pa.table({"labels": [[i % 3] for i in range(len(self.keys))], "taken": range(len(self.keys))})
        index.apply(codes, self.keys, columns, model=index.model, operation="build", lineage={"collection": collection})
        self.serving = Serving(
            index.uri, refresh_s=600, held_versions=1, prepare=lambda _: {"reads_images": True, "reason": ""}
        )
        self.serving.start()
        self._runner = asyncio.Runner()
        self.settings = ServiceSettings(max_body_mb=0.2, max_pixels=1_000_000, images_per_s=1e6)
        self.app = self.with_token("")
        until = time.monotonic() + 60
        while self.serving.state()[0] != "ready":
            assert time.monotonic() < until, self.serving.state()
            time.sleep(0.02)

    def with_token(self, token: str) -> Border:
        batches = Batches(1, time.perf_counter)
        return make_app(Backend(self.serving, batches, self._encode, lambda: "# metrics\n", self.settings), token)

    def close(self) -> None:
        self.serving.close()
        self._runner.close()

    async def _encode(self, _uri: str, data: bytes) -> EncodedImage:
        try:
            pixels = decode(data, self.settings.max_pixels)
        except BadImage as error:
            raise InvalidInput(f"the picture cannot be read: {error.reason}") from error
        return EncodedImage(np.zeros(2, np.uint8), pixels.shape[1], pixels.shape[0])

    def ask(
        self, method: str, url: str, kind: str = "", body: bytes = b"", app: Border | None = None, **headers: str
    ) -> Answer:
        """As a server hands a request to an ASGI application."""
        return self._runner.run(self._asked(method, url, kind, body, app, headers))

    def together(self, bodies: list[Any]) -> list[Answer]:
        """Searches at the same time."""

        async def all_of_them() -> list[Answer]:
            asked = [
                self._asked("POST", "/search", "application/json", json.dumps(b).encode(), None, {}) for b in bodies
            ]
            return list(await asyncio.gather(*asked))

        return self._runner.run(all_of_them())

    async def _asked(
        self, method: str, url: str, kind: str, body: bytes, app: Border | None, headers: dict[str, str]
    ) -> Answer:
        path, _, query = url.partition("?")
        raw = [(name.lower().replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
        raw += [(b"content-type", kind.encode("latin-1"))] if kind else []
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": raw,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await (app or self.app)(scope, receive, send)
        found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))

    def search(self, body: Any) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", "/search", "application/json", data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


def refused(answer: Answer, *statuses: int) -> None:
    """A JSON error of one of these kinds."""
    assert answer.status in statuses, answer
    assert set(json.loads(answer.body)["error"]) == {"kind", "message", "request_id"}


# Paths


TRAVERSALS = [
    "/pictures/../secret.png",
    "/pictures/..%2fsecret.png",
    "/pictures/%2e%2e/secret.png",
    "/pictures/a/..%2f..%2fsecret.png",
    "/pictures//etc/passwd",
    "/pictures/%2fetc%2fpasswd",
    "/pictures/..%5csecret.png",
    "/pictures/....//secret.png",
    "/pictures/a%2f0.png%00.jpg",
    "/pictures/%00",
    "/pictures/file:///etc/passwd",
    "/pictures/s3:%2f%2fbucket%2fkey",
    "/pictures/http:%2f%2f127.0.0.1:9%2fx.png",
    "/pictures/",
    "/static-offline-docs/../../../../../etc/passwd",
    "/static-offline-docs/%2e%2e%2f%2e%2e%2fetc/passwd",
    "/../../etc/passwd",
    "/page.js/../../app.py",
    "/docs/../search",
]


@pytest.mark.parametrize("url", TRAVERSALS)
def test_no_path_leads_out(site: Site, watched: Watched, url: str) -> None:
    """Nothing is opened that is not the collection's, the index's or the program's own."""
    watched.opened.clear()
    watched.on = True
    answer = site.ask("GET", url)
    watched.on = False
    refused(answer, 400, 404, 405)
    assert not watched.outside(site)
    assert str(site.folder) not in answer.body.decode()


@pytest.mark.parametrize("key", WICKED)
def test_keys_that_look_like_paths_are_only_keys(site: Site, watched: Watched, key: str) -> None:
    """They are found like others; their picture's URL stays below pictures/; there is no such picture."""
    watched.opened.clear()
    watched.on = True
    answer = site.search({"key": key, "k": 1})
    (hit,) = json.loads(answer.body)["hits"]
    picture = site.ask("GET", "/" + hit["picture"])
    watched.on = False
    assert (answer.status, hit["key"]) == (200, key)
    assert urljoin("http://host/photos/", hit["picture"]).startswith("http://host/photos/pictures/")
    assert not {".", ".."} & set(hit["picture"].split("/"))
    refused(picture, 404)
    assert not watched.outside(site)


def test_a_picture_is_drawn_anew(site: Site) -> None:
    """Nothing of a stored file reaches a browser: no EXIF, no bytes behind the picture."""
    from PIL import Image

    sink, exif = io.BytesIO(), Image.Exif()
    exif[0x010E] = "WHERE I LIVE"
    Image.new("RGB", (64, 64), "red").save(sink, "JPEG", exif=exif)
    path = site.images / "a" / "new.jpg"
    path.write_bytes(sink.getvalue() + b"<script>alert(1)</script>")
    data = site.serving.now.pictures.fetch(["a/new.jpg"])["a/new.jpg"]  # type: ignore[union-attr]
    assert b"WHERE I LIVE" in data
    shown = site.ask("GET", "/pictures/a/0.png?size=16")
    assert (shown.status, shown.headers["content-type"], shown.headers["x-content-type-options"]) == (
        200,
        "image/jpeg",
        "nosniff",
    )
    path.unlink()


def test_no_url_of_the_caller_is_fetched(site: Site, watched: Watched) -> None:
    url = "http://127.0.0.1:9/latest/meta-data"
    form = f'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n{url}\r\n--b--\r\n'.encode()
    watched.connected.clear()
    watched.on = True
    answers = [
        site.search({"key": url}),
        site.search({"code": url}),
        site.search({"code": "0000", "where": f'key == "{url}"'}),
        site.search({"code": "0000", "version": url}),
        site.search({"url": url}),
        site.ask("POST", "/search", "multipart/form-data; boundary=b", form),
        site.ask("GET", f"/search?key={url}"),
        site.ask("GET", f"/pictures/{url}"),
    ]
    watched.on = False
    assert {answer.status for answer in answers} <= {200, 400, 404}
    assert watched.connected == []


# Bodies


BODIES = [
    b"",
    b"null",
    b'"x"',
    b"[]",
    b"{",
    b"\xff\xfe{}",
    b'{"code": "0000", "k": NaN}',
    b'{"code": "0000", "k": 1e999}',
    b'{"code": "0000", "k": -1}',
    b'{"code": "0000", "k": 0}',
    b'{"code": "0000", "k": 1001}',
    b'{"code": "0000", "k": 99999999999999999999999999}',
    b'{"code": "0000", "radius": 8193}',
    b'{"code": "0000", "radius": -1}',
    b'{"code": "0000", "unknown": 1}',
    b'{"code": ' + b"[" * 100_000,
    b'{"a":' * 30_000,
    b'{"code": "' + b"0" * 2_000 + b'"}',
    b'{"code": "00"}',
    b'{"code": "zz"}',
    b'{"key": "' + b"k" * 5_000 + b'"}',
    b'{"key": ""}',
    b'{"key": "\\ud800"}',
    b'{"key": "a", "code": "0000"}',
    b'{"code": "0000", "exclude_self": true}',
    b'{"code": "0000", "version": "' + b"9" * 5_000 + b'"}',
    b'{"code": "0000", "version": ' + b"9" * 5_000 + b"}",
    b'{"code": "0000", "version": -1}',
    b'{"code": "0000", "version": [1]}',
    b'{"code": "0000", "where": "' + b"a" * 5_000 + b'"}',
    b'{"code": "0000", "where": "id in 99999999999999999999"}',
    b'{"code": "0000", "where": "taken > 99999999999999999999"}',
    b'{"code": "0000", "where": "labels in 99999999999999999999"}',
    b'{"code": "0000", "where": "taken > \'x\'"}',
    b'{"code": "0000", "where": "((((((((((taken"}',
    b'{"code": "0000", "where": "taken == 1 and ' + b"taken == 1 and " * 200 + b'taken == 1"}',
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_no_question_is_400(site: Site, body: bytes) -> None:
    answer = site.search(body)
    refused(answer, 400)
    assert len(answer.body) < 6000, "an error does not send back what was sent"


@pytest.mark.parametrize(
    "version", ["9" * 30, "latest", "..", "v1'; --", "１２", "1e3", "-1", "0x1", " 1", "\u0000", "² "]
)
def test_versions_that_are_none_are_not_found(site: Site, version: str) -> None:
    refused(site.search({"code": "0000", "version": version}), 404)


def test_few_older_versions_are_opened_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_wanted: int | str) -> Any:
        time.sleep(0.5)
        return site.serving.now

    monkeypatch.setattr(api, "_WAIT_S", 0.05)
    monkeypatch.setattr(site.serving, "at", slow)
    answers = site.together([{"code": "0000", "version": f"v{number}"} for number in range(5)])
    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429]
    assert {answer.headers.get("retry-after") for answer in answers} == {None, "1"}


def test_a_filter_of_many_values_costs_one_look(site: Site) -> None:
    asked = {"code": "0000", "where": "taken in " + ",".join(map(str, range(1000)))}
    started = time.process_time()
    answer = site.search(asked)
    assert (answer.status, len(json.loads(answer.body)["hits"])) == (200, 10)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "image/png", "\xff", "a" * 999]
)
def test_another_kind_of_body_is_415(site: Site, kind: str) -> None:
    refused(site.ask("POST", "/search", kind, b"{}"), 415)


def part(disposition: str, content: bytes, *more: str) -> bytes:
    lines = [f"Content-Disposition: form-data; {disposition}", *more]
    return b"--b\r\n" + "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content + b"\r\n"


PNG = growth_world.png(1)
FORMS = [
    b"",
    b"--b",
    b"--b\r\n",
    b"--b--\r\n",
    b"x" * 1000,
    b"\r\n" * 10_000,
    part('name="image"; filename="x"', PNG)[:-20],
    part('filename="x"', PNG) + b"--b--\r\n",
    part("name", PNG) + b"--b--\r\n",
    part('name="image"; filename="x"', b"") + b"--b--\r\n",
    part('name="image"; filename="x"', b"no picture") + b"--b--\r\n",
    part('name="other"; filename="x"', PNG) + b"--b--\r\n",
    part('name="image"', PNG) + b"--b--\r\n",
    part('name="image"; filename="x"', PNG) * 2 + b"--b--\r\n",
    part('name="image"; filename="x"', PNG) + part('name="key"', b"a/0.png") + b"--b--\r\n",
    b"".join(part(f'name="f{i}"', b"1") for i in range(100)) + b"--b--\r\n",
    part('name="k"', b"x") + b"--b--\r\n",
    part('name="key"', b"\\ud800") + b"--b--\r\n",
    b"--b\r\n" + b"a: b\r\n" * 10_000 + b"\r\nx\r\n--b--\r\n",
    b"--b\r\n: \r\n\r\nx\r\n--b--\r\n",
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="\xff\x00../../x"\r\n\r\nx\r\n--b--\r\n',
]


@pytest.mark.parametrize(
    "kind", ["boundary=b", "boundary=b; charset=unicode_escape", "boundary=", "x=y", "boundary=\xff"]
)
def test_a_form_that_is_none_is_400(site: Site, kind: str) -> None:
    for body in FORMS:
        refused(site.ask("POST", "/search", f"multipart/form-data; {kind}", body), 400, 404)


def test_a_picture_under_any_file_name_is_only_bytes(site: Site, watched: Watched) -> None:
    body = part('name="image"; filename="../../etc/passwd"', PNG, "Content-Type: text/html") + b"--b--\r\n"
    watched.opened.clear()
    watched.on = True
    answer = site.ask("POST", "/search", "multipart/form-data; boundary=b", body)
    watched.on = False
    assert (answer.status, json.loads(answer.body)["query"]["image"]["width"]) == (200, 8)
    assert not [path for path in watched.opened if "passwd" in path]


def test_a_large_body_is_413(site: Site) -> None:
    body = b'{"key": "' + b"k" * 300_000 + b'"}'
    refused(site.search(body), 413)
    form = part('name="image"; filename="x"', b"x" * 300_000) + b"--b--\r\n"
    refused(site.ask("POST", "/search", "multipart/form-data; boundary=b", form), 413)


def test_errors_and_the_page_tell_no_secret(site: Site) -> None:
    guarded = site.with_token(TOKEN)
    for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
        answer = site.ask("GET", path, app=guarded)
        assert answer.status == 200, path
        assert TOKEN not in answer.body.decode()
        assert str(site.folder) not in answer.body.decode()
    for path in ("/search?key=a/0.png", "/pictures/a/0.png", "/version"):
        refused(site.ask("GET", path, app=guarded), 401)
        refused(site.ask("GET", path, app=guarded, authorization=f"Basic {TOKEN}"), 401)
        assert site.ask("GET", path, app=guarded, authorization=f"Bearer {TOKEN}").status == 200
        refused(site.ask("GET", f"{path.partition('?')[0]}?token={TOKEN}", app=guarded), 401)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([*WICKED, "0000", "a/0.png", "taken > 3", "label in 1", "2"]),
)
QUESTIONS = st.dictionaries(
    st.sampled_from(["key", "code", "k", "radius", "where", "version", "exclude_self", "image", "x"]),
    VALUES,
    max_size=5,
)


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
@given(
    st.one_of(
        QUESTIONS.map(lambda asked: ("application/json", json.dumps(asked).encode())),
        st.tuples(st.sampled_from(["application/json", "multipart/form-data; boundary=b"]), st.binary(max_size=200)),
        st.lists(st.tuples(st.text(max_size=8), st.binary(max_size=30)), max_size=4).map(
            lambda parts: (
                "multipart/form-data; boundary=b",
                b"".join(part(f'name="{name.encode("unicode_escape").decode()}"', data) for name, data in parts)
                + b"--b--\r\n",
            )
        ),
    )
)
def test_whatever_comes_the_service_does_not_fail(site: Site, asked: tuple[str, bytes]) -> None:
    kind, body = asked
    answer = site.ask("POST", "/search", kind, body)
    assert answer.status < 500, answer
    if answer.status != 200:
        refused(answer, 400, 404, 429)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/search?", "/pictures/", "/version?", "/"]), st.text(st.characters(codec="ascii"), max_size=40)
)
def test_whatever_is_asked_for_the_service_does_not_fail(site: Site, path: str, rest: str) -> None:
    assert site.ask("GET", path + rest).status < 500


# Pictures


def test_bombs_are_refused_for_little() -> None:
    """In a process of its own, whose memory and time are measured: about what the largest of the files has itself."""
    command = [sys.executable, bombs.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for name, (reason, size, grown_mb, seconds) in json.loads(done.stdout).items():
        assert size < 3_000_000, name
        assert reason.partition(":")[0] in ("too-large", "not-an-image", "undecodable", "truncated"), (name, reason)
        assert grown_mb < 40, (name, grown_mb)
        assert seconds < 3, (name, seconds)


def test_a_long_strip_is_cropped_before_it_is_scaled() -> None:
    """8 x 1,000,000 pixels, scaled to 232 by the shorter side, would be 6.7 gigapixels."""
    prepare = Preprocess(224, 232, [0.0] * 3, [1.0] * 3, False, "bilinear")
    for shape in ((1_000_000, 8, 3), (8, 1_000_000, 3), (1, 1_000_000, 3)):
        assert prepare(np.zeros(shape, np.uint8)).shape == (224, 224, 3)


def test_pictures_of_a_sheet_are_decoded_as_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """No format that runs a program, no bomb; what cannot be read is left out."""
    monkeypatch.setattr(subprocess, "Popen", None)
    assert picture_tag(bombs.bombs()["eps"]) == ""
    assert picture_tag(bombs.bombs()["png claim"]) == ""
    assert picture_tag(PNG).startswith("<img src=")


def test_what_is_decoded_together_has_a_bound() -> None:
    from hashdist.service.encoder import within

    assert claimed_pixels(bombs.png(8_000, 8_000, 1)) == 64_000_000
    assert claimed_pixels(b"") == 0
    sizes = [10, 10, 10, 50, 10, 40]
    asked = [("m", bombs.png(size, 1, 1)) for size in sizes]
    assert [len(run) for run in within(asked, 50)] == [3, 1, 2]


def test_a_token_that_does_not_reach_the_service_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Better no service than one that asks for nothing; and one that is open to others says so."""
    from hashdist.service.app import Search, is_guarded

    named = ServiceSettings(token_env="HASHDIST_TEST_TOKEN", host="0.0.0.0")
    monkeypatch.delenv("HASHDIST_TEST_TOKEN", raising=False)
    assert not is_guarded(named)
    assert "WARNING" in capsys.readouterr().err
    assert not is_guarded(ServiceSettings(token_env="HASHDIST_TEST_TOKEN"))
    assert capsys.readouterr().err == ""
    with pytest.raises(InvalidInput, match="every machine of the cluster"):
        Search._token(SimpleNamespace(_settings=named, _guarded=True))
    assert Search._token(SimpleNamespace(_settings=named, _guarded=False)) == ""
    monkeypatch.setenv("HASHDIST_TEST_TOKEN", TOKEN)
    assert is_guarded(named)
    assert Search._token(SimpleNamespace(_settings=named, _guarded=True)) == TOKEN


# Collections


def test_a_pipe_or_a_device_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    store = open_store(str(tmp_path))
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(InvalidInput, match="no regular file"):
            store.get(name)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../x", "nul\0", ""])
def test_no_name_leads_out_of_a_store(tmp_path: Path, name: str) -> None:
    store = open_store(str(tmp_path))
    for verb in (store.get, store.stat, store.exists, store.delete, store.child, store.local_path):
        with pytest.raises(InvalidInput, match="relative path"):
            verb(name)  # type: ignore[operator]


def test_a_sparse_member_of_a_tar_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hashdist.collection.readers.tar.MAX_BYTES", 10_000)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("small.png", PNG), ("large.png", bytes(20_000))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    store = open_store(str(tmp_path))
    small, large = TarReader(store, list(store.list()), False).images(Unit(0, 0, None))
    assert small.data == PNG
    assert isinstance(large.data, Lost)
    assert large.data.reason.startswith("too-large")


def test_an_image_file_beyond_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hashdist.collection.collection import plan as plan_scan
    from hashdist.collection.listing import list_collection

    monkeypatch.setattr("hashdist.collection.readers.folder.MAX_BYTES", 10_000)
    growth_world.write(tmp_path, {"small.png": PNG, "large.png": bytes(20_000)})
    planned = plan_scan(list_collection(CollectionSettings(uri=str(tmp_path))), 10)
    rows = planned.reader.scan(planned.units[0]).to_pylist()
    assert {row["key"]: (row["reason"] or "").partition(":")[0] for row in rows} == {
        "small.png": "",
        "large.png": "too-large",
    }


# Weights, features, manifests


class Malicious:
    """What makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self._made = str(made)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self._made,)


def test_weights_run_no_code(tmp_path: Path) -> None:
    made = tmp_path / "made"
    files = {
        "plain.pth": pickle.dumps(Malicious(made), 2),
        "legacy.pt": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(Malicious(made), 2),
        "weights.safetensors": pickle.dumps(Malicious(made), 2),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"state_dict": {"w": torch.zeros(1)}, "more": Malicious(made)}, tmp_path / "zip.pth")
    for name in (*files, "zip.pth"):
        with pytest.raises(InvalidInput):
            read_weights(str(tmp_path / name))
    assert not made.exists()


def test_features_and_arrays_run_no_code(tmp_path: Path) -> None:
    made = tmp_path / "made"
    objects = np.array([[Malicious(made)]], object)
    for folder in ("img_emb", "metadata"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", objects)
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "metadata" / "metadata_0.parquet")
    with pytest.raises(InvalidInput, match="must hold floats"):
        plan(list_source(str(tmp_path)))
    with pytest.raises(ValueError, match="object"):
        map_npy(tmp_path / "img_emb" / "img_emb_0.npy")
    assert not made.exists()


@pytest.mark.parametrize("checksum", ["/tmp/x", "../../x", "", "0" * 63, "0" * 64 + "/x", "G" * 64])
def test_a_checksum_that_is_a_path_names_no_file_of_the_cache(tmp_path: Path, checksum: str) -> None:
    with pytest.raises(Corrupt, match="64 hexadecimal digits"):
        cache._place(tmp_path, {"path": "a", "sha256": checksum})
