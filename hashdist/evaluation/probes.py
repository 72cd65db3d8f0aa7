"""A fixed sample of an index: the rows of smallest ids, and the probe set by which versions are compared.

Ids are hashes, so the smallest are a uniform sample that needs no drawing and hardly changes while an index grows.

The probe set is chosen once and kept from version to version: ids, and for the first of them, the queries, the ids of
their exact nearest neighbours by cosine within the set. Recall within a set that does not change depends on codes
alone: not on how many images joined, and no feature is read again. It is a data file (`probes/`), because a record
must name no image: an erasure drops the file, and the next gate chooses another set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashdist.index.view import Places, View
from hashdist.nearest import scan
from hashdist.store import Store
from hashdist.store.commit import read_table, write_table


def smallest(view: View, count: int) -> Places:
    """Where the live rows with the smallest ids are, ascending: `count` of them, or all there are."""
    ids, shards, rows = (np.empty(0, np.int64) for _ in range(3))
    for number, shard in enumerate(view.shards):
        live = scan.live(view.dead(number), shard.rows)[:count]
        ids = np.concatenate([ids, shard.ids[live]])
        order = np.argsort(ids)[:count]
        shards = np.concatenate([shards, np.full(len(live), number)])[order]
        rows, ids = np.concatenate([rows, live])[order], ids[order]
    return Places(ids, shards, rows)


@dataclass(frozen=True)
class Probes:
    """The probe set.

    Attributes:
        ids: int64 [S], ascending.
        neighbours_QK: ids of the neighbours of ids[:Q] within the set, nearest first; Q = 0 without features.
        made_by: what made the features that the neighbours were found by.
        entry: of its file, as manifests name it.
    """

    ids: NDArray[np.int64]
    neighbours_QK: NDArray[np.int64]
    made_by: Mapping[str, Any]
    entry: Mapping[str, Any]


def write_probes(
    store: Store, name: str, ids: NDArray[np.int64], neighbours_QK: NDArray[np.int64], made_by: Mapping[str, Any]
) -> Probes:
    """Write a probe set as the file `name`."""
    lists = [*neighbours_QK.tolist(), *[None] * (len(ids) - len(neighbours_QK))]
    table = pa.table({"id": ids, "neighbours": pa.array(lists, pa.list_(pa.int64()))})
    return Probes(ids, neighbours_QK, made_by, {**write_table(store, name, table), "made_by": dict(made_by)})


def read_probes(store: Store, entry: Mapping[str, Any]) -> Probes:
    """The probe set that `write_probes` wrote. Raises NotFound, Corrupt."""
    table = read_table(store, entry)
    lists = [row for row in table["neighbours"].to_pylist() if row is not None]
    neighbours_QK = np.array(lists, np.int64).reshape(len(lists), -1 if lists else 0)
    return Probes(table["id"].to_numpy(), neighbours_QK, entry["made_by"], entry)
