"""Many images of a difference, encoded by the stages on Ray as a collection of their own.

What is committed on the way is found by a later run.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hashdist.collection.collection import KIND, subset
from hashdist.ground.schema import OK, from_vectors
from hashdist.ground.settings import Settings
from hashdist.index import Index
from hashdist.reindex.encode import ENCODED, Encoded
from hashdist.reindex.find import Increment, base_vocabulary
from hashdist.stages import collection, encode, features
from hashdist.stages.cluster.session import session
from hashdist.store import open_store
from hashdist.store.commit import Artefact, artefact, open_artefact, read_table
from hashdist.store.vectors import read_vectors, vectors


class _Made(NamedTuple):
    """Artefacts of the images: the collection, its codes, and its features unless codes were made of images."""

    part: Artefact
    codes: Artefact
    features: Artefact | None


def encode_on_ray(
    settings: Settings, index: Index, increment: Increment, rows: pa.Table, encoded: Encoded, *, features: bool
) -> None:
    """Encode images through the stages, and add what they make to `encoded`.

    Args:
        settings: of the run.
        index: whose model encodes.
        increment: that the images belong to.
        rows: the images.
        encoded: what is encoded so far.
        features: keep their features too.

    Raises as the stages.
    """
    model = open_artefact(str(index.model_uri), "models")
    with session(settings.cluster):
        whole, made = _run_stages(_own_artefacts(settings, model), index, increment, rows, model)
    encoded.vocabulary = dict(whole.manifest()["vocabulary"])
    encoded.artefact = made.codes
    _take(made, encoded, features=features)


def _own_artefacts(settings: Settings, model: Artefact) -> Settings:
    """The settings in the model's mode, without the artefacts that they name, which are of other images."""
    return replace(
        settings,
        features=replace(settings.features, snapshot=""),
        train=replace(settings.train, mode=model.manifest()["mode"]),
        encode=replace(settings.encode, snapshot=""),
    )


def _run_stages(
    settings: Settings, index: Index, increment: Increment, rows: pa.Table, model: Artefact
) -> tuple[Artefact, _Made]:
    """The collection of these images, or of the opened files that they are in; and what is made of the images."""
    part_rows = settings.collection.part_rows
    listing = increment.listing(rows)
    inputs = {"uri": listing.uri, "listing": listing.digest}
    root = open_store(settings.root)
    whole = artefact(root, KIND, inputs=inputs, settings={"part_rows": part_rows}, revision=collection.REVISION)
    if not whole.exists():
        planned = increment.plan(rows, part_rows, index.view.salts)
        collection.commit_plan(settings, whole, planned, listing, base_vocabulary(index.view))
    part = subset(root, whole, rows["id"].to_pylist()) if increment.files else whole
    if model.manifest()["mode"] == "images":
        made = None
    else:
        made = open_artefact(features.run(settings, part)["snapshot"], features.KIND)
    codes = open_artefact(encode.run(settings, model, made or part)["snapshot"], encode.KIND)
    return whole, _Made(part, codes, made)


def _take(made: _Made, encoded: Encoded, *, features: bool) -> None:
    """Committed codes into `encoded`, with size and stamp as they were listed."""
    files = made.part.manifest()["files"]
    listed = pa.concat_tables(read_table(made.part.store, file, ["id", "size", "stamp"]) for file in files)
    rows = pa.concat_tables(vectors(made.codes, "code")).sort_by("id")
    places = pa.array(np.searchsorted(listed["id"].to_numpy(), rows["id"].to_numpy()))
    for name in ("size", "stamp"):
        rows = rows.append_column(name, listed[name].take(places))
    good = pc.equal(rows["status"], OK)
    for row in rows.filter(pc.invert(good)).drop_columns("code").to_pylist():
        encoded.bad(row, row["digest"], row["reason"])
    kept = rows.filter(good)
    encoded.codes.append(np.asarray(from_vectors(kept["code"], kept.schema), np.uint8))
    kept = kept.append_column("names", pa.nulls(len(kept), pa.list_(pa.string())))
    encoded.rows.append(kept.select(ENCODED.names).cast(ENCODED))
    if features and made.features is not None:
        found = read_vectors(made.features, ["feature"], kept["id"].to_numpy())
        encoded.features.append(from_vectors(found["feature"], found.schema))
