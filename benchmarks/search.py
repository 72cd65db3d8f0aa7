"""Search through `open_index(...).search`, against faiss and the machine: one query, many, a batch, and by radius.

    python benchmarks/search.py one many --bits 64 --rows 10000000
    python benchmarks/search.py one --bits 32 128 256 --rows 10000000
    python benchmarks/search.py collisions --bits 32 --rows 10000000
    python benchmarks/search.py batch --rows 1000000 --batch 100000 --batch-k 1000 --runs 3
    python benchmarks/search.py radius --rows 10000000 --features features.npz
    python benchmarks/search.py degenerate --rows 10000000

Every case builds an index of `--shards` shards (ids and keys are random, so ids of the shards lie between one
another's) of which `--dead` of the rows are hidden by a tombstone, opens it, compiles the kernels, compares the first
answers with faiss's, and then measures ours and the peers in turn, `--runs` times, on `--threads` threads. Peers:

- one: faiss `IndexBinaryFlat` over the live codes, and reading the codes alone (exclusive or of their words, same
  threads). A run is `--singles` queries, one after the other.
- many: faiss; and a kernel that only counts differing bits and adds them up, one thread.
- collisions: as many, of codes that occur `--collisions` times each in the mean, by the scan and folded.
- batch: faiss.
- radius: the same search with the tables off (the scan). Queries are stored codes with up to `--radius` bits turned, of
  random codes and, with `--features` (an .npz of `x` [N, D]), of ITQ codes: the features, projected, are repeated with
  normal noise of `--noise` of their own spread until there are as many. Build time and bytes of the tables are given.
- degenerate: codes that are all equal, and three distinct ones, against random ones.

Prints one JSON line per measurement: medians and [lowest, highest] of the runs in milliseconds, and ratios of runs that
followed each other as [median, lowest, highest].
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from timing import Work, milliseconds, options, ratios, seconds_in_turn, timed

from hashdist.index import Index, create_index, open_index
from hashdist.index.manifest import stamp, successor
from hashdist.index.search import tables
from hashdist.index.shards.shard import Rows, write_ids, write_shard
from hashdist.index.view import View
from hashdist.methods import itq
from hashdist.nearest import scan
from hashdist.nearest.kernel import kernel, load

Codes = NDArray[np.uint8]
_K = 100


def main() -> None:
    a = _arguments()
    faiss.omp_set_num_threads(a.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])
    with tempfile.TemporaryDirectory(prefix="hashdist-search-", dir=a.folder) as folder:
        os.environ["HASHDIST_CACHE"] = f"{folder}/cache"
        for bits in a.bits:
            for case in a.cases:
                for line in CASES[case](a, bits, Path(folder)):
                    about = {"benchmark": "search", "case": case, "bits": bits, "shards": a.shards, "dead": a.dead}
                    print(json.dumps({**about, "threads": a.threads, "runs": a.runs, **line}), flush=True)


def one(a: argparse.Namespace, bits: int, folder: Path) -> Iterator[dict[str, Any]]:
    codes = random_codes(a.rows, bits)
    index, live, queries = build(a, codes, folder), _flat(_live(codes, a)), random_codes(a.singles, bits, seed=2)
    _check(index, live, queries, _K)
    each = [queries[q : q + 1] for q in range(len(queries))]
    works: dict[str, Work] = {
        "ours": lambda: [index.search(query, _K) for query in each],
        "faiss": lambda: [live.search(query, _K) for query in each],
        "read": lambda: [_read(index, a.threads) for _ in each],
    }
    times = seconds_in_turn(a.runs, works)
    times = {name: [seconds / len(each) for seconds in own] for name, own in times.items()}
    yield {
        "rows": a.rows, "queries": 1, "k": _K, **milliseconds(times),
        "times_as_fast_as_faiss": ratios(times["faiss"], times["ours"]),
        "read_gb_per_s": round(codes.nbytes / statistics.median(times["read"]) / 1e9, 2),
        "share_of_read_bandwidth": ratios(times["read"], times["ours"]),
    }  # fmt: skip


def many(a: argparse.Namespace, bits: int, folder: Path) -> Iterator[dict[str, Any]]:
    yield _many(a, random_codes(a.rows, bits), random_codes(a.queries, bits, seed=2), folder)


def collisions(a: argparse.Namespace, bits: int, folder: Path) -> Iterator[dict[str, Any]]:
    distinct = random_codes(max(1, int(a.rows / a.collisions)), bits)
    drawn = np.random.default_rng(3).integers(0, len(distinct), a.rows + a.queries)
    codes = distinct[drawn]
    for engine in ("scan", "folded"):
        line = _many(a, codes[: a.rows], codes[a.rows :], folder, engine)
        per_code = round(a.rows / len(np.unique(drawn[: a.rows])), 2)
        yield {"engine": engine, "rows_per_distinct_code": per_code, **line}


def _many(a: argparse.Namespace, codes: Codes, queries: Codes, folder: Path, engine: str = "scan") -> dict[str, Any]:
    index, live = build(a, codes, folder), _flat(_live(codes, a))
    _check(index, live, queries[:8], _K)
    words = scan.in_words(queries)
    part = np.ascontiguousarray(codes[: max(1, a.rows // 16)])
    count = partial(_count_only, part.ctypes.data, len(part), words, (0,) * words.shape[1])
    count()
    building, _ = timed(lambda: index.search(queries[:1], _K, engine=engine))  # builds what the engine needs
    works: dict[str, Work] = {
        "ours": lambda: index.search(queries, _K, engine=engine),
        "faiss": lambda: live.search(queries, _K),
        "count_only": count,
    }
    times = seconds_in_turn(a.runs, works)
    pairs, counted = a.rows * len(queries), len(part) * len(queries)
    return {
        "rows": a.rows, "queries": len(queries), "k": _K, "first_search_s": round(building, 3), **milliseconds(times),
        "times_as_fast_as_faiss": ratios(times["faiss"], times["ours"]),
        "codes_per_s_per_core": round(pairs / statistics.median(times["ours"]) / a.threads),
        "codes_per_s_per_core_of_counting_alone": round(counted / statistics.median(times["count_only"])),
    }  # fmt: skip


def batch(a: argparse.Namespace, bits: int, folder: Path) -> Iterator[dict[str, Any]]:
    codes, queries = random_codes(a.rows, bits), random_codes(a.batch, bits, seed=2)
    index, live = build(a, codes, folder), _flat(_live(codes, a))
    _check(index, live, queries[:8], a.batch_k)
    works = {"ours": lambda: index.search(queries, a.batch_k), "faiss": lambda: live.search(queries, a.batch_k)}
    times = seconds_in_turn(a.runs, works)
    yield {
        "rows": a.rows, "queries": a.batch, "k": a.batch_k, **milliseconds(times),
        "times_as_fast_as_faiss": ratios(times["faiss"], times["ours"]),
    }  # fmt: skip


def by_radius(a: argparse.Namespace, bits: int, folder: Path) -> Iterator[dict[str, Any]]:
    kinds = {"random": lambda: random_codes(a.rows, bits)}
    if a.features:
        kinds["itq"] = lambda: _trained(a, bits)
    for kind, codes_of in kinds.items():
        codes = codes_of()
        index = build(a, codes, folder)
        building, _ = timed(partial(index.search_within, codes[:1], a.radius, tables="on"))
        held = [tables.tables_of(shard, 0, "on") for shard in index.view.shards]
        for count in (1, a.queries):
            runs = [_near(codes, count, a.radius, seed) for seed in range(a.singles if count == 1 else 1)]
            for queries in runs:
                with_tables, scanned = (index.search_within(queries, a.radius, tables=use) for use in ("on", "off"))
                np.testing.assert_array_equal(with_tables.ids, scanned.ids)
            each = partial(_each_within, index, runs, a.radius)
            times = seconds_in_turn(a.runs, {"ours": partial(each, "on"), "scan": partial(each, "off")})
            times = {name: [seconds / len(runs) for seconds in own] for name, own in times.items()}
            found = sum(len(index.search_within(queries, a.radius).ids) for queries in runs)
            yield {
                "codes": kind, "rows": a.rows, "distinct_codes": len(np.unique(_whole(codes))), "queries": count,
                "radius": a.radius, "found_per_query": round(found / (count * len(runs)), 2), **milliseconds(times),
                "times_as_fast_as_scan": ratios(times["scan"], times["ours"]), "build_s": round(building, 3),
                "tables_bytes": sum(table.data.nbytes for table in held if table), "codes_bytes": codes.nbytes,
            }  # fmt: skip


def _each_within(index: Index, runs: list[Codes], radius: int, tables: Any) -> None:
    for queries in runs:
        index.search_within(queries, radius, tables=tables)


def degenerate(a: argparse.Namespace, bits: int, folder: Path) -> Iterator[dict[str, Any]]:
    random = random_codes(a.rows, bits)
    drawn = np.random.default_rng(3).integers(0, 3, a.rows)
    kinds = {"random": random, "equal": random[:1].repeat(a.rows, axis=0), "three": random[drawn]}
    indexes = {kind: build(a, codes, folder) for kind, codes in kinds.items()}
    for count in (1, a.queries):
        queries = random_codes(count, bits, seed=2)
        works: dict[str, Work] = {
            kind: partial(_repeat, partial(index.search, queries, _K), a.singles if count == 1 else 1)
            for kind, index in indexes.items()
        }
        times = seconds_in_turn(a.runs, works)
        for kind in ("equal", "three"):
            yield {
                "codes": kind, "rows": a.rows, "queries": count, "k": _K, **milliseconds(times),
                "time_over_that_of_random": ratios(times[kind], times["random"]),
            }  # fmt: skip


CASES: dict[str, Callable[[argparse.Namespace, int, Path], Iterator[dict[str, Any]]]] = {
    "one": one, "many": many, "collisions": collisions, "batch": batch, "radius": by_radius, "degenerate": degenerate,
}  # fmt: skip


def _arguments() -> argparse.Namespace:
    sizes = {"bits": [64], "rows": 1_000_000, "queries": 256, "batch": 10_000, "batch_k": 1000, "shards": 8}
    kinds = {"collisions": 10.0, "radius": 2, "noise": 0.2, "dead": 0.01}
    parser = options(__doc__, **sizes, **kinds, threads=2, runs=7)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--singles", type=int, default=10, help="single queries in a run")
    parser.add_argument("--features", type=Path)
    parser.add_argument("--folder", help="where the indexes are written; a temporary folder by default")
    return parser.parse_args()


# Codes and indexes


def random_codes(rows: int, bits: int, seed: int = 1) -> Codes:
    return np.random.default_rng(seed).integers(0, 256, (rows, bits // 8), dtype=np.uint8)


def _trained(a: argparse.Namespace, bits: int) -> Codes:
    """ITQ codes of the features, repeated with noise."""
    rng = np.random.default_rng(4)
    features = np.load(a.features)["x"].astype(np.float32)
    rotated = itq.fit(features, bits, 0)(features)
    spread = np.sqrt((rotated**2).mean()) * a.noise
    made = [np.packbits(rotated >= 0, axis=1, bitorder="little")]
    while sum(map(len, made)) < a.rows:
        noisy = rotated + rng.standard_normal(rotated.shape, np.float32) * spread
        made.append(np.packbits(noisy >= 0, axis=1, bitorder="little"))
    codes: Codes = np.concatenate(made)[: a.rows]
    return codes[rng.permutation(a.rows)]


def _near(codes: Codes, count: int, most: int, seed: int) -> Codes:
    """Stored codes with up to so many bits turned."""
    rng = np.random.default_rng(10 + seed)
    queries = codes[rng.integers(0, len(codes), count)]
    for q in range(count):
        for bit in rng.integers(0, 8 * codes.shape[1], rng.integers(0, most + 1)):
            queries[q, bit >> 3] ^= 1 << (bit & 7)
    return queries


def _dead(a: argparse.Namespace) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(5).permutation(a.rows)[: int(a.dead * a.rows)])


def _live(codes: Codes, a: argparse.Namespace) -> Codes:
    return np.delete(codes, _dead(a), axis=0)


def build(a: argparse.Namespace, codes: Codes, folder: Path) -> Index:
    """An index of these codes in a new folder, written and committed as the index stage does, then opened."""
    index = create_index(tempfile.mkdtemp(dir=folder), 8 * codes.shape[1])
    ids = np.unique(np.random.default_rng(6).integers(0, 1 << 62, 2 * len(codes)))
    ids = np.random.default_rng(7).permutation(ids)[: len(codes)]
    names, shards = index.versions.new_attempt(), []
    for number in range(a.shards):
        rows = slice(number * len(codes) // a.shards, (number + 1) * len(codes) // a.shards)
        keys = pa.array(ids[rows]).cast(pa.string())
        part = Rows(ids[rows], codes[rows], keys, pa.table({}))
        shards.append(write_shard(index.store, partial(names.new, "shards"), part))
    index.publish(shards, bits=index.bits, salts={}, model="benchmark", model_uri="", lineage={})
    gone = np.sort(ids[_dead(a)])
    if len(gone):
        entry = write_ids(index.store, index.versions.new_attempt().new("tombstones", ".npy"), gone)

        def hide(view: View, _tried: int) -> dict[str, Any]:
            tombstones = stamp([entry], view.number + 1)
            return successor(view.version, "delete", {"tombstones": tombstones, "rows": len(codes) - len(gone)})

        index.transact(hide)
    return open_index(index.uri)


def _flat(codes: Codes) -> Any:
    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(codes)
    return index


def _check(index: Index, flat: Any, queries: Codes, k: int) -> None:
    np.testing.assert_array_equal(index.search(queries, k).distances, np.sort(flat.search(queries, k)[0], axis=1))


def _whole(codes: Codes) -> NDArray[Any]:
    return np.ascontiguousarray(codes).view(f"V{codes.shape[1]}").ravel()


# Peers


@kernel
def _xor(address, words, like):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for w in range(words):
        total ^= load(address, w, like)
    return total


@kernel
def _count_only(codes, rows, queries, form):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for start in range(0, rows, 512):
        for q in range(len(queries)):
            for r in range(start, min(start + 512, rows)):
                total += np.uint64(scan.distance_to(codes, r, queries, q, form, ()))
    return total


_WORDS = np.empty(0, np.uint64)
_pool: list[ThreadPoolExecutor] = []


def _read(index: Index, threads: int) -> int:
    """Read the codes of all shards, each thread its share of the bytes."""
    if not _pool:
        _pool.append(ThreadPoolExecutor(threads))
    arrays = [shard.codes for shard in index.view.shards]

    def share(number: int) -> int:
        total = 0
        for array in arrays[number::threads]:
            total ^= int(_xor(array.ctypes.data, array.nbytes // 8, _WORDS))
        return total

    return sum(_pool[0].map(share, range(threads)))


def _repeat(work: Work, times: int) -> None:
    for _ in range(times):
        work()


if __name__ == "__main__":
    main()
