"""One version of an index, opened: its shards, what is hidden in them, and where rows are."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.ground import telemetry
from hashdist.ground.bits import BIT_ORDER
from hashdist.ground.errors import Corrupt, InvalidInput
from hashdist.ground.ids import image_ids
from hashdist.ground.threads import in_order
from hashdist.index.notes import last_of_each, read_seen
from hashdist.index.search.engines import Engine
from hashdist.index.search.filters import Filter, Searched, Selection, Selections
from hashdist.index.search.rerank import features
from hashdist.index.search.tables import Use, tables_of
from hashdist.index.shards.shard import Shard, local_file, map_npy, opening, read_salts
from hashdist.nearest import scan
from hashdist.nearest.tables import within_of
from hashdist.store.commit import Log, Version

_READ_AT_ONCE = 16
"""Shards whose keys are read at the same time, where that takes requests."""


@dataclass(frozen=True)
class Hits:
    """The nearest images of every query, in (distance, id) order.

    Attributes:
        ids: int64 [Q, k'], k' = min(k, rows of the index).
        distances: int32 [Q, k'].
        scores: float64 [Q, k'] cosines, where they decided the order (two-stage ranking); else None.
    """

    ids: NDArray[np.int64]
    distances: NDArray[np.int32]
    _view: "View" = field(repr=False)
    scores: NDArray[np.float64] | None = None

    def keys(self) -> list[list[str]]:
        """The keys: for each of the Q queries a list of k'. Reads only these rows."""
        flat = self._view.keys_of(self.ids.ravel())
        width = self.ids.shape[1]
        return [flat[q * width : (q + 1) * width] for q in range(len(self.ids))]


@dataclass(frozen=True)
class Matches:
    """Every image within a radius of each query, in (distance, id) order.

    Attributes:
        offsets: int64 [Q + 1]; query q owns [offsets[q], offsets[q + 1]) of the other two.
        ids: int64 [matches].
        distances: int32 [matches].
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    distances: NDArray[np.int32]
    _view: "View" = field(repr=False)

    def keys(self) -> list[list[str]]:
        """The keys of every query's matches; reads only these rows."""
        flat = self._view.keys_of(self.ids)
        return [flat[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]


@dataclass(frozen=True)
class Places:
    """Where keys or ids are: shard number and row, -1 for those that have no live row."""

    ids: NDArray[np.int64]
    shards: NDArray[np.int64]
    rows: NDArray[np.int64]

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which of them are somewhere."""
        return self.shards >= 0

    def take(self, which: NDArray[np.int64]) -> "Places":
        """Some of them."""
        return Places(self.ids[which], self.shards[which], self.rows[which])

    def by_shard(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Shard numbers, and which of the places are there."""
        for number in np.unique(self.shards[self.present]):
            yield int(number), np.flatnonzero(self.shards == number)


class View:
    """One version, opened: its shards and what is hidden in them. Picklable.

    Args:
        log: of the index.
        version: a committed version, or one that is about to be committed and whose files are written.
        before: a view whose open shards may be shared.

    Attributes:
        number: of the version.
        manifest: its record.
        shards: in the manifest's order.

    Raises InvalidInput for a log of something else.
    """

    def __init__(self, log: Log, version: Version, before: "View | None" = None) -> None:
        manifest = version.manifest
        if manifest.get("kind") != "index":
            raise InvalidInput(f"{log.uri} must hold an index, found a log of kind {manifest.get('kind')!r}")
        if manifest["bit_order"] != BIT_ORDER:
            raise InvalidInput(f"{log.uri}: bits must be packed {BIT_ORDER}-endian, found {manifest['bit_order']!r}")
        self.uri, self.number, self.manifest = log.uri, version.number, manifest
        self.log, self.version = log, version
        opened = {} if before is None else {shard.name: shard for shard in before.shards}
        found = [Shard(log.store, entry) for entry in manifest["shards"]]
        self.shards: list[Shard] = [opened.get(shard.name, shard) for shard in found]
        self._dead: dict[int, NDArray[np.uint8] | None] = {}
        self._selections = Selections()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["View"], tuple[Log, Version]]:
        return View, (self.log, self.version)

    # What is hidden

    @cached_property
    def tombstones(self) -> list[tuple[int, NDArray[np.int64]]]:
        """(version, ids ascending): each hides rows of these ids in shards committed before that version."""
        return [(entry["version"], map_npy(local_file(self.log.store, entry))) for entry in self.manifest["tombstones"]]

    def dead_rows(self, number: int) -> NDArray[np.int64]:
        """The hidden rows of a shard, ascending."""
        since, shard = self.manifest["shards"][number]["version"], self.shards[number]
        hidden = [ids for version, ids in self.tombstones if version > since]
        return shard.find(np.unique(np.concatenate(hidden)))[1] if hidden else np.empty(0, np.int64)

    def dead(self, number: int) -> NDArray[np.uint8] | None:
        """Bitmap of the hidden rows of a shard; None if there are none."""
        with self._lock:
            if number not in self._dead:
                self._dead[number] = scan.bitmap(self.dead_rows(number), self.shards[number].rows)
            return self._dead[number]

    def bring(self) -> None:
        """Bring codes, ids and keys of all shards, and what is hidden in them, to this machine, each byte checked.

        From then on a search without a filter needs no store. Raises Corrupt, NotFound, Unavailable.
        """
        for number in opening(self.shards, ("codes", "ids", "keys")):
            self.dead(number)
        _ = self.salts

    # Searching

    def selection(self, where: Filter) -> Selection:
        """A filter evaluated against this version; the last few are kept. Raises InvalidInput."""
        return self._selections.of(self, where)

    def matching(self, where: Filter | None) -> int:
        """Number of live rows that match a filter; of all live rows without one."""
        return int(self.manifest["rows"]) if where is None else self.selection(where).rows

    def searched(self, number: int, where: Filter | None) -> Searched:
        """What of a shard is scanned: its codes and ids, or copies of those that match where they are few."""
        shard = self.shards[number]
        if where is None:
            return Searched(shard.codes, shard.ids, self.dead(number))
        selection = self.selection(where)
        return selection.copies.get(number) or Searched(shard.codes, shard.ids, selection.shards[number])

    def nearest(
        self, queries_QW: NDArray[np.uint8], k: int, where: Filter | None = None, engine: Engine | None = None
    ) -> scan.Nearest:
        """The k nearest live rows that match by (distance, id), k of them; "rows" of the result are ids.

        Args:
            queries_QW: packed codes.
            k: at most `matching(where)`.
            where: only rows that match.
            engine: what looks at the codes; None = the scan.
        """
        if engine is not None:
            return self.complete(engine.nearest(self, queries_QW, k, where), k, where)
        with _timed("load"):
            parts = self._parts(where)
        with _timed("scan"):
            found = scan.nearest_of(parts, queries_QW, k)
        return self.complete(found, k, where)

    def complete(self, found: scan.Nearest, k: int, where: Filter | None) -> scan.Nearest:
        """`found`, which must hold k rows for every query. Raises Corrupt."""
        if found.rows_QK.shape[1] < k or (found.counts_Q != k).any():
            raise Corrupt(f"{self.uri}, version {self.number} must hold {self.matching(where)} such rows; verify it")
        return found

    def within(
        self,
        queries_QW: NDArray[np.uint8],
        radius: int,
        where: Filter | None = None,
        engine: Engine | None = None,
        tables: Use = "auto",
    ) -> Matches:
        """Every live row that matches within the radius of each query; `tables` as in `Index.search_within`."""
        if engine is not None:
            found = engine.within(self, queries_QW, radius, where)
        else:
            parts = self._parts(where)
            own = [part.codes_NW is shard.codes for part, shard in zip(parts, self.shards, strict=True)]
            have = [tables_of(s, len(queries_QW), tables) if o else None for s, o in zip(self.shards, own, strict=True)]
            found = within_of(parts, have, queries_QW, radius)
        return Matches(found.offsets, found.rows, found.distances, self)

    def _parts(self, where: Filter | None) -> list[scan.Part]:
        return [scan.Part(*self.searched(number, where)) for number in opening(self.shards)]

    # Rows by id and by key

    @cached_property
    def salts(self) -> dict[str, int]:
        """The keys whose id has a salt > 0 (hashdist/ground/ids.py)."""
        return {
            key: salt for entry in self.manifest["salts"] for key, salt in read_salts(self.log.store, entry).items()
        }

    def locate(self, ids: NDArray[np.int64]) -> Places:
        """Where the live rows of these ids are."""
        shards, rows = np.full(len(ids), -1, np.int64), np.full(len(ids), -1, np.int64)
        for number in opening(self.shards, ["ids"]):
            which, at = self.shards[number].find(ids)
            dead = self.dead(number) if len(at) else None
            if dead is not None:
                alive = (dead[at >> 3] >> (at & 7)) & 1 == 0
                which, at = which[alive], at[alive]
            shards[which], rows[which] = number, at
        return Places(ids, shards, rows)

    def find(self, keys: Sequence[str]) -> Places:
        """Where the live rows of these keys are. A row of another key with the same id is not it."""
        places = self.locate(image_ids(keys, self.salts))
        other = ~self.key_matches(keys, places)
        places.shards[other], places.rows[other] = -1, -1
        return places

    def key_matches(self, keys: Sequence[str], places: Places) -> NDArray[np.bool_]:
        """Whether the row at each place has that key; True where there is no row."""
        matches = np.ones(len(keys), np.bool_)
        for which, stored in self._stored_keys(places):
            matches[which] = [keys[w] == key for w, key in zip(which, stored, strict=True)]
        return matches

    def keys_of(self, ids: NDArray[np.int64]) -> list[str]:
        """The keys of live ids."""
        keys = np.empty(len(ids), object)
        for which, stored in self._stored_keys(self.locate(ids)):
            keys[which] = stored
        return list(keys)

    def _stored_keys(self, places: Places) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
        """The keys of the rows at these places, shard by shard: which of them, and their keys."""

        def read(part: tuple[int, NDArray[np.int64]]) -> tuple[NDArray[np.int64], list[str]]:
            return part[1], self.shards[part[0]].keys(places.rows[part[1]])

        parts = list(places.by_shard())
        at_hand = all(self.shards[number].has_opened("keys") for number, _ in parts)
        return map(read, parts) if at_hand else in_order(read, parts, _READ_AT_ONCE)

    def codes(self, places: Places) -> NDArray[np.uint8]:
        """The codes at these places, all of which are present."""
        codes = np.empty((len(places.ids), self.manifest["bits"] // 8), np.uint8)
        for number, which, here in self._gather(places):
            codes[which] = self.shards[number].codes[here.rows]
        return codes

    def features(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """The features of live ids, float16 [N, D], in versions that keep them (hashdist/index/search/rerank.py)."""
        return features(self, self.locate(ids))

    def column(self, places: Places, name: str) -> list[Any]:
        """One column at these places, all of which are present."""
        values = np.empty(len(places.ids), object)
        for number, which, here in self._gather(places):
            values[which] = self.shards[number].columns([name], here.rows)[name].to_pylist()
        return list(values)

    @staticmethod
    def _gather(places: Places) -> Iterator[tuple[int, NDArray[np.int64], Places]]:
        for number, which in places.by_shard():
            yield number, which, places.take(which)

    def notes(self, ids: NDArray[np.int64]) -> pa.Table:
        """What was seen of these images without a row of it (hashdist/index/notes.py): the last note about each."""
        tables = (read_seen(self.log.store, entry) for entry in self.manifest.get("seen", ()))
        return last_of_each(table.filter(pc.is_in(table["id"], pa.array(ids, pa.int64()))) for table in tables)

    def rows_between(self, first: int, last: int, columns: pa.Schema) -> pa.Table:
        """id, key and further columns (as these types) of the live rows with first <= id <= last, shard by shard."""
        schema = pa.schema([("id", pa.int64()), ("key", pa.large_string()), *columns])
        parts = (self._between(number, first, last, columns.names) for number in range(len(self.shards)))
        return pa.concat_tables([schema.empty_table(), *(part.cast(schema) for part in parts)])

    def notes_between(self, first: int, last: int) -> pa.Table:
        """The last note about each image with first <= id <= last, by ascending id."""
        found = []
        for entry in self.manifest.get("seen", ()):
            table = read_seen(self.log.store, entry)
            ids = table["id"].to_numpy()
            start, stop = np.searchsorted(ids, first), np.searchsorted(ids, last, "right")
            found.append(table.slice(start, stop - start))
        return last_of_each(found)

    def _between(self, number: int, first: int, last: int, columns: Sequence[str]) -> pa.Table:
        shard = self.shards[number]
        rows = np.arange(np.searchsorted(shard.ids, first), np.searchsorted(shard.ids, last, "right"))
        dead = self.dead(number)
        if dead is not None:
            rows = rows[(dead[rows >> 3] >> (rows & 7)) & 1 == 0]
        own = pa.table({"id": shard.ids[rows], "key": pa.array(shard.keys(rows), pa.large_string())})
        more = shard.columns(columns, rows)
        for name in columns:
            own = own.append_column(name, more[name])
        return own

    def live_rows(self, number: int, columns: Sequence[str]) -> pa.Table:
        """id, key and further columns of the live rows of a shard."""
        shard, dead = self.shards[number], self.dead(number)
        rows = np.arange(shard.rows)
        if dead is not None:
            rows = np.flatnonzero(np.unpackbits(dead, count=shard.rows, bitorder="little") == 0)
        own = pa.table({"id": shard.ids[rows], "key": pa.array(shard.keys(rows), pa.string())})
        for name in columns:
            own = own.append_column(name, shard.columns([name], rows)[name])
        return own


class _timed:  # noqa: N801
    """Observes the time of a phase of a search."""

    def __init__(self, phase: str) -> None:
        self._phase = phase

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        telemetry.SEARCH_SECONDS.observe(time.perf_counter() - self._started, phase=self._phase)
