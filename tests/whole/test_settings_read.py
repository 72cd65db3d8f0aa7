"""What each command declares to read (hashdist/commands/catalogue.py) is what it reads; and only we speak on stderr.

That it reads nothing else is checked wherever a test runs a command (tests/conftest.py, `reads`).
"""

import shlex
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

UNSEEN = {
    *("cluster.address", "cluster.cpus", "cluster.object_store_mb"),  # read to open a session, and here one is open
    *("collection.id_column", "collection.image_column"),  # read of parquet
    *("metrics.port", "metrics.gateway"),  # read by the command line itself
}
OTHERWISE = {
    "train": {"train.checkpoint_steps", "train.threads"},  # read by workers
    "index build": {"gate.tolerance"},  # read where there is an earlier version
    "evaluate": {"evaluate.protocol_seed"},  # read with a protocol
    "report": {"evaluate.protocol_seed"},
    "reindex": {"index.rerank", "gate.floor", "gate.recall_at", "gate.sample"},  # read of the first rows of an index
    "index promote": {"gate.floor", "gate.recall_at", "gate.sample"},
}
"""Settings that a command reads, but not here."""

SPEAKERS = {
    *("hashdist", "collection", "features", "graph", "train", "encode", "index", "evaluate"),
    *("exact neighbours", "gate", "compare", "dedup", "reindex", "verify", "purge", "withdrawn", "warning"),
}
"""What lines on stderr begin with: nothing else is said, least of all by Ray."""

STAGES = ("collection", "features", "graph", "train", "encode", "index build", "evaluate")


def test_a_command_reads_all_that_it_declares(
    reads: dict[str, set[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    reads.clear()
    write_photos(Path("photos"), 40)
    pinned = ["--collection.uri=photos", *_SMALL]
    for name in (*STAGES, "pipeline", "report"):
        run(name, *pinned)
    run("search", "photos/0/0.png")
    run("dedup", "--out", "d.parquet")
    run("compare", "itq", "--bits=[16]", "--seeds=1", "--evaluate.protocol=uniform:10:20", *pinned)
    run("protocol make", "--protocol=uniform:10:20", "--out=p.json", "--root=hashdist", *pinned)
    run("protocol check", "p.json", "--root=hashdist", *pinned)
    write_photos(Path("photos"), 60)
    run("reindex", "photos", "--in-process=0", "--gate.fewest=10")
    write_photos(Path("photos"), 64)
    run("reindex", "photos", "--gate.fewest=1", "--gate.constant_bits=-1", code=1)
    run("index promote", "--gate.constant_bits=1", "--gate.fewest=1")
    for line in ("log", "tag a", "rollback --to 2", "verify", "compact", "vacuum", "purge 0/0.png --reason r"):
        run("index", *shlex.split(line))
    # what the pipeline finds committed it reads no more of; so does a comparison of what is not deep
    reads["pipeline"] |= set().union(*(reads[name] for name in STAGES), OTHERWISE["train"], OTHERWISE["index build"])
    reads["pipeline"] |= OTHERWISE["evaluate"]
    reads["compare"] |= {name for name in reads["pipeline"] if name.startswith(("graph.", "train.", "encode."))}
    for name, read in reads.items():
        assert set(COMMANDS[name].settings) - read - UNSEEN <= OTHERWISE.get(name, set()), name

    said = [line for line in capfd.readouterr().err.splitlines() if line and not line.startswith("  ")]
    assert {line.partition(":")[0] for line in said} <= SPEAKERS
    assert sum(line.startswith("train:") for line in said) <= 12


def run(name: str, *words: str, code: int = 0) -> None:
    assert cli.main([*name.split(), *words]) == code, (name, words)


def write_photos(folder: Path, count: int) -> None:
    """Images of noise, in two albums."""
    for number in range(count):
        path = folder / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
