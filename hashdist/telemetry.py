"""Every metric that hashdist exports, declared once; where the numbers go is injected.

A metric is `hashdist_<stage>_<thing>_<unit>`. Code says `telemetry.IMAGES.inc(status="ok")`; a sink decides what
that means: nothing (the default), `ray.util.metrics` inside Ray processes (hashdist/distributed.py sets it), or
prometheus_client for a driver or a batch job, over HTTP or to a push gateway.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

VERB = {"counter": "inc", "gauge": "set", "histogram": "observe"}
"""What an observation is called, by kind of metric."""

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


@dataclass(frozen=True)
class Metric:
    """A declared metric. `labels` are the names every observation must give."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: Sequence[float] = SECONDS

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


IMAGES = Metric("hashdist_features_images_total", "counter", "Images by outcome of feature extraction.", ("status",))
STAGE_SECONDS = Metric("hashdist_stage_seconds", "histogram", "Wall time of one stage run.", ("stage",))
STAGE_ROWS = Metric("hashdist_stage_rows", "gauge", "Rows in the last snapshot of a stage.", ("stage",))
STAGE_FAILED = Metric("hashdist_stage_failed_rows", "gauge", "Failed rows in the last snapshot of a stage.", ("stage",))
PARTS = Metric(
    "hashdist_stage_parts_total", "counter", "Parts finished, by stage and whether they were new.", ("stage", "outcome")
)
GRAPH_SECONDS = Metric("hashdist_graph_block_seconds", "histogram", "Time of one block of the kNN graph.")
TRAIN_LOSS = Metric("hashdist_train_loss", "gauge", "Loss of the last logged step.", ("method", "term"))
TRAIN_EPOCH = Metric("hashdist_train_epoch", "gauge", "Epochs finished.", ("method",))
TRAIN_STEPS = Metric("hashdist_train_steps_total", "counter", "Optimiser steps.", ("method",))
TRAIN_IMAGES_PER_S = Metric(
    "hashdist_train_images_per_second", "gauge", "Training throughput over the last epoch.", ("method",)
)
REFRESH_SECONDS = Metric("hashdist_train_refresh_seconds", "histogram", "Time of one global similarity refresh.")
THRESHOLD = Metric("hashdist_train_threshold", "gauge", "Threshold m of the last similarity refresh.")
AGREEMENT = Metric("hashdist_train_agreement", "gauge", "F of W against labels in the last round, where there are any.")
POSITIVES = Metric("hashdist_train_positive_pairs", "gauge", "Positive pairs of W after the last refresh (i < j).")
CHECKPOINTS = Metric("hashdist_train_checkpoints_total", "counter", "Committed checkpoints.", ("method",))
COMMITS = Metric("hashdist_commits_total", "counter", "Commits by outcome: won, lost, recovered.", ("outcome",))
COMMIT_RETRIES = Metric(
    "hashdist_commit_retries_total", "counter", "Conditional creates that were tried again, by reason.", ("reason",)
)
INDEX_VERSION = Metric("hashdist_index_version", "gauge", "Version last committed or opened.")
INDEX_ROWS = Metric("hashdist_index_rows", "gauge", "Live rows of that version.")
INDEX_SHARDS = Metric("hashdist_index_shards", "gauge", "Shards of that version.")
DRIFT = Metric("hashdist_index_drift", "gauge", "Drift of the last increment, by number (index/drift.py).", ("number",))
RETRAIN = Metric("hashdist_index_retrain_recommended_total", "counter", "Increments whose drift asks for a new model.")
GATES = Metric("hashdist_index_gates_total", "counter", "Gates by outcome: passed, refused.", ("outcome",))
INDEX_DEAD_ROWS = Metric("hashdist_index_dead_rows", "gauge", "Rows of that version that are deleted or replaced.")
INDEX_SMALL_SHARDS = Metric("hashdist_index_small_shards", "gauge", "Small shards of that version.")
COMPACTIONS = Metric("hashdist_index_compactions_total", "counter", "Compactions committed.")
VACUUMED_FILES = Metric("hashdist_vacuumed_files_total", "counter", "Files deleted by vacuums.", ("reason",))
VACUUMED_BYTES = Metric("hashdist_vacuumed_bytes_total", "counter", "Their bytes.", ("reason",))
VERSIONS_KEPT = Metric("hashdist_index_versions_kept", "gauge", "Versions that can be opened, after the last vacuum.")
FAULTS = Metric("hashdist_index_faults", "gauge", "Faults that the last verification found.")
PURGED = Metric("hashdist_purged_rows_total", "counter", "Rows erased from all versions of indexes.")
STORE_REQUESTS = Metric(
    "hashdist_store_requests_total", "counter", "Requests to stores, by operation, repeats included.", ("operation",)
)
STORE_BYTES = Metric("hashdist_store_bytes_total", "counter", "Bytes read from and written to stores.", ("direction",))
SEARCH_SECONDS = Metric(
    "hashdist_search_seconds", "histogram", "Time of a search by phase: load, scan, merge.", ("phase",)
)
REQUESTS = Metric(
    "hashdist_service_requests_total", "counter", "Requests answered, by route and status.", ("route", "status")
)
REQUEST_SECONDS = Metric(
    "hashdist_service_request_seconds", "histogram", "Time of a request in a replica, by route.", ("route",)
)
QUERY_SECONDS = Metric(
    "hashdist_service_query_seconds",
    "histogram",
    "Time of a search request by phase: wait, encode, search, keys.",
    ("phase",),
)
SERVICE_BATCH = Metric(
    "hashdist_service_batch_queries",
    "histogram",
    "Queries answered by one scan.",
    (),
    (1, 2, 4, 8, 16, 32, 64, 128, 256),
)
SERVED_VERSION = Metric("hashdist_service_version", "gauge", "Version that a replica serves.")
SERVED_AGE = Metric("hashdist_service_index_age_seconds", "gauge", "Time since that version was committed.")
SWAPS = Metric(
    "hashdist_service_swaps_total", "counter", "Versions swapped in, by what changed: rows, model.", ("what",)
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


class PrometheusSink:
    """Observations into a prometheus_client registry, for a driver or a batch job.

    Args:
        port: serve the registry on this port of `host`; 0 = do not serve.
        gateway: address of a push gateway that `close` sends the registry to; empty = none.
    """

    def __init__(self, port: int = 0, gateway: str = "", host: str = "127.0.0.1") -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._gateway = gateway
        self._collectors = {name: self._declare(metric) for name, metric in DECLARED.items()}
        self._server = prometheus_client.start_http_server(port, host, self.registry)[0] if port else None

    def _declare(self, metric: Metric) -> Any:
        if metric.kind == "counter":
            return prometheus_client.Counter(metric.name, metric.help, metric.labels, registry=self.registry)
        if metric.kind == "gauge":
            return prometheus_client.Gauge(metric.name, metric.help, metric.labels, registry=self.registry)
        return prometheus_client.Histogram(
            metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry
        )

    def observe(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Into the registry."""
        collector = self._collectors[metric.name]
        child = collector.labels(**labels) if metric.labels else collector
        getattr(child, VERB[metric.kind])(value)

    def close(self) -> None:
        """Push to the gateway if there is one, and stop serving."""
        if self._gateway:
            prometheus_client.push_to_gateway(self._gateway, job="hashdist", registry=self.registry)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class Exported:
    """While the `with` block runs, observations of this process go to `sink`; closed at its end if it can be."""

    def __init__(self, sink: Sink) -> None:
        self._mine, self._before = sink, _sink

    def __enter__(self) -> Sink:
        set_sink(self._mine)
        return self._mine

    def __exit__(self, *error: object) -> None:
        set_sink(self._before)
        if isinstance(self._mine, PrometheusSink):
            self._mine.close()


class Families:
    """Prometheus texts read as one: of every family that starts with `prefix`, all series under one HELP and TYPE."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._found = prefix, dict[str, prometheus_client.Metric]()

    def add(self, text: str) -> None:
        """Read one text. Raises ValueError for what is no Prometheus text; then nothing of it is kept."""
        heads = self._prefix, f"# HELP {self._prefix}", f"# TYPE {self._prefix}"
        ours = "\n".join(line for line in text.split("\n") if line.startswith(heads))
        for family in list(text_string_to_metric_families(ours)):
            standing = self._found.setdefault(family.name, family)
            if standing is not family:
                standing.samples += family.samples

    def collect(self) -> Iterable[prometheus_client.Metric]:
        """The families, in the order of their names."""
        return (self._found[name] for name in sorted(self._found))

    def text(self) -> str:
        """All of them as one Prometheus text."""
        return prometheus_client.generate_latest(self).decode()
