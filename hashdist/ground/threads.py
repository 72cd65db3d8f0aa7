"""Work done ahead of its consumer: hides the latency of a store, in bounded memory."""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """`map(work, items)` by `ahead` threads, never more than `ahead` results before the consumer.

    An error of `work` is raised at its place. A consumer that stops early waits for the work begun, and no more.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(ahead) as pool:
        running: deque[Future[Result]] = deque(pool.submit(work, item) for item in islice(remaining, ahead))
        try:
            while running:
                result = running.popleft().result()
                running.extend(pool.submit(work, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in running:
                future.cancel()


# Threads


_pool_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(cores(), thread_name_prefix="hashdist-scan")
        return _pool


def _forget_pool() -> None:
    """A forked child has none of the parent's threads."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def spread(tasks: Iterable[Callable[[], Any]], threads: int) -> list[Any]:
    """Results of the tasks, in order, by so many threads; this one is one of them and waits for none to start."""
    todo = list(tasks)
    results: list[Any] = [None] * len(todo)
    numbers = itertools.count()

    def work() -> None:
        while (number := next(numbers)) < len(todo):
            results[number] = todo[number]()

    helpers = [_threads().submit(work) for _ in range(min(threads or cores(), len(todo)) - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
    return results
