"""features: every image of a collection as one vector, by a backbone; or vectors that the user brings.

A part of the collection is the unit of work: an actor reads it, decodes and resizes its images, runs the backbone in
batches of one shape, writes one parquet file and publishes one create-only record. So a retry is harmless, a second
run does only the parts without a record, and what crosses Ray's object store is a line per part: pixels would be ten
to a hundred times the features. Ray Data places the actors, feeds them and replaces those that die.

On a CPU an actor is one core: batches wait for nobody, and decoding in one fills what the others leave. On a GPU an
actor decodes on as many threads as it has CPUs (Pillow works outside the interpreter lock) ahead of the network.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray

from hashdist.collection import vectors
from hashdist.collection.collection import Collection, Image
from hashdist.collection.decode import BadImage, decode
from hashdist.ground import errors, telemetry
from hashdist.ground.errors import HashdistError, InvalidInput, NotFound
from hashdist.ground.progress import Progress, say
from hashdist.ground.schema import OK, UNREADABLE, UNUSABLE, failures, to_vectors, vector_schema
from hashdist.ground.settings import FeatureSettings, Settings
from hashdist.ground.threads import in_order
from hashdist.models.backbones import Backbone, build_backbone
from hashdist.models.networks import open_network, state_bytes, warn_of_random, weights_identity
from hashdist.stages import artefacts
from hashdist.stages.cluster import metrics, session, tasks
from hashdist.store.commit import (
    Artefact,
    create_record,
    digest,
    open_artefact,
    read_file,
    read_record,
    write_file,
    write_table,
)

KIND = "features"
REVISION = 1

PLAN = "plan.json"
"""Record of what the first worker decided (precision, batch): all workers of all runs of an artefact follow it."""

_SHARED = ("precision", "batch", "dtype", "width", "weights_digest")
"""Of a backbone's spec: what must be the same in all parts."""

_BLOCKS = 4096  # of parts, at most: each costs the driver a task
_DECODE_THREADS = 16  # per GPU at most


def snapshot(settings: Settings, *upstream: Artefact) -> Artefact:
    """Where the features live, or will.

    Args:
        settings: of the run.
        upstream: the committed collection; nothing where the features are given (`features.source`, `.snapshot`).

    Raises InvalidInput, NotFound: the backbone or its weights.
    """
    chosen = settings.features
    if chosen.snapshot:
        return open_artefact(chosen.snapshot, KIND)
    if chosen.source:
        source = vectors.list_source(chosen.source)
        inputs = {"source": source.digest, "uri": source.uri}
        return artefacts.target(settings, KIND, REVISION, inputs=inputs, identity={})
    (collection,) = upstream
    # weights by content: the same file elsewhere gives the same features, another one under its name does not
    identity = {**chosen.identity(), "weights": weights_identity(chosen), "source": ""}
    return artefacts.target(settings, KIND, REVISION, inputs={"collection": collection.name}, identity=identity)


def run(settings: Settings, *upstream: Artefact) -> dict[str, Any]:
    """Extract, or take over, every part that has no record yet and commit the features. Needs an open Ray session.

    Returns: stage, snapshot, rows, failed, seconds, skipped, decoded (images decoded by this run), width, backbone,
    and images_per_s from the end of the first batch to the end of the last.

    Raises InvalidInput, NotFound, Unavailable: settings, weights, or sources that do not fit.
    """
    started = time.perf_counter()
    warn_of_random(settings.features)
    target = snapshot(settings, *upstream)
    if target.exists():
        return _result(target, started, skipped=True)
    if settings.features.source:
        return {**_take_over(settings, target), **_result(target, started, skipped=False)}
    speed = _Extraction(settings.features, target, upstream[0]).go()
    return {**_result(target, started, skipped=False), **speed}


def _result(target: Artefact, started: float, *, skipped: bool) -> dict[str, Any]:
    manifest = target.manifest()
    if manifest["failed"]:
        found = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest["reasons"].items()))
        say(f"features: {manifest['failed']} of {manifest['rows']} images have no feature: {found}")
    details = {"decoded": 0, "width": manifest["width"], "backbone": manifest["backbone"]}
    return artefacts.result("features", target, started, skipped=skipped, **details)


def _publish(target: Artefact, records: Sequence[dict[str, Any]], fields: dict[str, Any]) -> None:
    files = [record["file"] for record in records]
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record["reasons"])
    counts = {
        "rows": sum(record["rows"] for record in records),
        "failed": sum(record["failed"] for record in records),
        "reasons": dict(reasons),
    }
    content = digest([file["sha256"] for file in files])
    target.publish({"stage": "features", **fields, **counts, "files": files, "content_digest": content})


# Extraction


@dataclass(frozen=True)
class _Pool:
    """How many actors, and what each one gets."""

    workers: int
    cpus: float
    gpu: bool
    threads: int


class _Extraction:
    """One run over the parts that have no record yet."""

    def __init__(self, settings: FeatureSettings, target: Artefact, collection: Artefact) -> None:
        self.settings, self.target, self.source = settings, target, collection
        self.collection = Collection(collection)

    def go(self) -> dict[str, Any]:
        """Run them and commit the whole; returns what is known of the speed."""
        records = self.target.parts()
        missing = [part for part in range(self.collection.parts) if part not in records]
        telemetry.PARTS.inc(len(records), stage="features", outcome="found")
        rows = sum(record["rows"] for record in records.values())
        ends: list[tuple[float, float]] = []
        decoded = 0
        if missing:
            with Progress("features", self.collection.rows, rows) as progress:
                for part, record, span in self._extract(missing):
                    records[part] = record
                    ends += [span] if span else []
                    decoded += record["rows"]
                    telemetry.PARTS.inc(stage="features", outcome="new")
                    progress.step(record["rows"])
        absent = [part for part in missing if part not in records]
        if absent:
            raise HashdistError(
                f"{len(absent)} of {len(missing)} parts came to no end, the first: {absent[0]}; run again"
            )
        _publish(self.target, [records[part] for part in range(self.collection.parts)], self._manifest())
        return {"decoded": decoded, "images_per_s": _speed(ends, decoded, self._plan()["spec"]["batch"])}

    def _extract(self, missing: Sequence[int]) -> Iterator[tuple[int, dict[str, Any], tuple[float, float] | None]]:
        """Part, its record, and when its first and last batch ended; in any order."""
        pool = self._pool(len(missing))
        arguments = {
            "target": self.target,
            "collection": self.source,
            "settings": self.settings,
            "weights": self._weights(),
            "threads": pool.threads,
            "device": "cuda" if pool.gpu else "cpu",
            "decoders": int(min(pool.cpus, _DECODE_THREADS)) if pool.gpu else 0,
            "parts": np.array(missing, np.int64),
        }
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # a block is a run of parts, a batch one part
        parts = ray.data.range(len(missing), override_num_blocks=min(len(missing), _BLOCKS))
        done = parts.map_batches(
            Extractor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=pool.workers),
            fn_constructor_kwargs=arguments,
            num_cpus=pool.cpus,
            num_gpus=1 if pool.gpu else 0,
        )
        for row in done.iter_rows():
            found = json.loads(row["found"])
            if "error" in found:
                raise _error_class(found["error"])(found["message"])
            yield int(row["part"]), found["record"], found["span"]

    def _pool(self, parts: int) -> _Pool:
        gpus, cpus = session.gpus(), session.cpus()
        threads = self.settings.threads or 1
        if gpus:
            workers = min(self.settings.workers or gpus, parts)
            return _Pool(workers, max(1, min((cpus - 1) // gpus, session.cpus_per_gpu())), True, threads)
        # one machine may have been given more logical CPUs than it has; one is left for Ray Data's own tasks
        cores = cpus - 1 if session.nodes() > 1 else min(cpus - 1, os.cpu_count() or 1)
        workers = min(self.settings.workers or max(1, cores // threads), parts)
        return _Pool(workers, max(1, min(threads, session.node_cpus(), (cpus - 1) // workers)), False, threads)

    def _plan(self) -> dict[str, Any]:
        return read_record(self.target.store, PLAN)

    def _weights(self) -> dict[str, Any] | None:
        """The entry of the committed weights; read from where the settings say only before the first part."""
        try:
            found: dict[str, Any] | None = self._plan()["weights_file"]
        except NotFound:
            made = open_network(self.settings)
            if not made.state_dict():
                return None
            name = self.target.new_name(".safetensors")
            return write_file(self.target.store, name, state_bytes(made))
        return found

    def _manifest(self) -> dict[str, Any]:
        plan, source = self._plan(), self.source
        return {
            "inputs": {"collection": {"uri": source.uri, "digest": source.manifest()["content_digest"]}},
            "settings": self.settings.identity(),
            "collection": source.uri,
            "weights_file": plan["weights_file"],
            **plan["spec"],
        }


def _speed(ends: Sequence[tuple[float, float]], images: int, batch: int) -> float | None:
    """Images per second between the end of the first batch and the end of the last."""
    seconds = max((last for _, last in ends), default=0.0) - min((first for first, _ in ends), default=0.0)
    return (images - min(batch, images)) / seconds if seconds > 0 else None


def _error_class(name: str) -> type[HashdistError]:
    """The class of an error that travelled as text: Ray passes on no more than the traceback."""
    found: type[HashdistError] = getattr(errors, name, HashdistError)
    return found


class Extractor:
    """An actor: takes one part at a time from encoded bytes to a committed file of features."""

    def __init__(
        self,
        *,
        target: Artefact,
        collection: Artefact,
        settings: FeatureSettings,
        weights: dict[str, Any] | None,
        threads: int,
        device: str,
        decoders: int,
        parts: NDArray[np.int64],
    ) -> None:
        telemetry.set_sink(metrics.RaySink())
        self._target, self._parts, self._decoders = target, parts, decoders
        self._collection = Collection(collection)
        self._build = partial(build_backbone, threads=threads, device=device)
        self._settings, self._weights = settings, weights

    @cached_property
    def _backbone(self) -> Backbone:
        # not in the constructor, which Ray repeats when it fails
        return agree(self._target, self._settings, self._weights, self._build)

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, list[Any]]:
        """Do the parts at these positions of `parts`; returns as JSON a record and a span, or an error of ours."""
        parts = [int(self._parts[position]) for position in batch["id"]]
        return {"part": parts, "found": [json.dumps(self._answer(part)) for part in parts]}

    def _answer(self, part: int) -> dict[str, Any]:
        try:
            record, span = self.extract(part)
        except HashdistError as error:
            known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
            return {"error": known.__name__, "message": str(error)}
        return {"record": record, "span": span}

    def extract(self, part: int) -> tuple[dict[str, Any], tuple[float, float] | None]:
        """Extract and commit one part; returns the record that stands, and when its first and last batch ended."""
        started = time.perf_counter()
        width, dtype = self._backbone.width, self._backbone.dtype
        rows: list[Image] = []
        reasons: list[str | None] = []
        features: list[NDArray[np.floating]] = []
        ends: list[float] = []
        for batch in self._batches(part):
            rows += batch.rows
            reasons += batch.reasons
            features.append(self._forward(batch))
            ends.append(time.time())
        features_ND = np.concatenate([np.empty((0, width), dtype), *features])
        table = _table(rows, reasons, features_ND)
        record = {**_counts(table), "file": write_table(self._target.store, self._target.new_name(".parquet"), table)}
        record["seconds"] = time.perf_counter() - started
        telemetry.PART_SECONDS.observe(record["seconds"], stage="features")
        return self._target.publish_part(part, record), (ends[0], ends[-1]) if ends else None

    def _batches(self, part: int) -> Iterator["_Batch"]:
        work = partial(prepare_batch, self._backbone)
        runs = _runs(self._collection.read(part), self._backbone.batch)
        return in_order(work, runs, self._decoders) if self._decoders else map(work, runs)

    def _forward(self, batch: "_Batch") -> NDArray[np.floating]:
        """Features [n, D] of a batch; rows without an image are zero."""
        backbone = self._backbone
        features_nD = np.zeros((len(batch.rows), backbone.width), backbone.dtype)
        good = [row for row, reason in enumerate(batch.reasons) if reason is None]
        if good:
            features_nD[good] = backbone.forward(batch.pixels)
        return features_nD


def agree(
    target: Artefact, settings: FeatureSettings, weights: dict[str, Any] | None, build: Callable[..., Backbone]
) -> Backbone:
    """The backbone of this worker, run as the artefact's plan says; the first worker makes the plan.

    Args:
        target: the features being made.
        settings: of the backbone.
        weights: entry of its weights in `target`.
        build: build_backbone but for settings and state.
    """
    state = read_file(target.store, weights) if weights else None
    try:
        plan = read_record(target.store, PLAN)
        backbone: Backbone | None = None
    except NotFound:
        backbone = build(settings, state=state)
        plan, _ = create_record(target.store, PLAN, {"spec": backbone.spec, "weights_file": weights})
    decided = {name: plan["spec"][name] for name in ("precision", "batch")}
    if backbone is None or any(backbone.spec[name] != value for name, value in decided.items()):
        backbone = build(replace(settings, **decided), state=state)
    if any(backbone.spec[name] != plan["spec"][name] for name in _SHARED):
        found_here, begun = ({name: spec[name] for name in _SHARED} for spec in (backbone.spec, plan["spec"]))
        raise InvalidInput(
            f"{target.uri} was begun with {begun}, a worker of this run has {found_here}; go on where it was begun, or "
            "give --fresh TEXT"
        )
    return backbone


@dataclass(frozen=True)
class _Batch:
    """A run of rows, what was wrong with each, and the prepared pixels of the others."""

    rows: list[Image]
    reasons: list[str | None]
    pixels: NDArray[np.uint8]


def _runs(images: Iterable[Image], size: int) -> Iterator[list[Image]]:
    remaining = iter(images)
    while run := list(islice(remaining, size)):
        yield run


def prepare_batch(backbone: Backbone, images: Sequence[Image]) -> _Batch:
    """Decode and resize; an image that cannot be read keeps its place, with the reason."""
    reasons: list[str | None] = []
    pixels = []
    for image in images:
        try:
            if image.data is None:
                raise BadImage(UNREADABLE, image.reason or "not read")
            pixels.append(backbone.prepare(decode(image.data)))
            reasons.append(None)
        except BadImage as error:
            reasons.append(error.reason if image.data is not None else image.reason)
    rows = [image._replace(data=None) for image in images]
    return _Batch(rows, reasons, np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8))


def _table(rows: Sequence[Image], reasons: Sequence[str | None], features_ND: NDArray[np.floating]) -> pa.Table:
    status = [UNREADABLE if reason else OK for reason in reasons]
    said = list(reasons)
    for row in np.flatnonzero(~np.isfinite(features_ND).all(1)):
        status[row] = UNUSABLE
        said[row] = f"not-finite: the feature does not fit into {features_ND.dtype.name}"
    present_N = np.array([s == OK for s in status], np.bool_)
    schema = vector_schema("feature", features_ND.dtype.name, features_ND.shape[1])
    columns = [
        [row.id for row in rows],
        [row.key for row in rows],
        [row.digest for row in rows],
        [row.labels for row in rows],
        status,
        said,
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=False)]
    return pa.table([*arrays, to_vectors(features_ND, present_N)], schema=schema)


def _counts(table: pa.Table) -> dict[str, Any]:
    """Rows, failures and their reasons of a part; counted as metrics too."""
    failed = failures(table)
    telemetry.count_images("features", len(table) - failed.total(), failed)
    return {"rows": len(table), "failed": failed.total(), "reasons": dict(failed)}


# Features that the user brings


@dataclass(frozen=True)
class _TakeOver:
    """Work of one task: a run of rows of the user's features as a part of ours."""

    target: Artefact
    planned: vectors.VectorPlan

    def __call__(self, part: int) -> dict[str, Any]:
        """Write part `part`; returns its record."""
        table = vectors.table(self.planned, part)
        return {
            **_counts(table),
            "file": write_table(self.target.store, self.target.new_name(".parquet"), table, row_group_rows=8192),
        }


def _take_over(settings: Settings, target: Artefact) -> dict[str, Any]:
    planned = vectors.plan(vectors.list_source(settings.features.source))
    parts = range(len(planned.chunks))
    work = _TakeOver(target, planned)
    records = tasks.run_parts(target, parts, work, label="features", at_once=session.cpus())
    fields = {
        "inputs": {"source": {"uri": planned.source.uri, "digest": planned.source.digest}},
        "settings": {"source": planned.source.uri},
        "collection": None,
        "backbone": "none",
        "tap": "",
        "weights": "",
        "weights_digest": "",
        "weights_file": None,
        "preprocess": {},
        "precision": planned.dtype,
        "dtype": planned.dtype,
        "width": planned.width,
        "batch": 0,
        "threads": 0,
        "salts": planned.salts,
    }
    _publish(target, [records[part] for part in parts], fields)
    return {"images_per_s": None}
