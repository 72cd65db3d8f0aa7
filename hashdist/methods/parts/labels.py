"""Labels of images: which pairs share one, and distinct label sets, each of which is computed with once."""

import numpy as np
from numpy.typing import NDArray


def label_sets(labels_nC: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Distinct label sets, bool [S, C] in a fixed order, and the number of each image's own, int64 [n]."""
    packed, numbers = np.unique(np.packbits(labels_nC, axis=1), axis=0, return_inverse=True)
    sets_SC: NDArray[np.bool_] = np.unpackbits(packed, axis=1, count=labels_nC.shape[1]).astype(bool)
    return sets_SC, numbers.reshape(-1)


def similar_pairs(labels_nC: NDArray[np.bool_]) -> int:
    """How many ordered pairs (i, j) of images, i = j among them, have a label in common; never n x n."""
    sets_SC, numbers = label_sets(labels_nC)
    counts_S = np.bincount(numbers, minlength=len(sets_SC))
    return sum(int(images) * int(counts_S[(sets_SC & own_C).any(1)].sum())
               for own_C, images in zip(sets_SC, counts_S, strict=True))  # fmt: skip


def pair_labels(labels_SC: NDArray[np.bool_]) -> NDArray[np.float64]:
    """S: +1 where two images share a label, -1 elsewhere."""
    shared_SS = labels_SC.astype(np.float32) @ labels_SC.T.astype(np.float32)
    return np.where(shared_SS > 0, 1.0, -1.0)


def one_hot(labels: list[list[int] | None]) -> NDArray[np.bool_]:
    """bool [n, C] of the labels of each image, C being the largest label and one; no label: a row of False."""
    classes = 1 + max((label for row in labels for label in row or []), default=-1)
    table = np.zeros((len(labels), classes), np.bool_)
    for row, given in enumerate(labels):
        table[row, given or []] = True
    return table
