"""CPU defaults of a backbone against the plain network: float32, contiguous, batch norm unfolded, same threads.

    python benchmarks/inference.py [--images 512] [--runs 7]

Network alone: both take a batch of prepared images and give features; medians of alternating runs in one process.
Whole stage: JPEG bytes of ../shared/data to features, decoding and resizing included, on one thread of Python.
Prints one JSON line. Weights: ../shared/data/weights (its README says where they come from).
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from timing import Work, medians, options, seconds_in_turn

from hashdist.collection.decode import decode
from hashdist.ground.settings import FeatureSettings, PreprocessSettings
from hashdist.models.backbones import Backbone, build_backbone, has_float16
from hashdist.models.networks import open_network

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETTINGS = FeatureSettings(
    backbone="mobilenet_v2",
    weights=str(DATA / "weights" / "mobilenet_v2_coral_rot180_fp16.pth"),
    preprocess=PreprocessSettings(size=96, mean=[0.5] * 3, std=[0.5] * 3, rotate180=True),
)
Forward = Callable[[np.ndarray], np.ndarray]


def plain(batch: int) -> Forward:
    """The network as torchvision gives it, in batches of `batch`."""
    net = open_network(SETTINGS)

    def forward(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            parts = [torch.from_numpy(images[i : i + batch]) for i in range(0, len(images), batch)]
            return np.concatenate([net.pool(net.body(net.inputs(p).contiguous())).numpy() for p in parts])

    return forward


def alternate(work: dict[str, Work], images: int, runs: int) -> dict[str, float]:
    """Images per second of each, as medians of runs in turn."""
    return {name: images / seconds for name, seconds in medians(seconds_in_turn(runs, work)).items()}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())


def main() -> None:
    chosen = options(__doc__, images=512, runs=7, threads=2).parse_args()
    torch.set_num_threads(chosen.threads)
    rows = pq.read_table(DATA / "cifar10_jpg_test.parquet").slice(0, chosen.images)
    encoded = rows["image"].to_pylist()
    backbones: dict[str, Backbone] = {"float32": backbone(chosen.threads, "float32")}
    if has_float16():
        backbones["float16"] = backbone(chosen.threads, "float16")
    first = backbones["float32"]
    images = np.stack([first.prepare(decode(data)) for data in encoded])
    forwards: dict[str, Forward] = {
        f"plain_batch_{SETTINGS.batch}": plain(SETTINGS.batch),
        f"plain_batch_{first.batch}": plain(first.batch),
        **{name: made.forward for name, made in backbones.items()},
    }
    alone = alternate({n: lambda f=f: f(images) for n, f in forwards.items()}, len(images), chosen.runs)
    stage = alternate(
        {n: lambda f=f: f(np.stack([first.prepare(decode(d)) for d in encoded])) for n, f in forwards.items()},
        len(images),
        max(3, chosen.runs // 2),
    )
    baseline = f"plain_batch_{SETTINGS.batch}"
    exact = forwards[baseline](images)
    result = {
        "benchmark": "inference",
        "network": "mobilenet_v2 at 96 px",
        "images": len(images),
        "threads": chosen.threads,
        "float16_in_hardware": has_float16(),
        "network_alone_images_per_s": rounded(alone),
        "network_alone_ratio": {n: round(alone[n] / alone[baseline], 2) for n in forwards},
        "whole_stage_images_per_s": rounded(stage),
        "whole_stage_ratio": {n: round(stage[n] / stage[baseline], 2) for n in forwards},
        "mean_cosine": {n: round(cosine(exact, made.forward(images)), 7) for n, made in backbones.items()},
    }
    if not has_float16():
        emulated = backbone(chosen.threads, "float16").forward(images[:128])
        result["mean_cosine"]["float16_emulated"] = round(cosine(exact[:128], emulated), 7)
    print(json.dumps(result))


def backbone(threads: int, precision: str) -> Backbone:
    return build_backbone(replace(SETTINGS, precision=precision), threads=threads)


def rounded(speeds: dict[str, float]) -> dict[str, float]:
    return {name: round(speed, 1) for name, speed in speeds.items()}


if __name__ == "__main__":
    main()
