"""The commit of a re-index: new rows, tombstones, and notes about images without a row."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hashdist.collection.vocabulary import extend_vocabulary, number_labels
from hashdist.index import Applied, Index
from hashdist.index.candidate import Gate
from hashdist.index.notes import FOLDER, SEEN, SOURCES_SUFFIX, last_of_each, write_sources
from hashdist.reindex.encode import ENCODED, Encoded
from hashdist.reindex.find import Increment, base_vocabulary

COLUMNS = ["digest", "labels", "size", "stamp"]
"""Columns that a row keeps beside code, id and key."""


def commit(
    index: Index, increment: Increment, encoded: Encoded, *, gate: Gate | None = None, **lineage: Any
) -> Applied:
    """Commit an increment as one version: new rows, tombstones for what changed or is gone, and notes.

    Args:
        index: opened as the newest version; rows that another writer brought meanwhile with the same content digest
            are not written again.
        increment: what was to be done.
        encoded: its images. Those that failed to encode stay as they are.
        gate: see `Index.apply`.
        lineage: more fields for the manifest.

    Returns and raises as `Index.apply`.
    """
    rows = pa.concat_tables([ENCODED.empty_table(), *encoded.rows])
    numbers = _vocabulary(index, increment, encoded, rows)
    columns = rows.select(["digest", "size", "stamp"]).append_column("labels", number_labels(rows, numbers))
    more: dict[str, Any] = {}
    if index.manifest.get("rerank") is not None or encoded.features:
        more["rerank"] = np.concatenate(encoded.features) if encoded.features else np.empty((0, 0), np.float16)
    if numbers != (index.manifest.get("vocabulary") or {}):
        lineage["vocabulary"] = numbers
    if increment.sources and (encoded.rows or encoded.notes or increment.change.removed):
        name = index.versions.new_attempt().new(FOLDER, SOURCES_SUFFIX)
        lineage["sources"] = write_sources(index.store, name, increment.sources)
    codes = encoded.artefact
    about = {
        "inputs": {
            "listing": {"uri": increment.uri, "format": increment.format},
            **({"codes": {"uri": codes.uri, "digest": codes.name}} if codes else {}),
        },
        "listed_at": increment.time,
        "failed": encoded.failed.total(),
    }
    return index.apply(
        np.concatenate([np.empty((0, index.bits // 8), np.uint8), *encoded.codes]),
        rows["key"].to_pylist(),
        columns.select(COLUMNS),
        removed=increment.change.removed,
        model=index.model,
        operation="reindex",
        lineage={**about, **lineage},
        gate=gate,
        seen=last_of_each([pa.Table.from_pylist(encoded.notes, schema=SEEN)]),
        **more,
    )


def _vocabulary(index: Index, increment: Increment, encoded: Encoded, rows: pa.Table) -> dict[str, int]:
    """Numbers of labels given as text: those of the collection that the index was built from, new ones after them."""
    if encoded.vocabulary is not None:
        return encoded.vocabulary
    known = base_vocabulary(index.view)
    names = pc.unique(pc.list_flatten(rows["names"])).to_pylist()
    return extend_vocabulary(known, names, increment.reader()) if names else known
