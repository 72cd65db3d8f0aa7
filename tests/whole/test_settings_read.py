"""What each command declares to read (hashdist/commands/catalogue.py) is what it reads.

That it reads nothing else is checked wherever a test runs a command (tests/conftest.py, `reads`).
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hashdist import cli
from hashdist.commands.catalogue import COMMANDS

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

_SMALL = [
    *("--train.bits", "16", "--train.workers", "1", "--train.options", '{"epochs": 1, "rounds": 1, "batch": 20}'),
    *("--graph.neighbours", "5", "--gate.fewest", "10"),
]

NOT_HERE = {
    # read where a session is opened, and it is open already
    "cluster.address",
    "cluster.cpus",
    "cluster.object_store_mb",
    # read of parquet collections
    "collection.id_column",
    "collection.image_column",
}
NOT_BY = {
    "quickstart": None,  # what pipeline, report and reindex read
    "serve": None,  # its replicas read the settings of the service
    "completion": None,
    "index build": {"gate.lost_rows"},  # of an index that is built again
}


def test_a_command_reads_all_that_it_declares(
    reads: dict[str, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(40):
        path = Path("photos") / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    before = {name: reads.pop(name, set()) for name in COMMANDS}
    pinned = ["--collection.uri", "photos", *_SMALL]
    for line in (
        *("collection", "features", "graph", "train", "encode", "index build", "evaluate", "pipeline"),
        "report",
    ):
        run(*line.split(), *pinned)
    print(capsys.readouterr().err)
    for name in before:
        reads[name] = reads.get(name, set()) | before[name]


def run(*words: str) -> None:
    assert cli.main(list(words)) == 0, words
