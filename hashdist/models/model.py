"""A committed model: images, or features of its backbone, to packed codes.

A model is self-contained: its artefact holds the head, the backbone's weights and how to build both again. Every
code is computed in batches of one fixed shape, padded, so it does not depend on which images were beside it
(docs/decisions.md, S10).
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image as PilImage
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import nn

from hashdist.collection.decode import BadImage, decode
from hashdist.ground.bits import BIT_ORDER, check_bits, pack
from hashdist.ground.errors import Corrupt, InvalidInput, NotFound
from hashdist.ground.threads import in_order
from hashdist.methods.contract import deep_method, find_method, method_settings
from hashdist.methods.parts.threads import torch_threads
from hashdist.models.backbones import Backbone, build_backbone
from hashdist.models.networks import spec_settings
from hashdist.store.commit import Artefact, digest, open_artefact, read_file

HEAD_BATCH = 64
"""Rows the head is run on at once; the last batch is padded. Few, so that one query costs little."""

NOT_FINITE = "not-finite: the backbone's feature holds an infinity or is not a number"
"""Reason of an image whose feature cannot be used."""

NO_BACKBONE = "none"
"""The backbone that the manifest of features names where they came from outside."""

_AHEAD = 4  # images decoded while the network works on others

DECISIVE = ("backbone", "tap", "weights_digest", "preprocess", "precision", "dtype")
"""Fields of a features' manifest that must be the model's own: what else differs leaves a feature as it is."""

Picture = str | Path | bytes | PilImage | NDArray[np.uint8]
"""An image as callers may give it: a path, encoded bytes, a PIL image, or uint8 pixels [H, W, 3] or [H, W]."""


class Encoded(NamedTuple):
    """Codes of a run of images, some of which may not be readable.

    Attributes:
        codes: uint8 [N, L/8]; zeros where there is a reason.
        reasons: per image, why it has no code; None where it has one.
        features: [N, D], what the codes were made of; zeros where there is a reason. None where nobody asked.
    """

    codes: NDArray[np.uint8]
    reasons: list[str | None]
    features: NDArray[np.floating] | None = None


def load_model(uri: str, *, threads: int = 1, device: str = "cpu") -> "Model":
    """The model committed at `uri`.

    Args:
        uri: of a models artefact: a path, file://... or s3://...
        threads: CPU threads per forward pass.
        device: where the backbone and the head run.

    Raises:
        NotFound: nothing is committed there.
        InvalidInput: another kind of artefact, or a newer format.
        Corrupt: weights that are not those that were committed.
    """
    return Model(open_artefact(uri, "models"), threads=threads, device=device)


class Model:
    """An image or a feature to a code of `bits` bits. Weights are read when first needed.

    Pickling sends the artefact's place, not the weights.
    """

    def __init__(self, artefact: Artefact, *, threads: int = 1, device: str = "cpu") -> None:
        self._artefact, self._threads, self._device = artefact, threads, device
        self.manifest: dict[str, Any] = artefact.manifest()
        _check(self.manifest, artefact.uri)
        self._head: nn.Module | None = None
        self._backbone: Backbone | None = None

    def __reduce__(self) -> tuple[Callable[..., "Model"], tuple[Artefact, int, str]]:
        return _reopen, (self._artefact, self._threads, self._device)

    @property
    def uri(self) -> str:
        """Where it is committed."""
        return self._artefact.uri

    @property
    def bits(self) -> int:
        """L, the code length."""
        return int(self.manifest["bits"])

    @property
    def digest(self) -> str:
        """Digest of everything a code depends on: weights, how they are used, bits."""
        return str(self.manifest["model_digest"])

    @property
    def mode(self) -> str:
        """`frozen`: a head on a given backbone; `images`: the backbone was trained too."""
        return str(self.manifest["mode"])

    @property
    def width(self) -> int:
        """D, the width of the features that the head takes."""
        return int(self.manifest["input_width"])

    @property
    def backbone(self) -> dict[str, Any]:
        """The backbone whose features the head takes, as the manifest of features describes it."""
        return dict(self.manifest["backbone"])

    def encode(self, images: Iterable[Picture]) -> NDArray[np.uint8]:
        """Codes uint8 [N, L/8] of images. Raises InvalidInput for one that cannot be read."""
        encoded = self.encode_readable(images)
        bad = [(row, reason) for row, reason in enumerate(encoded.reasons) if reason]
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise InvalidInput(f"every image must be readable, found number {bad[0][0]}: {bad[0][1]}{more}")
        return encoded.codes

    def encode_readable(self, images: Iterable[Picture | BadImage], *, keep_features: bool = False) -> Encoded:
        """Codes of the images that can be read, and reasons for the others; decoding runs ahead on threads."""
        backbone = self._open_backbone()
        codes = [np.zeros((0, self.bits // 8), np.uint8)]
        features = [np.zeros((0, backbone.width), backbone.dtype)]
        reasons: list[str | None] = []
        prepared = in_order(partial(_prepare, backbone), images, _AHEAD)
        while batch := list(islice(prepared, backbone.batch)):
            found = [pixels if isinstance(pixels, str) else None for pixels in batch]
            good = np.array([row for row, reason in enumerate(found) if reason is None], np.int64)
            part = np.zeros((len(batch), self.bits // 8), np.uint8)
            made = np.zeros((len(batch), backbone.width), backbone.dtype)
            if len(good):
                features_nD = backbone.forward(np.stack([batch[row] for row in good]))
                finite = np.isfinite(features_nD).all(1)
                part[good[finite]] = self.encode_features(features_nD[finite])
                made[good[finite]] = features_nD[finite]
                for row in good[~finite]:
                    found[row] = NOT_FINITE
            codes.append(part)
            reasons.extend(found)
            features += [made] if keep_features else []
        return Encoded(np.concatenate(codes), reasons, np.concatenate(features) if keep_features else None)

    def encode_features(self, features_ND: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Codes uint8 [N, L/8] of features [N, D] of this model's backbone, float16 or float32."""
        if features_ND.ndim != 2 or features_ND.shape[1] != self.width:
            raise InvalidInput(
                f"{self.uri} takes features of shape [N, {self.width}], found {list(features_ND.shape)}; "
                "use those of the backbone it was trained on"
            )
        head = self._open_head()
        codes = np.empty((len(features_ND), self.bits // 8), np.uint8)
        # torch's own memory: a product's last bits may depend on how its operands are aligned
        padded = torch.zeros((HEAD_BATCH, self.width))
        with torch.inference_mode(), torch_threads(self._threads):
            for start in range(0, len(features_ND), HEAD_BATCH):
                rows = features_ND[start : start + HEAD_BATCH]
                padded.numpy()[: len(rows)] = rows
                padded[len(rows) :] = 0
                z_BL = head(padded.to(self._device))["z"].float().cpu().numpy()
                codes[start : start + len(rows)] = pack(z_BL[: len(rows)])
        return codes

    def _open_head(self) -> nn.Module:
        if self._head is None:
            data = read_file(self._artefact.store, self.manifest["head"])
            self._head = build_head(self.manifest, data, self.uri).eval().to(self._device)
        return self._head

    def _open_backbone(self) -> Backbone:
        if self._backbone is None:
            self._backbone = _build_backbone(self._artefact, self.manifest, self._threads, self._device)
        return self._backbone


def _reopen(artefact: Artefact, threads: int, device: str) -> Model:
    return Model(artefact, threads=threads, device=device)


def describe(
    *,
    method: str,
    options: Mapping[str, Any],
    bits: int,
    mode: str,
    width: int,
    classes: int,
    backbone: Mapping[str, Any],
    head: Mapping[str, Any],
    backbone_weights: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The fields of a model's manifest from which it is loaded.

    Args:
        method: file name of the method, which knows how to build the head.
        options: every setting of the method, as plain values.
        bits: L.
        mode: `frozen` or `images`.
        width: D.
        classes: C of the training images, 0 without labels.
        backbone: what makes the features, as in the features' manifest.
        head: entry of the head's weights, in the model's folder.
        backbone_weights: entry of the backbone's; None for a backbone without weights, or features from outside.
    """
    made_by = {name: backbone[name] for name in DECISIVE if name in backbone}
    identity = {"head": head["sha256"], "method": method, "bits": bits, "width": width, "backbone": made_by}
    return {
        "method": method,
        "method_settings": dict(options),
        "bits": bits,
        "bit_order": BIT_ORDER,
        "mode": mode,
        "input_width": width,
        "classes": classes,
        "backbone": dict(backbone),
        "head": dict(head),
        "head_batch": HEAD_BATCH,
        "backbone_weights": dict(backbone_weights) if backbone_weights else None,
        "model_digest": digest(identity),
    }


def check_features(model: Mapping[str, Any], features: Mapping[str, Any], model_uri: str, features_uri: str) -> None:
    """InvalidInput unless the features of that manifest are made as those of the model's backbone are.

    Args:
        model: a model's manifest.
        features: a features' manifest.
        model_uri: for the message.
        features_uri: for the message.
    """
    if features["width"] != model["input_width"]:
        raise InvalidInput(
            f"{model_uri} takes features of width {model['input_width']}, found width {features['width']} in "
            f"{features_uri}; extract features with the model's backbone"
        )
    wanted = {name: value for name, value in model["backbone"].items() if name in DECISIVE}
    differing = [f"{n}: {v!r} wanted, {features.get(n)!r} found" for n, v in wanted.items() if features.get(n) != v]
    if differing:
        raise InvalidInput(
            f"{features_uri} must be made by the backbone of {model_uri}, but differs in {'; '.join(differing)}; "
            "extract features with the model's backbone"
        )


def build_head(manifest: Mapping[str, Any], data: bytes, uri: str) -> nn.Module:
    """The head of a model's manifest with the weights of a safetensors file, on the CPU."""
    method = deep_method(find_method(manifest["method"]))
    settings = method_settings(method, "paper", manifest["method_settings"])
    frozen = manifest["mode"] == "frozen"
    sizes = manifest["input_width"], manifest["bits"]
    head = method.network(settings, *sizes, torch.Generator(), frozen=frozen, classes=manifest["classes"])
    try:
        head.load_state_dict(safetensors.load(data))
    except (SafetensorError, RuntimeError) as error:
        raise Corrupt(f"{uri}: the head must hold the weights of {manifest['method']}: {error}") from error
    return head


def _check(manifest: Mapping[str, Any], uri: str) -> None:
    check_bits(int(manifest["bits"]))
    if manifest["bit_order"] != BIT_ORDER:
        raise InvalidInput(f"{uri}: bit order {BIT_ORDER!r} is required, found {manifest['bit_order']!r}")


def _build_backbone(artefact: Artefact, manifest: Mapping[str, Any], threads: int, device: str) -> Backbone:
    spec, entry = manifest["backbone"], manifest["backbone_weights"]
    if spec.get("backbone", NO_BACKBONE) == NO_BACKBONE:
        raise InvalidInput(
            f"{artefact.uri} was trained on features from outside and cannot read images; give it such features "
            "(encode_features), or train one with --features.backbone"
        )
    state = read_file(artefact.store, entry) if entry else None
    return build_backbone(spec_settings(spec), threads=threads, device=device, state=state)


def _prepare(backbone: Backbone, image: Picture | BadImage) -> NDArray[np.uint8] | str:
    """The backbone's input uint8 [S, S, 3], or why there is none."""
    try:
        return backbone.prepare(pixels(image))
    except BadImage as error:
        return error.reason


def pixels(image: Picture | BadImage) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] of an image given in any way. Raises BadImage, NotFound, InvalidInput."""
    if isinstance(image, BadImage):
        raise image
    if isinstance(image, str | Path):
        try:
            return decode(Path(image).read_bytes())
        except FileNotFoundError as error:
            raise NotFound(f"an image file is required, found nothing at {image}") from error
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image))
    if isinstance(image, PilImage):
        buffer = BytesIO()
        image.save(buffer, "TIFF")  # lossless in every mode, so it is treated like a file of it
        return decode(buffer.getvalue())
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] in ((), (3,)) and image.ndim > 1:
        return np.ascontiguousarray(image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2))
    raise InvalidInput(
        "an image must be a path, encoded bytes, a PIL image, or uint8 pixels of shape [H, W, 3] or [H, W], found "
        + (f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__)
    )
