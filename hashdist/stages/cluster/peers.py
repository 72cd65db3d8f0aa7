"""Search over Ray actors: the shards of one version spread over several processes or machines.

Every peer (an actor, or a replica of the service) holds some of the shards and answers with its (distance, id) lists;
the caller merges them, so answers are those of a search in one process, at any number of peers. `SpreadIndex` is an
`Index` to search: its engine is `Spread`, and its views read rows from the peers that hold them.

A call names the version it is about, and a peer opens a version when it is first asked for. So a search sees one
version throughout, a peer that was started again knows what to do, and a shard stays with its peer (and that
machine's cache) from version to version.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError

from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput, Unavailable
from hashdist.index import Index
from hashdist.index.search.engine import Engine, join
from hashdist.index.search.filters import Filter
from hashdist.index.search.rerank import PART
from hashdist.index.shards.shard import opening
from hashdist.index.view import View
from hashdist.nearest import scan
from hashdist.stages.cluster import metrics
from hashdist.store.commit import Log, Version

_VERSIONS_HELD = 2
_CALLS_AT_ONCE = 8
_CALL_TRIES = 2


class Call(NamedTuple):
    """A question to one of several peers: its number, the method of `Searcher` and the arguments."""

    peer: int
    what: str
    arguments: tuple[Any, ...]


class Peers(Protocol):
    """Processes that each run a `Searcher`."""

    def __len__(self) -> int:
        """Number of peers."""
        ...

    def ask(self, calls: Sequence[Call]) -> list[Any]:
        """The answers, in order; all are asked at once. Raises what a peer raises; Unavailable where one is gone."""
        ...

    def close(self) -> None:
        """End what was started for them."""
        ...


class Actors:
    """Peers that are Ray actors, started here; Ray starts one that dies again.

    Args:
        count: how many.
        cpus: logical CPUs of each.

    Raises InvalidInput for less than one.
    """

    def __init__(self, count: int, cpus: float = 1) -> None:
        if count < 1:
            raise InvalidInput(f"a search needs at least one actor, found {count}")
        options = {
            "num_cpus": cpus,
            "max_restarts": -1,
            "max_task_retries": _CALL_TRIES,
            "max_concurrency": _CALLS_AT_ONCE,
        }
        self._actors: list[Any] = [ray.remote(Searcher).options(**options).remote() for _ in range(count)]

    def __len__(self) -> int:
        """Number of peers."""
        return len(self._actors)

    def ask(self, calls: Sequence[Call]) -> list[Any]:
        """See Peers."""
        asked = [getattr(self._actors[call.peer], call.what).remote(*call.arguments) for call in calls]
        try:
            answers: list[Any] = ray.get(asked)
            return answers
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise Unavailable(f"an actor that searches cannot be reached: {error}; open the index again") from error

    def close(self) -> None:
        """Stop the actors."""
        for actor in self._actors:
            ray.kill(actor)


class SpreadIndex(Index):
    """An index to search, its shards spread over peers. Use as a context manager, or `close` it. Needs Ray.

    Args:
        index: any version of an index; `refresh` moves on to newer ones once all peers have opened them.
        peers: who searches; a number = that many actors, started here.
        before: a version of the same index over the same peers; its shards stay where they are.
    """

    def __init__(self, index: Index, peers: int | Peers, before: View | None = None) -> None:
        self._peers = Actors(peers) if isinstance(peers, int) else peers
        try:
            super().__init__(index.versions, index.view.version, writable=False, before=before or index.view)
        except BaseException:
            self.close()
            raise

    def _open(self, version: Version, before: View | None) -> View:
        view = SpreadView(self._log, version, before, self._peers)
        view.ready()
        return view

    def _engine(self, engine: str | Engine, **knobs: Any) -> Engine:
        return Spread(super()._engine(engine, **knobs))

    def close(self) -> None:
        """End the peers."""
        self._peers.close()

    def __enter__(self) -> "SpreadIndex":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class Spread(Engine):
    """The peers of a `SpreadView` as an engine: each answers by the engine given, from its own shards."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.exact, self.by_radius = engine, engine.exact, engine.by_radius

    def matching(self, view: View, where: Filter | None) -> int:
        """See Engine."""
        if where is None:
            return super().matching(view, None)
        return sum(_spread(view).ask("matching", self._engine, where))

    def nearest(self, view: View, queries_QW: NDArray[np.uint8], k: int, where: Filter | None) -> scan.Nearest:
        """See Engine."""
        found = _spread(view).ask("nearest", self._engine, ray.put(queries_QW), k, where)
        parts = (scan.Nearest(*map(np.array, part)) for part in found)  # what Ray hands over is read-only
        return self.complete(view, reduce(lambda a, b: scan.merge(a, b, k), parts), k, where)

    def within(self, view: View, queries_QW: NDArray[np.uint8], radius: int, where: Filter | None) -> scan.Ball:
        """See Engine."""
        found = _spread(view).ask("within", self._engine, ray.put(queries_QW), radius, where)
        return join([scan.Ball(*part) for part in found], len(queries_QW))


class SpreadView(View):
    """One version whose shards peers have opened, and whose rows they read.

    Args:
        log: of the index.
        version: a committed version.
        before: a view whose open shards, and whose division among the same peers, are kept.
        peers: who searches.
    """

    def __init__(self, log: Log, version: Version, before: View | None, peers: Peers) -> None:
        super().__init__(log, version, before)
        placed: Mapping[str, int] = before.placed if isinstance(before, SpreadView) else {}
        self.placed: dict[str, int] = place({shard.name: shard.rows for shard in self.shards}, len(peers), placed)
        self._peers = peers
        self._asked: list[tuple[int, str, list[Any]]] = []
        for number in range(len(peers)):
            entries = [
                entry
                for entry, shard in zip(self.manifest["shards"], self.shards, strict=True)
                if self.placed[shard.name] == number
            ]
            if entries:
                part = ray.put((log, Version(version.number, {**self.manifest, "shards": entries, "rows": 0})))
                self._asked.append((number, f"{log.uri} {version.number}", [part]))

    def ready(self) -> None:
        """Return once every peer has opened its part."""
        self.ask("open")

    def bring(self) -> None:
        """See View: to the peers' machines."""
        self.ask("bring")

    def keys_of(self, ids: NDArray[np.int64]) -> list[str]:
        """See View."""
        keys = np.empty(len(ids), object)
        self._gather_from_peers("keys", ids, keys)
        return list(keys)

    def codes_of(self, keys: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """See View."""
        codes = np.zeros((len(keys), self.manifest["bits"] // 8), np.uint8)
        return codes, self._gather_from_peers("codes", keys, codes)

    def features(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """See View."""
        found = np.empty((len(ids), self.manifest[PART]["width"]), np.float16)
        self._gather_from_peers("features", ids, found)
        return found

    def _gather_from_peers(self, what: str, wanted: Any, into: NDArray[Any]) -> NDArray[np.bool_]:
        """Keys or features of ids, or codes of keys, from the peers that have them; which of them were found."""
        there = np.zeros(len(into), np.bool_)
        for which, values in self.ask("take", what, ray.put(wanted)):
            into[which], there[which] = values, True
        return there

    def ask(self, what: str, *arguments: Any) -> list[Any]:
        """The answers of all peers that hold shards. Raises what they raise; Unavailable where one is gone."""
        return self._peers.ask([Call(peer, what, (name, part, *arguments)) for peer, name, part in self._asked])


def _spread(view: View) -> SpreadView:
    if not isinstance(view, SpreadView):
        raise InvalidInput(f"peers search a version that is spread over them, found {type(view).__name__}")
    return view


def place(rows: Mapping[str, int], actors: int, before: Mapping[str, int]) -> dict[str, int]:
    """Which actor searches which shard: where it was before, else, the largest first, where there are fewest rows."""
    placed = {name: before[name] for name in rows if before.get(name, actors) < actors}
    load = [sum(rows[name] for name, actor in placed.items() if actor == number) for number in range(actors)]
    for name in sorted(set(rows) - set(placed), key=lambda name: (-rows[name], name)):
        placed[name] = load.index(min(load))
        load[placed[name]] += rows[name]
    return placed


class Searcher:
    """Runs in a peer's process: holds its parts of the last versions open."""

    def __init__(self) -> None:
        telemetry.set_sink(metrics.RaySink())
        self._views: dict[str, View] = {}
        self._opening = Lock()

    def open(self, name: str, part: list[Any]) -> None:
        """Open the shards."""
        self._view(name, part)

    def bring(self, name: str, part: list[Any]) -> None:
        """Bring all that a search reads to this machine."""
        self._view(name, part).bring()

    def matching(self, name: str, part: list[Any], engine: Engine, where: Filter | None) -> int:
        """Live rows here that match."""
        return engine.matching(self._view(name, part), where)

    def nearest(
        self,
        name: str,
        part: list[Any],
        engine: Engine,
        queries_QW: NDArray[np.uint8],
        k: int,
        where: Filter | None,
    ) -> tuple[NDArray[Any], ...]:
        """The k nearest rows here, or as many as match."""
        view = self._view(name, part)
        here = min(k, engine.matching(view, where))
        if here:
            return tuple(engine.nearest(view, queries_QW, here, where))
        nothing = np.empty((len(queries_QW), 0))
        return nothing.astype(np.int32), nothing.astype(np.int64), np.zeros(len(queries_QW), np.int64)

    def within(
        self,
        name: str,
        part: list[Any],
        engine: Engine,
        queries_QW: NDArray[np.uint8],
        radius: int,
        where: Filter | None,
    ) -> tuple[NDArray[Any], ...]:
        """The rows here within the radius: offsets, ids, distances."""
        found = engine.within(self._view(name, part), queries_QW, radius, where)
        return found.offsets, found.rows, found.distances

    def take(self, name: str, part: list[Any], what: str, wanted: Any) -> tuple[NDArray[np.int64], Any]:
        """Which of the ids or keys wanted are here, and their codes, keys or features."""
        view = self._view(name, part)
        places = view.find(wanted) if what == "codes" else view.locate(wanted)
        which = np.flatnonzero(places.present)
        here = places.take(which)
        if what == "codes":
            return which, view.codes(here)
        return which, view.keys_of(here.ids) if what == "keys" else view.features(here.ids)

    def _view(self, name: str, part: list[Any]) -> View:
        held = self._views.get(name)
        if held is not None:
            return held
        with self._opening:  # searches of the version before go on meanwhile
            if name not in self._views:
                log, version = ray.get(part[0])
                view = _open_part(log, version, next(reversed(self._views.values()), None))
                # replaced as a whole, so that a look needs no lock
                self._views = dict([*self._views.items(), (name, view)][-_VERSIONS_HELD:])
            return self._views[name]


def _open_part(log: Log, version: Version, before: View | None) -> View:
    """Some shards of a version as a version of their own: `rows` is the number of live ones among theirs."""
    view = View(log, version, before)
    for _ in opening(view.shards):
        pass
    rows = sum(shard.rows - len(view.dead_rows(number)) for number, shard in enumerate(view.shards))
    return View(log, Version(version.number, {**version.manifest, "rows": rows}), view)
