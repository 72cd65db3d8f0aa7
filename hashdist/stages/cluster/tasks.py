"""Work spread over Ray: the parts of an artefact, or items in any order, each tried again where a machine was lost."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from hashdist.ground import telemetry
from hashdist.ground.progress import Progress
from hashdist.stages.cluster.metrics import RaySink
from hashdist.store.commit import Artefact


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
