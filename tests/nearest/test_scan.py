"""The scan kernels against a plain sort, for every way in which work is cut up."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.nearest import scan

Codes = NDArray[np.uint8]
FAR = 1 << 20


def random_codes(n: int, width: int, seed: int = 0, distinct: int = 0) -> Codes:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (distinct or n, width), dtype=np.uint8)
    return codes[rng.integers(0, distinct, n)] if distinct else codes


def distances(codes: Codes, queries: Codes, dead: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    table = np.bitwise_count(queries[:, None] ^ codes[None]).sum(-1, dtype=np.int64)
    if dead is not None:
        table[:, dead] = FAR
    return table


def check_nearest(
    codes: Codes, queries: Codes, k: int, dead: NDArray[np.int64] | None = None, threads: int = 0
) -> None:
    mask = scan.bitmap(dead, len(codes)) if dead is not None else None
    got = scan.nearest(codes, queries, k, dead=mask, threads=threads)
    table = distances(codes, queries, dead)
    live = len(codes) - (0 if dead is None else len(dead))
    rows = np.argsort(table, axis=1, kind="stable")[:, : min(k, live)]
    assert got.counts_Q.tolist() == [rows.shape[1]] * len(queries)
    np.testing.assert_array_equal(got.rows_QK[:, : rows.shape[1]], rows)
    np.testing.assert_array_equal(got.distances_QK[:, : rows.shape[1]], np.take_along_axis(table, rows, axis=1))


def check_within(codes: Codes, queries: Codes, radius: int, dead: NDArray[np.int64] | None = None) -> None:
    mask = scan.bitmap(dead, len(codes)) if dead is not None else None
    got = scan.within(codes, queries, radius, dead=mask)
    table = distances(codes, queries, dead)
    for q in range(len(queries)):
        rows = np.argsort(table[q], kind="stable")
        rows = rows[table[q][rows] <= radius]
        span = slice(got.offsets[q], got.offsets[q + 1])
        np.testing.assert_array_equal(got.rows[span], rows)
        np.testing.assert_array_equal(got.distances[span], table[q][rows])


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred codes are cut into ranges as millions are."""
    monkeypatch.setattr(scan, "_ROWS_PER_TASK", 100)
    monkeypatch.setattr(scan, "_QUERIES_PER_TASK", 5)
    monkeypatch.setattr(scan, "cores", lambda: 3)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8, 12, 16, 33, 64, 127, 128])
@pytest.mark.parametrize("queries", [1, 3, 4, 21])
def test_every_code_length_and_number_of_queries(small_tasks: None, width: int, queries: int) -> None:
    codes, asked = random_codes(1300, width), random_codes(queries, width, seed=1)
    dead = np.flatnonzero(np.random.default_rng(2).random(1300) < 0.1)
    check_nearest(codes, asked, 17)
    check_nearest(codes, asked, 17, dead)
    check_within(codes, asked, 4 * width - 2, dead)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 1200),
    k=st.integers(1, 1500),
    distinct=st.integers(1, 4),
    queries=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.02, 0.9, 1.0]),
    threads=st.sampled_from([0, 1]),
    seed=st.integers(0, 10_000),
)
def test_ties_at_the_cut(n: int, k: int, distinct: int, queries: int, share: float, threads: int, seed: int) -> None:
    """Few distinct codes: nearly every result is decided by the row."""
    codes = random_codes(n, 2, seed, distinct) if n else np.empty((0, 2), np.uint8)
    asked = random_codes(queries, 2, seed + 1)
    dead = np.flatnonzero(np.random.default_rng(seed).random(n) < share)
    check_nearest(codes, asked, k, dead, threads)
    check_within(codes, asked, seed % 17, dead)


@pytest.mark.parametrize("k", [1, 60, 700, 5000])
def test_codes_that_come_nearer_and_nearer(small_tasks: None, k: int) -> None:
    """The worst order for a falling cut: every code is nearer than all before it, and the candidates overflow."""
    bits = np.tril(np.ones((64, 64), np.uint8))[::-1].repeat(40, axis=0)
    codes = np.packbits(bits, axis=1)
    check_nearest(codes, np.zeros((2, 8), np.uint8), k)
    check_nearest(codes, np.zeros((9, 8), np.uint8), k, np.arange(0, len(codes), 3))


def test_rows_cut_into_ranges_give_the_same_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, asked = random_codes(3000, 2, distinct=40), random_codes(3, 2, seed=1)
    whole = scan.nearest(codes, asked, 100, threads=1)
    monkeypatch.setattr(scan, "_ROWS_PER_TASK", 1)
    for cores in (2, 3, 7):
        cut = scan.nearest(codes, asked, 100, threads=cores)
        for a, b in zip(whole, cut, strict=True):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 400), max_size=6),
    k=st.integers(1, 600),
    distinct=st.sampled_from([2, 30, 1 << 16]),
    queries=st.sampled_from([1, 3, 20]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 10_000),
)
def test_parts_with_ids_of_their_own(
    sizes: list[int], k: int, distinct: int, queries: int, threads: int, seed: int
) -> None:
    """Shards whose ids lie between one another's give what one sorted list of all rows gives."""
    rng, n = np.random.default_rng(seed), sum(sizes)
    ids, codes = rng.permutation(10 * n)[:n].astype(np.int64) - n, random_codes(max(n, 1), 2, seed, distinct)[:n]
    gone, asked = rng.random(n) < 0.1, random_codes(queries, 2, seed + 1)
    parts, first = [], 0
    for size in sizes:
        here = first + np.argsort(ids[first : first + size])
        parts.append(scan.Part(codes[here], ids[here], scan.bitmap(np.flatnonzero(gone[here]), size)))
        first += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_ROWS_PER_TASK", 70)
        got, ball = scan.nearest_of(parts, asked, k, threads=threads), scan.within_of(parts, asked, 6, threads=threads)
    live = np.flatnonzero(~gone)
    for q, row in enumerate(distances(codes[live], asked)):
        order = np.lexsort((ids[live], row))
        assert got.counts_Q[q] == min(k, len(live))
        np.testing.assert_array_equal(got.rows_QK[q, : got.counts_Q[q]], ids[live][order[:k]])
        near, span = order[row[order] <= 6], slice(ball.offsets[q], ball.offsets[q + 1])
        np.testing.assert_array_equal(ball.rows[span], ids[live][near])
        np.testing.assert_array_equal(ball.distances[span], row[near])


def test_merging_parts_gives_the_whole() -> None:
    codes, asked = random_codes(900, 2, distinct=9), random_codes(6, 2, seed=1)
    whole = scan.nearest(codes, asked, 200)
    best = None
    for start in (600, 0, 300):
        part = scan.nearest(codes[start : start + 300], asked, 200)
        part = part._replace(rows_QK=part.rows_QK + start)
        best = part if best is None else scan.merge(best, part, 200)
    assert best is not None
    np.testing.assert_array_equal(best.rows_QK, whole.rows_QK)
    np.testing.assert_array_equal(best.distances_QK, whole.distances_QK)


def test_mapped_and_unaligned_codes(tmp_path: Path) -> None:
    codes, asked = random_codes(700, 8), random_codes(4, 8, seed=1)
    (tmp_path / "codes").write_bytes(b"x" * 33 + codes.tobytes())
    mapped = np.memmap(tmp_path / "codes", np.uint8, "r", offset=33, shape=codes.shape)
    assert mapped.ctypes.data % 8
    for a, b in zip(scan.nearest(codes, asked, 20), scan.nearest(mapped, asked, 20), strict=True):
        np.testing.assert_array_equal(a, b)
    strided = np.repeat(codes, 2, axis=0)[::2]
    np.testing.assert_array_equal(scan.nearest(strided, asked, 20).rows_QK, scan.nearest(codes, asked, 20).rows_QK)


def random_masks(n: int, classes: int, seed: int) -> NDArray[np.uint64]:
    """Label sets of 1.5 classes in the mean, some of them empty."""
    flags = np.zeros((n, -(-classes // 64) * 64), np.bool_)
    flags[:, :classes] = np.random.default_rng(seed).random((n, classes)) < 1.5 / classes
    return np.packbits(flags, axis=1, bitorder="little").view(np.uint64)


def check_histograms(
    codes: Codes, asked: Codes, labels: NDArray[np.uint64], wanted: NDArray[np.uint64], dead: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Against one bincount per query, on one to three threads; returns the counts."""
    levels = 8 * codes.shape[1] + 1
    table = distances(codes, asked, dead)
    expected = np.zeros((len(asked), 2, levels), np.int64)
    for q, row in enumerate(table):
        shared = (labels & wanted[q]).any(1)
        expected[q] = [np.bincount(row[keep], minlength=levels) for keep in (row < FAR, (row < FAR) & shared)]
    for threads in (1, 2, 3, 0):
        got = scan.histograms(codes, asked, labels, wanted, dead=scan.bitmap(dead, len(codes)), threads=threads)
        np.testing.assert_array_equal(got, expected)
        assert (got.dtype, got.shape) == (np.int64, expected.shape)
    return expected


@pytest.mark.parametrize("classes", [3, 100, 200])
@pytest.mark.parametrize("width", [2, 4, 5, 8, 16, 128])
@pytest.mark.parametrize("tile_bytes", [1, 1 << 18])
def test_histograms(
    small_tasks: None, monkeypatch: pytest.MonkeyPatch, width: int, classes: int, tile_bytes: int
) -> None:
    monkeypatch.setattr(scan, "_TILE_BYTES", tile_bytes)
    codes, asked = random_codes(2111, width), random_codes(7, width, seed=1)
    labels, wanted = random_masks(2111, classes, 3), random_masks(7, classes, 4)
    dead = np.flatnonzero(np.random.default_rng(5).random(2111) < 0.2)
    for some in (dead, dead[:0]):
        counts = check_histograms(codes, asked, labels, wanted, some)
        assert 0 < counts[:, 1].sum() < counts[:, 0].sum()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 1600), distinct=st.integers(1, 4), queries=st.integers(0, 5), classes=st.integers(1, 70),
    share=st.sampled_from([0.0, 0.02, 0.9, 1.0]), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_histograms_of_few_codes(n: int, distinct: int, queries: int, classes: int, share: float, seed: int) -> None:
    """Counts that go to few places, from no rows to some blocks."""
    codes = random_codes(n, 8, seed, distinct) if n else np.empty((0, 8), np.uint8)
    labels, wanted = random_masks(n, classes, seed), random_masks(queries, classes, seed + 1)
    dead = np.flatnonzero(np.random.default_rng(seed).random(n) < share)
    check_histograms(codes, random_codes(queries, 8, seed + 1), labels, wanted, dead)


def test_many_threads_at_once(small_tasks: None) -> None:
    codes, asked = random_codes(5000, 8), random_codes(8, 8, seed=1)
    alone = [scan.nearest(codes, query[None], 30).rows_QK for query in asked]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            together = list(pool.map(lambda query: scan.nearest(codes, query[None], 30).rows_QK, asked))
            np.testing.assert_array_equal(together, alone)


def _in_child(codes: Codes, asked: Codes, wanted: NDArray[np.int64]) -> None:
    np.testing.assert_array_equal(scan.nearest(codes, asked, 10).rows_QK, wanted)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_searches_with_threads_of_its_own(small_tasks: None) -> None:
    codes, asked = random_codes(5000, 8), random_codes(2, 8, seed=1)
    wanted = scan.nearest(codes, asked, 10).rows_QK
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(codes, asked, wanted))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_bad_input() -> None:
    codes = random_codes(10, 8)
    labels = np.ones((10, 1), np.uint64)
    for call in (
        lambda: scan.nearest(codes, codes, 0),
        lambda: scan.nearest(codes, codes[:, :4], 1),
        lambda: scan.nearest(codes.astype(np.int8), codes, 1),  # type: ignore[arg-type]
        lambda: scan.nearest(codes, codes[0], 1),
        lambda: scan.within(codes, codes, -1),
        lambda: scan.histograms(codes, codes, labels[:9], labels),
    ):
        with pytest.raises(InvalidInput):
            call()
