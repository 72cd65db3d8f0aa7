"""Work done ahead of its consumer: hides the latency of a store, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

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
