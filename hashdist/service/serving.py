"""Which version is served: opened in the background, made ready, and swapped in by reference.

A request takes `Serving.now` once and uses nothing else, so its answer comes from one version and that version's
model. A newer version is brought whole to this machine first (codes, ids, keys), its kernels are run once and its
model is loaded; then the reference moves. What cannot be opened is refused, said, and tried again: the version before
stays. A store that does not answer changes nothing either.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from hashdist.collection.collection import Collection, open_collection
from hashdist.ground import telemetry
from hashdist.ground.errors import Corrupt, HashdistError, InvalidInput, NotFound, Unavailable
from hashdist.ground.progress import say
from hashdist.index import Index
from hashdist.index.manifest import apply_rewrites, resolve
from hashdist.index.pins import pinned
from hashdist.index.view import View
from hashdist.store import open_store
from hashdist.store.commit import Log, Version

_TRIED_AGAIN = 6
"""Looks at the store after which a refused version is opened again: somebody may have mended it."""

_WARM_QUERIES = (1, 64)

Prepare = Callable[[str], Mapping[str, Any]]
"""Loads a model by URI wherever pictures are encoded; returns {"reads_images": bool, "reason": str}."""

OpenVersion = Callable[[Log, Version, View | None], Index]
"""Opens a version, sharing what it can with a view that is open."""


@dataclass
class Served:
    """One version, ready to answer.

    Attributes:
        index: at that version.
        pictures: the collection its images come from; None where there is none.
        model: what `Prepare` said of the version's model; None where pictures are not encoded.
    """

    index: Index
    pictures: Collection | None
    model: Mapping[str, Any] | None
    held: ExitStack = field(default_factory=ExitStack)

    @property
    def version(self) -> int:
        """Its number."""
        return self.index.version


class Serving:
    """The version that is served now. Use `start` once and `close` at the end.

    Args:
        uri: of the index; it need not exist yet.
        refresh_s: the store is asked this often.
        held_versions: older versions kept open for requests that name them.
        prepare: loads a version's model; None = pictures are not encoded.
        open_version: opens a version.
    """

    def __init__(
        self,
        uri: str,
        *,
        refresh_s: float,
        held_versions: int,
        prepare: Prepare | None = None,
        open_version: OpenVersion | None = None,
        pictures: bool = True,
    ) -> None:
        self.uri, self._refresh_s, self._held_versions = uri, refresh_s, max(1, held_versions)
        self._prepare, self._open, self._with_pictures = prepare, open_version or _open, pictures
        self._now: Served | None = None
        self._older: OrderedDict[int, Served] = OrderedDict()
        self._opening_older = threading.Lock()
        self._waiting_for = "the index is being opened"
        self.refused: dict[str, Any] | None = None
        self._looks = 0
        self._answered = time.monotonic()
        self._away_since: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="hashdist-serving", daemon=True)

    def start(self) -> None:
        """Begin to follow the index in the background; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Follow no longer, and let go of the version."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._now is not None:
            self._now.held.close()

    @property
    def alive(self) -> bool:
        """Whether the thread that follows the index runs."""
        return self._thread.is_alive()

    @property
    def now(self) -> Served:
        """The version that is served. Raises Unavailable until there is one."""
        served = self._now
        if served is None:
            raise Unavailable(f"no version is served yet: {self._waiting_for}")
        return served

    @property
    def away_s(self) -> float:
        """How long the store has not answered; 0 where it does."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    def state(self) -> tuple[str, list[str]]:
        """`ready`, `degraded` (answers go on, but...) or `not ready`, and the reasons."""
        if self._now is None:
            return "not ready", [self._waiting_for]
        reasons = []
        if self.away_s:
            reasons.append(f"the store has not answered for {self.away_s:.0f} s; version {self._now.version} is served")
        if self.refused:
            reasons.append("version {version} is refused: {reason}".format(**self.refused))
        return ("degraded" if reasons else "ready"), reasons

    # Older versions

    def find_open(self, wanted: int | str) -> Served | None:
        """A version that is open, by number; asks no store."""
        served = self.now
        if wanted in (0, served.version):
            return served
        return self._older.get(wanted) if isinstance(wanted, int) else None

    def at(self, wanted: int | str) -> Served:
        """An older version, by number or tag; the last few stay open. Reads from the store where it is not open.

        Raises NotFound, InvalidInput, Unavailable, Corrupt.
        """
        opened, served = self.find_open(wanted), self.now
        if opened is not None:
            return opened
        log = served.index.versions
        newest = log.latest()
        if newest is None:
            raise NotFound(f"{self.uri} holds no index any more")
        number = resolve(newest.manifest, wanted)
        if number == served.version:
            return served
        with self._opening_older:
            if number not in self._older:
                record = apply_rewrites(log.read(number).manifest, newest.manifest)
                index = self._open(log, Version(number, dict(record)), served.index.view)
                self._older[number] = self._ready(index)
            self._older.move_to_end(number)
            while len(self._older) > self._held_versions:
                self._older.popitem(last=False)
            return self._older[number]

    # Following

    def _follow(self) -> None:
        while not self._ended.is_set():
            try:
                self._look()
            except Exception as error:  # the thread must live on whatever one look met
                self._waiting_for = f"{type(error).__name__}: {error}"
                say(f"serve: {self._waiting_for}")
            self._report()
            self._ended.wait(self._refresh_s)

    def _look(self) -> None:
        """One look at the store: serve its newest version if it can be."""
        self._looks += 1
        try:
            log = self._now.index.versions if self._now else Log(open_store(self.uri))
            newest = log.latest()
        except Unavailable as error:
            self._away(error)
            return
        self._away_since, self._answered = None, time.monotonic()
        if newest is None:
            self._waiting_for = f"{self.uri} holds no index; make one with `hashdist index build`"
            return
        if self._now is not None and newest.number <= self._now.version:
            self.refused = None
            return
        if self.refused and self.refused["version"] == newest.number and self._looks % _TRIED_AGAIN:
            return
        try:
            self._serve(log, newest)
        except Unavailable as error:
            self._away(error)
        except HashdistError as error:
            self._refuse(newest.number, error)

    def _away(self, error: Unavailable) -> None:
        if self._away_since is None:
            self._away_since = self._answered
            say(f"serve: the store does not answer: {error}")
        self._waiting_for = f"the store does not answer: {error}"

    def _refuse(self, number: int, error: HashdistError) -> None:
        reason = f"{type(error).__name__}: {error}"
        if self.refused is None or self.refused["version"] != number:
            say(f"serve: version {number} is refused: {reason}")
        self.refused = {"version": number, "reason": reason}
        self._waiting_for = f"version {number} is refused: {reason}"

    def _serve(self, log: Log, version: Version) -> None:
        before = self._now
        index = self._open(log, version, before.index.view if before else None)
        served = self._ready(index, before)
        served.held.enter_context(pinned(index))
        self._now, self.refused = served, None
        say(f"serve: version {index.version}, {index.rows} rows of {index.bits} bits")
        if before is not None:
            telemetry.SWAPS.inc(what="rows" if before.index.model == index.model else "model")
            before.held.close()

    def _ready(self, index: Index, before: Served | None = None) -> Served:
        """A version whose files are here, whose kernels are compiled and whose model is loaded."""
        with ThreadPoolExecutor(1, thread_name_prefix="hashdist-model") as beside:
            model = beside.submit(self._model, index, before)
            index.view.bring()
            for queries in _WARM_QUERIES:
                hits = index.search(np.zeros((queries, index.bits // 8), np.uint8), 10)
                hits.keys()
            return Served(index, self._pictures(index, before), model.result())

    def _model(self, index: Index, before: Served | None) -> Mapping[str, Any] | None:
        if self._prepare is None or not index.model_uri:
            return None
        if before is not None and before.index.model_uri == index.model_uri and before.model:
            return before.model
        return self._prepare(index.model_uri)

    def _pictures(self, index: Index, before: Served | None) -> Collection | None:
        if not self._with_pictures or not index.collection_uri:
            return None
        if before is not None and before.index.collection_uri == index.collection_uri:
            return before.pictures
        try:
            return open_collection(index.collection_uri)
        except (NotFound, InvalidInput, Corrupt) as error:
            say(f"serve: no pictures are shown: {error}")
            return None

    def _report(self) -> None:
        telemetry.STORE_AWAY.set(self.away_s)
        telemetry.REFUSED_VERSION.set(self.refused["version"] if self.refused else 0)
        if self._now is not None:
            telemetry.SERVED_VERSION.set(self._now.version)
            telemetry.SERVED_AGE.set(age_s(self._now.index))


def age_s(index: Index) -> float:
    """Seconds since the version was committed, by this machine's clock."""
    made = datetime.fromisoformat(str(index.manifest["created_at"]))
    made = made if made.tzinfo else made.replace(tzinfo=UTC)
    return max(0.0, (datetime.now(UTC) - made).total_seconds())


def _open(log: Log, version: Version, before: View | None) -> Index:
    return Index(log, version, writable=False, before=before)
