"""Load on a running search service, while its index changes, with every answer checked against the version it names.

An answer must be what a brute-force search over exactly that version's rows gives, with that version's model; and no
request may fail, nor be answered by a version older than one that had answered before it was sent.
"""

import asyncio
import io
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
from numpy.typing import NDArray

from tests.worlds.service import Service, ServiceWorld, blocks, label_of

KINDS = {"code": 0.4, "key": 0.2, "picture": 0.2, "filtered": 0.1, "radius": 0.05, "older": 0.05}
"""What is asked, and how often."""

_STRANGERS = 24
_OLDEST = 2
_EXAMPLES = 5
_PAGE_KB = 1024


class Truth(NamedTuple):
    """Everything about one version, read whole: ids [N], codes [N, L/8], keys, labels, and the model's digest."""

    ids: NDArray[np.int64]
    codes: NDArray[np.uint8]
    keys: list[str]
    labels: NDArray[np.int64]
    model: str

    @classmethod
    def of(cls, world: ServiceWorld, version: int) -> "Truth":
        index = world.at(version)
        keys = [key for table in index.tables([]) for key in table["key"].to_pylist()]
        ids = [id_ for table in index.tables([]) for id_ in table["id"].to_pylist()]
        labels = np.array([label_of(key) for key in keys])
        return cls(np.array(ids, np.int64), index.codes_of(keys), keys, labels, str(index.model))

    def nearest(self, code: NDArray[np.uint8], k: int, radius: int | None, label: int | None) -> list[tuple[str, int]]:
        """Keys and distances in (distance, id) order, by brute force."""
        distances = np.bitwise_count(self.codes ^ code).sum(1, dtype=np.int64)
        order = np.lexsort((self.ids, distances))
        if label is not None:
            order = order[self.labels[order] == label]
        if radius is not None:
            order = order[distances[order] <= radius]
        return [(self.keys[row], int(distances[row])) for row in order[:k]]


@dataclass
class Load:
    """What a load came to.

    Attributes:
        asked: requests by kind.
        failed: what was not answered with 200; the first few, as text.
        wrong: answers that are not those of the version they name; likewise.
        failures: how many of either.
        versions: answers by version.
        seconds: latency of every request.
        swapped: versions that were committed and then served while requests came.
    """

    asked: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failures: int = 0
    versions: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    swapped: list[int] = field(default_factory=list)

    def note(self, found: list[str], text: str) -> None:
        self.failures += 1
        if len(found) < _EXAMPLES:
            found.append(text)

    def text(self) -> str:
        """A line."""
        low, high = np.percentile(self.seconds, [50, 99]) * 1e3
        return (
            f"{self.asked.total()} requests {dict(self.asked)}, p50 {low:.1f} ms, p99 {high:.1f} ms, "
            f"{len(self.swapped)} swaps, answers of {len(self.versions)} versions, {self.failures} failures"
        )


class Clients:
    """Clients of a service over a world. Use `run` once.

    Args:
        world: what is served.
        url: of the service.
        keys: that every version has.
        seed: of what is asked.
    """

    def __init__(self, world: ServiceWorld, url: str, keys: Sequence[str], seed: int = 0) -> None:
        self._world, self._url, self._keys = world, url, list(keys)
        self._rng = np.random.default_rng(seed)
        self._pictures = [blocks(10_000 + number, 24) for number in range(_STRANGERS)]
        self._pictures += [world.picture(key) for key in self._keys[:8]]
        self._truths: dict[int, Truth] = {}
        self._codes: dict[str, NDArray[np.uint8]] = {}
        self._newest = 0
        self.load = Load()

    async def run(self, count: int, ended: asyncio.Event, *, pause_s: float = 0.0) -> Load:
        """So many clients, each with one request at a time, until `ended`."""
        connector = aiohttp.TCPConnector(limit=count)
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(self._client(session, ended, pause_s) for _ in range(count)))
        return self.load

    async def _client(self, session: aiohttp.ClientSession, ended: asyncio.Event, pause_s: float) -> None:
        while not ended.is_set():
            kind = str(self._rng.choice(list(KINDS), p=list(KINDS.values())))
            await self._one(session, kind)
            await asyncio.sleep(pause_s)

    async def _one(self, session: aiohttp.ClientSession, kind: str) -> None:
        asked = self._question(kind)
        self.load.asked[kind] += 1
        before, started = self._newest, time.perf_counter()
        try:
            async with self._sent(session, asked) as response:
                status, text = response.status, await response.text()
                answer = await response.json() if status == 200 else None
        except (aiohttp.ClientError, TimeoutError) as error:
            self.load.note(self.load.failed, f"{kind}: {type(error).__name__}: {error}")
            return
        self.load.seconds.append(time.perf_counter() - started)
        if answer is None:
            self.load.note(self.load.failed, f"{kind}: {status} {text[:300]}")
            return
        if "version" not in asked:
            self._newest = max(self._newest, answer["version"])
        self.load.versions[answer["version"]] += 1
        try:
            self._check(asked, answer, before)
        except AssertionError as error:
            self.load.note(self.load.wrong, f"{kind}: {error}: asked {_short(asked)}, found {_short(answer)}")

    def _question(self, kind: str) -> dict[str, Any]:
        """The fields of a request, and the picture's number."""
        asked: dict[str, Any] = {"k": int(self._rng.integers(1, 30))}
        if kind == "picture":
            return asked | {"picture": int(self._rng.integers(len(self._pictures)))}
        if kind == "key":
            return asked | {"key": str(self._rng.choice(self._keys)), "exclude_self": bool(self._rng.integers(2))}
        asked["code"] = self._rng.bytes(8).hex()
        if kind == "filtered":
            asked["where"] = f"label in {int(self._rng.integers(3))}"
        if kind == "radius":
            asked["radius"] = int(self._rng.integers(20, 33))
        if kind == "older":
            asked["version"] = _OLDEST
        return asked

    def _sent(self, session: aiohttp.ClientSession, asked: dict[str, Any]) -> Any:
        url = f"{self._url}/search"
        if "picture" in asked:
            form = aiohttp.FormData()
            form.add_field("image", io.BytesIO(self._pictures[asked["picture"]]), filename="a.png")
            form.add_field("k", str(asked["k"]))
            return session.post(url, data=form)
        if self._rng.integers(2):
            return session.post(url, json=asked)
        return session.get(url, params={name: str(value).lower() for name, value in asked.items()})

    def _check(self, asked: dict[str, Any], answer: dict[str, Any], before: int) -> None:
        """Raises AssertionError for an answer that is not that of the version it names."""
        version = answer["version"]
        assert version == asked["version"] if "version" in asked else version >= before, "an older version"
        truth = self._truth(version)
        assert answer["model"] == truth.model, "not the version's model"
        code = self._code(asked, truth)
        assert answer["code"] == code.tobytes().hex(), "not the code by the version's model"
        label = int(asked["where"].rpartition(" ")[2]) if "where" in asked else None
        own = asked["key"] if asked.get("exclude_self") else None
        wanted = truth.nearest(code, asked["k"] + (own is not None), asked.get("radius"), label)
        wanted = [hit for hit in wanted if hit[0] != own][: asked["k"]]
        assert [(hit["key"], hit["distance"]) for hit in answer["hits"]] == wanted, "not the version's nearest"

    def _truth(self, version: int) -> Truth:
        if version not in self._truths:
            self._truths[version] = Truth.of(self._world, version)
        return self._truths[version]

    def _code(self, asked: dict[str, Any], truth: Truth) -> NDArray[np.uint8]:
        if "code" in asked:
            return np.frombuffer(bytes.fromhex(asked["code"]), np.uint8)
        if "key" in asked:
            row: NDArray[np.uint8] = truth.codes[truth.keys.index(asked["key"])]
            return row
        if truth.model not in self._codes:
            self._codes[truth.model] = self._world.model(truth.model).encode(self._pictures)
        row = self._codes[truth.model][int(asked["picture"])]
        return row


def _short(value: dict[str, Any]) -> str:
    return str(value)[:400]


async def under_load(
    world: ServiceWorld,
    service: Service,
    changes: Sequence[Callable[[], int]],
    *,
    clients: int,
    seconds: float,
    pause_s: float = 0.0,
    seed: int = 0,
) -> Load:
    """Load for at least so many seconds, in which the changes are made, evenly spaced, and each is waited for."""
    keys = [key for key in world.keys() if key.startswith("ants/")]  # noqa: SIM118
    running, ended = Clients(world, service.url, keys, seed), asyncio.Event()
    task = asyncio.create_task(running.run(clients, ended, pause_s=pause_s))
    started = time.monotonic()
    for number, change in enumerate(changes):
        await asyncio.sleep(max(0.0, started + seconds * (number + 0.5) / len(changes) - time.monotonic()))
        version = await asyncio.to_thread(change)
        await asyncio.to_thread(service.wait, version)
        running.load.swapped.append(version)
    await asyncio.sleep(max(0.0, started + seconds - time.monotonic()))
    ended.set()
    return await task


# Memory


class Memory(NamedTuple):
    """Resident memory of a process at a time, in MB: all of it, its share of what it shares, and its own alone."""

    at_s: float
    rss: float
    pss: float
    anonymous: float


def memory(pid: int) -> Memory:
    """As smaps_rollup says it now."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name.rstrip(":")] = int(value) / _PAGE_KB
    return Memory(time.monotonic(), found["Rss"], found["Pss"], found["Anonymous"])


async def watched(pids: Sequence[int], every_s: float, into: dict[int, list[Memory]]) -> None:
    """Sample the memory of processes until cancelled."""
    while True:
        for pid in pids:
            into.setdefault(pid, []).append(memory(pid))
        await asyncio.sleep(every_s)


def slope(samples: Sequence[Memory], what: str, warm_up_s: float) -> float:
    """MB a minute, by least squares, of the samples after the warm-up."""
    late = [one for one in samples if one.at_s >= samples[0].at_s + warm_up_s]
    times = np.array([one.at_s for one in late]) / 60
    return float(np.polyfit(times - times[0], [getattr(one, what) for one in late], 1)[0])
