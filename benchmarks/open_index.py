"""Opening an index: from a cold cache over S3, memory before the first query, and versions of many shards.

    python benchmarks/open_index.py --rows 10000000 --searcher-rows 40000000 --repeats 7

Cold: an index of 64-bit codes in 8 shards on an S3 server on the loopback (moto, in a process of its own: its CPU is
the larger part and is printed). In turns, each with the process warm (kernels compiled, connections made): open_index
and one search with an empty cache, and the same files by plain ranged GETs of boto3, 16 at once, into memory. Memory:
anonymous memory of a new process that opens an index of `--searcher-rows`, above what it has after its imports, before
and after its first query. Shards: bytes of a manifest of 10,000 shards and the time to commit and to open it, and
`keys()` of 100 hits over 500 shards, from a cold and from a warm cache. A size of 0 leaves its part out. Prints one
JSON line.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from botocore.config import Config
from timing import options, spread, timed

from hashdist.index import create_index, open_index
from hashdist.index.shards.shard import Rows, parts, write_shard
from hashdist.store import open_store
from hashdist.store.commit import Log

_SERVER = """
import os, sys, time
from moto.server import ThreadedMotoServer
import logging
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
_MEMORY = """
import json, sys, time
import numpy as np
from pathlib import Path
from hashdist.index import open_index
from hashdist.nearest import scan
def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024
scan.nearest(np.zeros((9, 8), np.uint8), np.zeros((1, 8), np.uint8), 3)
imports = anonymous()
started = time.perf_counter()
index = open_index(sys.argv[1])
opened = time.perf_counter() - started
before = anonymous()
started = time.perf_counter()
index.search(np.zeros((1, 8), np.uint8), 100)
print(json.dumps({"imports_mb": round(imports), "rows": index.rows, "opened_s": round(opened, 3),
    "above_imports_before_first_query_mb": round(before - imports, 1),
    "first_query_s": round(time.perf_counter() - started, 3),
    "above_imports_after_it_mb": round(anonymous() - imports, 1)}))
"""
_PART = 4 << 20
_AT_ONCE = 16
_SHARDS = 8
_SEARCHED_SHARDS = 500
_MANY_SHARDS = 10_000
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    sizes = {"rows": 10_000_000, "keys_rows": 10_000_000, "searcher_rows": 40_000_000}
    arguments = options(__doc__, **sizes, repeats=7).parse_args()
    line: dict[str, Any] = {"benchmark": "open_index", **vars(arguments)}
    with tempfile.TemporaryDirectory() as folder, s3() as server:
        line["many_shards"] = _many(f"{folder}/many")
        if arguments.rows:
            line["cold"] = _cold(Path(folder), server, arguments)
        if arguments.keys_rows:
            line["keys_over_500_shards"] = _keys(Path(folder), arguments)
        if arguments.searcher_rows:
            line["searcher"] = _searcher(f"{folder}/large", arguments.searcher_rows)
    print(json.dumps(line))


# From a cold cache


def _cold(folder: Path, server: int, arguments: argparse.Namespace) -> dict[str, Any]:
    uri = "s3://hashdist/cold"
    build(uri, arguments.rows, _SHARDS)
    query = np.random.default_rng(1).integers(0, 256, (1, 8), dtype=np.uint8)
    entries = [parts(shard)[part] for shard in open_index(uri).manifest["shards"] for part in ("codes", "ids")]
    ours: list[float] = []
    plain: list[float] = []
    cpu: list[tuple[float, float]] = []
    for repeat in range(arguments.repeats + 1):
        os.environ["HASHDIST_CACHE"] = str(folder / f"cache{repeat}")
        before = _cpu(server), time.process_time()
        seconds, hits = timed(lambda: open_index(uri).search(query, 10))
        used = _cpu(server) - before[0], time.process_time() - before[1]
        assert hits.ids.shape == (1, 10)
        shutil.rmtree(os.environ["HASHDIST_CACHE"])
        apart, size = timed(lambda: downloaded("cold", entries))
        if repeat:  # the first of each makes connections and compiles
            ours.append(seconds)
            plain.append(apart)
            cpu.append(used)
    median, alone = statistics.median(ours), statistics.median(plain)
    return {
        "mb": round(size / 1e6, 1),
        "seconds": spread(ours),
        "bytes_alone_seconds": spread(plain),
        "allowed_seconds": round(1.5 * alone + 0.3, 3),
        "ratio": round(median / alone, 2),
        "server_cpu_seconds": round(statistics.median(server for server, _ in cpu), 2),
        "own_cpu_seconds": round(statistics.median(own for _, own in cpu), 2),
    }


def downloaded(prefix: str, entries: list[dict[str, Any]]) -> int:
    """Bytes that plain ranged GETs brought."""
    client = boto3.client("s3", config=Config(max_pool_connections=32))
    ranges = [(e["path"], a, min(a + _PART, e["bytes"]) - 1) for e in entries for a in range(0, e["bytes"], _PART)]

    def get(span: tuple[str, int, int]) -> int:
        name, first, last = span
        body = client.get_object(Bucket="hashdist", Key=f"{prefix}/{name}", Range=f"bytes={first}-{last}")["Body"]
        return len(body.read())

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return sum(pool.map(get, ranges))


# Keys


def _keys(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    uri = "s3://hashdist/keys"
    build(uri, arguments.keys_rows, _SEARCHED_SHARDS)
    codes = np.random.default_rng(2).integers(0, 256, (1, 8), dtype=np.uint8)
    entries = [parts(shard)["keys"] for shard in open_index(uri).manifest["shards"]]
    os.environ["HASHDIST_CACHE"] = str(folder / "cache-keys")
    index = open_index(uri)
    hits = index.search(codes, 100)
    with _counted() as counts:
        cold, keys = timed(hits.keys)
    warm, again = timed(hits.keys)
    assert again == keys
    assert len(set(keys[0])) == 100
    return {
        "rows": index.rows,
        "cold_seconds": round(cold, 3),
        "again_seconds": round(warm, 3),
        "requests": counts["requests"],
        "mb": round(counts["bytes"] / 1e6, 2),
        "mb_of_all_key_files": round(sum(entry["bytes"] for entry in entries) / 1e6, 1),
    }


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    from hashdist.store.s3 import S3Store

    counts, get = {"requests": 0, "bytes": 0}, S3Store.get

    def counted(self: S3Store, name: str, start: int = 0, length: int | None = None) -> bytes:
        data = get(self, name, start, length)
        counts["requests"] += 1
        counts["bytes"] += len(data)
        return data

    S3Store.get = counted  # type: ignore[method-assign]
    yield counts
    S3Store.get = get  # type: ignore[method-assign]


# Memory, and many shards


def _searcher(uri: str, rows: int) -> dict[str, Any]:
    build(uri, rows, _SHARDS)
    done = subprocess.run([sys.executable, "-c", _MEMORY, uri], capture_output=True, text=True, check=True)
    shutil.rmtree(uri)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _many(uri: str) -> dict[str, Any]:
    """A version whose 10,000 shards have four parts each and sizes of full length; none is opened."""
    index = create_index(uri, bits=64)
    index.append(np.zeros((1, 8), np.uint8), ["a"], {"digest": ["b"]})
    log = Log(open_store(uri))
    head = log.latest()
    assert head is not None
    one = head.manifest["shards"][0]
    rng = np.random.default_rng(0)
    names = log.new_attempt()
    big = 8_000_000
    shards = []
    for _ in range(_MANY_SHARDS):
        made = {part: [rng.integers(10**8, 10**9), rng.bytes(32).hex()[:43]] for part in one["parts"]}
        shards.append({**one, "rows": big, "path": names.new("shards", ""), "parts": made})
    record = {**head.manifest, "shards": shards, "rows": big * _MANY_SHARDS}
    committed, version = timed(lambda: log.commit(record, head.number))
    size = next(entry.size for entry in log.store.list("manifests/") if entry.name.endswith(f"{version.number}.json"))
    seconds, opened = timed(lambda: open_index(uri))
    assert len(opened.view.shards) == _MANY_SHARDS
    return {
        "manifest_mb": round(size / 1e6, 2),
        "parts": len(one["parts"]),
        "commit_seconds": round(committed, 3),
        "open_seconds": round(seconds, 3),
    }


# What all of it needs


def build(uri: str, rows: int, shards: int, model_uri: str = "m") -> None:
    rng = np.random.default_rng(0)
    index = create_index(uri, bits=64)
    names, entries = index.versions.new_attempt(), []
    for part in np.array_split(np.arange(rows), shards):
        ids = rng.integers(-(2**63), 2**63, len(part))
        numbers = pa.array(part).cast(pa.string())
        keys = pc.binary_join_element_wise("images/train/", numbers, ".jpeg", "")
        codes = rng.integers(0, 256, (len(part), 8), dtype=np.uint8)
        entries.append(write_shard(index.store, partial(names.new, "shards"), Rows(ids, codes, keys, pa.table({}))))
    index.publish(entries, bits=64, salts={}, model="m", model_uri=model_uri, lineage={})


@contextmanager
def s3() -> Iterator[int]:
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    boto3.client("s3").create_bucket(Bucket="hashdist")
    try:
        yield server.pid
    finally:
        server.kill()
        server.wait()


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


if __name__ == "__main__":
    main()
