"""Notes on images without a row, so that they are neither read nor encoded again.

Two kinds of images are noted here: those whose size or stamp is another one than their row says while their bytes are
the same, and those that no code could be made of, with status and reason. A file of notes joins the index in the
version of the increment that looked; of several notes about an image the last one holds. Nothing of a row is written
again for it. Notes are hints: without them images are read once more, and answers are the same.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from hashdist.index.shards.shard import local_file
from hashdist.store import Store
from hashdist.store.commit import write_file

FOLDER = "seen"
SUFFIX = ".seen.arrow"

SEEN = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("digest", pa.string()),  # content digest; null where the bytes could not be had
        pa.field("size", pa.int64()),  # as listed
        pa.field("stamp", pa.string()),  # as listed
        pa.field("status", pa.string(), nullable=False),  # OK: the row is right as it is
        pa.field("reason", pa.string()),
    ]
)

SOURCES_SUFFIX = ".sources.json"

MOST_FILES = 8
"""Files of notes in a version; more are merged into one by the increment that would add another."""


def write_seen(store: Store, name: str, notes: pa.Table) -> dict[str, Any]:
    """Write notes; returns the file's entry. They name keys, so a purge has to look here (see erasure)."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SEEN) as writer:
        writer.write_table(notes.select(SEEN.names).cast(SEEN))
    return write_file(store, name, memoryview(sink.getvalue()), len(notes))


def read_seen(store: Store, entry: Mapping[str, Any]) -> pa.Table:
    """The notes that `write_seen` wrote."""
    with pa.memory_map(str(local_file(store, entry))) as source:
        return pa.ipc.open_file(source).read_all()


def write_sources(store: Store, name: str, stamps: Iterable[str]) -> dict[str, Any]:
    """Write the stamps of the parquet files and tars whose images a version has all; returns the file's entry."""
    return write_file(store, name, json.dumps(sorted(stamps)).encode())


def read_sources(store: Store, entry: Mapping[str, Any]) -> set[str]:
    """The stamps that `write_sources` wrote."""
    return set(json.loads(local_file(store, entry).read_bytes()))


def last_of_each(tables: Iterable[pa.Table]) -> pa.Table:
    """The last note about each image, by ascending id."""
    notes = pa.concat_tables([SEEN.empty_table(), *tables]).combine_chunks()
    ids = notes["id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    last = np.append(ids[order][1:] != ids[order][:-1], True) if len(ids) else np.zeros(0, np.bool_)
    return notes.take(pa.array(order[last]))


def new_notes(notes: pa.Table, known: pa.Table) -> pa.Table:
    """Those of `notes` that say something else than `known`, both with one note an image by ascending id."""
    places = np.searchsorted(known["id"].to_numpy(), notes["id"].to_numpy()).clip(max=max(len(known) - 1, 0))
    if not len(known):
        return notes
    there = known.take(pa.array(places))
    facts = ["id", "digest", "size", "stamp", "status"]
    pairs = zip(notes.select(facts).to_pylist(), there.select(facts).to_pylist(), strict=True)
    return notes.filter(pa.array([mine != other for mine, other in pairs], pa.bool_()))
