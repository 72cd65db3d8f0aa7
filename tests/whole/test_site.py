"""The documentation site builds without a warning, loads nothing from elsewhere, and its notebook says what happens."""

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs").rglob("*.ipynb"))
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
LOADS_NOTHING = {"canonical", "prev", "next", "alternate"}
"""Relations that a link may have to another server: no browser follows them by itself."""
STYLE_LOADS = re.compile(r"""(?:@import\s*|url\()\s*["']?((?:https?:)?//[^"')\s]+)""")
SCRIPT_NAMES = re.compile(r"""["'`]((?:https?:)?//[^"'`\s]+\.(?:js|css|json|woff2?)[^"'`\s]*)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


class Loads(HTMLParser):
    """What a browser loads for a page: (tag, address)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADING and not set((given.get("rel") or "").split()) & LOADS_NOTHING:
            self.found.append((tag, given.get(LOADING[tag]) or ""))


def elsewhere(address: str) -> bool:
    return address.startswith(("http:", "https:", "//"))


def test_no_page_loads_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loads = Loads()
        text = page.read_text()
        loads.feed(text)
        assert loads.found, page
        assert [address for _, address in loads.found if elsewhere(address)] == [], page
        assert STYLE_LOADS.findall(text) == [], page
        assert 'class="mermaid"' not in text, f"{page}: the theme loads what draws diagrams from elsewhere"


def test_no_style_or_script_loads_from_elsewhere(site: Path) -> None:
    styles, scripts = list(site.rglob("*.css")), list(site.rglob("*.js"))
    assert styles
    assert scripts
    assert [found for path in styles for found in STYLE_LOADS.findall(path.read_text())] == []
    assert [found for path in scripts for found in SCRIPT_NAMES.findall(path.read_text())] == []


def test_the_search_finds_what_the_pages_say(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = {entry["location"].partition("#")[0] for entry in entries}
    assert {"start.html", "search.html", "tutorials/photos.html", "tutorials/index_in_python.html", "api.html"} <= found
    assert any("search_within" in entry["title"] for entry in entries)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over HTTP on the loopback; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.cluster
def test_a_browser_searches_the_site_and_asks_no_other_server(site: Path) -> None:
    if not shutil.which("chromedriver"):
        pytest.skip("there is no chromedriver; as root: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        with served(site) as url:
            browser.get(f"{url}/index.html")
            browser.find_element(By.CSS_SELECTOR, "input[name=query]").send_keys("tombstone")
            WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, ".md-search-result__link"))
            events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    finally:
        browser.quit()
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = [address for address in asked if address.startswith("http")]
    assert f"{url}/index.html" in asked
    assert [address for address in asked if not address.startswith(url)] == []


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell of code has printed or returned."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(out.get("text") or out["data"]["text/plain"] for out in cell.outputs) for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_stands_in_it(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # sockets of the kernel, and whatever the notebook leaves
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    before = nbformat.read(path, as_version=4)
    after = nbformat.from_dict(before)
    NotebookClient(after, km=KernelManager(transport="ipc"), timeout=120).execute()
    assert printed(after) == printed(before)
