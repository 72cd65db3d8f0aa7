"""mAP@5000 on CIFAR-10 by the DSAH protocol, frozen features, default preset: DSAH beside ITQ and LSH.

    python benchmarks/cifar_quality.py --data ../shared/data [--bits 16 32 64] [--seeds 5] [--cache FILE.npz]

Features: MobileNetV2 at 96 px (weights of the data folder). Per seed: its own split (100 queries and 1,000 training
images a class, the database is everything but the queries), its own initial weights and order. These runs use labels
for the split and the score alone; on the default feature scale see docs/decisions.md, H6.
Prints one JSON line; progress goes to stderr. The data is a lossy copy of
CIFAR-10 (JPEG, quality 75).
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from hashdist import bits, ids, scan
from hashdist.backbones import build_backbone
from hashdist.communicator import SingleProcess
from hashdist.images import decode
from hashdist.methods import itq, lsh
from hashdist.methods.contract import Graph, TrainingData, find_method
from hashdist.neighbours import initial_similarity, inverted_lists, self_nearest, symmetric
from hashdist.protocols import split
from hashdist.ranking import ap_at
from hashdist.settings import FeatureSettings, PreprocessSettings, TrainSettings
from hashdist.training import train

CUT = 5000


def features(data: Path, threads: int) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Features [60000, 1280], labels and ids of all images, in id order."""
    table = [pq.read_table(data / f"cifar10_jpg_{part}.parquet") for part in ("train", "test")]
    keys = [key for part in table for key in part["id"].to_pylist()]
    labels = np.concatenate([part["label"].to_numpy() for part in table]).astype(np.int64)
    backbone = build_backbone(
        FeatureSettings(
            backbone="mobilenet_v2",
            weights=str(data / "weights/mobilenet_v2_coral_rot180_fp16.pth"),
            preprocess=PreprocessSettings(size=96, mean=[0.5] * 3, std=[0.5] * 3, rotate180=True),
        ),
        threads=threads,
    )
    images = (decode(image.as_py()) for part in table for image in part["image"])
    rows, batch = [], []
    for number, image in enumerate(images):
        batch.append(backbone.prepare(image))
        if len(batch) == 256 or number == len(keys) - 1:
            rows.append(backbone.forward(np.stack(batch)))
            batch = []
    numbers = ids.image_ids(keys)
    order = np.argsort(numbers)
    return np.concatenate(rows)[order], labels[order], numbers[order]


def map_at(z_ND: NDArray[np.floating], labels: NDArray[np.int64], query: Any, database: Any) -> float:
    """mAP@5000: ranked list in (distance, id) order, divided by the relevant ones among the top 5000."""
    codes = bits.pack(z_ND)
    found = scan.nearest(np.ascontiguousarray(codes[database]), codes[query], CUT).rows_QK
    relevant = labels[database][found] == labels[query][:, None]
    total = (labels[database][None] == labels[query][:, None]).sum(1)
    return float(ap_at(relevant, total).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", type=json.loads, default={}, help="options of DSAH, as JSON")
    parser.add_argument("--cache", type=Path, help="keep the features in this .npz file")
    asked = parser.parse_args()
    if asked.cache and asked.cache.exists():
        stored = np.load(asked.cache)
        x, labels, numbers = stored["x"], stored["labels"], stored["ids"]
    else:
        x, labels, numbers = features(asked.data, asked.threads)
        if asked.cache:
            np.savez(asked.cache, x=x, labels=labels, ids=numbers)
    scores: dict[str, list[float]] = {}
    seconds: list[float] = []
    for seed in range(asked.seeds):
        parts = split("cifar-dsah", numbers, [[int(label)] for label in labels], seed)
        query, training, database = parts.query, parts.train, parts.database
        sample = np.ascontiguousarray(x[training])
        k = min(500, len(training) // 20)
        neighbours = self_nearest(sample, k, threads=asked.threads).rows_MK
        graph = Graph(*symmetric(initial_similarity(neighbours, inverted_lists(neighbours), k), "or"))
        data = TrainingData(numbers[training], sample, graph=graph)
        for length in asked.bits:
            started = time.perf_counter()
            chosen = TrainSettings(bits=length, seed=seed, threads=asked.threads, options=asked.options)
            trained = train(
                find_method("dsah"), data, chosen, SingleProcess(), save=lambda _: None, report=lambda _: None
            )
            seconds.append(time.perf_counter() - started)
            with torch.no_grad():
                z = {"dsah": trained.network(torch.from_numpy(x.astype(np.float32)))["z"].numpy()}
            z["itq"] = itq.fit(sample, length, seed)(x)
            z["lsh"] = lsh.fit(sample, length, seed)(x)
            for name, outputs in z.items():
                scores.setdefault(f"{name}-{length}", []).append(map_at(outputs, labels, query, database))
            print({name: round(v[-1], 4) for name, v in scores.items()}, file=sys.stderr, flush=True)
    table = {
        name: {"mean": round(float(np.mean(v)), 4), "spread": round(float(np.std(v, ddof=min(1, len(v) - 1))), 4)}
        for name, v in scores.items()
    }
    above = {n: round(table[f"dsah-{n}"]["mean"] - table[f"dsah-{n}"]["spread"] - table[f"itq-{n}"]["mean"], 4)
             for n in asked.bits}  # fmt: skip
    result = {
        "benchmark": "cifar_quality", "metric": f"map@{CUT}", "seeds": asked.seeds, "options": asked.options,
        "scores": table, "dsah_less_spread_above_itq": above, "train_seconds": round(float(np.mean(seconds)), 1),
        "threads": asked.threads,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
