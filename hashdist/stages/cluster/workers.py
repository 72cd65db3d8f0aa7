"""A function on the workers of Ray Train v2: process group, progress, bounded retries, errors as they were raised.

It knows nothing of hashing. What Ray Train would do about checkpoints is left out on purpose: runs are logs of
checkpoints in hashdist's own commit protocol (docs/decisions.md, S9).
"""

import fcntl
import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback, WorkerGroupError
from ray.train.backend import Backend, BackendConfig

from hashdist.ground.errors import HashdistError, InvalidInput, OutcomeUnknown, Unavailable
from hashdist.stages.cluster import internals
from hashdist.store import Store

COLLECTIVE_TIMEOUT_S = 1800
"""How long a rank waits for the others, in torch's collectives and in Ray Train's, before it gives up."""

_ENVIRONMENT = {
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(COLLECTIVE_TIMEOUT_S),
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # a report is consumed once per poll and blocks the next until then
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
_FOLLOW_EVERY_S = 0.3
_LEAVE_S = 5.0
_SIOCGIFADDR = 0x8915  # of Linux, netdevice(7)
_TRANSIENT = (Unavailable, OutcomeUnknown)


@dataclass(frozen=True)
class Workers:
    """How many workers, and what each has: one logical CPU, however many threads it takes, and perhaps a GPU.

    Args:
        count: world size.
        gpu: one GPU per worker.
        max_failures: restarts of the worker group before the run fails.
    """

    count: int
    gpu: bool
    max_failures: int

    def check(self) -> None:
        """InvalidInput if the cluster, grown as far as its autoscaler may grow it, cannot hold the workers."""
        present: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        reachable = internals.autoscaler_limits()  # without them no autoscaling cluster could start from nothing
        for resource, each in self.claim().items():
            there = max(present.get(resource, 0), reachable.get(resource, 0))
            if each * self.count > there:
                raise InvalidInput(
                    f"{self.count} training workers need {each * self.count:g} {resource} in the cluster, found "
                    f"{there:g}; lower --train.workers, or add nodes"
                )

    def claim(self) -> dict[str, float]:
        """Ray resources of one worker."""
        return {"CPU": 1, "GPU": 1} if self.gpu else {"CPU": 1}


def fit(
    loop: Callable[[], Any],
    workers: Workers,
    *,
    store: Store,
    name: str,
    say: Callable[[str, dict[str, Any]], None],
) -> Any:
    """Run `loop()` on every worker and return what rank 0 returned.

    Args:
        loop: an importable function, or a partial of one; it may call ray.train.report(metrics), equally often on
            every rank.
        workers: how many, and what they have.
        store: where Ray Train keeps its own files, under `name`; every node must reach it.
        name: of this attempt; never used twice.
        say: called in the driver as say("report", metrics of rank 0) or say("failure", {"rank", "error"}).

    Raises:
        HashdistError: the first that a worker raised, as it was raised; only Unavailable and OutcomeUnknown are
            worth restarting the workers for.
        ray.train.TrainingFailedError: anything else, after `max_failures` restarts.
    """
    from ray.train.torch import TorchConfig, TorchTrainer  # imports torch and more: seconds, so only where needed

    # ray's annotations are those of Train v1
    make_trainer: Any = TorchTrainer
    make_failures: Any = FailureConfig

    for variable, value in _environment().items():
        os.environ.setdefault(variable, value)
    group = TorchConfig(backend="nccl", timeout_s=COLLECTIVE_TIMEOUT_S) if workers.gpu else GlooConfig()
    with TemporaryDirectory(prefix="hashdist-") as folder, _followed(Path(folder) / "events", say) as events:
        trainer = make_trainer(
            loop,
            torch_config=group,
            scaling_config=ScalingConfig(
                num_workers=workers.count, use_gpu=workers.gpu, resources_per_worker=workers.claim()
            ),
            run_config=RunConfig(
                name=name,
                **_storage(store),
                failure_config=make_failures(
                    max_failures=workers.max_failures, controller_failure_limit=workers.max_failures
                ),
                callbacks=cast(Any, [_Watch(str(events))]),
            ),
        )
        try:
            with _interrupted_by_us():
                return trainer.fit().return_value
        except TrainingFailedError as error:
            raise _cause(error) or error from error


@contextmanager
def _interrupted_by_us() -> Iterator[None]:
    """SIGINT ends a run as it ends anything else, and means after it what it meant before.

    Ray Train takes the signal over, for good; on the first it ends the run's workers, and then exits the process.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _environment() -> dict[str, str]:
    alone = sum(node["Alive"] for node in ray.nodes()) == 1  # type: ignore[no-untyped-call]
    # a machine that runs everything by itself is not taken away from under its workers
    return {**_ENVIRONMENT, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} if alone else _ENVIRONMENT


@dataclass
class GlooConfig(BackendConfig):
    """Process group over gloo. Ray's own config would import torch in its controller, seconds before workers start."""

    backend: str = "gloo"

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that sets the group up."""
        return _Gloo


class _Gloo(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002
        address = worker_group.execute_single(0, _free_address)
        size = len(worker_group)
        ray.get([worker_group.execute_single_async(rank, _join, address, rank, size) for rank in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002
        # where a rank is gone, another may wait for it for ever; both are killed next
        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=_LEAVE_S)


def _free_address() -> str:
    host, port = internals.free_address()
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _join(address: str, rank: int, size: int) -> None:
    import torch

    # left alone, gloo listens where the host's name resolves to, which on many machines is a loopback
    interface = _interface(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    torch.distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    )


def _interface(address: str) -> str | None:
    """Name of the network interface with this IPv4 address, None where there is none or the system does not tell."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _storage(store: Store) -> dict[str, Any]:
    filesystem, base = store.filesystem()
    return {"storage_path": base, "storage_filesystem": filesystem}


class _Watch(UserCallback):
    """Writes events to a file, since Ray places the controller, where it runs, on the driver's node.

    It also ends the run on an error that a restart cannot mend: raising here is final for Ray Train.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        self._write("report", metrics[0])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        for rank, error in worker_exceptions.items():
            self._write("failure", {"rank": rank, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
        for error in worker_exceptions.values():
            if isinstance(error, HashdistError) and not isinstance(error, _TRANSIENT):
                raise error

    def _write(self, kind: str, body: dict[str, Any]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps([kind, body]) + "\n")


@contextmanager
def _followed(path: Path, say: Callable[[str, dict[str, Any]], None]) -> Iterator[Path]:
    """Hand every line that appears in the file at `path` to `say`, from a thread, until the block ends."""
    path.touch()
    ended = threading.Event()

    def follow() -> None:
        with path.open() as file:
            rest = ""
            while True:
                last = ended.wait(_FOLLOW_EVERY_S)
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    say(*json.loads(line))
                if last:
                    return

    thread = threading.Thread(target=follow, name="training-progress", daemon=True)
    thread.start()
    try:
        yield path
    finally:
        ended.set()
        thread.join()


def _cause(error: TrainingFailedError) -> HashdistError | None:
    """The error of ours inside what Ray Train raised, if there is one."""
    inner: list[Any] = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    inner.append(getattr(error, "controller_failure", None))
    return next((e for e in inner if isinstance(e, HashdistError)), None)
