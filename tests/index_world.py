"""An index beside a plain dict: what every version must answer, whatever went wrong while it was written."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from faults import Crash, FaultyStore

from hashdist.errors import AlreadyExists, Conflict, NotFound, OutcomeUnknown, Unavailable
from hashdist.index import Index, create_index
from hashdist.index.view import View
from hashdist.store import Store
from hashdist.store.commit import Log

Contents = dict[str, int]
"""The code of every key, as a number."""

Effect = Callable[[Contents], Contents]
Operation = Callable[[Index], Any]

BITS = 16


def codes_of(numbers: list[int]) -> Any:
    """Codes of BITS bits."""
    return np.array(numbers, "<u2").view(np.uint8).reshape(len(numbers), BITS // 8)


def unchanged(contents: Contents) -> Contents:
    """The effect of an operation that searches must not notice."""
    return contents


def contents(view: View) -> Contents:
    """What a version answers, read in full: by its rows, by its keys, and by a search."""
    index = Index(view.log, view.version, writable=False)
    found: Contents = {}
    for number in range(len(view.shards)):
        keys = view.live_rows(number, [])["key"].to_pylist()
        assert not set(keys) & set(found), "a key lives twice"
        if keys:
            found |= dict(zip(keys, index.codes_of(keys).view("<u2")[:, 0].tolist(), strict=True))
    assert len(found) == index.rows == view.manifest["rows"], "the count of live rows is wrong"
    hits = index.search(codes_of([0]), k=len(found) + 3)
    distances = {key: int(number).bit_count() for key, number in found.items()}
    assert dict(zip(hits.keys()[0] if found else [], hits.distances[0].tolist(), strict=True)) == distances
    return found


class IndexWorld:
    """One index, written by operations that may fail, and the contents of every version of it.

    An operation has an effect, a function of the contents. Every version must have the contents that the effect of
    some operation gives to those of the version before: the one that was told its number, if any was; else one of
    those whose end is not known.
    """

    def __init__(self, uri: str, store: Store) -> None:
        create_index(uri, BITS, model="m")
        self.store = store
        self.log = Log(store)
        self.history: dict[int, Contents] = {1: {}}
        self.untold: list[Effect] = []
        self.late: list[FaultyStore] = []

    def newest(self, store: Store | None = None) -> Index:
        """The newest version, opened through `store`."""
        log = Log(store or self.store)
        version = log.latest()
        assert version is not None
        return Index(log, version)

    def head(self) -> Contents:
        """Contents of the newest version."""
        return self.history[max(self.history)]

    def attempt(self, operation: Operation, effect: Effect, faulty: FaultyStore, stale: Index | None = None) -> str:
        """Run an operation on the newest version, or on a stale one, through a store with faults; how it ended."""
        self.late.append(faulty)
        try:
            index = stale or self.newest(faulty)
            operation(index)
        except (OutcomeUnknown, Crash):
            self.untold.append(effect)
            ended = "unknown"
        except (Unavailable, Conflict, AlreadyExists, NotFound) as error:
            ended = type(error).__name__  # a promise that nothing was or will be committed
        else:
            ended = "done"
        self.catch_up(effect if ended == "done" else None)
        return ended

    def catch_up(self, told: Effect | None = None) -> None:
        """Read the versions that are new, and require that each is what some operation makes of the one before."""
        numbers = self.log.numbers()
        assert numbers == list(range(1, len(numbers) + 1)), "the log has a gap"
        for number in numbers[len(self.history) :]:
            before, version = self.history[number - 1], self.log.read(number)
            assert version.manifest["parent"] == number - 1
            now = contents(View(self.log, version))
            possible = [*([told] if told else []), *self.untold]
            assert any(effect(dict(before)) == now for effect in possible), f"version {number} is nobody's"
            self.history[number] = now
        if told is not None:
            assert told(dict(self.head())) == self.head(), "what an operation was told it did is not there"

    def land(self) -> None:
        """Requests that were on their way arrive now."""
        for store in self.late:
            store.land()
        self.late.clear()
        self.catch_up()

    def check(self, expected: Mapping[int, Contents] | None = None) -> None:
        """Every version that is kept answers what it answered before."""
        head = self.newest().view
        for number, wanted in (expected or self.history).items():
            if not is_expired(head, number):
                assert contents(View(self.log, self.log.read(number))) == wanted, f"version {number} changed"


def is_expired(head: View, number: int) -> bool:
    """Whether the head says that this version's files may be gone."""
    return any(first <= number <= last for first, last in head.manifest.get("expired", ()))
