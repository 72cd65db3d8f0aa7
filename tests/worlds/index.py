"""An index beside a plain dict: what every version must answer, whatever went wrong while it was written."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashdist.ground import ids
from hashdist.ground.bits import hamming
from hashdist.ground.errors import AlreadyExists, Conflict, NotFound, OutcomeUnknown, Refused, Unavailable
from hashdist.index import Index
from hashdist.index.manifest import apply_rewrites, attempt_of, content, files, is_expired
from hashdist.index.view import View
from hashdist.store import Store, open_store
from hashdist.store.commit import Log, Version
from tests.worlds.faults import Crash, FaultyStore

Codes = NDArray[np.uint8]
Contents = dict[str, int]
"""The code of every key, as a number."""

Effect = Callable[[Contents], Contents]
Operation = Callable[[Index], Any]

BITS = 16


def random_codes(n: int, bits: int = 64, seed: int = 0) -> Codes:
    """Packed codes [n, bits / 8], the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, (n, bits // 8), dtype=np.uint8)


def names(n: int, prefix: str = "k") -> list[str]:
    """Keys k0, k1, ..."""
    return [f"{prefix}{i}" for i in range(n)]


def check_answers(
    index: Index, model: Mapping[str, Codes], queries: Codes | None = None, k: int = 7, radius: int = 24
) -> None:
    """The index answers as the dict of codes does, by brute force: searches, radius, keys, codes."""
    salts = index.view.salts
    queries = random_codes(3, index.bits, seed=99) if queries is None else queries
    assert index.rows == len(model)
    assert sorted(index.keys()) == sorted(model)
    hits, near = index.search(queries, k), index.search_within(queries, radius)
    assert hits.ids.shape == hits.distances.shape == (len(queries), min(k, len(model)))
    assert (hits.ids.dtype, hits.distances.dtype) == (np.int64, np.int32)
    for q, query in enumerate(queries):
        ranked = sorted(
            (int(hamming(query, code)), ids.image_id(key, salts.get(key, 0)), key) for key, code in model.items()
        )
        assert list(zip(hits.distances[q], hits.ids[q], hits.keys()[q], strict=True)) == ranked[:k]
        span = slice(near.offsets[q], near.offsets[q + 1])
        close = [row for row in ranked if row[0] <= radius]
        assert list(zip(near.distances[span], near.ids[span], near.keys()[q], strict=True)) == close
    if model:
        np.testing.assert_array_equal(index.codes_of(list(model)), np.stack(list(model.values())))


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

    def __init__(self, store: Store, history: Mapping[int, Contents]) -> None:
        self.store = store
        self.log = Log(store)
        self.history = dict(history)
        self.untold: list[Effect] = []
        self.late: list[FaultyStore] = []

    def copy(self, folder: Path) -> "IndexWorld":
        """Another index with the same history, on local disk."""
        shutil.copytree(self.store.uri.removeprefix("file://"), folder)
        return IndexWorld(open_store(str(folder)), self.history)

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
        except Refused:
            effect, ended = unchanged, "done"  # a candidate was committed beside what is served
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

    def erase(self, keys: list[str]) -> None:
        """No version has these keys any more."""
        self.history = {number: without(found, keys) for number, found in self.history.items()}

    def land(self) -> None:
        """Requests that were on their way arrive now."""
        for store in self.late:
            store.land()
        self.late.clear()
        self.catch_up()

    def version(self, number: int, head: View) -> View:
        """A version as it has to be read now."""
        record = apply_rewrites(self.log.read(number).manifest, head.manifest)
        return View(self.log, Version(number, dict(record)))

    def kept(self) -> list[int]:
        """Versions whose files are all there."""
        head = self.newest().view
        return [number for number in self.history if not is_expired(head.manifest, number)]

    def check(self, maybe_erased: list[str] | None = None) -> None:
        """Every version that is kept answers what it answered before, all of them with or all without erased keys."""
        head = self.newest().view
        found = {number: contents(self.version(number, head)) for number in self.kept()}
        wanted = {number: self.history[number] for number in found}
        erased = {number: without(rows, maybe_erased or []) for number, rows in wanted.items()}
        assert found in (wanted, erased), "an older version changed"

    def litter(self) -> set[str]:
        """Data files that no version needs that is kept, by folder/attempt/name."""
        head = self.newest().view
        needed = {entry["path"] for entry in files(head.manifest)}
        for number in self.kept():
            needed |= {entry["path"] for entry in files(content(self.version(number, head).manifest))}
        there = {entry.name for entry in self.store.list() if not entry.name.startswith(("manifests/", "pins/"))}
        assert needed <= there, "a file that is needed is gone"
        assert all(len(attempt_of(name)) == 32 for name in there)
        return there - needed


def without(rows: Contents, keys: list[str]) -> Contents:
    """The rows of other keys."""
    return {key: number for key, number in rows.items() if key not in keys}
