"""Every metric that hashdist exports, declared once; where the numbers go is injected.

A metric is `hashdist_<stage>_<thing>_<unit>`. Code says `telemetry.IMAGES.inc(status="ok")`; a sink decides what
that means: nothing (the default), `ray.util.metrics` inside Ray processes (hashdist/distributed.py sets it), or
prometheus_client for a driver or a batch job, over HTTP or to a push gateway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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
POSITIVES = Metric("hashdist_train_positive_pairs", "gauge", "Positive pairs of W after the last refresh (i < j).")
CHECKPOINTS = Metric("hashdist_train_checkpoints_total", "counter", "Committed checkpoints.", ("method",))
COMMITS = Metric("hashdist_commits_total", "counter", "Commits by outcome: won, lost, recovered.", ("outcome",))
COMMIT_RETRIES = Metric(
    "hashdist_commit_retries_total", "counter", "Conditional creates that were tried again, by reason.", ("reason",)
)
INDEX_VERSION = Metric("hashdist_index_version", "gauge", "Version last committed or opened.")
INDEX_ROWS = Metric("hashdist_index_rows", "gauge", "Live rows of that version.")
INDEX_SHARDS = Metric("hashdist_index_shards", "gauge", "Shards of that version.")
SEARCH_SECONDS = Metric(
    "hashdist_search_seconds", "histogram", "Time of a search by phase: load, scan, merge.", ("phase",)
)

DECLARED: dict[str, Metric] = {m.name: m for m in list(globals().values()) if isinstance(m, Metric)}
"""All metrics by name."""


class PrometheusSink:
    """Observations into a prometheus_client registry, for a driver or a batch job.

    Args:
        port: serve the registry on this loopback port; 0 = do not serve.
        gateway: address of a push gateway; `push` sends the registry there.
    """

    def __init__(self, port: int = 0, gateway: str = "", host: str = "127.0.0.1") -> None:
        import prometheus_client as prom

        self.registry = prom.CollectorRegistry()
        self._gateway = gateway
        self._collectors = {name: self._declare(prom, metric) for name, metric in DECLARED.items()}
        if port:
            prom.start_http_server(port, addr=host, registry=self.registry)

    def _declare(self, prom, metric: Metric):  # type: ignore[no-untyped-def]
        if metric.kind == "counter":
            return prom.Counter(metric.name, metric.help, metric.labels, registry=self.registry)
        if metric.kind == "gauge":
            return prom.Gauge(metric.name, metric.help, metric.labels, registry=self.registry)
        return prom.Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry)

    def observe(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Into the registry."""
        collector = self._collectors[metric.name]
        child = collector.labels(**labels) if metric.labels else collector
        getattr(child, {"counter": "inc", "gauge": "set", "histogram": "observe"}[metric.kind])(value)

    def push(self, job: str) -> None:
        """Send the registry to the push gateway, if one was given."""
        if self._gateway:
            from prometheus_client import push_to_gateway

            push_to_gateway(self._gateway, job=job, registry=self.registry)
