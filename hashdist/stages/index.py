"""Stage: build the sharded index from committed codes; one Ray task writes one shard, the driver commits one version.

A shard takes a run of parts, so every part is read once and no rows travel between tasks; its rows are sorted by id.
A version remembers the codes it was built from, and changes by `append` or `reindex` keep that memory: building from
the same codes again finds nothing to do. Other codes replace all content in one commit, on which searches move over.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.collection.collection import Collection
from hashdist.collection.readers.reader import source_stamp
from hashdist.ground.errors import AlreadyExists, Conflict, InvalidInput, NotFound
from hashdist.ground.ids import image_id
from hashdist.ground.progress import say
from hashdist.ground.ranges import runs
from hashdist.ground.schema import OK, from_vectors
from hashdist.ground.settings import Settings
from hashdist.index import Index, create_index, open_index, promotion
from hashdist.index.notes import FOLDER, SEEN, SOURCES_SUFFIX, SUFFIX, last_of_each, write_seen, write_sources
from hashdist.index.search import rerank
from hashdist.index.shards.shard import Rows, Shard, write_shard
from hashdist.stages.cluster import session, tasks
from hashdist.store import Entry
from hashdist.store.commit import Artefact, Log, open_artefact, read_table

COLUMNS = ["digest", "labels"]
"""Columns of a shard beside codes, ids and keys: re-indexing compares the first, evaluation needs the second."""

LISTED = ["size", "stamp"]
"""Likewise, from the collection where there is one: re-indexing looks at these first."""

_MOST_SALTS = 1000
_FEATURE_BYTES = 1 << 30


def run(settings: Settings, codes: Artefact) -> dict[str, Any]:
    """Commit a version that holds exactly these codes, unless the newest was built from them.

    Rows without a code (unreadable images) are counted, not indexed. Needs an open Ray session. Codes of another model
    are written beside the old ones, which are served until the gate has passed.

    Returns: stage, snapshot (the index), version, rows, failed, shards, seconds, skipped.

    Raises Refused where the gate did not pass: the codes wait as a candidate.
    """
    started = time.perf_counter()
    manifest = codes.manifest()
    index = _open_or_create(settings.index.location(settings.root), manifest["bits"])
    features = _features(settings, codes)
    if _is_built_from(index.manifest, codes, features):
        return _result(index, started, skipped=True)
    from hashdist.evaluation import gate  # brings torch with it, which the tasks that write shards do without

    checks = gate.for_build(settings, codes)
    if _is_candidate(index, codes, features):
        say("index: these codes wait as a candidate already; nothing is written, the gate looks at them again")
        promotion.promote(index, checks)
        return _result(index, started, skipped=False)
    files = manifest["files"]
    spans = runs([file["rows"] for file in files], _shard_rows(settings, features))
    parts = [range(start, stop) for start, stop in spans]
    listing = _listing(codes)
    task = _WriteShard(codes, features, listing, Log(index.store))
    done = dict(tasks.run_tasks(task, parts, label="index", at_once=session.cpus()))
    written = [done[number] for number in range(len(parts))]
    shards = [part.shard for part in written if part.shard]
    _require_distinct(index, shards)
    try:
        index.publish(
            shards,
            bits=manifest["bits"],
            salts={key: salt for part in written for key, salt in part.salts.items()},
            model=manifest["model_digest"],
            model_uri=manifest["model"],
            lineage=_lineage(settings, codes)
            | {rerank.PART: _features_entry(features)}
            | _reindex_fields(index, written, listing),
            gate=checks,
        )
    except Conflict:
        index = open_index(index.uri)
        if not _is_built_from(index.manifest, codes, features):
            raise
    return _result(index, started, skipped=False)


def _is_built_from(content: Mapping[str, Any], codes: Artefact, features: Artefact | None) -> bool:
    """Whether this content was built from these codes, with features beside them if they are wanted."""
    return content.get("built_from") == codes.name and (content.get(rerank.PART) is None) == (features is None)


def _features(settings: Settings, codes: Artefact) -> Artefact | None:
    """The features that the index is to keep, None if it is to keep none. Raises InvalidInput where there are none."""
    if not settings.index.rerank:
        return None
    made_from = codes.manifest()["inputs"].get("features")
    if not made_from:
        raise InvalidInput(
            f"index.rerank keeps the features that codes were made from, but {codes.uri} was encoded from images "
            "(train.mode: images); build without index.rerank, or train with train.mode: frozen"
        )
    return open_artefact(made_from["uri"], "features")


def _features_entry(features: Artefact | None) -> dict[str, Any] | None:
    return None if features is None else {"width": features.manifest()["width"], "features": features.uri}


def _shard_rows(settings: Settings, features: Artefact | None) -> int:
    """Rows of a shard at most: a task holds the features of one in memory."""
    if features is None:
        return settings.index.shard_rows
    return min(settings.index.shard_rows, max(1, _FEATURE_BYTES // (2 * int(features.manifest()["width"]))))


def _is_candidate(index: Index, codes: Artefact, features: Artefact | None) -> bool:
    """Whether these codes are the candidate, and no row was added, changed or removed since."""
    candidate = index.manifest.get("candidate") or {}
    made = candidate.get("operation") == "build" and _is_built_from(candidate, codes, features)
    return made and promotion.lost_by(index.view, candidate) is None


def _open_or_create(uri: str, bits: int) -> Index:
    try:
        return open_index(uri)
    except NotFound:
        with suppress(AlreadyExists):
            return create_index(uri, bits)
        return open_index(uri)


class _Written(NamedTuple):
    """The product of a task: a shard (None where no row has a code), salts > 0 of its keys, notes about failures."""

    shard: dict[str, Any] | None
    salts: dict[str, int]
    notes: pa.Table


@dataclass(frozen=True)
class _WriteShard:
    """Work of one task: a run of parts as one shard."""

    codes: Artefact
    features: Artefact | None
    listing: Artefact | None
    log: Log

    def __call__(self, parts: Sequence[int]) -> _Written:
        """Write the shard of these parts."""
        table = _table(self.codes, parts, ["id", "key", *COLUMNS, "status", "reason", "code"])
        table = _with_stamps(table, self.listing, parts)
        good = np.flatnonzero(np.asarray(pc.equal(table["status"], OK)))
        notes = table.filter(pc.not_equal(table["status"], OK)).select(SEEN.names).cast(SEEN)
        if not len(good):
            return _Written(None, {}, notes)
        arrays = {} if self.features is None else {rerank.PART: _features_of(self.features, parts, table["id"], good)}
        table = table.take(good)
        vectors = np.asarray(from_vectors(table["code"], table.schema), np.uint8)
        rows = Rows(table["id"].to_numpy(), vectors, table["key"], table.select([*COLUMNS, *LISTED]), arrays)
        shard = write_shard(self.log.store, lambda suffix: self.log.new_name("shards", suffix), rows)
        return _Written(shard, salts_of(table["key"].to_pylist(), table["id"].to_pylist()), notes)


def _listing(codes: Artefact) -> Artefact | None:
    """The collection that codes were made from; None where there is none, or none any more."""
    uri = _collection(codes.manifest()["inputs"])
    try:
        return open_artefact(uri, "collections") if uri else None
    except NotFound:
        return None


def _with_stamps(table: pa.Table, listing: Artefact | None, parts: Sequence[int]) -> pa.Table:
    """Size and stamp as listed, of rows of parts of codes: codes and collection are cut into the same parts."""
    if listing is None:
        return table.append_column("size", pa.nulls(len(table), pa.int64())).append_column(
            "stamp", pa.nulls(len(table), pa.string())
        )
    collection = Collection(listing)
    listed = pa.concat_tables(collection.table(part) for part in parts).sort_by("id")
    ids = listed["id"].to_numpy()
    places = np.searchsorted(ids, table["id"].to_numpy()).clip(max=max(len(ids) - 1, 0))
    known = np.zeros(len(table), np.bool_) if not len(ids) else ids[places] == table["id"].to_numpy()
    at = pa.array(places, mask=~known)
    return table.append_column("size", listed["size"].take(at)).append_column("stamp", listed["stamp"].take(at))


def _reindex_fields(index: Index, written: Sequence[_Written], listing: Artefact | None) -> dict[str, Any]:
    """Fields that a re-index starts from: notes about failures, the files that were read, when they were listed."""
    names = index.versions.new_attempt()
    found: dict[str, Any] = {}
    notes = last_of_each(part.notes for part in written)
    if len(notes):
        found["seen"] = [write_seen(index.store, names.new(FOLDER, SUFFIX), notes)]
    if listing is not None:
        about = listing.manifest()
        found["listed_at"] = datetime.fromisoformat(about["created_at"]).timestamp()
        files = zip(about["sources"], about["stamps"], strict=False)  # of a folder, no stamps
        stamps = {source_stamp(Entry(name, size, stamp, 0.0)) for name, (size, stamp) in files}
        # a listing of an older release has other stamps on its rows; then all files are read once more
        if stamps and not stamps.isdisjoint(Collection(listing).table(0)["stamp"].to_pylist()):
            found["sources"] = write_sources(index.store, names.new(FOLDER, SOURCES_SUFFIX), stamps)
    return found


def _table(artefact: Artefact, parts: Sequence[int], columns: list[str]) -> pa.Table:
    files = artefact.manifest()["files"]
    return pa.concat_tables(read_table(artefact.store, files[part], columns) for part in parts)


def _features_of(
    features: Artefact, parts: Sequence[int], ids: pa.ChunkedArray, rows: NDArray[np.int64]
) -> NDArray[np.float16]:
    """Features, as an index keeps them, of some rows of parts of codes; both artefacts are cut into the same parts."""
    table = _table(features, parts, ["id", "feature"])
    if not table["id"].equals(ids):
        raise InvalidInput(f"{features.uri} must have the rows of the codes made from it, part by part; encode again")
    vectors: NDArray[Any] = from_vectors(table["feature"], table.schema)
    return rerank.unit_rows(vectors[rows])


def salts_of(keys: Sequence[str], ids: Sequence[int]) -> dict[str, int]:
    """The salts > 0 by which these ids were made of these keys. Raises InvalidInput for an id that was not."""
    salts = {}
    for key, id_ in zip(keys, ids, strict=True):
        if image_id(key) != id_:
            found = next((salt for salt in range(1, _MOST_SALTS) if image_id(key, salt) == id_), None)
            if found is None:
                raise InvalidInput(f"the id of {key!r} must be made from its key (hashdist/ground/ids.py), found {id_}")
            salts[key] = found
    return salts


def _require_distinct(index: Index, shards: Sequence[Mapping[str, Any]]) -> None:
    """Within a shard ids are ascending; across shards this looks at all ids once."""
    if len(shards) > 1:
        ids = np.sort(np.concatenate([Shard(index.store, shard).ids for shard in shards]))
        twice = int((ids[1:] == ids[:-1]).sum())
        if twice:
            raise InvalidInput(f"every image must have its own key, found {twice} ids in two parts; encode again")


def _lineage(settings: Settings, codes: Artefact) -> dict[str, Any]:
    manifest = codes.manifest()
    return {
        "inputs": {"codes": {"uri": codes.uri, "digest": codes.name}},
        "settings": {"shard_rows": settings.index.shard_rows},
        "built_from": codes.name,
        "collection": _collection(manifest["inputs"]),
        "failed": manifest["failed"],
        "failed_in": [codes.uri] if manifest["failed"] else [],
    }


def _collection(inputs: Mapping[str, Mapping[str, str]]) -> str | None:
    """The collection that codes were made from: directly, or through features; the user's own features have none."""
    if "collections" in inputs:
        return inputs["collections"]["uri"]
    if "features" in inputs:
        collection: str | None = open_artefact(inputs["features"]["uri"], "features").manifest().get("collection")
        return collection
    return None


def _result(index: Index, started: float, *, skipped: bool) -> dict[str, Any]:
    failed = index.manifest.get("failed", 0)
    if failed and not skipped:
        say(f"index: {failed} images have no code and are not in the index; their reasons are in the codes")
    return {
        "stage": "index",
        "snapshot": index.uri,
        "version": index.version,
        "rows": index.rows,
        "failed": failed,
        "shards": len(index.manifest["shards"]),
        "seconds": time.perf_counter() - started,
        "skipped": skipped,
    }
