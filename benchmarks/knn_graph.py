"""Exact cosine neighbours of n rows against `faiss.knn` on the same rows normalised, both on the same threads.

    python benchmarks/knn_graph.py --n 20000 --width 1280 --k 500 --threads 2 --repeats 5

Rows are made up: `pooled` like the pooled activations of a network (not negative, of low rank and noise, in ten
groups), `gaussian` without structure; or those of a .npy file (float16 or float32 [n, D]). Runs alternate, medians
count. Equality is that of a float64 search over a sample of rows. W0 is timed on one thread. Prints one JSON line.
"""

import argparse
import json
import statistics
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from timing import Work, in_turn, options, quotients, timed

from hashdist.nearest.cosine import Lists, score_error, self_nearest
from hashdist.nearest.shared import initial_similarity, inverted_lists, symmetric

_CHECKED_ROWS = 500


def main() -> None:
    arguments = _arguments()
    features_ND = _features(arguments)
    n, width = features_ND.shape
    unit_ND = features_ND.astype(np.float32)
    unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), 1e-30)
    faiss.omp_set_num_threads(arguments.threads)
    self_nearest(features_ND[: 2 * arguments.k], arguments.k, threads=arguments.threads)  # compiles
    k, metric = arguments.k, faiss.METRIC_INNER_PRODUCT
    works: dict[str, Work] = {
        "ours": lambda: timed(lambda: self_nearest(features_ND, k, threads=arguments.threads)),
        "faiss": lambda: timed(lambda: faiss.knn(unit_ND, unit_ND, k + 1, metric=metric)),
    }
    found = in_turn(arguments.repeats, works, warm=False)
    ours, peer = ([seconds for seconds, _ in runs] for runs in found.values())
    lists, (_, peers) = found["ours"][-1][1], found["faiss"][-1][1]
    line = {
        "benchmark": "knn_graph",
        "n": n,
        "width": width,
        "dtype": str(features_ND.dtype),
        "k": arguments.k,
        "threads": arguments.threads,
        "data": arguments.data,
        "seconds": round(statistics.median(ours), 3),
        "faiss_seconds": round(statistics.median(peer), 3),
        "ratio": round(statistics.median(quotients(peer, ours)), 3),
        "gflops": round(2e-9 * n * n * width / statistics.median(ours)),
        "faiss_gflops": round(2e-9 * n * n * width / statistics.median(peer)),
        "rescored_share": round(lists.rescored / (n * arguments.k), 4),
        "score_error": score_error(width),
        **_agreement(features_ND, lists, peers),
        **_w0(lists.rows_MK, arguments.k),
    }
    print(json.dumps(line))


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, n=20_000, width=1280, k=500, threads=2, repeats=5)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--data", default="pooled", help="pooled, gaussian, or a .npy file")
    return parser.parse_args()


def _features(arguments: argparse.Namespace) -> NDArray[Any]:
    if arguments.data.endswith(".npy"):
        loaded: NDArray[Any] = np.load(arguments.data, mmap_mode="r")
        return loaded[: arguments.n]
    rng = np.random.default_rng(0)
    noise_ND = rng.standard_normal((arguments.n, arguments.width), dtype=np.float32)
    if arguments.data == "gaussian":
        return noise_ND.astype(arguments.dtype)
    latent = rng.standard_normal((10, 64))[rng.integers(0, 10, arguments.n)] + rng.standard_normal((arguments.n, 64))
    features_ND = np.abs(latent @ rng.standard_normal((64, arguments.width)) / 8 + 0.5 * noise_ND)
    return np.minimum(features_ND, 6).astype(arguments.dtype)


def _agreement(features_ND: NDArray[Any], lists: Lists, peers_NK: NDArray[np.int64]) -> dict[str, Any]:
    """Places that equal those of a float64 search, over a sample of rows; for faiss as well."""
    wide_ND = features_ND.astype(np.float64)
    wide_ND /= np.maximum(np.linalg.norm(wide_ND, axis=1, keepdims=True), 1e-300)
    n, k = lists.rows_MK.shape
    rows = np.random.default_rng(1).choice(n, min(n, _CHECKED_ROWS), replace=False)
    scores = wide_ND[rows] @ wide_ND.T
    scores[np.arange(len(rows)), rows] = -2
    exact = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    others = np.array([[j for j in peers_NK[row] if j != row][:k] for row in rows])
    return {
        "rows_checked": len(rows),
        "rows_equal_to_float64": int((lists.rows_MK[rows] == exact).all(axis=1).sum()),
        "faiss_rows_equal_to_float64": int((others == exact).all(axis=1).sum()),
    }


def _w0(neighbours_NK: NDArray[np.int32], k2: int) -> dict[str, Any]:
    """Seconds of W0 on one thread, after a first call that compiles."""
    inverted = inverted_lists(neighbours_NK)
    symmetric(initial_similarity(neighbours_NK, inverted, k2, (0, 1), threads=1), "none")
    seconds, w = timed(
        lambda: symmetric(initial_similarity(neighbours_NK, inverted_lists(neighbours_NK), k2, threads=1), "or")
    )
    return {
        "w0_seconds_one_thread": round(seconds, 2),
        "w0_edges_per_row": round(len(w.indices) / len(neighbours_NK), 1),
    }


if __name__ == "__main__":
    main()
