"""One DDH training step against all n images, bank in closed form, at two n; prints one JSON line.

Frozen mode, synthetic features and a synthetic graph of --positives a row, made directly. Short stretches of --steps
steps alternate between the two, after one that is not counted, so that both see the same machine. The ratio is that of
the medians.

    python benchmarks/ddh_bank.py --sizes 100000 1000000 --threads 1
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from hashdist.ground.permutation import epoch_batches
from hashdist.ground.ranges import blocks
from hashdist.methods import ddh
from hashdist.methods.contract import Batch, Graph, Place, TrainingData
from hashdist.methods.parts.communicator import SingleProcess

LIMIT = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=[100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=50, help="of one timed stretch")
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--positives", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    loops = {n: Steps(random_data(n, chosen.width, chosen.positives), chosen) for n in chosen.sizes}
    runs: dict[int, list[float]] = {n: [] for n in chosen.sizes}
    for run in range(chosen.runs + 1):
        for n, loop in loops.items():
            started = time.perf_counter()
            loop.go(chosen.steps)
            if run:
                runs[n].append((time.perf_counter() - started) / chosen.steps * 1e3)
    small, large = (statistics.median(runs[n]) for n in chosen.sizes)
    figures = {"small_ms": round(small, 3), "large_ms": round(large, 3), "ratio": round(large / small, 3)}
    listed = {str(n): [round(v, 3) for v in values] for n, values in runs.items()}
    print(json.dumps({"benchmark": "ddh_bank", **vars(chosen), **figures, "limit": LIMIT, "runs_ms": listed}))


def random_data(n: int, width: int, positives: int) -> TrainingData:
    """Random features, and rows of positives that lie anywhere among the n: the worst case for caches."""
    rng = np.random.default_rng(0)
    indices = np.empty((n, positives), np.int32)
    for start, stop in blocks(n, 4096):
        indices[start:stop] = np.sort(rng.integers(0, n, (stop - start, positives), dtype=np.int32), axis=1)
    graph = Graph(np.arange(n + 1, dtype=np.int64) * positives, indices.ravel())
    return TrainingData(np.arange(n), rng.standard_normal((n, width), np.float32), graph=graph)


class Steps:
    """Optimiser steps of DDH one after the other, as the training loop takes them, without reports."""

    def __init__(self, data: TrainingData, chosen: argparse.Namespace) -> None:
        assert data.features is not None
        settings = ddh.Settings(batch=chosen.batch)
        self.head = ddh.Head(chosen.width, chosen.bits, torch.Generator().manual_seed(0))
        self.method = ddh.Method(settings, Place(chosen.bits, True, data, SingleProcess()))
        u_nL = torch.randn(data.n, chosen.bits, generator=torch.Generator().manual_seed(1))
        self.method.prepare(self.head, lambda: u_nL)
        self.optimizer = self.method.optimizer(self.head.parameters())
        self.features_nD = data.features
        self.batches, self.taken = epoch_batches(data.n, chosen.batch, 0, 0), 0

    def go(self, steps: int) -> None:
        """The next steps."""
        for _ in range(steps):
            rows = self.batches[self.taken % len(self.batches)]
            batch = Batch(rows, slice(0, len(rows)), (len(rows),), self.taken)
            outputs = self.head(torch.from_numpy(self.features_nD[rows]))
            self.optimizer.zero_grad(set_to_none=True)
            self.method.loss(outputs, batch).backward.backward()
            self.method.adjust(self.optimizer, batch.step)
            self.optimizer.step()
            self.taken += 1


if __name__ == "__main__":
    main()
