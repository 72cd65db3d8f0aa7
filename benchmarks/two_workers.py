"""Two gloo workers with one thread each against one worker with two: DSAH end to end on MobileNetV2; one JSON line.

The same global batch, so the two do the same work; what two workers lose is the exchange of outputs and gradients, and
waiting for each other. Images are random, prepared pixels in memory; weights are random. Each measurement trains two
short epochs in fresh processes and takes the second's images/s from the loop's own history; alternating, medians.

    python benchmarks/two_workers.py --batch 128 --size 96 --runs 3
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import in_turn, medians, options
from torch import distributed as dist
from torch import multiprocessing

from hashdist.ground.settings import FeatureSettings, PreprocessSettings, TrainSettings
from hashdist.methods import dsah
from hashdist.methods.contract import Graph, TrainingData
from hashdist.methods.parts.communicator import SingleProcess, TorchDistributed
from hashdist.models.networks import open_network
from hashdist.models.training import train

LIMIT = 0.85


def main() -> None:
    chosen = options(__doc__, batch=128, size=96, steps=4, runs=3, backbone="mobilenet_v2").parse_args()
    works = {workers: partial(images_per_s, workers, chosen) for workers in (1, 2)}
    runs = in_turn(chosen.runs, works, warm=False)
    middle = medians(runs)
    result = {
        "benchmark": "two_workers",
        **vars(chosen),
        "one_worker_two_threads": round(middle[1], 2),
        "two_workers_one_thread": round(middle[2], 2),
        "ratio": round(middle[2] / middle[1], 3),
        "limit": LIMIT,
        "runs": {str(workers): [round(v, 2) for v in values] for workers, values in runs.items()},
    }
    print(json.dumps(result))


def images_per_s(workers: int, chosen: argparse.Namespace) -> float:
    """Throughput of the whole group in the second epoch."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (workers, folder, chosen), nprocs=workers)  # type: ignore[no-untyped-call]
        return float((Path(folder) / "images_per_s").read_text())


def work(rank: int, workers: int, folder: str, chosen: argparse.Namespace) -> None:
    """One worker."""
    threads = 2 // workers
    torch.set_num_threads(threads)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    n = chosen.batch * chosen.steps
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, chosen.size, chosen.size, 3), np.uint8)
    indices = np.sort(rng.integers(0, n, (n, 20), dtype=np.int32), axis=1)
    graph = Graph(np.arange(n + 1, dtype=np.int64) * 20, indices.ravel())
    data = TrainingData(np.arange(n), images=lambda rows: torch.from_numpy(images[rows]), graph=graph)
    preprocess = PreprocessSettings(size=chosen.size)
    backbone = open_network(FeatureSettings(backbone=chosen.backbone, weights="random", preprocess=preprocess))
    options = {"rounds": 1, "epochs": 2, "batch": chosen.batch}
    settings = TrainSettings(mode="images", threads=threads, options=options)
    comm = TorchDistributed() if workers > 1 else SingleProcess()
    trained = train(dsah, data, settings, comm, save=lambda _: None, report=lambda _: None, backbone=backbone)
    if rank == 0:
        (Path(folder) / "images_per_s").write_text(str(trained.history[-1]["images_per_s"]))
    if workers > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
