"""The commit of a re-index: new rows, tombstones, and notes about images without a row."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hashdist.collection.vocabulary import extend_vocabulary, number_labels
from hashdist.index import Applied, Index
from hashdist.index.candidate import Gate
from hashdist.index.notes import FOLDER, SEEN, SOURCES_SUFFIX, last_of_each, write_sources
from hashdist.store.commit import Artefact

if TYPE_CHECKING:  # brings torch with it, which a listing does without
    pass
from hashdist.reindex.encode import ENCODED, Outcome
from hashdist.reindex.find import Found, collection_of

COLUMNS = ["digest", "labels", "size", "stamp"]
"""What a row keeps beside code, id and key."""


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
    columns = rows.select(["digest", "size", "stamp"]).append_column("labels", number_labels(rows, numbers))
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
    return extend_vocabulary(known, names, found.reader()) if names else known


def base_vocabulary(index: Index) -> dict[str, int]:
    """The numbers that labels given as text have in this version."""
    known = index.manifest.get("vocabulary")
    if known is None:
        known = (collection_of(index.view) or {}).get("vocabulary", {})
    return dict(known)
