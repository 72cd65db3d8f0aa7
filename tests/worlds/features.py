"""Committed features and graphs that no stage had to make: a few Gaussian clusters and their exact neighbours."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from hashdist.ground.ids import image_ids
from hashdist.ground.schema import from_vectors, to_vectors, vector_schema
from hashdist.store import open_store
from hashdist.store.commit import Artefact, digest, write_file, write_table
from hashdist.store.vectors import read_vectors

WIDTH, CLASSES, NEIGHBOURS = 16, 5, 10


class Made(NamedTuple):
    features: Artefact
    graph: Artefact
    features_ND: NDArray[np.float32]  # rows by id


@pytest.fixture(scope="session")
def made() -> Callable[..., Made]:
    """made(root uri, n=..., seed=...): features in parts, and the graph of all of them."""
    return _made


@pytest.fixture(scope="session")
def made_graph() -> Callable[[Artefact], Artefact]:
    """made_graph(features): the graph of all rows of committed features."""
    return _made_graph


def _made_graph(features: Artefact) -> Artefact:
    table = read_vectors(features, ["id", "key", "labels", "feature"])
    features_ND = from_vectors(table["feature"], table.schema)
    keys = np.array(table["key"].to_pylist())
    root_uri = features.uri.rpartition("/features/")[0]
    ids = table["id"].to_numpy()
    return _graph(root_uri, 0, ids, keys, table["labels"].combine_chunks(), features_ND, features)


def _made(root_uri: str, n: int = 300, seed: int = 0, parts: int = 3, failed: int = 0, **fields: Any) -> Made:
    rng = np.random.default_rng(seed)
    keys = np.array([f"{i:05d}.png" for i in range(n)])
    ids = image_ids(list(keys))
    order = np.argsort(ids)
    ids, keys = ids[order], keys[order]
    labels_N = rng.integers(0, CLASSES, n)
    features_ND = (2 * rng.normal(size=(CLASSES, WIDTH))[labels_N] + rng.normal(size=(n, WIDTH))).astype(np.float32)
    labels = pa.array([[int(label)] for label in labels_N], pa.list_(pa.int32()))
    features = _features(root_uri, seed, ids, keys, labels, features_ND, parts, failed, fields)
    return Made(features, _graph(root_uri, seed, ids, keys, labels, features_ND, features), features_ND)


def _features(
    root_uri: str,
    seed: int,
    ids: NDArray[np.int64],
    keys: NDArray[np.str_],
    labels: pa.Array,
    features_ND: NDArray[np.float32],
    parts: int,
    failed: int,
    fields: dict[str, Any],
) -> Artefact:
    made = Artefact(open_store(root_uri), "features", digest({"seed": seed, "n": len(ids), **fields}))
    present_N = np.arange(len(ids)) >= failed
    reasons = [None if ok else "truncated: made so" for ok in present_N]
    status = ["ok" if ok else "unreadable" for ok in present_N]
    columns = [ids, keys, ["00"] * len(ids), labels, status, pa.array(reasons, pa.string())]
    table = pa.table([*columns, to_vectors(features_ND, present_N)], schema=vector_schema("feature", "float32", WIDTH))
    files = [
        write_table(made.store, made.new_name(".parquet"), table.take(rows))
        for rows in np.array_split(np.arange(len(ids)), parts)
    ]
    backbone = {"backbone": "none", "tap": "", "weights_digest": "", "preprocess": {}, "precision": "float32"}
    shape = {"dtype": "float32", "width": WIDTH, "batch": 64, "threads": 1, "weights_file": None, "collection": None}
    counts = {"rows": len(ids), "failed": failed, "files": files, "content_digest": made.name}
    made.publish({"stage": "features", "inputs": {}, "settings": {}, **backbone, **shape, **counts, **fields})
    return made


def _graph(
    root_uri: str,
    seed: int,
    ids: NDArray[np.int64],
    keys: NDArray[np.str_],
    labels: pa.Array,
    features_ND: NDArray[Any],
    features: Artefact,
) -> Artefact:
    n = len(ids)
    unit = features_ND.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    neighbours = np.argsort(-cosine, axis=1, kind="stable")[:, :NEIGHBOURS].astype(np.int32)
    near = np.zeros((n, n), np.bool_)
    near[np.arange(n)[:, None], neighbours] = True
    near |= near.T
    arrays = {
        "ids": ids,
        "features": features_ND,
        "neighbours": neighbours,
        "w0_indptr": np.concatenate([[0], np.cumsum(near.sum(1))]).astype(np.int64),
        "w0_indices": np.nonzero(near)[1].astype(np.int32),
    }
    graph = Artefact(open_store(root_uri), "graphs", digest({"seed": seed, "features": features.name}))
    files = {
        name: write_file(graph.store, graph.new_name(".npy"), _npy(array), rows=len(array))
        for name, array in arrays.items()
    }
    files["labels"] = write_table(
        graph.store, graph.new_name(".parquet"), pa.table({"id": ids, "key": keys, "labels": labels})
    )
    lineage = {"stage": "graph", "inputs": {"features": {"uri": features.uri, "digest": features.name}}}
    sizes = {"n": n, "rows": n, "failed": 0, "k1": NEIGHBOURS, "k2": NEIGHBOURS, "edges": int(near.sum())}
    graph.publish({**lineage, "settings": {}, "rule": "and", **sizes, "files": files})
    return graph


def _npy(array: NDArray[Any]) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getbuffer()


def like_features(n: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """As pooled activations are: not negative, of low rank and some noise, in groups."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((10, 16))[rng.integers(0, 10, n)] + rng.standard_normal((n, 16))
    noise = 0.5 * rng.standard_normal((n, width))
    return np.minimum(np.abs(latent @ rng.standard_normal((16, width)) / 4 + noise), 6).astype(np.float32)
