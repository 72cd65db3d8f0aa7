"""What tests of training share: ranks as threads of one process, small data for any method, runs that are killed."""

import threading
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hashdist.ground.settings import TrainSettings
from hashdist.methods.contract import Graph, MethodModule, TrainingData, deep_method, find_method, known_methods
from hashdist.methods.parts.communicator import Communicator, SingleProcess
from hashdist.models.training import Checkpoint, Trained, train

TIMEOUT_S = 60
QUICK: dict[str, dict[str, Any]] = {"sadh": {"labnet_hidden": 64, "semantic": 48}}
"""Options that make a method's run on tiny_data cheap where its paper's network is large."""


class ThreadRank:
    """A Communicator whose ranks are threads: exchanges through a shared list and two barriers."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def gather(self, block_bX: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        assert len(block_bX) == sizes[self.rank]
        self._slots[self.rank] = block_bX.detach().clone()
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        assert [len(f) for f in found] == list(sizes)
        return found

    def sum_(self, flat: Tensor) -> None:
        flat.copy_(torch.stack(self.gather(flat, [len(flat)] * self.world_size)).sum(0))


def on_ranks(world_size: int, work: Callable[[Communicator], Any]) -> list[Any]:
    """`work(comm)` on every rank at once; the results by rank. An error on any rank is raised here."""
    if world_size == 1:
        return [work(SingleProcess())]
    slots: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size, timeout=TIMEOUT_S)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(rank, slots, barrier))
        except threading.BrokenBarrierError:
            pass  # another rank failed first
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def tiny_data(n: int = 230, width: int = 12, classes: int = 5, k: int = 9, dtype: type = np.float32) -> TrainingData:
    """Noisy clusters with features, labels, neighbours and a symmetric graph of the same class's images."""
    rng = np.random.default_rng(7)
    of_class = rng.integers(0, classes, n)
    features = (rng.normal(size=(classes, width))[of_class] + 0.7 * rng.normal(size=(n, width)) + 1.0).astype(dtype)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = (unit @ unit.T).astype(np.float64)
    np.fill_diagonal(similarity, -2)
    neighbours = np.argsort(-similarity, axis=1, kind="stable")[:, :k].astype(np.int32)
    positive = np.zeros((n, n), bool)
    np.put_along_axis(positive, neighbours.astype(np.int64), True, axis=1)
    graph = sparse(positive | positive.T, neighbours)
    labels = np.eye(classes, dtype=bool)[of_class]
    return TrainingData(np.arange(n, dtype=np.int64) * 11 + 5, features=features, labels=labels, graph=graph)


def sparse(positive_NN: np.ndarray, neighbours: np.ndarray | None = None) -> Graph:
    """The rows of a dense boolean matrix without its diagonal."""
    positive_NN = positive_NN & ~np.eye(len(positive_NN), dtype=bool)
    indptr = np.concatenate([[0], positive_NN.sum(1).cumsum()]).astype(np.int64)
    return Graph(indptr, np.nonzero(positive_NN)[1].astype(np.int32), neighbours)


def deep_methods() -> list[str]:
    """Names of all methods that the training loop runs."""
    return [name for name in known_methods() if hasattr(find_method(name), "Method")]


def deep(name: str) -> MethodModule:
    """A deep method's file."""
    return deep_method(find_method(name))


def tiny_settings(method: str = "dsah", seed: int = 3, checkpoint_steps: int = 0, **options: Any) -> TrainSettings:
    """A run of 2 rounds of 2 epochs of 4 steps on tiny_data."""
    options = {"rounds": 2, "epochs": 2, "batch": 50, **QUICK.get(method, {}), **options}
    return TrainSettings(method=method, bits=16, seed=seed, options=options, checkpoint_steps=checkpoint_steps)


class Killed(Exception):
    """Stands for the process dying."""


def run(
    comm: Communicator,
    data: TrainingData,
    settings: TrainSettings,
    *,
    resume: dict[str, Any] | None = None,
    save: Callable[[Checkpoint], None] = lambda _: None,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
    **more: Any,
) -> Trained:
    """train() of the settings' method."""
    method = find_method(settings.method)
    return train(method, data, settings, comm, resume=resume, save=save, report=report, **more)


def through_file(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as a file would give it back, loaded without pickle's freedom."""
    file = BytesIO()
    torch.save(checkpoint.to_mapping(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def weights(trained: Trained) -> dict[str, Tensor]:
    """All weights of a finished run."""
    own = {f"head.{name}": value for name, value in trained.network.state_dict().items()}
    if trained.backbone is not None:
        own |= {f"backbone.{name}": value for name, value in trained.backbone.state_dict().items()}
    return own


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without wall times."""
    cleaned = []
    for entry in history:
        kept = {k: v for k, v in entry.items() if k not in ("seconds", "images_per_s")}
        if "refresh" in kept:
            kept["refresh"] = {k: v for k, v in kept["refresh"].items() if k != "seconds"}
        cleaned.append(kept)
    return cleaned


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all tensors: max |a - b| relative to max |a|."""
    return max(relative_difference(a[name], b[name]) for name in a)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| relative to max |a|; 0 where both are zero."""
    return float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-300))
