"""Every engine against the scan and against brute force: ties, tombstones, filters, shards, the cache of built ones."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_ids
from hashdist.index import Index, create_index, open_index
from hashdist.index.search import engines, filters, scanning
from hashdist.index.search import faiss as faiss_engines
from hashdist.index.search.engine import Engine, recall
from hashdist.index.view import View
from hashdist.nearest import scan
from tests.worlds.index import random_codes

Codes = NDArray[np.uint8]
EXACT = [engines.Folded(), engines.Faiss(), engines.Torch(device="cpu"), engines.Torch(device="cpu", rows_at_once=37)]


def clustered_codes(n: int, bits: int = 64, clusters: int = 20, seed: int = 0) -> Codes:
    """Codes a few bits from one of several centres, as trained codes are."""
    rng = np.random.default_rng(seed)
    centres = random_codes(clusters, bits, seed)[rng.integers(0, clusters, n)]
    flipped = np.packbits(rng.random((n, bits)) < 0.08, axis=1, bitorder="little")
    return centres ^ flipped


def made(folder: Path, codes: Codes, shards: int, dead: int = 0) -> Index:
    """An index of these codes under the keys 0, 1, ...; the last `dead` of them deleted again."""
    index = create_index(str(folder / "index"), bits=8 * codes.shape[1])
    keys = [str(row) for row in range(len(codes))]
    for part in np.array_split(np.arange(len(codes)), shards):
        index.append(codes[part], [keys[row] for row in part], {"parity": [int(row % 2) for row in part]})
    if dead:
        index.delete(keys[-dead:])
    return index


def brute(codes: Codes, query: Codes, k: int, keep: Callable[[int], bool]) -> list[tuple[int, int]]:
    """(distance, id) of the k nearest rows that are kept."""
    ids = image_ids([str(row) for row in range(len(codes))])
    distances = np.bitwise_count(codes ^ query).sum(1)
    return sorted((int(distances[row]), int(ids[row])) for row in range(len(codes)) if keep(row))[:k]


@pytest.mark.parametrize("engine", EXACT, ids=repr)
@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("kind", ["random", "three", "equal"])
def test_exact_engines_break_ties_as_the_scan_does(tmp_path: Path, engine: Engine, shards: int, kind: str) -> None:
    codes = random_codes(300, bits=16)
    if kind != "random":
        codes = random_codes(3 if kind == "three" else 1, bits=16)[np.arange(300) % (3 if kind == "three" else 1)]
    index = made(tmp_path, codes, shards, dead=30)
    queries = np.concatenate([codes[:2], random_codes(3, bits=16, seed=9)])
    for k in (1, 7, 120, 1000):
        hits = index.search(queries, k, engine=engine)
        for q, query in enumerate(queries):
            wanted = brute(codes, query, k, lambda row: row < 270)
            assert list(zip(hits.distances[q].tolist(), hits.ids[q].tolist(), strict=True)) == wanted
    for radius in (0, 5, 16, 90):
        found = index.search_within(queries, radius, engine=engine)
        scanned = index.search_within(queries, radius)
        for part in ("offsets", "ids", "distances"):
            np.testing.assert_array_equal(getattr(found, part), getattr(scanned, part))


@pytest.mark.parametrize("name", ["folded", "faiss", "torch", "ivf", "multihash"])
@pytest.mark.parametrize("where", ["parity == 1", "key in 3,5,7,8,250,299", "key == nothing"])
def test_engines_answer_within_a_filter_only(tmp_path: Path, name: str, where: str) -> None:
    codes = clustered_codes(300)
    index = made(tmp_path, codes, 3, dead=20)
    found, exact = (index.search(codes[:4], 9, where, engine=engine) for engine in (name, "scan"))
    assert found.ids.shape == exact.ids.shape
    assert set(found.ids.ravel()) <= set(index.search(codes[:4], 300, where).ids.ravel())
    if name in ("faiss", "torch") or where != "parity == 1":
        np.testing.assert_array_equal(found.ids, exact.ids)
        np.testing.assert_array_equal(found.distances, exact.distances)
    if name != "ivf":
        near, scanned = (index.search_within(codes[:4], 12, where, engine=engine) for engine in (name, "scan"))
        np.testing.assert_array_equal(near.ids, scanned.ids)
        np.testing.assert_array_equal(near.offsets, scanned.offsets)


@pytest.mark.parametrize("bits", [8, 24, 128, 1024])
@pytest.mark.parametrize("name", ["faiss", "torch"])
def test_exact_engines_at_other_code_lengths(tmp_path: Path, bits: int, name: str) -> None:
    codes = random_codes(200, bits)
    index = made(tmp_path, codes, 2, dead=10)
    for k in (1, 30):
        found, exact = (index.search(codes[:5], k, engine=engine) for engine in (name, "scan"))
        np.testing.assert_array_equal(found.ids, exact.ids)
        np.testing.assert_array_equal(found.distances, exact.distances)


@pytest.mark.parametrize(
    ("engine", "least"),
    [(engines.Ivf(probes=4), 0.6), (engines.Ivf(probes=10_000), 1.0), (engines.MultiHash(flips=1), 0.6)],
    ids=repr,
)
def test_approximate_engines_find_most(tmp_path: Path, engine: Engine, least: float) -> None:
    codes = clustered_codes(3000)
    index = made(tmp_path, codes, 2, dead=60)
    queries = clustered_codes(40, seed=0)
    found, exact = (index.search(queries, 10, engine=which) for which in (engine, "scan"))
    assert found.ids.shape == exact.ids.shape == (40, 10)
    assert least <= recall(found.distances, exact.distances).mean() <= 1
    # what is found is there, live, once, at its distance and in order
    ids = image_ids([str(row) for row in range(2940)])
    row_of = dict(zip(ids.tolist(), range(2940), strict=True))
    for q, query in enumerate(queries):
        rows = [row_of[id_] for id_ in found.ids[q].tolist()]
        assert len(set(rows)) == 10
        np.testing.assert_array_equal(np.bitwise_count(codes[rows] ^ query).sum(1), found.distances[q])
        pairs = list(zip(found.distances[q].tolist(), found.ids[q].tolist(), strict=True))
        assert pairs == sorted(pairs)


def test_approximate_engines_give_k_results_where_they_find_too_few(tmp_path: Path) -> None:
    """A hash table of far codes holds nothing near a query: the scan answers then."""
    codes = clustered_codes(400)
    index = made(tmp_path, codes, 2)
    far = random_codes(6, seed=77)
    exact = index.search(far, 30)
    found = index.search(far, 30, engine=engines.MultiHash(flips=0, piece=30))
    np.testing.assert_array_equal(found.ids, exact.ids)
    found = index.search(far, 399, engine=engines.Ivf(probes=1))
    assert found.ids.shape == (6, 399)
    assert (found.ids >= 0).all()


def test_a_radius_search_by_hash_tables_misses_nothing(tmp_path: Path) -> None:
    index = made(tmp_path, clustered_codes(1500), 2, dead=100)
    queries = clustered_codes(10, seed=0)
    for radius in (0, 2, 5, 11):
        found, exact = (index.search_within(queries, radius, engine=name) for name in ("multihash", "scan"))
        np.testing.assert_array_equal(found.ids, exact.ids)
        np.testing.assert_array_equal(found.distances, exact.distances)
    assert len(exact.ids) > 100


def test_what_is_built_is_kept_in_the_cache_and_checked(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = made(tmp_path, clustered_codes(500), 1)
    queries = clustered_codes(5, seed=0)
    built: list[int] = []
    own = faiss_engines._ivf
    monkeypatch.setattr(faiss_engines, "_ivf", lambda *args: built.append(1) or own(*args))
    first = index.search(queries, 5, engine="ivf")
    (file,) = (own_cache / "engines").iterdir()
    assert file.name.startswith(index.view.shards[0].digest("codes"))
    np.testing.assert_array_equal(open_index(index.uri).search(queries, 5, engine="ivf").ids, first.ids)
    assert len(built) == 1
    data = bytearray(file.read_bytes())
    for damaged in (bytes(data[:-100]), bytes(data[:200]) + b"\x01" + bytes(data[201:])):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(open_index(index.uri).search(queries, 5, engine="ivf").ids, first.ids)
    assert len(built) == 3


def test_an_engine_works_without_a_writable_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HASHDIST_CACHE", str(tmp_path / "file" / "cache"))
    index = made(tmp_path, clustered_codes(500), 1)
    assert index.search(random_codes(2), 5, engine="ivf").ids.shape == (2, 5)
    assert "cannot be written" in capsys.readouterr().err


def test_engines_in_eight_threads(tmp_path: Path) -> None:
    index = made(tmp_path, clustered_codes(600), 3, dead=50)
    queries = clustered_codes(8, seed=0)
    for name in ("scan", "faiss", "ivf", "multihash", "torch"):
        alone = open_index(index.uri).search(queries, 12, engine=name).ids
        fresh = open_index(index.uri)
        with ThreadPoolExecutor(8) as pool:
            for ids in pool.map(lambda _, i=fresh, e=name: i.search(queries, 12, engine=e).ids, range(16)):
                np.testing.assert_array_equal(ids, alone)


def test_recall_counts_what_is_as_near_as_the_last_of_the_exact() -> None:
    exact = np.array([[0, 1, 3, 3], [2, 2, 2, 2]], np.int32)
    found = np.array([[0, 3, 3, 4], [2, 2, 2, 2]], np.int32)
    np.testing.assert_array_equal(recall(found, exact), [0.75, 1.0])
    assert recall(np.empty((2, 0), np.int32), np.empty((2, 0), np.int32)).tolist() == [1, 1]


def test_engines_that_cannot_be_are_refused(tmp_path: Path) -> None:
    index = made(tmp_path, random_codes(10), 1)
    with pytest.raises(InvalidInput, match="one of scan, folded, faiss, ivf, multihash, torch, found 'annoy'"):
        index.search(random_codes(1), 1, engine="annoy")
    for ivf in ("ivf", engines.Ivf()):
        with pytest.raises(InvalidInput, match="ivf does not search by radius; use scan, folded, faiss, multihash"):
            index.search_within(random_codes(1), 1, engine=ivf)
    for wrong in (lambda: engines.Ivf(probes=0), lambda: engines.MultiHash(flips=-1)):
        with pytest.raises(InvalidInput, match="at least"):
            wrong()


def test_an_engine_takes_those_knobs_that_are_its_own() -> None:
    assert engines.find_engine("ivf", probes=3, k=9) == engines.Ivf(probes=3)
    assert engines.find_engine("scan", tables="off", probes=3) == engines.Scan(tables="off")
    assert engines.find_engine("folded", tables="off") == engines.Folded()
    own = engines.MultiHash(flips=4)
    assert engines.find_engine(own, flips=1) is own


@dataclass(frozen=True)
class Every(Engine):
    """An engine of one's own: it leaves all to the scan, and counts."""

    asked: list[int] = field(default_factory=list, compare=False)

    def nearest(self, view: View, queries_QW: Codes, k: int, where: filters.Filter | None) -> scan.Nearest:
        self.asked.append(len(queries_QW))
        return scanning.nearest(view, queries_QW, k, where)


def test_an_engine_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = made(tmp_path, clustered_codes(90), 2, dead=9)
    own, queries = Every(), random_codes(3)
    monkeypatch.setitem(engines.ENGINES, "every", Every)
    assert engines.find_engine("every") == own
    np.testing.assert_array_equal(index.search(queries, 5, engine=own).ids, index.search(queries, 5).ids)
    assert own.asked == [3]
    with pytest.raises(InvalidInput, match="does not search by radius; use another engine"):
        own.within(index.view, queries, 1, None)


def test_a_version_without_rows(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "index"), bits=64)
    for name in engines.ENGINES:
        assert index.search(random_codes(2), 3, engine=name).ids.shape == (2, 0)
        if name != "ivf":
            assert index.search_within(random_codes(2), 3, engine=name).offsets.tolist() == [0, 0, 0]
    assert index.search(random_codes(2), 3, where=filters.keys(["a"])).ids.shape == (2, 0)
