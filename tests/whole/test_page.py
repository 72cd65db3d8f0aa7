"""The page in a real browser, over the real service: what it shows is what the index and the model say."""

import base64
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as ChromeDriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from sklearn.datasets import load_digits

from hashdist.ground.settings import ServiceSettings
from hashdist.service.api import Backend, make_app
from hashdist.service.batching import Batches
from hashdist.service.serving import Serving
from tests.worlds import reindex as growth_world
from tests.worlds.service import ODD_KEY, Service, ServiceWorld, free_port, serving

pytestmark = pytest.mark.cluster

MARKUP_KEY = "odd/<b>50% #1?.png"
WAIT_S = 30
TOKEN = "a long secret"


class Digits(ServiceWorld):
    """A world whose pictures are handwritten digits, one of them under a name that is markup."""

    _drawings = load_digits().images

    def _name(self) -> str:
        name = super()._name()
        return MARKUP_KEY if self._named == 1 else name

    def _write(self, keys: list[str]) -> None:
        for key in keys:
            pixels = np.rint(self._drawings[self._drawn] * (255 / 16)).astype(np.uint8)
            self._drawn += 1
            path = self.images / key
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


class Page:
    """The page at `url`, as a visitor sees and uses it."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser, self.url = browser, url

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page."""
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition: str, *arguments: Any) -> None:
        """Until a condition in JavaScript holds."""
        until = time.monotonic() + WAIT_S
        while not self.js(f"return Boolean({condition})", *arguments):
            assert time.monotonic() < until, f"{condition} does not hold: {self.js('return document.body.innerText')}"
            time.sleep(0.03)

    def open(self, fragment: str = "") -> None:
        """Load the page, anew."""
        self.browser.get("about:blank")
        self.browser.get(f"{self.url}/{fragment}")
        self.settle()

    def settle(self) -> None:
        """Until nothing is under way."""
        self.wait("document.querySelector('#facts').dataset.state && !document.body.classList.contains('busy')")

    def keys(self, *keys: str) -> None:
        """Type, wherever the focus is."""
        ActionChains(self.browser).send_keys(*keys).perform()

    def text(self, selector: str) -> str:
        """The visible text of an element."""
        return str(self.js("return document.querySelector(arguments[0]).innerText", selector)).strip()

    def results(self) -> list[tuple[str, int]]:
        """Keys and distances as they are written on the results, once there are any."""
        self.wait("document.querySelector('#hits a') && !document.body.classList.contains('busy')")
        read = "[a.querySelector('.caption').textContent, Number(a.querySelector('.badge').textContent)]"
        return [tuple(pair) for pair in self.js(f"return [...document.querySelectorAll('#hits a')].map((a) => {read})")]

    def bits(self, selector: str = "#pattern") -> list[int]:
        """Which squares of a pattern are set, row by row."""
        squares = f"[...document.querySelectorAll('{selector} rect')]"
        place = "(r) => Math.floor(r.getAttribute('y')) * 1000 + Math.floor(r.getAttribute('x'))"
        ordered = f"{squares}.sort((a, b) => ({place})(a) - ({place})(b))"
        found: list[int] = self.js(f"return {ordered}.map((r) => Number(r.classList.contains('one')))")
        return found

    def pictures_load(self) -> None:
        """Until every result has a picture, and those in view are there: the others wait until they are."""
        assert self.js("return document.querySelectorAll('#hits a:not(:has(img))').length") == 0
        in_view = "[...document.querySelectorAll('img')].filter((i) => i.getBoundingClientRect().top < innerHeight)"
        self.wait(f"{in_view}.every((i) => i.naturalWidth > 0)")

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        return bool(self.js("return document.documentElement.scrollWidth <= window.innerWidth"))

    def hand_over(self, how: str, data: bytes) -> None:
        """Paste or drop a picture."""
        script = """
            const bytes = Uint8Array.from(atob(arguments[1]), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "handed.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            const event = arguments[0] === "paste"
              ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
              : new DragEvent("drop", { ...options, dataTransfer: transfer });
            document.querySelector("#drop").dispatchEvent(event);
        """
        self.js(script, how, base64.b64encode(data).decode())

    def said(self) -> list[str]:
        """Errors in the browser's console since the last call."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]

    def events(self) -> list[dict[str, Any]]:
        """What the network did since the last call."""
        return [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    driver = shutil.which("chromedriver")
    if driver is None:
        reason = "there is no chromedriver; as root: apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,800"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=ChromeDriver(driver)) as running:
        running.set_script_timeout(WAIT_S)
        yield running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ServiceWorld:
    return Digits(tmp_path_factory.mktemp("world"), images=60)


@pytest.fixture(scope="module")
def service(world: ServiceWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(world, tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def page(browser: webdriver.Chrome, service: Service) -> Iterator[Page]:
    yield from visited(browser, service.url)


def visited(browser: webdriver.Chrome, url: str) -> Iterator[Page]:
    """A page to test; at the end nothing may have been asked of another host, nor any error be unread."""
    page = Page(browser, url)
    page.said(), page.events()
    yield page
    assert page.said() == []
    asked = [e["params"]["request"]["url"] for e in page.events() if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [a for a in asked if not a.startswith((f"{url}/", f"blob:{url}/", "data:", "about:"))] == []


def expected(world: ServiceWorld, code: np.ndarray[Any, Any], k: int = 24) -> list[tuple[str, int]]:
    hits = world.index.search(np.atleast_2d(code), k=k)
    return list(zip(hits.keys()[0], hits.distances[0].tolist(), strict=True))


def test_a_chosen_picture_is_searched_with(page: Page, world: ServiceWorld) -> None:
    page.open()
    assert page.text("#version") == str(world.index.version)
    assert (page.text("#rows"), page.text("#bits")) == (str(world.index.rows), str(world.index.bits))
    assert "search by key" in page.text("#empty")

    picture = world.images / world.keys()[7]
    page.browser.find_element("id", "file").send_keys(str(picture))
    code = world.current.encode([picture])[0]
    assert page.results() == expected(world, code)
    assert page.bits() == np.unpackbits(code, bitorder="little").tolist()
    assert page.text("#hex") == code.tobytes().hex()
    spoken = page.js("return document.querySelector('#pattern').getAttribute('aria-label')")
    assert "".join(c for c in spoken.partition(":")[2] if c in "01") == "".join(map(str, page.bits()))
    page.pictures_load()

    page.js("document.querySelectorAll('#hits a')[5].focus()")  # which bits differ from the sixth result?
    sixth, distance = page.results()[5]
    page.wait("document.querySelector('#difference').innerText.includes(arguments[0])", sixth)
    assert page.js("return document.querySelectorAll('#pattern .differs').length") == distance
    page.browser.refresh()  # the picture is gone with the page, its code is not
    assert page.results() == expected(world, code)


def test_one_goes_on_from_a_result_and_back(page: Page, world: ServiceWorld) -> None:
    first = world.keys()[3]
    page.open(f"#key={first}&k=12")
    before = page.results()
    assert before == expected(world, world.index.codes_of([first])[0], 12)
    assert before[0][1] == 0

    clicked = before[4][0]
    page.browser.find_elements("css selector", "#hits a")[4].click()
    page.wait("document.querySelector('#hits a').dataset.key !== arguments[0]", before[0][0])
    after = page.results()
    assert after == expected(world, world.index.codes_of([clicked])[0], 12)
    assert (clicked, 0) in after
    assert page.js("return document.querySelector('#text').value") == clicked
    page.pictures_load()

    page.browser.back()
    page.wait("document.querySelector('#text').value === arguments[0]", first)
    page.settle()
    assert page.results() == before
    page.browser.forward()
    page.wait("document.querySelector('#text').value === arguments[0]", clicked)
    page.settle()
    assert page.results() == after

    page.js(  # a result that is dropped on the page is searched from, too
        "const dataTransfer = new DataTransfer(); dataTransfer.setData('text/uri-list', arguments[0]);"
        "document.body.dispatchEvent(new DragEvent('drop', { bubbles: true, cancelable: true, dataTransfer }))",
        f"{page.url}/#key={first}&k=12",
    )
    page.wait("document.querySelector('#text').value === arguments[0]", first)
    page.settle()
    assert page.results() == before


def test_a_keyboard_is_enough(page: Page, world: ServiceWorld) -> None:
    key = world.keys()[11]
    page.open()
    page.keys("/", key, Keys.ENTER)
    found = page.results()
    assert found == expected(world, world.index.codes_of([key])[0])
    focused = "document.activeElement.dataset.key"
    for _ in range(8):
        page.keys(Keys.TAB)
        if page.js(f"return {focused}"):
            break
    assert page.js(f"return {focused}") == found[0][0]
    assert page.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    columns = page.js(
        "const [first, ...others] = document.querySelectorAll('#hits a');"
        "return 1 + others.findIndex((a) => a.offsetTop > first.offsetTop)"
    )
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert page.js(f"return {focused}") == found[columns][0]
    page.keys(Keys.END)
    assert page.js(f"return {focused}") == found[-1][0]
    page.keys(Keys.ENTER)
    page.wait("document.querySelector('#text').value === arguments[0]", found[-1][0])
    assert (found[-1][0], 0) in page.results()
    assert page.js(f"return {focused}") == page.results()[0][0]  # the focus stays among the results


def test_filters_and_numbers_of_results(page: Page, world: ServiceWorld) -> None:
    key = world.keys()[5]
    page.open(f"#key={key}")
    page.browser.find_element("id", "where").send_keys("label in 2", Keys.ENTER)
    page.wait("location.hash.includes('where') && !document.body.classList.contains('busy')")
    tables = [table.to_pylist() for table in world.index.tables(["labels"])]
    labelled = {row["key"] for rows in tables for row in rows if 2 in row["labels"]}
    found = page.results()
    assert len(found) == min(24, len(labelled))
    assert {k for k, _ in found} <= labelled
    page.browser.find_element("css selector", "#k option:first-child").click()
    page.wait("document.querySelectorAll('#hits a').length === 12")
    page.open("#code=ff00")
    assert "64 bits, found 16" in page.text("#failure")
    assert len(page.said()) == 1  # the browser's own line about the status


def test_what_is_wrong_is_said(page: Page, world: ServiceWorld, tmp_path: Path) -> None:
    page.open()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"this is not a picture")
    page.browser.find_element("id", "file").send_keys(str(broken))
    page.wait("document.querySelector('#failure').innerText")
    assert "The picture cannot be read" in page.text("#failure")
    assert page.text("#asked") == "broken.png"
    page.open("#key=<i>nobody</i>")
    assert "no image of that key" in page.text("#failure")
    assert page.js("return document.querySelectorAll('i').length") == 0
    assert len(page.said()) == 2  # the browser's own lines about the statuses
    page.js(
        "const dataTransfer = new DataTransfer(); dataTransfer.setData('text/uri-list', 'http://example.org/a.png');"
        "document.body.dispatchEvent(new DragEvent('drop', { bubbles: true, cancelable: true, dataTransfer }))"
    )
    assert "links are not followed" in page.text("#failure")


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_a_picture_can_be_pasted_and_dropped(page: Page, world: ServiceWorld, how: str) -> None:
    data = growth_world.png(400, 40)
    page.open()
    page.hand_over(how, data)
    assert page.results() == expected(world, world.current.encode([data])[0])
    page.wait("document.querySelector('#picture').naturalWidth === 40")
    page.open(page.js("return location.hash"))
    assert page.results() == expected(world, world.current.encode([data])[0])


@pytest.mark.parametrize("key", [MARKUP_KEY, ODD_KEY])
def test_any_key_is_text(page: Page, world: ServiceWorld, key: str) -> None:
    page.open()
    page.keys("/", key, Keys.ENTER)
    assert (key, 0) in page.results()
    page.pictures_load()
    assert page.text("#asked") == key
    assert page.js("return document.querySelectorAll('b').length") == 0
    page.js("[...document.querySelectorAll('#hits a')].find((a) => a.dataset.key === arguments[0]).click()", key)
    page.settle()
    assert (key, 0) in page.results()


def test_a_small_window_needs_no_scrolling_sideways(page: Page, world: ServiceWorld) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open()
        assert page.fits()
        page.open(f"#key={MARKUP_KEY.replace('%', '%25').replace('#', '%23')}&where=key not in {'x' * 200}")
        page.results()
        page.pictures_load()
        assert page.fits()
        page.open(f"#key={'y' * 300}")
        page.wait("document.querySelector('#failure').innerText")
        assert page.fits()
        assert len(page.said()) == 1
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_an_older_search_is_given_up(page: Page, world: ServiceWorld) -> None:
    first, second = world.keys()[20:22]
    page.open()
    page.browser.execute_cdp_cmd("Network.enable", {})
    slow = {"offline": False, "latency": 400, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    try:
        page.events()
        page.js("location.hash = `#key=${arguments[0]}`", first)
        page.wait("document.body.classList.contains('busy')")
        assert page.js("return document.querySelector('#answer').getAttribute('aria-busy')") == "true"
        page.js("location.hash = `#key=${arguments[0]}`", second)
        found = page.results()
    finally:
        page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**slow, "latency": 0})
    assert found == expected(world, world.index.codes_of([second])[0])
    given_up = [e for e in page.events() if e["method"] == "Network.loadingFailed" and e["params"].get("canceled")]
    assert len(given_up) == 1
    page.open()


# With a token, without an encoder, and while the index changes


@contextmanager
def in_process(world: ServiceWorld, token: str = "", **settings: Any) -> Iterator[str]:
    """The service's routes in this process, without an encoder; their address."""
    chosen = ServiceSettings(refresh_s=0.1, **settings)
    followed = Serving(world.uri, refresh_s=0.1, held_versions=2, pictures=chosen.pictures)
    backend = Backend(followed, Batches(1, time.perf_counter), None, str, chosen)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(make_app(backend, token), port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    followed.start()
    thread.start()
    try:
        while not server.started or followed.state()[0] == "not ready":
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        followed.close()


def test_a_token_is_asked_for_and_kept_in_the_tab(browser: webdriver.Chrome, world: ServiceWorld) -> None:
    with in_process(world, TOKEN) as url, contextmanager(visited)(browser, url) as page:
        key = world.keys()[2]
        page.browser.get(f"{url}/#key={key}")
        for given, title in (("wrong", "not accepted"), (TOKEN, "")):
            page.wait("document.querySelector('#token').open && !document.querySelector('#token-value').value")
            page.keys(given, Keys.ENTER)
            if title:
                page.wait("document.querySelector('#token-text').innerText.includes(arguments[0])", title)
        assert page.results() == expected(world, world.index.codes_of([key])[0])
        page.pictures_load()
        assert page.js("return [...document.querySelectorAll('img[src]')].every((i) => i.src.startsWith('blob:'))")
        assert page.js("return [localStorage.length, document.cookie, Object.values(sessionStorage)]") == [
            0,
            "",
            [TOKEN],
        ]
        assert all("401" in line for line in page.said())
        page.browser.refresh()  # the tab knows it still
        assert page.results()[0][1] == 0
        page.browser.find_element("id", "forget").click()
        page.wait("document.querySelector('#token').open")
        page.browser.find_element("id", "token-cancel").click()
        page.wait("document.querySelector('#failure').innerText.includes('oken')")
        assert all("401" in line for line in page.said())


def test_without_pictures_codes_are_shown_and_other_versions_are_said(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    world = Digits(tmp_path, images=12)
    with in_process(world, pictures=False) as url, contextmanager(visited)(browser, url) as page:
        page.open()
        assert "no encoder" in page.text("#invite")
        assert not page.js("return document.querySelector('#choose').checkVisibility()")
        page.hand_over("paste", growth_world.png(1))
        assert "no encoder" in page.text("#failure")
        key = world.keys()[1]
        page.open(f"#key={key}")
        found = page.results()
        assert page.js("return document.images.length") == 1  # the query's, which is hidden
        page.wait("document.querySelectorAll('#hits svg rect').length === arguments[0]", len(found) * world.index.bits)
        for place, (of, distance) in enumerate(found):
            tile = f"#hits li:nth-child({place + 1})"
            assert page.bits(tile) == np.unpackbits(world.index.codes_of([of])[0], bitorder="little").tolist()
            assert page.js("return document.querySelectorAll(arguments[0]).length", f"{tile} .differs") == distance

        asked = world.index.version
        world.delete(2)
        page.wait("(document.dispatchEvent(new Event('visibilitychange')), document.querySelector('#news button'))")
        assert f"of version {asked}; the index is at version {world.index.version}" in page.text("#news")
        assert page.text("#rows") == "10"
        assert page.results() == found  # nothing moves by itself
        page.browser.find_element("css selector", "#news button").click()
        page.wait("!document.querySelector('#news').innerText")
        assert page.results() == expected(world, world.index.codes_of([key])[0])

        served = world.index.version
        refused = world.corrupt()
        page.wait("(document.dispatchEvent(new Event('visibilitychange')), document.querySelector('#news').innerText)")
        assert f"Version {refused} was refused, and version {served} goes on answering" in page.text("#news")
        assert page.js("return document.querySelector('#facts').dataset.state") == "degraded"
