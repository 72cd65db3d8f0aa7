"""The global similarity refresh of DSAH's third round against its bare blocked products; prints one JSON line.

Third round: two past rounds decide, with W0, which pairs are positive, so three products a pair. The bare products
are those three, over the same upper triangle in the same tiles on as many threads, without looking at the result.
Each n runs in a process of its own; memory is its peak above what it had after its imports, W0 included (random
rows of --neighbours entries). Exactness is shown at a small n against a dense W in integers.

    python benchmarks/refresh.py --sizes 25000 50000 100000 --threads 2
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from timing import medians, memory_bytes, options, timed
from torch import Tensor

from hashdist.ground.ranges import blocks
from hashdist.methods.parts.communicator import SingleProcess
from hashdist.methods.parts.similarity import ImplicitW, quantize

_ROWS, _COLUMNS, _ROUNDS = 512, 1024, 3


def main() -> None:
    parser = options(__doc__, sizes=[25_000, 50_000, 100_000], bits=64, neighbours=500, threads=2, runs=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.sizes[0], chosen)))
        return
    found = {str(n): run_apart(n) for n in chosen.sizes}
    largest = found[str(max(chosen.sizes))]
    figures = {"ratio": largest["ratio"], "memory_mb": largest["memory_mb"], "limits": {"ratio": 3.0, "memory_mb": 600}}
    print(json.dumps({"benchmark": "refresh", **vars(chosen), "exact": exact(), **figures, "n": found}))


def run_apart(n: int) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", "--sizes", str(n)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return found


def measure(n: int, chosen: argparse.Namespace) -> dict[str, float]:
    """Median seconds of the third round's refresh and of its bare products, alternating, and peak memory in MB."""
    before = memory_bytes("VmRSS")
    w = ImplicitW(*random_graph(n, chosen.neighbours))
    rounds = [quantize(clustered(n, chosen.bits, seed)) for seed in range(_ROUNDS)]
    for q in rounds[:-1]:
        w.refresh(q, 1.0, SingleProcess(), chosen.threads)
    past = w.state_dict()
    seconds: dict[str, list[float]] = {"refresh": [], "products": []}
    peak = 0
    for run in range(chosen.runs):
        w.load_state_dict(past)
        taken, found = timed(lambda: w.refresh(rounds[-1], 1.0, SingleProcess(), chosen.threads))
        seconds["refresh"].append(taken)
        if run == 0:
            peak = memory_bytes("VmHWM")
        seconds["products"].append(bare_products(rounds, chosen.threads))
    middle = medians(seconds)
    return {
        "refresh_s": round(middle["refresh"], 3),
        "products_s": round(middle["products"], 3),
        "ratio": round(middle["refresh"] / middle["products"], 3),
        "memory_mb": round((peak - before) / 1e6, 1),
        "positive_share": round(found.pairs / n / (n - 1), 4),
    }


def clustered(n: int, bits: int, seed: int) -> Tensor:
    """Hash-layer outputs like those of a half-trained network: tanh of 100 noisy centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(100, bits, generator=generator)
    return torch.tanh(centres[torch.arange(n) % 100] + torch.randn(n, bits, generator=generator))


def random_graph(n: int, neighbours: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Row pointers and sorted rows of `neighbours` random entries."""
    rng = np.random.default_rng(0)
    indices = np.empty((n, neighbours), np.int32)
    for start, stop in blocks(n, 4096):
        indices[start:stop] = np.sort(rng.integers(0, n, (stop - start, neighbours), dtype=np.int32), axis=1)
    return np.arange(n + 1, dtype=np.int64) * neighbours, indices.ravel()


def bare_products(rounds: list[Tensor], threads: int) -> float:
    """Seconds of the blocked products alone."""
    n = len(rounds[0])
    ready = [q.float() for q in rounds]

    def stripe(start: int) -> None:
        stop = min(start + _ROWS, n)
        tiles = [torch.empty(stop - start, _COLUMNS) for _ in rounds]
        for a in range(start, n, _COLUMNS):
            b = min(a + _COLUMNS, n)
            for x, tile in zip(ready, tiles, strict=True):
                torch.mm(x[start:stop], x[a:b].T, out=tile if b - a == _COLUMNS else tile[:, : b - a].contiguous())

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(stripe, range(0, n, _ROWS)))
    seconds = time.perf_counter() - started
    torch.set_num_threads(cores)
    return seconds


def exact(n: int = 2000, bits: int = 64) -> bool:
    """Whether thresholds of three rounds equal those of a dense W in integers."""
    dense = np.random.default_rng(0).random((n, n)) < 0.03
    dense |= dense.T
    np.fill_diagonal(dense, False)
    indptr = np.concatenate([[0], dense.sum(1).cumsum()])
    implicit = ImplicitW(indptr, np.nonzero(dense)[1].astype(np.int32))
    for seed in range(_ROUNDS):
        q = quantize(clustered(n, bits, seed))
        found = implicit.refresh(q, 1.0, SingleProcess())
        s = q.numpy().astype(np.int64) @ q.numpy().astype(np.int64).T
        values = s[dense] / 2.0**22
        threshold = np.ceil((values.mean() + values.std()) * 2**22)
        if found.pairs != dense.sum() or abs(found.threshold - threshold) > 1:
            return False
        dense |= s >= found.threshold
        np.fill_diagonal(dense, False)
    rows = np.arange(n)
    return bool(((implicit.block(rows).numpy() > 0) == (dense | np.eye(n, dtype=bool))).all())


if __name__ == "__main__":
    main()
