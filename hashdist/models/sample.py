"""The training sample as a worker reads it: arrays of the graph artefact, and in images mode the images themselves."""

import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hashdist.collection.collection import Collection, Image
from hashdist.collection.decode import BadImage, decode
from hashdist.ground.errors import InvalidInput
from hashdist.ground.threads import in_order
from hashdist.methods.contract import Graph, TrainingData
from hashdist.methods.parts.communicator import Communicator
from hashdist.methods.parts.labels import one_hot
from hashdist.models.networks import Preprocess
from hashdist.store.arrays import map_array
from hashdist.store.commit import Artefact, read_table

GRAPH_FILES = ("w0_indptr", "w0_indices", "neighbours")
_AHEAD = 4


@dataclass(frozen=True)
class LocalShare:
    """Which of the workers on its machine this one is.

    Args:
        rank: among them.
        size: how many they are.
        attempt: text that they share and no other attempt has.
    """

    rank: int
    size: int
    attempt: str


def sample_ids(graph: Artefact) -> NDArray[np.int64]:
    """int64 [n], ascending: the images that the graph is made of."""
    return map_array(graph.store, graph.manifest()["files"]["ids"])


def read_sample(graph: Artefact) -> TrainingData:
    """The arrays of a committed graph, mapped where they lie on this machine."""
    files = graph.manifest()["files"]
    return TrainingData(
        ids=sample_ids(graph),
        features=map_array(graph.store, files["features"]),
        labels=sample_labels(graph),
        graph=Graph(*(map_array(graph.store, files[name]) for name in GRAPH_FILES)) if files["w0_indptr"] else None,
    )


def sample_labels(graph: Artefact) -> NDArray[np.bool_] | None:
    """bool [n, C] of the images that the graph is made of; None where there are none."""
    entry = graph.manifest()["files"].get("labels")
    return one_hot(read_table(graph.store, entry, ["labels"])["labels"].to_pylist()) if entry else None


def cache_images(
    collection: Artefact, ids: NDArray[np.int64], prepare: Preprocess, place: LocalShare, comm: Communicator
) -> NDArray[np.uint8]:
    """The prepared images uint8 [n, S, S, 3], row by row as `ids`, in a file that all workers of a machine map.

    They share the work of filling it: each reads some parts of the collection. The file has no name any more when
    this returns, so its space is free again as soon as the workers end, however they end. All ranks must call it.

    Raises:
        InvalidInput: an image of the sample that cannot be read now.
    """
    path = Path(tempfile.gettempdir()) / f"hashdist-images-{place.attempt}"
    shape = (len(ids), prepare.size, prepare.size, 3)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    os.truncate(descriptor, int(np.prod(shape)))  # as often as there are workers: to the same size
    os.close(descriptor)
    images_nSS3 = np.memmap(path, np.uint8, "r+", shape=shape)
    source = Collection(collection)
    for part in range(place.rank, source.parts, place.size):
        for image, pixels in in_order(partial(_prepare, prepare), source.read(part), _AHEAD):
            images_nSS3[np.searchsorted(ids, image)] = pixels
    _wait_for_all(comm)
    if place.rank == 0:
        path.unlink()
    _wait_for_all(comm)
    return images_nSS3


def _prepare(prepare: Preprocess, image: Image) -> tuple[int, NDArray[np.uint8]]:
    try:
        if image.data is None:
            raise BadImage("unreadable", image.reason or "no reason given")
        return image.id, prepare(decode(image.data))
    except BadImage as error:
        raise InvalidInput(
            f"every training image must be readable, found {image.key}: {error.reason}; list the collection again "
            "(hashdist collection) and build features and graph from it"
        ) from error


def _wait_for_all(comm: Communicator) -> None:
    comm.sum_(torch.zeros(1))
