"""graph: which images are trained on, their exact cosine neighbours, and the pairs that a method starts from.

Rules and sizes are those of hashdist/methods/parts/graph.py; by rule `none` there is the sample alone. Rows are the
sample's images by ascending id. Work goes in parts, each a Ray task with a create-only record: the sample
(part 0), the neighbours of a run of rows, all neighbours in one file, W of a run of rows, W in one file. Tasks read
what parts before them committed, mapped into memory where the store is on their machine. A record of the plan says
how long the runs are, so a second run with other resources goes on where the first one stopped.
"""

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashdist.evaluation.protocols import columns, identity, split_rows
from hashdist.ground.progress import say
from hashdist.ground.ranges import blocks
from hashdist.ground.schema import OK, from_vectors
from hashdist.ground.settings import GraphSettings, Settings
from hashdist.methods.parts.graph import find_rule, positives, rule_for, sizes
from hashdist.nearest import cosine, shared
from hashdist.stages import artefacts
from hashdist.stages.cluster import session, tasks
from hashdist.store import Store, open_store
from hashdist.store.arrays import map_array, read_array, write_array
from hashdist.store.commit import (
    Artefact,
    create_record,
    open_artefact,
    write_table,
)
from hashdist.store.vectors import read_vectors

KIND = "graphs"
REVISION = 1

PLAN = "plan.json"
_FEWEST_POSITIVES = 20  # expected positive pairs of a batch, below which training starves of them


def snapshot(settings: Settings, features: Artefact) -> Artefact:
    """Where the graph of these features lives, committed or not.

    Args:
        settings: of the run.
        features: committed features.
    """
    if settings.graph.snapshot:
        return open_artefact(settings.graph.snapshot, KIND)
    identity = _identity(_chosen(settings))
    return artefacts.target(settings, KIND, REVISION, inputs={"features": features.name}, identity=identity)


def run(settings: Settings, features: Artefact) -> dict[str, Any]:
    """Make every part that has no record yet and commit the graph.

    Raises:
        InvalidInput: too few images with features for the sample or for k, no labels for a protocol that needs them.
    """
    started = time.perf_counter()
    graph = snapshot(settings, features)
    if graph.exists():
        return _result(graph, started, skipped=True)
    chosen = _chosen(settings)
    ids = _sample(chosen, features)
    k1, k2 = sizes(chosen, len(ids), f"{features.uri} ({features.manifest()['failed']} rows of it have none)")
    plan, _ = create_record(graph.store, PLAN, {"part_rows": max(1, chosen.part_rows)})
    work = _Work(graph, features, ids, chosen.rule, k1, k2, chosen.symmetrize, chosen.threads, plan["part_rows"], {})
    records = _run_phases(work, chosen)
    graph.publish(_manifest(chosen, work, records))
    rule = find_rule(chosen.rule)
    if rule is not None and rule.batch:
        _warn_of_starvation(graph, rule.batch)
    return _result(graph, started, skipped=False)


def _chosen(settings: Settings) -> GraphSettings:
    """The settings with the rule that `auto` stands for. Raises InvalidInput for an unknown one."""
    return replace(settings.graph, rule=rule_for(settings.train.method, settings.graph.rule))


def _identity(chosen: GraphSettings) -> dict[str, Any]:
    """The settings that name the graph: of a protocol file its sets, not where it lies."""
    return {**chosen.identity(), "protocol": identity(chosen.protocol)}


def _sample(chosen: GraphSettings, features: Artefact) -> NDArray[np.int64]:
    """Ids of the images to train on, ascending."""
    needed = columns(chosen.protocol) if chosen.protocol else []
    table = read_vectors(features, list(dict.fromkeys(["id", "status", "labels", *needed])))
    table = table.filter(pa.compute.equal(table["status"], OK))
    ids: NDArray[np.int64] = table["id"].to_numpy()
    rows = np.arange(len(ids))
    if chosen.protocol:
        rows = split_rows(chosen.protocol, table, chosen.protocol_seed).train
    if chosen.labelled:
        counts = pa.compute.list_value_length(table["labels"]).fill_null(0).to_numpy()
        rows = rows[counts[rows] > 0]
    return ids[rows] if chosen.protocol else ids[rows][: chosen.train_sample]


@dataclass(frozen=True)
class _Work:
    """The work of the tasks: called with the number of a part, it does that part and returns its record.

    Parts: 0 the sample, then for each run of rows its neighbours, then their join, then for each run of rows its W,
    then the join of those. `records` are those of the phases before.
    """

    graph: Artefact
    features: Artefact
    ids: NDArray[np.int64]
    rule: str
    k1: int
    k2: int
    symmetrize: Literal["or", "and", "none"]
    threads: int
    part_rows: int
    records: dict[int, dict[str, Any]]

    @property
    def runs(self) -> list[tuple[int, int]]:
        return list(blocks(len(self.ids), self.part_rows))

    def phases(self) -> list[tuple[str, list[int]]]:
        """Names and parts of the phases, each reading what the ones before it committed."""
        count = len(self.runs)
        if find_rule(self.rule) is None:
            return [("sample", [0])]
        return [
            ("sample", [0]),
            ("neighbours", [*range(1, count + 1)]),
            ("joining neighbours", [count + 1]),
            ("shared neighbours", [*range(count + 2, 2 * count + 2)]),
            ("joining W", [2 * count + 2]),
        ]

    def __call__(self, part: int) -> dict[str, Any]:
        count = len(self.runs)
        if part == 0:
            return _write_sample(self)
        if part <= count:
            return _nearest(self, *self.runs[part - 1])
        if part == count + 1:
            return _join_neighbours(self)
        if part <= 2 * count + 1:
            return _positives(self, *self.runs[part - count - 2])
        return _join_similarity(self)


def _run_phases(work: _Work, chosen: GraphSettings) -> dict[int, dict[str, Any]]:
    cores = max(1, min(chosen.threads, session.node_cpus()))
    at_once = chosen.workers or max(1, session.cpus() // cores)
    records: dict[int, dict[str, Any]] = {}
    for phase, parts in work.phases():
        task = replace(work, records=records)
        label = f"graph: {phase}"
        found = tasks.run_parts(work.graph, parts, task, label=label, at_once=at_once, num_cpus=cores)
        records = {**records, **found}
    return records


# The parts, as they run in a Ray task


def _write_sample(work: _Work) -> dict[str, Any]:
    """The sample's ids, features and labels."""
    table = read_vectors(work.features, ["id", "key", "labels", "feature"], work.ids)
    rows = table.select(["id", "key", "labels"])
    labelled = table["labels"].null_count < len(table)
    return {
        "ids": _write(work.graph, work.ids),
        "features": _write(work.graph, from_vectors(table["feature"], table.schema)),
        "labels": write_table(work.graph.store, work.graph.new_name(".parquet"), rows) if labelled else None,
    }


def _nearest(work: _Work, start: int, stop: int) -> dict[str, Any]:
    """Neighbours of rows start to stop among all."""
    features_ND = _read(work.graph.store, work.records[0]["features"])
    found = cosine.self_nearest(features_ND, work.k1, rows=(start, stop), threads=work.threads)
    return {"neighbours": _write(work.graph, found.rows_MK), "rescored": found.rescored}


def _join_neighbours(work: _Work) -> dict[str, Any]:
    entries = [work.records[1 + run]["neighbours"] for run in range(len(work.runs))]
    if len(entries) == 1:
        return {"neighbours": entries[0]}
    return {"neighbours": _write(work.graph, np.concatenate([_read(work.graph.store, entry) for entry in entries]))}


def _positives(work: _Work, start: int, stop: int) -> dict[str, Any]:
    """W of rows start to stop, not yet symmetric."""
    neighbours_NK = _read(work.graph.store, work.records[len(work.runs) + 1]["neighbours"])
    w = positives(work.rule, neighbours_NK, work.k2, (start, stop), threads=work.threads)
    return {"indptr": _write(work.graph, w.indptr), "indices": _write(work.graph, w.indices)}


def _join_similarity(work: _Work) -> dict[str, Any]:
    records = [work.records[len(work.runs) + 2 + run] for run in range(len(work.runs))]
    degrees = [np.diff(_read(work.graph.store, record["indptr"])) for record in records]
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(degrees))])
    indices = np.concatenate([_read(work.graph.store, record["indices"]) for record in records])
    w = shared.symmetric(shared.Sparse(indptr, indices), work.symmetrize)
    files = {"w0_indptr": _write(work.graph, w.indptr), "w0_indices": _write(work.graph, w.indices)}
    return {**files, "edges": len(w.indices)}


def _write(graph: Artefact, array: NDArray[Any]) -> dict[str, Any]:
    return write_array(graph.store, graph.new_name(".npy"), array)


def _read(store: Store, entry: dict[str, Any]) -> NDArray[Any]:
    """An array that `_write` wrote: mapped where it lies on this machine, else fetched once a process."""
    if store.local_path(entry["path"]) is not None:
        return map_array(store, entry)
    return _fetch(store.uri, entry["path"], entry["sha256"], entry["bytes"])


@lru_cache(maxsize=2)
def _fetch(uri: str, path: str, sha256: str, size: int) -> NDArray[Any]:
    return read_array(open_store(uri), {"path": path, "sha256": sha256, "bytes": size})


# What is published


def _manifest(chosen: GraphSettings, work: _Work, records: dict[int, dict[str, Any]]) -> dict[str, Any]:
    count = len(work.runs)
    sample = records[0]
    near, similarity = records.get(count + 1, {}), records.get(2 * count + 2, {})
    n = len(work.ids)
    return {
        "stage": "graph",
        "inputs": {"features": {"uri": work.features.uri, "digest": work.features.name}},
        "settings": _identity(chosen),
        "rows": n,
        "failed": 0,
        "n": n,
        "k1": work.k1,
        "k2": work.k2,
        "rule": work.rule,
        "edges": similarity.get("edges", 0),
        "rescored": sum(records[part]["rescored"] for part in range(1, count + 1)) if near else 0,
        "files": {
            "ids": sample["ids"],
            "features": sample["features"],
            "labels": sample["labels"],
            "neighbours": near.get("neighbours"),
            "w0_indptr": similarity.get("w0_indptr"),
            "w0_indices": similarity.get("w0_indices"),
        },
    }


def _warn_of_starvation(graph: Artefact, batch: int) -> None:
    """Say so where a uniform batch of the size in the paper holds hardly a positive pair."""
    manifest = graph.manifest()
    n, edges = manifest["n"], manifest["edges"]
    expected = batch * (batch - 1) * edges / (n * (n - 1))
    if expected < _FEWEST_POSITIVES:
        say(
            f"warning: a uniform batch of {batch} of these {n} images holds {expected:.1f} positive pairs on average, "
            f"at least {_FEWEST_POSITIVES} are wanted; train on fewer images (graph.train_sample), raise "
            f"graph.neighbours, or use neighbour batches where the method offers them"
        )


def _result(graph: Artefact, started: float, *, skipped: bool) -> dict[str, Any]:
    manifest = graph.manifest()
    details = {name: manifest[name] for name in ("rule", "n", "k1", "k2", "edges")}
    return artefacts.result("graph", graph, started, skipped=skipped, **details)
