"""Stage: growth. An index follows its collection: only what was added or changed is read and encoded, in one commit.

1. list: names, sizes and stamps, by LIST, from an S3 Inventory, or from a list of changes
   (hashdist/reindex/inventory.py). A parquet file or tar that is there as it was is not opened; one that is new or
   changed is read once, for digests.
2. diff: by key, size and stamp against the index (hashdist/reindex/difference.py).
3. encode: images that are new, and those whose bytes differ by content digest. Here: up to a few thousand, in this
   process, with the model itself; hashdist/reindex/run.py takes the feature and encoding stages for more.
4. commit: new rows, tombstones for what changed or is gone, and notes about images that get no row.

An image whose stamp changed and whose bytes did not is noted with its new stamp (hashdist/index/notes.py); its row
stays where it is. So is one that no code can be made of. Either is left alone from then on, until its stamp changes
again.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.collection.collection import (
    KIND,
    Format,
    Listing,
    Plan,
    chosen_format,
    extended,
    kinds_of,
    named_store,
    numbered,
    reading_options,
    salted,
    split_file,
)
from hashdist.collection.readers.reader import (
    SCANNED,
    UNREADABLE,
    FolderReader,
    Lost,
    ParquetReader,
    Reader,
    TarReader,
    content_digest,
    is_hidden,
    source_stamp,
)
from hashdist.collection.vectors import UNUSABLE
from hashdist.ground import telemetry
from hashdist.ground.errors import HashdistError, InvalidInput
from hashdist.ground.schema import OK
from hashdist.ground.settings import CollectionSettings, ReindexOptions, Settings
from hashdist.ground.telemetry import NO_TRAFFIC, Traffic
from hashdist.ground.threads import in_order
from hashdist.index import Applied, Index
from hashdist.index.notes import FOLDER, SEEN, SOURCES_SUFFIX, last_of_each, read_sources, write_sources
from hashdist.index.promotion import Gate
from hashdist.index.view import View
from hashdist.reindex import inventory
from hashdist.reindex.difference import Difference, Spill, difference
from hashdist.reindex.inventory import LISTED
from hashdist.store import Entry, Store
from hashdist.store.commit import Artefact, open_artefact

if TYPE_CHECKING:  # brings torch with it, which a listing does without
    from hashdist.models.model import Model

COLUMNS = ["digest", "labels", "size", "stamp"]
"""What a row keeps beside code, id and key."""

KNOWN = pa.schema([("digest", pa.string()), ("size", pa.int64()), ("stamp", pa.string())])
"""What of it a re-index compares."""

SAMPLE = 32
"""Images that are encoded first, to tell how long the others will take."""

_NOT_FINITE = "not-finite"
_SAMPLED_KEYS = 4096
_SCANS = 4  # units of parquet files or tars read at once
_AT_ONCE = 8192  # rows of the difference as Python values at a time


# What it costs


class Costs:
    """Seconds, requests to stores and bytes of each phase of a run; a phase within another is counted on its own."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, Any]] = {}
        self._within: list[tuple[float, Traffic]] = [(0.0, NO_TRAFFIC)]

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Add what the block costs to a phase."""
        started, before = time.perf_counter(), telemetry.traffic()
        self._within.append((0.0, NO_TRAFFIC))
        try:
            yield
        finally:
            seconds, moved = time.perf_counter() - started, telemetry.traffic().since(before)
            inner_seconds, inner = self._within.pop()
            outer_seconds, outer = self._within.pop()
            self._within.append((outer_seconds + seconds, outer.plus(moved)))
            spent = moved.since(inner)
            known = self.phases.setdefault(phase, {"seconds": 0.0, "requests": {}, "read": 0, "written": 0})
            known["seconds"] += seconds - inner_seconds
            known["requests"] = dict(Counter(known["requests"]) + spent.requests)
            known["read"] += spent.read
            known["written"] += spent.written

    def line(self) -> str:
        """All in one line."""
        return "; ".join(
            f"{name} {cost['seconds']:.2f} s, {sum(cost['requests'].values())} requests, {cost['read']} B read"
            for name, cost in self.phases.items()
        )

    def lines(self) -> list[str]:
        """A line for each phase."""
        return [
            f"{name:>8}  {cost['seconds']:8.2f} s  {sum(cost['requests'].values()):8} requests"
            f"  {cost['read']:>12} B read  {cost['written']:>10} B written"
            f"  {' '.join(f'{op} {count}' for op, count in sorted(cost['requests'].items()))}"
            for name, cost in self.phases.items()
        ]


# Listing and diff


@dataclass(frozen=True)
class Found:
    """What a listing found, and what is to be done about it.

    Attributes:
        uri: of the collection.
        format: of its files.
        store: that names are relative to.
        files: parquet files or tars that were opened: new, or changed.
        sources: stamps of all of them.
        listed: images, with those of files that were not opened.
        change: against the index.
        time: unix seconds before which everything has been seen.
    """

    uri: str
    format: Format
    store: Store
    files: list[Entry]
    sources: list[str]
    options: dict[str, Any]
    listed: int
    change: Difference
    time: float

    def reader(self) -> Reader:
        """Of the images to be read."""
        if self.format == "folder":
            return FolderReader(self.store, SCANNED.empty_table(), self.options["labels"])
        if self.format == "parquet":
            return ParquetReader.open(self.store, self.files, **self.options)
        return TarReader(self.store, self.files, self.options["labels"])

    def listing(self, rows: pa.Table) -> Listing:
        """These images, or the opened files that they are in, as a listing of their own."""
        state = blake2b(digest_size=16)
        for name in ("key", "size", "stamp"):
            state.update("\0".join(map(str, rows[name].to_pylist())).encode())
        return Listing(self.uri, self.format, self.store, self.files, self.options, state.hexdigest())

    def plan(self, rows: pa.Table, part_rows: int, salts: Mapping[str, int]) -> Plan:
        """How the stages read these images, or the opened files that they are in."""
        reader = self.reader()
        if isinstance(reader, FolderReader):
            reader = replace(reader, rows=rows.select(LISTED.names).sort_by("id"))
        mine = set(rows["key"].to_pylist()) & salts.keys()
        return Plan(reader, reader.units(part_rows), {key: salts[key] for key in mine})


def find(settings: Settings, index: Index, options: ReindexOptions, costs: Costs) -> Found:
    """List the collection and compare it with the index's present version. Reads no image of a folder.

    Raises InvalidInput for a collection that is missing, empty or of mixed formats; as `read_inventory` and
    `read_changes`; for an inventory older than what the index has seen already.
    """
    view = index.view
    if options.changes and options.inventory:
        raise InvalidInput("a re-index follows --changes or reads an --inventory, found both; give one of them")
    if settings.collection.snapshot:
        raise InvalidInput("a re-index lists the collection as it is now; leave out --collection.snapshot")
    if options.changes:
        return _find_changes(settings, view, options, costs)
    with Spill(LISTED) as images:
        with costs.of("listing"):
            listing = _list(settings.collection, options, view, images)
        if listing.format != "folder":
            return _find_in_files(listing, view, options, costs)
        with costs.of("diff"):
            change = _difference(images, view, retry_failed=options.retry_failed)
        return replace(listing, listed=images.rows, change=change)


def _list(settings: CollectionSettings, options: ReindexOptions, view: View, images: Spill) -> Found:
    """Names, sizes and stamps: of images into `images`, of parquet files and tars into what is returned."""
    store, started = named_store(settings), time.time()
    if options.inventory:
        report = inventory.read_inventory(options.inventory, store)
        started, blocks = _newer(report.time, view, options.inventory) or started, report.blocks
    else:
        blocks = inventory.listed(store, _sample(view))
    names = _sort_out(blocks, images, view.salts)
    uri = store.uri
    folder, name = split_file(store)
    if name and not names.counts and not names.others:
        store = folder
        names.take(kinds_of(entry for entry in store.list(name) if entry.name == name))
    chosen = chosen_format(uri, names.counts, names.others, settings)
    files = sorted(names.files.get(chosen, []))
    sources = [source_stamp(entry) for entry in files]
    return Found(uri, chosen, store, files, sources, reading_options(settings, chosen), 0, _NOTHING, started)


def _find_in_files(listing: Found, view: View, options: ReindexOptions, costs: Costs) -> Found:
    """The images of parquet files and tars: those that the index knows as they are stay shut."""
    known = _known_sources(view, retry_failed=options.retry_failed)
    opened = [entry for entry in listing.files if source_stamp(entry) not in known]
    found = replace(listing, files=opened)
    with Spill(SCANNED) as rows:
        with costs.of("listing"):
            _scan(found, rows, view.salts)
        with costs.of("diff"):
            shut = known.intersection(listing.sources)
            change = _difference(rows, view, sources=shut, retry_failed=options.retry_failed)
    count = len(change.new) + len(change.touched) + change.unchanged + change.failed
    return replace(found, listed=count, change=change)


def _find_changes(settings: Settings, view: View, options: ReindexOptions, costs: Costs) -> Found:
    """As `find`, for the images that a list of changes names; about others nothing is asked."""
    store, started = named_store(settings.collection), time.time()
    if settings.collection.format not in ("auto", "folder") or _format_of(view) not in (None, "folder"):
        raise InvalidInput(
            "a list of changes names images, so the collection must be a folder of them; parquet files and tars are "
            "compared file by file, leave out --changes"
        )
    with Spill(LISTED) as images:
        with costs.of("listing"):
            changes = inventory.read_changes(options.changes)
            put = [key for key in changes.put if kinds_of([Entry(key, 0, "", 0.0)])["folder"] and not is_hidden(key)]
            for block in inventory.looked_up(store, put):
                images.add(inventory.table(block, view.salts))
        with costs.of("diff"):
            indexed = _rows_of(view, [*put, *changes.deleted])
            change = _difference(images, view, indexed=indexed, retry_failed=options.retry_failed)
    reading = reading_options(settings.collection, "folder")
    return Found(store.uri, "folder", store, [], [], reading, images.rows, change, started)


def _rows_of(view: View, keys: list[str]) -> pa.Table:
    places = view.find(keys)
    here = np.flatnonzero(places.present)
    there = places.take(here)
    about = {name: view.column(there, name) for name in KNOWN.names}
    return pa.table(
        {"id": there.ids, "key": pa.array([keys[i] for i in here], pa.large_string()), **about},
        schema=pa.schema([("id", pa.int64()), ("key", pa.large_string()), *KNOWN]),
    )


def _difference(listed: Spill, view: View, *, indexed: pa.Table | None = None, **more: Any) -> Difference:
    def between(first: int, last: int) -> pa.Table:
        if indexed is None:
            return view.rows_between(first, last, KNOWN)
        ids = indexed["id"].to_numpy()
        return indexed.filter(pa.array((ids >= first) & (ids <= last)))

    rows = int(view.manifest["rows"]) if indexed is None else len(indexed)
    return difference(listed, between, view.notes_between, rows, **more)


_NOTHING = Difference(SCANNED.empty_table(), SCANNED.empty_table(), [], 0, 0)


@dataclass
class _Names:
    """A listing, sorted out by format: counts of all, and the files that are not images themselves."""

    counts: Counter[Format] = field(default_factory=Counter)
    files: dict[Format, list[Entry]] = field(default_factory=dict)
    others: list[Entry] = field(default_factory=list)

    def take(self, kinds: Mapping[Format, list[Entry]]) -> None:
        for kind, entries in kinds.items():
            self.counts[kind] += len(entries)
            if kind != "folder":
                self.files.setdefault(kind, []).extend(entries)


def _sort_out(blocks: Iterable[list[Entry]], images: Spill, salts: Mapping[str, int]) -> _Names:
    """Image files into `images`, the rest into what is returned; hidden files nowhere."""
    names = _Names()
    for block in blocks:
        plain = [entry for entry in block if not is_hidden(entry.name)]
        kinds = kinds_of(plain)
        names.take(kinds)
        if kinds["folder"]:
            images.add(inventory.table(kinds["folder"], salts))
        names.others = names.others or plain[:100]
    return names


def _newer(created: float | None, view: View, uri: str) -> float | None:
    """The time of an inventory. Raises InvalidInput if the index has seen the collection later than that."""
    seen = view.manifest.get("listed_at")
    if created is not None and seen is not None and created < seen:
        raise InvalidInput(
            f"{uri} was begun {seen - created:.0f} s before the listing that {view.uri} follows, so images that came "
            "in between would be removed; wait for the next inventory, or list the collection"
        )
    return created


def _sample(view: View) -> list[str]:
    """Keys of the smallest ids of every shard: ids are hashes, so these lie evenly among all keys."""
    rows = max(1, sum(shard.rows for shard in view.shards))
    counts = [-(-_SAMPLED_KEYS * shard.rows // rows) for shard in view.shards]
    return [
        key
        for shard, count in zip(view.shards, counts, strict=True)
        for key in shard.keys(np.arange(min(count, shard.rows)))
    ]


def _known_sources(view: View, *, retry_failed: bool) -> set[str]:
    """Stamps of the files whose images the index has all; without those with failures that are to be retried."""
    entry = view.manifest.get("sources")
    known = read_sources(view.log.store, entry) if entry else set()
    if retry_failed:
        notes = view.notes_between(0, (1 << 63) - 1)
        known -= set(notes["stamp"].filter(pc.not_equal(notes["status"], OK)).to_pylist())
    return known


def _scan(found: Found, rows: Spill, salts: Mapping[str, int]) -> None:
    """Every image of the opened files, read once for its digest."""
    if found.files:
        reader = found.reader()
        for table in in_order(reader.scan, reader.units(_AT_ONCE), _SCANS):
            rows.add(salted(table, salts))


def _format_of(view: View) -> str | None:
    """Format of the collection that the index was built from; None where none is known."""
    manifest = _collection(view)
    return manifest["format"] if manifest else None


def _collection(view: View) -> dict[str, Any] | None:
    uri = view.manifest.get("collection")
    try:
        return open_artefact(uri, KIND).manifest() if uri else None
    except HashdistError:  # deleted, or never one of ours: it only tells the numbers of labels and the format
        return None


# Encoding here


ENCODED = pa.schema(
    [
        pa.field("key", pa.large_string()),
        *(SCANNED.field(name) for name in ("digest", "labels", "size", "stamp", "names")),
    ]
)
"""What is known of an image beside its code: `names` are labels given as text."""

Row = dict[str, Any]


@dataclass
class Outcome:
    """What has come of the images of a difference so far.

    Attributes:
        rows: ENCODED, of those that have a code.
        codes: theirs, uint8 [n, W].
        features: theirs, [n, D], where they are asked for.
        notes: SEEN, about those that have no code, or need none.
        failed: how many have none, by reason.
    """

    rows: list[pa.Table] = field(default_factory=list)
    codes: list[NDArray[np.uint8]] = field(default_factory=list)
    features: list[NDArray[Any]] = field(default_factory=list)
    notes: list[Row] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def same(self, row: Row, digest: str) -> None:
        """An image whose row is right as it is."""
        self._note(row, digest, OK, None)

    def bad(self, row: Row, digest: str | None, reason: str) -> None:
        """An image that no code can be made of."""
        slug = reason.partition(":")[0]
        self.failed[slug] += 1
        self._note(row, digest, UNUSABLE if slug == _NOT_FINITE else UNREADABLE, reason)

    def _note(self, row: Row, digest: str | None, status: str, reason: str | None) -> None:
        about = {name: row[name] for name in ("id", "key", "size", "stamp")}
        self.notes.append({**about, "digest": digest, "status": status, "reason": reason})


def to_look_at(change: Difference) -> pa.Table:
    """The images that are new or touched, in the order in which their sources are read."""
    new = change.new.append_column("indexed_digest", pa.nulls(len(change.new), pa.string()))
    rows = pa.concat_tables([change.touched, new])
    in_files = "source" in rows.column_names
    return rows.sort_by([("source", "ascending"), ("position", "ascending")]) if in_files else rows


def differing(found: Found, rows: pa.Table, outcome: Outcome) -> pa.Table:
    """Those of the rows that are new, or whose bytes differ; `outcome` is told about the others."""
    if "digest" in rows.column_names:  # of parquet files and tars, which were read for it
        fine = pc.equal(rows["status"], OK)
        for row in rows.filter(pc.invert(fine)).to_pylist():
            outcome.bad(row, None, row["reason"])
        same = pc.fill_null(pc.equal(rows["digest"], rows["indexed_digest"]), False)
        for row in rows.filter(pc.and_(fine, same)).to_pylist():
            outcome.same(row, row["digest"])
        return rows.filter(pc.and_(fine, pc.invert(same)))
    indexed = pc.is_valid(rows["indexed_digest"])
    ids = [row["id"] for row, _ in pictures(found, rows.filter(indexed), outcome)]
    return rows.filter(pc.or_(pc.invert(indexed), pc.is_in(rows["id"], pa.array(ids, pa.int64()))))


def pictures(found: Found, rows: pa.Table, outcome: Outcome) -> Iterator[tuple[Row, bytes]]:
    """The images that have to be encoded, with their bytes, each read once; `outcome` is told about the others.

    `row["digest"]` is that of the bytes that come with it.
    """
    reader = found.reader() if len(rows) else None
    for start in range(0, len(rows), _AT_ONCE):
        some = rows.slice(start, _AT_ONCE)
        read = _by_key(reader, some) if isinstance(reader, FolderReader) else _from_files(reader, some)
        for row, data in read:
            if isinstance(data, Lost):
                outcome.bad(row, None, data.reason)
                continue
            digest = content_digest(data)
            if digest == row["indexed_digest"]:
                outcome.same(row, digest)
            else:
                yield {**row, "digest": digest}, data


def _by_key(reader: FolderReader, rows: pa.Table) -> Iterator[tuple[Row, bytes | Lost]]:
    for row, (_, data) in zip(rows.to_pylist(), reader.read_keys(rows["key"].to_pylist()), strict=True):
        folder, slash, _ = row["key"].partition("/")
        yield {**row, "names": [folder] if reader.labels and slash else None, "labels": None}, data


def _from_files(reader: Reader | None, rows: pa.Table) -> Iterator[tuple[Row, bytes | Lost]]:
    assert reader is not None
    for source in pc.unique(rows["source"]).to_pylist():
        here = rows.filter(pc.equal(rows["source"], source))
        yield from zip(here.to_pylist(), reader.read(here.select(SCANNED.names)), strict=True)


def encode(model: "Model", images: Iterable[tuple[Row, bytes]], outcome: Outcome, *, features: bool) -> int:
    """Encode images in this process; returns how many. A code is the same bits as the stages' own (decision S10)."""
    rows: list[Row] = []

    def passing() -> Iterator[bytes]:
        for row, data in images:
            rows.append(row)
            yield data

    encoded = model.encode_readable(passing(), keep_features=features)
    good = [number for number, reason in enumerate(encoded.reasons) if reason is None]
    for row, reason in zip(rows, encoded.reasons, strict=True):
        if reason is not None:
            outcome.bad(row, row["digest"], reason)
    kept = [{name: rows[number][name] for name in ENCODED.names} for number in good]
    outcome.rows.append(pa.Table.from_pylist(kept, schema=ENCODED))
    outcome.codes.append(encoded.codes[good])
    if encoded.features is not None:
        outcome.features.append(encoded.features[good])
    return len(rows)


# The plan


def estimate(found: Found, images_per_s: float | None = None) -> dict[str, Any]:
    """What a run is going to cost, as far as it can be told before: counts, bytes, requests; seconds from a speed."""
    change = found.change
    look = len(change.new) + len(change.touched)
    # four files of a shard, notes about what turns out to be the same, a tombstone, and the manifest
    hides = bool(change.removed or len(change.touched))
    files = 4 * bool(look) + bool(len(change.touched)) + hides + 1 if look or hides else 0
    return {
        "new": len(change.new),
        "touched": len(change.touched),
        "removed": len(change.removed),
        "unchanged": change.unchanged,
        "read_bytes": sum(int(pc.sum(rows["size"]).as_py() or 0) for rows in (change.new, change.touched)),
        "get_requests": look if found.format == "folder" else len(found.files),
        "put_requests": files,
        "images_per_s": round(images_per_s, 1) if images_per_s else None,
        "seconds": round(look / images_per_s, 6) if images_per_s else None,
    }


# Commit


def commit(
    index: Index,
    found: Found,
    outcome: Outcome,
    *,
    vocabulary: Mapping[str, int] | None = None,
    gate: Gate | None = None,
    codes: Artefact | None = None,
    **lineage: Any,
) -> Applied:
    """Commit a difference as one version: new rows, tombstones for what changed or is gone, and notes.

    Args:
        index: opened as the newest version; rows that another writer brought meanwhile with the same content digest
            are not written again.
        found: what was to be done.
        outcome: what came of it. Images that failed to encode stay as they are.
        vocabulary: numbers of the labels that `outcome` has as text, where they are known.
        gate: see `Index.apply`.
        codes: committed ones that `outcome` took its codes from, if it did.
        lineage: more fields for the manifest.

    Returns and raises as `Index.apply`.
    """
    rows = pa.concat_tables([ENCODED.empty_table(), *outcome.rows])
    numbers = _vocabulary(index, found, rows) if vocabulary is None else vocabulary
    columns = rows.select(["digest", "size", "stamp"]).append_column("labels", numbered(rows, numbers))
    more: dict[str, Any] = {}
    if index.manifest.get("rerank") is not None or outcome.features:
        more["rerank"] = np.concatenate(outcome.features) if outcome.features else np.empty((0, 0), np.float16)
    if dict(numbers) != (index.manifest.get("vocabulary") or {}):
        lineage["vocabulary"] = dict(numbers)
    if found.sources and (outcome.rows or outcome.notes or found.change.removed):
        name = index.versions.new_attempt().new(FOLDER, SOURCES_SUFFIX)
        lineage["sources"] = write_sources(index.store, name, found.sources)
    about = {
        "inputs": {
            "listing": {"uri": found.uri, "format": found.format},
            **({"codes": {"uri": codes.uri, "digest": codes.name}} if codes else {}),
        },
        "listed_at": found.time,
        "failed": outcome.failed.total(),
    }
    return index.apply(
        np.concatenate([np.empty((0, index.bits // 8), np.uint8), *outcome.codes]),
        rows["key"].to_pylist(),
        columns.select(COLUMNS),
        removed=found.change.removed,
        model=index.model,
        operation="reindex",
        lineage={**about, **lineage},
        gate=gate,
        seen=last_of_each([pa.Table.from_pylist(outcome.notes, schema=SEEN)]),
        **more,
    )


def _vocabulary(index: Index, found: Found, rows: pa.Table) -> dict[str, int]:
    """Numbers of labels given as text: those of the collection that the index was built from, new ones after them."""
    known = base_vocabulary(index)
    names = pc.unique(pc.list_flatten(rows["names"])).to_pylist()
    return extended(known, names, found.reader()) if names else known


def base_vocabulary(index: Index) -> dict[str, int]:
    """The numbers that labels given as text have in this version."""
    known = index.manifest.get("vocabulary")
    if known is None:
        known = (_collection(index.view) or {}).get("vocabulary", {})
    return dict(known)
