"""Named splits: counts, disjointness, independence of row order, and clear refusals."""

import numpy as np
import pytest

from hashdist.errors import InvalidInput
from hashdist.ids import image_ids
from hashdist.protocols import Split, needs_labels, split


def collection(classes: int, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    n = classes * per_class
    return image_ids([f"image-{i}" for i in range(n)]), np.arange(n) % classes


@pytest.mark.parametrize(
    ("name", "train"),
    [("cifar-dsah", 1000), ("cifar-ddh-release", 1000), ("cifar-sadh", 500), ("cifar-csdh", 500)],
)
def test_cifar_protocols_draw_their_numbers_from_every_class(name, train):
    ids, labels = collection(10, 1200)
    made = split(name, ids, labels, seed=3)
    assert np.bincount(labels[made.query]).tolist() == [100] * 10
    assert np.bincount(labels[made.train]).tolist() == [train] * 10
    assert len(made.database) == 11_000
    assert not set(made.query) & set(made.database)
    assert set(made.train) <= set(made.database)


def test_digits_train_on_the_whole_database():
    ids, labels = collection(10, 60)
    made = split("digits", ids, [[int(label)] for label in labels])
    assert np.bincount(labels[made.query]).tolist() == [20] * 10
    np.testing.assert_array_equal(made.train, made.database)
    assert len(made.database) == 400


def test_uniform_draws_without_labels():
    ids, _ = collection(1, 1000)
    made = split("uniform:50:200", ids, None)
    assert (len(made.query), len(made.train), len(made.database)) == (50, 200, 950)
    assert set(made.train) <= set(made.database)
    # uniform: the queries' mean place is that of all rows, within four standard errors
    assert abs(made.query.mean() - 499.5) < 4 * 288.7 / np.sqrt(50)


def test_an_image_of_several_labels_takes_a_place_of_the_first_that_has_one() -> None:
    ids, labels = collection(3, 900)
    made = split("nus-21", ids, [[7, int(label)] for label in labels])
    # 600 of each of the classes 0, 1, 2, then 600 of the 900 others under label 7, the lists being in label order
    assert (len(made.query), len(made.train), len(made.database)) == (400, 2000, 2300)
    assert (np.bincount(labels[made.query]) >= 100).all()
    assert (np.bincount(labels[made.train]) >= 500).all()
    with pytest.raises(InvalidInput, match="class 7 has only 300 images"):
        split("nus-21", ids[:2100], [[7, int(label)] for label in labels[:2100]])


def test_row_order_does_not_matter_and_seeds_do():
    ids, labels = collection(10, 1200)
    shuffled = np.random.default_rng(0).permutation(len(ids))
    plain, other = split("cifar-sadh", ids, labels, 1), split("cifar-sadh", ids[shuffled], labels[shuffled], 1)
    assert plain.digest() == other.digest()
    assert set(ids[plain.query]) == set(ids[shuffled][other.query])
    assert plain.digest() != split("cifar-sadh", ids, labels, 2).digest()
    assert len(set(plain.query) & set(split("cifar-sadh", ids, labels, 2).query)) < 250


def test_an_arriving_image_of_one_class_leaves_the_others_alone():
    ids, labels = collection(10, 1200)
    before = split("cifar-dsah", ids, labels)
    grown_ids = np.append(ids, image_ids(["new"]))
    grown = split("cifar-dsah", grown_ids, np.append(labels, 4))
    rest = [row for row in before.query if labels[row] != 4]
    assert set(rest) <= set(grown.query)


def test_digest_tells_the_sets_apart():
    ids = np.arange(4)
    a = Split(np.array([0]), np.array([1]), np.array([1, 2, 3]), ids)
    b = Split(np.array([0]), np.array([1, 2]), np.array([1, 2, 3]), ids)
    assert a.digest() != b.digest()


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("cifar-dsah", np.arange(5000) % 10, "class 0 has only 500 images"),
        ("digits", None, "needs the label of every image, found none"),
        ("digits", np.zeros(3, np.int64), "3 for 5000 images"),
        ("digits", [[1]] * 4999 + [None], "1 of 5000 images without"),
        ("digits", [[1]] * 4998 + [[1, 2], []], "row 4998, with 2 labels"),
        ("uniform:4000:2000", None, "there are only 5000 images"),
        ("uniform:x:2", None, "a known protocol is required"),
        ("cifar", None, "cifar-dsah"),
    ],
)
def test_refusals_say_what_is_wrong(name, labels, message):
    with pytest.raises(InvalidInput, match=message):
        split(name, np.arange(5000), labels)


def test_queries_in_the_database_and_repeated_ids_are_refused():
    with pytest.raises(InvalidInput, match="must not be in the database, found 1"):
        Split(np.array([0]), np.array([1]), np.array([0, 1]), np.arange(2))
    with pytest.raises(InvalidInput, match="distinct, found 1"):
        split("uniform:1:1", np.array([5, 5, 6]), None)


def test_only_class_protocols_need_labels():
    assert needs_labels("digits")
    assert not needs_labels("uniform:10:20")
