"""Parquet: labels, structs and integer keys, row groups cut anywhere, and files that cannot be used."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hashdist.collection.collection import (
    Collection,
)
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import CollectionSettings
from tests.worlds.collection import commit, everything, write_parquet


def one_parquet(base: Path, **options: Any) -> CollectionSettings:
    base.mkdir(exist_ok=True)
    table = pa.table(options.pop("columns"))
    metadata = options.pop("metadata", None)
    pq.write_table(
        table.replace_schema_metadata(metadata), base / "a.parquet", row_group_size=options.pop("group", 100)
    )
    return CollectionSettings(uri=str(base), **options)


@pytest.mark.parametrize(
    ("labels", "metadata", "expected", "classes"),
    [
        (pa.array([2, 0, None]), None, [[2], [0], None], []),
        (pa.array([2, 0, None]), {"classes": "a,b,c"}, [[2], [0], None], ["a", "b", "c"]),
        (pa.array([1, 0, 0]), {"classes": "cat, wild|dog"}, [[1], [0], [0]], ["cat, wild", "dog"]),
        (pa.array([1, 0, 0]), {"classes": '["x", "y"]'}, [[1], [0], [0]], ["x", "y"]),
        (
            pa.array([1, 0, 0]),
            {"huggingface": '{"info": {"features": {"label": {"names": ["x", "y"]}}}}'},
            [[1], [0], [0]],
            ["x", "y"],
        ),
        (pa.array([[1, 0], [], None]), None, [[1, 0], [], None], []),
        (pa.array(["b", "a", None]), None, [[1], [0], None], ["a", "b"]),
        (pa.array(["b", "a", None]), {"classes": "b,a"}, [[0], [1], None], ["b", "a"]),
        (pa.array([["b", "a"], [], ["c"]]), None, [[1, 0], [], [2]], ["a", "b", "c"]),
        (pa.array(["b", "a", None]).dictionary_encode(), None, [[1], [0], None], ["a", "b"]),
    ],
)
def test_parquet_labels(labels: Any, metadata: Any, expected: Any, classes: list[str], tmp_path: Path) -> None:
    name = "labels" if pa.types.is_list(labels.type) else "label"
    columns = {"id": ["x", "y", "z"], "image": [b"1", b"2", b"3"], name: labels}
    settings = one_parquet(tmp_path / "in", columns=columns, metadata=metadata)
    target = commit(str(tmp_path / "root"), settings)
    assert [image.labels for image in everything(Collection(target))] == expected
    assert target.manifest()["classes"] == classes


def test_parquet_images_in_a_struct_and_integer_keys(tmp_path: Path) -> None:
    columns = {"n": [5, 6], "picture": [{"bytes": b"one", "path": "p"}, {"bytes": None, "path": "q"}]}
    settings = one_parquet(tmp_path / "in", columns=columns, id_column="n", image_column="picture")
    target = commit(str(tmp_path / "root"), settings)
    assert [(image.key, image.data) for image in everything(Collection(target))] == [("5", b"one"), ("6", None)]
    assert target.manifest()["unreadable"] == {"null": 1}


@pytest.mark.parametrize("part_rows", [1, 3, 7, 1000])
@pytest.mark.parametrize("group", [2, 10, 1000])
def test_parquet_parts_cut_row_groups_anywhere(part_rows: int, group: int, tmp_path: Path) -> None:
    data = [os.urandom(40_000 if i % 5 == 0 else 30) if i % 7 else None for i in range(60)]
    columns = {"id": [f"{i}" for i in range(60)], "image": pa.array(data, pa.binary())}
    settings = one_parquet(tmp_path / "in", columns=columns, group=group, part_rows=part_rows)
    target = commit(str(tmp_path / "root"), settings)
    collection = Collection(target)
    assert [image.data for image in everything(collection)] == data
    assert [part["start"] for part in target.manifest()["parts"]] == list(range(0, 60, part_rows))
    assert [image.data for image in collection.read(collection.parts - 1)] == data[-((60 - 1) % part_rows + 1) :]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": ["a"], "image": [b"x"]}, r"must have a column 'id', found \['key', 'image'\]; name yours with"),
        ({"id": ["a"], "jpg": [b"x"]}, r"must have a column 'image', .* --collection\.image_column"),
        ({"id": ["a"], "image": ["text"]}, "must hold encoded image bytes .* found string"),
        ({"id": [1.5], "image": [b"x"]}, "must hold strings or integers, found double"),
        ({"id": ["a"], "image": [b"x"], "label": [0.5]}, "'label' must hold integers or strings"),
        ({"id": ["a", None], "image": [b"x", b"y"]}, "every row must have a value in column 'id', row 1 has none"),
        ({"id": pa.array([], pa.string()), "image": pa.array([], pa.binary())}, "at least one image is required"),
    ],
)
def test_parquet_that_cannot_be_used_is_refused(columns: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        commit(str(tmp_path / "root"), one_parquet(tmp_path / "in", columns=columns))


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InvalidInput, match=r"a\.parquet must be a parquet file"):
        commit(str(tmp_path / "root"), CollectionSettings(uri=str(tmp_path)))


def test_a_source_that_changed_is_refused(images: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    uri = write_parquet(tmp_path / "in", images)
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=uri, part_rows=4))
    os.utime(tmp_path / "in" / "0.parquet", ns=(5, 5))
    with pytest.raises(InvalidInput, match=r"0\.parquet changed after it was listed"):
        everything(Collection(target))
    (tmp_path / "in" / "0.parquet").unlink()
    with pytest.raises(InvalidInput, match=r"0\.parquet was listed, but is not there any more"):
        everything(Collection(target))
