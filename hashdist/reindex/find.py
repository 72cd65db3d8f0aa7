"""The first two steps of a re-index: list the collection, and compare it with the index.

A parquet file or tar that is there as it was is not opened; one that is new or changed is read once, for digests.
Images of a folder are not read.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hashdist.collection.collection import KIND, ScanPlan
from hashdist.collection.listing import (
    Listing,
    chosen_format,
    kinds_of,
    named_store,
    reading_options,
    split_file,
)
from hashdist.collection.readers import FORMATS
from hashdist.collection.readers.reader import (
    SCANNED,
    Reader,
    is_hidden,
    source_stamp,
)
from hashdist.collection.salts import apply_salts
from hashdist.ground.errors import HashdistError, InvalidInput
from hashdist.ground.options import ReindexOptions
from hashdist.ground.schema import OK
from hashdist.ground.settings import CollectionSettings, Settings
from hashdist.ground.threads import in_order
from hashdist.index import Index
from hashdist.index.notes import read_sources
from hashdist.index.view import View
from hashdist.reindex import inventory
from hashdist.reindex.costs import Costs
from hashdist.reindex.difference import Difference, Spill, difference
from hashdist.reindex.inventory import LISTED
from hashdist.store import Entry, Store
from hashdist.store.commit import open_artefact

_IMAGES = "folder"  # the format whose keys a list of changes names
KNOWN = pa.schema([("digest", pa.string()), ("size", pa.int64()), ("stamp", pa.string())])
"""Columns of a row that a re-index compares."""

AT_ONCE = 8192
"""Rows of the difference that are Python values at a time."""

_SAMPLED_KEYS = 4096
_SCANS = 4  # units of parquet files or tars read at once


@dataclass(frozen=True)
class Increment:
    """A collection as it is listed now, and its difference from the index.

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
    format: str
    store: Store
    files: list[Entry]
    sources: list[str]
    options: dict[str, Any]
    listed: int
    change: Difference
    time: float

    @property
    def files_are_images(self) -> bool:
        """Whether each file is one image."""
        return FORMATS[self.format].files_are_images

    def reader(self) -> Reader:
        """Reader of the opened files; where files are images, of any image by its key."""
        return FORMATS[self.format].open(self.store, self.files, **self.options)

    def listing(self, rows: pa.Table) -> Listing:
        """These images, or the opened files that they are in, as a listing of their own."""
        state = blake2b(digest_size=16)
        for name in ("key", "size", "stamp"):
            state.update("\0".join(map(str, rows[name].to_pylist())).encode())
        return Listing(self.uri, self.format, self.store, self.files, self.options, state.hexdigest())

    def plan(self, rows: pa.Table, part_rows: int, salts: Mapping[str, int]) -> ScanPlan:
        """How the stages read these images, or the opened files that they are in."""
        read = replace(self, files=_entries(rows)) if self.files_are_images else self
        reader = read.reader()
        mine = set(rows["key"].to_pylist()) & salts.keys()
        return ScanPlan(reader, reader.units(part_rows), {key: salts[key] for key in mine})


def _entries(rows: pa.Table) -> list[Entry]:
    """Images that were listed, as the entries of a listing."""
    columns = (rows[name].to_pylist() for name in ("key", "size", "stamp"))
    return [Entry(key, size, stamp, 0.0) for key, size, stamp in zip(*columns, strict=True)]


def find(settings: Settings, index: Index, options: ReindexOptions, costs: Costs) -> Increment:
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
        if not listing.files_are_images:
            return _find_in_files(listing, view, options, costs)
        with costs.of("diff"):
            change = _difference(images, view, retry_failed=options.retry_failed)
        return replace(listing, listed=images.rows, change=change)


def _list(settings: CollectionSettings, options: ReindexOptions, view: View, images: Spill) -> Increment:
    """Names, sizes and stamps: of images into `images`, of parquet files and tars into what is returned."""
    store, started = named_store(settings), time.time()
    if options.inventory:
        report = inventory.read_inventory(options.inventory, store)
        started, blocks = _time_after(report.time, view, options.inventory) or started, report.blocks
    else:
        blocks = inventory.list_in_parallel(store, sample_keys(view))
    names = sort_out(blocks, images, view.salts, settings.format)
    uri = store.uri
    folder, name = split_file(store)
    if name and not names.counts and not names.others:
        store = folder
        names.take(kinds_of(entry for entry in store.list(name) if entry.name == name))
    chosen = chosen_format(uri, names.counts, names.others, settings)
    files = sorted(names.files.get(chosen, []))
    sources = [source_stamp(entry) for entry in files]
    return Increment(uri, chosen, store, files, sources, reading_options(settings, chosen), 0, _NOTHING, started)


def _find_in_files(listing: Increment, view: View, options: ReindexOptions, costs: Costs) -> Increment:
    """The images of parquet files and tars: those that the index knows as they are stay shut."""
    known = _known_sources(view, retry_failed=options.retry_failed)
    opened = [entry for entry in listing.files if source_stamp(entry) not in known]
    increment = replace(listing, files=opened)
    with Spill(SCANNED) as rows:
        with costs.of("listing"):
            _scan(increment, rows, view.salts)
        with costs.of("diff"):
            shut = known.intersection(listing.sources)
            change = _difference(rows, view, sources=shut, retry_failed=options.retry_failed)
    count = len(change.new) + len(change.touched) + change.unchanged + change.failed
    return replace(increment, listed=count, change=change)


def _find_changes(settings: Settings, view: View, options: ReindexOptions, costs: Costs) -> Increment:
    """As `find`, for the images that a list of changes names; about others nothing is asked."""
    store, started = named_store(settings.collection), time.time()
    if settings.collection.format not in ("auto", _IMAGES) or _format_of(view) not in (None, _IMAGES):
        raise InvalidInput(
            "a list of changes names images, so the collection must be a folder of them; parquet files and tars are "
            "compared file by file, leave out --changes"
        )
    with Spill(LISTED) as images:
        with costs.of("listing"):
            changes = inventory.read_changes(options.changes)
            put = [key for key in changes.put if kinds_of([Entry(key, 0, "", 0.0)])[_IMAGES] and not is_hidden(key)]
            for block in inventory.look_up(store, put):
                images.add(inventory.listed_rows(block, view.salts))
        with costs.of("diff"):
            indexed = _rows_of(view, [*put, *changes.deleted])
            change = _difference(images, view, indexed=indexed, retry_failed=options.retry_failed)
    reading = reading_options(settings.collection, _IMAGES)
    return Increment(store.uri, _IMAGES, store, [], [], reading, images.rows, change, started)


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

    counts: Counter[str] = field(default_factory=Counter)
    files: dict[str, list[Entry]] = field(default_factory=dict)
    others: list[Entry] = field(default_factory=list)

    def take(self, kinds: Mapping[str, list[Entry]]) -> None:
        for kind, entries in kinds.items():
            self.counts[kind] += len(entries)
            if not FORMATS[kind].files_are_images:
                self.files.setdefault(kind, []).extend(entries)


def sort_out(blocks: Iterable[list[Entry]], images: Spill, salts: Mapping[str, int], wanted: str) -> _Names:
    """Image files into `images`, the rest into what is returned; hidden files nowhere."""
    names = _Names()
    for block in blocks:
        plain = [entry for entry in block if not is_hidden(entry.name)]
        kinds = kinds_of(plain)
        names.take(kinds)
        for kind, entries in kinds.items():
            if entries and FORMATS[kind].files_are_images and wanted in ("auto", kind):
                images.add(inventory.listed_rows(entries, salts))
        names.others = names.others or plain[:100]
    return names


def _time_after(created: float | None, view: View, uri: str) -> float | None:
    """The time of an inventory. Raises InvalidInput if the index has seen the collection later than that."""
    seen = view.manifest.get("listed_at")
    if created is not None and seen is not None and created < seen:
        raise InvalidInput(
            f"{uri} was begun {seen - created:.0f} s before the listing that {view.uri} follows, so images that came "
            "in between would be removed; wait for the next inventory, or list the collection"
        )
    return created


def sample_keys(view: View) -> list[str]:
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


def _scan(increment: Increment, rows: Spill, salts: Mapping[str, int]) -> None:
    """Every image of the opened files, read once for its digest."""
    if increment.files:
        reader = increment.reader()
        for table in in_order(reader.scan, reader.units(AT_ONCE), _SCANS):
            rows.add(apply_salts(table, salts))


def _format_of(view: View) -> str | None:
    """Format of the collection that the index was built from; None where none is known."""
    manifest = _collection_of(view)
    return manifest["format"] if manifest else None


def _collection_of(view: View) -> dict[str, Any] | None:
    """The manifest of the collection that an index was built from, if it is still there."""
    uri = view.manifest.get("collection")
    try:
        return open_artefact(uri, KIND).manifest() if uri else None
    except HashdistError:  # deleted, or never one of ours: it only tells the numbers of labels and the format
        return None


def base_vocabulary(view: View) -> dict[str, int]:
    """The numbers that labels given as text have in this version."""
    known = view.manifest.get("vocabulary")
    if known is None:
        known = (_collection_of(view) or {}).get("vocabulary", {})
    return dict(known)
