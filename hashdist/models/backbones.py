"""Backbones as they are run on a whole collection: fast, and with features that do not depend on the neighbours.

The speed on a CPU hangs on this (measured by benchmarks/inference.py; docs/decisions.md, S10):

- batch norm is folded into the convolutions, memory is channels-last;
- the batch is cut so small that the largest activation stays below 32 MiB. glibc returns larger blocks to the
  kernel each time they are freed, and getting their pages again costs more than the arithmetic on them;
- float16 where the CPU has AVX512-FP16 and a check against float32 passes. Elsewhere float16 is emulated, slower by
  far, and bfloat16 is not close enough to float32 (cosine .994, 5.7 % of LSH bits flipped).

Every batch has one shape, the last one padded, and one number of threads, both in the manifest, so that a feature is
the same whatever is beside it.

Features of networks are stored as float16: they were made in float16 or pass through a nonlinearity that leaves about
three digits of meaning, the rounding (2**-11, relative) moves a cosine by about 1e-7, and everything downstream reads
half the bytes. Where a trial shows that float16 does not hold them (untrained networks can give 1e-10), they are stored
as float32. Pixels are stored as float32: k/255 has no exact float16, they are few, and they are used for checks.
"""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import FeatureSettings
from hashdist.methods.parts.threads import torch_threads
from hashdist.models.networks import (
    PIXELS,
    Network,
    open_network,
    plain_preprocess,
    warn_of_random,
    weights_digest,
)

LARGEST_ACTIVATION_BYTES = 31 << 20
"""Below glibc's largest threshold for mmap (32 MiB), with room for alignment."""

LEAST_COSINE = 0.999
"""Mean cosine between float16 and float32 features below which float16 is not taken."""

_LEAST_BATCH = 8  # fewer rows leave a fully connected layer reading its weights for nothing
_CHECK_IMAGES = 16
_CPUINFO = Path("/proc/cpuinfo")

Precision = Literal["float32", "float16"]


class Backbone:
    """A network made ready to run; built once per worker.

    Attributes:
        width: D.
        dtype: of the features, float16 or float32; see the head of this file.
        batch: rows of the one shape that the network is run on.
        precision: of the arithmetic.
        weights_digest: of the float32 weights; empty without weights.
        notes: what was decided on the way and why, for the manifest.
        spec: JSON; with the weights, everything that is needed to build it again (`spec_settings`).
    """

    def __init__(self, made: Network, settings: FeatureSettings, *, threads: int, device: str) -> None:
        if settings.batch < 1 or threads < 1:
            raise InvalidInput(f"batch and threads must be at least 1, found {settings.batch} and {threads}")
        self._device, self._threads = torch.device(device), threads
        self._preprocess = made.preprocess
        self.width, self.weights_digest = made.width, weights_digest(made)
        self.notes: list[str] = []
        self.dtype: np.dtype[Any]
        self.precision: Precision
        raw = settings.backbone == PIXELS
        self.batch = settings.batch if raw or device != "cpu" else cut_batch(made, settings.batch)
        self.dtype, self.precision = np.dtype(np.float32), "float32"
        self._network = made
        if not raw:
            self._network = self._fast(made)
            with torch_threads(threads), torch.inference_mode():
                self._choose(settings.precision)
        self.spec: dict[str, Any] = {
            "backbone": settings.backbone,
            "tap": made.tap,
            "weights": settings.weights,
            "weights_digest": self.weights_digest,
            "preprocess": plain_preprocess(made.preprocess),
            "precision": self.precision,
            "dtype": self.dtype.name,
            "width": self.width,
            "batch": self.batch,
            "threads": threads,
            "device": self._device.type,
            "notes": self.notes,
        }

    def prepare(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] to the network's input uint8 [S, S, 3]. Safe to call from many threads."""
        return self._preprocess(image)

    def forward(self, images_nSS3: NDArray[np.uint8]) -> NDArray[np.floating]:
        """Features [n, D] of prepared images uint8 [n, S, S, 3], any n.

        A row is the same bits whatever the other rows are. A feature that float16 cannot hold is infinite or NaN.
        """
        features_nD = np.empty((len(images_nSS3), self.width), self.dtype)
        with torch.inference_mode(), torch_threads(self._threads), np.errstate(over="ignore"):
            for start in range(0, len(images_nSS3), self.batch):
                part = images_nSS3[start : start + self.batch]
                found = self._run(self._network, self._pad(part), self.precision)
                features_nD[start : start + len(part)] = found[: len(part)].cpu().numpy()
        return features_nD

    def _pad(self, part: NDArray[np.uint8]) -> Tensor:
        # torch's own memory, always: how a kernel sums may depend on how its input is aligned
        shape = (self.batch, self._preprocess.size, self._preprocess.size, 3)
        padded = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        padded.numpy()[: len(part)] = part
        return padded.to(self._device, non_blocking=True)

    def _run(self, net: Network, images: Tensor, precision: Precision) -> Tensor:
        """float32 features of one batch. On a GPU float16 is autocast; on a CPU the weights are halved beforehand."""
        inputs = net.inputs(images)
        if precision == "float16" and self._device.type == "cpu":
            return net.pool(net.body(inputs.half())).float()
        autocast = precision == "float16" and self._device.type != "cpu"
        with torch.autocast(self._device.type, torch.float16) if autocast else nullcontext():
            return net.pool(net.body(inputs)).float()

    def _fast(self, made: Network) -> Network:
        fast = copy.deepcopy(made).eval().requires_grad_(False)
        folded, note = fold_batch_norm(fast.body)
        self.notes.append(note)
        fast.body = folded.to(memory_format=torch.channels_last)
        return fast.to(self._device)

    def _choose(self, wanted: str) -> None:
        """Set how features are stored and in which precision they are made, by trial on made-up pictures."""
        count = min(_CHECK_IMAGES, self.batch)
        images = self._pad(check_images(count, self._preprocess.size))
        exact_nD = self._run(self._network, images, "float32")[:count]
        stored = closeness(exact_nD.half(), exact_nD)
        if stored.good:
            self.dtype = np.dtype(np.float16)
        else:
            self.notes.append(f"stored as float32: float16 does not hold the features ({stored})")
        if wanted == "float32":
            return
        if wanted == "auto" and self._device.type == "cpu" and not has_float16():
            self.notes.append("float32: this CPU has no AVX512-FP16")
            return
        self._try_float16(images, exact_nD, required=wanted == "float16")

    def _try_float16(self, images: Tensor, exact_nD: Tensor, *, required: bool) -> None:
        half = copy.deepcopy(self._network)
        if self._device.type == "cpu":
            half.body.half()
        try:
            found = closeness(self._run(half, images, "float16")[: len(exact_nD)], exact_nD)
        except RuntimeError as error:
            found = Closeness(0.0, False, f"it cannot run: {error}")
        if found.good:
            self.notes.append(f"float16: {found} on {len(exact_nD)} made-up pictures")
            self._network, self.precision = half, "float16"
        elif required:
            raise InvalidInput(
                f"float16 must agree with float32 (mean cosine at least {LEAST_COSINE}, all values finite), found "
                f"{found}; use --features.precision float32"
            )
        else:
            self.notes.append(f"float32: float16 does not agree ({found})")


class Closeness(NamedTuple):
    """How close features are to the exact ones: their mean cosine, and whether all are finite."""

    cosine: float
    finite: bool
    remark: str = ""

    @property
    def good(self) -> bool:
        """Whether one may stand for the other."""
        return self.finite and self.cosine >= LEAST_COSINE

    def __str__(self) -> str:
        return self.remark or f"mean cosine {self.cosine:.6f}{'' if self.finite else ', not all values finite'}"


def closeness(found_nD: Tensor, exact_nD: Tensor) -> Closeness:
    """Compare features; in float64, so that nothing is lost on the way."""
    a, b = found_nD.double(), exact_nD.double()
    lengths = a.norm(dim=1) * b.norm(dim=1)
    # two zero vectors agree, a zero and another one do not
    cosines = torch.where(lengths > 0, (a * b).sum(1) / lengths, (a == b).all(1).double())
    return Closeness(float(cosines.mean()), bool(a.isfinite().all()))


def build_backbone(
    settings: FeatureSettings, *, threads: int = 1, device: str = "cpu", state: bytes | None = None
) -> Backbone:
    """The backbone that the settings name.

    Args:
        settings: which network, tap, weights, preprocessing, precision and batch.
        threads: CPU threads of a forward pass.
        device: `cpu` or `cuda`.
        state: committed weights (safetensors), read instead of those that the settings name.

    Raises:
        InvalidInput: unknown names, weights that do not fit, or float16 asked for where it does not agree with
            float32. NotFound, Unavailable: the weights.
    """
    if state is None:
        warn_of_random(settings)
    return Backbone(open_network(settings, state), settings, threads=threads, device=device)


def has_float16(cpuinfo: Path | None = None) -> bool:
    """Whether this CPU computes in float16 (AVX512-FP16), from the flags that Linux lists."""
    try:
        text = (cpuinfo or _CPUINFO).read_text()
    except OSError:
        return False
    return any("avx512_fp16" in line.split() for line in text.splitlines() if line.startswith("flags"))


def cut_batch(made: Network, batch: int) -> int:
    """The largest halving of `batch` whose largest activation stays below LARGEST_ACTIVATION_BYTES, at least 8.

    Depends on the network and the image size alone, never on a timing: it is part of what a feature depends on.
    """
    largest = largest_activation(made)
    while batch > _LEAST_BATCH and batch * largest > LARGEST_ACTIVATION_BYTES:
        batch //= 2
    return batch


def largest_activation(made: Network) -> int:
    """Bytes of the largest float32 output of any layer for one image."""
    sizes = [0]
    leaves = [module for module in made.body.modules() if not list(module.children())]

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(4 * output[0].numel())

    hooks = [leaf.register_forward_hook(note) for leaf in leaves]
    side = made.preprocess.size
    try:
        with torch.inference_mode():
            made(torch.zeros(1, side, side, 3, dtype=torch.uint8))
    finally:
        for hook in hooks:
            hook.remove()
    return max(sizes)


def fold_batch_norm(body: nn.Module) -> tuple[nn.Module, str]:
    """The body, put into evaluation mode, with every batch norm that follows a convolution folded into it.

    Returns the same body, and why, where it cannot be traced; computes the same function either way.
    """
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in body.eval().modules())
    try:
        # a cut network is a graph already, but one that keeps torchvision's blocks of convolution and norm whole
        traced = fx.symbolic_trace(body)
    except Exception as error:
        # torch.fx raises whatever the model's own code raises under tracing
        return body, f"batch norm not folded: the network cannot be traced ({type(error).__name__}: {error})"
    folded = 0
    modules = dict(traced.named_modules())
    uses = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        conv = _convolution_before(node, modules)
        if conv is None or uses.count(conv.target) != 1 or uses.count(node.target) != 1:
            continue
        fused = fuse_conv_bn_eval(modules[str(conv.target)], modules[str(node.target)])
        traced.set_submodule(str(conv.target), fused)
        node.replace_all_uses_with(conv)
        traced.graph.erase_node(node)
        folded += 1
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval(), f"{folded} of {norms} batch norms folded into convolutions"


def _convolution_before(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The convolution that a batch norm follows, if it feeds nothing else."""
    if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.BatchNorm2d):
        return None
    before = node.args[0]
    if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
        return None
    return before if isinstance(modules[str(before.target)], nn.Conv2d) else None


def check_images(count: int, size: int) -> NDArray[np.uint8]:
    """Smooth made-up pictures uint8 [count, size, size, 3], the same everywhere: closer to photographs than noise."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BILINEAR)) for c in coarse])
