"""Metrics on a Ray cluster: a sink of `ray.util.metrics`, and what the nodes' agents export."""

import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from threading import Lock
from typing import Any

import ray
from ray.util import metrics as ray_metrics

from hashdist.ground import exporting, telemetry


class RaySink:
    """Observations into ray.util.metrics: for code inside Ray processes. Ray prefixes the names with `ray_`."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._making = Lock()

    def observe(self, metric: telemetry.Metric, value: float, labels: dict[str, str]) -> None:
        """Into Ray's metrics agent."""
        with self._making:
            made = self._made.get(metric.name) or self._made.setdefault(metric.name, self._make(metric))
        if metric.kind == "counter" and value <= 0:
            return
        getattr(made, telemetry.VERB[metric.kind])(value, tags=labels)

    @staticmethod
    def _make(metric: telemetry.Metric) -> Any:
        labels = tuple(metric.labels)
        if metric.kind == "counter":
            # Ray adds _total itself
            return ray_metrics.Counter(metric.name.removesuffix("_total"), metric.help, tag_keys=labels)
        if metric.kind == "gauge":
            return ray_metrics.Gauge(metric.name, metric.help, tag_keys=labels)
        return ray_metrics.Histogram(metric.name, metric.help, boundaries=list(metric.buckets), tag_keys=labels)


def exported_metrics(timeout_s: float = 2.0) -> str:
    """This package's metrics from the agents of all nodes, as one Prometheus text.

    For any process of a Ray session. An agent that gives no Prometheus text in time is counted in a comment.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return _merge([_agent(node) for node in alive], timeout_s)


def _agent(node: dict[str, Any]) -> str:
    address = node["NodeManagerAddress"]
    return f"http://{f'[{address}]' if ':' in address else address}:{node['MetricsExportPort']}/metrics"


def _merge(urls: Sequence[str], timeout_s: float) -> str:
    families, silent = exporting.Families("ray_hashdist_"), 0
    fetch = partial(urllib.request.build_opener(urllib.request.ProxyHandler({})).open, timeout=timeout_s)
    with ThreadPoolExecutor(max(1, len(urls))) as pool:
        for answer in [pool.submit(_text, fetch, url) for url in urls]:
            try:
                families.add(answer.result())
            except (OSError, ValueError, HTTPException):
                silent += 1
    return families.text() + f"# {len(urls) - silent} of {len(urls)} metrics agents answered\n"


def _text(fetch: Callable[[str], Any], url: str) -> str:
    with fetch(url) as answer:
        return str(answer.read().decode())
