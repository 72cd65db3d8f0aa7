"""One DSAH step of the training loop against a plain loop: frozen mode, B = 50, one worker; prints one JSON line.

The plain loop has the same head, loss, W lookup and optimiser and nothing else: no ranks, rounds, terms, checkpoints
or reports. Both run without a DDP wrapper, as hashdist does. Alternating runs in one process; the ratio is that of
the medians.

    python benchmarks/dsah_step.py --width 4096 --threads 1
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from hashdist.communicator import SingleProcess
from hashdist.methods import dsah
from hashdist.methods.contract import Graph, TrainingData
from hashdist.order import permutation
from hashdist.settings import TrainSettings
from hashdist.similarity import ImplicitW
from hashdist.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--neighbours", type=int, default=500)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    data = random_data(chosen.steps * chosen.batch, chosen.width, chosen.neighbours)
    loops: dict[str, Callable[[], float]] = {
        "hashdist": lambda: hashdist_seconds(data, chosen),
        "plain": lambda: plain_seconds(data, chosen),
    }
    for loop in loops.values():
        loop()
    runs: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(chosen.runs):
        for name, loop in loops.items():
            runs[name].append(loop() / chosen.steps * 1e3)
    medians = {name: statistics.median(values) for name, values in runs.items()}
    print(
        json.dumps(
            {
                "benchmark": "dsah_step",
                **vars(chosen),
                "hashdist_ms": round(medians["hashdist"], 3),
                "plain_ms": round(medians["plain"], 3),
                "ratio": round(medians["hashdist"] / medians["plain"], 3),
                "limit": 1.15,
                "runs_ms": {name: [round(v, 3) for v in values] for name, values in runs.items()},
            }
        )
    )


def random_data(n: int, width: int, neighbours: int) -> TrainingData:
    """Random features and a random graph of the given degree."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((n, width), np.float32)
    indices = np.sort(rng.integers(0, n, (n, neighbours), dtype=np.int32), axis=1)
    graph = Graph(np.arange(n + 1, dtype=np.int64) * neighbours, indices.ravel())
    return TrainingData(np.arange(n, dtype=np.int64), features=features, graph=graph)


def hashdist_seconds(data: TrainingData, chosen: argparse.Namespace) -> float:
    """Wall time of one epoch in the training loop, from its own history."""
    options = {"rounds": 1, "epochs": 1, "batch": chosen.batch}
    settings = TrainSettings(bits=chosen.bits, threads=chosen.threads, options=options)
    trained = train(dsah, data, settings, SingleProcess(), save=lambda _: None, report=lambda _: None)
    return float(trained.history[0]["seconds"])


def plain_seconds(data: TrainingData, chosen: argparse.Namespace) -> float:
    """Wall time of the same steps, written out."""
    settings = dsah.PRESETS["paper"]
    head = dsah.Head(chosen.width, chosen.bits, torch.Generator().manual_seed(0))
    assert data.features is not None
    assert data.graph is not None
    head.standardize.fit(data.features, settings.feature_length)
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr, fused=True)
    w = ImplicitW(data.graph.indptr, data.graph.indices)
    features = torch.from_numpy(data.features)
    order = permutation(data.n, 0, 0)
    started = time.perf_counter()
    for step in range(chosen.steps):
        rows = order[step * chosen.batch : (step + 1) * chosen.batch]
        z = head(features[torch.from_numpy(rows)])["z"]
        pair, quantisation = dsah.global_loss(z, w.block(rows), settings)
        loss = pair + settings.lambda_ * quantisation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
