"""Shallow methods with labels, each against what its paper says it is."""

from itertools import pairwise, product

import numpy as np
import pytest
from scipy.linalg import eigh
from scipy.optimize import check_grad
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_limits

from hashdist.ground.bits import hamming, pack
from hashdist.ground.errors import InvalidInput
from hashdist.methods import ksh, lfh, rsdh, sdh, splh
from hashdist.methods.contract import fit_shallow
from hashdist.methods.parts import discrete
from hashdist.methods.parts.labels import pair_labels


def labelled(n: int = 300, width: int = 16, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clusters, one class each."""
    rng = np.random.default_rng(seed)
    of_class = rng.integers(0, classes, n)
    features = rng.standard_normal((classes, width))[of_class] + rng.standard_normal((n, width)) + 2
    return features.astype(np.float32), np.eye(classes, dtype=bool)[of_class]


def several_labels(n: int = 300, width: int = 16, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Images of one to three classes, features the sum of theirs."""
    rng = np.random.default_rng(3)
    labels = rng.random((n, classes)) < 0.25
    labels[np.arange(n), rng.integers(0, classes, n)] = True
    return (labels @ rng.standard_normal((classes, width)) + rng.standard_normal((n, width))).astype(np.float32), labels


def gap(codes: np.ndarray, labels: np.ndarray) -> float:
    """Mean Hamming distance of images that share no label, less that of those that do."""
    distances = np.stack([hamming(code, codes) for code in codes])
    similar = labels.astype(int) @ labels.T > 0
    return float(distances[~similar].mean() - distances[similar].mean())


@pytest.mark.parametrize("method", [ksh, lfh, rsdh, sdh, splh])
class TestEveryMethod:
    def test_same_seed_same_codes_and_other_seeds_others(self, method) -> None:
        features, labels = labelled()
        codes = [pack(method.fit(features, 16, seed, labels)(features)) for seed in (0, 0, 1)]
        np.testing.assert_array_equal(codes[0], codes[1])
        if method is not splh:  # which draws its sample alone, and here takes all images
            assert (codes[0] != codes[2]).any()

    def test_codes_of_new_images_follow_their_labels(self, method) -> None:
        for make in (labelled, several_labels):
            features, labels = make(n=600)
            codes = pack(method.fit(features[:400], 16, 0, labels[:400])(features[400:]))
            assert gap(codes, labels[400:]) > 1.5

    def test_threads_do_not_change_the_code(self, method) -> None:
        features, labels = labelled(500, 48)
        z = []
        for threads in (1, 2):
            with threadpool_limits(threads):
                z.append(method.fit(features, 16, 0, labels)(features))
        assert ((z[0] >= 0) != (z[1] >= 0)).mean() < 1e-3

    def test_half_precision_features(self, method) -> None:
        features, labels = labelled()
        z = method.fit(features.astype(np.float16), 16, 0, labels)(features.astype(np.float16))
        assert z.dtype == np.float32
        assert np.isfinite(z).all()

    def test_needs_labels_and_images(self, method) -> None:
        features, labels = labelled(20)
        with pytest.raises(InvalidInput, match="learns from labels"):
            fit_shallow(method, features, None, 16, 0)
        with pytest.raises(InvalidInput, match="training images"):
            method.fit(features[:0], 16, 0, labels[:0])


class TestKsh:
    def parts(self, n: int = 120) -> tuple[np.ndarray, np.ndarray]:
        """Centred kernel features and pair labels."""
        features, labels = several_labels(n)
        kernel = np.exp(-((features[:, None] - features[None, :20]) ** 2).sum(2) / 40).astype(np.float64)
        return kernel - kernel.mean(0), pair_labels(labels)

    def test_images_are_similar_if_and_only_if_they_share_a_label(self) -> None:
        labels = np.array([[1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 1, 0]], bool)
        wanted = [[1 if set(np.flatnonzero(a)) & set(np.flatnonzero(b)) else -1 for b in labels] for a in labels]
        np.testing.assert_array_equal(pair_labels(labels), wanted)

    def test_every_greedy_bit_lowers_the_objective_by_the_residual_recursion(self) -> None:
        kernel, similarity = self.parts()
        bits = 12
        directions = ksh.greedy_bits(kernel, similarity, bits)
        codes = np.where(kernel @ directions >= 0, 1, -1)
        before = (similarity**2).sum()
        for k in range(1, bits + 1):
            residue = bits * similarity - sum(np.outer(codes[:, t], codes[:, t]) for t in range(k - 1))
            h = codes[:, k - 1]
            after = ((codes[:, :k] @ codes[:, :k].T / bits - similarity) ** 2).sum()
            assert before - after == pytest.approx((2 * h @ residue @ h - len(h) ** 2) / bits**2)
            assert ksh.gain(kernel, residue, directions[:, k - 1]) == pytest.approx(h @ residue @ h)
            assert after <= before
            before = after

    def test_relaxed_bit_maximises_the_rayleigh_quotient(self) -> None:
        kernel, similarity = self.parts()
        gram = kernel.T @ kernel + 1e-9 * np.eye(20)
        a = ksh.spectral(kernel, similarity, gram)
        assert a @ gram @ a == pytest.approx(len(kernel))
        values = eigh(np.linalg.solve(np.linalg.cholesky(gram), kernel.T @ similarity @ kernel) @ np.linalg.inv(
            np.linalg.cholesky(gram)).T, eigvals_only=True)  # fmt: skip
        assert a @ kernel.T @ similarity @ kernel @ a / len(kernel) == pytest.approx(values[-1], rel=1e-6)

    def test_gradient_and_that_its_steps_descend(self) -> None:
        kernel, similarity = self.parts()
        start = ksh.spectral(kernel, similarity, kernel.T @ kernel + 1e-9 * np.eye(20)) / 5
        error = check_grad(
            lambda a: ksh.gradient(kernel, similarity, a)[0], lambda a: ksh.gradient(kernel, similarity, a)[1], start
        )
        assert error < 1e-4 * np.linalg.norm(ksh.gradient(kernel, similarity, start)[1])
        end = ksh.smooth(kernel, similarity, start)
        assert ksh.gradient(kernel, similarity, end)[0] < ksh.gradient(kernel, similarity, start)[0]


class TestSdh:
    def objective(self, codes: np.ndarray, w: np.ndarray, y: np.ndarray, predicted: np.ndarray) -> float:
        """||Y - B W||^2 + nu ||B - F||^2, by loops."""
        fit = sum((y[i, c] - codes[i] @ w[:, c]) ** 2 for i in range(len(y)) for c in range(y.shape[1]))
        return float(fit + discrete.NU * sum(((codes[i] - predicted[i]) ** 2).sum() for i in range(len(y))))

    def test_a_bit_column_is_the_best_of_all_sign_vectors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(discrete, "NU", 0.3)
        monkeypatch.setattr(discrete, "SWEEPS", 1)
        rng = np.random.default_rng(0)
        n, bits = 7, 3
        codes = np.where(rng.random((n, bits)) < 0.5, -1.0, 1.0)
        w, y, predicted = rng.standard_normal((bits, 4)), rng.random((n, 4)), rng.standard_normal((n, bits))
        wanted = codes.copy()
        for bit in range(bits):
            columns = []
            for z in product([-1.0, 1.0], repeat=n):
                wanted[:, bit] = z
                columns.append((self.objective(wanted, w, y, predicted), z))
            wanted[:, bit] = min(columns)[1]
        np.testing.assert_array_equal(discrete.discrete_descent(codes, w, y, predicted), wanted)

    def test_sweeps_never_raise_the_objective_and_end_where_no_bit_wants_to_change(self) -> None:
        rng = np.random.default_rng(1)
        codes = np.where(rng.random((40, 8)) < 0.5, -1.0, 1.0)
        w, y, predicted = rng.standard_normal((8, 4)), rng.random((40, 4)), rng.standard_normal((40, 8))
        found = discrete.discrete_descent(codes, w, y, predicted)
        best = self.objective(found, w, y, predicted)
        assert best < self.objective(codes, w, y, predicted)
        for i, bit in product(range(40), range(8)):
            flipped = found.copy()
            flipped[i, bit] *= -1
            assert self.objective(flipped, w, y, predicted) >= best - 1e-9

    def test_w_step_is_ridge_regression(self) -> None:
        rng = np.random.default_rng(2)
        codes, y = np.where(rng.random((50, 8)) < 0.5, -1.0, 1.0), rng.random((50, 3))
        reference = Ridge(alpha=1.0, fit_intercept=False).fit(codes, y).coef_.T
        np.testing.assert_allclose(discrete.ridge(codes, y, 1.0), reference, rtol=1e-8)

    def test_f_step_is_least_squares(self) -> None:
        rng = np.random.default_rng(3)
        phi, codes = rng.random((60, 10)), np.where(rng.random((60, 8)) < 0.5, -1.0, 1.0)
        np.testing.assert_allclose(
            discrete.hash_solver(phi) @ codes, np.linalg.lstsq(phi, codes, rcond=None)[0], rtol=1e-3, atol=1e-3
        )


class TestLfh:
    def test_slope_and_bound_are_those_of_the_log_posterior(self) -> None:
        rng = np.random.default_rng(0)
        u, drawn, shared = rng.standard_normal(5), rng.standard_normal((7, 5)), rng.random(7) < 0.5

        def posterior(u: np.ndarray) -> float:
            total = -u @ u / (2 * lfh.PRIOR)
            for j in range(7):
                theta = u @ drawn[j] / 2
                total += 2 * (shared[j] * theta - np.log1p(np.exp(theta)))  # (i, j) and (j, i)
            return float(total)

        step = lfh.ascend(u[None], drawn, shared[None])[0] - u
        bound = sum(np.outer(v, v) for v in drawn) / 8 + np.eye(5) / lfh.PRIOR
        numeric = np.array([(posterior(u + e) - posterior(u - e)) / 2e-5 for e in 1e-5 * np.eye(5)])
        np.testing.assert_allclose(bound @ step, numeric, rtol=1e-5, atol=1e-7)
        hessian = np.array(
            [[(posterior(u + a + b) - posterior(u + a - b) - posterior(u - a + b) + posterior(u - a - b)) / 4e-6
              for a in 1e-3 * np.eye(5)] for b in 1e-3 * np.eye(5)]
        )  # fmt: skip
        assert np.linalg.eigvalsh(hessian + bound).min() > -1e-6

    def test_a_turn_never_lowers_the_posterior_of_its_pairs(self) -> None:
        rng = np.random.default_rng(1)
        drawn, shared = 3 * rng.standard_normal((8, 6)), rng.random((30, 8)) < 0.5

        def posterior(u: np.ndarray) -> float:
            theta = u @ drawn.T / 2
            return float(2 * (shared * theta - np.logaddexp(0, theta)).sum() - (u**2).sum() / (2 * lfh.PRIOR))

        u = 3 * rng.standard_normal((30, 6))
        values = [posterior(u)]
        for _ in range(20):
            u = lfh.ascend(u, drawn, shared)
            values.append(posterior(u))
        assert all(b >= a - 1e-9 for a, b in pairwise(values))
        assert values[-1] > values[0] + 1

    def test_regression_is_ridge_regression(self) -> None:
        rng = np.random.default_rng(2)
        x, u = rng.standard_normal((50, 9)).astype(np.float32), rng.standard_normal((50, 4))
        reference = Ridge(alpha=1.0, fit_intercept=False).fit(x.astype(np.float64), u).coef_.T
        np.testing.assert_allclose(lfh.regression(x, u), reference, rtol=1e-4, atol=1e-6)

    def test_more_bits_than_images(self) -> None:
        with pytest.raises(InvalidInput, match="at least 33 training images"):
            lfh.fit(*labelled(20)[:1], 32, 0, labelled(20)[1])


class TestRsdh:
    def test_without_bound_on_the_scale_it_is_sdh(self) -> None:
        features, labels = several_labels()
        found = rsdh.fit(features, 16, 0, labels, scale=1e15)
        np.testing.assert_allclose(found(features), sdh.fit(features, 16, 0, labels)(features), rtol=1e-4, atol=1e-4)

    def test_every_step_lowers_the_cauchy_objective(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(discrete, "NU", 0.1)
        rng = np.random.default_rng(0)
        n, bits, scale = 50, 6, 0.7
        codes, y = np.where(rng.random((n, bits)) < 0.5, -1.0, 1.0), rng.random((n, 4))
        w, predicted = rng.standard_normal((bits, 4)), rng.standard_normal((n, bits))

        def objective() -> float:
            r = ((y - codes @ w) ** 2).sum(1)
            return float(scale * np.log1p(r / scale).sum() + (w**2).sum() + 0.1 * ((codes - predicted) ** 2).sum())

        values = [objective()]
        for _ in range(4):
            weights = 1 / (1 + rsdh.errors(codes, w, y) / scale)
            w = rsdh.weighted_ridge(codes, y, weights)
            values.append(objective())
            weights = 1 / (1 + rsdh.errors(codes, w, y) / scale)
            codes = discrete.discrete_descent(codes, w, y, predicted / weights[:, None])
            values.append(objective())
        assert all(b <= a + 1e-9 for a, b in pairwise(values))
        assert values[-1] < values[0]

    def test_weighted_step_is_weighted_ridge_regression(self) -> None:
        rng = np.random.default_rng(1)
        codes, y, weights = np.where(rng.random((50, 8)) < 0.5, -1.0, 1.0), rng.random((50, 3)), rng.random(50)
        reference = Ridge(alpha=1.0, fit_intercept=False).fit(codes, y, sample_weight=weights).coef_.T
        np.testing.assert_allclose(rsdh.weighted_ridge(codes, y, weights), reference, rtol=1e-8)

    def test_codes_stand_a_share_of_wrong_labels(self) -> None:
        features, labels = labelled(600)
        wrong = labels.copy()
        swapped = np.random.default_rng(0).random(400) < 0.3
        wrong[:400][swapped] = np.roll(labels[:400][swapped], 1, axis=1)
        codes = pack(rsdh.fit(features[:400], 16, 0, wrong[:400])(features[400:]))
        assert gap(codes, labels[400:]) > 1.5


class TestSplh:
    def test_sequence_is_that_of_the_plain_loop(self) -> None:
        features, labels = several_labels(60, 10)
        x = (features - features.mean(0)).astype(np.float64)
        sample, pairs = x[:40], pair_labels(labels[:40])
        found = splh.sequence(x.T @ x, sample, pairs, 8)
        share = splh.ETA * (sample**2).sum() / (x**2).sum()
        for bit in range(8):
            m = sample.T @ pairs @ sample / 40 + share * x.T @ x
            w = np.linalg.eigh(m)[1][:, -1]
            assert abs(w @ found[:, bit]) == pytest.approx(1, abs=1e-8)
            x = x - np.outer(x @ w, w)
            guess = np.outer(sample @ w, sample @ w)
            guess /= abs(guess).mean()
            for i, j in product(range(40), range(40)):
                if guess[i, j] * pairs[i, j] < 0:  # only pairs that this bit gets wrong, and they gain weight
                    before = abs(pairs[i, j])
                    pairs[i, j] -= splh.STEP * guess[i, j]
                    assert abs(pairs[i, j]) > before

    def test_first_direction_without_labels_is_the_first_principal_one(self) -> None:
        features, _ = labelled()
        x = (features - features.mean(0)).astype(np.float64)
        w = splh.sequence(x.T @ x, x, np.zeros((300, 300)), 1)[:, 0]
        assert abs(w @ np.linalg.svd(x, full_matrices=False)[2][0]) == pytest.approx(1, abs=1e-8)

    def test_no_more_bits_than_directions(self) -> None:
        features, labels = labelled()
        with pytest.raises(InvalidInput, match="= 16 bits, found 32"):
            splh.fit(features, 32, 0, labels)
