"""One version of an index, opened: its shards, what is hidden in them, and where rows are. Searches of it: search/."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.ground.bits import BIT_ORDER
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_ids
from hashdist.ground.threads import in_order
from hashdist.index.notes import last_of_each, read_seen
from hashdist.index.shards.shard import Shard, local_file, map_npy, opening, read_salts
from hashdist.nearest import scan
from hashdist.store.commit import Log, Version

_READ_AT_ONCE = 16
"""Shards whose keys are read at the same time, where that takes requests."""


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
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["View"], tuple[Log, Version]]:
        return View, (self.log, self.version)

    # Hidden rows

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
            if len(at):
                alive = scan.alive(self.dead(number), at)
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

    def codes_of(self, keys: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The codes of keys, and which of the keys have a live row; the codes of others are 0."""
        places = self.find(keys)
        codes = np.zeros((len(keys), self.manifest["bits"] // 8), np.uint8)
        codes[places.present] = self.codes(places.take(np.flatnonzero(places.present)))
        return codes, places.present

    def features(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """The features of live ids, float16 [N, D], in versions that keep them (hashdist/index/search/rerank.py)."""
        return self.array("rerank", self.locate(ids))

    def array(self, part: str, places: Places) -> NDArray[Any]:
        """One of the further arrays at these places, all of which are present: [N, D]; D as the manifest says."""
        rows = np.empty((len(places.ids), self.manifest[part]["width"]), np.float16)
        for number, which, here in self._gather(places):
            rows[which] = self.shards[number].array(part)[here.rows]
        return rows

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
        """The last note about each of these images (hashdist/index/notes.py)."""
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

    def live_rows(self, number: int, columns: Sequence[str]) -> pa.Table:
        """id, key and further columns of the live rows of a shard."""
        return self._table(number, scan.live(self.dead(number), self.shards[number].rows), columns)

    def _between(self, number: int, first: int, last: int, columns: Sequence[str]) -> pa.Table:
        ids = self.shards[number].ids
        rows = np.arange(np.searchsorted(ids, first), np.searchsorted(ids, last, "right"))
        return self._table(number, rows[scan.alive(self.dead(number), rows)], columns)

    def _table(self, number: int, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """id, key and further columns of some rows of a shard."""
        shard = self.shards[number]
        further = shard.columns(columns, rows)
        own = {"id": shard.ids[rows], "key": pa.array(shard.keys(rows), pa.string())}
        return pa.table(own | {name: further[name] for name in columns})
