"""Stage: how well codes find what they should. Exact at any size of the database.

Ray tasks go over runs of parts. Each returns, per query, the histogram of (all, relevant) over the distances and its
first R results; histograms add up and result lists are merged, so nothing of the size of the database travels. From
them come the metrics of hashdist/evaluation/ranking.py: by ranked list in (distance, id) order, tie-expected, and by
radius. Where there are features, recall@k against the exact cosine neighbours is measured too, which needs no labels;
and the shallow methods, fitted on the same features of the same training images, stand beside the codes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.evaluation import measure, ranking
from hashdist.evaluation.measure import Cuts, Results
from hashdist.evaluation.protocols import columns, split_rows
from hashdist.ground import bits
from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.ground.progress import say
from hashdist.ground.ranges import blocks, runs
from hashdist.ground.schema import OK, from_vectors
from hashdist.ground.settings import Settings
from hashdist.index.search import rerank
from hashdist.methods.contract import Encoder, find_method, fit_shallow, shallow_methods
from hashdist.methods.parts.labels import one_hot
from hashdist.nearest import cosine, scan
from hashdist.stages.cluster import session, tasks
from hashdist.store.arrays import read_array
from hashdist.store.commit import Artefact, open_artefact, read_table
from hashdist.store.vectors import read_vectors

_ROWS_PER_TASK = 250_000
_PAIRS_AT_ONCE = 16_384
_HALF = np.int64(1) << np.int64(62)

Ids = NDArray[np.int64]


def run(settings: Settings, codes: Artefact, features: Artefact | None = None) -> dict[str, Any]:
    """Measure committed codes. Needs an open Ray session; commits nothing.

    Args:
        settings: the protocol, its cuts, and the baselines to stand beside the codes.
        codes: committed codes.
        features: the features they were made from; without them no label-free recall and no baselines.

    Returns:
        stage, protocol, split (digest of its sets), queries, database, bits, metrics (of the codes), by_method
        (metrics of the codes and of each baseline), curves (precision and recall by radius), without_relevant (queries
        that no image is relevant to), seconds.

    Raises:
        InvalidInput: an unknown protocol or baseline, baselines without features, nothing to measure, or queries
            that the model was trained on.
    """
    started = time.perf_counter()
    wanted = settings.evaluate
    unknown = sorted(set(wanted.baselines) - set(known := shallow_methods())) if wanted.baselines else []
    if unknown:
        raise InvalidInput(f"baselines must be among {', '.join(known)}, found {', '.join(unknown)}")
    if wanted.baselines and features is None:
        raise InvalidInput("baselines are fitted on features, and there are none; leave them out, or give the features")
    task = _plan(settings, codes)
    if not task.classes and features is None:
        raise InvalidInput(f"{codes.uri} has no labels, so features are needed to measure recall; found neither")
    exact = _exact_neighbours(task, features, wanted.recall_at) if features is not None else None
    name, trained_on = _model_of(codes, settings, task)
    found = {name: _search(task, CodeSource(codes, "code", None))}
    for baseline in wanted.baselines:
        assert features is not None
        encoder = _fit(settings, baseline, codes, features, trained_on)
        found[baseline] = _search(task, CodeSource(features, "feature", encoder))
    found = {method: replace(results, exact_QK=exact) for method, results in found.items()}
    by_method = {method: measure.metrics(results, Cuts.of(wanted)) for method, results in found.items()}
    if exact is not None and features is not None and settings.index.rerank:
        for method, results in found.items():
            by_method[method] |= _rerank(task, results, features, exact, wanted.recall_at)
    result = {
        "stage": "evaluate",
        "snapshot": codes.uri,
        "protocol": wanted.protocol,
        "split": task.split,
        "queries": len(task.queries),
        "database": task.database_size,
        "bits": codes.manifest()["bits"],
        "metrics": by_method[name],
        "by_method": by_method,
        "skipped": False,
        "seconds": time.perf_counter() - started,
    }
    if task.classes:
        result["without_relevant"] = int((found[name].total == 0).sum())
        result["curves"] = {method: _curves(results) for method, results in found.items()}
    say(f"evaluate: {len(task.queries)} queries, {task.database_size} images: {_line(by_method)}")
    return result


def _fit(settings: Settings, baseline: str, codes: Artefact, features: Artefact, trained_on: Ids) -> Encoder:
    """A shallow method fitted on the images that the model was trained on."""
    table = read_vectors(features, ["labels", "feature"], np.sort(trained_on))
    training = from_vectors(table["feature"], table.schema).astype(np.float32)
    labels = one_hot(table["labels"].to_pylist())
    return fit_shallow(find_method(baseline), training, labels, codes.manifest()["bits"], settings.train.seed)


def _line(by_method: dict[str, dict[str, float]]) -> str:
    first = next(iter(next(iter(by_method.values()))))
    return f"{first}: " + "  ".join(f"{name} {metrics[first]:.4f}" for name, metrics in by_method.items())


# What is asked


@dataclass(frozen=True)
class Task:
    """What every method is measured on.

    Attributes:
        queries: ids, ascending.
        masks: label masks of the queries, uint64 [Q, M].
        database: ids, ascending; None = every image with a code.
        database_size: how many these are.
        classes: number of labels; 0 = there are none.
        depth: places of the ranked lists that are needed.
        own: whether queries are in the database, where each is left out of its own results.
        split: digest of the protocol's sets; None without protocol.
    """

    queries: Ids
    masks: NDArray[np.uint64]
    database: Ids | None
    database_size: int
    classes: int
    depth: int
    own: bool
    split: str | None = None


def _plan(settings: Settings, codes: Artefact) -> Task:
    wanted = settings.evaluate
    rows = _labelled_ids(codes, columns(wanted.protocol) if wanted.protocol else [])
    highest = pc.max(pc.list_flatten(rows["labels"])).as_py()
    classes = 0 if highest is None else highest + 1
    ids = rows["id"].to_numpy()
    database = digest = None
    if wanted.protocol:
        parts = split_rows(wanted.protocol, rows, wanted.protocol_seed)
        queries, database = ids[parts.query], ids[parts.database]  # ids ascend, and so do rows
        digest = parts.digest()
    else:
        queries = ids[: wanted.queries]
    if not len(queries):
        raise InvalidInput(f"at least one query is needed, found {len(ids)} images with codes in {codes.uri}")
    masks = ranking.label_masks(rows["labels"].take(np.searchsorted(ids, queries)), max(classes, 1))
    own = bool(np.isin(queries, database).any()) if database is not None else True
    size = len(ids) if database is None else len(database)
    depth = Cuts.of(wanted).depth + own
    return Task(queries, masks, database, size, classes, min(depth, size), own, digest)


def _labelled_ids(codes: Artefact, others: Sequence[str] = ()) -> pa.Table:
    """Ids and labels of the images that have a code, by id, and what other columns are asked for."""
    names = list(dict.fromkeys(["id", "labels", *others]))
    rows = read_vectors(codes, [*names, "status"])
    return rows.filter(pc.equal(rows["status"], OK)).select(names).combine_chunks()


def _model_of(codes: Artefact, settings: Settings, task: Task) -> tuple[str, Ids]:
    """Name of the method that made the codes, and the images it was trained on.

    Raises InvalidInput if queries of a protocol are among them.
    """
    try:
        model = open_artefact(codes.manifest()["model"], "models").manifest()
        graph = open_artefact(model["inputs"]["graphs"]["uri"], "graphs")
    except (NotFound, KeyError):  # a model that something else made: the first images stand in for its training set
        return "codes", _labelled_ids(codes)["id"].to_numpy()[: settings.graph.train_sample]
    trained_on = read_array(graph.store, graph.manifest()["files"]["ids"])
    shared = len(np.intersect1d(trained_on, task.queries))
    if shared and settings.evaluate.protocol:
        raise InvalidInput(
            f"the queries of protocol {settings.evaluate.protocol} must not be trained on, but the model was trained "
            f"on {shared} of them; train with --graph.protocol {settings.evaluate.protocol}"
        )
    return str(model["method"]), trained_on


# Where codes come from


class CodeSource(NamedTuple):
    """Codes by parts: those committed, or those that an encoder makes of committed features."""

    artefact: Artefact
    column: str
    encoder: Encoder | None

    def to_codes(self, table: pa.Table) -> NDArray[np.uint8]:
        """The codes of a table of vectors."""
        vectors: NDArray[Any] = from_vectors(table[self.column], table.schema)
        return np.asarray(vectors, np.uint8) if self.encoder is None else bits.pack(self.encoder(vectors))


def _vectors(artefact: Artefact, column: str, ids: Ids) -> NDArray[Any]:
    table = read_vectors(artefact, [column], np.sort(ids))
    return from_vectors(table[column], table.schema)


def _spans(artefact: Artefact) -> list[list[dict[str, Any]]]:
    files = artefact.manifest()["files"]
    rows = [file["rows"] for file in files]
    most = min(_ROWS_PER_TASK, -(-sum(rows) // session.cpus()))
    return [files[start:stop] for start, stop in runs(rows, most)]


def _rows(artefact: Artefact, files: Sequence[dict[str, Any]], columns: list[str], database: Ids | None) -> pa.Table:
    """The rows of some parts that have a vector and are in the database, by id."""
    table = pa.concat_tables(read_table(artefact.store, file, ["id", "status", *columns]) for file in files)
    keep = np.asarray(table["status"].to_numpy() == OK)
    if database is not None:
        keep &= np.isin(table["id"].to_numpy(), database, assume_unique=True)
    rows = np.flatnonzero(keep)
    return table.take(rows[np.argsort(table["id"].to_numpy()[rows], kind="stable")])


# Measuring


def _search(task: Task, source: CodeSource) -> Results:
    """Histograms and first results of all queries over the database."""
    table = read_vectors(source.artefact, [source.column], task.queries)
    queries_QW = source.to_codes(table)
    histograms = np.zeros((len(queries_QW), 2, 8 * queries_QW.shape[1] + 1), np.int64)
    best: scan.Nearest | None = None
    work = partial(_part, task, source, queries_QW)
    for _, (counts, found) in tasks.run_tasks(work, _spans(source.artefact), label="evaluate", at_once=session.cpus()):
        histograms += counts
        found = scan.Nearest(*map(np.array, found))  # what Ray hands over is read-only
        best = found if best is None else scan.merge(best, found, task.depth)
    if best is None or (best.counts_Q != task.depth).any():
        raise InvalidInput(f"{task.database_size} images with codes are needed; {source.artefact.uri} has fewer")
    ids, relevant = _unpack(best.rows_QK)
    if task.own:
        histograms, relevant, ids = _without_own(task, histograms, relevant, ids)
    return Results(ids, histograms, relevant) if task.classes else Results(ids)


def _part(
    task: Task, source: CodeSource, queries_QW: NDArray[np.uint8], files: list[dict[str, Any]]
) -> tuple[NDArray[np.int64], scan.Nearest]:
    """Work of one task: some parts of the database against all queries."""
    table = _rows(source.artefact, files, ["labels", source.column], task.database)
    codes_NW, ids = source.to_codes(table), table["id"].to_numpy()
    masks = ranking.label_masks(table["labels"], max(task.classes, 1))
    found = measure.search(codes_NW, queries_QW, masks, task.masks, task.depth, threads=1)
    if not len(ids):
        return found.histograms, found.nearest
    packed = _pack(ids[found.nearest.rows_QK.clip(min=0)], found.relevant)
    return found.histograms, found.nearest._replace(rows_QK=packed)


def _pack(ids: Ids, relevant: NDArray[np.bool_]) -> Ids:
    """Id and relevance in one int64 that is ordered as the id is: lists are merged without a second column."""
    packed: Ids = ((ids - _HALF) << np.int64(1)) | relevant
    return packed


def _unpack(packed: Ids) -> tuple[Ids, NDArray[np.bool_]]:
    return (packed >> np.int64(1)) + _HALF, (packed & 1).astype(np.bool_)


def _without_own(
    task: Task, histograms: NDArray[np.int64], relevant: NDArray[np.bool_], ids: Ids
) -> tuple[NDArray[np.int64], NDArray[np.bool_], Ids]:
    """Leave each query that is in the database out of its own results."""
    inside = np.ones(len(task.queries), np.bool_) if task.database is None else np.isin(task.queries, task.database)
    keep = ids != np.where(inside, task.queries, -1)[:, None]
    keep[keep.all(1), -1] = False  # its own place is beyond the list, or it is not in the database
    shape = (len(keep), keep.shape[1] - 1)
    others = measure.without_own(histograms, task.masks, inside)
    return others, relevant[keep].reshape(shape), ids[keep].reshape(shape)


def _rerank(task: Task, results: Results, features: Artefact, exact: Ids, k: int) -> dict[str, float]:
    """Recall of two-stage ranking: the first candidates by (distance, id), ordered by the cosine of kept features."""
    candidates_QC = results.found_QR[:, : rerank.CANDIDATES_PER_RESULT * k]
    queries_QD = _vectors(features, "feature", task.queries)
    work = partial(_cosines, features, queries_QD, candidates_QC)
    scores = np.zeros(candidates_QC.size)
    parts = tasks.run_tasks(work, _spans(features), label="rerank", at_once=session.cpus())
    for _, (places, found) in parts:
        scores[places] = found
    order = np.lexsort((candidates_QC, -scores.reshape(candidates_QC.shape)), axis=1)[:, : exact.shape[1]]
    best = np.take_along_axis(candidates_QC, order, axis=1)
    return {f"recall@{k}_reranked": float(ranking.recall_at(best, exact).mean())}


def _cosines(
    features: Artefact, queries_QD: NDArray[Any], candidates_QC: Ids, files: list[dict[str, Any]]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Work of one task: which candidates (as places in the flat array) are in some parts, and their cosines."""
    table = _rows(features, files, ["feature"], None)
    ids = table["id"].to_numpy()
    if not len(ids):
        return np.empty(0, np.int64), np.empty(0)
    rows = np.searchsorted(ids, candidates_QC.ravel()).clip(max=len(ids) - 1)
    places = np.flatnonzero(ids[rows] == candidates_QC.ravel())
    vectors: NDArray[Any] = from_vectors(table["feature"], table.schema)
    kept = rerank.unit_rows(vectors)
    scores = np.empty(len(places))
    for start, stop in blocks(len(places), _PAIRS_AT_ONCE):
        some = places[start:stop]
        scores[start:stop] = cosine.similarity(queries_QD[some // candidates_QC.shape[1]], kept[rows[some]])
    return places, scores


def _curves(results: Results) -> dict[str, Any]:
    """Curves as this stage reports them: those by radius beside precision@N."""
    drawn = measure.curves(results)
    return {**drawn["radius"], "precision_at": drawn["precision_at"]}


# Exact neighbours in feature space


def _exact_neighbours(task: Task, features: Artefact, k: int) -> Ids:
    """Ids of the k images nearest to each query by cosine, itself left out: int64 [Q, k'], by (cosine, id)."""
    queries_QD = _vectors(features, "feature", task.queries)
    work = partial(_nearest_features, task, features, queries_QD, k + task.own)
    parts = tasks.run_tasks(work, _spans(features), label="exact neighbours", at_once=session.cpus())
    scores, ids = (np.concatenate(column, axis=1) for column in zip(*(found for _, found in parts), strict=True))
    order = np.lexsort((ids, -scores), axis=1)
    ranked = np.take_along_axis(ids, order, axis=1)
    others = [row[row != query] for row, query in zip(ranked, task.queries, strict=True)]
    return np.stack([row[: min(k, task.database_size - task.own)] for row in others])


def _nearest_features(
    task: Task, features: Artefact, queries_QD: NDArray[Any], k: int, files: list[dict[str, Any]]
) -> tuple[NDArray[np.float64], Ids]:
    """Cosines and ids of the k nearest images of some parts."""
    table = _rows(features, files, ["feature"], task.database)
    base_ND: NDArray[Any] = from_vectors(table["feature"], table.schema)
    k = min(k, len(base_ND))
    if not k:
        return np.empty((len(queries_QD), 0)), np.empty((len(queries_QD), 0), np.int64)
    rows_QK = cosine.nearest(queries_QD, base_ND, k, threads=1)
    scores = cosine.similarity(np.repeat(queries_QD, k, axis=0), base_ND[rows_QK.ravel()])
    return scores.reshape(rows_QK.shape), table["id"].to_numpy()[rows_QK]
