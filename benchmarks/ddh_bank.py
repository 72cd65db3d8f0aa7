"""One DDH training step against all n images, bank in closed form, at two n; prints one JSON line.

Frozen mode, synthetic features and a synthetic graph of --positives a row, made directly. Short stretches of --steps
steps alternate between the two, after one that is not counted, so that both see the same machine. The ratio is that of
the medians.

    python benchmarks/ddh_bank.py --sizes 100000 1000000 --threads 1
"""

import argparse
import json
from functools import partial

import numpy as np
import torch
from timing import medians, options, seconds_in_turn

from hashdist.ground.permutation import epoch_batches
from hashdist.ground.ranges import blocks
from hashdist.methods import ddh
from hashdist.methods.contract import Batch, Graph, Place, TrainingData
from hashdist.methods.parts.communicator import SingleProcess

LIMIT = 1.2


def main() -> None:
    parser = options(__doc__, runs=25, batch=128, width=128, bits=64, positives=100, threads=1)
    parser.add_argument("--sizes", type=int, nargs=2, default=[100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=50, help="of one timed stretch")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    loops = {n: Steps(random_data(n, chosen.width, chosen.positives), chosen) for n in chosen.sizes}
    seconds = seconds_in_turn(chosen.runs, {n: partial(loop.go, chosen.steps) for n, loop in loops.items()})
    runs = {n: [value / chosen.steps * 1e3 for value in values] for n, values in seconds.items()}
    small, large = medians(runs).values()
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
