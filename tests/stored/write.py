"""Writes VERSION.tar.xz, beside this file: what this release of hashdist leaves on storage, for later ones to read.

    python tests/stored/write.py        # once a release; then commit the archive, and never change it

A user's folder at the end of some months: a collection of pictures, a root with all artefacts of the commands, an index
that has grown (`photos`), one of pictures in parquet files (`sheets`), one of the user's own codes (`given`), features
from outside, a training run that was killed, and the files that commands write elsewhere. Beside it lies
`written.json`: what everything answered on the day it was written.

Records hold whole URIs, so all of them begin with file:///proc/self/cwd/, the folder that a process works in: the
archive is read byte for byte as it was written, wherever it is unpacked. (Ray Train moves its workers elsewhere, unless
it is told not to.) Only the command line and public names are used here, but for the pin of a reader that is killed.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

import hashdist

HERE = Path("/proc/self/cwd")
TREES = ("ash", "elm", "föhre")
FIRST_TAKEN = 1_700_000_000
"""Stamp of the first picture; an archive keeps whole seconds."""
ROOT_WRITTEN = FIRST_TAKEN + 86_400
"""Stamp of the first file below the root: in the past wherever the archive is read."""

CONFIG = {
    "root": str(HERE / "root"),
    "collection": {"uri": str(HERE / "images"), "part_rows": 32},
    "features": {"backbone": "pixels", "preprocess": {"size": 2}},
    "graph": {"train_sample": 40, "neighbours": 6},
    "train": {"bits": 16, "workers": 1, "options": {"rounds": 2, "epochs": 3, "batch": 10, "lr": 0.001}},
    "index": {"name": "photos", "shard_rows": 32, "rerank": True},
    "gate": {"fewest": 10, "floor": 0.0, "tolerance": 1.0, "constant_bits": 1.0, "collisions": 1.0},
    "evaluate": {"queries": 10, "cut": 20, "precision_at": 5, "recall_at": 5},
}
"""Two by two pixels: DSAH's hidden layer is 1000 wide whatever goes in, and the archive has to stay small."""

KILLED = ["--train.bits", "8", "--train.seed", "1", "--train.checkpoint_steps", "1"]
"""Settings of the training run that is killed; 24 checkpoints."""
KILLED_AT = 14

CLUSTERS = ["--radius", "1"]
SHEETS = ["--collection.uri", str(HERE / "sheets"), "--index.name", "sheets"]
VECTORS = ["--features.source", str(HERE / "vectors")]
PROTOCOL = ["--protocol", "uniform:10:30"]
FEW = ["--protocol", "uniform:3:5"]
COMPARED = ["--methods", "[lsh]", "--bits", "[16]", "--seeds", "1", "--evaluate.protocol", "uniform:10:30"]


def main() -> None:
    archive = Path(__file__).resolve().parent / f"{hashdist.__version__}.tar.xz"
    if archive.exists():
        sys.exit(f"{archive} is what this release wrote, and stays; a later version writes its own")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        written = write()
        Path("written.json").write_text(json.dumps(written, default=str))
        pack(archive)
        os.chdir("/")
    print(f"{archive}: {archive.stat().st_size} bytes")


def write() -> dict[str, Any]:
    """Everything, below the working folder; what it answers."""
    Path("pipeline.yaml").write_text(json.dumps(CONFIG, indent=1))  # JSON is YAML
    rng = np.random.default_rng(0)
    paint_first(rng)
    shutil.copytree("images", "first")  # with stamps: what a second `pipeline` has to find
    run("pipeline")
    run("compare", *COMPARED)
    write_sheets()
    grow(rng)
    write_given()
    write_vectors(rng)
    run("dedup", *CLUSTERS, "--out", "clusters.parquet")
    with first_collection():
        killed = train_and_kill()
        stages = run("pipeline")["stages"]
        compared = run("compare", *COMPARED)["rows"]
        protocol = run("protocol make", *PROTOCOL, "--out", "protocol.json")
    return {
        "hashdist": hashdist.__version__,
        "machine": machine(),
        "stages": {
            name: {field: stage[field] for field in ("snapshot", "rows", "metrics") if field in stage}
            for name, stage in stages.items()
        },
        "killed": killed,
        "compare": COMPARED,
        "compared": [{field: row[field] for field in ("name", "bits", "metrics")} for row in compared],
        "dedup": CLUSTERS,
        "protocol": protocol["digests"],
        "sheets_words": SHEETS,
        "vectors": [*VECTORS, *FEW],
        "vectors_protocol": run("protocol make", *VECTORS, *FEW, "--out", "few.json")["digests"],
        "photos": said_of("root/indexes/photos", ["digest", "labels", "size", "stamp"], "label in 1,2"),
        "sheets": said_of("root/indexes/sheets", ["digest", "labels", "size", "stamp"], "label in 1"),
        "given": said_of("root/indexes/given", list(columns([])), "year >= 2010 and tags in red"),
    }


@contextmanager
def first_collection() -> Iterator[None]:
    """The collection as `pipeline` saw it."""
    os.rename("images", "grown")
    os.rename("first", "images")
    yield
    os.rename("images", "first")
    os.rename("grown", "images")


def argv(command: str, *words: str) -> list[str]:
    """A command with its words, the configuration before the first flag."""
    first = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    given = [*words[:first], "--config", "pipeline.yaml", *words[first:], "--json"]
    program = "import sys; from hashdist.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, *command.split(), *given]


def run(command: str, *words: str, fails: bool = False) -> dict[str, Any]:
    """What a command says, in a process of its own."""
    done = subprocess.run(argv(command, *words), stdout=subprocess.PIPE, text=True, check=False)
    if (done.returncode != 0) != fails:
        sys.exit(f"{command}: exit code {done.returncode}: {done.stdout}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def machine() -> dict[str, str]:
    """What the last bits of a training run depend on."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


# The collection, and the index that follows it


def paint(rng: np.random.Generator, key: str, taken: int) -> None:
    """A grey picture of 8 x 8: a pattern of four quarters for each kind of tree, and noise."""
    path = Path("images", key)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = int(path.parent.name.encode().hex(), 16) % 23  # the same for a name everywhere
    quarters = np.random.default_rng(kind).integers(40, 216, (2, 2))
    grey = np.kron(quarters, np.ones((4, 4))) + rng.normal(0, 25, (8, 8)) + rng.normal(0, 20)
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(path)
    stamp(path, taken)


def stamp(path: Path, taken: int) -> None:
    os.utime(path, (FIRST_TAKEN + taken, FIRST_TAKEN + taken))


def paint_first(rng: np.random.Generator) -> None:
    """Sixty pictures of three kinds of trees, and a file that is none."""
    for number in range(60):
        paint(rng, f"{TREES[number % 3]}/{number:03d}.png", number)
    broken = Path("images/föhre/broken.png")
    broken.write_bytes(b"no picture")
    stamp(broken, 60)


def grow(rng: np.random.Generator) -> None:
    """All that may happen to an index which follows its collection."""
    run("index tag", "first")
    for key in ("ash/100.png", "elm/101.png", "yew/102.png", "yew/103.png"):
        paint(rng, key, 100)
    for key in ("ash/000.png", "föhre/002.png"):
        paint(rng, key, 101)
    Path("images/elm/001.png").unlink()
    stamp(Path("images/elm/004.png"), 102)  # the same bytes under a new stamp
    run("reindex")
    run("index rollback", "--to", "first")
    run("index rollback", "--to", "4")
    erased = key_outside_the_sample()
    Path("images", erased).unlink()
    run("index purge", erased, "--reason", "its owner asked for it")
    paint(rng, "yew/104.png", 103)
    run("reindex")
    run("index compact", "--all")
    paint(rng, "föhre/105.png", 104)
    run("reindex")
    gone = Path("images/elm/007.png")
    held, about = gone.read_bytes(), gone.stat()
    gone.unlink()
    run("reindex", "--gate.lost_rows", "0", fails=True)  # waits as a candidate
    gone.write_bytes(held)
    os.utime(gone, (about.st_mtime, about.st_mtime))
    run("index tag", "now")


def key_outside_the_sample() -> str:
    """A picture that no graph was made of: a purge deletes graphs that were, and the runs that trained on them."""
    first = hashdist.open_index("root/indexes/photos", version="first")
    rows = sorted((row["id"], row["key"]) for table in first.tables([]) for row in table.to_pylist())
    return next(key for _, key in rows[CONFIG["graph"]["train_sample"] + 5 :] if Path("images", key).exists())


def write_sheets() -> None:
    """An index of pictures in parquet files, by the model that is there."""
    images = sorted(Path("images").rglob("[0-9]*.png"))[::4]
    write_sheet("a", images[:10])
    for stage in ("collection", "features"):
        run(stage, *SHEETS)
    (model,) = Path("root/models").iterdir()
    named = ["--train.snapshot", str(HERE / model)]
    run("encode", *SHEETS, *named)
    run("index build", *SHEETS, *named)
    write_sheet("b", images[10:])
    run("reindex", *SHEETS)


def write_sheet(name: str, images: list[Path]) -> None:
    write_parquet(
        Path("sheets", f"{name}.parquet"),
        id=[path.stem for path in images],
        image=[path.read_bytes() for path in images],
        labels=[[path.parent.name, "tree"] for path in images],
    )


def write_vectors(rng: np.random.Generator) -> None:
    """Features that come from outside."""
    write_parquet(
        Path("vectors/some.parquet"),
        key=[f"v{number}" for number in range(12)],
        embedding=list(rng.normal(size=(12, 4)).astype(np.float32)),
        label=[number % 2 for number in range(12)],
    )
    run("features", *VECTORS)


def write_parquet(path: Path, **columns: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    stamp(path, 200)


# Training


def train_and_kill() -> dict[str, Any]:
    """Train to the end in a copy of the root, and in the root until a worker is killed; what came of the first."""
    shutil.copytree("root", "whole")
    trained = run("train", *KILLED, "--root", str(HERE / "whole"))
    log = Path("root", "runs", Path(trained["run"]).name)
    kill_worker(log)
    versions = sorted(path.name for path in log.glob("manifests/*.json"))
    model = hashdist.load_model(trained["snapshot"])
    head = model.manifest["head"]["sha256"]
    pictures = sorted(map(str, Path("images").rglob("[0-9]*.png")))
    codes = {path: code.tobytes().hex() for path, code in zip(pictures, model.encode(pictures), strict=True)}
    checkpoints = len(list(Path("whole", "runs", log.name, "manifests").iterdir()))
    shutil.rmtree("whole")
    keep_what_resumes(log, versions[-1])
    return {
        "words": KILLED,
        "run": f"root/runs/{log.name}",
        "checkpoints": checkpoints,
        "snapshot": f"root/models/{log.name}",
        "model_digest": trained["model_digest"],
        "head": head,
        "codes": codes,
        "history": [epoch["loss"] for epoch in model.manifest["history"]],
    }


def kill_worker(log: Path) -> None:
    """Start the run, and kill its worker in the second round."""
    command = subprocess.Popen(argv("train", *KILLED, "--train.max_failures", "0"), stdout=subprocess.DEVNULL)
    reached = log / "manifests" / f"{KILLED_AT:020d}.json"
    while not reached.exists():
        if command.poll() is not None:
            sys.exit("the training run ended too early")
        time.sleep(0.001)
    os.kill(json.loads(reached.read_text())["worker"]["pid"], signal.SIGKILL)
    if not command.wait():
        sys.exit("the training run was not killed early enough")


def keep_what_resumes(log: Path, newest: str) -> None:
    """Leave out the state before the newest and Ray's own folder: most of the archive, and nothing reads them."""
    state = json.loads((log / "manifests" / newest).read_text())["state"]["path"]
    for path in (*log.glob("states/*/*"), *Path("root/runs").glob("*/states/*/*")):
        if path.exists() and path != log / state:
            path.unlink()
    for folder in Path("root/runs").glob("*/ray"):
        shutil.rmtree(folder)


# An index of codes that the user brings


def columns(numbers: list[int]) -> dict[str, Any]:
    """A column of every common type, with nulls."""
    return {
        "year": [1990 + number if number % 7 else None for number in numbers],
        "price": [number / 8 for number in numbers],
        "title": [f"Bild {number} ä" for number in numbers],
        "sold": [number % 2 == 0 for number in numbers],
        "tags": [["red", "blue", "green"][: number % 4] for number in numbers],
        "digest": [f"{number:032x}" for number in numbers],
    }


def write_given() -> None:
    """Appended, replaced, deleted, tagged, vacuumed, and read by a process that was killed."""
    rng = np.random.default_rng(1)
    index = hashdist.create_index(str(HERE / "root/indexes/given"), bits=24, model="somebody's own")

    def codes(count: int) -> NDArray[np.uint8]:
        return rng.integers(0, 256, (count, 3), np.uint8)

    def append(numbers: list[int], **more: Any) -> None:
        index.append(codes(len(numbers)), [f"no {n}" for n in numbers], columns(numbers), **more)

    append(list(range(40)))
    index.delete(["no 3", "no 5"])
    given = ["--index.name", "given"]
    run("index tag", "early", *given)
    index.refresh()
    append([6, 8], on_existing="replace")
    time.sleep(1.1)  # an age of 0 s is less than what lies between two stamps
    run("index vacuum", "--older-than", "0s", "--force", *given)
    index.refresh()
    append(list(range(50, 60)))
    index.delete(["no 51"])
    reader = "import os; from hashdist.index.pins import pinned; import hashdist; "
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"{reader}held = pinned(hashdist.open_index({index.uri!r})); held.__enter__(); os._exit(9)",
        ],
        check=False,
    )
    append(list(range(60, 65)))
    index.append(codes(5), [f"no {n}" for n in range(70, 75)])  # without columns


# What it all answers


def said_of(uri: str, names: list[str], where: str) -> dict[str, Any]:
    """The log of an index, and of each version its rows and its answers to some queries."""
    newest = hashdist.open_index(uri)
    kept = [version["version"] for version in newest.log() if not version["expired"]]
    opened = {str(number): hashdist.open_index(uri, version=number) for number in kept}
    if "candidate" in newest.manifest:
        opened["candidate"] = hashdist.open_index(uri, candidate=True)
    queries = np.random.default_rng(2).integers(0, 256, (3, newest.bits // 8), np.uint8)
    return {
        "uri": uri,
        "bits": newest.bits,
        "log": newest.log(),
        "where": where,
        "queries": [query.tobytes().hex() for query in queries],
        "versions": {name: said_of_version(index, names, where, queries) for name, index in opened.items()},
    }


def said_of_version(index: hashdist.Index, names: list[str], where: str, queries: NDArray[np.uint8]) -> dict[str, Any]:
    rows = [row for table in index.tables(names) for row in table.to_pylist()]
    codes = index.codes_of([row["key"] for row in rows]) if rows else []
    found = {"k": index.search(queries, k=5)}
    if rows:
        found |= {"where": index.search(queries, k=5, where=where)}
    return {
        "rows": [{**row, "code": code.tobytes().hex()} for row, code in zip(rows, codes, strict=True)],
        "answers": {name: [hits.ids.tolist(), hits.distances.tolist()] for name, hits in found.items()},
    }


def pack(archive: Path) -> None:
    """All files, by name, in whole seconds and without owners."""
    paths = sorted(path for path in Path().rglob("*") if path.is_file())
    earliest = min(int(path.stat().st_mtime) for path in paths if path.parts[0] == "root")
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in paths:
            entry = tar.gettarinfo(path)
            entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, "", ""
            entry.mtime = int(entry.mtime) - (earliest - ROOT_WRITTEN if path.parts[0] == "root" else 0)
            tar.addfile(entry, io.BytesIO(path.read_bytes()))


if __name__ == "__main__":
    main()
