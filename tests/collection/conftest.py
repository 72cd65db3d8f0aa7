"""Formats, and images to be written in them."""

import pytest

from hashdist.collection.readers import FORMATS
from tests.worlds import extensions
from tests.worlds.collection import WRITERS, jpeg


@pytest.fixture(params=sorted(WRITERS))
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "zip":
        monkeypatch.setitem(FORMATS, "zip", extensions.module("hashdist/collection/readers/zip.py").ZipReader)
    return str(request.param)


@pytest.fixture
def images() -> dict[str, tuple[bytes, str]]:
    return {f"img-{i:03d}": (jpeg(i * 37), ["cat", "dog", "ant"][i % 3]) for i in range(25)}
