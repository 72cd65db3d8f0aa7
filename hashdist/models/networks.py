"""Networks by name, up to a tap: which layer is read, which weights it has, and how pixels become its input.

A network takes uint8 images [b, S, S, 3] and gives features [b, D]; scaling to the weights' mean and standard
deviation is its first layer, so that whoever holds a network cannot feed it wrongly. Its state dict has the names
of the model it was cut from, without the layers behind the tap.
"""

import difflib
import hashlib
import importlib
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from hashdist.ground.errors import InvalidInput, Unavailable
from hashdist.ground.progress import say
from hashdist.ground.settings import FeatureSettings, PreprocessSettings
from hashdist.models.cnnf import SIDE as CNNF_SIDE
from hashdist.models.cnnf import CnnF
from hashdist.store import of_file

PIXELS = "pixels"
CNNF = "cnnf"
_PIXELS_SIDE = 8
_FACTORY_SIDE = 224
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_TRANSFORMS_INPUT = ("googlenet", "inception_v3")  # hub weights of these expect a rescaled input
_NESTED = ("state_dict", "model", "model_state_dict")
_NAMED = 5  # keys shown in an error
_LONGEST = 16  # sides of a picture that is resized by its shorter one: the ends of a longer strip are cropped anyway


class Tap(NamedTuple):
    """A place in a network: a module or graph node, and whether only the first token of its output is wanted."""

    node: str
    first_token: bool = False


_TAPS: list[tuple[str, dict[str, Tap]]] = [
    # the first one is the default; relu7 is what the hashing papers read (classifier up to its second ReLU)
    (r"alexnet", {"relu7": Tap("classifier.5"), "relu6": Tap("classifier.2"), "pool": Tap("flatten")}),
    (CNNF, {"relu7": Tap("relu7"), "relu6": Tap("relu6"), "pool": Tap("flat")}),
    (r"vgg\d+(_bn)?", {"relu7": Tap("classifier.4"), "relu6": Tap("classifier.1"), "pool": Tap("flatten")}),
    (r"mobilenet_v2|squeezenet\d_\d", {"pool": Tap("features")}),
    (r"(wide_)?resnet.*|resnext.*|regnet.*|mobilenet_v3_.*|efficientnet.*|convnext.*", {"pool": Tap("avgpool")}),
    (r"googlenet|inception_v3", {"pool": Tap("avgpool")}),
    (r"densenet\d+|swin_.*", {"pool": Tap("flatten")}),
    (r"shufflenet.*|mnasnet.*", {"pool": Tap("mean")}),
    (r"maxvit_t", {"pool": Tap("classifier.1")}),
    (r"vit_.*", {"cls": Tap("encoder.ln", first_token=True)}),
]


@dataclass(frozen=True)
class Preprocess:
    """PreprocessSettings with every value known, and the weights' interpolation."""

    size: int
    resize: int
    mean: list[float]
    std: list[float]
    rotate180: bool
    interpolation: str

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] to uint8 [S, S, 3]: resized (antialiased, as torchvision does to PIL images), cropped."""
        if self.resize:
            image = _shorten(image)
            height, width = image.shape[:2]
            scaled = self._scale(image, _shorter_side(width, height, self.resize))
            top, left = (round((side - self.size) / 2) for side in scaled.shape[:2])
            scaled = scaled[top : top + self.size, left : left + self.size]
        else:
            scaled = self._scale(image, (self.size, self.size))
        return np.ascontiguousarray(scaled[::-1, ::-1] if self.rotate180 else scaled)

    def _scale(self, image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        if image.shape[1::-1] == size:
            return image
        method = Image.Resampling[self.interpolation.upper()]
        return np.asarray(Image.fromarray(image).resize(size, method))


def _shorten(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The middle of a strip: scaled whole, one of 8 x 8,000,000 pixels would be 50 gigapixels."""
    most = _LONGEST * min(image.shape[:2])
    top, left = (max(0, side - most) // 2 for side in image.shape[:2])
    return image[top : top + most, left : left + most]


def _shorter_side(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) with the shorter side `side`; the longer one is rounded down, as torchvision does."""
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


class Network(nn.Module):
    """uint8 images [b, S, S, 3] to features [b, D]: scaling, the body, and pooling of what the tap gives.

    A map [b, C, h, w] is averaged over its places, tokens [b, T, D] are averaged unless the tap names one.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, body: nn.Module, preprocess: Preprocess, first_token: bool = False) -> None:
        super().__init__()
        self.body, self.preprocess, self.first_token = body, preprocess, first_token
        self.tap, self.width = "", 0
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        # not part of the state: they belong to the settings
        self.register_buffer("scale", (1 / (255 * std))[:, None, None], persistent=False)
        self.register_buffer("shift", (-mean / std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features [b, D], in the dtype of the body's weights."""
        return self.pool(self.body(self.inputs(images)))

    def inputs(self, images: Tensor) -> Tensor:
        """Input of the body: [b, 3, S, S], channels last in memory as the images are."""
        pixels = images.permute(0, 3, 1, 2).to(self.scale.dtype)
        return pixels * self.scale + self.shift

    def pool(self, found: Tensor | dict[str, Tensor]) -> Tensor:
        """Features [b, D] of the output of the tap."""
        out = found["out"] if isinstance(found, dict) else found
        if out.ndim == 4:
            return out.mean((2, 3))
        if out.ndim == 3:
            return out[:, 0] if self.first_token else out.mean(1)
        return out


class Pixels(nn.Module):
    """Grey levels of the image itself, in [0, 1], row by row: features without any weights, for trials."""

    def forward(self, images: Tensor) -> Tensor:
        """float32 [b, S * S] of uint8 [b, S, S, 3]."""
        red, green, blue = images.to(torch.int32).unbind(-1)
        # ITU-R 601 in 16-bit fixed point: exact on every machine, and grey stays what it is
        grey = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
        return grey.flatten(1).to(torch.float32) / 255


class _Hooked(nn.Module):
    """A module's output inside a model that cannot be traced; the layers behind it run for nothing."""

    def __init__(self, model: nn.Module, tap: str) -> None:
        super().__init__()
        self.model, self.tap = model, tap

    def forward(self, x: Tensor) -> Tensor:
        """The output of the tapped module."""
        found: list[Tensor] = []
        hook = self.model.get_submodule(self.tap).register_forward_hook(lambda *call: found.append(call[2]))
        try:
            self.model(x)
        finally:
            hook.remove()
        return found[-1]


def open_network(settings: FeatureSettings, state: bytes | None = None) -> Network:
    """The float32 network up to the tap, to train or to run: uint8 [b, S, S, 3] -> float32 [b, width].

    Args:
        settings: which one.
        state: weights as `state_bytes` gives them, instead of those that the settings name.

    Returns:
        A module in evaluation mode with `width`, `tap` (resolved) and `preprocess`, which brings an image uint8
        [H, W, 3] to uint8 [S, S, 3].

    Raises:
        InvalidInput: an unknown backbone or tap, or weights that do not fit it. NotFound, Unavailable: the weights.
    """
    preprocess = resolve_preprocess(settings)
    if settings.backbone == PIXELS:
        return _with_width(_pixels(settings, preprocess), settings)
    with _fixed_seed():
        model = _model(settings, with_weights=state is None)
    if settings.weights not in ("hub", "random") and state is None:
        load_strictly(model, read_weights(settings.weights), settings.weights)
    made = _cut(model.eval(), settings, preprocess)
    if state is not None:
        load_strictly(made.body, _read_state(state, made.body), "the committed weights")
    return _with_width(made.eval(), settings)


def state_bytes(made: Network) -> bytes:
    """The weights of a network as safetensors: what `state` of `network` takes."""
    return bytes(safetensors.save({name: t.detach().cpu().clone() for name, t in made.body.state_dict().items()}))


def weights_digest(made: Network) -> str:
    """32 hex digits of the values of all weights, whatever file they came from; empty without weights."""
    state = made.body.state_dict()
    if not state:
        return ""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return found.hexdigest()


def weights_identity(settings: FeatureSettings) -> str:
    """A text that changes when the weights do; reads the file if there is one, downloads nothing.

    Raises InvalidInput for an unknown backbone, NotFound for a file that is not there.
    """
    if settings.backbone == PIXELS:
        return ""
    if settings.weights == "hub" and settings.backbone == CNNF:
        raise _nothing_to_download()
    if settings.weights == "hub" and ":" not in settings.backbone:
        return str(_enum(settings.backbone).DEFAULT.url)
    if settings.weights in ("hub", "random"):
        return settings.weights
    return hashlib.blake2b(_read(settings.weights), digest_size=16).hexdigest()


def warn_of_random(settings: FeatureSettings) -> None:
    """Say loudly that features made by these settings mean little, if so."""
    if settings.backbone != PIXELS and settings.weights == "random" and not settings.source and not settings.snapshot:
        say(
            f"WARNING: {settings.backbone} runs with RANDOM weights: its features mean little. This is for trials of "
            "the pipeline only; give --features.weights hub, or a .pth or .safetensors file"
        )


# Preprocessing


def resolve_preprocess(settings: FeatureSettings) -> Preprocess:
    """Every preprocessing value: the settings' where given, else the weights' own. Raises InvalidInput."""
    own = _own_preprocess(settings)
    given = settings.preprocess
    _check_preprocess(given, settings.backbone)
    size = given.size or own.size
    # a size of one's own means: straight to it, unless a crop is asked for
    resize = given.resize or (0 if given.size else own.resize)
    if resize and resize < size:
        raise InvalidInput(
            f"preprocess.resize must be at least the size that is cropped from it ({size}), found {resize}; raise it, "
            "or set it to 0 to resize straight to the size"
        )
    return Preprocess(
        size, resize, list(given.mean or own.mean), list(given.std or own.std), given.rotate180, own.interpolation
    )


def plain_preprocess(preprocess: Preprocess) -> dict[str, Any]:
    """As plain values, for a manifest."""
    return asdict(preprocess)


def _check_preprocess(given: PreprocessSettings, backbone: str) -> None:
    for name, values in (("mean", given.mean), ("std", given.std)):
        if values and backbone == PIXELS:
            raise InvalidInput(f"the backbone `pixels` takes no preprocess.{name}, found {values}; leave it out")
        if values and len(values) != 3:
            raise InvalidInput(f"preprocess.{name} needs 3 values (red, green, blue), found {values}")
    if any(value <= 0 for value in given.std):
        raise InvalidInput(f"preprocess.std must be positive, found {given.std}")
    if given.size < 0 or given.resize < 0:
        raise InvalidInput(f"preprocess sizes must not be negative, found size {given.size}, resize {given.resize}")


def _own_preprocess(settings: FeatureSettings) -> Preprocess:
    if settings.backbone == PIXELS:
        return Preprocess(_PIXELS_SIDE, 0, [0.0] * 3, [1.0] * 3, False, "bilinear")
    if settings.backbone == CNNF:
        # the mean only, on a scale of 255
        return Preprocess(CNNF_SIDE, 0, _IMAGENET[0], [1 / 255] * 3, False, "bilinear")
    if ":" in settings.backbone:
        return Preprocess(_FACTORY_SIDE, 0, *_IMAGENET, False, "bilinear")
    own = _enum(settings.backbone).DEFAULT.transforms()
    size, resize = own.crop_size[0], own.resize_size[0]
    return Preprocess(size, resize, list(own.mean), list(own.std), False, own.interpolation.value)


# Models


@contextmanager
def _fixed_seed() -> Iterator[None]:
    """Initial weights that are the same everywhere, without touching the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _pixels(settings: FeatureSettings, preprocess: Preprocess) -> Network:
    if settings.tap not in ("", PIXELS):
        raise InvalidInput(f"the backbone `pixels` has no taps, found {settings.tap!r}; leave it out")
    made = Network(Pixels(), preprocess)
    made.inputs = lambda images: images  # type: ignore[method-assign]
    made.tap = PIXELS
    return made


def _enum(name: str) -> Any:
    """The weights enum of a torchvision model. Raises InvalidInput for an unknown name, with near ones."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, 5) or known[:5]
        raise InvalidInput(
            f"a backbone must be `pixels`, `cnnf`, a torchvision model or `module:factory`, found {name!r}; "
            f"torchvision has {', '.join(near)} and others ({len(known)} in all)"
        )
    return torchvision.models.get_model_weights(name)


def _model(settings: FeatureSettings, with_weights: bool) -> nn.Module:
    if ":" in settings.backbone:
        return _made_by_user(settings.backbone)
    if settings.backbone == CNNF:
        if settings.weights == "hub" and with_weights:
            raise _nothing_to_download()
        return CnnF()
    options: dict[str, Any] = {}
    if settings.backbone in _TRANSFORMS_INPUT:
        options = {"init_weights": settings.weights == "random", "transform_input": settings.weights == "hub"}
    model: nn.Module = torchvision.models.get_model(settings.backbone, weights=None, **options)
    if settings.weights == "hub" and with_weights:
        load_strictly(model, _hub(settings.backbone), "torchvision's weights")
    return model


def _nothing_to_download() -> InvalidInput:
    return InvalidInput(
        "the backbone `cnnf` has no weights to download; name a file of them with --features.weights FILE (names and "
        "shapes: hashdist/models/cnnf.py), or --features.weights random, or take `alexnet`"
    )


def _hub(name: str) -> dict[str, Tensor]:
    weights = _enum(name).DEFAULT
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise Unavailable(
            f"the weights of {name} must be downloaded from {weights.url} and that failed ({error}). Connect, or put "
            f"the file into {torch.hub.get_dir()}/checkpoints, or name a file of weights with --features.weights FILE; "
            "--features.backbone pixels needs none"
        ) from error


def _made_by_user(name: str) -> nn.Module:
    module, _, factory = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise InvalidInput(
            f"a backbone `module:factory` must be importable wherever it runs, found {name!r}: {error}; put the module "
            "on PYTHONPATH, or into the working directory of the job"
        ) from error
    model = made[0] if isinstance(made, tuple) else made
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{name} must return a torch.nn.Module or (module, width), found {type(made).__name__}")
    if isinstance(made, tuple):
        model.declared_width = int(made[1])  # type: ignore[assignment]
    return model


def _with_width(made: Network, settings: FeatureSettings) -> Network:
    """The network with its width, found by running it once on a black image."""
    side = made.preprocess.size
    try:
        with torch.inference_mode():
            shape = list(made(torch.zeros(1, side, side, 3, dtype=torch.uint8)).shape)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise InvalidInput(
            f"{settings.backbone} must take images of {side} x {side} pixels at its tap {made.tap!r}, but fails: "
            f"{error}; set --features.preprocess.size to what the network takes"
        ) from error
    declared = getattr(made.body, "declared_width", shape[-1])
    if len(shape) != 2 or shape[1] != declared:
        raise InvalidInput(
            f"{settings.backbone} must give features of shape [1, {declared}] at its tap {made.tap!r}, found {shape}; "
            "choose a tap behind the pooling, or correct the width that the factory declares"
        )
    made.width = shape[1]
    return made


# Taps


def known_taps(backbone: str) -> dict[str, Tap]:
    """The named taps of a torchvision model, the default first; empty where none is known."""
    return next((taps for pattern, taps in _TAPS if re.fullmatch(pattern, backbone)), {})


def _cut(model: nn.Module, settings: FeatureSettings, preprocess: Preprocess) -> Network:
    taps = known_taps(settings.backbone)
    if not settings.tap and ":" in settings.backbone:
        return Network(model, preprocess)
    name = settings.tap or next(iter(taps), "")
    tap = taps.get(name, Tap(name))
    made = Network(_body(model, tap.node, settings, taps), preprocess, tap.first_token)
    made.tap = name
    return made


def _body(model: nn.Module, node: str, settings: FeatureSettings, taps: Mapping[str, Tap]) -> nn.Module:
    """The model up to a module or node: traced, or where that cannot be done, with a hook on the module."""
    modules = dict(model.named_modules())
    try:
        nodes = get_graph_node_names(model)[1]
    except Exception as error:
        # torch.fx raises whatever the model's own code raises under tracing
        if node in modules and node:
            say(f"{settings.backbone} cannot be traced ({error}); its tap {node!r} is read by a hook")
            return _Hooked(model, node)
        nodes = []
    if not node or not any(found == node or found.startswith(f"{node}.") for found in nodes):
        some = [name for name in modules if name and "." not in name]
        raise InvalidInput(
            f"{settings.backbone} needs a tap it has, found {settings.tap!r}; known taps: {', '.join(taps) or 'none'}; "
            f"any module by its dotted name will do too, e.g. {', '.join(some)}"
        )
    body: nn.Module = create_feature_extractor(model, {node: "out"})
    return body


# Weights


def read_weights(uri: str) -> dict[str, Tensor]:
    """A state dict, floating point as float32, of a .pth or .safetensors file; runs no code that is in it.

    Raises:
        NotFound, Unavailable. InvalidInput: another kind of file, or one that holds more than tensors.
    """
    suffix = uri.rpartition(".")[2].lower()
    if suffix == "safetensors":
        return _from_safetensors(_read(uri), uri)
    if suffix not in ("pth", "pt"):
        raise InvalidInput(
            f"features.weights must be `hub`, `random`, or a .pth, .pt or .safetensors file, found {uri!r}"
        )
    try:
        found = torch.load(BytesIO(_read(uri)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"{uri} must be a state dict that torch loads with weights_only=True, found {error}; save "
            "`model.state_dict()` alone, or as safetensors"
        ) from error
    return _plain_state(found, uri)


def _read(uri: str) -> bytes:
    store, name = of_file(uri)
    return store.get(name)


def _from_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return _plain_state(safetensors.load(data), where)
    except SafetensorError as error:
        raise InvalidInput(
            f"{where} must be a safetensors file, found {len(data)} bytes that are none: {error}"
        ) from error


def _read_state(state: bytes, body: nn.Module) -> dict[str, Tensor]:
    """Weights under the body's names; a trained Network's own state has `body.` before them."""
    found = _from_safetensors(state, "the committed weights")
    if set(found) == {f"body.{name}" for name in body.state_dict()}:
        return {name.removeprefix("body."): value for name, value in found.items()}
    return found


def _plain_state(found: Any, where: str) -> dict[str, Tensor]:
    for name in _NESTED:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InvalidInput(f"{where} must hold a dictionary of tensors; save `model.state_dict()`")
    if found and all(name.startswith("module.") for name in found):  # saved inside DataParallel
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load all weights of `model`. Raises InvalidInput naming what is missing, left over or of another shape."""
    own = model.state_dict()
    wrong = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
            for name in own
            if name in state and own[name].shape != state[name].shape
        ],
    }
    if any(wrong.values()):
        found = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
            for kind, names in wrong.items()
            if names
        )
        raise InvalidInput(
            f"{where} must hold the {len(own)} weights of the backbone, found {found}; name its own weights"
        )
    model.load_state_dict(state, strict=True)


def spec_settings(spec: Mapping[str, Any]) -> FeatureSettings:
    """The settings that build the network of a features manifest (or of Backbone.spec) again."""
    preprocess = {name: value for name, value in spec["preprocess"].items() if name != "interpolation"}
    return FeatureSettings(
        backbone=spec["backbone"],
        tap="" if spec["backbone"] == PIXELS else spec["tap"],
        weights=spec["weights"],
        preprocess=_preprocess_of(spec["backbone"], preprocess),
        precision=spec["precision"],
        batch=spec["batch"],
    )


def _preprocess_of(backbone: str, preprocess: dict[str, Any]) -> PreprocessSettings:
    if backbone == PIXELS:
        preprocess = {**preprocess, "mean": [], "std": []}
    return PreprocessSettings(**preprocess)
