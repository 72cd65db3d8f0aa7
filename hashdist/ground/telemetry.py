"""Every metric that hashdist exports, declared once; where the numbers go is injected.

A metric is `hashdist_<stage>_<thing>_<unit>`. Code says `telemetry.GATES.inc(outcome="passed")`; a sink decides what
that means: nothing (the default), `ray.util.metrics` inside Ray processes (hashdist/stages/cluster/session.py sets it),
or prometheus_client for a driver or a batch job, over HTTP or to a push gateway.

`python -m hashdist.ground.telemetry` prints all of them as a table; with a file, it replaces the table in there.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

VERB = {"counter": "inc", "gauge": "set", "histogram": "observe"}
"""What an observation is called, by kind of metric."""

UNITS = ("bytes", "files", "images", "pairs", "parts", "queries", "requests", "rows", "seconds", "shards")
"""What a name may end in, before the `_total` of a counter; whatever ends in something else is a plain number."""

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


@dataclass(frozen=True)
class Metric:
    """A declared metric.

    Attributes:
        name: as an observation calls it; Ray exports it as `ray_<name>`.
        kind: what an observation does.
        help: one sentence.
        labels: the labels that every observation must give, with all their values, or words for what they are of.
        buckets: upper bounds, of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...] | str] = field(default_factory=dict)
    buckets: Sequence[float] = SECONDS

    @property
    def unit(self) -> str:
        """By the name: `seconds`, `bytes`, `images/second`, ..., or 1."""
        words = self.name.removesuffix("_total").split("_")
        if words[-2:-1] == ["per"]:
            return f"{words[-3]}/{words[-1]}"
        return words[-1] if words[-1] in UNITS else "1"

    def inc(self, amount: float = 1.0, **labels: str) -> None:
        """Add `amount` to a counter."""
        _sink.observe(self, amount, labels)

    def set(self, value: float, **labels: str) -> None:
        """Set a gauge."""
        _sink.observe(self, value, labels)

    def observe(self, value: float, **labels: str) -> None:
        """Count one observation of a histogram."""
        _sink.observe(self, value, labels)


class Sink(Protocol):
    """Where observations go."""

    def observe(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Add to a counter, set a gauge, or count a histogram observation."""


class NoSink:
    """Drops everything: the default of a library."""

    def observe(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Drop it."""


_sink: Sink = NoSink()


def set_sink(sink: Sink) -> None:
    """Send all observations of this process to `sink` from now on."""
    global _sink
    _sink = sink


def sink() -> Sink:
    """The sink of this process."""
    return _sink


STAGE = "a stage of the pipeline, or reindex, compact, vacuum, verify, purge"

STAGE_SECONDS = Metric(
    "hashdist_stage_seconds", "histogram", "Wall time of a run of a stage that ended well.", {"stage": STAGE}
)
STAGE_ENDED = Metric(
    "hashdist_stage_ended_timestamp_seconds", "gauge", "When a run last ended well, as Unix time.", {"stage": STAGE}
)
STAGE_ERRORS = Metric(
    "hashdist_stage_errors_total", "counter", "Runs that ended with an error.", {"stage": STAGE, "error": "its class"}
)
STAGE_ROWS = Metric("hashdist_stage_rows", "gauge", "Rows of the last result of a stage.", {"stage": STAGE})
STAGE_FAILED = Metric("hashdist_stage_failed_rows", "gauge", "Failed rows among them.", {"stage": STAGE})
IMAGES = Metric(
    "hashdist_stage_images_total",
    "counter",
    "Images that a stage has worked on.",
    {"stage": ("collection", "features", "encode", "reindex"), "status": ("ok", "failed")},
)
FAILURES = Metric(
    "hashdist_stage_failures_total",
    "counter",
    "Images that failed, by reason.",
    {"stage": ("collection", "features", "encode", "reindex"), "reason": "the word before the colon in a row's reason"},
)
PARTS = Metric(
    "hashdist_stage_parts_total",
    "counter",
    "Parts of a stage: made, or found committed by a run before.",
    {"stage": ("collection", "features", "graph", "encode"), "outcome": ("new", "found")},
)
PART_SECONDS = Metric(
    "hashdist_stage_part_seconds",
    "histogram",
    "Time of one part of a stage, in the worker.",
    {"stage": ("collection", "features", "graph", "encode")},
)

METHOD = "a method's name"

TRAIN_LOSS = Metric(
    "hashdist_train_loss", "gauge", "Loss of the last epoch.", {"method": METHOD, "term": "loss, or a term of it"}
)
TRAIN_EPOCH = Metric("hashdist_train_epoch", "gauge", "Epochs finished, of this round.", {"method": METHOD})
TRAIN_STEPS = Metric("hashdist_train_steps_total", "counter", "Steps of the optimizer.", {"method": METHOD})
TRAIN_IMAGES_PER_S = Metric(
    "hashdist_train_images_per_second", "gauge", "Throughput of training over the last epoch.", {"method": METHOD}
)
CHECKPOINTS = Metric("hashdist_train_checkpoints_total", "counter", "Committed checkpoints.", {"method": METHOD})
REFRESH_SECONDS = Metric("hashdist_train_refresh_seconds", "histogram", "Time of one global similarity refresh (DSAH).")
THRESHOLD = Metric("hashdist_train_threshold", "gauge", "Threshold m of the last similarity refresh (DSAH).")
POSITIVES = Metric("hashdist_train_positive_pairs", "gauge", "Positive pairs i < j after the last refresh (DSAH).")
AGREEMENT = Metric("hashdist_train_agreement", "gauge", "F of W against the labels in the last round (DSAH), if any.")

COMMITS = Metric(
    "hashdist_commits_total",
    "counter",
    "Creates of a record: won; lost to another writer (a conflict); won, though the answer was lost.",
    {"outcome": ("won", "lost", "recovered")},
)
COMMIT_RETRIES = Metric(
    "hashdist_commit_retries_total",
    "counter",
    "Creates of a record that a store did not carry out, or did not answer.",
    {"reason": ("exists", "contended", "unknown", "unavailable")},
)
STORE_REQUESTS = Metric(
    "hashdist_store_requests_total",
    "counter",
    "Requests to stores, repeats included.",
    {"operation": ("get", "put", "create", "list", "head", "delete")},
)
STORE_BYTES = Metric(
    "hashdist_store_bytes_total", "counter", "Bytes from and to stores.", {"direction": ("read", "written")}
)
CACHE_FILES = Metric(
    "hashdist_cache_files_total",
    "counter",
    "Files of a remote store: found on this machine's disk, fetched, deleted there to make room.",
    {"outcome": ("hit", "miss", "evicted")},
)
CACHE_BYTES = Metric(
    "hashdist_cache_bytes_total", "counter", "Bytes of those files.", {"outcome": ("hit", "miss", "evicted")}
)

INDEX_VERSION = Metric("hashdist_index_version", "gauge", "Newest version that this process has opened or committed.")
INDEX_COMMITTED = Metric(
    "hashdist_index_committed_timestamp_seconds", "gauge", "When that version was committed, as Unix time."
)
INDEX_ROWS = Metric("hashdist_index_rows", "gauge", "Live rows of that version.")
INDEX_DEAD_ROWS = Metric("hashdist_index_dead_rows", "gauge", "Rows of that version that are deleted or replaced.")
INDEX_BYTES = Metric("hashdist_index_bytes", "gauge", "Bytes of the files that that version names.")
INDEX_SHARDS = Metric("hashdist_index_shards", "gauge", "Shards of that version.")
INDEX_SMALL_SHARDS = Metric(
    "hashdist_index_small_shards", "gauge", "Shards that a compaction would merge, after the last change."
)
DRIFT = Metric(
    "hashdist_index_drift",
    "gauge",
    "Drift of the last increment (docs/promotion.md).",
    {"number": ("score", "shift", "entropy", "correlation", "nearest", "lean", "far")},
)
RETRAIN = Metric("hashdist_index_retrain_recommended_total", "counter", "Increments whose drift asks for a new model.")
GATES = Metric("hashdist_index_gates_total", "counter", "Gates before a commit.", {"outcome": ("passed", "refused")})
COMPACTIONS = Metric("hashdist_index_compactions_total", "counter", "Compactions committed.")
VERSIONS_KEPT = Metric("hashdist_index_versions_kept", "gauge", "Versions that can be opened, after the last vacuum.")
FAULTS = Metric("hashdist_index_faults", "gauge", "Faults that the last verification found.")
GARBAGE = "why nothing needs them"
VACUUMED_FILES = Metric(
    "hashdist_index_vacuumed_files_total", "counter", "Files deleted by vacuums.", {"reason": GARBAGE}
)
VACUUMED_BYTES = Metric("hashdist_index_vacuumed_bytes_total", "counter", "Their bytes.", {"reason": GARBAGE})
PURGED = Metric("hashdist_index_purged_rows_total", "counter", "Rows erased from all versions of indexes.")

SEARCH_SECONDS = Metric(
    "hashdist_search_seconds",
    "histogram",
    "Time of a phase of a search in an index: bringing what it reads to this machine, scanning it.",
    {"phase": ("load", "scan")},
)

ROUTE = "a route of the service, or other"

REQUESTS = Metric(
    "hashdist_service_requests_total", "counter", "Requests answered.", {"route": ROUTE, "status": "the HTTP status"}
)
REQUEST_SECONDS = Metric(
    "hashdist_service_request_seconds", "histogram", "Time of a request in a replica.", {"route": ROUTE}
)
QUERY_SECONDS = Metric(
    "hashdist_service_query_seconds",
    "histogram",
    "Time of a phase of a search request.",
    {"phase": ("encode", "search", "keys")},
)
SERVICE_BATCH = Metric(
    "hashdist_service_batch_queries",
    "histogram",
    "Queries answered by one scan.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
SERVED_VERSION = Metric("hashdist_service_version", "gauge", "Version that a replica serves.")
SERVED_AGE = Metric("hashdist_service_index_age_seconds", "gauge", "Time since that version was committed.")
SWAPS = Metric(
    "hashdist_service_swaps_total", "counter", "Versions swapped in, by what changed.", {"what": ("rows", "model")}
)
REFUSED_VERSION = Metric(
    "hashdist_service_refused_version",
    "gauge",
    "Newest version that a replica cannot open and does not serve; 0 = none.",
)
STORE_AWAY = Metric(
    "hashdist_service_store_away_seconds", "gauge", "How long the store has not answered a replica; 0 = it does."
)

DECLARED: dict[str, Metric] = {m.name: m for m in list(globals().values()) if isinstance(m, Metric)}
"""All metrics by name."""


class Traffic(NamedTuple):
    """Requests and bytes that this process has exchanged with stores; differences of two are of the time between.

    Attributes:
        requests: by operation: get, put, create, list (a page, or a folder), head, delete.
        read: bytes.
        written: bytes.
    """

    requests: Counter[str]
    read: int
    written: int

    def since(self, before: "Traffic") -> "Traffic":
        """What came after `before`."""
        return Traffic(self.requests - before.requests, self.read - before.read, self.written - before.written)

    def plus(self, other: "Traffic") -> "Traffic":
        """Both together."""
        return Traffic(self.requests + other.requests, self.read + other.read, self.written + other.written)


NO_TRAFFIC = Traffic(Counter(), 0, 0)

_requests: Counter[str] = Counter()
_moved: Counter[str] = Counter()
_counting = threading.Lock()


def traffic() -> Traffic:
    """The traffic of this process up to now."""
    with _counting:
        return Traffic(Counter(_requests), _moved["read"], _moved["written"])


def count_request(operation: str) -> None:
    """Count a request to a store. Every store calls this, and nothing else does."""
    with _counting:
        _requests[operation] += 1
    STORE_REQUESTS.inc(operation=operation)


def count_bytes(direction: Literal["read", "written"], count: int) -> None:
    """Count bytes that a store has given or taken."""
    with _counting:
        _moved[direction] += count
    STORE_BYTES.inc(count, direction=direction)


@contextmanager
def run_of(stage: str) -> Iterator[None]:
    """The block is a run of a stage: how long it took if it ends well, else what it ended with."""
    started = time.perf_counter()
    try:
        yield
    except Exception as error:
        STAGE_ERRORS.inc(stage=stage, error=type(error).__name__)
        raise
    STAGE_SECONDS.observe(time.perf_counter() - started, stage=stage)
    STAGE_ENDED.set(time.time(), stage=stage)


def count_images(stage: str, ok: int, failed: Mapping[str, int]) -> None:
    """Count images that a stage has worked on: those without a fault, and the others by reason."""
    IMAGES.inc(ok, stage=stage, status="ok")
    IMAGES.inc(sum(failed.values()), stage=stage, status="failed")
    for reason, count in failed.items():
        FAILURES.inc(count, stage=stage, reason=reason)
