"""Stage: near-duplicates of an index, as clusters of rows that hang together by steps of at most R bits.

Every pair of blocks of rows is joined once, each as one Ray task, and what comes back is a forest of at most as many
edges as the two blocks have rows (hashdist/nearest/joins.py). An index of one block is joined here, without Ray.

The result is one parquet file, a row for each image that has a near-duplicate, sorted by (cluster, id): `cluster` (the
smallest id of the cluster), `id`, `key`, `distance` (bits between its code and that of the image whose id is
`cluster`; more than R where only steps lead there). Its metadata name the index, the version and the radius, so that a
later run can start from it: rows that have joined since are compared with all rows, and clusters that have lost a row
are joined anew among those that remain. Nothing else can have changed, so the result is that of a fresh run.
"""

import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hashdist.ground.bits import hamming
from hashdist.ground.errors import AlreadyExists, InvalidInput, NotFound
from hashdist.ground.options import DedupOptions
from hashdist.ground.progress import say
from hashdist.ground.ranges import blocks
from hashdist.ground.settings import ClusterSettings
from hashdist.index import Index, open_index
from hashdist.index.pins import pinned
from hashdist.index.view import View
from hashdist.nearest import joins, scan
from hashdist.nearest.joins import Block, Edges
from hashdist.stages.cluster import session
from hashdist.stages.cluster.tasks import run_tasks
from hashdist.store import Store, of_file

_METADATA = b"hashdist.dedup"
_TASKS_FOR_RAY = 4
_EDGES_KEPT = 20_000_000  # before they are cut down to a forest

Span = tuple[int, int, int]
"""A run of physical rows: shard, start, stop."""


def run(index: Index, options: DedupOptions, cluster: ClusterSettings) -> dict[str, Any]:
    """Find the clusters of the index's present version and write them.

    Returns: file, version, radius, rows, clusters, clustered (rows in clusters), duplicates (rows that could go),
    largest, joined and gone (rows since the previous run, None without one), tasks, seconds.

    Raises:
        InvalidInput: the settings, or a previous file that was made otherwise. AlreadyExists: the output is there.
        NotFound, Corrupt, Unavailable: a file of the index, or the previous one.
    """
    started = time.perf_counter()
    store, name = _place(options)
    with pinned(index):
        view = index.view
        work = _work_since(index, options) if options.previous else _work_afresh(view, options)
        edges = [work.known, *_run_joins(work, view, options, cluster)]
        ids, clusters = joins.components(_forest(edges))
        table = _table(view, ids, clusters)
    about = {"index": index.uri, "version": view.number, **_identity(options)}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_METADATA: json.dumps(about)}), sink, compression="zstd")
    store.put(name, sink.getbuffer())
    sizes = np.unique(clusters, return_counts=True)[1]
    result = {
        "file": f"{store.uri}/{name}",
        "version": view.number,
        "radius": options.radius,
        "rows": index.rows,
        "clusters": len(sizes),
        "clustered": len(ids),
        "duplicates": len(ids) - len(sizes),
        "largest": int(sizes.max(initial=0)),
        "joined": work.joined,
        "gone": work.gone,
        "tasks": len(work.tasks),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return {**result, "text": _summary(result)}


def _place(options: DedupOptions) -> tuple[Store, str]:
    """Where the output goes. Raises InvalidInput, AlreadyExists."""
    store, name = of_file(options.out)
    if not name.endswith(".parquet"):
        raise InvalidInput(f"a .parquet file to write is required, found {options.out!r}; give --out FILE.parquet")
    if options.radius < 0 or options.block_rows < 1:
        raise InvalidInput(f"radius must be at least 0 and block_rows at least 1, found {options}")
    if store.exists(name):
        raise AlreadyExists(f"{options.out} is there already; choose another name")
    return store, name


def _summary(result: dict[str, Any]) -> str:
    since = "" if result["joined"] is None else f" ({result['joined']} joined and {result['gone']} gone since)"
    return (
        f"{result['file']}: {result['clusters']} clusters of {result['clustered']} images within "
        f"{result['radius']} bits, of {result['rows']}{since}; {result['duplicates']} could go, the largest cluster "
        f"has {result['largest']}; {result['seconds']} s"
    )


# What is to be joined


@dataclass(frozen=True)
class _Work:
    """Blocks, as rows of shards or as they are, and which of them are joined: (i, i) is a block with itself."""

    sources: Sequence[list[Span] | Block]
    tasks: list[tuple[int, int]]
    known: Edges
    joined: int | None = None
    gone: int | None = None


def _work_afresh(view: View, options: DedupOptions) -> _Work:
    sources = list(_sources(view, 0 if options.within_shard else options.block_rows))
    every = combinations_with_replacement(range(len(sources)), 2)
    tasks = [(i, j) for i, j in every if i == j or not options.within_shard]
    return _Work(sources, tasks, joins.no_edges())


def _sources(view: View, block_rows: int) -> Iterator[list[Span]]:
    """The rows of all shards, in blocks of `block_rows`; with 0, a block for each shard."""
    block: list[Span] = []
    held = 0
    for number, shard in enumerate(view.shards):
        start = 0
        while start < shard.rows:
            stop = min(shard.rows, start + block_rows - held) if block_rows else shard.rows
            block.append((number, start, stop))
            held, start = held + stop - start, stop
            if held >= block_rows:
                yield block
                block, held = [], 0
    if block:
        yield block


class _Previous(NamedTuple):
    version: int
    ids: NDArray[np.int64]
    clusters: NDArray[np.int64]


def _work_since(index: Index, options: DedupOptions) -> _Work:
    view, previous = index.view, _read_previous(index, options)
    try:
        before = open_index(index.uri, version=previous.version).view
    except NotFound as error:
        say(f"dedup: all rows are compared anew, since what {options.previous} was made from is gone: {error}")
        return _work_afresh(view, options)
    if before.manifest["bits"] != view.manifest["bits"]:
        return _work_afresh(view, options)
    joined, gone = _difference(before, view)
    if 2 * len(joined.ids) > index.rows:  # comparing these with all is more than comparing all
        return replace(_work_afresh(view, options), joined=len(joined.ids), gone=len(gone))
    broken = np.isin(previous.clusters, previous.clusters[np.isin(previous.ids, gone)])
    remaining = np.setdiff1d(previous.ids[broken], gone)
    known = joins.stars(previous.ids[~broken], previous.clusters[~broken])
    news = [Block(joined.ids[a:b], joined.codes[a:b]) for a, b in blocks(len(joined.ids), options.block_rows)]
    all_rows = list(_sources(view, options.block_rows)) if news else []
    old = len(news)
    tasks = [
        *combinations_with_replacement(range(old), 2),
        *((i, old + j) for i in range(old) for j in range(len(all_rows))),
    ]
    sources: list[list[Span] | Block] = [*news, *all_rows]
    if len(remaining):
        tasks.append((len(sources), len(sources)))
        sources.append(Block(remaining, view.codes(view.locate(remaining))))
    return _Work(sources, tasks, known, len(joined.ids), len(gone))


def _read_previous(index: Index, options: DedupOptions) -> _Previous:
    store, name = of_file(options.previous)
    try:
        table = pq.read_table(io.BytesIO(store.get(name)))
        about = json.loads((table.schema.metadata or {})[_METADATA])
    except (pa.ArrowInvalid, KeyError) as error:
        raise InvalidInput(f"--previous must be a file that dedup wrote, found {options.previous}: {error}") from error
    made, asked = {"index": about["index"], **_settings_of(about)}, {"index": index.uri, **_identity(options)}
    if made != asked or options.within_shard or about["version"] > index.version:
        raise InvalidInput(
            f"{options.previous} must be of {asked}, over all shards and no newer than version {index.version}, "
            f"found {about}; leave --previous out"
        )
    return _Previous(about["version"], table["id"].to_numpy(), table["cluster"].to_numpy())


def _identity(options: DedupOptions) -> dict[str, Any]:
    return {"radius": options.radius, "within_shard": options.within_shard}


def _settings_of(about: dict[str, Any]) -> dict[str, Any]:
    return {name: about[name] for name in ("radius", "within_shard")}


def _difference(before: View, after: View) -> tuple[Block, NDArray[np.int64]]:
    """Rows that are live after and were not before, and ids of rows for which it is the other way round.

    A row of another code is another row. Of shards that both versions have only the hidden rows are looked at.
    """
    old = {shard.name: number for number, shard in enumerate(before.shards)}
    new = {shard.name: number for number, shard in enumerate(after.shards)}
    was, now = [], []
    for name in old.keys() | new.keys():
        if name in old and name in new:
            dead_then, dead_now = before.dead_rows(old[name]), after.dead_rows(new[name])
            was.append(_block_of(before, old[name], np.setdiff1d(dead_now, dead_then)))
            now.append(_block_of(after, new[name], np.setdiff1d(dead_then, dead_now)))
        elif name in old:
            was.append(_live_block(before, old[name]))
        else:
            now.append(_live_block(after, new[name]))
    there, here = _concatenate(was, before), _concatenate(now, after)
    shared, at_there, at_here = np.intersect1d(there.ids, here.ids, assume_unique=True, return_indices=True)
    same = shared[(there.codes[at_there] == here.codes[at_here]).all(1)]
    joined = ~np.isin(here.ids, same)
    return Block(here.ids[joined], here.codes[joined]), np.setdiff1d(there.ids, same)


def _block_of(view: View, number: int, rows: NDArray[np.int64]) -> Block:
    shard = view.shards[number]
    return Block(np.asarray(shard.ids[rows]), np.asarray(shard.codes[rows]))


def _live_block(view: View, number: int, start: int = 0, stop: int | None = None) -> Block:
    rows = np.arange(start, view.shards[number].rows if stop is None else stop)
    return _block_of(view, number, rows[scan.alive(view.dead(number), rows)])


def _concatenate(parts: Iterable[Block], view: View) -> Block:
    """Rows of several shards as one block, by id."""
    found = [Block(np.empty(0, np.int64), np.empty((0, view.manifest["bits"] // 8), np.uint8)), *parts]
    ids = np.concatenate([part.ids for part in found])
    order = np.argsort(ids, kind="stable")
    return Block(ids[order], np.concatenate([part.codes for part in found])[order])


# Joining


@dataclass(frozen=True)
class _Join:
    """Work of one task: a pair of blocks."""

    view: View
    sources: Sequence[list[Span] | Block]
    radius: int

    def __call__(self, task: tuple[int, int]) -> Edges:
        left = self._block(task[0])
        if task[0] == task[1]:
            return joins.within(left, self.radius)
        return joins.between(left, self._block(task[1]), self.radius)

    def _block(self, number: int) -> Block:
        source = self.sources[number]
        if isinstance(source, Block):
            return source
        return _concatenate((_live_block(self.view, *rows) for rows in source), self.view)


def _run_joins(work: _Work, view: View, options: DedupOptions, cluster: ClusterSettings) -> Iterator[Edges]:
    join = _Join(view, work.sources, options.radius)
    if len(work.tasks) < _TASKS_FOR_RAY:
        yield from map(join, work.tasks)
        return
    with session.session(cluster):
        for _, edges in run_tasks(join, work.tasks, label="dedup", at_once=session.cpus()):
            yield edges


def _forest(parts: Iterable[Edges]) -> Edges:
    """The edges of all parts, cut down whenever they have become many."""
    held: list[Edges] = [joins.no_edges()]
    for edges in parts:
        held.append(edges)
        if sum(map(len, held)) > _EDGES_KEPT:
            held = [joins.stars(*joins.components(np.concatenate(held)))]
    return np.concatenate(held)


def _table(view: View, ids: NDArray[np.int64], clusters: NDArray[np.int64]) -> pa.Table:
    order = np.lexsort((ids, clusters))
    codes = view.codes(view.locate(ids))
    apart = hamming(codes, codes[np.searchsorted(ids, clusters)])
    keys = pa.array(view.keys_of(ids), pa.string())
    table = pa.table({"cluster": clusters, "id": ids, "key": keys, "distance": apart})
    return table.take(order)
