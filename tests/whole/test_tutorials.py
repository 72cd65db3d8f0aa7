"""The tutorials are true: their files are written and their commands run, in the order of the page."""

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from hashdist import cli, open_index

TUTORIALS = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
QUICK = {"train": {"options": {"epochs": 1}, "workers": 1}}
"""What a test adds to the settings: fewer epochs and processes than a user would take."""

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block."""
    for found in re.finditer(r"(?ms)^```(\w+)\n(.*?)^```", (TUTORIALS / page).read_text()):
        yield found[1], found[2]


def follow(page: str, added: dict[str, Any]) -> None:
    """Do what the page says, in this folder; `added` goes into its settings."""
    for language, text in blocks(page):
        name = re.match(r"# (\S+)\n", text)
        if language == "yaml" and name:
            settings = yaml.safe_load(text)
            for section, values in added.items():
                settings[section] = {**settings.get(section, {}), **values}
            Path(name[1]).write_text(yaml.safe_dump(settings))
        elif language == "python" and name:
            Path(name[1]).write_text(text)
            runpy.run_path(name[1])
        elif language == "bash":
            for line in text.splitlines():
                program, *words = shlex.split(line)
                assert program == "hashdist"
                assert cli.main(words) == 0, line


def test_a_folder_of_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("photos/2021").mkdir(parents=True)
    for name in ("beach.jpg", "2021/dunes.jpg", *(f"{number:02d}.jpg" for number in range(58))):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((64, 48)).save(f"photos/{name}")
    follow("photos.md", {**QUICK, "features": {"weights": "random"}})
    shown = capsys.readouterr().out
    assert re.search(r"(?m)^\s*0\s+beach\.jpg\b", shown)
    assert "beach.jpg" in Path("similar.html").read_text()
    assert set(pq.read_schema("copies.parquet").names) == {"cluster", "id", "key", "distance"}
    assert open_index("hashdist/indexes/photos").rows == 60


def test_vectors_of_your_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    follow("vectors.md", QUICK)
    shown = capsys.readouterr().out
    by_cosine = re.search(r"(?m)^by cosine: (\[.*?\]) \[([\d. ]+)\]$", shown)
    assert by_cosine
    near = json.loads(by_cosine[1].replace("'", '"'))
    assert all(int(key.removeprefix("doc-")) % 20 == 0 for key in near)  # of the query's topic
    index = open_index("hashdist/indexes/vectors")
    assert index.rows == 2000
    assert "doc-new" in set(index.keys())
