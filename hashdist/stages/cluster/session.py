"""A session of Ray: joined or started, and the CPUs, GPUs and machines that it has."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from hashdist.ground import exporting
from hashdist.ground.progress import say
from hashdist.ground.settings import ClusterSettings, Settings
from hashdist.stages.cluster import internals, quiet
from hashdist.stages.cluster.metrics import RaySink
from hashdist.store import STORES

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
    quiet.keep_reports()
    address = settings.address
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        with tempfile.TemporaryDirectory(prefix="hd", dir="/tmp", ignore_cleanup_errors=True) as folder:
            # all processes of this Ray inherit it; a runtime_env would forbid the workers that Ray starts ahead
            with _environment({**_worker_environment(), internals.LOOPBACK_VARIABLE: "0"}), internals.loopback():
                _start(settings, folder)
            quiet.keep_core_log()
            try:
                yield
            finally:
                ray.shutdown()
        return
    # a job that was submitted with variables of its own has them here too, and Ray refuses to be told a name twice
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    ray.init(
        address=address,
        logging_level=logging.WARNING,
        log_to_driver=quiet.is_asked_for(),
        runtime_env={"env_vars": _worker_environment()},
    )
    quiet.keep_core_log()
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
                logging_level=logging.WARNING,
                log_to_driver=quiet.is_asked_for(),
                **internals.on_loopback(folder),
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
    with session(settings.cluster), exporting.exported(settings.metrics, RaySink()):
        yield


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
    """Variables that workers need wherever they run: the stores', and this package where it runs from a checkout."""
    beginnings = ("HASHDIST_", *(beginning for store in STORES.values() for beginning in store.environment))
    passed = {name: value for name, value in os.environ.items() if name.startswith(beginnings)}
    checkout = Path(__file__).resolve().parents[3]
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
    """Resources of each machine of the session."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
