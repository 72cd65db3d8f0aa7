"""A model that nobody trained, an index without rows, and pictures: what tests of growth start from, without Ray."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import torch as safetensors

from hashdist.ground.settings import CollectionSettings, FeatureSettings, GateSettings, IndexSettings, Settings
from hashdist.index import Index, create_index, open_index
from hashdist.methods.contract import find_method, method_settings
from hashdist.models.backbones import build_backbone
from hashdist.models.model import describe
from hashdist.store import open_store
from hashdist.store.commit import Artefact, write_file

BITS = 32
PIXELS = FeatureSettings(backbone="pixels")


def committed_model(root: str, bits: int = BITS, seed: int = 1) -> Artefact:
    """DSAH's head on raw pixels of 8 x 8, far from zero, so that different pictures have different codes."""
    settings = method_settings(find_method("dsah"), "paper")
    backbone = build_backbone(PIXELS)
    head = find_method("dsah").network(settings, backbone.width, bits, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(100)
    made = Artefact(open_store(root), "models", f"{seed:032x}")
    made.publish(
        {
            "stage": "train",
            **describe(
                method="dsah",
                options={"gamma": "inf"},
                bits=bits,
                mode="frozen",
                width=backbone.width,
                classes=0,
                backbone=backbone.spec,
                head=write_file(made.store, made.new_name(".safetensors"), safetensors.save(head.state_dict())),
                backbone_weights=None,
            ),
        }
    )
    return made


def empty_index(root: str) -> Index:
    """Version 1 of ROOT/indexes/photos, which names a committed model."""
    return create_index(f"{root}/indexes/photos", BITS, committed_model(root).uri)


def settings_of(root: str, images: Any, **collection: Any) -> Settings:
    return Settings(
        root=root,
        collection=CollectionSettings(uri=str(images), **collection),
        index=IndexSettings(name="photos"),
        gate=GateSettings(lost_rows=1.0),  # so few rows that any loss is large
    )


def png(seed: int, side: int = 8) -> bytes:
    """A picture that is a function of its seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def write(folder: Path, pictures: dict[str, bytes]) -> None:
    for key, data in pictures.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def content(root: str) -> dict[str, str]:
    """Key to content digest of the newest version."""
    found: dict[str, str] = {}
    for table in open_index(f"{root}/indexes/photos").tables(["digest"]):
        found.update(zip(table["key"].to_pylist(), table["digest"].to_pylist(), strict=True))
    return found
