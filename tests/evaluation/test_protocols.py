"""Named splits: counts, disjointness, independence of row order, and clear refusals."""

import io
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hashdist.evaluation.protocols import (
    _METADATA,
    _PROTOCOLS,
    SETS,
    Split,
    _Counts,
    _parse,
    columns,
    identity,
    needs_labels,
    parts_of,
    protocol_of,
    read_protocol,
    split,
    split_rows,
    write_protocol,
)
from hashdist.ground.errors import AlreadyExists, InvalidInput, NotFound
from hashdist.ground.ids import image_ids
from hashdist.store.local import LocalStore


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


# The data set's own parts, validation, and smaller databases


def test_ddh_takes_the_test_part_that_keys_name() -> None:
    keys = [f"{'test' if i % 6 == 0 else 'train'}/cat/{i:04d}" for i in range(60)]
    ids = image_ids(keys)
    made = split("cifar-ddh-paper", ids, None, 5, parts_of(keys))
    assert made.query.tolist() == list(range(0, 60, 6))
    assert made.train.tolist() == made.database.tolist() == [i for i in range(60) if i % 6]
    table = pa.table({"id": ids, "key": keys})
    assert columns("cifar-ddh-paper") == ["key"]
    assert split_rows("cifar-ddh-paper", table).digest() == made.digest()
    for parts in (None, ["train"] * 60, ["test"] * 60, parts_of([*keys[:-1], "image.png"])):
        with pytest.raises(InvalidInput, match="takes the data set's own parts"):
            split("cifar-ddh-paper", ids, None, 0, parts)


def test_parts_are_the_first_word_of_a_key() -> None:
    keys = ["train/a", "test-7", "Val_3", "validation/x/y", "valid/x", "training/a", "a/test/b", "tests/a", "test"]
    assert parts_of(keys) == ["train", "test", "val", "val", "val", "", "", "", ""]


def test_flowers_are_drawn_unless_parts_are_given() -> None:
    ids, labels = collection(17, 80)
    made = split("flowers17", ids, labels, 2)
    counts = {name: np.bincount(labels[getattr(made, name)]).tolist() for name in SETS}
    assert counts == {"query": [20] * 17, "train": [40] * 17, "database": [40] * 17, "validation": [20] * 17}
    assert len(set(made.query) | set(made.train) | set(made.validation)) == 1360
    np.testing.assert_array_equal(made.train, made.database)
    given = ["train", "train", "test", "val"] * 340
    own = split("flowers17", ids, labels, 2, given)
    assert (own.query % 4 == 2).all()
    assert (own.validation % 4 == 3).all()
    assert own.counts() == {"query": 340, "train": 680, "database": 680, "validation": 340}
    with pytest.raises(InvalidInput, match="20 validation images a class, but class 0 has only 79"):
        split("flowers17", ids[1:], labels[1:])


def test_the_smaller_database_of_sadh_leaves_the_training_set_out() -> None:
    ids, _ = collection(1, 6000)
    large, small = split("flickr-sadh", ids, None, 4), split("flickr-sadh-20000", ids, None, 4)
    np.testing.assert_array_equal(large.query, small.query)
    np.testing.assert_array_equal(large.train, small.train)
    assert set(small.database) == set(large.database) - set(large.train)
    assert len(small.database) == 1000


def test_nobody_is_in_two_sets_that_must_be_apart() -> None:
    rows = {name: np.array([row]) for row, name in enumerate(SETS)}
    Split(**rows, ids=np.arange(4))
    for one, other in [("query", "database"), ("query", "train"), ("query", "validation"), ("validation", "train")]:
        with pytest.raises(InvalidInput, match="found 1 that are"):
            Split(**{**rows, one: rows[other]}, ids=np.arange(4))


# Properties


@given(st.permutations(range(60)), st.integers(0, 2**40), st.sampled_from(["uniform:7:20", "filled", "parts"]))
def test_a_split_does_not_depend_on_the_order_of_rows(order: list[int], seed: int, kind: str) -> None:
    keys = [f"{'test' if i % 5 == 0 else 'train'}/{i}" for i in range(60)]
    ids, rows = image_ids(keys), np.array(order)
    labels = [[i % 3, 3 + i % 2] for i in range(60)]
    small = _Counts(1, 4, True, several_labels=True)
    name = {"filled": "nus-21", "parts": "cifar-ddh-paper"}.get(kind, kind)
    with mock.patch.dict(_PROTOCOLS, {"nus-21": small}):
        made = split(name, ids, labels, seed, parts_of(keys))
        other = split(name, ids[rows], [labels[i] for i in rows], seed, parts_of([keys[i] for i in rows]))
    assert made.digests() == other.digests()
    assert made.digest() == other.digest()


KEYS = st.sets(st.text("abc/é", min_size=1, max_size=2), min_size=1, max_size=4)
DIVISIONS = st.tuples(KEYS, KEYS, KEYS, st.sets(st.sampled_from(["other", "others"])))


def divided(sets: tuple[set[str], ...]) -> dict[str, set[str]]:
    """Sets that are apart where they must be: queries begin with q."""
    query, train, database, validation = sets
    return {"query": {f"q{key}" for key in query}, "train": train, "database": database, "validation": validation}


@given(DIVISIONS, DIVISIONS)
@example(({"a"}, {"b"}, {"b"}, set()), ({"a"}, {"b"}, {"b"}, set()))
def test_digests_are_equal_if_and_only_if_the_sets_are(one: Any, other: Any) -> None:
    first, second = divided(one), divided(other)
    made, found = protocol_of(first, "a"), protocol_of(second, "b", 7, "elsewhere")
    for name in SETS:
        same = first[name] == second[name]
        assert (made.split.digests()[name] == found.split.digests()[name]) == same
    assert (made.split.digest() == found.split.digest()) == (first == second)


# Protocol files


@given(DIVISIONS, st.text(max_size=5), st.integers(0, 9), st.randoms())
def test_a_file_holds_the_protocol_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, sets: Any, source: str, seed: int, random: Any
) -> None:
    made = protocol_of(divided(sets), "mine", seed, source)
    path = str(tmp_path_factory.mktemp("protocol") / "mine.parquet")
    assert write_protocol(path, made) == Path(path).as_uri()
    found = read_protocol(path)
    assert found.summary() == made.summary()
    assert found.keys == made.keys
    # over a collection in another order, with one image more
    keys = [*made.keys, "more"]
    random.shuffle(keys)
    over = split(f"file:{path}", image_ids(keys), None)
    assert over.digest() == made.split.digest()
    assert {name: {keys[row] for row in getattr(over, name)} for name in SETS} == divided(sets)
    assert identity(f"file:{path}") == f"file:{made.split.digest()}"
    with pytest.raises(AlreadyExists):
        write_protocol(path, made)


def test_a_file_is_found_on_any_store(root_uri: str) -> None:
    made = protocol_of({"query": ["a"], "train": ["b"], "database": ["b", "c"]}, "mine")
    uri = write_protocol(f"{root_uri}/protocols/mine.parquet", made)
    assert read_protocol(uri).summary() == made.summary()
    with pytest.raises(NotFound):
        read_protocol(f"{root_uri}/protocols/another.parquet")


def test_a_file_of_all_of_nus_wide_is_small() -> None:
    keys = [f"class{i % 81}/{i:04d}_{i * 7919 % 10**9:09d}.jpg" for i in range(269_648)]
    ids = image_ids(keys)
    made = split("nus-dsah", ids, None)
    sets = {name: np.array(keys)[getattr(made, name)] for name in SETS}
    sink = io.BytesIO()
    with mock.patch.object(LocalStore, "put", lambda self, name, data: sink.write(data)):
        write_protocol("nowhere/nus.parquet", protocol_of(sets, "nus-dsah"))
    assert sink.tell() < 5e6
    assert _parse.__wrapped__(sink.getvalue(), "nus.parquet").split.digest() == made.digest()


@pytest.fixture
def protocol_file(tmp_path: Path) -> Path:
    sets = {"query": ["q1", "q2"], "train": ["a", "b"], "database": ["a", "b", "c"]}
    write_protocol(str(tmp_path / "p.parquet"), protocol_of(sets, "mine"))
    return tmp_path / "p.parquet"


def rewrite(path: Path, change: Any) -> str:
    table = pq.read_table(path)
    pq.write_table(change(table), path)
    return str(path)


def moved(table: pa.Table, key: str, name: str, value: bool) -> pa.Table:
    rows = table.to_pylist()
    next(row for row in rows if row["key"] == key)[name] = value
    return pa.Table.from_pylist(rows, schema=table.schema)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: moved(t, "b", "train", False), r"the train set must have the digest [0-9a-f]{32} .* was changed"),
        (lambda t: moved(t, "c", "validation", True), "the validation set must have the digest"),
        (lambda t: t.filter(pc.not_equal(t["key"], "c")), "the database set must have the digest"),
        (lambda t: moved(t, "q1", "database", True), "queries must not be in the database, found 1"),
        (lambda t: moved(t, "q1", "train", True), "queries must not be trained on, found 1"),
        (lambda t: t.slice(0, 3), "found no query"),
        (lambda t: t.replace_schema_metadata({}), "must have the columns key, query"),
        (lambda t: t.drop(["train"]), "must have the columns key, query"),
        (lambda t: pa.concat_tables([t, t.slice(0, 1)]), "every key once, found 1 repeated"),
        (lambda t: t.replace_schema_metadata({_METADATA: b'{"format_version": 99}'}), "has the format 99"),
    ],
)
def test_a_changed_file_is_refused(protocol_file: Path, change: Any, said: str) -> None:
    name = rewrite(protocol_file, change)
    with pytest.raises(InvalidInput, match=said) as refused:
        split(f"file:{name}", image_ids(["a", "b", "c", "q1", "q2"]), None)
    assert "p.parquet" in str(refused.value)


def test_other_files_and_other_collections_are_refused(protocol_file: Path) -> None:
    name = f"file:{protocol_file}"
    for keys in (["a", "b", "q1", "q2"], []):
        with pytest.raises(InvalidInput, match=r"keys of the protocol must be images with a feature, . are not"):
            split(name, image_ids(keys), None)
    with pytest.raises(InvalidInput, match=r"1 are not \(the first: 'c'\)"):
        split(name, image_ids(["a", "b", "q1", "q2"]), None)
    protocol_file.write_text("query: a")
    with pytest.raises(InvalidInput, match=r"must be a protocol file \(parquet\)"):
        split(name, image_ids(["a"]), None)
    with pytest.raises(NotFound):
        split(f"{name}x", image_ids(["a"]), None)
    with pytest.raises(InvalidInput, match="a protocol file is required"):
        split("file:", image_ids(["a"]), None)
    with pytest.raises(InvalidInput, match="found no train and no database"):
        protocol_of({"query": ["a"]}, "mine")
