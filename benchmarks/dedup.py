"""Near-duplicates of an index: seconds and memory of all processes, in one process and as Ray tasks, and on growth.

    python benchmarks/dedup.py --rows 1000000 --checked 20000 --radius 3

Codes are random; every tenth row is another row's with up to radius + 2 bits turned, and every hundredth has one and
the same code. `hashdist dedup` runs as its own process; its memory is the largest sum, over it and all that descend
from it, of what each has for itself plus its share of what it shares (PSS), and of resident sets (RSS, which counts
shared pages once for every process). First the clusters of an index of `--checked` rows are compared with all pairs,
found by matrix products. Prints one JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from timing import options

from hashdist.ground.ids import image_ids
from hashdist.index import create_index, open_index

_COMMAND = "import sys; from hashdist.cli import main; sys.exit(main(sys.argv[1:]))"
_SHARDS = 8
_ROWS_AT_ONCE = 1000


def main() -> None:
    arguments = options(__doc__, rows=1_000_000, checked=20_000, radius=3).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        line = {"benchmark": "dedup", **vars(arguments), "equal_to_all_pairs": _checked(Path(folder), arguments)}
        uri = f"{folder}/index"
        _build(uri, arguments.rows, arguments.radius, 0)
        own = _run(uri, f"{folder}/own.parquet", arguments.radius, block_rows=arguments.rows)
        tasks = _run(uri, f"{folder}/tasks.parquet", arguments.radius, block_rows=-(-arguments.rows // 4))
        same = pq.read_table(f"{folder}/own.parquet").equals(pq.read_table(f"{folder}/tasks.parquet"))
        _build(uri, arguments.rows // 100, arguments.radius, arguments.rows)
        grown = _run(uri, f"{folder}/grown.parquet", arguments.radius, previous=f"{folder}/own.parquet")
        fresh = _run(uri, f"{folder}/fresh.parquet", arguments.radius)
        again = pq.read_table(f"{folder}/grown.parquet").equals(pq.read_table(f"{folder}/fresh.parquet"))
        line |= {"one_process": own, "ray_tasks": tasks, "after_1_percent_growth": grown, "fresh": fresh}
    print(json.dumps(line | {"tasks_equal": same, "growth_equal": again}))


def _checked(folder: Path, arguments: argparse.Namespace) -> bool:
    uri = f"{folder}/checked"
    codes, keys = _build(uri, arguments.checked, arguments.radius, 0)
    _run(uri, f"{folder}/checked.parquet", arguments.radius)
    table = pq.read_table(f"{folder}/checked.parquet")
    found = dict(zip(table["id"].to_pylist(), table["cluster"].to_pylist(), strict=True))
    return found == _all_pairs(codes, image_ids(keys), arguments.radius)


def _all_pairs(codes: NDArray[np.uint8], ids: NDArray[np.int64], radius: int) -> dict[int, int]:
    """Smallest id of the cluster by id, from the inner products of all pairs of codes as signs."""
    signs = np.unpackbits(codes, axis=1).astype(np.float32) * 2 - 1
    bits = signs.shape[1]
    rows, others = [], []
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        row, other = np.nonzero(signs[start : start + _ROWS_AT_ONCE] @ signs.T >= bits - 2 * radius)
        rows.append(row + start)
        others.append(other)
    left, right = np.concatenate(rows), np.concatenate(others)
    graph = coo_array((np.ones(len(left), np.bool_), (left, right)), shape=(len(ids), len(ids)))
    _, labels = connected_components(graph, directed=False)
    order = np.lexsort((ids, labels))
    first = np.concatenate([[True], np.diff(labels[order]) != 0])
    smallest = ids[order][first][labels]
    sizes = np.bincount(labels)[labels]
    return {int(ids[row]): int(smallest[row]) for row in np.flatnonzero(sizes > 1)}


def _build(uri: str, rows: int, radius: int, seen: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Rows in an index: as 8 shards of a new one, or as one more of one that has `seen` rows."""
    rng = np.random.default_rng(seen)
    codes = rng.integers(0, 256, (rows, 8), dtype=np.uint8)
    near = np.arange(0, rows, 10)
    bits = np.unpackbits(codes[rng.integers(0, rows, len(near))], axis=1)
    for row, count in enumerate(rng.integers(0, radius + 3, len(near))):
        bits[row, rng.permutation(64)[:count]] ^= 1
    codes[near] = np.packbits(bits, axis=1)
    codes[5::100] = 7
    keys = [f"images/{number:09d}.jpeg" for number in range(seen, seen + rows)]
    index = open_index(uri) if seen else create_index(uri, bits=64)
    for part in np.array_split(np.arange(rows), 1 if seen else _SHARDS):
        index.append(codes[part], [keys[row] for row in part])
    return codes, keys


def _run(uri: str, out: str, radius: int, **options: Any) -> dict[str, Any]:
    words = [sys.executable, "-c", _COMMAND, "dedup", "--index.uri", uri, "--out", out, f"--radius={radius}"]
    words += [f"--{name}={value}" for name, value in options.items()]
    started = time.perf_counter()
    process = subprocess.Popen([*words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    most_pss = most_rss = most_processes = 0
    while process.poll() is None:
        pss, rss, processes = _memory(process.pid)
        most_pss, most_rss, most_processes = max(most_pss, pss), max(most_rss, rss), max(most_processes, processes)
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    assert process.stdout is not None
    done = json.loads(process.stdout.read())
    return {
        **{name: done[name] for name in ("clusters", "clustered", "duplicates", "largest", "joined", "tasks")},
        "seconds": done["seconds"],
        "seconds_of_process": round(seconds, 2),
        "pss_mb": most_pss >> 20,
        "rss_mb": most_rss >> 20,
        "processes": most_processes,
    }


def _memory(pid: int) -> tuple[int, int, int]:
    """PSS, RSS and number of a process and its descendants, bytes."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family, size = {pid}, 0
    while len(family) > size:
        size = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    found = [_of_one(member) for member in family]
    return sum(pss for pss, _ in found), sum(rss for _, rss in found), size


def _of_one(pid: int) -> tuple[int, int]:
    with suppress(OSError):
        fields = dict(line.split()[:2] for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        return int(fields["Pss:"]) << 10, int(fields["Rss:"]) << 10
    return 0, 0


if __name__ == "__main__":
    main()
