"""Splits: sizes, disjointness, independence of row order, and refusals."""

import numpy as np
import pytest

from hashdist.errors import InvalidInput
from hashdist.ids import image_ids
from hashdist.protocols import PROTOCOLS, PerClass, split


def images(per_class: int, classes: int = 3) -> tuple[np.ndarray, list[list[int]]]:
    ids = image_ids([f"{c}/{i}.png" for c in range(classes) for i in range(per_class)])
    return ids, [[c] for c in range(classes) for _ in range(per_class)]


@pytest.mark.parametrize("name", [name for name, asked in PROTOCOLS.items() if isinstance(asked, PerClass)])
def test_sizes_per_class(name: str) -> None:
    ids, labels = images(1150)
    asked = PROTOCOLS[name]
    found = split(name, ids, labels, 0)
    classes = np.array(labels)[:, 0]
    assert (np.bincount(classes[found.query]) == asked.query).all()
    expected = asked.train if asked.train is not None else 1150 - asked.query
    assert (np.bincount(classes[found.train]) == expected).all()
    assert len(np.intersect1d(found.query, found.database)) == 0
    assert len(np.intersect1d(found.query, found.train)) == 0
    assert np.isin(found.train, found.database).all()
    assert len(found.query) + len(found.database) == len(ids)


def test_uniform_ignores_labels() -> None:
    ids, _ = images(1200)
    found = split("uniform", ids, [None] * len(ids), 3)
    assert len(found.query) == 1000
    assert len(found.train) == len(found.database) == 2600


def test_a_split_depends_on_ids_and_seed_alone() -> None:
    ids, labels = images(60)
    first = split("digits", ids, labels, 5)
    order = np.random.default_rng(0).permutation(len(ids))
    again = split("digits", ids[order], [labels[i] for i in order], 5)
    assert first.digest(ids) == again.digest(ids[order])
    np.testing.assert_array_equal(np.sort(ids[first.query]), np.sort(ids[order][again.query]))
    assert split("digits", ids, labels, 6).digest(ids) != first.digest(ids)


@pytest.mark.parametrize(
    ("name", "per_class", "labelled", "said"),
    [
        ("cifar", 60, True, "must be one of"),
        ("digits", 20, True, "needs 21 images of class 0, found 20"),
        ("digits", 60, False, "none has a label"),
        ("uniform", 60, True, "at least 1001 images, found 180"),
    ],
)
def test_refusals(name: str, per_class: int, labelled: bool, said: str) -> None:
    ids, labels = images(per_class)
    with pytest.raises(InvalidInput, match=said):
        split(name, ids, labels if labelled else [None] * len(ids), 0)
