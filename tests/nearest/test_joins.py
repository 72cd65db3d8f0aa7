"""Near-duplicates of one or two blocks, against all pairs compared one by one and a union of sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hashdist.ground.bits import hamming
from hashdist.nearest import joins
from hashdist.nearest.joins import Block


def clusters_of(ids: NDArray[np.int64], pairs: list[tuple[int, int]]) -> dict[int, int]:
    """Smallest id by id, of the rows that have a partner: sets merged one pair after the other."""
    sets = {int(id_): {int(id_)} for id_ in ids}
    for a, b in pairs:
        if sets[a] is not sets[b]:
            sets[a] |= sets[b]
            for member in sets[b]:
                sets[member] = sets[a]
    return {id_: min(members) for id_, members in sets.items() if len(members) > 1}


def all_pairs(left: Block, right: Block, radius: int) -> list[tuple[int, int]]:
    return [
        (int(left.ids[row]), int(id_))
        for row in range(len(left.ids))
        for id_ in right.ids[hamming(left.codes[row], right.codes) <= radius]
    ]


def found(edges: joins.Edges) -> dict[int, int]:
    ids, clusters = joins.components(edges)
    return dict(zip(ids.tolist(), clusters.tolist(), strict=True))


def block(rng: np.random.Generator, n: int, width: int, varied_bits: int, first: int = 0) -> Block:
    """Codes that differ in some of their bits only, so that many are near each other and some are equal."""
    where = rng.permutation(width * 8)[:varied_bits]
    bits = np.zeros((n, width * 8), np.uint8)
    bits[:, where] = rng.integers(0, 2, (n, varied_bits))
    ids = np.sort(rng.choice(np.arange(first, first + 50 * n), n, replace=False)) - 7 * n
    return Block(ids.astype(np.int64), np.packbits(bits, axis=1))


@given(
    st.integers(0, 2**32),
    st.integers(0, 60),
    st.sampled_from([1, 2, 3, 8, 9, 16, 32]),
    st.integers(0, 24),
    st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_clusters_are_those_of_all_pairs(seed: int, n: int, width: int, varied: int, radius: int) -> None:
    rng = np.random.default_rng(seed)
    rows = block(rng, n, width, min(varied, width * 8))
    edges = joins.within(rows, radius)
    assert found(edges) == clusters_of(rows.ids, all_pairs(rows, rows, radius))
    assert len(edges) < max(n, 1)


@given(st.integers(0, 2**32), st.sampled_from([1, 8, 12]), st.integers(2, 24), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_two_blocks_are_joined_across_and_the_same_row_may_be_in_both(
    seed: int, width: int, varied: int, radius: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = block(rng, 60, width, min(varied, width * 8))
    parts = np.sort(rng.integers(0, 61, 2))
    left = Block(rows.ids[: parts[1]], rows.codes[: parts[1]])
    right = Block(rows.ids[parts[0] :], rows.codes[parts[0] :])
    three = [joins.within(left, radius), joins.within(right, radius)]
    three.append(joins.between(left, right, radius))
    assert found(np.concatenate(three)) == clusters_of(rows.ids, all_pairs(rows, rows, radius))
    across = joins.between(left, right, radius)
    near = {tuple(sorted(pair)) for pair in all_pairs(left, right, radius)}
    assert {tuple(sorted(edge)) for edge in across.tolist()} <= near


@pytest.mark.parametrize(("radius", "width"), [(0, 8), (1, 8), (2, 8), (3, 8), (3, 16), (5, 4)])
def test_buckets_find_what_all_pairs_find(radius: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorts that cost little, so that buckets pay; near-duplicates planted among random codes."""
    monkeypatch.setattr(joins, "_SORT_NS", 10.0)
    rng = np.random.default_rng(radius)
    codes = rng.integers(0, 256, (4000, width), dtype=np.uint8)
    bits = np.unpackbits(codes[:800], axis=1)
    for row, count in enumerate(rng.integers(0, radius + 3, 800)):
        bits[row, rng.permutation(width * 8)[:count]] ^= 1
    rows = Block(np.arange(4800) * 3, np.concatenate([codes, np.packbits(bits, axis=1)]))
    if radius <= 3 and radius:
        assert len(joins._masks(joins._words(rows.codes), None, radius)) > 1
    assert found(joins.within(rows, radius)) == clusters_of(rows.ids, all_pairs(rows, rows, radius))


@pytest.mark.parametrize("few", [0, 1, 300])
def test_a_few_rows_are_joined_with_many(few: int) -> None:
    rng = np.random.default_rng(few)
    codes = rng.integers(0, 256, (5000, 8), dtype=np.uint8)
    codes[:few] = codes[4000 : 4000 + few] ^ (rng.random((few, 8)) < 0.2)
    codes[4100:4200] = codes[0]
    rows = Block(np.arange(5000) * 2 - 3000, codes)
    left, right = Block(rows.ids[:few], codes[:few]), Block(rows.ids[few // 2 :], codes[few // 2 :])
    expected = clusters_of(rows.ids, [pair for pair in all_pairs(left, right, 2) if pair[0] != pair[1]])
    for across in (joins.between(left, right, 2), joins.between(right, left, 2)):
        joined = np.concatenate([across, joins.within(right, 0), joins.within(left, 0)])
        same = [pair for side in (left, right) for pair in all_pairs(side, side, 0)]
        assert found(joined) == clusters_of(rows.ids, [*expected.items(), *same])


def test_masks_cover_every_way_to_differ() -> None:
    rng = np.random.default_rng(0)
    words = joins._words(rng.integers(0, 256, (2_000_000 // 100, 8), dtype=np.uint8))
    for radius in (1, 2, 3):
        masks = joins._masks(words, None, radius)
        for _ in range(300):
            different = np.bitwise_or.reduce(np.uint64(1) << rng.permutation(64)[:radius].astype(np.uint64))
            assert any(not mask[0] & different for mask in masks)


@pytest.mark.parametrize("kinds", [1, 3])
def test_many_equal_codes_cost_no_more_than_others(kinds: int) -> None:
    codes = np.random.default_rng(0).integers(0, 256, (kinds, 8), dtype=np.uint8)[np.arange(100_000) % kinds]
    edges = joins.within(Block(np.arange(100_000), codes), 2)
    ids, clusters = joins.components(edges)
    assert len(edges) == 100_000 - kinds
    assert len(ids) == 100_000
    np.testing.assert_array_equal(np.unique(clusters), np.arange(kinds))
    across = joins.between(Block(np.arange(50_000), codes[:50_000]), Block(np.arange(9, 100_000), codes[9:]), 2)
    assert len(across) <= kinds


def test_no_rows_and_one_row() -> None:
    none, one = (
        Block(np.empty(0, np.int64), np.empty((0, 8), np.uint8)),
        Block(np.array([5]), np.zeros((1, 8), np.uint8)),
    )
    for radius in (0, 3):
        assert len(joins.within(none, radius)) == len(joins.within(one, radius)) == 0
        assert len(joins.between(one, none, radius)) == len(joins.between(none, none, radius)) == 0
    assert [len(part) for part in joins.components(joins.no_edges())] == [0, 0]


def test_stars_give_the_clusters_back() -> None:
    edges = np.array([[9, 4], [4, 7], [1, 2], [-3, 2]])
    ids, clusters = joins.components(edges)
    assert (ids.tolist(), clusters.tolist()) == ([-3, 1, 2, 4, 7, 9], [-3, -3, -3, 4, 4, 4])
    again = joins.components(joins.stars(ids, clusters))
    np.testing.assert_array_equal(again, (ids, clusters))
