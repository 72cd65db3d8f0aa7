"""Radius search by tables against a plain comparison with every row."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hashdist.index import create_index, open_index
from hashdist.index.search import tables as bucket_tables
from hashdist.nearest import scan

Codes = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred rows have tables, whatever a lookup costs."""
    monkeypatch.setattr(bucket_tables, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(bucket_tables, "_PROBING", 1e9)
    monkeypatch.setattr(bucket_tables, "_GAIN", 1e9)


def clustered(rng: np.random.Generator, n: int, width: int, distinct: int, flips: int) -> Codes:
    """Codes around a few centres: many duplicates and many distances from 0 to 2 * flips."""
    codes = rng.integers(0, 256, (distinct, width), dtype=np.uint8)[rng.integers(0, distinct, n)]
    rows = np.arange(n)
    for _ in range(flips):
        bit, turned = rng.integers(0, 8 * width, n), rng.random(n) < 0.6
        codes[rows, bit >> 3] ^= (turned << (bit & 7)).astype(np.uint8)
    return codes


def parts_of(rng: np.random.Generator, codes: Codes, sizes: list[int], dead: float) -> tuple[list[scan.Part], NDArray]:
    """Shards of these sizes with ids that lie between one another's; and the ids of all rows, -1 where dead."""
    ids = rng.permutation(10 * len(codes))[: len(codes)].astype(np.int64)
    gone = rng.random(len(codes)) < dead
    parts, first = [], 0
    for size in sizes:
        here = first + np.argsort(ids[first : first + size])
        parts.append(scan.Part(codes[here], ids[here], scan.bitmap(np.flatnonzero(gone[here]), size)))
        first += size
    return parts, np.where(gone, -1, ids)


def check(parts: list[scan.Part], ids: NDArray, codes: Codes, asked: Codes, reach: int, threads: int) -> int:
    tables = [bucket_tables.build(part.codes_NW) for part in parts]
    got = bucket_tables.within_of(parts, tables, asked, reach, threads=threads)
    live = np.flatnonzero(ids >= 0)
    for q, query in enumerate(asked):
        distances = np.bitwise_count(codes[live] ^ query).sum(1, dtype=np.int64)
        order = np.lexsort((ids[live], distances))
        order = order[distances[order] <= reach]
        span = slice(got.offsets[q], got.offsets[q + 1])
        np.testing.assert_array_equal(got.rows[span], ids[live][order])
        np.testing.assert_array_equal(got.distances[span], distances[order])
    return len(got.rows)


@settings(max_examples=100, deadline=None)
@given(
    width=st.sampled_from([3, 8, 33]),
    sizes=st.lists(st.integers(1, 250), min_size=1, max_size=4),
    reach=st.integers(0, 8),
    distinct=st.sampled_from([1, 3, 40]),
    flips=st.sampled_from([0, 2, 6]),
    dead=st.sampled_from([0.0, 0.1, 1.0]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 10_000),
)
def test_equal_to_comparing_every_row(
    width: int, sizes: list[int], reach: int, distinct: int, flips: int, dead: float, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = clustered(rng, sum(sizes) + 5, width, distinct, flips)
    parts, ids = parts_of(rng, codes[:-5], sizes, dead)
    check(parts, ids, codes[:-5], codes[-5:], reach, threads)


@pytest.mark.parametrize("width", [1, 4, 128])
def test_every_radius(width: int) -> None:
    """Up to the code length; flips up to all bits of a piece."""
    rng = np.random.default_rng(width)
    codes = clustered(rng, 60, width, 4, 5)
    parts, ids = parts_of(rng, codes, [25, 35], 0.1)
    found = [check(parts, ids, codes, codes[:3], reach, 2) for reach in (0, 1, 2, 5, 8, 13, 8 * width, 9999)]
    assert found == sorted(found)
    assert found[-1] == 3 * (ids >= 0).sum()


def test_lookups_are_spread_over_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_tables, "_QUERIES_PER_TASK", 3)
    rng = np.random.default_rng(0)
    codes = clustered(rng, 500, 8, 20, 4)
    parts, ids = parts_of(rng, codes, [200, 300], 0.1)
    assert check(parts, ids, codes, codes[:20], 3, 2) > 20


def test_a_query_in_a_heap_is_left_to_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where buckets hold too many rows, none of them is looked at; other queries of the call use the tables."""
    monkeypatch.setattr(bucket_tables, "_PROBING", 0.1)
    monkeypatch.setattr(bucket_tables, "_GAIN", 0.8)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (60_000, 8), dtype=np.uint8)
    codes[:30_000] = codes[0]
    part, tables = scan.Part(codes), bucket_tables.build(codes)
    scanned: list[int] = []
    monkeypatch.setattr(scan, "within_of", _noting(scanned, scan.within_of))
    asked = codes[[0, 40_000, 50_000]]
    got = bucket_tables.within_of([part], [tables], asked, 2)
    assert scanned == [1]
    assert np.diff(got.offsets).tolist() == [30_000, 1, 1]
    bucket_tables.within_of([part], [tables], asked, 40)  # more flips than the scan costs
    assert scanned == [1, 3]


def _noting(scanned: list[int], within_of):  # type: ignore[no-untyped-def]
    def noting(parts, queries, reach, *, threads=0):  # type: ignore[no-untyped-def]
        scanned.append(len(queries))
        return within_of(parts, queries, reach, threads=threads)

    return noting


def test_tables_are_built_when_they_pay_and_kept_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bucket_tables, "_BUILD_AFTER", 10)
    built: list[int] = []
    build = bucket_tables.build
    monkeypatch.setattr(bucket_tables, "build", lambda codes: built.append(len(codes)) or build(codes))
    codes = clustered(np.random.default_rng(0), 400, 8, 30, 3)
    index = create_index(str(tmp_path / "index"), 64)
    for start in (0, 200):
        index.append(codes[start : start + 200], [str(row) for row in range(start, start + 200)])
    index.delete(["7", "300"])
    wanted = open_index(index.uri).search_within(codes[:6], 2, tables="off")

    def check(tables: bucket_tables.Use) -> None:
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
