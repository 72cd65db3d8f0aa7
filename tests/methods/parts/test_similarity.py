import math
from fractions import Fraction
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from hashdist.ground.errors import InvalidInput
from hashdist.ground.permutation import permutation
from hashdist.methods.parts.communicator import Communicator, SingleProcess
from hashdist.methods.parts.similarity import GRID, ROW_BLOCK, Agreement, ImplicitW, quantize
from tests.worlds.training import on_ranks, sparse

ALONE = SingleProcess()


def random_positive(n: int, share: float, seed: int, symmetric: bool = True) -> NDArray[np.bool_]:
    positive = np.random.default_rng(seed).random((n, n)) < share
    positive |= positive.T if symmetric else False
    np.fill_diagonal(positive, False)
    return positive


def embeddings(n: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, bits, generator=generator)
    return torch.tanh(centres[torch.arange(n) % 6] + torch.randn(n, bits, generator=generator))


def implicit(positive: NDArray[np.bool_]) -> ImplicitW:
    graph = sparse(positive)
    return ImplicitW(graph.indptr, graph.indices)


def whole(w: ImplicitW) -> NDArray[np.bool_]:
    return w.block(np.arange(w.n)).numpy() > 0


def combined(integers: NDArray[np.int64]) -> tuple[int, int, int]:
    """Count, sum and sum of squares, however the latter was split."""
    count, total, high, low = integers.tolist()
    return count, total, (high << 20) + low


class DenseW:
    """The rule of Eqs 10-12 on a dense matrix of ordered pairs, in exact integers."""

    def __init__(self, positive: NDArray[np.bool_]) -> None:
        self.positive = positive.copy()

    def refresh(self, q: NDArray[np.int64], gamma: float) -> tuple[int, Fraction, float, int]:
        s = q @ q.T
        values = [int(v) for v in s[self.positive]]
        mean = Fraction(sum(values), len(values) * GRID**2)
        variance = Fraction(sum(v * v for v in values), len(values) * GRID**4) - mean**2
        m = float(mean) + gamma * math.sqrt(variance)
        threshold = math.ceil(Fraction(m) * GRID**2)
        self.positive |= s >= threshold
        np.fill_diagonal(self.positive, False)
        return len(values), mean, math.sqrt(variance), threshold


@pytest.mark.parametrize("bits", [8, 16, 64, 128])
def test_quantised_embeddings_are_close_and_their_products_exact(bits: int) -> None:
    z = embeddings(300, bits, 1)
    q = quantize(z)
    assert q.dtype == torch.int16
    u = z.double() / z.double().norm(dim=1, keepdim=True)
    bound = math.sqrt(bits) / 2048 + bits / 2**24
    assert float(((q.double() @ q.double().T) / GRID**2 - u @ u.T).abs().max()) <= bound
    exact = q.numpy().astype(np.int64) @ q.numpy().astype(np.int64).T
    assert np.abs(exact).max() < 1 << 24
    assert np.array_equal((q.float() @ q.float().T).numpy().astype(np.int64), exact)


def test_rows_without_direction_are_quantised_to_zero() -> None:
    z = torch.ones(3, 8)
    z[1] = 0
    z[2] = 1e-14
    assert quantize(z)[1:].abs().sum() == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_of_w0_is_the_dense_matrix_with_a_positive_diagonal(symmetric: bool) -> None:
    n = 90
    positive = random_positive(n, 0.1, 0, symmetric)
    w = implicit(positive)
    dense = np.where(positive | np.eye(n, dtype=bool), 1.0, -1.0)
    rows, columns = permutation(n, 1)[:33], permutation(n, 2)[:50]
    assert np.array_equal(w.block(rows, columns).numpy(), dense[np.ix_(rows, columns)])
    assert np.array_equal(w.block(columns).numpy(), dense[np.ix_(columns, columns)])
    assert w.block(rows).dtype == torch.float32
    assert w.edges == positive.sum()


@pytest.mark.parametrize(
    ("n", "bits", "share", "symmetric", "gamma"),
    [
        (60, 16, 0.1, True, 1.0),
        (150, 64, 0.05, True, 0.0),
        (150, 12, 0.05, False, 0.5),
        (ROW_BLOCK + 77, 32, 0.01, True, 0.5),
        (ROW_BLOCK + 515, 16, 0.01, False, 1.0),
    ],
)
def test_implicit_w_equals_the_dense_one_for_three_rounds(
    n: int, bits: int, share: float, symmetric: bool, gamma: float
) -> None:
    positive = random_positive(n, share, 3, symmetric)
    w, dense = implicit(positive), DenseW(positive)
    before = positive.sum()
    for round_ in range(3):
        q = quantize(embeddings(n, bits, round_))
        found = w.refresh(q, gamma, ALONE, threads=2)
        pairs, mu, sigma, threshold = dense.refresh(q.numpy().astype(np.int64), gamma)
        assert (found.pairs, found.mu, found.threshold) == (pairs, float(mu), threshold)
        assert found.sigma == pytest.approx(sigma, rel=1e-14)
        assert np.array_equal(whole(w), dense.positive | np.eye(n, dtype=bool))
        assert dense.positive.sum() >= before
        before = dense.positive.sum()
    assert before > positive.sum()


def test_implicit_w_follows_the_rule_on_the_embeddings_themselves_within_rounding() -> None:
    n, bits = 200, 32
    positive, z = random_positive(n, 0.1, 5), embeddings(n, bits, 9)
    w = implicit(positive)
    found = w.refresh(quantize(z), 1.0, ALONE)
    u = z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True)
    s = u @ u.T
    m = s[positive].mean() + s[positive].std()
    band = math.sqrt(bits) / 2048 + bits / 2**24
    assert found.m == pytest.approx(m, abs=2 * band)
    clear = np.abs(s - m) > 3 * band
    rule = (s >= m) | positive | np.eye(n, dtype=bool)
    assert np.array_equal(whole(w)[clear], rule[clear])
    assert clear.mean() > 0.9


def test_every_way_of_counting_gives_the_same_integers() -> None:
    n = 2 * ROW_BLOCK + 100
    positive = random_positive(n, 0.005, 2)
    rounds = [quantize(embeddings(n, 16, seed)) for seed in range(3)]

    def thresholds(world_size: int, threads: int) -> list[list[int]]:
        def work(comm):  # type: ignore[no-untyped-def]
            w = implicit(positive)
            return [(f := w.refresh(q, 0.5, comm, threads)).threshold for q in rounds] + [f.pairs]

        return on_ranks(world_size, work)  # type: ignore[no-any-return]

    expected = thresholds(1, 1)[0]
    for world_size, threads in ((1, 3), (2, 1), (4, 2)):
        assert all(found == expected for found in thresholds(world_size, threads))


def test_the_path_of_other_devices_gives_the_same_integers() -> None:
    n = ROW_BLOCK + 300
    w = implicit(random_positive(n, 0.01, 2))
    for seed in range(3):
        q = quantize(embeddings(n, 16, seed))
        stripes = [(0, 512), (512, 1000), (1000, n)]
        for stripe, expected in zip(stripes, w._scan(q, stripes, 1), strict=True):
            assert combined(w._stripe_on_device(q, *stripe)) == combined(expected)
        w.refresh(q, 0.5, ALONE)


def test_sums_of_squares_do_not_overflow_where_all_codes_agree() -> None:
    n, bits = 5000, 48
    w = implicit(random_positive(n, 0.001, 1))
    q = quantize(torch.ones(n, bits))
    s = int(q[0].long().square().sum())
    assert s > GRID**2
    assert w.refresh(q, -math.inf, ALONE).mu == s / GRID**2
    found = w.refresh(q, 1.0, ALONE, threads=2)
    assert (found.pairs, found.mu, found.sigma) == (n * (n - 1), s / GRID**2, 0.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.sampled_from([8, 16, 24]), st.floats(-2, 2), st.integers(0, 1000))
def test_w_never_shrinks(n: int, bits: int, gamma: float, seed: int) -> None:
    w = implicit(random_positive(n, 0.2, seed))
    before = whole(w)
    for round_ in range(3):
        w.refresh(quantize(embeddings(n, bits, seed + round_)), gamma, ALONE)
        after = whole(w)
        assert not (before & ~after).any()
        assert np.array_equal(after, after.T)
        before = after


def test_gamma_at_its_ends() -> None:
    positive, q = random_positive(50, 0.1, 0), quantize(embeddings(50, 16, 0))
    none, few, everything = implicit(positive), implicit(positive), implicit(positive)
    found = none.refresh(q, math.inf, ALONE)
    assert found.m == math.inf
    assert found.report()["m"] == "inf"
    assert np.array_equal(whole(none), positive | np.eye(50, dtype=bool))
    everything.refresh(q, -math.inf, ALONE)
    assert whole(everything).all()
    few.refresh(q, -1e9, ALONE)
    assert whole(few).all()


def test_a_threshold_above_one_adds_nothing_and_no_pairs_skip_the_update() -> None:
    positive, q = random_positive(50, 0.1, 0), quantize(embeddings(50, 16, 0))
    strict = implicit(positive)
    found = strict.refresh(q, 5.0, ALONE)
    assert found.m is not None
    assert found.m > 1
    assert np.array_equal(whole(strict), positive | np.eye(50, dtype=bool))
    empty = implicit(np.zeros((50, 50), bool))
    found = empty.refresh(q, -5.0, ALONE)
    assert (found.pairs, found.m, empty.thresholds) == (0, None, [])
    assert np.array_equal(whole(empty), np.eye(50, dtype=bool))


def test_state_survives_a_safe_file() -> None:
    positive = random_positive(80, 0.1, 4)
    w, again = implicit(positive), implicit(positive)
    for seed in range(2):
        w.refresh(quantize(embeddings(80, 16, seed)), 0.5, ALONE)
    file = BytesIO()
    torch.save(w.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert np.array_equal(whole(again), whole(w))
    assert again.thresholds == w.thresholds


def test_float64_blocks_for_float64_losses() -> None:
    graph = sparse(random_positive(20, 0.2, 0))
    w = ImplicitW(graph.indptr, graph.indices, dtype=torch.float64)
    w.refresh(quantize(embeddings(20, 8, 0)), 0.0, ALONE)
    assert w.block(np.arange(20)).dtype == torch.float64


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInput, match="row pointers"):
        ImplicitW(np.array([0, 3]), np.array([0], np.int32))
    w = implicit(random_positive(10, 0.2, 0))
    with pytest.raises(InvalidInput, match="all 10 images"):
        w.refresh(quantize(embeddings(9, 8, 0)), 1.0, ALONE)


@pytest.mark.parametrize("world_size", [1, 3])
def test_agreement_with_labels_is_precision_recall_and_f_of_the_dense_matrix(world_size: int) -> None:
    rng = np.random.default_rng(0)
    n = 700
    positive = rng.random((n, n)) < 0.05
    graph = sparse(positive | positive.T)
    labels = rng.random((n, 6)) < 0.25
    z = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))

    def work(comm: Communicator) -> Agreement:
        w = ImplicitW(graph.indptr, graph.indices)
        w.refresh(quantize(z), 1.0, comm)
        return w.agreement(labels, comm)

    w = ImplicitW(graph.indptr, graph.indices)
    w.refresh(quantize(z), 1.0, SingleProcess())
    off = ~np.eye(n, dtype=bool)
    found = (w.block(np.arange(n)).numpy() > 0) & off
    shared = ((labels.astype(int) @ labels.T.astype(int)) > 0) & off
    precision, recall = (found & shared).sum() / found.sum(), (found & shared).sum() / shared.sum()
    for agreed in on_ranks(world_size, work):
        assert (agreed.rows, agreed.positives) == (n, found.sum())
        assert (agreed.precision, agreed.recall) == pytest.approx((precision, recall))
        assert agreed.f_w == pytest.approx(2 * precision * recall / (precision + recall))
