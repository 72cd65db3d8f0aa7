"""Exact tie-expected mAP@ALL against the top-100 search of faiss, and against sorting every row.

    python benchmarks/evaluation.py --rows 10000000 --queries 1000 --bits 64 --classes 100 --threads 2 --repeats 3

Three things on the same random codes and labels, on the same threads:

- ours: histograms of all and of relevant rows by distance, and tie-expected mAP over the whole ranking;
- faiss: `IndexBinaryFlat.search` of the same queries for k = 100, which evaluates nothing. Runs alternate with ours,
  and the ratio is the median of those of each pair of runs;
- sorting, as the released evaluations do it: per query the product of +-1 codes, the relevance of every row, `argsort`,
  precision at each relevant place (one order of the ties); and the same by the best that numpy has for it, popcounts
  and a radix sort of 16-bit distances. Both are measured on `--sort-rows` rows and `--sort-queries` queries and scaled
  to all rows and queries IN PROPORTION, in favour of sorting, whose time grows faster than that.

Ours is checked against numpy's own counts on a sample. Prints one JSON line.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from timing import Work, in_turn, options, quotients, timed

from hashdist.evaluation import ranking
from hashdist.nearest import scan

_K = 100


def main() -> None:
    arguments = _arguments()
    rng = np.random.default_rng(0)
    codes_NW = rng.integers(0, 256, (arguments.rows, arguments.bits // 8), dtype=np.uint8)
    queries_QW = rng.integers(0, 256, (arguments.queries, arguments.bits // 8), dtype=np.uint8)
    labels_NM = _labels(rng, arguments.rows, arguments)
    wanted_QM = _labels(rng, arguments.queries, arguments)
    faiss.omp_set_num_threads(arguments.threads)
    index = faiss.IndexBinaryFlat(arguments.bits)
    index.add(codes_NW)

    def evaluate() -> float:
        histograms = scan.histograms(codes_NW, queries_QW, labels_NM, wanted_QM, threads=arguments.threads)
        return float(ranking.tie_expected_ap(histograms).mean())

    _check(codes_NW, queries_QW, labels_NM, wanted_QM)  # compiles
    index.search(queries_QW[:8], _K)
    works: dict[str, Work] = {
        "ours": lambda: timed(evaluate),
        "faiss": lambda: timed(lambda: index.search(queries_QW, _K)),
    }
    found = in_turn(arguments.repeats, works, warm=False)
    ours, peer = ([seconds for seconds, _ in runs] for runs in found.values())
    value = found["ours"][-1][1]
    part = (codes_NW[: arguments.sort_rows], labels_NM[: arguments.sort_rows])
    asked = (queries_QW[: arguments.sort_queries], wanted_QM[: arguments.sort_queries])
    scale = arguments.rows * arguments.queries / (len(part[0]) * len(asked[0]))
    usual, radix = (scale * _seconds(ranked, part, asked, arguments) for ranked in (_by_product, _by_popcount))
    line = {
        "benchmark": "evaluation",
        "rows": arguments.rows,
        "queries": arguments.queries,
        "bits": arguments.bits,
        "classes": arguments.classes,
        "labels_per_row": arguments.labels,
        "threads": arguments.threads,
        "map_all_ties": value,
        "seconds": round(statistics.median(ours), 3),
        "faiss_top100_seconds": round(statistics.median(peer), 3),
        "ratio_to_faiss": round(statistics.median(quotients(ours, peer)), 3),
        "all_seconds": [round(s, 3) for s in ours],
        "all_faiss_seconds": [round(s, 3) for s in peer],
        "sorting_measured_on": [len(asked[0]), len(part[0])],
        "sorting_seconds_scaled": round(usual, 1),
        "times_as_fast_as_sorting": round(usual / statistics.median(ours), 1),
        "radix_sorting_seconds_scaled": round(radix, 1),
        "times_as_fast_as_radix_sorting": round(radix / statistics.median(ours), 1),
    }
    print(json.dumps(line))


def _arguments() -> argparse.Namespace:
    sizes = {"rows": 10_000_000, "queries": 1000, "bits": 64, "classes": 100}
    parser = options(__doc__, **sizes, sort_rows=1_000_000, sort_queries=10, threads=2, repeats=3)
    parser.add_argument("--labels", type=int, default=1, help="labels of a row, drawn with replacement")
    return parser.parse_args()


def _labels(rng: np.random.Generator, rows: int, arguments: argparse.Namespace) -> NDArray[np.uint64]:
    """Label masks uint64 [rows, ceil(classes / 64)]."""
    masks = np.zeros((rows, -(-arguments.classes // 64)), np.uint64)
    for _ in range(arguments.labels):
        drawn = rng.integers(0, arguments.classes, rows)
        masks[np.arange(rows), drawn >> 6] |= np.uint64(1) << (drawn & 63).astype(np.uint64)
    return masks


def _check(
    codes_NW: NDArray[np.uint8], queries_QW: NDArray[np.uint8], labels_NM: NDArray[Any], wanted_QM: NDArray[Any]
) -> None:
    """Counts of some queries over some rows, against numpy's."""
    some = slice(0, 100_000)
    got = scan.histograms(codes_NW[some], queries_QW[:5], labels_NM[some], wanted_QM[:5])
    for q in range(5):
        distances = np.bitwise_count(codes_NW[some] ^ queries_QW[q]).sum(1)
        relevant = (labels_NM[some] & wanted_QM[q]).any(1)
        for counts, kept in ((got[q, 0], distances), (got[q, 1], distances[relevant])):
            np.testing.assert_array_equal(counts, np.bincount(kept, minlength=got.shape[2]))


Order = Callable[[int], NDArray[np.int64]]


def _by_product(codes_NW: NDArray[np.uint8], queries_QW: NDArray[np.uint8]) -> Order:
    """Rows by distance as the released evaluations find them."""
    signs_NL, asked_QL = (2 * np.unpackbits(c, axis=1).astype(np.float32) - 1 for c in (codes_NW, queries_QW))
    return lambda q: np.argsort(0.5 * (signs_NL.shape[1] - signs_NL @ asked_QL[q]))


def _by_popcount(codes_NW: NDArray[np.uint8], queries_QW: NDArray[np.uint8]) -> Order:
    """Rows by distance as fast as numpy finds them."""
    word = next(size for size in (8, 4, 2, 1) if codes_NW.shape[1] % size == 0)
    words_NX, asked_QX = codes_NW.view(f"<u{word}"), queries_QW.view(f"<u{word}")
    return lambda q: np.argsort(np.bitwise_count(words_NX ^ asked_QX[q]).sum(1, dtype=np.uint16), kind="stable")


def _seconds(
    ranked: Callable[..., Order],
    part: tuple[NDArray[np.uint8], NDArray[np.uint64]],
    asked: tuple[NDArray[np.uint8], NDArray[np.uint64]],
    arguments: argparse.Namespace,
) -> float:
    """Median seconds of AP@ALL by sorting, a query a thread."""
    order = ranked(part[0], asked[0])

    def ap(q: int) -> float:
        ranks = np.flatnonzero((part[1] & asked[1][q]).any(1)[order(q)]) + 1
        return float((np.arange(1, len(ranks) + 1) / ranks).mean()) if len(ranks) else 0.0

    with threadpool_limits(1), ThreadPoolExecutor(arguments.threads) as pool:
        runs = [timed(lambda: list(pool.map(ap, range(len(asked[0]))))) for _ in range(arguments.repeats)]
    return statistics.median(seconds for seconds, _ in runs)


if __name__ == "__main__":
    main()
