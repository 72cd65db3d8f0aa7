"""Re-index after a small change, against the full build; and listing and diff of many synthetic names.

    python benchmarks/reindex.py --data ../shared/data --images 20000 --change 0.01
    python benchmarks/reindex.py --names 1000000

First form: images of `cifar10_jpg_train.parquet` are written out as files, MobileNetV2 at 96 px (weights of the same
folder) makes features, a hash head that nobody trained makes codes, and the stages build the index: that is the full
build, Ray's start included, training not. Then half of the change is added, half changed, and as many images as were
added removed, and `hashdist reindex` runs as a process of its own: its time is the process's, start and imports
included. It runs once more with nothing new. What it must reach: it encodes exactly the images that were added or
changed, in at most 5 % of the full build + 20 s.

Second form: an index of so many rows without images, a listing of as many names, of which 1 % are new and 1 % touched.
Prints what listing and diff take, and the memory they add to the process.

Prints one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from timing import memory_bytes, options

from hashdist.ground.ids import image_ids
from hashdist.ground.settings import (
    ClusterSettings,
    CollectionSettings,
    FeatureSettings,
    GateSettings,
    IndexSettings,
    PreprocessSettings,
    Settings,
)
from hashdist.index import create_index, open_index
from hashdist.index.shards.shard import Rows, write_shard
from hashdist.reindex import find as stage
from hashdist.reindex.costs import Costs
from hashdist.reindex.difference import Spill
from hashdist.reindex.inventory import LISTED
from hashdist.store import Entry
from hashdist.store.local import LocalStore

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BITS = 64
_COMMAND = "import sys; from hashdist.cli import main; sys.exit(main())"


def main() -> None:
    parser = options(__doc__, data=DATA, images=20_000, change=0.01, names=0)
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hashdist-reindex-") as folder:
        os.environ["HASHDIST_CACHE"] = f"{folder}/cache"
        if arguments.measure:
            print(json.dumps(measured(arguments.measure, arguments.names)))
        elif arguments.names:
            print(json.dumps(names(Path(folder), arguments.names)))
        else:
            print(json.dumps(images(Path(folder), arguments.data, arguments.images, arguments.change)))


def images(folder: Path, data: Path, count: int, change: float) -> dict[str, Any]:
    """The full build, the re-index after a change, and the re-index after none."""
    half = round(count * change / 2)
    rows = pq.read_table(data / "cifar10_jpg_train.parquet", columns=["image"]).slice(0, count + half)
    encoded = rows["image"].to_pylist()
    base = folder / "images"
    for number, data_ in enumerate(encoded[:count]):
        write(base / f"{number % 100:02d}" / f"{number:05d}.jpg", data_)
    settings = settings_of(folder, base, data)
    build_s = build(settings)
    for number in range(half):
        write(base / "new" / f"{number:05d}.jpg", encoded[count + number])
        write(base / f"{number % 100:02d}" / f"{number:05d}.jpg", encoded[number + count // 2])
        (base / f"{(count - 1 - number) % 100:02d}" / f"{count - 1 - number:05d}.jpg").unlink()
    changed, idle = reindex(settings), reindex(settings)
    limit_s = 0.05 * build_s + 20
    return {
        "benchmark": "reindex",
        "images": count,
        "build_s": round(build_s, 1),
        **{name: changed[name] for name in ("added", "changed", "removed", "encoded", "failed", "version")},
        "process_s": round(changed["process_s"], 1),
        "process_cpu_s": round(changed["process_cpu_s"], 1),
        "of_build": round(changed["process_s"] / build_s, 3),
        "limit_s": round(limit_s, 1),
        "within": changed["encoded"] == 2 * half and changed["process_s"] <= limit_s,
        "plan": changed["plan"],
        "actual": changed["actual"],
        "costs": changed["costs"],
        "nothing_new_s": round(idle["process_s"], 1),
        "nothing_new_cpu_s": round(idle["process_cpu_s"], 1),
        "nothing_new_costs": idle["costs"],
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def settings_of(folder: Path, base: Path, data: Path) -> Settings:
    return Settings(
        root=str(folder / "root"),
        collection=CollectionSettings(uri=str(base), labels=False),
        features=FeatureSettings(
            backbone="mobilenet_v2",
            weights=str(data / "weights" / "mobilenet_v2_coral_rot180_fp16.pth"),
            preprocess=PreprocessSettings(size=96, mean=[0.5] * 3, std=[0.5] * 3, rotate180=True),
        ),
        index=IndexSettings(name="photos"),
        gate=GateSettings(floor=0.0),  # the head is not trained
        cluster=ClusterSettings(address="local"),
    )


def build(settings: Settings) -> float:
    """Collection, features, codes, index; returns the seconds of it."""
    from hashdist.stages import collection, encode, features, index
    from hashdist.stages.cluster import session
    from hashdist.store.commit import open_artefact

    started = time.perf_counter()
    with session.session(settings.cluster):
        listed = open_artefact(collection.run(settings)["snapshot"], "collections")
        made = open_artefact(features.run(settings, listed)["snapshot"], "features")
        paused = time.perf_counter()
        model = untrained(settings, made)
        started += time.perf_counter() - paused
        codes = open_artefact(encode.run(settings, model, made)["snapshot"], "codes")
        index.run(settings, codes)
    return time.perf_counter() - started


def untrained(settings: Settings, features: Any) -> Any:
    """A committed model with DSAH's head as it is before training, each bit set so that it halves the images."""
    import torch
    from safetensors import torch as safetensors

    from hashdist.ground.schema import from_vectors
    from hashdist.methods.contract import find_method, method_settings
    from hashdist.models.model import describe
    from hashdist.models.networks import open_network, state_bytes
    from hashdist.store import open_store
    from hashdist.store.commit import Artefact, write_file
    from hashdist.store.vectors import vectors

    method = find_method("dsah")
    backbone, sample = features.manifest(), next(vectors(features, "feature"))
    head = method.network(method_settings(method, "paper"), backbone["width"], BITS, torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = head(torch.from_numpy(np.float32(from_vectors(sample["feature"], sample.schema))))["z"]
        head.hash.bias -= z.median(0).values
    made = Artefact(open_store(settings.root), "models", "0" * 32)
    weights = write_file(made.store, made.new_name(".safetensors"), safetensors.save(head.state_dict()))
    state = write_file(made.store, made.new_name(".safetensors"), state_bytes(open_network(settings.features)))
    spec = {name: backbone[name] for name in ("backbone", "tap", "weights", "weights_digest", "preprocess")}
    spec |= {name: backbone[name] for name in ("precision", "dtype", "width", "batch")}
    made.publish(
        {
            "stage": "train",
            **describe(
                method="dsah",
                options={},
                bits=BITS,
                mode="frozen",
                width=backbone["width"],
                classes=0,
                backbone=spec,
                head=weights,
                backbone_weights=state,
            ),
        }
    )
    return made


def reindex(settings: Settings) -> dict[str, Any]:
    """`hashdist reindex` as a process; its result, and its seconds as `process_s`."""
    words = ["reindex", "--json", "--root", settings.root, "--index.name", settings.index.name, "--gate.floor", "0"]
    words += ["--collection.uri", settings.collection.uri, "--collection.labels", "false"]
    started, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, "-c", _COMMAND, *words], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    spent = os.times()
    cpu_s = spent.children_user + spent.children_system - before.children_user - before.children_system
    return {**result, "process_s": time.perf_counter() - started, "process_cpu_s": cpu_s}


# Many names


class Listing(LocalStore):
    """A bucket that exists as names only: every hundredth is new, every hundredth other one has a new stamp."""

    def __init__(self, count: int) -> None:
        super().__init__(Path("/nowhere"))
        self.count = count

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[Entry]:  # noqa: ARG002
        """Names in order, without making more than the one at hand."""
        first = int(start_after.partition(".")[0] or -1) + 1 if start_after else 0
        for number in range(first, self.count + self.count // 100):
            yield Entry(f"{number:010d}.jpg", 1000, "t" if number % 100 == 7 else "s", 0.0)


def names(folder: Path, count: int) -> dict[str, Any]:
    """An index of `count` rows; listing and diff in a process of their own."""
    index = create_index(str(folder / "index"), BITS, "none")
    written, per_shard = [], 1_000_000
    for start in range(0, count, per_shard):
        keys = [f"{number:010d}.jpg" for number in range(start, min(start + per_shard, count))]
        columns = {"digest": ["0" * 32] * len(keys), "size": [1000] * len(keys), "stamp": ["s"] * len(keys)}
        codes_NW = np.zeros((len(keys), BITS // 8), np.uint8)
        rows = Rows(image_ids(keys), codes_NW, keys, pa.table(columns))
        written.append(write_shard(index.store, lambda suffix: index.versions.new_name("shards", suffix), rows))
    index.publish(written, bits=BITS, salts={}, model="none", model_uri="none", lineage={})
    words = [sys.executable, __file__, "--names", str(count), "--measure", index.uri]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(uri: str, count: int) -> dict[str, Any]:
    view, costs = open_index(uri).view, Costs()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, without what the parent was
    before_mb = memory_bytes("VmHWM") >> 20
    anonymous_before = anonymous_mb()
    from hashdist.reindex import inventory

    with Spill(LISTED) as images:
        with costs.of("listing"):
            stage.sort_out(
                inventory.list_in_parallel(Listing(count), stage.sample_keys(view)), images, view.salts, "auto"
            )
        after_listing = anonymous_mb()
        with costs.of("diff"):
            change = stage._difference(images, view)
    return {
        "benchmark": "reindex names",
        "names": images.rows,
        "rows": count,
        "new": len(change.new),
        "touched": len(change.touched),
        "removed": len(change.removed),
        "listing_s": round(costs.phases["listing"]["seconds"], 2),
        "diff_s": round(costs.phases["diff"]["seconds"], 2),
        "peak_above_start_mb": (memory_bytes("VmHWM") >> 20) - before_mb,
        "anonymous_mb": {
            "start": anonymous_before,
            "after_listing": after_listing,
            "after_diff": anonymous_mb(),
        },
        "load": round(os.getloadavg()[0], 1),
    }


def anonymous_mb() -> int:
    """Anonymous memory of this process now: what is mapped from files can be dropped, this cannot."""
    return memory_bytes("RssAnon") >> 20


if __name__ == "__main__":
    main()
