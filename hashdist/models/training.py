"""The one training loop of all methods, for any number of ranks, without Ray: order, steps, rounds, checkpoints.

A run is repeatable, and the same for any number of ranks but for rounding, because of this:
- order: batch t of epoch e is a pure function of (n, batch, seed, e); a rank takes a slice of it
  (hashdist/ground/ranges.py);
- initial weights come from the seed, dropout masks from (seed, step, image id, layer) (hashdist/models/dropout.py), so
  that no random generator is advanced during training and none has to be in a checkpoint;
- every rank's loss is a share of the loss of the global batch, gradients are summed in one flat buffer whose layout
  never changes (hashdist/methods/parts/pairs.py says why DDP is not used), and batch norm keeps its statistics;
- whatever is computed on all images (`encode`) is computed in fixed blocks of rows.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput
from hashdist.ground.permutation import epoch_batches, rank_slice
from hashdist.ground.settings import TrainSettings
from hashdist.methods.contract import (
    Batch,
    Method,
    MethodModule,
    Place,
    TrainingData,
    check_labels,
    check_schedule,
    deep_method,
    method_settings,
    settings_text,
)
from hashdist.methods.parts.communicator import Communicator
from hashdist.methods.parts.pairs import FlatGradients
from hashdist.methods.parts.threads import torch_threads
from hashdist.models.dropout import Counter, use_counter

FORMAT = 1
_ENCODE_ROWS = {"frozen": 1024, "images": 64}
_DEVICE_SHARE = 0.5  # of a GPU's free memory that features may fill


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to continue with the same bits at the same world size.

    Args:
        state: weights, optimiser, the method's state, sums of the unfinished epoch, and what run it belongs to:
            CPU tensors, numbers, strings and containers of them, copied, so `torch.load(weights_only=True)` reads it.
        position: {"round", "epoch" (within the round), "step" (within the epoch)}, of what comes next; a finished
            run stands at round = rounds.
        history: one entry per finished epoch.
    """

    state: dict[str, Any]
    position: dict[str, int]
    history: list[dict[str, Any]]

    def to_mapping(self) -> dict[str, Any]:
        """As plain containers: what `train` takes as `resume`."""
        return {"state": self.state, "position": self.position, "history": self.history}


@dataclass
class Trained:
    """A finished run.

    Args:
        network: the trained head, features [b, D] -> {"z": [b, L], ...}, in evaluation mode.
        backbone: the trained backbone when training from images, else None.
        settings: the method's settings.
        history: one entry per epoch: round, epoch (over all rounds), step, seconds, images_per_s, the loss and its
            terms averaged over the epoch's steps, and "refresh" where a round ended with one.
        rounds: what the method reported at the end of each round.
        seconds: wall time of all attempts together.
    """

    network: nn.Module
    backbone: nn.Module | None
    settings: Any
    history: list[dict[str, Any]]
    rounds: list[dict[str, Any]]
    seconds: float


def train(
    method: ModuleType,
    data: TrainingData,
    settings: TrainSettings,
    comm: Communicator,
    *,
    resume: Mapping[str, Any] | None = None,
    save: Callable[[Checkpoint], None],
    report: Callable[[dict[str, Any]], None],
    device: torch.device | str = "cpu",
    backbone: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> Trained:
    """Train `method` on `data`; every rank calls it with the same arguments (but for `save`'s and `report`'s effects).

    Args:
        method: a deep method's file (contract.find_method).
        data: the training images; `features` in frozen mode, `images` and `backbone` in images mode.
        settings: what to train; of its resources only `threads` and `checkpoint_steps` are used here.
        comm: the ranks; the world size is comm.world_size.
        resume: Checkpoint.to_mapping() to continue from, on every rank; None starts anew.
        save: called on rank 0 only, after each epoch (and the end of its round) and after every
            `checkpoint_steps` steps; when it raises, the run ends with that error, and the other ranks fail at
            their next collective.
        report: called on **every** rank the same number of times, right after each of those points (Ray Train's
            report is a barrier): the history entry of the epoch with "event": "epoch", or "event": "checkpoint"
            with the position and the terms so far.
        device: of the weights and the steps.
        backbone: images -> features [b, D], in place trained, when settings.mode is "images".
        dtype: float64 only to check that world sizes agree.

    Raises:
        InvalidInput: the method or its options are unknown, the batch is smaller than the world size or larger than
            the data, inputs of the mode are missing, or `resume` belongs to another run.
    """
    module = deep_method(method)
    with torch_threads(settings.threads):
        run = _Run(module, data, settings, comm, torch.device(device), backbone, dtype)
        if resume is not None:
            run.restore(resume)
        run.go(save, report)
        return run.result()


class _Run:
    """The state of one run on one rank."""

    def __init__(
        self,
        module: MethodModule,
        data: TrainingData,
        settings: TrainSettings,
        comm: Communicator,
        device: torch.device,
        backbone: nn.Module | None,
        dtype: torch.dtype,
    ) -> None:
        self.settings, self.data, self.comm, self.device = settings, data, comm, device
        self.chosen = method_settings(module, settings.preset, settings.options)
        check_schedule(self.chosen, data.n, comm.world_size)
        if module.USES == "labels":
            check_labels(module.NAME, data.labels)
        place = Place(
            settings.bits, settings.mode == "frozen", data, comm, device, dtype, settings.seed, settings.threads
        )
        self.source = _source(settings.mode, data, backbone, device, dtype)
        generator = torch.Generator().manual_seed(settings.seed)
        head = module.network(
            self.chosen, self.source.width, settings.bits, generator, frozen=place.frozen, classes=data.classes
        )
        self.head = head.to(device, dtype)
        whole = nn.ModuleList([self.head] if self.source.network is None else [self.source.network, self.head])
        self.counter = use_counter(whole, settings.seed)
        self.method: Method = module.Method(self.chosen, place)
        parameters = [*self.source.parameters(), *self.head.parameters()]
        self.optimizer = self.method.optimizer(parameters)
        self.gradients = FlatGradients(parameters)
        self.identity = _identity(module, data, settings, self.chosen, self.source.width)
        self.position = _Position()
        self.history: list[dict[str, Any]] = []
        self.rounds: list[dict[str, Any]] = []
        self.sums = _Sums()
        self.seconds = 0.0
        self.fresh = True
        self.steps = data.n // self.chosen.batch
        sizes = (rank_slice(self.chosen.batch, r, comm.world_size) for r in range(comm.world_size))
        self.sizes = tuple(s.stop - s.start for s in sizes)
        self.own = rank_slice(self.chosen.batch, comm.rank, comm.world_size)

    def go(self, save: Callable[[Checkpoint], None], report: Callable[[dict[str, Any]], None]) -> None:
        """From the position to the end."""
        if self.fresh:
            self.method.prepare(self.head, self.encode)
        while self.position.round < self.chosen.rounds:
            entry = self._epoch(save, report)
            if self.position.epoch + 1 == self.chosen.epochs:
                found = self.method.end_of_round(self.position.round, self.encode)
                self.rounds.append({"round": self.position.round, **found})
                if found:
                    entry["refresh"] = found
            self.history.append(entry)
            self.position.next_epoch(self.chosen.epochs)
            self._save(save)
            self._observe(entry)
            report({"event": "epoch", **entry})

    def result(self) -> Trained:
        """The networks as trained, and their history."""
        self.head.eval()
        return Trained(self.head, self.source.network, self.chosen, self.history, self.rounds, self.seconds)

    def encode(self) -> Tensor:
        """z [n, L] of all images in evaluation mode, float32 on the CPU, in fixed blocks of rows dealt to the ranks."""
        size = _ENCODE_ROWS[self.settings.mode]
        world = self.comm.world_size
        slices = [rank_slice(-(-self.data.n // size), r, world) for r in range(world)]
        rows = [max(0, min(s.stop * size, self.data.n) - s.start * size) for s in slices]
        mine = slices[self.comm.rank]
        self._mode(train=False)
        with torch.no_grad():
            blocks = [self._encode_block(k * size, size) for k in range(mine.start, mine.stop)]
        self._mode(train=True)
        z_bL = torch.cat(blocks) if blocks else torch.empty((0, self.settings.bits))
        return torch.cat(self.comm.gather(z_bL, rows))

    def restore(self, resume: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of the same run; InvalidInput names what differs otherwise."""
        state = resume["state"]
        _check_identity(state["identity"], self.identity)
        self.head.load_state_dict(state["head"])
        self.source.load_state_dict(state["backbone"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.method.load_state_dict(state["method"])
        self.sums = _Sums.from_state(state["sums"], self.device)
        self.seconds = float(state["seconds"])
        self.rounds = copy.deepcopy(state["rounds"])
        self.history = copy.deepcopy(list(resume["history"]))
        self.position = _Position(**resume["position"])
        self.fresh = False

    def _epoch(self, save: Callable[[Checkpoint], None], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """The rest of the epoch at the position; its history entry."""
        self._mode(train=True)
        number = self.position.round * self.chosen.epochs + self.position.epoch
        batches = epoch_batches(self.data.n, self.chosen.batch, self.settings.seed, number)
        if self.position.step == 0:
            self.method.start_epoch(number, self.encode)
            self.sums = _Sums()
        every = self.settings.checkpoint_steps
        started = time.perf_counter()
        for batch, inputs in self.source.inputs(self._batches(batches, number)):
            self._step(batch, inputs)
            self.position.step += 1
            if every and self.position.step % every == 0 and self.position.step < self.steps:
                started = self._add_time(started)
                self._save(save)
                report({"event": "checkpoint", **self._entry(number)})
        self._add_time(started)
        return self._entry(number)

    def _batches(self, batches: NDArray[np.int64], number: int) -> Iterator[Batch]:
        for s in range(self.position.step, self.steps):
            yield Batch(batches[s], self.own, self.sizes, number * self.steps + s)

    def _step(self, batch: Batch, inputs: Tensor) -> None:
        """One optimiser step on one global batch."""
        self.counter.set(batch.step, torch.from_numpy(self.data.ids[batch.rows_B[batch.own]]))
        outputs = self.head(self.source.features(inputs, self.counter))
        loss = self.method.loss(outputs, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward.backward()  # type: ignore[no-untyped-call]
        self.gradients.reduce(self.comm)
        self.method.adjust(self.optimizer, batch.step)
        self.optimizer.step()
        self.sums.add(loss.terms)

    def _encode_block(self, start: int, size: int) -> Tensor:
        """z of rows start to start + size; the last block is padded to the same shape with its last row."""
        rows = np.minimum(np.arange(start, start + size), self.data.n - 1)
        z: Tensor = self.head(self.source.evaluate(rows))["z"]
        return z[: self.data.n - start].float().cpu()

    def _mode(self, train: bool) -> None:
        self.head.train(train)
        self.source.mode(train)

    def _add_time(self, started: float) -> float:
        now = time.perf_counter()
        self.sums.seconds += now - started
        self.seconds += now - started
        return now

    def _entry(self, number: int) -> dict[str, Any]:
        return {
            "round": self.position.round,
            "epoch": number,
            "step": number * self.steps + self.position.step,
            "steps": self.chosen.rounds * self.chosen.epochs * self.steps,
            **self.sums.means(),
            "seconds": self.sums.seconds,
            "images_per_s": self.sums.steps * self.chosen.batch / max(self.sums.seconds, 1e-9),
        }

    def _save(self, save: Callable[[Checkpoint], None]) -> None:
        if self.comm.rank != 0:
            return
        state = {
            "identity": dict(self.identity),
            "head": self.head.state_dict(),
            "backbone": self.source.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "sums": self.sums.state(),
            "seconds": self.seconds,
            "rounds": self.rounds,
        }
        save(Checkpoint(_copy(state), asdict(self.position), copy.deepcopy(self.history)))

    def _observe(self, entry: dict[str, Any]) -> None:
        if self.comm.rank != 0:
            return
        name = self.settings.method
        for term in self.sums.names:
            telemetry.TRAIN_LOSS.set(entry[term], method=name, term=term)
        telemetry.TRAIN_EPOCH.set(entry["epoch"] + 1, method=name)
        telemetry.TRAIN_STEPS.inc(self.sums.steps, method=name)
        telemetry.TRAIN_IMAGES_PER_S.set(entry["images_per_s"], method=name)


@dataclass
class _Position:
    """The step that comes next."""

    round: int = 0
    epoch: int = 0
    step: int = 0

    def next_epoch(self, epochs: int) -> None:
        """Behind the epoch just finished."""
        self.step, self.epoch = 0, self.epoch + 1
        if self.epoch == epochs:
            self.round, self.epoch = self.round + 1, 0


@dataclass
class _Sums:
    """Sums of the loss terms over the steps of an epoch; kept on the device, so that no step waits for them."""

    names: list[str] = field(default_factory=list)
    values: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    steps: int = 0
    seconds: float = 0.0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count one step."""
        values = torch.stack(list(terms.values())).double()
        if self.steps:
            self.values += values
        else:
            self.names, self.values = list(terms), values
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Mean of each term over the steps counted."""
        return {name: value / self.steps for name, value in zip(self.names, self.values.tolist(), strict=True)}

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return {"names": self.names, "values": self.values, "steps": self.steps, "seconds": self.seconds}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "_Sums":
        """From `state`."""
        values = state["values"].to(device, copy=True)
        return cls(list(state["names"]), values, int(state["steps"]), float(state["seconds"]))


class _Features:
    """Frozen mode: the head's input is read from committed features."""

    network: nn.Module | None = None

    def __init__(self, features_ND: NDArray[np.floating], device: torch.device, dtype: torch.dtype) -> None:
        self.width = features_ND.shape[1]
        self._device, self._dtype = device, dtype
        self._features_ND = features_ND
        self._staged = torch.empty(0, dtype=torch.from_numpy(np.empty(0, features_ND.dtype)).dtype)
        self._resident: Tensor | None = None
        if device.type == "cuda" and features_ND.nbytes < _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            self._resident = torch.from_numpy(np.array(features_ND)).to(device)

    def inputs(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with the features [b, D] of this rank's rows."""
        return ((batch, self.evaluate(batch.rows_B[batch.own])) for batch in batches)

    def features(self, inputs: Tensor, counter: Counter) -> Tensor:  # noqa: ARG002
        """The inputs are the features."""
        return inputs

    def evaluate(self, rows_b: NDArray[np.int64]) -> Tensor:
        """Features [b, D] of any rows."""
        if self._resident is not None:
            return self._resident[torch.from_numpy(rows_b).to(self._device)].to(self._dtype)
        # into memory that torch aligned: a product's last bits may depend on where its operands lie
        if len(self._staged) != len(rows_b):
            self._staged = torch.empty((len(rows_b), self.width), dtype=self._staged.dtype)
        np.take(self._features_ND, rows_b, axis=0, out=self._staged.numpy(), mode="clip")
        return self._staged.to(self._device, self._dtype, copy=True)

    def mode(self, train: bool) -> None:
        """Features are the same in both modes."""

    def parameters(self) -> list[nn.Parameter]:
        """Nothing to train."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


class _Images:
    """End to end: images through a backbone that is trained too."""

    def __init__(
        self,
        backbone: nn.Module,
        images: Callable[[NDArray[np.int64]], Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.network = backbone.to(device)
        if dtype != torch.float32:
            self.network = self.network.to(dtype)
        self._images, self._device, self._dtype = images, device, dtype
        self.mode(train=False)
        with torch.no_grad():
            found: tuple[int, ...] = tuple(self.evaluate(np.zeros(1, np.int64)).shape)
        if len(found) != 2:
            raise InvalidInput(
                f"the backbone must turn one image into features [1, D], found shape {found}; tap it after pooling"
            )
        self.width = found[1]

    def inputs(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with its images, the next batch's being made meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            ahead = None
            for batch in batches:
                behind, ahead = ahead, (batch, reader.submit(self._images, batch.rows_B[batch.own]))
                if behind is not None:
                    yield behind[0], behind[1].result()
            if ahead is not None:
                yield ahead[0], ahead[1].result()

    def features(self, inputs: Tensor, counter: Counter) -> Tensor:
        """Features [b, D], with gradient."""
        with counter.seeded(self._device):
            features: Tensor = self.network(self._place(inputs))
        return features

    def evaluate(self, rows_b: NDArray[np.int64]) -> Tensor:
        """Features [b, D] of any rows."""
        features: Tensor = self.network(self._place(self._images(rows_b)))
        return features

    def mode(self, train: bool) -> None:
        """Dropout follows the mode; batch norm keeps its statistics, which no rank could know of the global batch."""
        self.network.train(train)
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def parameters(self) -> list[nn.Parameter]:
        """The backbone's."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """The backbone's."""
        return self.network.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The backbone's."""
        self.network.load_state_dict(state)

    def _place(self, images: Tensor) -> Tensor:
        images = images.to(self._device)
        return images.to(self._dtype) if images.is_floating_point() else images


def _source(
    mode: str, data: TrainingData, backbone: nn.Module | None, device: torch.device, dtype: torch.dtype
) -> _Features | _Images:
    if mode == "frozen":
        if data.features is None or len(data.features) != data.n:
            found = "none" if data.features is None else f"{len(data.features)} rows"
            raise InvalidInput(
                f"frozen mode needs a feature row for each of the {data.n} training images, found {found}"
            )
        return _Features(data.features, device, dtype)
    if data.images is None or backbone is None:
        raise InvalidInput("training from images needs the images and a backbone; give both, or train with mode frozen")
    return _Images(backbone, data.images, device, dtype)


def _identity(
    module: MethodModule, data: TrainingData, settings: TrainSettings, chosen: Any, width: int
) -> dict[str, Any]:
    """Facts that a checkpoint and its run must share, in words a user can compare."""
    return {
        "format": FORMAT,
        "method": module.NAME,
        "bits": settings.bits,
        "seed": settings.seed,
        "mode": settings.mode,
        "feature width": width,
        "training images": data.n,
        "image ids": _digest(data.ids),
        "graph": _digest(data.graph.indptr) if data.graph is not None else "",
        "labels": _digest(data.labels) if data.labels is not None else "",
        "options": settings_text(chosen),
    }


def _check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [
        f"{name}: {wanted[name]} here, {found.get(name)} there" for name in wanted if found.get(name) != wanted[name]
    ]
    if differing:
        raise InvalidInput(
            f"the checkpoint belongs to another run ({'; '.join(differing)}); resume with the settings and data it was "
            f"made with, or start a new run"
        )


def _digest(array: NDArray[Any]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).hexdigest()


def _copy(value: Any) -> Any:
    """A deep copy with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value
