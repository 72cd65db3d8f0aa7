"""Reading vectors back: parts in order, whole tables by id, single rows, whatever the parts were."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hashdist.ground.errors import Corrupt, InvalidInput, NotFound
from hashdist.ground.schema import from_vectors, to_vectors, vector_schema
from hashdist.ground.threads import in_order
from hashdist.store import open_store
from hashdist.store.commit import Artefact, artefact, write_table
from hashdist.store.vectors import read_vectors, vectors

WIDTH = 6


def commit(root: str, part_rows: int, rows: int = 97, repeat: bool = False) -> tuple[Artefact, pa.Table]:
    """Features in parts of random order, a tenth of them null; and the one table they make, by id."""
    rng = np.random.default_rng(part_rows)
    ids = rng.permutation(rows).astype(np.int64) * 7
    if repeat:
        ids[-1] = ids[0]
    present = rng.random(rows) > 0.1
    matrix = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    made = artefact(open_store(root), "features", inputs={"r": part_rows}, settings={}, revision=1)
    tables = []
    for start in range(0, rows, part_rows):
        part = slice(start, start + part_rows)
        count = len(ids[part])
        columns = [
            ids[part],
            [f"key-{id_}" for id_ in ids[part]],
            pa.nulls(count, pa.string()),
            [[int(id_) % 3] if id_ % 2 else None for id_ in ids[part]],
            ["ok" if there else "bad" for there in present[part]],
            pa.nulls(count, pa.string()),
            to_vectors(matrix[part], present[part]),
        ]
        tables.append(pa.table(columns, schema=vector_schema("feature", "float32", WIDTH)))
    made.publish({"files": [write_table(made.store, made.new_name(".parquet"), table) for table in tables]})
    return made, pa.concat_tables(tables).sort_by("id")


@pytest.mark.parametrize("part_rows", [1, 10, 50, 1000])
def test_the_whole_table_by_id(part_rows: int, root_uri: str) -> None:
    made, expected = commit(root_uri, part_rows)
    assert sum(len(table) for table in vectors(made, "feature")) == 97
    assert read_vectors(made, expected.column_names).equals(expected)
    found = read_vectors(made, ["feature", "id"])
    assert found.column_names == ["feature", "id"]
    assert np.array_equal(
        from_vectors(found["feature"], found.schema), from_vectors(expected["feature"], expected.schema)
    )


@pytest.mark.parametrize("count", [0, 1, 30, 97])
def test_only_the_rows_asked_for(count: int, tmp_path: Path) -> None:
    made, expected = commit(str(tmp_path), 10)
    rows = np.sort(np.random.default_rng(0).permutation(97)[:count])
    ids = expected["id"].to_numpy()[rows]
    found = read_vectors(made, ["key", "feature", "labels"], ids)
    assert found.equals(expected.take(rows).select(["key", "feature", "labels"]))


def test_ids_that_are_not_there(tmp_path: Path) -> None:
    made, _ = commit(str(tmp_path), 10)
    with pytest.raises(InvalidInput, match=r"2 are missing \(the first: 1\)"):
        read_vectors(made, ["id"], np.array([0, 1, 7, 9999]))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    made, _ = commit(str(tmp_path), 10)
    with pytest.raises(InvalidInput, match=r"must have the column 'code', found"):
        next(vectors(made, "code"))
    with pytest.raises(InvalidInput, match=r"must have the columns \['code'\]"):
        read_vectors(made, ["code"])
    with pytest.raises(NotFound, match="is not committed"):
        read_vectors(Artefact(open_store(str(tmp_path)), "codes", "x"), ["id"])
    twice, _ = commit(str(tmp_path), 11, repeat=True)
    with pytest.raises(Corrupt, match="holds an id twice"):
        read_vectors(twice, ["id"])


def test_work_is_done_in_order_and_never_far_ahead() -> None:
    begun: list[int] = []
    results = in_order(lambda item: begun.append(item) or item * 2, range(20), 3)
    for expected in range(20):
        assert next(results) == expected * 2
        assert len(begun) <= expected + 1 + 3
    assert list(results) == []


def test_an_error_comes_at_its_place() -> None:
    results = in_order(lambda item: 1 // item, [3, 1, 0, 2], 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
