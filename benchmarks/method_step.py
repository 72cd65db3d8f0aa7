"""One step of the training loop of each method against a plain loop: frozen mode, B of its paper, one worker.

The plain loop has the same head and optimiser and the formula of the paper in plain PyTorch, and nothing else: no
ranks, rounds, terms, checkpoints or reports. DSAH's plain W is a dense matrix of -1 and +1; DDH's pairs are the batch
against all n, as released; SADH's and CSDH's labels are dense. Alternating runs in one process; ratios are those of the
medians. One JSON line a method.

    python benchmarks/method_step.py --width 4096 --threads 1 [--methods dsah ddh sadh csdh]
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timing import in_turn, medians, options
from torch import Tensor, nn
from torch.nn import functional

from hashdist.ground.permutation import permutation
from hashdist.ground.settings import TrainSettings
from hashdist.methods.contract import Graph, TrainingData, deep_method, find_method, method_settings
from hashdist.methods.parts.communicator import SingleProcess
from hashdist.methods.sadh import LabNet, train_labnet
from hashdist.models.training import train

BATCH = {"dsah": 50, "ddh": 128, "sadh": 64, "csdh": 32}
LIMIT = 1.15
Step = Callable[[Tensor], Tensor]
"""Rows int64 [B] -> the loss."""


def main() -> None:
    sizes = {"width": 4096, "images": 12_000, "neighbours": 100, "classes": 10, "bits": 64}
    chosen = options(__doc__, methods=list(BATCH), **sizes, steps=200, runs=5, threads=1).parse_args()
    torch.set_num_threads(chosen.threads)
    for name in chosen.methods:
        print(json.dumps(compared(name, chosen)), flush=True)


def compared(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Medians of both loops, and their ratio."""
    batch = BATCH[name]
    data = random_data(max(chosen.images, chosen.steps * batch), chosen.width, chosen.neighbours, chosen.classes)
    steps = data.n // batch
    loops = {
        "hashdist": lambda: hashdist_seconds(name, data, chosen),
        "plain": lambda: plain_seconds(name, data, chosen, steps),
    }
    found = in_turn(chosen.runs, loops)
    runs = {loop: [seconds / steps * 1e3 for seconds in values] for loop, values in found.items()}
    middle = medians(runs)
    return {
        "benchmark": "method_step",
        "method": name,
        "batch": batch,
        "images": data.n,
        **{k: v for k, v in vars(chosen).items() if k not in ("methods", "images", "steps")},
        **{f"{loop}_ms": round(value, 3) for loop, value in middle.items()},
        "ratio": round(middle["hashdist"] / middle["plain"], 3),
        "limit": LIMIT,
        "runs_ms": {loop: [round(v, 3) for v in values] for loop, values in runs.items()},
    }


def random_data(n: int, width: int, neighbours: int, classes: int) -> TrainingData:
    """Random features, one label an image, and a random symmetric graph."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((n, width), np.float32)
    pairs = rng.integers(0, n, (2, n * neighbours // 2))
    keys = np.unique(np.concatenate([pairs[0] * n + pairs[1], pairs[1] * n + pairs[0]]))
    rows, columns = keys // n, keys % n
    rows, columns = rows[rows != columns], columns[rows != columns]
    indptr = np.searchsorted(rows, np.arange(n + 1)).astype(np.int64)
    labels = np.eye(classes, dtype=bool)[rng.integers(0, classes, n)]
    ids = np.arange(n, dtype=np.int64)
    return TrainingData(ids, features, labels=labels, graph=Graph(indptr, columns.astype(np.int32)))


def hashdist_seconds(name: str, data: TrainingData, chosen: argparse.Namespace) -> float:
    """Wall time of the steps of one epoch in the training loop, from its own history."""
    options: dict[str, Any] = {"rounds": 1, "epochs": 1}
    if name == "sadh":
        options["labnet_steps"] = 1
    settings = TrainSettings(method=name, bits=chosen.bits, threads=chosen.threads, options=options)
    trained = train(find_method(name), data, settings, SingleProcess(), save=lambda _: None, report=lambda _: None)
    return float(trained.history[0]["seconds"])


def plain_seconds(name: str, data: TrainingData, chosen: argparse.Namespace, steps: int) -> float:
    """Wall time of the same steps, written out."""
    module = deep_method(find_method(name))
    settings = method_settings(module, "paper")
    generator = torch.Generator().manual_seed(0)
    head = module.network(settings, chosen.width, chosen.bits, generator, classes=chosen.classes)
    assert data.features is not None
    head.standardize.fit(data.features, settings.feature_length)  # type: ignore[operator, union-attr]
    optimizer, loss = PLAIN[name](head, settings, data)
    order = torch.from_numpy(permutation(data.n, 0, 0).astype(np.int64))
    batch = BATCH[name]
    started = time.perf_counter()
    for step in range(steps):
        rows = order[step * batch : (step + 1) * batch]
        optimizer.zero_grad()
        loss(rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return time.perf_counter() - started


def dsah(head: nn.Module, settings: Any, data: TrainingData) -> tuple[torch.optim.Optimizer, Step]:
    w = dense(data) * 2 - 1
    features = torch.from_numpy(data.features)

    def loss(rows: Tensor) -> Tensor:
        z = head(features[rows])["z"]
        u = functional.normalize(z)
        s = u @ u.T
        a = -torch.log_softmax(s.flatten(), 0).view_as(s)
        pair = (a * (s - w[rows][:, rows]) ** 2).mean()
        return pair + settings.lambda_ * ((z - torch.where(z.detach() >= 0, 1.0, -1.0)) ** 2).mean()

    return torch.optim.Adam(head.parameters(), lr=settings.lr, fused=True), loss


def ddh(head: nn.Module, settings: Any, data: TrainingData) -> tuple[torch.optim.Optimizer, Step]:
    s = dense(data) * 2 - 1
    features = torch.from_numpy(data.features)
    with torch.no_grad():
        bank = torch.cat([head(part)["z"] for part in features.split(1024)])

    def loss(rows: Tensor) -> Tensor:
        z = head(features[rows])["z"]
        bank[rows] = z.detach()
        pair = 0.5 * ((z @ bank.T / z.shape[1] - s[rows]) ** 2).mean()
        quantisation = 0.5 * ((z - torch.where(z.detach() >= 0, 1.0, -1.0)) ** 2).sum(1).mean()
        return pair + settings.lambda1 / settings.n_ref * quantisation

    decay = settings.weight_decay
    return torch.optim.SGD(head.parameters(), lr=settings.lr, weight_decay=decay, fused=True), loss


def csdh(head: nn.Module, settings: Any, data: TrainingData) -> tuple[torch.optim.Optimizer, Step]:
    features, labels = torch.from_numpy(data.features), torch.from_numpy(data.labels).float()

    def loss(rows: Tensor) -> Tensor:
        outputs, own = head(features[rows]), labels[rows]
        u = functional.normalize(outputs["z"])
        cos, similar = u @ u.T, own @ own.T > 0
        pair = torch.where(similar, 1 - cos, torch.relu(cos)).mean()
        return functional.cross_entropy(outputs["classes"], own.argmax(1)) + settings.gamma * pair

    return sgd(head, settings), loss


def sadh(head: nn.Module, settings: Any, data: TrainingData) -> tuple[torch.optim.Optimizer, Step]:
    features, labels = torch.from_numpy(data.features), torch.from_numpy(data.labels).float()
    sets = torch.eye(labels.shape[1])
    labnet = LabNet(labels.shape[1], head.hash.out_features, settings, torch.Generator().manual_seed(1))
    train_labnet(labnet, sets, np.arange(len(sets)), settings, 0)
    with torch.no_grad():
        guide = labnet(labels)
        maps = labnet(sets)
    space = {name: functional.normalize(guide[name]) for name in ("z", "features")}
    rows_of_map = {name: functional.normalize(maps[name]) for name in ("z", "features")}

    def hinge(similar: Tensor, margin: Tensor, x: Tensor) -> Tensor:
        return torch.where(similar, torch.relu(margin - x), torch.relu(x - margin)).mean() / 2

    def loss(rows: Tensor) -> Tensor:
        outputs, own = head(features[rows]), labels[rows]
        total = settings.eta * ((outputs["classes"] - own) ** 2).sum(1).mean()
        for name, images, to_map in (
            ("features", settings.alpha, settings.gamma),
            ("z", settings.lambda_, settings.mu),
        ):
            u, t, m = functional.normalize(outputs[name]), space[name][rows], rows_of_map[name]
            total = total + images * hinge(own @ own.T > 0, (t @ t.T).clamp_min(0), u @ u.T)
            total = total + to_map * hinge(own > 0, (t @ m.T).clamp_min(0), u @ m.T)
        z = outputs["z"]
        return total + settings.beta * ((z - torch.where(z.detach() >= 0, 1.0, -1.0)) ** 2).mean()

    return sgd(head, settings), loss


def sgd(head: nn.Module, settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        head.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
    )


def dense(data: TrainingData) -> Tensor:
    """0/1 [n, n], the diagonal 1."""
    assert data.graph is not None
    found = np.eye(data.n, dtype=np.float32)
    rows = np.repeat(np.arange(data.n), np.diff(data.graph.indptr))
    found[rows, data.graph.indices] = 1
    return torch.from_numpy(found)


PLAIN = {"dsah": dsah, "ddh": ddh, "csdh": csdh, "sadh": sadh}


if __name__ == "__main__":
    main()
