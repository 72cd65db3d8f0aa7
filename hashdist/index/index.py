"""An index, to search one version of it and to commit the next one."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Protocol, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashdist.ground import telemetry
from hashdist.ground.bits import check_bits
from hashdist.ground.errors import AlreadyExists, Conflict, InvalidInput, NotFound
from hashdist.ground.ranges import blocks
from hashdist.index.candidate import Gate, as_content, put_to_gate, refusal
from hashdist.index.change import Applied, Change, ChangePlan, OnExisting, checked_columns, checked_keys, some
from hashdist.index.manifest import CONTENT, apply_rewrites, files, first, is_expired, resolve, stamp, successor
from hashdist.index.notes import FOLDER, MOST_FILES, SEEN, SUFFIX, last_of_each, read_seen, write_seen
from hashdist.index.search import rerank as second_stage
from hashdist.index.search.engine import Engine
from hashdist.index.search.engines import find_engine, not_by_radius
from hashdist.index.search.filters import Filter
from hashdist.index.search.hits import Hits, Matches
from hashdist.index.search.rerank import unit_rows
from hashdist.index.search.tables import Use
from hashdist.index.search.where import parse
from hashdist.index.shards.shard import Rows, write_ids, write_salts, write_shard
from hashdist.index.view import View
from hashdist.store import Store, open_store
from hashdist.store.commit import CommitLost, Log, Version, open_artefact

SHARD_ROWS = 8_000_000
"""Rows per shard file at most."""

_TRIES = 64
_RESULTS_AT_ONCE = 1 << 22


def create_index(uri: str, bits: int, model: str | None = None) -> "Index":
    """A new index, at version 1 with no rows.

    Args:
        uri: folder or s3:// URI that holds nothing else.
        bits: code length, a multiple of 8.
        model: URI of the committed model whose codes it will hold, or any text that stands for the model.

    Raises:
        AlreadyExists: the URI holds an index.
        InvalidInput: a code length that is not a multiple of 8, or no model at that URI.
    """
    log = Log(open_store(uri))
    digest, model_uri = _model(model)
    try:
        version = log.commit(first(check_bits(bits), digest, model_uri), 0)
    except CommitLost as error:
        raise AlreadyExists(f"{log.uri} holds an index already; open it, or choose another name") from error
    return Index(log, version)


def open_index(uri: str, version: int | str | None = None, *, candidate: bool = False) -> "Index":
    """The index at `uri`, at its newest version; an older version, or the candidate, can be read only.

    Args:
        uri: folder or s3:// URI of the index.
        version: number or tag of an older version; None = the newest.
        candidate: open the version that the gate refused and that waits for promotion.

    Raises:
        NotFound: no index, no such version, or a version that a vacuum has expired.
        InvalidInput: something other than an index lies there.
    """
    log = Log(open_store(uri))
    newest = log.latest()
    if newest is None:
        raise NotFound(f"{log.uri} holds no index; make one with create_index or `hashdist index build`")
    if version is not None and candidate:
        raise InvalidInput("an older version or the candidate can be opened, found both; leave one out")
    if version is not None:
        number = resolve(newest.manifest, version)
        record = apply_rewrites(log.read(number).manifest, newest.manifest)
        return Index(log, Version(number, dict(record)), writable=False)
    if candidate:
        return Index(log, as_content(newest, log.uri), writable=False)
    return Index(log, newest)


class Propose(Protocol):
    """`Index.transact` asks it for the record of the next version."""

    def __call__(self, view: View, tried: int, /) -> dict[str, Any] | None:
        """The record upon `view`, or None."""


def _index_at(log: Log, version: Version, writable: bool) -> "Index":
    return Index(log, version, writable=writable)


class Removed(int):
    """Number of rows that a delete removed.

    Attributes:
        unknown: keys that were asked for and are not in the index.
    """

    unknown: int

    def __new__(cls, count: int, unknown: int) -> "Removed":
        """`count` removed, `unknown` not there."""
        made = super().__new__(cls, count)
        made.unknown = unknown
        return made


class Index:
    """One version of an index to search, and, if it was opened as the newest, to change.

    An object may be used by many threads: a search sees one version throughout; a change moves the object to the
    version it committed. Made by `create_index` and `open_index`. Shards that `before` has open are shared.
    """

    def __init__(self, log: Log, version: Version, *, writable: bool = True, before: View | None = None) -> None:
        self._log, self._writable = log, writable
        self._view = self._open(version, before)
        self._moving = threading.Lock()
        if writable:
            self._observe()

    def _open(self, version: Version, before: View | None) -> View:
        return View(self._log, version, before)

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

    @property
    def view(self) -> View:
        """This version, opened: it stays as it is when the index moves on."""
        return self._view

    @property
    def versions(self) -> Log:
        """The log it is a version of."""
        return self._log

    def log(self) -> list[dict[str, Any]]:
        """Every version up to now: version, created_at, operation, rows, shards, tags, expired (files may be gone)."""
        found = [self._log.read(number) for number in self._log.numbers()]
        head = found[-1].manifest
        return [
            {
                "version": version.number,
                **{name: version.manifest[name] for name in ("created_at", "operation", "rows")},
                "shards": len(version.manifest["shards"]),
                "tags": sorted(tag for tag, number in head.get("tags", {}).items() if number == version.number),
                "expired": is_expired(head, version.number),
            }
            for version in found
        ]

    # Reading

    def search(
        self,
        codes: NDArray[np.uint8],
        k: int,
        where: Filter | str | None = None,
        *,
        engine: str | Engine = "scan",
        rerank: NDArray[np.floating[Any]] | None = None,
        candidates: int = 0,
    ) -> Hits:
        """The k nearest images of every code, exactly, in (distance, id) order.

        Args:
            codes: uint8 [Q, L/8].
            k: results per code; cut to the number of rows that match.
            where: only rows that match this filter (hashdist/index/search/filters.py), which may be given as text.
            engine: the engine that answers (hashdist/index/search/engines.py); `ivf` and `multihash` are approximate.
            rerank: features [Q, D] of the queries: the nearest `candidates` are then ordered by (cosine, id), and the
                first k of them are the result (hashdist/index/search/rerank.py).
            candidates: 0 = 10 k.

        Raises:
            InvalidInput: codes of another length or type, k < 1, a filter that does not parse, an unknown engine, or
                features where the index has none.
            Corrupt: a shard's file does not match its checksum.
            NotFound: a shard's file is gone.
            Unavailable: the store does not answer.
        """
        view, queries_QW, where, chosen = self._view, self._codes(codes), _filter(where), self._engine(engine)
        if not isinstance(k, int | np.integer) or k < 1:
            raise InvalidInput(f"k must be a whole number of at least 1, found {k!r}")
        if rerank is not None:
            rerank = second_stage.check(view, rerank, len(queries_QW))
            candidates = candidates or second_stage.CANDIDATES_PER_RESULT * int(k)
        if candidates and candidates < k:
            raise InvalidInput(f"there must be at least k = {k} candidates, found {candidates}")
        matching = chosen.matching(view, where)
        k = min(int(k), matching)
        depth = k if rerank is None else min(int(candidates), matching)
        ids, distances = np.empty((len(queries_QW), k), np.int64), np.empty((len(queries_QW), k), np.int32)
        scores = None if rerank is None else np.empty((len(queries_QW), k), np.float64)
        for start, stop in blocks(len(queries_QW) if k else 0, max(1, _RESULTS_AT_ONCE // max(depth, 1))):
            found = chosen.nearest(view, queries_QW[start:stop], depth, where)
            if rerank is not None and scores is not None:
                found, scores[start:stop] = second_stage.rank(view, rerank[start:stop], found, k)
            ids[start:stop], distances[start:stop] = found.rows_QK, found.distances_QK
        return Hits(ids, distances, view, scores)

    def search_within(
        self,
        codes: NDArray[np.uint8],
        radius: int,
        where: Filter | str | None = None,
        *,
        engine: str | Engine = "scan",
        tables: Use = "auto",
    ) -> Matches:
        """Every image within a Hamming distance of `radius` of each code.

        Args:
            tables: whether the scan may be replaced by lookups in tables (hashdist/index/search/tables.py), where these
                are faster: "auto" builds them once enough were asked for that to pay, "on" at once, "off" never.

        Other arguments and errors as in `search`.
        """
        if tables not in get_args(Use):
            raise InvalidInput(f"tables must be auto, on or off, found {tables!r}")
        view, queries_QW, where = self._view, self._codes(codes), _filter(where)
        chosen = self._engine(engine, tables=tables)
        if not chosen.by_radius:
            raise not_by_radius(engine)
        if not isinstance(radius, int | np.integer) or radius < 0:
            raise InvalidInput(f"the radius must be a whole number of at least 0, found {radius!r}")
        found = chosen.within(view, queries_QW, int(radius), where)
        return Matches(found.offsets, found.rows, found.distances, view)

    def _engine(self, engine: str | Engine, **knobs: Any) -> Engine:
        return find_engine(engine, **knobs)

    def codes_of(self, keys: Sequence[str]) -> NDArray[np.uint8]:
        """The codes of these images, uint8 [N, L/8]. Raises NotFound for keys that are not in the index."""
        view = self._view
        codes, there = view.codes_of(checked_keys(keys, distinct=False))
        missing = [key for key, present in zip(keys, there, strict=True) if not present]
        if missing:
            raise NotFound(f"every key must be in {self.uri}, version {view.number}; {some(missing)} are not")
        return codes

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
            on_existing: for keys that are in the index: `error` (nothing is committed), `replace`, or `skip`.

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
        gate: Gate | None = None,
        seen: pa.Table | None = None,
        rerank: NDArray[np.floating[Any]] | None = None,
    ) -> Applied:
        """Add, change and remove images in one commit, or in none where there is nothing to do.

        Args:
            removed: keys to remove; none of them among `keys`.
            operation: its name in the log.
            lineage: fields for the manifest that say where the rows came from.
            gate: looks at the result before it is committed (hashdist/index/promotion.py).
            seen: notes about images that get no row (hashdist/index/notes.py), one an image, by ascending id.
            rerank: features [N, D], which an index that keeps them (hashdist/index/search/rerank.py) wants of all its
                rows.

        The rest as in `append`. Raises also Refused: the gate did not pass, and the result waits as a candidate.
        """
        self._must_be_writable()
        digest, model_uri = _model(model)
        change = Change(
            codes=self._codes(codes),
            keys=checked_keys(keys),
            columns=checked_columns(columns, len(keys)),
            removed=checked_keys(removed),
            model=digest,
            on_existing=on_existing,
            fields={**({"model_uri": model_uri} if model_uri else {}), **(lineage or {}), "operation": operation},
            seen=SEEN.empty_table() if seen is None else seen,
        )
        change.check()
        proposal = _Apply(self._log, change, rerank)
        committed = self.transact(proposal, gate)
        if committed is None:
            return Applied(self.version, 0, 0, 0, proposal.plan.unknown)
        return proposal.plan.applied(committed)

    def publish(
        self,
        shards: Sequence[Mapping[str, Any]],
        *,
        bits: int,
        salts: Mapping[str, int],
        model: str,
        model_uri: str,
        lineage: Mapping[str, Any],
        gate: Gate | None = None,
    ) -> int:
        """Replace all content by shards that were written already (by many tasks, for example), in one commit.

        Args:
            shards: entries of `write_shard`; the caller answers for distinct ids.
            bits: code length; may be another than before.
            salts: the keys whose id needed a salt.
            model: digest of the model that made the codes.
            model_uri: where it is committed.
            lineage: further fields for the manifest.
            gate: looks at the result before it is committed (hashdist/index/promotion.py).

        Returns: the new version.

        Raises:
            Conflict: any other change was committed since this version.
            Refused: the gate did not pass; what was served is served, and the new content waits as a candidate.
        """
        content = {
            "bits": check_bits(bits),
            "model": model,
            "model_uri": model_uri,
            "tombstones": [],
            "seen": [],
            "sources": None,
            "listed_at": None,
            "vocabulary": None,
            "quality": None,
            second_stage.PART: None,
            "rows": sum(shard["rows"] for shard in shards),
            **{name: value for name, value in lineage.items() if name in CONTENT},
        }
        about = {name: value for name, value in lineage.items() if name not in CONTENT}
        names = self._log.new_attempt()
        salted = [write_salts(self.store, names.new("salts", ".json"), dict(salts))] if salts else []

        def propose(view: View, tried: int) -> dict[str, Any]:
            if tried:
                raise Conflict(f"{self.uri}: version {view.number} was committed by another writer meanwhile")
            files = {"shards": shards, "salts": salted, "seen": content["seen"]}
            new = {part: stamp(entries, view.number + 1) for part, entries in files.items()}
            return successor(view.version, "build", content | new, **about)

        self.transact(propose, gate)
        return self.version

    # Committing

    def transact(self, propose: "Propose", gate: Gate | None = None) -> int | None:
        """Commit what `propose` makes of this version; of the newest one, again, while other writers are first.

        Args:
            propose: called with a view and how often it was called before; returns the record of the next version
                (`manifest.successor`), or None where nothing is to be done upon that view. Files that the record
                names are written by then. It raises Conflict where what other writers did cannot be built upon.
            gate: decides whether the record is committed or waits as a candidate.

        Returns:
            The committed version's number, None where there was nothing to do. This object has moved to it.

        Raises:
            Conflict: other writers were always first. Refused: the gate did not pass; a version with the candidate was
                committed, to which this object has moved. Else as `Log.commit` and `propose`.
        """
        self._must_be_writable()
        view = self._view
        for tried in range(_TRIES):
            try:
                record = propose(view, tried)
            except NotFound:  # a purge or a vacuum may have taken the files of a version that is not the newest
                newest = self._newest()
                if newest.number == view.number:
                    raise
                view = View(self._log, newest, view)
                continue
            if record is None:
                newest = self._newest()
                if newest.number > view.number:  # what is there now may need what this version did not
                    view = View(self._log, newest, view)
                    continue
                self._advance(view)
                return None
            if gate is not None:
                record = put_to_gate(view, record, gate)
            try:
                version = self._log.commit(record, view.number)
            except CommitLost:
                time.sleep(random.uniform(0, 0.01 * min(tried + 1, 20)))
                view = View(self._log, self._newest(), view)
                continue
            self._advance(View(self._log, version, view))
            if gate is not None and "candidate" in record:
                raise refusal(self.uri, record["candidate"]["gate"])
            return version.number
        raise Conflict(f"{self.uri}: other writers were first in {_TRIES} tries; run again when it is quieter")

    def refresh(self) -> bool:
        """Move to the newest version; whether there is a newer one than before."""
        before = self.version
        newest = self._newest()
        if newest.number > before:
            self._advance(self._open(newest, self._view))
        return newest.number > before

    def _newest(self) -> Version:
        newest = self._log.latest()
        if newest is None:
            raise NotFound(f"{self.uri} holds no index any more: its manifests are gone; restore them from a backup")
        return newest

    def _advance(self, view: View) -> None:
        """Move to a newer version; another thread may have moved further."""
        with self._moving:
            if view.number > self._view.number:
                self._view = view
        self._observe()

    def _observe(self) -> None:
        newest = self._view.version
        rows, shards = newest.manifest["rows"], newest.manifest["shards"]
        telemetry.INDEX_VERSION.set(newest.number)
        telemetry.INDEX_COMMITTED.set(datetime.fromisoformat(newest.manifest["created_at"]).timestamp())
        telemetry.INDEX_ROWS.set(rows)
        telemetry.INDEX_DEAD_ROWS.set(sum(shard["rows"] for shard in shards) - rows)
        telemetry.INDEX_BYTES.set(sum(entry["bytes"] for entry in files(newest.manifest)))
        telemetry.INDEX_SHARDS.set(len(shards))

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


class _Apply:
    """Proposes a change upon one version after the other; files are written again only where the plan differs."""

    def __init__(self, log: Log, change: Change, features_ND: NDArray[np.floating[Any]] | None) -> None:
        self._store, self._names, self._change = log.store, log.new_attempt(), change
        self._features = features_ND
        self._units = unit_rows(features_ND) if features_ND is not None and len(features_ND) else None
        self._written: tuple[ChangePlan, dict[str, Any]] | None = None
        self._noted: tuple[list[dict[str, Any]], pa.Table, dict[str, Any]] | None = None
        self._basis: dict[str, Any] = {}

    def __call__(self, view: View, tried: int) -> dict[str, Any] | None:
        basis = {name: view.manifest.get(name) for name in ("model", "vocabulary")}
        if not tried:
            self._basis = basis
        elif basis["model"] != self._basis["model"]:
            raise Conflict(f"{view.uri}: another writer brought codes of another model; encode again with that one")
        elif basis["vocabulary"] not in (self._basis["vocabulary"], self._change.fields.get("vocabulary")):
            raise Conflict(f"{view.uri}: another writer has numbered labels that are new here; run again")
        plan = self.plan = self._change.plan(view, rebased=tried > 0)
        if plan.empty:
            return None
        kept = second_stage.describe(view.manifest, self._features, len(plan.rows) and len(self._change.keys))
        if self._written is None or not self._written[0].same_files(plan):
            self._written = plan, self._write(plan)
        new, old, number = self._written[1], view.manifest, view.number + 1
        changed = {
            "model": plan.model,
            "rows": old["rows"] + len(plan.rows) - len(plan.replaced) - len(plan.removed),
            "shards": [*old["shards"], *stamp(new["shards"], number)],
            "tombstones": [*old["tombstones"], *stamp(new["tombstones"], number)],
            "salts": [*old["salts"], *stamp(new["salts"], number)],
            "seen": self._seen(old.get("seen", []), plan.seen, number),
            second_stage.PART: kept,
        }
        counts = {"added": len(plan.rows) - len(plan.replaced), "replaced": len(plan.replaced)}
        about = {**self._change.fields, **counts, "removed": len(plan.removed)}
        operation = about.pop("operation")
        changed |= {name: about.pop(name) for name in CONTENT if name in about}
        return successor(view.version, operation, changed, **about)

    def _write(self, plan: ChangePlan) -> dict[str, Any]:
        shards = []
        for start, stop in blocks(len(plan.rows), SHARD_ROWS):
            rows = plan.rows[start:stop]
            keys = [self._change.keys[row] for row in rows]
            arrays = {} if self._units is None else {second_stage.PART: self._units[rows]}
            columns = self._change.columns.take(rows)
            part = Rows(plan.ids[start:stop], self._change.codes[rows], keys, columns, arrays)
            shards.append(write_shard(self._store, partial(self._names.new, "shards"), part))
        hidden = plan.hidden
        tombstones = [write_ids(self._store, self._names.new("tombstones", ".npy"), hidden)] if len(hidden) else []
        salts = [write_salts(self._store, self._names.new("salts", ".json"), plan.salts)] if plan.salts else []
        return {"shards": shards, "tombstones": tombstones, "salts": salts}

    def _seen(self, old: list[dict[str, Any]], notes: pa.Table, number: int) -> list[dict[str, Any]]:
        """The files of notes of the next version: one more, or one for all where they have become many."""
        if not len(notes):
            return old
        merged = old if len(old) >= MOST_FILES else []
        if self._noted is None or self._noted[0] != merged or not self._noted[1].equals(notes):
            every = last_of_each([*(read_seen(self._store, entry) for entry in merged), notes])
            self._noted = merged, notes, write_seen(self._store, self._names.new(FOLDER, SUFFIX), every)
        return [*([] if merged else old), *stamp([self._noted[2]], number)]


def _model(model: str | None) -> tuple[str | None, str | None]:
    """Digest and URI of a model: a URI names a committed one, any other text stands for itself."""
    if model is None or "/" not in model:
        return model, None
    artefact = open_artefact(model, "models")
    return str(artefact.manifest()["model_digest"]), artefact.uri


def _filter(where: Filter | str | None) -> Filter | None:
    return parse(where) if isinstance(where, str) else where
