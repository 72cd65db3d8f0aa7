"""The index: a log of versions over immutable shards, searched exactly, by any number of readers and writers.

A version names shards and tombstones. A tombstone (id, version) hides the rows with that id in shards committed
before that version, so a changed image is one commit that holds its new row and a tombstone for its old one. After
any history each key has at most one live row.

A writer plans against the version it has read, writes its files, and commits. If another writer was first, it reads
the new version and plans again: rows that the winner brought already are dropped, what `on_existing` says is applied
to other keys that are there now, and what remains is committed, or nothing. Writers whose keys have nothing in
common thus both succeed. Two writers that bring codes of different models cannot.

Results come in (distance, id) order at any number of shards and threads (docs/decisions.md, S3).
"""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashdist import scan, telemetry
from hashdist.bits import BIT_ORDER, check_bits
from hashdist.errors import AlreadyExists, Conflict, Corrupt, InvalidInput, NotFound
from hashdist.ids import image_id
from hashdist.order import blocks
from hashdist.shards import Rows, Shard, local_file, write_ids, write_shard
from hashdist.store import Store, open_store
from hashdist.store.commit import CommitLost, Log, Version, open_artefact

OnExisting = Literal["error", "replace", "skip"]

SHARD_ROWS = 8_000_000
"""Rows per shard file at most."""

_CARRIED = ("kind", "bits", "bit_order", "model_uri", "collection", "built_from", "failed_in")
"""Fields that a version takes over from the one before, besides its content."""

_TRIES = 64
_RESULTS_AT_ONCE = 1 << 22
_SHOWN = 3


def create_index(uri: str, bits: int, model: str | None = None) -> "Index":
    """A new index, at version 1 with no rows.

    Args:
        uri: folder or s3:// URI that holds nothing else.
        bits: code length, a multiple of 8.
        model: URI of the committed model whose codes it will hold, or any text that stands for the model.

    Raises:
        AlreadyExists: there is an index. InvalidInput: another code length, or no such model.
    """
    log = Log(open_store(uri))
    digest, model_uri = _model(model)
    first = {"kind": "index", "operation": "create", "bits": check_bits(bits), "bit_order": BIT_ORDER, "rows": 0}
    empty: dict[str, Any] = {"model": digest, "model_uri": model_uri, "shards": [], "tombstones": [], "salts": {}}
    try:
        version = log.commit({**first, **empty}, 0)
    except CommitLost as error:
        raise AlreadyExists(f"{log.uri} holds an index already; open it, or choose another name") from error
    return Index(log, version)


def open_index(uri: str, version: int | None = None) -> "Index":
    """The index at `uri`: its newest version, or an older one, which can only be read.

    Raises NotFound, or InvalidInput where something else than an index lies there.
    """
    log = Log(open_store(uri))
    if version is not None:
        return Index(log, log.read(version), writable=False)
    newest = log.latest()
    if newest is None:
        raise NotFound(f"{log.uri} holds no index; make one with create_index or `hashdist index build`")
    return Index(log, newest)


def _index_at(log: Log, version: Version, writable: bool) -> "Index":
    return Index(log, version, writable=writable)


class Removed(int):
    """How many rows a delete removed.

    Attributes:
        unknown: keys that were asked for and are not in the index.
    """

    unknown: int

    def __new__(cls, count: int, unknown: int) -> "Removed":
        """`count` removed, `unknown` not there."""
        made = super().__new__(cls, count)
        made.unknown = unknown
        return made


class Applied(NamedTuple):
    """What a change came to.

    Attributes:
        version: the one it committed, or the present one where there was nothing to do.
        added: rows with new keys.
        replaced: rows whose key was there.
        removed: rows removed.
        unknown: keys to remove that were not there.
    """

    version: int
    added: int
    replaced: int
    removed: int
    unknown: int


@dataclass(frozen=True)
class Hits:
    """The nearest images of every query, in (distance, id) order.

    Attributes:
        ids: int64 [Q, k'], k' = min(k, rows of the index).
        distances: int32 [Q, k'].
    """

    ids: NDArray[np.int64]
    distances: NDArray[np.int32]
    _view: "_View" = field(repr=False)

    def keys(self) -> list[list[str]]:
        """The keys, [Q][k']; reads only these rows."""
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
    _view: "_View" = field(repr=False)

    def keys(self) -> list[list[str]]:
        """The keys of every query's matches; reads only these rows."""
        flat = self._view.keys_of(self.ids)
        return [flat[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]


class Index:
    """One version of an index to search, and, if it was opened as the newest, to change.

    An object may be used by many threads: a search sees one version throughout; a change moves the object to the
    version it committed. Made by `create_index` and `open_index`.
    """

    def __init__(self, log: Log, version: Version, *, writable: bool = True) -> None:
        self._log, self._writable = log, writable
        self._view = _View(log, version)
        self._moving = threading.Lock()

    def __reduce__(self) -> tuple[Callable[..., "Index"], tuple[Log, Version, bool]]:
        return _index_at, (self._log, self._view.version, self._writable)

    def __repr__(self) -> str:
        return f"Index({self.uri!r}, version={self.version}, rows={self.rows}, bits={self.bits})"

    @property
    def uri(self) -> str:
        """Where it lives."""
        return self._log.uri

    @property
    def store(self) -> Store:
        """The folder it lives in."""
        return self._log.store

    @property
    def version(self) -> int:
        """Number of this version."""
        return self._view.number

    @property
    def rows(self) -> int:
        """Live rows."""
        return int(self._view.manifest["rows"])

    @property
    def bits(self) -> int:
        """Code length."""
        return int(self._view.manifest["bits"])

    @property
    def model(self) -> str | None:
        """Digest of the model whose codes it holds, if that was said."""
        model: str | None = self._view.manifest["model"]
        return model

    @property
    def model_uri(self) -> str | None:
        """Where that model is committed, if that was said."""
        uri: str | None = self._view.manifest["model_uri"]
        return uri

    @property
    def collection_uri(self) -> str | None:
        """The collection whose images it holds, if it was built from one."""
        uri: str | None = self._view.manifest.get("collection")
        return uri

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The record of this version."""
        return self._view.manifest

    def log(self) -> list[dict[str, Any]]:
        """Every version up to now: version, created_at, operation, rows, shards."""
        found = (self._log.read(number) for number in self._log.numbers())
        return [
            {
                "version": version.number,
                **{name: version.manifest[name] for name in ("created_at", "operation", "rows")},
                "shards": len(version.manifest["shards"]),
            }
            for version in found
        ]

    # Reading

    def search(self, codes: NDArray[np.uint8], k: int) -> Hits:
        """The k nearest images of every code, exactly, in (distance, id) order.

        Args:
            codes: uint8 [Q, L/8].
            k: results per code; cut to the number of rows.

        Raises:
            InvalidInput: codes of another length or type, k < 1. Corrupt, NotFound, Unavailable: a shard's file.
        """
        view, queries_QW = self._view, self._codes(codes)
        if not isinstance(k, int | np.integer) or k < 1:
            raise InvalidInput(f"k must be a whole number of at least 1, found {k!r}")
        k = min(int(k), int(view.manifest["rows"]))
        if not k:
            return Hits(np.empty((len(queries_QW), 0), np.int64), np.empty((len(queries_QW), 0), np.int32), view)
        found = [view.nearest(queries_QW[a:b], k) for a, b in blocks(len(queries_QW), max(1, _RESULTS_AT_ONCE // k))]
        if not found:
            return Hits(np.empty((0, k), np.int64), np.empty((0, k), np.int32), view)
        return Hits(np.concatenate([f.rows_QK for f in found]), np.concatenate([f.distances_QK for f in found]), view)

    def search_within(self, codes: NDArray[np.uint8], radius: int) -> Matches:
        """Every image within a Hamming distance of `radius` of each code. Arguments and errors as in `search`."""
        view, queries_QW = self._view, self._codes(codes)
        if not isinstance(radius, int | np.integer) or radius < 0:
            raise InvalidInput(f"the radius must be a whole number of at least 0, found {radius!r}")
        return view.within(queries_QW, int(radius))

    def codes_of(self, keys: Sequence[str]) -> NDArray[np.uint8]:
        """The codes of these images, uint8 [N, L/8]. Raises NotFound for keys that are not in the index."""
        view = self._view
        places = view.find(_checked_keys(keys, distinct=False))
        missing = [key for key, there in zip(keys, places.present, strict=True) if not there]
        if missing:
            raise NotFound(f"every key must be in {self.uri}, version {view.number}; {_some(missing)} are not")
        return view.codes(places)

    def keys(self) -> Iterator[str]:
        """The keys of all live rows, shard by shard."""
        for table in self.tables([]):
            yield from table["key"].to_pylist()

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """All live rows, shard by shard: id, key and the columns asked for (null where a shard has none)."""
        view = self._view
        for number in range(len(view.shards)):
            yield view.live_rows(number, columns)

    # Changing

    def append(
        self,
        codes: NDArray[np.uint8],
        keys: Sequence[str],
        columns: Mapping[str, Any] | pa.Table | None = None,
        model: str | None = None,
        on_existing: OnExisting = "error",
    ) -> int:
        """Add images in one commit; all of them or none.

        Args:
            codes: uint8 [N, L/8].
            keys: N distinct texts.
            columns: further columns of N rows; `digest` (content digest) and `labels` have a meaning for hashdist.
            model: the model that made the codes, as in `create_index`; None vouches that it is the index's.
            on_existing: what to do about keys that are in the index: nothing at all but raise, `replace`, or `skip`.

        Returns:
            The new version, or the present one where there was nothing to do.

        Raises:
            InvalidInput: codes of another length, type or model; keys twice; columns of another length.
            AlreadyExists: keys that are in the index, with on_existing="error".
            Conflict: other writers were always first, or one of them brought another model.
        """
        return self.apply(codes, keys, columns, model=model, on_existing=on_existing, operation="append").version

    def delete(self, keys: Sequence[str]) -> Removed:
        """Remove images in one commit; keys that are not in the index are counted in `.unknown` of the result."""
        none = np.empty((0, self.bits // 8), np.uint8)
        done = self.apply(none, [], removed=keys, operation="delete")
        return Removed(done.removed, done.unknown)

    def apply(
        self,
        codes: NDArray[np.uint8],
        keys: Sequence[str],
        columns: Mapping[str, Any] | pa.Table | None = None,
        *,
        removed: Sequence[str] = (),
        model: str | None = None,
        on_existing: OnExisting = "replace",
        operation: str = "apply",
        lineage: Mapping[str, Any] | None = None,
    ) -> "Applied":
        """Add, change and remove images in one commit, or in none where there is nothing to do.

        Args:
            removed: keys to remove; none of them among `keys`.
            operation: what the log calls it.
            lineage: fields for the manifest: what the rows were made from.

        The rest as in `append`.
        """
        self._must_be_writable()
        digest, model_uri = _model(model)
        change = _Change(
            codes=self._codes(codes),
            keys=_checked_keys(keys),
            columns=_checked_columns(columns, len(keys)),
            removed=_checked_keys(removed),
            model=digest,
            on_existing=on_existing,
            fields={**({"model_uri": model_uri} if model_uri else {}), **(lineage or {}), "operation": operation},
        )
        change.check()
        return self._commit(change)

    def publish(
        self,
        shards: Sequence[Mapping[str, Any]],
        *,
        bits: int,
        salts: Mapping[str, int],
        model: str,
        model_uri: str,
        lineage: Mapping[str, Any],
    ) -> int:
        """Replace all content by shards that were written already (by many tasks, for example), in one commit.

        Args:
            shards: entries of `write_shard`; the caller answers for distinct ids.
            bits: code length; may be another than before.
            salts: the keys whose id needed a salt.
            model: digest of the model that made the codes.
            model_uri: where it is committed.
            lineage: further fields for the manifest.

        Returns: the new version. Raises Conflict when any other change was committed since this version.
        """
        self._must_be_writable()
        number = self.version + 1
        content = {
            "shards": [{**shard, "version": number} for shard in shards],
            "tombstones": [],
            "salts": dict(salts),
            "rows": sum(shard["rows"] for shard in shards),
        }
        fixed = {"kind": "index", "operation": "build", "bits": check_bits(bits), "bit_order": BIT_ORDER}
        record = {**lineage, **fixed, **content, "model": model, "model_uri": model_uri}
        version = self._log.commit(record, number - 1)
        self._advance(_View(self._log, version, self._view))
        return version.number

    def _advance(self, view: "_View") -> None:
        """Move to a newer version; another thread may have moved further."""
        with self._moving:
            if view.number > self._view.number:
                self._view = view
        newest = self._view
        telemetry.INDEX_VERSION.set(newest.number)
        telemetry.INDEX_ROWS.set(newest.manifest["rows"])
        telemetry.INDEX_SHARDS.set(len(newest.shards))

    def _must_be_writable(self) -> None:
        if not self._writable:
            raise InvalidInput(f"{self.uri} was opened at version {self.version}; open it without one to change it")

    def _codes(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        found = np.asarray(codes)
        if found.dtype != np.uint8 or found.ndim != 2 or found.shape[1] * 8 != self.bits:
            raise InvalidInput(
                f"codes must be uint8 [N, {self.bits // 8}] for an index of {self.bits} bits, "
                f"found {found.dtype} {list(found.shape)}"
            )
        return found

    def _commit(self, change: "_Change") -> Applied:
        view = self._view
        model = view.manifest["model"]
        written: tuple[_Plan, dict[str, Any]] | None = None
        for attempt in range(_TRIES):
            if view.manifest["model"] != model:
                raise Conflict(f"{self.uri}: another writer brought codes of another model; encode again with that one")
            plan = change.plan(view, rebased=attempt > 0)
            if plan.empty:
                self._advance(view)
                return Applied(view.number, 0, 0, 0, plan.unknown)
            if written is None or not written[0].same_files(plan):
                written = plan, self._write(change, plan)
            try:
                version = self._log.commit(_next_manifest(view, change, plan, written[1]), view.number)
            except CommitLost:
                time.sleep(random.uniform(0, 0.01 * min(attempt + 1, 20)))
                newest = self._log.latest()
                if newest is None:
                    raise
                view = _View(self._log, newest, view)
                continue
            self._advance(_View(self._log, version, view))
            return plan.applied(version.number)
        raise Conflict(f"{self.uri}: other writers were first in {_TRIES} tries; run again when it is quieter")

    def _write(self, change: "_Change", plan: "_Plan") -> dict[str, Any]:
        def new_name(folder: str) -> Callable[[str], str]:
            return lambda suffix: self._log.new_name(folder, suffix)

        store = self._log.store
        shards = []
        for start, stop in blocks(len(plan.rows), SHARD_ROWS):
            rows = plan.rows[start:stop]
            keys = [change.keys[row] for row in rows]
            part = Rows(plan.ids[start:stop], change.codes[rows], keys, change.columns.take(rows))
            shards.append(write_shard(store, new_name("shards"), part))
        hidden = plan.hidden
        files = [write_ids(store, new_name("tombstones")(".npy"), hidden)] if len(hidden) else []
        return {"shards": shards, "tombstones": files}


@dataclass(frozen=True)
class _Change:
    """What a writer wants, independent of the version it will be committed upon."""

    codes: NDArray[np.uint8]
    keys: list[str]
    columns: pa.Table
    removed: list[str]
    model: str | None
    on_existing: OnExisting
    fields: Mapping[str, Any]

    def check(self) -> None:
        if len(self.codes) != len(self.keys):
            raise InvalidInput(f"every code needs a key, found {len(self.codes)} codes and {len(self.keys)} keys")
        if self.on_existing not in ("error", "replace", "skip"):
            raise InvalidInput(f"on_existing must be error, replace or skip, found {self.on_existing!r}")
        both = sorted(set(self.keys) & set(self.removed))
        if both:
            raise InvalidInput(f"a key can be added or removed, not both; {_some(both)} are in both lists")

    def plan(self, view: "_View", *, rebased: bool) -> "_Plan":
        """What to write and to hide if committed upon `view`. Raises as `Index.append`."""
        model = self._model_upon(view)
        ids, salts, places = _assign_ids(self.keys, view)
        known = places.present
        keep = np.ones(len(self.keys), np.bool_)
        if rebased and self.on_existing != "skip":
            keep[known] = ~self._same_as(view, places)
        if self.on_existing == "error" and (known & keep).any():
            there = [self.keys[row] for row in np.flatnonzero(known & keep)]
            raise AlreadyExists(
                f"every key must be new, but {_some(there)} are in {view.uri}, version {view.number}; "
                'pass on_existing="replace" or "skip"'
            )
        if self.on_existing == "skip":
            keep[known] = False
        rows = np.flatnonzero(keep)
        gone = view.find(self.removed)
        return _Plan(
            rows=rows,
            ids=ids[rows],
            replaced=np.sort(ids[known & keep]),
            removed=np.sort(gone.ids[gone.present]),
            unknown=int((~gone.present).sum()),
            salts={key: salts[key] for key in (self.keys[row] for row in rows) if key in salts},
            model=model,
        )

    def _model_upon(self, view: "_View") -> str | None:
        present: str | None = view.manifest["model"]
        if self.model is None or self.model == present:
            return present
        if present is None and not view.manifest["rows"]:
            return self.model
        raise InvalidInput(
            f"{view.uri} holds codes of model {present or '(not stated)'}, found codes of model {self.model}; "
            "encode with the former, or build another index"
        )

    def _same_as(self, view: "_View", places: "_Places") -> NDArray[np.bool_]:
        """Which of the rows whose key is there have the code and the content digest of the one that is there."""
        mine = np.flatnonzero(places.present)
        if not len(mine) or "digest" not in self.columns.column_names:
            return np.zeros(len(mine), np.bool_)
        there = places.take(mine)
        digests = self.columns["digest"].take(mine).to_pylist()
        equal = [a is not None and a == b for a, b in zip(digests, view.column(there, "digest"), strict=True)]
        same: NDArray[np.bool_] = np.array(equal) & (view.codes(there) == self.codes[mine]).all(1)
        return same


class _Plan(NamedTuple):
    """A change worked out against one version."""

    rows: NDArray[np.int64]  # of the change, to write
    ids: NDArray[np.int64]  # theirs
    replaced: NDArray[np.int64]  # ids, ascending, whose earlier rows are hidden because of new ones
    removed: NDArray[np.int64]  # ids, ascending, to hide
    unknown: int  # keys to remove that are not there
    salts: dict[str, int]
    model: str | None

    @property
    def hidden(self) -> NDArray[np.int64]:
        return np.union1d(self.replaced, self.removed)

    @property
    def empty(self) -> bool:
        return not len(self.rows) and not len(self.removed)

    def applied(self, version: int) -> Applied:
        """What it comes to, committed as `version`."""
        replaced = len(self.replaced)
        return Applied(version, len(self.rows) - replaced, replaced, len(self.removed), self.unknown)

    def same_files(self, other: "_Plan") -> bool:
        """Whether the files written for this plan serve the other."""
        return (
            np.array_equal(self.rows, other.rows)
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self.hidden, other.hidden)
        )


def _next_manifest(view: "_View", change: _Change, plan: _Plan, files: Mapping[str, Any]) -> dict[str, Any]:
    number = view.number + 1
    old = view.manifest
    hidden = len(plan.replaced) + len(plan.removed)
    return {
        **{name: old[name] for name in _CARRIED if name in old},
        **change.fields,
        "model": plan.model,
        "rows": old["rows"] + len(plan.rows) - hidden,
        "added": len(plan.rows) - len(plan.replaced),
        "replaced": len(plan.replaced),
        "removed": len(plan.removed),
        "shards": [*old["shards"], *({**shard, "version": number} for shard in files["shards"])],
        "tombstones": [*old["tombstones"], *({**file, "version": number} for file in files["tombstones"])],
        "salts": {**old["salts"], **plan.salts},
    }


@dataclass(frozen=True)
class _Places:
    """Where keys or ids are: shard number and row, -1 for those that have no live row."""

    ids: NDArray[np.int64]
    shards: NDArray[np.int64]
    rows: NDArray[np.int64]

    @property
    def present(self) -> NDArray[np.bool_]:
        return self.shards >= 0

    def take(self, which: NDArray[np.int64]) -> "_Places":
        return _Places(self.ids[which], self.shards[which], self.rows[which])

    def by_shard(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Shard numbers, and which of the places are there."""
        for number in np.unique(self.shards[self.present]):
            yield int(number), np.flatnonzero(self.shards == number)


class _View:
    """One version, opened: its shards and what is hidden in them. Shares what is open with the view before it."""

    def __init__(self, log: Log, version: Version, before: "_View | None" = None) -> None:
        manifest = version.manifest
        if manifest.get("kind") != "index":
            raise InvalidInput(f"{log.uri} must hold an index, found a log of kind {manifest.get('kind')!r}")
        if manifest["bit_order"] != BIT_ORDER:
            raise InvalidInput(f"{log.uri}: bits must be packed {BIT_ORDER}-endian, found {manifest['bit_order']!r}")
        self.uri, self.number, self.manifest, self._store = log.uri, version.number, manifest, log.store
        self._log, self.version = log, version
        opened = {} if before is None else {shard.name: shard for shard in before.shards}
        entries = manifest["shards"]
        self.shards: list[Shard] = [opened.get(entry["codes"]["path"]) or Shard(log.store, entry) for entry in entries]
        self._dead: dict[int, NDArray[np.uint8] | None] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["_View"], tuple[Log, Version]]:
        return _View, (self._log, self.version)

    # What is hidden

    @cached_property
    def _tombstones(self) -> list[tuple[int, NDArray[np.int64]]]:
        return [(entry["version"], np.load(local_file(self._store, entry))) for entry in self.manifest["tombstones"]]

    def dead(self, number: int) -> NDArray[np.uint8] | None:
        """Bitmap of the hidden rows of a shard; None if there are none."""
        with self._lock:
            if number not in self._dead:
                since = self.manifest["shards"][number]["version"]
                hidden = [ids for version, ids in self._tombstones if version > since]
                shard = self.shards[number]
                rows = shard.find(np.unique(np.concatenate(hidden)))[1] if hidden else np.empty(0, np.int64)
                self._dead[number] = scan.bitmap(rows, shard.rows)
            return self._dead[number]

    # Searching

    def nearest(self, queries_QW: NDArray[np.uint8], k: int) -> scan.Nearest:
        """The k nearest live rows by (distance, id); "rows" of the result are ids."""
        best: scan.Nearest | None = None
        for number, shard in enumerate(self.shards):
            with _timed("load"):
                codes_NW, ids_N, dead = shard.codes, shard.ids, self.dead(number)
            with _timed("scan"):
                found = scan.nearest(codes_NW, queries_QW, k, dead=dead, bound_Q=_bound(best, k))
            with _timed("merge"):
                ids_QK = ids_N[found.rows_QK.clip(min=0)]
                found = scan.Nearest(found.distances_QK, ids_QK, found.counts_Q)
                best = found if best is None else scan.merge(best, found, k)
        if best is None or (best.counts_Q != k).any():
            raise Corrupt(f"{self.uri}, version {self.number} must hold {self.manifest['rows']} live rows; verify it")
        return scan.Nearest(best.distances_QK[:, :k], best.rows_QK[:, :k], best.counts_Q)

    def within(self, queries_QW: NDArray[np.uint8], radius: int) -> Matches:
        parts = []
        for number, shard in enumerate(self.shards):
            ball = scan.within(shard.codes, queries_QW, radius, dead=self.dead(number))
            query = np.repeat(np.arange(len(queries_QW)), np.diff(ball.offsets))
            parts.append((query, ball.distances, shard.ids[ball.rows]))
        if not parts:
            return Matches(np.zeros(len(queries_QW) + 1, np.int64), np.empty(0, np.int64), np.empty(0, np.int32), self)
        query, distances, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((ids, distances, query))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=len(queries_QW)))]).astype(np.int64)
        return Matches(offsets, ids[order], distances[order], self)

    # Rows by id and by key

    def locate(self, ids: NDArray[np.int64]) -> _Places:
        """Where the live rows of these ids are."""
        shards, rows = np.full(len(ids), -1, np.int64), np.full(len(ids), -1, np.int64)
        for number, shard in enumerate(self.shards):
            which, at = shard.find(ids)
            dead = self.dead(number) if len(at) else None
            if dead is not None:
                alive = (dead[at >> 3] >> (at & 7)) & 1 == 0
                which, at = which[alive], at[alive]
            shards[which], rows[which] = number, at
        return _Places(ids, shards, rows)

    def find(self, keys: Sequence[str]) -> _Places:
        """Where the live rows of these keys are. A row of another key with the same id is not it."""
        salts = self.manifest["salts"]
        places = self.locate(_ids(keys, salts))
        other = ~self._key_matches(keys, places)
        places.shards[other], places.rows[other] = -1, -1
        return places

    def _key_matches(self, keys: Sequence[str], places: _Places) -> NDArray[np.bool_]:
        """Whether the row at each place has that key; True where there is no row."""
        matches = np.ones(len(keys), np.bool_)
        for number, which in places.by_shard():
            stored = self.shards[number].keys(places.rows[which])
            matches[which] = [keys[w] == key for w, key in zip(which, stored, strict=True)]
        return matches

    def keys_of(self, ids: NDArray[np.int64]) -> list[str]:
        """The keys of live ids."""
        keys = np.empty(len(ids), object)
        for number, which, places in self._gather(self.locate(ids)):
            keys[which] = self.shards[number].keys(places.rows)
        return list(keys)

    def codes(self, places: _Places) -> NDArray[np.uint8]:
        """The codes at these places, all of which are present."""
        codes = np.empty((len(places.ids), self.manifest["bits"] // 8), np.uint8)
        for number, which, here in self._gather(places):
            codes[which] = self.shards[number].codes[here.rows]
        return codes

    def column(self, places: _Places, name: str) -> list[Any]:
        """One column at these places, all of which are present."""
        values = np.empty(len(places.ids), object)
        for number, which, here in self._gather(places):
            values[which] = self.shards[number].columns([name], here.rows)[name].to_pylist()
        return list(values)

    @staticmethod
    def _gather(places: _Places) -> Iterator[tuple[int, NDArray[np.int64], _Places]]:
        for number, which in places.by_shard():
            yield number, which, places.take(which)

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


def _bound(best: scan.Nearest | None, k: int) -> NDArray[np.int32] | None:
    """Distances beyond which nothing can enter the results so far; None while they are not full."""
    if best is None or best.distances_QK.shape[1] < k:
        return None
    return np.where(best.counts_Q == k, best.distances_QK[:, k - 1], np.iinfo(np.int32).max - 1).astype(np.int32)


def _assign_ids(keys: Sequence[str], view: _View) -> tuple[NDArray[np.int64], dict[str, int], _Places]:
    """Ids of keys that are in the index or are to join it, salts > 0 among them, and where the former are.

    A key keeps the salt that was recorded for it. A new key whose id another key has takes the next salt; of two new
    ones with one id, the later in string order does.
    """
    salts = {key: view.manifest["salts"][key] for key in keys if key in view.manifest["salts"]}
    ids = _ids(keys, salts)
    while True:
        places = view.locate(ids)
        clashes = set(np.flatnonzero(~view._key_matches(keys, places)).tolist())
        clashes |= _later_of_equal(keys, ids, clashes)
        if not clashes:
            return ids, salts, places
        for row in clashes:
            salts[keys[row]] = salts.get(keys[row], 0) + 1
            ids[row] = image_id(keys[row], salts[keys[row]])


def _later_of_equal(keys: Sequence[str], ids: NDArray[np.int64], leaving: set[int]) -> set[int]:
    """Rows that share an id with an earlier key, not counting the rows that leave that id anyway."""
    if len(np.unique(ids)) == len(ids):
        return set()
    holders: defaultdict[int, list[int]] = defaultdict(list)
    for row, id_ in enumerate(ids.tolist()):
        if row not in leaving:
            holders[id_].append(row)
    return {row for rows in holders.values() for row in sorted(rows, key=lambda row: keys[row])[1:]}


def _ids(keys: Sequence[str], salts: Mapping[str, int]) -> NDArray[np.int64]:
    return np.fromiter((image_id(key, salts.get(key, 0)) for key in keys), np.int64, count=len(keys))


def _model(model: str | None) -> tuple[str | None, str | None]:
    """Digest and URI of a model: a URI names a committed one, any other text stands for itself."""
    if model is None or "/" not in model:
        return model, None
    artefact = open_artefact(model, "models")
    return str(artefact.manifest()["model_digest"]), artefact.uri


def _checked_keys(keys: Sequence[str], *, distinct: bool = True) -> list[str]:
    if isinstance(keys, str | bytes):
        raise InvalidInput(f"keys must be a sequence of texts, found one text {keys!r}")
    found = list(keys)
    wrong = next((key for key in found if not isinstance(key, str) or not key), None)
    if wrong is not None:
        raise InvalidInput(f"every key must be a text that is not empty, found {wrong!r}")
    try:
        "".join(found).encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"keys must be valid Unicode, found {error.object[error.start]!r} in one") from error
    if distinct and len(set(found)) != len(found):
        seen: set[str] = set()
        twice = sorted({key for key in found if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise InvalidInput(f"every key must be given once; {_some(twice)} are given more often")
    return found


def _checked_columns(columns: Mapping[str, Any] | pa.Table | None, rows: int) -> pa.Table:
    if columns is None:
        return pa.table({})
    try:
        table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise InvalidInput(f"columns must be row-aligned arrays of plain values: {error}") from error
    taken = {"id", "key", "code"} & set(table.column_names)
    if taken:
        raise InvalidInput(f"the columns id, key and code are the index's own, found {sorted(taken)} among `columns`")
    if table.num_columns and len(table) != rows:
        raise InvalidInput(f"columns must have {rows} rows like the codes, found {len(table)}")
    if "digest" in table.column_names and not pa.types.is_string(table.schema.field("digest").type):
        at = table.column_names.index("digest")
        table = table.set_column(at, "digest", table["digest"].cast(pa.string()))
    return table


def _some(keys: Sequence[str]) -> str:
    """How many keys, and the first of them."""
    more = ", ..." if len(keys) > _SHOWN else ""
    return f"{len(keys)} keys ({', '.join(map(repr, keys[:_SHOWN]))}{more})"


class _timed:  # noqa: N801
    """Observes the time of a phase of a search."""

    def __init__(self, phase: str) -> None:
        self._phase = phase

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        telemetry.SEARCH_SECONDS.observe(time.perf_counter() - self._started, phase=self._phase)
