"""The ground floor: ids, bits, order, vectors in tables."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashdist.ground import bits, ids, permutation, ranges, schema
from hashdist.ground.errors import Corrupt, InvalidInput


def test_ids_are_stable_and_non_negative() -> None:
    # frozen: an index written by an older version must find its rows
    assert ids.image_id("a/cat.jpg") == ids.image_ids(["a/cat.jpg"])[0]
    assert ids.image_id("a/cat.jpg") == 989090154889624824
    many = ids.image_ids([f"{i}.png" for i in range(2000)])
    assert (many >= 0).all()
    assert len(np.unique(many)) == 2000
    assert ids.image_id("a", salt=1) != ids.image_id("a")


def test_of_two_colliding_keys_the_later_takes_the_next_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "image_id", lambda key, salt=0: (len(key) + 100 * salt) & 0xFF)
    assert ids.assign_salts(["bb", "aa", "c", "cc"]) == {"bb": 1, "cc": 2}


@given(st.integers(1, 16).map(lambda words: 8 * words), st.integers(1, 20))
def test_codes_survive_packing(width: int, rows: int) -> None:
    z = np.random.default_rng(width * rows).standard_normal((rows, width)).astype(np.float32)
    z[0, 0] = 0.0
    z[0, 1] = -0.0
    codes = bits.pack(z)
    assert codes.shape == (rows, width // 8)
    np.testing.assert_array_equal(bits.signs(codes), np.where(z >= 0, 1, -1))
    assert codes[0, 0] & 0b11 == 0b11  # sign(0) = +1, and bit j lies at 1 << j
    expected = (bits.unpack(codes) != bits.unpack(codes[:1])).sum(1)
    np.testing.assert_array_equal(bits.hamming(codes[0], codes), expected)


@pytest.mark.parametrize("length", [0, -8, 12, 7])
def test_code_lengths_are_multiples_of_8(length: int) -> None:
    with pytest.raises(InvalidInput, match="multiple of 8"):
        bits.check_bits(length)


def test_slices_cover_every_batch_at_any_world_size() -> None:
    for batch in range(1, 40):
        for world in range(1, batch + 1):
            slices = [permutation.rank_slice(batch, rank, world) for rank in range(world)]
            assert [row for s in slices for row in range(s.start, s.stop)] == list(range(batch))
            sizes = {s.stop - s.start for s in slices}
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= 1


def test_every_epoch_is_another_permutation() -> None:
    first, second = permutation.permutation(1000, 7, 0), permutation.permutation(1000, 7, 1)
    for found in (first, second):
        np.testing.assert_array_equal(np.sort(found), np.arange(1000))
    assert (first != second).mean() > 0.9
    np.testing.assert_array_equal(permutation.permutation(6, 3, 1), permutation.permutation(6, 3, 1))
    batches = permutation.epoch_batches(103, 10, seed=7, epoch=0)
    assert batches.shape == (10, 10)
    assert len(np.unique(batches)) == 100


@given(st.integers(0, 30), st.integers(1, 7))
def test_blocks_cover_all_rows_once(n: int, size: int) -> None:
    assert [row for start, stop in ranges.blocks(n, size) for row in range(start, stop)] == list(range(n))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(["float32", "float16", "uint8"]), st.integers(0, 2**20))
def test_vectors_survive_a_table(rows: int, width: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = (rng.random((rows, width)) * 200).astype(dtype)
    present = rng.random(rows) < 0.7
    field = schema.vector_schema("feature", dtype, width)
    pieces = [slice(0, rows // 2), slice(rows // 2, rows)]
    column = pa.chunked_array([schema.to_vectors(vectors[p], present[p]) for p in pieces if p.stop > p.start])
    np.testing.assert_array_equal(column.is_null().to_numpy(), ~present)
    np.testing.assert_array_equal(schema.from_vectors(column, field), np.where(present[:, None], vectors, 0))
    whole = pa.chunked_array([schema.to_vectors(vectors)]).slice(rows // 3)
    np.testing.assert_array_equal(schema.from_vectors(whole, field), vectors[rows // 3 :])


def test_vectors_without_metadata_are_refused() -> None:
    column = pa.chunked_array([schema.to_vectors(np.zeros((2, 3), np.float32))])
    with pytest.raises(Corrupt, match="metadata"):
        schema.from_vectors(column, pa.schema([("feature", pa.binary(12))]))
