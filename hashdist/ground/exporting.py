"""Where the numbers of `telemetry` go: Prometheus over HTTP or a push gateway, and the table of docs/metrics.md."""

import sys
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

from hashdist.ground.errors import InvalidInput
from hashdist.ground.progress import say
from hashdist.ground.settings import MetricsSettings
from hashdist.ground.telemetry import DECLARED, VERB, Metric, NoSink, Sink, set_sink, sink


class PrometheusSink:
    """Observations into a prometheus_client registry, for a driver or a batch job; it holds what was observed only.

    Args:
        port: serve the registry on this port of `host`; 0 = do not serve.
        gateway: address of a push gateway that `close` sends the registry to; empty = none. What other jobs have sent
            there under other names stays.

    Raises InvalidInput for a port that cannot be had.
    """

    def __init__(self, port: int = 0, gateway: str = "", host: str = "127.0.0.1") -> None:
        # a second series beside each, of a metric that is not ours
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = prometheus_client.CollectorRegistry()
        self._gateway = gateway
        self._made: dict[str, Any] = {}
        self._making = threading.Lock()
        try:
            self._server = prometheus_client.start_http_server(port, host, self.registry)[0] if port else None
        except OSError as error:
            raise InvalidInput(
                f"metrics.port must be a free port of {host}, found {port}: {error}; choose another"
            ) from error

    def observe(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Into the registry."""
        with self._making:
            collector = self._made.get(metric.name) or self._made.setdefault(metric.name, self._make(metric))
        child = collector.labels(**labels) if metric.labels else collector
        getattr(child, VERB[metric.kind])(value)

    def _make(self, metric: Metric) -> Any:
        about = metric.name, metric.help, tuple(metric.labels)
        if metric.kind == "counter":
            return prometheus_client.Counter(*about, registry=self.registry)
        if metric.kind == "gauge":
            return prometheus_client.Gauge(*about, registry=self.registry)
        return prometheus_client.Histogram(*about, buckets=metric.buckets, registry=self.registry)

    def close(self) -> None:
        """Push to the gateway if there is one, and stop serving. A gateway that fails is no reason to fail a job."""
        if self._gateway:
            try:
                prometheus_client.pushadd_to_gateway(self._gateway, "hashdist", self.registry, timeout=10)
            except OSError as error:
                say(f"warning: the metrics did not reach the push gateway {self._gateway}: {error}")
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class Exported:
    """While the `with` block runs, observations of this process go to `mine`; closed at its end if it can be."""

    def __init__(self, mine: Sink) -> None:
        self._mine, self._before = mine, sink()

    def __enter__(self) -> Sink:
        set_sink(self._mine)
        return self._mine

    def __exit__(self, *error: object) -> None:
        set_sink(self._before)
        if isinstance(self._mine, PrometheusSink):
            self._mine.close()


def exported(wanted: MetricsSettings, otherwise: Sink | None = None) -> AbstractContextManager[object]:
    """While the block runs, observations go where the settings say, else to `otherwise`.

    Nothing changes for a process that has a sink already: whoever calls first decides.
    """
    if not isinstance(sink(), NoSink):
        return nullcontext()
    if wanted.port or wanted.gateway:
        return Exported(PrometheusSink(wanted.port, wanted.gateway))
    return nullcontext() if otherwise is None else Exported(otherwise)


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


_BEGIN, _END = "<!-- metrics -->", "<!-- end of metrics -->"
GROUPS = {
    "Stages": ("stage",),
    "Training": ("train",),
    "Commits, stores and the cache": ("commits", "commit", "store", "cache"),
    "Index": ("index",),
    "Search": ("search",),
    "Service": ("service",),
}
"""Headings of the table, and the first words of the names below each."""


def table() -> str:
    """All metrics as Markdown."""
    lines = []
    for heading, words in GROUPS.items():
        lines += [f"## {heading}", "", "| metric | Ray exports | type | unit | labels | meaning |", "|---" * 6 + "|"]
        lines += [_row(metric) for name, metric in DECLARED.items() if name.split("_")[1] in words]
        lines.append("")
    return "\n".join(lines).rstrip()


def _row(metric: Metric) -> str:
    labels = "; ".join(
        f"`{name}`: {values if isinstance(values, str) else ', '.join(values)}"
        for name, values in metric.labels.items()
    )
    names = f"`{metric.name}` | `ray_{metric.name}`"
    return f"| {names} | {metric.kind} | {metric.unit} | {labels} | {metric.help} |"


def replaced(text: str) -> str:
    """A document with the present table between its two markers."""
    before, _, rest = text.partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{table()}\n\n{_END}{rest.partition(_END)[2]}"


if __name__ == "__main__":
    for document in map(Path, sys.argv[1:]):
        document.write_text(replaced(document.read_text()))
    if not sys.argv[1:]:
        print(table())  # noqa: T201
