"""The features stage on Ray against a bare loop over the same images with the same backbone.

    python benchmarks/features_ray.py [--images 30000] [--runs 3]

Both read ../shared/data/cifar10_jpg_train.parquet, decode, resize to 96 px, run MobileNetV2 with the CPU defaults of
hashdist/models/backbones.py and write parquet; the bare loop with 2 threads in one process and no Ray, the stage as it
is. images/s is counted from the end of the first batch to the end of the last; whole wall times, with process start,
imports, Ray's start and the listing of the collection, are printed beside it. Alternating runs in new processes,
medians. Prints one JSON line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from timing import in_turn, options

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PART_ROWS = 2048


def settings(folder: str):
    from hashdist.ground.settings import CollectionSettings, FeatureSettings, PreprocessSettings, Settings

    features = FeatureSettings(
        backbone="mobilenet_v2",
        weights=str(DATA / "weights" / "mobilenet_v2_coral_rot180_fp16.pth"),
        preprocess=PreprocessSettings(size=96, mean=[0.5] * 3, std=[0.5] * 3, rotate180=True),
    )
    collection = CollectionSettings(uri=f"{folder}/images", part_rows=PART_ROWS)
    return Settings(root=f"{folder}/root", collection=collection, features=features)


def bare(folder: str) -> dict[str, float]:
    """The loop one would write without a framework."""
    from hashdist.collection.decode import decode
    from hashdist.ground.schema import to_vectors, vector_schema
    from hashdist.models.backbones import build_backbone

    backbone = build_backbone(settings(folder).features, threads=2)
    schema = vector_schema("feature", backbone.dtype.name, backbone.width)
    ends, images = [], 0
    for number, table in enumerate(pq.ParquetFile(f"{folder}/images/images.parquet").iter_batches(PART_ROWS)):
        encoded, features = table["image"], []
        for start in range(0, len(encoded), backbone.batch):
            run = encoded[start : start + backbone.batch].to_pylist()
            features.append(backbone.forward(np.stack([backbone.prepare(decode(data)) for data in run])))
            ends.append(time.perf_counter())
            images += len(run)
        rows = pa.table({"id": pa.array(range(len(encoded))), "feature": to_vectors(np.concatenate(features))})
        pq.write_table(rows.replace_schema_metadata(schema.metadata), f"{folder}/{number}.parquet", compression="none")
    return {"images_per_s": (images - backbone.batch) / (ends[-1] - ends[0])}


def stage(folder: str) -> dict[str, float]:
    """The stage of hashdist."""
    from hashdist.ground.settings import ClusterSettings
    from hashdist.stages import collection, features
    from hashdist.stages.cluster import session

    chosen = settings(folder)
    with session.session(ClusterSettings(address="local")):
        collection.run(chosen)
        started = time.perf_counter()
        result = features.run(chosen, collection.snapshot(chosen))
        return {"images_per_s": result["images_per_s"], "stage_s": time.perf_counter() - started}


def measure(what: str, images: int) -> dict[str, float]:
    """One run in a process of its own, with its whole wall time."""
    with tempfile.TemporaryDirectory(prefix="hdbench") as folder:
        source = Path(folder) / "images"
        source.mkdir()
        rows = pq.read_table(DATA / "cifar10_jpg_train.parquet").slice(0, images)
        pq.write_table(rows, source / "images.parquet", row_group_size=PART_ROWS)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "--only", what, folder], stdout=subprocess.PIPE, check=True)
        return {**json.loads(done.stdout.splitlines()[-1]), "wall_s": time.perf_counter() - started}


def main() -> None:
    parser = options(__doc__, images=30_000, runs=3)
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        what, folder = chosen.only
        print(json.dumps({"bare": bare, "ray": stage}[what](folder)))
        return
    runs = in_turn(chosen.runs, {what: partial(measure, what, chosen.images) for what in ("bare", "ray")}, warm=False)
    median = {
        what: {name: round(statistics.median(run[name] for run in found), 1) for name in found[0]}
        for what, found in runs.items()
    }
    ratio = median["ray"]["images_per_s"] / median["bare"]["images_per_s"]
    spread = {what: [round(run["images_per_s"]) for run in found] for what, found in runs.items()}
    result = {"benchmark": "features_ray", "images": chosen.images, "ratio": round(ratio, 3), **median}
    print(json.dumps({**result, "images_per_s_of_runs": spread}))


if __name__ == "__main__":
    main()
