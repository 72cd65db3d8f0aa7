"""Sixteen writers at once, on disk and on S3: one linear history, and in it the union of their rows, each key once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hashdist.index import create_index, open_index

WRITERS, TURNS = 16, 3


def test_sixteen_writers(root_uri: str) -> None:
    uri = f"{root_uri}/indexes/photos"
    create_index(uri, bits=64)
    codes = np.random.default_rng(0).integers(0, 256, (WRITERS * 8, 8), dtype=np.uint8)
    start = threading.Barrier(WRITERS)
    told: list[list[int]] = [[] for _ in range(WRITERS)]

    def write(writer: int) -> None:
        index = open_index(uri)
        start.wait()
        for turn in range(TURNS):
            rows = sorted(
                {writer * 8 + turn, (writer * 8 + turn + 8) % len(codes), turn}
            )  # own, a neighbour's, everybody's
            digests = {"digest": [str(row) for row in rows]}
            done = index.apply(codes[rows], [f"k{row}" for row in rows], digests)
            told[writer].append(done.added)
        if writer % 4 == 0:
            index.delete([f"k{writer * 8}"])

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(WRITERS)))

    index = open_index(uri)
    history = [index.versions.read(number).manifest for number in index.versions.numbers()]
    assert [manifest["number"] for manifest in history] == list(range(1, len(history) + 1))
    assert [manifest["parent"] for manifest in history] == list(range(len(history)))
    assert sum(manifest.get("added", 0) for manifest in history) == sum(map(sum, told)), "an addition was told twice"
    counts = [manifest["rows"] for manifest in history]
    steps = [manifest.get("added", 0) - manifest.get("removed", 0) for manifest in history]
    assert counts == np.cumsum(steps).tolist()

    keys = list(index.keys())
    assert len(keys) == len(set(keys)) == index.rows
    ever = {f"k{writer * 8 + turn}" for writer in range(WRITERS) for turn in range(TURNS)}
    maybe_gone = {f"k{writer * 8}" for writer in range(0, WRITERS, 4)}  # a neighbour may have brought it back
    assert ever - maybe_gone <= set(keys) <= ever
    np.testing.assert_array_equal(index.codes_of(keys), codes[[int(key[1:]) for key in keys]])
    for number in index.versions.numbers():
        old = open_index(uri, version=number)
        assert len(list(old.keys())) == old.rows
