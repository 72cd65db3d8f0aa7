"""Tables of shards: when they are built, where they are kept, and that answers stay those of the scan."""

import os
from pathlib import Path

import numpy as np
import pytest

from hashdist.index import create_index, open_index
from hashdist.index.search import tables as held_tables
from hashdist.nearest import tables as bucket_tables
from tests.nearest.test_tables import clustered


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that a few hundred rows have tables, whatever a lookup costs."""
    monkeypatch.setattr(held_tables, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(bucket_tables, "_PROBING", 1e9)
    monkeypatch.setattr(bucket_tables, "_GAIN", 1e9)
    monkeypatch.setenv("HASHDIST_CACHE", str(tmp_path / "cache"))


def test_tables_are_built_when_they_pay_and_kept_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(held_tables, "_BUILD_AFTER", 10)
    built: list[int] = []
    build = bucket_tables.build
    monkeypatch.setattr(bucket_tables, "build", lambda codes: built.append(len(codes)) or build(codes))
    codes = clustered(np.random.default_rng(0), 400, 8, 30, 3)
    index = create_index(str(tmp_path / "index"), 64)
    for start in (0, 200):
        index.append(codes[start : start + 200], [str(row) for row in range(start, start + 200)])
    index.delete(["7", "300"])
    wanted = open_index(index.uri).search_within(codes[:6], 2, tables="off")

    def check(tables: held_tables.Use) -> None:
        got = index.search_within(codes[:6], 2, tables=tables)
        np.testing.assert_array_equal(got.ids, wanted.ids)
        np.testing.assert_array_equal(got.offsets, wanted.offsets)

    check("auto")
    assert built == []
    check("auto")
    assert built == [200, 200]
    index = open_index(index.uri)
    check("on")
    assert built == [200, 200]  # found in the cache
    for path in (tmp_path / "cache" / "radius").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    index = open_index(index.uri)
    check("on")
    assert built == [200] * 4


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HASHDIST_CACHE", os.fspath(tmp_path / "file"))
    codes = clustered(np.random.default_rng(0), 300, 8, 30, 3)
    index = create_index(str(tmp_path / "index"), 64)
    index.append(codes, [str(row) for row in range(300)])
    wanted = index.search_within(codes[:6], 3, tables="off")
    np.testing.assert_array_equal(index.search_within(codes[:6], 3, tables="on").ids, wanted.ids)
