"""Features that users bring: every layout read alike, and what does not fit is refused or marked."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hashdist.collection import vectors as own_vectors
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_ids
from hashdist.ground.schema import from_vectors, to_vectors

N, D = 37, 6
KEYS = [f"photo/{i:03d}.jpg" for i in range(N)]


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


def column(kind: str, vectors: np.ndarray) -> tuple[pa.Array, dict[str, str]]:
    if kind == "list":
        return pa.array(list(vectors), pa.list_(pa.float32())), {}
    if kind == "large list of doubles":
        return pa.array(list(vectors.astype(np.float64)), pa.large_list(pa.float64())), {}
    if kind == "fixed-size list":
        return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), D), {}
    if kind == "list of halves":
        return pa.array(list(vectors.astype(np.float16)), pa.list_(pa.float16())), {}
    return to_vectors(vectors), {"dtype": "float32", "width": str(D)}


def write(path: Path, vectors: np.ndarray, kind: str = "list", name: str = "feature", keys=KEYS, **more) -> None:
    array, metadata = column(kind, vectors)
    table = pa.table({"key": keys, name: array, **more}).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=10)


def read(folder: Path) -> pa.Table:
    planned = own_vectors.plan(own_vectors.list_source(str(folder)))
    return pa.concat_tables([own_vectors.table(planned, part) for part in range(len(planned.chunks))])


@pytest.mark.parametrize(
    "kind", ["list", "large list of doubles", "fixed-size list", "list of halves", "fixed-size binary"]
)
@pytest.mark.parametrize("name", ["feature", "embedding", "embeddings"])
def test_parquet(tmp_path: Path, vectors: np.ndarray, kind: str, name: str) -> None:
    write(tmp_path / "a.parquet", vectors[:20], kind, name, KEYS[:20])
    write(tmp_path / "b.parquet", vectors[20:], kind, name, KEYS[20:])
    table = read(tmp_path)
    expected = vectors.astype(np.float16) if kind == "list of halves" else vectors
    np.testing.assert_array_equal(from_vectors(table["feature"], table.schema), expected)
    assert table["key"].to_pylist() == KEYS
    np.testing.assert_array_equal(table["id"].to_numpy(), image_ids(KEYS))
    assert set(table["status"].to_pylist()) == {"ok"}
    assert table["labels"].null_count == N


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_clip_retrieval_layout(
    tmp_path: Path, vectors: np.ndarray, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_vectors, "CHUNK_ROWS", 8)
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    (tmp_path / "text_emb").mkdir()
    np.save(tmp_path / "text_emb" / "text_emb_0000.npy", vectors)
    for number, rows in enumerate((slice(0, 20), slice(20, N))):
        np.save(tmp_path / "img_emb" / f"img_emb_{number:04d}.npy", vectors[rows].astype(dtype))
        meta = {"image_path": KEYS[rows], "caption": [""] * len(KEYS[rows]), "label": list(range(N))[rows]}
        pq.write_table(pa.table(meta), tmp_path / "metadata" / f"metadata_{number:04d}.parquet", row_group_size=7)
    table = read(tmp_path)
    expected = vectors.astype(dtype).astype(np.float16 if dtype == np.float16 else np.float32)
    np.testing.assert_array_equal(from_vectors(table["feature"], table.schema), expected)
    assert table["key"].to_pylist() == KEYS
    assert table["labels"].to_pylist() == [[i] for i in range(N)]


@pytest.mark.parametrize("rows", [1, 7, 10, 11, 36, 37, 50])
def test_chunks_cover_every_row_once(tmp_path: Path, vectors: np.ndarray, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(own_vectors, "CHUNK_ROWS", rows)
    write(tmp_path / "a.parquet", vectors)
    table = read(tmp_path)
    assert table["key"].to_pylist() == KEYS
    np.testing.assert_array_equal(from_vectors(table["feature"], table.schema), vectors)


def test_vectors_without_use_are_rows_with_a_reason(tmp_path: Path, vectors: np.ndarray) -> None:
    vectors[3, 2] = np.nan
    vectors[4, 0] = np.inf
    vectors[5] = 0
    rows = [None if i == 6 else row for i, row in enumerate(vectors)]
    pq.write_table(pa.table({"id": KEYS, "feature": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "a.parquet")
    table = read(tmp_path)
    assert table["feature"].null_count == 4
    reasons = {i: reason.partition(":")[0] for i, reason in enumerate(table["reason"].to_pylist()) if reason}
    assert reasons == {3: "not-finite", 4: "not-finite", 5: "zero", 6: "missing"}
    assert [i for i, status in enumerate(table["status"].to_pylist()) if status != "ok"] == [3, 4, 5, 6]
    good = [i for i in range(N) if i not in reasons]
    np.testing.assert_array_equal(from_vectors(table["feature"], table.schema)[good], vectors[good])


def test_labels_are_taken_along(tmp_path: Path, vectors: np.ndarray) -> None:
    write(tmp_path / "a.parquet", vectors, labels=pa.array([[i % 3, 7] for i in range(N)]))
    assert read(tmp_path)["labels"].to_pylist() == [[i % 3, 7] for i in range(N)]


def test_one_file_by_its_name(tmp_path: Path, vectors: np.ndarray) -> None:
    write(tmp_path / "a.parquet", vectors)
    write(tmp_path / "b.parquet", vectors)
    assert len(read(tmp_path / "a.parquet")) == N


class TestRefused:
    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "readme.txt").write_text("x")
        with pytest.raises(InvalidInput, match=r"readme\.txt"):
            own_vectors.list_source(str(tmp_path))

    def test_two_rows_with_one_key(self, tmp_path: Path, vectors: np.ndarray) -> None:
        write(tmp_path / "a.parquet", vectors)
        write(tmp_path / "b.parquet", vectors[:1], keys=KEYS[8:9])
        with pytest.raises(InvalidInput, match=r"photo/008\.jpg"):
            own_vectors.plan(own_vectors.list_source(str(tmp_path)))

    def test_two_widths(self, tmp_path: Path, vectors: np.ndarray) -> None:
        write(tmp_path / "a.parquet", vectors)
        write(tmp_path / "b.parquet", vectors[:1, :3], keys=["other"])
        with pytest.raises(InvalidInput, match=r"one width, found \[3, 6\]"):
            own_vectors.plan(own_vectors.list_source(str(tmp_path)))

    def test_a_short_vector_among_long_ones(self, tmp_path: Path, vectors: np.ndarray) -> None:
        rows = [row[:2] if i == 30 else row for i, row in enumerate(vectors)]
        pq.write_table(
            pa.table({"key": KEYS, "feature": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "a.parquet"
        )
        with pytest.raises(InvalidInput, match="width 6, found 2 in or after row 30"):
            read(tmp_path)

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"name": ["a"], "feature": [[1.0]]}, "key column"),
            ({"key": ["a"], "vector": [[1.0]]}, "vector column"),
            ({"key": ["a"], "feature": ["text"]}, "lists of numbers"),
            ({"key": ["a"], "feature": [["text"]]}, "lists of numbers"),
            ({"key": pa.array([None], pa.string()), "feature": [[1.0]]}, "without one"),
            ({"key": pa.array([], pa.string()), "feature": pa.array([], pa.list_(pa.float32(), 2))}, "at least one"),
            ({"key": ["a"], "feature": pa.array([b"1234"], pa.binary(4))}, "`dtype` and `width`"),
        ],
    )
    def test_columns_that_do_not_fit(self, tmp_path: Path, table: dict[str, object], message: str) -> None:
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        with pytest.raises(InvalidInput, match=message):
            own_vectors.plan(own_vectors.list_source(str(tmp_path)))

    def test_an_array_without_its_keys_or_with_other_rows(self, tmp_path: Path, vectors: np.ndarray) -> None:
        (tmp_path / "img_emb").mkdir()
        (tmp_path / "metadata").mkdir()
        np.save(tmp_path / "img_emb" / "img_emb_0000.npy", vectors)
        with pytest.raises(InvalidInput, match=r"metadata/metadata_0000\.parquet"):
            own_vectors.list_source(str(tmp_path))
        pq.write_table(pa.table({"key": KEYS[:5]}), tmp_path / "metadata" / "metadata_0000.parquet")
        with pytest.raises(InvalidInput, match=r"shape \[5, D\]"):
            own_vectors.plan(own_vectors.list_source(str(tmp_path)))

    def test_a_file_that_is_no_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(InvalidInput, match="must be a parquet file"):
            own_vectors.plan(own_vectors.list_source(str(tmp_path)))


def test_a_source_is_known_by_its_files(tmp_path: Path, vectors: np.ndarray) -> None:
    write(tmp_path / "a.parquet", vectors)
    first = own_vectors.list_source(str(tmp_path)).digest
    assert own_vectors.list_source(str(tmp_path)).digest == first
    write(tmp_path / "b.parquet", vectors, keys=[f"b{i}" for i in range(N)])
    assert own_vectors.list_source(str(tmp_path)).digest != first
