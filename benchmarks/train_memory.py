"""Memory of training workers with many images in the graph, frozen mode; prints one JSON line.

Synthetic features [n, --width] and a graph of --neighbours random positives a row, in .npy files that every worker
maps, as the training stage does. Each worker is a process of its own (gloo where there are several); what counts is
the peak of its anonymous memory above what it had after its imports. Pages of the mapped files are said separately:
the system takes them back when it needs them. DSAH has two rounds, so that the refresh after the first scans W0. The
batch is larger than the papers', only to make an epoch short, and a run ends with the first checkpoint within its last
round. Each checkpoint is serialised as the stage does it.

    python benchmarks/train_memory.py --n 1000000 --methods ddh dsah --workers 1
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import memory_bytes, options
from torch import distributed as dist

from hashdist.ground.ranges import blocks
from hashdist.ground.settings import TrainSettings
from hashdist.methods.contract import Graph, TrainingData, find_method
from hashdist.methods.parts.communicator import Communicator, SingleProcess, TorchDistributed
from hashdist.models.training import Checkpoint, train

LIMIT_GB = 5.0
CHECKPOINT_STEPS = 500
ROUNDS = {"ddh": {"rounds": 1, "epochs": 1}, "dsah": {"rounds": 2, "epochs": 1}}


def main() -> None:
    sizes = {"n": 1_000_000, "neighbours": 100, "width": 128, "bits": 64, "batch": 200}
    parser = options(__doc__, **sizes, workers=1, threads=1)
    parser.add_argument("--methods", nargs="+", choices=list(ROUNDS), default=list(ROUNDS))
    parser.add_argument("--folder", help="where the files go; a temporary one otherwise")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(worker(chosen.one[0], int(chosen.one[1]), Path(chosen.folder), chosen)))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        write_files(Path(folder), chosen)
        found = {method: on_workers(method, folder, chosen) for method in chosen.methods}
    peak = max(worker["anonymous_gb"] for workers in found.values() for worker in workers)
    del chosen.one, chosen.folder
    print(json.dumps({"benchmark": "train_memory", **vars(chosen), "peak_gb": peak, "limit_gb": LIMIT_GB, **found}))


def write_files(folder: Path, chosen: argparse.Namespace) -> None:
    """Features and graph, written in blocks."""
    rng, n, k = np.random.default_rng(0), chosen.n, chosen.neighbours
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (n, chosen.width))
    indices = np.lib.format.open_memmap(folder / "indices.npy", "w+", np.int32, (n * k,))
    for start, stop in blocks(n, 4096):
        features[start:stop] = rng.standard_normal((stop - start, chosen.width), np.float32)
        indices[start * k : stop * k] = np.sort(rng.integers(0, n, (stop - start, k), dtype=np.int32), axis=1).ravel()
    np.save(folder / "indptr.npy", np.arange(n + 1, dtype=np.int64) * k)
    np.save(folder / "ids.npy", np.arange(n))


def on_workers(method: str, folder: str, chosen: argparse.Namespace) -> list[dict[str, float]]:
    """What each worker of one run found, by rank."""
    # of the same name twice, argparse takes the last
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--one", method]
    running = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(chosen.workers)
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit(f"{method}: a worker failed")
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def worker(method: str, rank: int, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Train on the mapped files; peaks above the process after its imports, in GB."""
    torch.set_num_threads(chosen.threads)
    comm = communicator(method, rank, folder, chosen.workers)
    before = memory_gb("RssAnon"), memory_gb("RssFile")
    ids, features, indptr, indices = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "features", "indptr", "indices")
    )
    data = TrainingData(ids, features, graph=Graph(indptr, indices))
    options = {**ROUNDS[method], "batch": chosen.batch}
    settings = TrainSettings(
        method=method, bits=chosen.bits, threads=chosen.threads, options=options, checkpoint_steps=CHECKPOINT_STEPS
    )
    started = time.perf_counter()

    def report(event: dict[str, Any]) -> None:
        if event["round"] == options["rounds"] - 1:
            raise Enough

    with Peak() as peak, suppress(Enough):
        train(find_method(method), data, settings, comm, save=save, report=report)
    return {
        "anonymous_gb": round(peak.anonymous - before[0], 2),
        "mapped_gb": round(peak.mapped - before[1], 2),
        "after_imports_gb": round(sum(before), 2),
        "seconds": round(time.perf_counter() - started, 1),
    }


def communicator(method: str, rank: int, folder: Path, workers: int) -> Communicator:
    """The ranks."""
    if workers == 1:
        return SingleProcess()
    dist.init_process_group("gloo", init_method=f"file://{folder}/{method}", rank=rank, world_size=workers)
    return TorchDistributed()


def save(checkpoint: Checkpoint) -> None:
    """Serialise and drop."""
    buffer = BytesIO()
    torch.save(checkpoint.to_mapping(), buffer)
    buffer.getbuffer()


class Enough(Exception):
    """All kinds of work have been done once."""


class Peak:
    """Largest anonymous memory and largest share of mapped files in memory while open, looked at every 20 ms."""

    def __init__(self) -> None:
        self.anonymous = self.mapped = 0.0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look)

    def __enter__(self) -> "Peak":
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.anonymous = max(self.anonymous, memory_gb("RssAnon"))
            self.mapped = max(self.mapped, memory_gb("RssFile"))


def memory_gb(field: str) -> float:
    """A field of this process's memory status, in GB (10^9 bytes)."""
    return memory_bytes(field) / 1e9


if __name__ == "__main__":
    main()
