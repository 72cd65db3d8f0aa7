"""model: a hash function learnt on Ray Train workers, with checkpoints in a log of numbered versions.

The run lives at ROOT/runs/<name of the model>. Rank 0 commits every checkpoint as the next version; every attempt
starts from the newest one; an attempt that loses a commit stops, since another is training the same model. The
version marked finished names the weights, and committing the model's manifest is all that is left then.
"""

import math
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Self
from uuid import uuid4

import ray.train
import torch
from safetensors import torch as safetensors
from torch import nn

from hashdist.collection.collection import subset
from hashdist.ground import telemetry
from hashdist.ground.bits import check_bits
from hashdist.ground.errors import Conflict, InvalidInput
from hashdist.ground.progress import Progress, say, speak_to
from hashdist.ground.settings import Settings, TrainSettings
from hashdist.methods.contract import (
    TrainingData,
    check_labels,
    check_schedule,
    deep_method,
    find_method,
    method_settings,
)
from hashdist.methods.parts.communicator import Communicator, TorchDistributed
from hashdist.models.checkpoints import Checkpoints, agree_on_newest, finite, load_state
from hashdist.models.model import describe
from hashdist.models.networks import Network, open_network, spec_settings, state_bytes, weights_digest
from hashdist.models.sample import LocalShare, cache_images, read_sample, sample_ids, sample_labels
from hashdist.models.training import Trained, train
from hashdist.stages import artefacts
from hashdist.stages.cluster import metrics, session
from hashdist.stages.cluster.workers import Workers, fit
from hashdist.store import open_store
from hashdist.store.commit import Artefact, Log, Version, read_file, write_file

KIND = "models"
REVISION = 1

_REPORT_EVERY_S = 1.0
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
    return artefacts.target(settings, KIND, REVISION, inputs=inputs, identity=settings.train.identity())


def run(settings: Settings, graph: Artefact, features: Artefact, collection: Artefact | None = None) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start, and commit the model.

    Raises:
        InvalidInput: settings or inputs that do not fit together, before any worker starts.
        Conflict: another attempt is training the same model now.
    """
    started = time.perf_counter()
    model = snapshot(settings, graph, features, collection)
    if model.exists():
        return _result(model, started, skipped=True)
    check(settings, graph, features, collection)
    log = Log(open_store(settings.root).child(f"runs/{model.name}"))
    newest = log.latest()
    if newest is not None:
        _check_run(log, newest, model)
    sample = _sample(settings, graph, collection)
    job = _Job(settings, model, log, graph, features, collection, sample, _wants_gpus(settings.train), uuid4().hex)
    if newest is None or not newest.manifest["finished"]:
        newest = _fit(job, newest)
    model.publish(_manifest(job, newest.manifest))
    return _result(model, started, skipped=False)


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
    if method.USES == "labels":
        check_labels(wanted.method, sample_labels(graph))
    if method.GRAPH != "none" and graph.manifest()["rule"] == "none":
        raise InvalidInput(
            f"method {wanted.method} learns from a neighbour graph, and {graph.uri} holds the sample alone; build one "
            f"with --graph.rule {method.GRAPH}"
        )
    if wanted.mode == "images" and collection is None:
        raise InvalidInput("training from images needs the collection beside graph and features, found none")
    if wanted.mode == "images" and not features.manifest().get("weights_digest"):
        raise InvalidInput(
            f"training from images needs a backbone with weights, found {features.manifest().get('backbone')!r} in "
            f"{features.uri}; extract features with a network, or train with --train.mode frozen"
        )


def _check_run(log: Log, newest: Version, model: Artefact) -> None:
    if newest.manifest.get("model") != model.name:
        raise InvalidInput(
            f"{log.uri} must hold the run of model {model.name}, found checkpoint {newest.number} of model "
            f"{newest.manifest.get('model')}; move that run back to where it belongs, or give --train.fresh TEXT"
        )


def _sample(settings: Settings, graph: Artefact, collection: Artefact | None) -> Artefact | None:
    """The training images as a collection of their own, so that workers read nothing else."""
    if settings.train.mode == "frozen" or collection is None:
        return None
    return subset(open_store(settings.root), collection, sample_ids(graph).tolist())


def _wants_gpus(wanted: TrainSettings) -> bool:
    found = session.gpus() if wanted.gpu == "auto" else 0
    if 0 < found < wanted.workers:
        say(f"train: {found} GPUs for {wanted.workers} workers, so on CPUs; --train.workers {found} takes the GPUs")
    return wanted.gpu == "yes" or found >= wanted.workers


@dataclass(frozen=True)
class _Job:
    """The message to every worker: where everything lies."""

    settings: Settings
    model: Artefact
    log: Log
    graph: Artefact
    features: Artefact
    collection: Artefact | None
    sample: Artefact | None  # the training images as a collection of their own, in images mode
    gpu: bool
    attempt: str

    @property
    def epochs(self) -> int:
        """Epochs of all rounds."""
        wanted = self.settings.train
        chosen = method_settings(deep_method(find_method(wanted.method)), wanted.preset, wanted.options)
        return int(chosen.rounds * chosen.epochs)


# In the driver


def _fit(job: _Job, newest: Version | None) -> Version:
    """Start workers, follow them, and return the finished version."""
    wanted = job.settings.train
    workers = Workers(wanted.workers, job.gpu, wanted.max_failures)
    workers.check()
    if newest is not None:
        _say_resumes(job, newest)
    with _Lines(job.epochs) as lines:
        fit(
            partial(_work, job),
            workers,
            store=job.log.store.child("ray"),
            name=f"{job.model.name[:12]}-{job.attempt[:12]}",
            say=lines,
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
    """What workers report, as progress on stderr."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.close()

    def __call__(self, kind: str, event: dict[str, Any]) -> None:
        if kind == "failure":
            say(f"train: worker {event['rank']} failed ({event['error']}); going on from the newest checkpoint")
            return
        for line in event["said"]:
            say(line)
        terms = ", ".join(f"{k} {v:.4g}" for k, v in event.items() if isinstance(v, float) and k not in _SPEED)
        epoch, speed = f"epoch {event['epoch'] + 1}/{self._epochs}", f"{event['images_per_s']:,.0f} images/s"
        line = f"train: {epoch}, step {event['step']}/{event['steps']}: {terms}, {speed}"
        self._progress = self._progress or Progress("train", event["steps"])
        self._progress.reach(event["step"], f"{epoch}, {terms}", line)


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
        classes=finished["classes"],
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
    names = ("backbone", "tap", "weights", "weights_digest", "preprocess", "precision", "batch", "threads")
    return {name: features[name] for name in (*names, "dtype", "width") if name in features}


def _copied_weights(job: _Job) -> dict[str, Any] | None:
    """The features' backbone weights, copied beside the head: a model needs nothing but its own folder."""
    entry = job.features.manifest().get("weights_file")
    if entry is None:
        return None
    return write_file(job.model.store, job.model.new_name(".safetensors"), read_file(job.features.store, entry))


def _result(model: Artefact, started: float, *, skipped: bool) -> dict[str, Any]:
    manifest = model.manifest()
    last = manifest["history"][-1] if manifest["history"] else {}
    details = {name: manifest[name] for name in ("method", "bits", "model_digest", "run")}
    return artefacts.result("train", model, started, skipped=skipped, loss=last.get("loss"), **details)


# On every worker


def _work(job: _Job) -> None:
    """Train on this rank, from the newest checkpoint; rank 0 commits checkpoints and the weights."""
    telemetry.set_sink(metrics.RaySink())
    wanted = job.settings.train
    device = _gpu() if job.gpu else torch.device("cpu")
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
    report = _Reporter(comm, device)
    data, backbone = _inputs(job, comm)
    trained = train(
        find_method(wanted.method),
        data,
        wanted,
        comm,
        resume=load_state(job.log, newest) if newest else None,
        save=checkpoints.save,
        report=report,
        device=device,
        backbone=backbone,
    )
    if comm.rank == 0:
        checkpoints.finish(_finished_fields(job, data, trained))


def _gpu() -> torch.device:
    from ray.train.torch import get_device  # imports what training on a CPU does not need

    device = get_device()
    assert isinstance(device, torch.device)
    return device


class _Reporter:
    """Reports to Ray Train, which blocks until its controller has looked, so not after every epoch of a fast run.

    Whether to report is rank 0's decision, since every rank must report equally often. What is said on rank 0 goes
    with the next report.
    """

    def __init__(self, comm: Communicator, device: torch.device) -> None:
        self._comm, self._device, self._last = comm, device, -math.inf
        self._said: list[str] = []
        speak_to(self._said.append)

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        due = event["step"] == event["steps"] or now - self._last >= _REPORT_EVERY_S
        decided = torch.tensor([int(due and self._comm.rank == 0)], device=self._device)
        self._comm.sum_(decided)
        if decided:
            self._last = now
            ray.train.report({**finite(event), "said": self._said.copy()})
            self._said.clear()


def _inputs(job: _Job, comm: Communicator) -> tuple[TrainingData, nn.Module | None]:
    """The training sample, and in images mode the network with the weights that the features were made with."""
    data = read_sample(job.graph)
    if job.sample is None:
        return data, None
    made = job.features.manifest()
    weights = read_file(job.features.store, made["weights_file"]) if made["weights_file"] else None
    backbone = open_network(spec_settings(made), weights)
    context = ray.train.get_context()
    place = LocalShare(context.get_local_rank(), context.get_local_world_size(), job.attempt)
    images = cache_images(job.sample, data.ids, backbone.preprocess, place, comm)
    return replace(data, images=lambda rows: torch.from_numpy(images[rows])), backbone


def _finished_fields(job: _Job, data: TrainingData, trained: Trained) -> dict[str, Any]:
    """Write the weights into the model's folder; what the finished version says of them."""
    store = job.model.store
    head = _weights(trained.network)
    return {
        "position": {"round": trained.settings.rounds, "epoch": 0, "step": 0},
        "head": write_file(store, job.model.new_name(".safetensors"), head),
        "backbone": {},
        "backbone_weights": None,
        **_trained_backbone(job, trained.backbone),
        "input_width": job.features.manifest()["width"],
        "method_settings": asdict(trained.settings),
        "classes": data.classes,
        "rows": data.n,
        "seconds": trained.seconds,
        "history": trained.history,
        "rounds": trained.rounds,
    }


def _trained_backbone(job: _Job, backbone: nn.Module | None) -> dict[str, Any]:
    """Images mode: the backbone's own weights, and float32, in which they were made."""
    if not isinstance(backbone, Network):
        return {}
    entry = write_file(job.model.store, job.model.new_name(".safetensors"), state_bytes(backbone))
    return {
        "backbone": {"weights_digest": weights_digest(backbone), "precision": "float32"},
        "backbone_weights": entry,
    }


def _weights(network: nn.Module) -> bytes:
    """Weights as safetensors; the same weights give the same bytes."""
    return safetensors.save({name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()})
