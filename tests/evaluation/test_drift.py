"""Drift of an increment by codes: silent on more of the same, loud on another kind, by numbers computed plainly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hashdist.evaluation.drift import FAR, LEAN, SHIFT, measure
from hashdist.evaluation.probes import read_probes, smallest, write_probes
from hashdist.ground import exporting, telemetry
from hashdist.ground.bits import hamming, pack, unpack
from hashdist.index import Index, create_index

Codes = NDArray[np.uint8]
BITS, WIDTH, KINDS = 64, 32, 8
_rng = np.random.default_rng(0)
_DIRECTIONS = _rng.standard_normal((WIDTH, BITS))
_CENTRES = _rng.standard_normal((KINDS + 4, WIDTH)) * 1.2


def images(n: int, seed: int, kinds: range = range(KINDS)) -> Codes:
    """Codes, by a fixed hash, of images of some kinds."""
    rng = np.random.default_rng(seed)
    features = _CENTRES[rng.choice(list(kinds), n)] + rng.standard_normal((n, WIDTH))
    return pack((features - _CENTRES[:KINDS].mean(0)) @ _DIRECTIONS)


@pytest.fixture(scope="module")
def old() -> Codes:
    return images(4000, 1)


@pytest.fixture(scope="module")
def index(old: Codes, tmp_path_factory: pytest.TempPathFactory) -> Index:
    made = create_index(tmp_path_factory.mktemp("drift").as_uri(), BITS)
    made.append(old[:2500], [f"k{i}" for i in range(2500)])
    made.append(old[2500:], [f"k{i}" for i in range(2500, 4000)])
    return made


@pytest.mark.parametrize("rows", [20, 100, 1000, 5000])
def test_more_of_the_same_is_no_drift(index: Index, rows: int) -> None:
    for seed in range(5):
        found = measure(index.view, images(rows, 100 + seed))
        assert not found["retrain_recommended"], found["text"]
        assert found["score"] < 0.8
        assert found["text"].startswith(f"drift: the bits of {rows} new images moved by ")


@pytest.mark.parametrize("rows", [100, 1000, 5000])
def test_other_kinds_and_noise_are_drift(index: Index, rows: int) -> None:
    for seed in range(5):
        found = measure(index.view, images(rows, 200 + seed, range(KINDS, KINDS + 4)))
        assert found["retrain_recommended"], found["text"]
        assert found["text"].startswith("retrain recommended: ")
        noise = np.random.default_rng(seed).integers(0, 256, (rows, BITS // 8), dtype=np.uint8)
        far = measure(index.view, noise)
        assert far["retrain_recommended"]
        assert far["nearest"]["far"] > FAR > far["shift"]


@pytest.mark.parametrize("rows", [100, 1000])
def test_an_increment_of_one_known_kind_is_no_drift(index: Index, rows: int) -> None:
    for kind in range(KINDS):
        found = measure(index.view, images(rows, 300 + kind, range(kind, kind + 1)))
        assert found["shift"] > SHIFT
        assert found["nearest"]["lean"] < LEAN
        assert not found["retrain_recommended"], found["text"]


def test_the_numbers_are_what_they_say(index: Index, old: Codes) -> None:
    """Against plain numpy, for a case where all old rows are looked at."""
    new = images(400, 9, range(2, KINDS + 2))
    found = measure(index.view, new)
    p, q = unpack(old).mean(0), unpack(new).mean(0)
    np.testing.assert_allclose(found["means"]["before"], p, atol=6e-4)
    np.testing.assert_allclose(found["means"]["new"], q, atol=6e-4)
    assert found["shift"] == pytest.approx(np.sqrt(max(0, ((q - p) ** 2 - p * (1 - p) / 400).mean())), abs=1e-3)
    entropy = -(q * np.log2(q) + (1 - q) * np.log2(1 - q)).mean()
    assert found["entropy"]["new"] == pytest.approx(entropy, abs=1e-3)
    off = ~np.eye(BITS, dtype=bool)
    r = np.corrcoef(unpack(new).T)[off]
    assert found["correlation"]["new"] == pytest.approx(np.sqrt((r**2).mean()), abs=1e-3)
    nearest = np.array([hamming(code, old).min() for code in new])
    assert found["nearest"]["new"] == pytest.approx(nearest.mean(), abs=1e-3)
    places = smallest(index.view, 500)
    rows = [int(index.view.keys_of(places.ids[i : i + 1])[0][1:]) for i in range(500)]
    others = np.array([np.delete(hamming(old[row], old), row).min() for row in rows])
    assert found["nearest"]["before"] == pytest.approx(others.mean(), abs=1e-3)
    assert found["nearest"]["far"] == pytest.approx((nearest > np.quantile(others, 0.95)).mean(), abs=1e-3)


def test_too_little_is_not_measured(index: Index, tmp_path: Path) -> None:
    for view, new in (
        (index.view, images(9, 0)),
        (create_index(tmp_path.as_uri(), BITS).view, images(100, 0)),
    ):
        found = measure(view, new)
        assert (found["score"], found["retrain_recommended"]) == (None, False)
        assert "not measured: 10 new rows and 200 old ones are needed" in found["text"]


def test_equal_and_constant_codes_are_measured(tmp_path: Path) -> None:
    index = create_index(tmp_path.as_uri(), 16)
    index.append(np.full((300, 2), 5, np.uint8), [f"k{i}" for i in range(300)])
    assert not measure(index.view, np.full((50, 2), 5, np.uint8))["retrain_recommended"]
    assert measure(index.view, np.full((50, 2), 250, np.uint8))["retrain_recommended"]


def test_drift_is_exported(index: Index) -> None:
    seen: list[tuple[str, float, Any]] = []

    class Sink:
        def observe(self, metric: telemetry.Metric, value: float, labels: dict[str, str]) -> None:
            seen.append((metric.name, value, labels.get("number")))

    with exporting.Exported(Sink()):
        found = measure(index.view, images(200, 3, range(KINDS, KINDS + 4)))
    drift = {number: value for name, value, number in seen if name == "hashdist_index_drift"}
    assert drift["score"] == pytest.approx(found["score"], abs=1e-3)
    assert drift["shift"] == pytest.approx(found["shift"], abs=1e-3)
    assert "hashdist_index_retrain_recommended_total" in [name for name, _, _ in seen]


def test_the_smallest_ids_of_what_is_alive(index: Index, old: Codes, tmp_path: Path) -> None:
    made = create_index(tmp_path.as_uri(), BITS)
    for start in range(0, 600, 200):
        made.append(old[start : start + 200], [f"k{i}" for i in range(start, start + 200)])
    gone = [f"k{i}" for i in range(0, 600, 7)]
    made.delete(gone)
    alive = np.sort(np.concatenate([table["id"].to_numpy() for table in made.tables([])]))
    for count in (1, 50, 5000):
        places = smallest(made.view, count)
        np.testing.assert_array_equal(places.ids, alive[:count])
        again = made.view.locate(places.ids)
        np.testing.assert_array_equal((places.shards, places.rows), (again.shards, again.rows))


def test_a_probe_set_is_read_as_it_was_written(index: Index) -> None:
    ids, near = np.arange(10, dtype=np.int64) * 1000, np.arange(12, dtype=np.int64).reshape(3, 4) * 1000
    for neighbours in (near, np.empty((0, 0), np.int64)):
        written = write_probes(index.store, index.versions.new_name("probes", ".parquet"), ids, neighbours, {"a": 1})
        read = read_probes(index.store, written.entry)
        np.testing.assert_array_equal(read.ids, ids)
        np.testing.assert_array_equal(read.neighbours_QK, neighbours)
        assert read.made_by == {"a": 1}
