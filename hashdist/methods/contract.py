"""The contract of a method's file with the one training loop (hashdist/models/training.py).

A method is found by its file name in hashdist/methods. A deep method's file offers

- `NAME`, `CITATION`, and `USES`, what it learns from besides features or images: "graph", "labels" or "features"
  (nothing else);
- `GRAPH`: the rule by which its graph is built (hashdist/methods/parts/graph.py): "and" (DSAH), "union" (DDH), "none";
- `Settings`: a frozen dataclass of its hyper-parameters, with at least `rounds`, `epochs` (per round) and `batch`
  (images of a **global** batch), and `PRESETS`, named instances of it, "paper" among them;
- `network(settings, width, bits, generator, frozen, classes)`: the head, from features [b, D] to a dict of outputs, of
  which "z" [b, L] holds the hash layer (bit = z >= 0) and the others whatever the loss needs;
- `Method`: a subclass of the class below: loss, optimiser, and what it keeps besides weights.

A shallow method's file offers `NAME`, `CITATION`, `USES` ("labels" or "features") and `fit(features_ND, bits, seed)`,
or with labels `fit(features_ND, bits, seed, labels_NC)`, instead; `fit` returns a picklable encoder, features [N, D]
-> float32 [N, L] (bit = value >= 0).
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import ModuleType
from typing import Any, Literal, Protocol, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hashdist.methods
from hashdist.ground.errors import InvalidInput
from hashdist.methods.parts.communicator import Communicator
from hashdist.methods.parts.standardize import Standardize

Outputs = dict[str, Tensor]
"""Outputs of a head for b images: "z" [b, L] and any others, each with b rows."""

Encoder = Callable[[NDArray[np.floating]], NDArray[np.float32]]
"""A fitted shallow method: features [N, D] -> [N, L], bit = value >= 0."""

GraphRule = str
"""How a method's graph is built from neighbour lists: a rule of hashdist/methods/parts/graph.py."""

Encode = Callable[[], Tensor]
"""Hash-layer outputs z [n, L] of all training images in evaluation mode, float32 on the CPU, the same on every
rank. All ranks must call it together."""


@dataclass(frozen=True)
class Graph:
    """The neighbour graph of the n training images, in dense row numbers (rank by id).

    Args:
        indptr: int64 [n + 1]: the positives of row i are indices[indptr[i]:indptr[i + 1]].
        indices: int32, ascending within a row, without i itself (the diagonal of W is +1 by definition).
        neighbours: int32 [n, k1] by (similarity descending, id ascending), without i itself; None where the
            graph was given from outside.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    neighbours: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class TrainingData:
    """The n training images: row i is the i-th smallest id. Arrays may be memory-mapped.

    Args:
        ids: int64 [n], ascending.
        features: [n, D] float16 or float32 in the committed dtype; None when training from images.
        images: rows (int64 [b]) -> the backbone's input for these rows, as a CPU tensor of b entries; must be a
            pure function of (rows) and is called from a thread of its own. None in frozen mode.
        labels: bool [n, C], one column a class; None where there are none.
        graph: the neighbour graph; None where the method uses none.
    """

    ids: NDArray[np.int64]
    features: NDArray[np.floating] | None = None
    images: Callable[[NDArray[np.int64]], Tensor] | None = None
    labels: NDArray[np.bool_] | None = None
    graph: Graph | None = None

    @property
    def n(self) -> int:
        """Number of training images."""
        return len(self.ids)

    @property
    def classes(self) -> int:
        """C, the number of classes; 0 without labels."""
        return 0 if self.labels is None else self.labels.shape[1]


@dataclass(frozen=True)
class Batch:
    """One global batch, known to every rank.

    Args:
        rows_B: int64 [B], the rows of the training images in the batch's own order.
        own: which of them this rank computes; the ranks' slices follow one another.
        sizes: how many each rank computes; they may differ by one.
        step: optimiser steps taken before this batch.
    """

    rows_B: NDArray[np.int64]
    own: slice
    sizes: tuple[int, ...]
    step: int


@dataclass(frozen=True)
class Loss:
    """The loss of one global batch.

    Args:
        backward: what this rank differentiates; **summed** over the ranks, the gradients are those of the loss of
            the whole batch (hashdist/methods/parts/pairs.py).
        terms: values of the whole batch, detached, the same on every rank: "loss" and its parts.
    """

    backward: Tensor
    terms: dict[str, Tensor]


@dataclass
class Place:
    """Where a method runs and what it runs on.

    Args:
        bits: L, the code length.
        frozen: the head alone is trained, on committed features; else end to end from images.
        data: the training images.
        comm: the ranks.
        device: where tensors of a step live.
        dtype: of weights and losses; float64 only to check equality between world sizes.
        seed: of the run.
        threads: CPU threads this process may use.
    """

    bits: int
    frozen: bool
    data: TrainingData
    comm: Communicator
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    seed: int = 0
    threads: int = 1


class MethodSettings(Protocol):
    """The hyper-parameters every method has."""

    @property
    def rounds(self) -> int:
        """Rounds of training; between two of them the method may change what it trains towards."""

    @property
    def epochs(self) -> int:
        """Epochs per round."""

    @property
    def batch(self) -> int:
        """Images of a global batch."""


class Method:
    """A method at work in one run, on one rank. All ranks call the same hooks at the same time."""

    def __init__(self, settings: Any, place: Place) -> None:
        self.settings = settings
        self.place = place

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimiser of `parameters` (the head's, and the backbone's when training from images)."""
        raise NotImplementedError

    def adjust(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rate and the like for the step after `step` steps: a pure function of `step`."""

    def prepare(self, head: nn.Module, encode: Encode) -> None:  # noqa: ARG002
        """Once, before the first step of a new run (not when it resumes): constants of the head, banks, warnings.

        Here: frozen features are centred and scaled to `settings.feature_length`, where that is positive and the head
        has a `standardize` (docs/decisions.md, H6). Methods that prepare more call this first.
        """
        length, features = getattr(self.settings, "feature_length", 0.0), self.place.data.features
        standardize = getattr(head, "standardize", None)
        if self.place.frozen and length > 0 and features is not None and isinstance(standardize, Standardize):
            standardize.fit(features, length)

    def start_epoch(self, epoch: int, encode: Encode) -> None:
        """Before the first step of an epoch (counted over all rounds), not when resuming within one."""

    def loss(self, outputs: Outputs, batch: Batch) -> Loss:
        """The loss of a global batch from this rank's outputs, all with len(own) rows."""
        raise NotImplementedError

    def end_of_round(self, round_: int, encode: Encode) -> dict[str, Any]:  # noqa: ARG002
        """After the last step of a round: change what is trained towards; returns what to report about it."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state of the method besides weights: tensors, numbers, strings and containers of them only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state_dict; tensors come from the CPU."""


class MethodModule(Protocol):
    """The file of a deep method."""

    NAME: str
    CITATION: str
    USES: Literal["graph", "labels", "features"]
    GRAPH: GraphRule
    PRESETS: dict[str, Any]
    Settings: type[Any]
    Method: type[Method]

    def network(
        self, settings: Any, width: int, bits: int, generator: torch.Generator, frozen: bool = True, classes: int = 0
    ) -> nn.Module:
        """The head: features [b, width] -> Outputs; its initial weights depend on `generator` only.

        `classes` is C of the training images, 0 without labels; methods that predict classes need it.

        `frozen` says how it will be trained (Place.frozen), and may only matter to layers that are the identity
        in evaluation mode. Randomness in training only by nn.Dropout (hashdist/models/dropout.py replaces it).
        """


def known_methods() -> list[str]:
    """Names of all methods, deep and shallow: the files beside this one."""
    files = pkgutil.iter_modules(hashdist.methods.__path__)
    return sorted(file.name for file in files if not file.ispkg and file.name != "contract")


def shallow_methods() -> list[str]:
    """Names of the methods that are fitted on features, not trained by the training loop."""
    return [name for name in known_methods() if not hasattr(find_method(name), "Method")]


def find_method(name: str) -> ModuleType:
    """The file of a method, deep or shallow; InvalidInput lists the known ones."""
    if name not in known_methods():
        raise InvalidInput(f"no method is called {name!r}; choose one of {', '.join(known_methods())}")
    return importlib.import_module(f"hashdist.methods.{name}")


def deep_method(module: ModuleType) -> MethodModule:
    """`module` as a deep method; InvalidInput where it is a shallow one."""
    if not hasattr(module, "Method"):
        raise InvalidInput(
            f"method {module.NAME!r} is shallow: it is fitted by its fit(), not trained by the training loop"
        )
    return cast(MethodModule, module)


def fit_shallow(
    module: ModuleType, features_ND: NDArray[np.floating], labels_NC: NDArray[np.bool_] | None, bits: int, seed: int
) -> Encoder:
    """Fit a shallow method on training features, with their labels where it uses any. Raises InvalidInput."""
    if module.USES == "labels":
        encoder = module.fit(features_ND, bits, seed, check_labels(module.NAME, labels_NC))
    else:
        encoder = module.fit(features_ND, bits, seed)
    return cast(Encoder, encoder)


def check_labels(name: str, labels_NC: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """The labels; InvalidInput where there are none, or where an image has none."""
    if labels_NC is None or not labels_NC.shape[1]:
        raise InvalidInput(
            f"method {name} learns from labels, and the training images have none; use a collection with labels, or a "
            f"method that needs none"
        )
    bare = np.flatnonzero(~labels_NC.any(1))
    if len(bare):
        raise InvalidInput(
            f"method {name} needs at least one label for every training image, found {len(bare)} of {len(labels_NC)} "
            f"with an empty label set (the first: row {bare[0]}); leave them out with --graph.labelled true"
        )
    return labels_NC


def method_settings(module: MethodModule, preset: str, options: Mapping[str, Any] | None = None) -> Any:
    """The settings of a preset with single values replaced, as from YAML or the command line.

    InvalidInput for an unknown preset or option (naming the known ones) and for a value that is not of the
    option's type; an int is taken for a float, and "inf" and "-inf" are floats.
    """
    if preset not in module.PRESETS:
        raise InvalidInput(f"method {module.NAME} has no preset {preset!r}; choose one of {', '.join(module.PRESETS)}")
    hints = get_type_hints(module.Settings)
    known = [f.name for f in fields(module.Settings)]
    values = {}
    for name, value in (options or {}).items():
        if name not in known:
            raise InvalidInput(f"method {module.NAME} has no option {name!r}; its options are {', '.join(known)}")
        values[name] = _as_type(f"option {name} of method {module.NAME}", value, hints[name])
    return replace(module.PRESETS[preset], **values)


def settings_text(settings: Any) -> str:
    """The settings as canonical JSON, for fingerprints and manifests."""
    return json.dumps(asdict(settings), sort_keys=True)


def _as_type(what: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise InvalidInput(f"{what} must be one of {', '.join(map(repr, get_args(kind)))}, found {value!r}")
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InvalidInput(f"{what} must be a number, found {value!r}") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidInput(f"{what} must be of type {kind.__name__}, found {value!r}")
    return value


def check_schedule(settings: MethodSettings, n: int, world_size: int) -> None:
    """InvalidInput unless there is a full global batch with at least one image for every rank."""
    for name in ("rounds", "epochs", "batch"):
        if getattr(settings, name) < 1:
            raise InvalidInput(f"{name} must be at least 1, found {getattr(settings, name)}")
    if settings.batch < world_size:
        raise InvalidInput(
            f"a global batch needs at least one image per worker: found batch {settings.batch} and "
            f"{world_size} workers; raise the method's option batch or lower train.workers"
        )
    if n < settings.batch:
        raise InvalidInput(
            f"training needs at least one full global batch of {settings.batch} images, found {n} training images; "
            f"lower the method's option batch or train on more images"
        )
