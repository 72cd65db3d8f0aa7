"""Two-stage ranking: Hamming candidates first, then the exact cosine of their features.

With `index.rerank: true` every shard has one more row-aligned file, the features as float16 rows of length 1; the
manifest says what they are (`rerank`: their width, and what made them). Either all rows of a version have features or
none do: a change without them is refused where the index keeps them, and a search by them where it does not.

The order is (cosine descending, id ascending). Cosines are taken in float64 in a fixed order of sums
(hashdist/nearest/cosine.py), so they do not depend on the other candidates, on shards or on the machine.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.index.view import View
from hashdist.nearest import scan
from hashdist.nearest.cosine import similarity

PART = "rerank"
"""The part of a shard that holds the features, and the field of a manifest that says what they are."""

CANDIDATES_PER_RESULT = 10


def unit_rows(features_ND: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """The features as they are kept: float16 [N, D], every row of length 1 (a row of zeros stays zero).

    Raises InvalidInput for another shape or type, and for values that are not finite.
    """
    features = np.asarray(features_ND)
    if features.ndim != 2 or features.dtype.kind != "f" or not features.shape[1]:
        raise InvalidInput(f"features must be floats [N, D], found {features.dtype} {list(features.shape)}")
    if not np.isfinite(features).all():
        raise InvalidInput("features must be finite, found NaN or infinity; leave these rows out")
    rows = features.astype(np.float64)
    rows /= np.abs(rows).max(axis=1, keepdims=True, initial=np.finfo(np.float64).tiny)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(min=np.finfo(np.float64).tiny)
    return rows.astype(np.float16)


def describe(
    manifest: Mapping[str, Any], features_ND: NDArray[np.floating[Any]] | None, rows: int
) -> dict[str, Any] | None:
    """The record of an index about its features once these rows have joined it; None where it keeps none.

    The first rows of an index decide whether it does.

    Raises InvalidInput where the features are missing, not wanted, or of another width.
    """
    here: dict[str, Any] | None = manifest.get(PART)
    if not rows:
        return here
    if features_ND is None and here:
        raise InvalidInput(
            f"this index keeps features of width {here['width']} for two-stage ranking, and the new rows come without; "
            "pass them (rerank=...), or build the index with index.rerank: false"
        )
    if features_ND is None:
        return None
    if not here and manifest["shards"]:
        raise InvalidInput("this index keeps no features; build it with index.rerank: true, or leave rerank out")
    here = here or {"width": int(features_ND.shape[-1])}
    if features_ND.shape != (rows, here["width"]):
        raise InvalidInput(f"features of the new rows must be [{rows}, {here['width']}], found {features_ND.shape}")
    return here


def check(view: View, queries_QD: NDArray[np.floating[Any]], queries: int) -> NDArray[np.floating[Any]]:
    """Query features that this version can be ranked by. Raises InvalidInput saying what it takes."""
    kept = view.manifest.get(PART)
    if not kept:
        raise InvalidInput(
            f"{view.uri}, version {view.number} keeps no features, so it cannot rank by them; build it with "
            "--index.rerank true, or search without rerank"
        )
    found = np.asarray(queries_QD)
    if found.shape != (queries, kept["width"]) or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise InvalidInput(
            f"rerank must be finite floats [{queries}, {kept['width']}], the features of the queries, found "
            f"{found.dtype} {list(found.shape)}"
        )
    return found if found.dtype == np.float16 else found.astype(np.float32)


def rank(
    view: View, queries_QD: NDArray[np.floating[Any]], found: scan.Nearest, k: int
) -> tuple[scan.Nearest, NDArray[np.float64]]:
    """The first k candidates of every query by (cosine descending, id), and their cosines.

    Args:
        view: the version they were found in.
        queries_QD: checked features of the queries.
        found: candidates; "rows" are ids, C >= k of every query.
        k: results.
    """
    ids, back = np.unique(found.rows_QK, return_inverse=True)
    features_ND = view.features(ids)
    rows_QC = back.reshape(found.rows_QK.shape)
    scores_QC = np.empty(rows_QC.shape, np.float64)
    for q, rows in enumerate(rows_QC):
        scores_QC[q] = similarity(np.repeat(queries_QD[q : q + 1], len(rows), axis=0), features_ND[rows])
    order = np.lexsort((found.rows_QK, -scores_QC), axis=1)[:, :k]
    distances: NDArray[np.int32] = np.take_along_axis(found.distances_QK, order, axis=1)
    best: NDArray[np.int64] = np.take_along_axis(found.rows_QK, order, axis=1)
    scores: NDArray[np.float64] = np.take_along_axis(scores_QC, order, axis=1)
    return scan.Nearest(distances, best, np.full(len(best), best.shape[1], np.int64)), scores
