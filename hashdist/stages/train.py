"""model: a hash function learnt on Ray Train workers, with checkpoints in a log of numbered versions.

The run lives at ROOT/runs/<name of the model>. Rank 0 commits every checkpoint as the next version; every attempt
starts from the newest one; an attempt that loses a commit stops, since another is training the same model. The
version marked finished names the weights, and committing the model's manifest is all that is left then.
"""

import math
import os
import socket
import time
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import numpy as np
import ray.train
import torch
from numpy.typing import NDArray
from safetensors import torch as safetensors
from torch import nn

from hashdist import distributed, telemetry
from hashdist.bits import check_bits
from hashdist.checkpoints import Checkpoints, agree_on_newest, finite, load_state
from hashdist.communicator import Communicator, TorchDistributed
from hashdist.errors import Conflict, Corrupt, InvalidInput
from hashdist.methods.contract import Graph, TrainingData, check_schedule, deep_method, find_method, method_settings
from hashdist.model import describe
from hashdist.progress import say
from hashdist.settings import Settings
from hashdist.store import open_store
from hashdist.store.commit import Artefact, Log, Version, artefact, read_file, read_table, write_file
from hashdist.trainer import Workers, fit
from hashdist.training import Trained, train

KIND = "models"
REVISION = 1

_REPORT_EVERY_S = 1.0
_LINE_EVERY_S = 2.0
_SPEED = ("seconds", "images_per_s")


def snapshot(settings: Settings, graph: Artefact, features: Artefact, collection: Artefact | None = None) -> Artefact:
    """Where the model lives, or will.

    Args:
        settings: of the run.
        graph: committed training sample with its neighbour graph.
        features: the committed features that the graph was made from.
        collection: the committed collection, in images mode.
    """
    inputs = {a.kind: a.name for a in (graph, features, collection) if a is not None}
    return artefact(
        open_store(settings.root),
        KIND,
        inputs=inputs,
        settings=settings.train.identity(),
        revision=REVISION,
        salt=settings.fresh,
    )


def run(settings: Settings, graph: Artefact, features: Artefact, collection: Artefact | None = None) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start, and commit the model.

    Raises:
        InvalidInput: settings or inputs that do not fit together, before any worker starts.
        Conflict: another attempt is training the same model now.
    """
    started = time.perf_counter()
    model = snapshot(settings, graph, features, collection)
    job = _Job(settings, model, _log(settings, model), graph, features, collection, uuid4().hex[:12])
    if model.exists():
        return _result(job, started, skipped=True)
    check(settings, graph, features, collection)
    newest = job.log.latest()
    if newest is None or not newest.manifest["finished"]:
        newest = _fit(job, newest)
    model.publish(_manifest(job, newest.manifest))
    return _result(job, started, skipped=False)


def check(settings: Settings, graph: Artefact, features: Artefact, collection: Artefact | None) -> None:
    """InvalidInput for whatever can be known to be wrong before workers start."""
    wanted = settings.train
    check_bits(wanted.bits)
    method = deep_method(find_method(wanted.method))
    check_schedule(method_settings(method, wanted.preset, wanted.options), graph.manifest()["n"], wanted.workers)
    made_from = graph.manifest()["inputs"]["features"]
    if made_from["digest"] != features.name:
        raise InvalidInput(
            f"the graph must be made from the features that are trained on: {graph.uri} was made from "
            f"{made_from['uri']}, found {features.uri}; build the graph again from these features"
        )
    if method.USES == "labels" and graph.manifest()["files"].get("labels") is None:
        raise InvalidInput(
            f"method {wanted.method} learns from labels, and {graph.uri} has none; use a collection with labels"
        )
    if wanted.mode == "images" and collection is None:
        raise InvalidInput("training from images needs the collection beside graph and features, found none")


@dataclass(frozen=True)
class _Job:
    """What every worker is told: where everything lies."""

    settings: Settings
    model: Artefact
    log: Log
    graph: Artefact
    features: Artefact
    collection: Artefact | None
    attempt: str

    @property
    def epochs(self) -> int:
        """Epochs of all rounds."""
        wanted = self.settings.train
        chosen = method_settings(deep_method(find_method(wanted.method)), wanted.preset, wanted.options)
        return int(chosen.rounds * chosen.epochs)


def _log(settings: Settings, model: Artefact) -> Log:
    return Log(open_store(settings.root).child(f"runs/{model.name}"))


# In the driver


def _fit(job: _Job, newest: Version | None) -> Version:
    """Start workers, follow them, and return the finished version."""
    wanted = job.settings.train
    gpu = wanted.gpu == "yes" or (wanted.gpu == "auto" and distributed.gpus() >= wanted.workers)
    workers = Workers(wanted.workers, gpu, wanted.max_failures)
    workers.check()
    if newest is not None:
        _say_resumes(job, newest)
    fit(
        partial(_work, job),
        workers,
        store=job.log.store.child("ray"),
        name=f"{job.model.name[:12]}-{job.attempt}",
        say=_Lines(job.epochs),
    )
    finished = job.log.latest()
    if finished is None or not finished.manifest["finished"]:
        raise Conflict(
            f"{job.log.uri} must end with a finished version, found {finished and finished.number}; another attempt "
            "writes to it; wait for that one, or give --train.fresh TEXT for a run of your own"
        )
    return finished


def _say_resumes(job: _Job, newest: Version) -> None:
    before, now = newest.manifest["world_size"], job.settings.train.workers
    other = f" (with {before} workers until now: the same up to rounding only)" if before != now else ""
    say(f"train: goes on from checkpoint {newest.number}, {_place(newest.manifest['position'])}{other}")


def _place(position: dict[str, int]) -> str:
    return f"round {position['round'] + 1}, epoch {position['epoch'] + 1}, step {position['step']}"


class _Lines:
    """Progress of the workers as lines on stderr, not more often than every few seconds."""

    def __init__(self, epochs: int) -> None:
        self._epochs, self._last = epochs, -math.inf

    def __call__(self, kind: str, event: dict[str, Any]) -> None:
        if kind == "failure":
            say(f"train: worker {event['rank']} failed ({event['error']}); going on from the newest checkpoint")
            return
        ended = event["step"] == event["steps"]
        if not ended and time.monotonic() - self._last < _LINE_EVERY_S:
            return
        self._last = time.monotonic()
        terms = ", ".join(f"{k} {v:.4g}" for k, v in event.items() if isinstance(v, float) and k not in _SPEED)
        say(
            f"train: epoch {event['epoch'] + 1}/{self._epochs}, step {event['step']}/{event['steps']}: {terms}, "
            f"{event['images_per_s']:,.0f} images/s"
        )


def _manifest(job: _Job, finished: dict[str, Any]) -> dict[str, Any]:
    """The model's manifest, from the finished version of its run."""
    wanted = job.settings.train
    backbone = {**_backbone_fields(job.features.manifest()), **finished["backbone"]}
    weights = finished["backbone_weights"] or _copied_weights(job)
    described = describe(
        method=wanted.method,
        options=finished["method_settings"],
        bits=wanted.bits,
        mode=wanted.mode,
        width=finished["input_width"],
        backbone=backbone,
        head=finished["head"],
        backbone_weights=weights,
    )
    lineage = {a.kind: {"uri": a.uri, "digest": a.name} for a in (job.graph, job.features, job.collection) if a}
    return {
        **described,
        "stage": "train",
        "inputs": lineage,
        "settings": wanted.identity(),
        "preset": wanted.preset,
        "options": wanted.options,
        "rows": finished["rows"],
        "failed": 0,
        "files": [entry for entry in (finished["head"], weights) if entry],
        "run": job.log.uri,
        "world_size": finished["world_size"],
        "seconds": finished["seconds"],
        "history": finished["history"],
        "rounds": finished["rounds"],
    }


def _backbone_fields(features: dict[str, Any]) -> dict[str, Any]:
    """How the features are made, as far as a code depends on it."""
    names = ("backbone", "tap", "weights_digest", "preprocess", "precision", "batch", "threads", "dtype", "width")
    return {name: features[name] for name in names if name in features}


def _copied_weights(job: _Job) -> dict[str, Any] | None:
    """The features' backbone weights, copied beside the head: a model needs nothing but its own folder."""
    entry = job.features.manifest().get("weights_file")
    if entry is None:
        return None
    return write_file(job.model.store, job.model.new_name(".safetensors"), read_file(job.features.store, entry))


def _result(job: _Job, started: float, *, skipped: bool) -> dict[str, Any]:
    manifest = job.model.manifest()
    last = manifest["history"][-1] if manifest["history"] else {}
    return {
        "stage": "train",
        "snapshot": job.model.uri,
        "rows": manifest["rows"],
        "failed": 0,
        "seconds": time.perf_counter() - started,
        "skipped": skipped,
        "method": manifest["method"],
        "bits": manifest["bits"],
        "loss": last.get("loss"),
        "model_digest": manifest["model_digest"],
        "run": manifest["run"],
    }


# On every worker


def _work(job: _Job) -> None:
    """Train on this rank, from the newest checkpoint; rank 0 commits checkpoints and the weights."""
    telemetry.set_sink(distributed.RaySink())
    wanted = job.settings.train
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    comm = TorchDistributed(device)
    newest = agree_on_newest(job.log, comm, device)
    if newest is not None and newest.manifest["finished"]:
        return
    about = {
        "stage": "train",
        "model": job.model.name,
        "attempt": job.attempt,
        "world_size": comm.world_size,
        "worker": {"host": socket.gethostname(), "pid": os.getpid()},
    }
    checkpoints = Checkpoints(job.log, newest, about, wanted.method)
    with TemporaryDirectory(prefix="hashdist-") as folder:
        data, backbone = _inputs(job, comm, Path(folder))
        trained = train(
            find_method(wanted.method),
            data,
            wanted,
            comm,
            resume=load_state(job.log, newest) if newest else None,
            save=checkpoints.save,
            report=_Reporter(comm, device),
            device=device,
            backbone=backbone,
        )
    if comm.rank == 0:
        checkpoints.finish(_finished(job, data, trained))


class _Reporter:
    """Reports to Ray Train, which blocks until its controller has looked, so not after every epoch of a fast run.

    Whether to report is rank 0's decision, since every rank must report equally often.
    """

    def __init__(self, comm: Communicator, device: torch.device) -> None:
        self._comm, self._device, self._last = comm, device, -math.inf

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        due = event["step"] == event["steps"] or now - self._last >= _REPORT_EVERY_S
        decided = torch.tensor([int(due and self._comm.rank == 0)], device=self._device)
        self._comm.sum_(decided)
        if decided:
            self._last = now
            ray.train.report(finite(event))


def _inputs(job: _Job, comm: Communicator, folder: Path) -> tuple[TrainingData, nn.Module | None]:
    """The training sample as the graph artefact holds it, and in images mode the images and the network."""
    files, store = job.graph.manifest()["files"], job.graph.store
    array = partial(_array, job.graph)
    labels = files.get("labels")
    graph = None
    if files.get("w0_indptr"):
        graph = Graph(array(files["w0_indptr"]), array(files["w0_indices"]), array(files["neighbours"]))
    data = TrainingData(
        ids=array(files["ids"]),
        features=array(files["features"]) if job.settings.train.mode == "frozen" else None,
        labels=_one_hot(read_table(store, labels, ["labels"])["labels"].to_pylist()) if labels else None,
        graph=graph,
    )
    return data, None


def _array(graph: Artefact, entry: dict[str, Any]) -> NDArray[Any]:
    """A .npy file of the graph: mapped where it lies on this machine, else read and checked."""
    path = graph.store.local_path(entry["path"])
    if path is None:
        return np.load(BytesIO(read_file(graph.store, entry)), allow_pickle=False)
    if path.stat().st_size != entry["bytes"]:
        raise Corrupt(f"{path}: {entry['bytes']} bytes were committed, found {path.stat().st_size}")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _one_hot(labels: list[list[int] | None]) -> NDArray[np.bool_]:
    """bool [n, C] of the labels of each image; none of an image without any."""
    classes = 1 + max((label for row in labels for label in row or []), default=-1)
    table = np.zeros((len(labels), classes), np.bool_)
    for row, given in enumerate(labels):
        table[row, given or []] = True
    return table


def _finished(job: _Job, data: TrainingData, trained: Trained) -> dict[str, Any]:
    """Write the weights into the model's folder; what the finished version says of them."""
    store = job.model.store
    head = _weights(trained.network)
    return {
        "position": {"round": trained.settings.rounds, "epoch": 0, "step": 0},
        "head": write_file(store, job.model.new_name(".safetensors"), head),
        "backbone": {},
        "backbone_weights": None,
        "input_width": job.features.manifest()["width"],
        "method_settings": asdict(trained.settings),
        "rows": data.n,
        "seconds": trained.seconds,
        "history": trained.history,
        "rounds": trained.rounds,
    }


def _weights(network: nn.Module) -> bytes:
    """Weights as safetensors; the same weights give the same bytes."""
    return safetensors.save({name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()})
