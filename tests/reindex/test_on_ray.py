"""Growth of an index that the stages built: in this process and through Ray, the codes are those of a fresh build."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import torch as safetensors

from hashdist.collection.decode import decode
from hashdist.ground import telemetry
from hashdist.ground.options import ReindexOptions
from hashdist.ground.schema import OK
from hashdist.ground.settings import FeatureSettings, PreprocessSettings, Settings
from hashdist.index import open_index
from hashdist.methods.contract import find_method, method_settings
from hashdist.models.backbones import build_backbone
from hashdist.models.model import describe
from hashdist.models.networks import open_network, state_bytes
from hashdist.reindex import run
from hashdist.stages import collection, encode, features, index
from hashdist.stages.cluster import session
from hashdist.store import open_store
from hashdist.store.commit import Artefact, open_artefact, write_file
from tests.worlds import reindex as world

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

SQUEEZENET = FeatureSettings(
    backbone="squeezenet1_1", weights="random", preprocess=PreprocessSettings(size=32), precision="float32", batch=8
)


def squeezenet_model(root: str, mode: str) -> Artefact:
    network, settings = open_network(SQUEEZENET), method_settings(find_method("dsah"), "paper")
    head = find_method("dsah").network(settings, network.width, 32, torch.Generator().manual_seed(3))
    pixels = np.stack([decode(world.png(i, 32)) for i in range(64)])
    made_of = torch.from_numpy(build_backbone(SQUEEZENET).forward(pixels)).float()
    with torch.no_grad():  # each bit halves the pictures, so that different ones have different codes
        head.hash.bias -= head(made_of)["z"].median(0).values
    made = Artefact(open_store(root), "models", "5" * 32)
    if made.exists():
        return made
    weights = write_file(made.store, made.new_name(".safetensors"), safetensors.save(head.state_dict()))
    state = write_file(made.store, made.new_name(".safetensors"), state_bytes(network))
    shape: dict[str, Any] = {"bits": 32, "mode": mode, "width": network.width, "classes": 0}
    backbone = build_backbone(SQUEEZENET).spec
    about = describe(method="dsah", options={}, backbone=backbone, head=weights, backbone_weights=state, **shape)
    made.publish({"stage": "train", **about})
    return made


def built(root: str, images: Path, mode: str) -> Settings:
    """An index of these images, by the stages."""
    settings = replace(world.settings_of(root, images, part_rows=16), features=SQUEEZENET)
    model = squeezenet_model(root, mode)
    listed = open_artefact(collection.run(settings)["snapshot"], "collections")
    source = listed
    if mode == "frozen":
        source = open_artefact(features.run(settings, listed)["snapshot"], "features")
    index.run(settings, open_artefact(encode.run(settings, model, source)["snapshot"], "codes"))
    return settings


def write_images(base: Path, form: str, images: dict[str, bytes]) -> None:
    if form == "folder":
        for path in [path for path in base.rglob("*.png") if path.relative_to(base).as_posix() not in images]:
            path.unlink()
        new = {k: d for k, d in images.items() if not (base / k).exists() or (base / k).read_bytes() != d}
        world.write(base, new)
        return
    base.mkdir(exist_ok=True)
    keys = sorted(images)
    for number, some in enumerate([keys[:40], keys[40:]]):
        sink = io.BytesIO()
        labels = [int(key.partition("/")[0]) for key in some]
        pq.write_table(pa.table({"id": some, "image": [images[key] for key in some], "label": labels}), sink)
        path = base / f"{number}.parquet"
        if not path.exists() or path.read_bytes() != sink.getvalue():
            path.write_bytes(sink.getvalue())


def everything(root: str) -> dict[str, tuple[Any, ...]]:
    """Code, digest and labels of every key."""
    opened = open_index(f"{root}/indexes/photos")
    found = {}
    for table in opened.tables(["digest", "labels"]):
        keys = table["key"].to_pylist()
        codes = [code.tobytes() for code in opened.codes_of(keys)]
        rows = zip(codes, table["digest"].to_pylist(), table["labels"].to_pylist(), strict=True)
        found.update(zip(keys, rows, strict=True))
    return found


@pytest.mark.parametrize(
    ("form", "mode"),
    [("parquet", "frozen"), *(pytest.param("folder", mode, marks=pytest.mark.full) for mode in ("frozen", "images"))],
)
def test_growth_gives_the_codes_of_a_fresh_build(
    form: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    images = {f"{i % 3}/{i:03d}.png": world.png(i, 24) for i in range(60)}
    images["1/bad.png"] = b"no image"
    write_images(base, form, images)
    settings = built(root, base, mode)
    first = open_index(f"{root}/indexes/photos")
    assert first.rows == 60
    for table in first.tables(["size", "stamp"]):
        assert None not in table["size"].to_pylist() + table["stamp"].to_pylist()
    (note,) = first.view.notes_between(0, (1 << 63) - 1).to_pylist()
    assert (note["key"], note["status"] == OK) == ("1/bad.png", False)

    before = telemetry.traffic()
    idle = run.reindex(settings)
    assert (idle["version"], idle["unreadable"], idle["listed"]) == (first.version, 1, 61)
    assert telemetry.traffic().since(before).written == 0

    again = int(form != "folder")  # what is bad is tried again when the file that it is in is another
    with monkeypatch.context() as patch:  # nothing of Ray is needed for a few images
        patch.setattr(session, "session", None)
        images |= {f"{i % 3}/{i:03d}.png": world.png(i, 24) for i in range(60, 70)}
        images |= {f"{i % 3}/{i:03d}.png": world.png(i + 900, 24) for i in range(5)}
        for key in ("0/006.png", "1/007.png"):
            del images[key]
        write_images(base, form, images)
        grown = run.reindex(settings)
    assert [grown[name] for name in ("added", "changed", "removed", "encoded", "failed")] == [10, 5, 2, 15, again]
    fresh = (tmp_path / "fresh").as_uri()
    built(fresh, base, mode)
    assert everything(root) == everything(fresh)

    images |= {f"{i % 3}/{i:03d}.png": world.png(i, 24) for i in range(70, 90)}
    images |= {f"{i % 3}/{i:03d}.png": world.png(i + 1900, 24) for i in range(20, 25)} | {
        "0/cut.png": world.png(1)[:50]
    }
    images["0/empty.png"] = b""
    del images["2/008.png"]
    write_images(base, form, images)
    through_ray = run.reindex(settings, ReindexOptions(in_process=3))
    assert [through_ray[name] for name in ("added", "changed", "removed", "encoded")] == [20, 5, 1, 25]
    assert through_ray["failed"] == 2 + again
    idle = run.reindex(settings)
    assert (idle["version"], idle["unreadable"]) == (through_ray["version"], 3)
    last = (tmp_path / "last").as_uri()
    built(last, base, mode)
    assert everything(root) == everything(last)
    assert len({code for code, _, _ in everything(root).values()}) > 40
