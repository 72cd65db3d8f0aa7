"""Queries that arrive together are answered by one scan: it reads the codes once for all of them.

Nobody waits for company: while one scan runs, the next batch gathers, so a lone query starts at once and a busy
replica answers many at the price of a few. Queries go together if they look at the same version through the same
filter; such a group has one scan at a time, since two half as large read the codes twice, and another group's runs
beside it. A batch looks as deep as its deepest query asks; a shorter list is the beginning of a longer one.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashdist.ground import telemetry
from hashdist.index import Index

MOST_QUERIES = 256
_SHALLOW = 100
"""Queries for more results than this go with their like, so that nobody's ten wait for another's thousand."""


class Answer(NamedTuple):
    """The answer to one query: ids, distances and keys, nearest first; and how long the scan and the keys took."""

    ids: NDArray[np.int64]
    distances: NDArray[np.int32]
    keys: list[str]
    search_s: float
    keys_s: float


@dataclass
class _Waiting:
    index: Index
    where: str
    k: int
    code: NDArray[np.uint8]
    found: "asyncio.Future[Answer]"

    @property
    def group(self) -> tuple[int, str, bool]:
        return id(self.index), self.where, self.k > _SHALLOW


class Batches:
    """Searches of one event loop, gathered into scans.

    Args:
        at_once: scans at the same time, each of another group.
        clock: seconds.
    """

    def __init__(self, at_once: int, clock: Callable[[], float]) -> None:
        self._waiting: list[_Waiting] = []
        self._free, self._clock = at_once, clock
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="hashdist-batch")
        self._running: set[asyncio.Task[None]] = set()
        self._scanned: set[tuple[int, str, bool]] = set()

    async def search(self, index: Index, code: NDArray[np.uint8], k: int, where: str) -> Answer:
        """The k nearest rows that match. Raises as `Index.search`."""
        found: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(index, where, k, code, found))
        self._begin()
        return await found

    def close(self) -> None:
        """Let the threads go; searches that run end first."""
        self._threads.shutdown()

    def _begin(self) -> None:
        """Start scans while there is something to look for and a thread to do it."""
        while self._free and (batch := self._next()):
            taken = {id(one) for one in batch}
            self._waiting = [one for one in self._waiting if id(one) not in taken]
            self._free -= 1
            self._scanned.add(batch[0].group)
            task = asyncio.ensure_future(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def _next(self) -> list[_Waiting]:
        """Those of the group that has waited longest, unless a scan for it runs: then they gather for its next."""
        group = next((one.group for one in self._waiting if one.group not in self._scanned), None)
        return [one for one in self._waiting if one.group == group][:MOST_QUERIES]

    async def _run(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._threads, self._look, batch)
        except Exception as error:
            self._settle(batch, error)
        else:
            self._settle(batch, answers)
        finally:
            self._free += 1
            self._scanned.discard(batch[0].group)
            self._begin()

    @staticmethod
    def _settle(batch: list[_Waiting], answers: Any) -> None:
        for number, one in enumerate(batch):
            if one.found.cancelled():
                continue
            if isinstance(answers, Exception):
                one.found.set_exception(answers)
            else:
                one.found.set_result(answers[number])

    def _look(self, batch: list[_Waiting]) -> list[Answer]:
        started = self._clock()
        first = batch[0]
        codes_QW = np.stack([one.code for one in batch])
        hits = first.index.search(codes_QW, max(one.k for one in batch), first.where or None)
        scanned = self._clock()
        keys = hits.keys()
        times = scanned - started, self._clock() - scanned
        telemetry.SERVICE_BATCH.observe(len(batch))
        telemetry.QUERY_SECONDS.observe(times[0], phase="search")
        telemetry.QUERY_SECONDS.observe(times[1], phase="keys")
        return [
            Answer(hits.ids[q, : one.k], hits.distances[q, : one.k], keys[q][: one.k], *times)
            for q, one in enumerate(batch)
        ]
