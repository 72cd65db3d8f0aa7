"""mAP@ALL (tie-expected) of 32-bit DSAH codes on scikit-learn's digits, beside ITQ and LSH on the same raw pixels.

    python benchmarks/digits_quality.py [--seeds 3]

The settings are those of `hashdist quickstart`; a seed is the training's and the baselines', the split is the
protocol `digits` with that seed. Prints one JSON line.
"""

import json
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from timing import options

from hashdist.commands.quickstart import OPTIONS
from hashdist.evaluation.protocols import split
from hashdist.evaluation.ranking import label_masks, tie_expected_ap
from hashdist.ground import bits, ids
from hashdist.ground.settings import TrainSettings
from hashdist.methods import itq, lsh
from hashdist.methods.contract import Graph, TrainingData, find_method
from hashdist.methods.parts.communicator import SingleProcess
from hashdist.models.training import train
from hashdist.nearest import scan
from hashdist.nearest.cosine import self_nearest
from hashdist.nearest.shared import initial_similarity, inverted_lists, symmetric

BITS = 32


def main() -> None:
    parser = options(__doc__, seeds=3)
    parser.add_argument("--options", type=json.loads, default=OPTIONS, help="options of DSAH, as JSON")
    asked = parser.parse_args()
    digits = load_digits()
    numbers = ids.image_ids([f"{label}/{i:04d}.png" for i, label in enumerate(digits.target)])
    order = np.argsort(numbers)
    numbers, labels = numbers[order], digits.target[order].astype(np.int64)
    x = (np.rint(digits.images * (255 / 16)).reshape(-1, 64) / 255).astype(np.float32)[order]
    scores: dict[str, list[float]] = {"dsah": [], "itq": [], "lsh": []}
    for seed in range(asked.seeds):
        parts = split("digits", numbers, [[int(label)] for label in labels], seed)
        query, training, database = parts.query, parts.train, parts.database
        sample = np.ascontiguousarray(x[training])
        k = len(training) // 20
        neighbours = self_nearest(sample, k).rows_MK
        graph = Graph(*symmetric(initial_similarity(neighbours, inverted_lists(neighbours), k), "or"))
        chosen = TrainSettings(bits=BITS, seed=seed, options=asked.options)
        data = TrainingData(numbers[training], sample, graph=graph)
        trained = train(find_method("dsah"), data, chosen, SingleProcess(), save=lambda _: None, report=lambda _: None)
        with torch.no_grad():
            z: dict[str, Any] = {"dsah": trained.network(torch.from_numpy(x))["z"].numpy()}
        z |= {"itq": itq.fit(sample, BITS, seed)(x), "lsh": lsh.fit(sample, BITS, seed)(x)}
        for name, outputs in z.items():
            codes = bits.pack(outputs)
            masks = label_masks([[int(label)] for label in labels], 10)
            histograms = scan.histograms(codes[database], codes[query], masks[database], masks[query])
            scores[name].append(float(tie_expected_ap(histograms).mean()))
    means = {name: round(float(np.mean(values)), 4) for name, values in scores.items()}
    result = {
        "benchmark": "digits_quality", "metric": "map_all_ties", "bits": BITS, "seeds": asked.seeds, "mean": means,
        "each": {name: [round(v, 4) for v in values] for name, values in scores.items()},
        "dsah_above_itq": round(means["dsah"] - means["itq"], 4), "options": asked.options,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
