"""The border to Ray: a session, bounded runs of parts, and the metrics sink. Stages use it; nothing below does."""

import logging
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from threading import Lock
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayTaskError
from ray.util import metrics as ray_metrics

from hashdist.ground import telemetry
from hashdist.ground.progress import Progress, say
from hashdist.ground.settings import ClusterSettings, Settings
from hashdist.store.commit import Artefact

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


_STARTS = 3


@contextmanager
def session(settings: ClusterSettings) -> Iterator[None]:
    """A Ray session: the running cluster's if there is one (or the caller's own), else one started here and stopped.

    A cluster started here has at least 4 logical CPUs (Ray Data and Ray Train need room for their own actors),
    a bounded object store, a short folder of its own, and listens on the loopback only.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = settings.address
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        with tempfile.TemporaryDirectory(prefix="hd", dir="/tmp", ignore_cleanup_errors=True) as folder:
            # all processes of this Ray inherit it; a runtime_env would forbid the workers that Ray starts ahead
            with _environment({**_worker_environment(), ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}), _loopback():
                _start(settings, folder)
            try:
                yield
            finally:
                ray.shutdown()
        return
    # a job that was submitted with variables of its own has them here too, and Ray refuses to be told a name twice
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    ray.init(address=address, logging_level=logging.WARNING, runtime_env={"env_vars": _worker_environment()})
    try:
        yield
    finally:
        ray.shutdown()


def _start(settings: ClusterSettings, folder: str) -> None:
    """Start a Ray on this machine. Ray gives a node 30 s to come up, which a busy machine may need more than once."""
    for left in reversed(range(_STARTS)):
        try:
            ray.init(
                address="local",
                num_cpus=settings.cpus or max(4, os.cpu_count() or 4),
                object_store_memory=settings.object_store_mb << 20,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                logging_level=logging.WARNING,
                log_to_driver=False,
                _temp_dir=folder,
            )
            return
        except Exception as error:  # Ray has no class of its own for it
            if "timed out during startup" not in str(error) or not left:
                raise
            say("Ray did not start in time on this busy machine; starting it again")
            ray.shutdown()


@contextmanager
def observed_session(settings: Settings) -> Iterator[None]:
    """A session in which observations of this process go where the settings say, else into Ray."""
    with session(settings.cluster), telemetry.exported(settings.metrics, RaySink()):
        yield


@contextmanager
def _loopback() -> Iterator[None]:
    """Let Ray's servers listen on the loopback only.

    Ray replaces a loopback address by the machine's own, and then listens on every interface, unless it is told, as it
    is on desktop systems, that it makes no clusters. The variable says it to the processes that it starts.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables in this process's environment, for as long as the block takes."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _worker_environment() -> dict[str, str]:
    """What workers need wherever they run: the store's settings, and this package where it runs from a checkout."""
    passed = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "HASHDIST_"))}
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").exists():
        passed["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    return passed


def cpus() -> int:
    """CPUs of the session."""
    return int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]


def gpus() -> int:
    """GPUs of the session."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def nodes() -> int:
    """Machines of the session."""
    return len(_machines())


def node_cpus() -> int:
    """CPUs of the largest machine: what asks for more of them together waits for ever."""
    return int(max((machine.get("CPU", 0) for machine in _machines()), default=1))


def cpus_per_gpu() -> int:
    """CPUs that every GPU of the session has beside it on its machine."""
    return int(min(machine.get("CPU", 0) // machine["GPU"] for machine in _machines() if machine.get("GPU")))


def _machines() -> list[dict[str, float]]:
    """What each machine of the session has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def run_parts(
    artefact: Artefact,
    parts: Sequence[int],
    work: Callable[[int], dict[str, Any]],
    *,
    label: str,
    at_once: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> dict[int, dict[str, Any]]:
    """Run `work(part)` as Ray tasks for every part without a record, at most `at_once` together.

    `work` writes the part's data under names of its own and returns the record's body; the task publishes it
    create-only, so a retried or duplicated task is harmless: the first record wins. Returns the records of all
    parts, old and new. An error of `work` ends the run; finished parts stay committed. What `label` says before a
    colon is the stage, for the metrics.
    """
    done = {p: r for p, r in artefact.parts().items() if p in set(parts)}
    missing = [part for part in parts if part not in done]
    stage = label.partition(":")[0]
    telemetry.PARTS.inc(len(done), stage=stage, outcome="found")
    task = partial(_run_part, artefact, work, stage)
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    for number, record in run_tasks(task, missing, label=label, at_once=at_once, found=len(done), **options):
        done[missing[number]] = record
        telemetry.PARTS.inc(stage=stage, outcome="new")
    return done


def _run_part(artefact: Artefact, work: Callable[[int], dict[str, Any]], stage: str, part: int) -> dict[str, Any]:
    started = time.perf_counter()
    record = work(part)
    seconds = time.perf_counter() - started
    telemetry.PART_SECONDS.observe(seconds, stage=stage)
    return artefact.publish_part(part, {**record, "seconds": seconds})


def run_tasks(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    label: str,
    at_once: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
    found: int = 0,
) -> Iterator[tuple[int, Any]]:
    """Run `work(item)` as Ray tasks, at most `at_once` together; yields (number of the item, result) as they end.

    For work that leaves nothing behind or writes under names of its own: a task whose worker dies is run again. An
    error of `work` is raised as it is, after the tasks beside it were cancelled. `found` items were done before.
    """
    task = ray.remote(_run_task).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=4)
    shared = ray.put(work)
    running: dict[Any, int] = {}
    queue = iter(enumerate(items))
    try:
        with Progress(label, found + len(items), found) as progress:
            while True:
                while len(running) < at_once and (entry := next(queue, None)) is not None:
                    running[task.remote(shared, entry[1])] = entry[0]
                if not running:
                    return
                ready, _ = ray.wait(list(running), num_returns=1)
                for reference in ready:
                    number = running.pop(reference)
                    yield number, _result(reference)
                    progress.step()
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None


def _run_task(work: Callable[[Any], Any], item: Any) -> Any:
    telemetry.set_sink(RaySink())
    return work(item)


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
    """What all nodes' metrics agents hold of this package, as one Prometheus text.

    For any process of a Ray session. An agent that gives no Prometheus text in time is counted in a comment.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return _merged([_agent(node) for node in alive], timeout_s)


def _agent(node: dict[str, Any]) -> str:
    address = node["NodeManagerAddress"]
    return f"http://{f'[{address}]' if ':' in address else address}:{node['MetricsExportPort']}/metrics"


def _merged(urls: Sequence[str], timeout_s: float) -> str:
    families, silent = telemetry.Families("ray_hashdist_"), 0
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
