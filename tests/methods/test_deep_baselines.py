"""The deep baselines against what their papers imply: double loops, closed forms, brute force, finite differences."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from hashdist.ground.errors import InvalidInput
from hashdist.methods import cnnh, csq, dsdh, hashnet, mls3rduh, ssdh
from hashdist.methods.contract import Batch, Place, method_settings
from hashdist.methods.parts import likelihood, straight_through
from hashdist.methods.parts.communicator import SingleProcess
from tests.worlds.training import deep, tiny_data

N, L = 23, 16


def rows_of(count: int = 9, n: int = 230, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)[:count].astype(np.int64)


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def method(name: str, preset: str = "paper", **options: Any) -> Any:
    """The method on tiny_data, alone, in float64."""
    module = deep(name)
    chosen = method_settings(module, preset, options)
    return module.Method(chosen, Place(L, True, tiny_data(), SingleProcess(), dtype=torch.float64, seed=3))


def batch_of(rows: np.ndarray, step: int = 0) -> Batch:
    return Batch(rows, slice(0, len(rows)), (len(rows),), step)


def same_class(a: int, b: int) -> float:
    labels = tiny_data().labels
    assert labels is not None
    return float((labels[a] & labels[b]).any())


class TestLikelihood:
    def test_negative_log_likelihood_is_the_naive_one(self) -> None:
        theta, s = gaussian(5, 7, scale=6.0), (gaussian(5, 7, seed=1) > 0).double()
        found = likelihood.negative_log_likelihood(theta, s)
        for i in range(5):
            for j in range(7):
                p = 1 / (1 + np.exp(-float(theta[i, j])))
                naive = -np.log(p if s[i, j] else 1 - p)
                assert float(found[i, j]) == pytest.approx(naive, rel=1e-9)

    def test_large_theta_neither_overflows_nor_loses_its_gradient(self) -> None:
        theta = torch.tensor([-800.0, -50.0, 39.9, 40.1, 800.0], dtype=torch.float64, requires_grad=True)
        likelihood.softplus(theta).sum().backward()
        assert theta.grad is not None
        exact = torch.clamp(theta.detach(), min=0) + torch.log1p(torch.exp(-theta.detach().abs()))
        assert torch.allclose(likelihood.softplus(theta.detach()), exact, rtol=1e-15, atol=0)
        assert torch.allclose(theta.grad, torch.sigmoid(theta.detach()), rtol=1e-15, atol=0)

    def test_log_cosh(self) -> None:
        x = torch.tensor([-3.0, -1e-3, 0.0, 0.7, 20.0], dtype=torch.float64)
        assert torch.allclose(likelihood.log_cosh(x), torch.log(torch.cosh(x)), rtol=1e-12, atol=1e-16)
        assert float(likelihood.log_cosh(torch.tensor(900.0))) == pytest.approx(900 - np.log(2))

    def test_similar_is_a_class_in_common(self) -> None:
        labels = np.random.default_rng(0).random((12, 4)) < 0.3
        found = likelihood.similar(likelihood.indicator(labels[:5]), likelihood.indicator(labels))
        for i in range(5):
            for j in range(12):
                assert bool(found[i, j]) == bool(set(np.flatnonzero(labels[i])) & set(np.flatnonzero(labels[j])))


class TestDPSH:
    def test_loss_is_the_double_loop_over_batch_and_bank(self) -> None:
        own, rows, z = method("dpsh", eta=3.0), rows_of(), gaussian(9, L)
        bank = gaussian(230, L, seed=1)
        own.bank.u_nL.copy_(bank)
        found = own.loss({"z": z}, batch_of(rows))
        u = bank.clone()
        u[torch.from_numpy(rows)] = z
        total = 0.0
        for i, row in enumerate(rows):
            for j in range(230):
                theta = 0.5 * float(z[i] @ u[j])
                total += 2 * (float(np.log1p(np.exp(theta))) - same_class(row, j) * theta)
            total += 3.0 * float(((z[i] - torch.where(z[i] >= 0, 1.0, -1.0)) ** 2).sum())
        assert float(found.backward) == pytest.approx(total / (9 * 230), rel=1e-12)

    def test_gradient_is_that_of_the_released_code(self) -> None:
        """Eq 7: (A - S) U + 2 eta (u - sgn u), over B n, with A the probabilities."""
        own, rows, z = method("dpsh", eta=3.0), rows_of(), gaussian(9, L).requires_grad_()
        own.bank.u_nL.copy_(gaussian(230, L, seed=1))
        own.loss({"z": z}, batch_of(rows)).backward.backward()
        u, fixed = own.bank.u_nL, z.detach()
        s = torch.tensor([[same_class(i, j) for j in range(230)] for i in rows], dtype=torch.float64)
        a = torch.sigmoid(fixed @ u.T / 2)
        expected = (a - s) @ u + 2 * 3.0 * (fixed - torch.where(fixed >= 0, 1.0, -1.0))
        assert z.grad is not None
        assert torch.allclose(z.grad, expected / (9 * 230), rtol=1e-12)


class TestHashNet:
    def test_weights_and_loss_are_the_double_loop(self) -> None:
        """Eqs 2-4 with norm(S_1), norm(S_0) counted over all pairs of the training images."""
        own, rows, z = method("hashnet", alpha=7.0, batch=50), rows_of(), gaussian(9, L)
        labels = tiny_data().labels
        assert labels is not None
        s1 = sum(bool((a & b).any()) for a in labels for b in labels)
        steps, total = own.steps, 0.0
        step = steps // 2
        g = np.tanh(10 ** (5 / 9) * z.numpy())  # stage 5 of 0 to 9
        for i in range(9):
            for j in range(9):
                s, theta = same_class(rows[i], rows[j]), 7.0 / L * float(g[i] @ g[j])
                weight = 230**2 / s1 if s else 230**2 / (230**2 - s1)
                total += weight * (float(np.log1p(np.exp(theta))) - s * theta)
        found = own.loss({"z": z}, batch_of(rows, step))
        assert float(found.backward) == pytest.approx(total / 81, rel=1e-12)

    def test_several_labels_weigh_by_the_share_of_common_classes(self) -> None:
        labels = np.random.default_rng(1).random((40, 5)) < 0.4
        labels[:, 0] |= ~labels.any(1)
        share = hashnet.similar_share(labels)
        assert share == pytest.approx(np.mean([(a & b).any() for a in labels for b in labels]))
        found = hashnet.pair_weights(likelihood.indicator(labels).double(), share)
        for i in range(40):
            for j in range(40):
                both, either = (labels[i] & labels[j]).sum(), (labels[i] | labels[j]).sum()
                assert float(found[i, j]) == pytest.approx(both / either / share if both else 1 / (1 - share))

    def test_beta_rises_from_one_to_its_last_in_equal_ratios(self) -> None:
        found = [likelihood.hardness(step, 100, 4, 8.0) for step in range(100)]
        assert sorted(found) == found
        assert np.unique(np.round(found, 12)).tolist() == [1.0, 2.0, 4.0, 8.0]
        assert likelihood.hardness(10**6, 100, 4, 8.0) == pytest.approx(8.0)


class TestCSQ:
    @pytest.mark.parametrize("size", [1, 2, 16, 64])
    def test_sylvester_is_hadamard(self, size: int) -> None:
        matrix = csq.sylvester(size).astype(int)
        assert (matrix @ matrix.T == size * np.eye(size)).all()
        assert (matrix == scipy.linalg.hadamard(size)).all()

    @pytest.mark.parametrize("classes", [10, 32])
    def test_hadamard_centres_are_half_the_bits_apart(self, classes: int) -> None:
        found = csq.centres(classes, 32, np.random.default_rng(0)).astype(int)
        distances = (found[:, None] != found).sum(2)
        assert (distances[~np.eye(classes, dtype=bool)] == 16).all()

    def test_more_classes_than_bits_take_the_negatives_too(self) -> None:
        found = csq.centres(60, 32, np.random.default_rng(0)).astype(int)
        distances = (found[:, None] != found).sum(2)[~np.eye(60, dtype=bool)]
        assert set(distances.tolist()) == {16, 32}

    @pytest.mark.parametrize(("classes", "bits"), [(10, 48), (100, 32)])
    def test_random_centres_otherwise_half_the_bits_apart_on_average(self, classes: int, bits: int) -> None:
        found = csq.centres(classes, bits, np.random.default_rng(0)).astype(int)
        distances = (found[:, None] != found).sum(2)[~np.eye(classes, dtype=bool)]
        assert abs(distances.mean() - bits / 2) < 2

    def test_centre_of_several_classes_is_their_majority(self) -> None:
        rng = np.random.default_rng(0)
        codes, labels = csq.centres(6, 16, rng).astype(int), np.random.default_rng(1).random((50, 6)) < 0.4
        found = csq.centres_of_images(labels, codes.astype(np.int8), np.random.default_rng(2))
        again = csq.centres_of_images(labels, codes.astype(np.int8), np.random.default_rng(2))
        assert (found == again).all()
        assert set(np.unique(found)) == {-1, 1}
        for image in range(50):
            for bit in range(16):
                votes = int(codes[labels[image], bit].sum())
                assert votes == 0 or found[image, bit] == np.sign(votes)

    def test_terms_are_those_of_the_paper(self) -> None:
        """h = (tanh z + 1) / 2; torch's own cross-entropy of probabilities; log cosh of abs(2 h - 1) - 1."""
        own, rows, z = method("csq", lambda_=0.3), rows_of(), gaussian(9, L)
        h, c = (torch.tanh(z) + 1) / 2, (own.centres_nL[torch.from_numpy(rows)].double() + 1) / 2
        expected = torch.nn.functional.binary_cross_entropy(h, c)
        expected += 0.3 * torch.log(torch.cosh((2 * h - 1).abs() - 1)).mean()
        assert float(own.loss({"z": z}, batch_of(rows)).backward) == pytest.approx(float(expected), rel=1e-12)


class TestGreedyHash:
    def test_sign_passes_the_gradient_on_and_takes_zero_as_plus(self) -> None:
        z = torch.tensor([-2.0, -1e-9, 0.0, 3.0], requires_grad=True)
        found = straight_through.sign(z)
        (found * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
        assert found.tolist() == [-1, -1, 1, 1]
        assert z.grad is not None
        assert z.grad.tolist() == [1, 2, 3, 4]

    def test_penalty_against_finite_differences(self) -> None:
        z = gaussian(4, 5).requires_grad_()
        expected = np.mean([abs(abs(v) - 1) ** 3 for v in z.detach().flatten().tolist()])
        assert float(straight_through.cubic(z.detach())) == pytest.approx(expected)
        assert torch.autograd.gradcheck(straight_through.cubic, (z,))

    def test_supervised_gradient_is_the_classifiers_on_the_code(self) -> None:
        """dL/dH = dL/dB of the softmax, (p - y) W / B, and the penalty's own."""
        own, rows = method("greedyhash", alpha=0.0), rows_of()
        head = deep("greedyhash").network(own.settings, 12, L, torch.Generator().manual_seed(0), classes=5).double()
        features = torch.from_numpy(tiny_data().features[rows]).double()
        outputs = head(features)
        outputs["z"].retain_grad()
        own.loss(outputs, batch_of(rows)).backward.backward()
        code = torch.where(outputs["z"] >= 0, 1.0, -1.0).double()
        weight = head.classify.weight.detach()
        y = torch.from_numpy(tiny_data().labels[rows]).double()
        expected = (torch.softmax(code @ weight.T, 1) - y) @ weight / 9
        assert torch.allclose(outputs["z"].grad, expected, rtol=1e-10)

    def test_several_labels_use_the_cross_entropy_of_every_class(self) -> None:
        own, rows = method("greedyhash", alpha=0.0), rows_of()
        own.single = False
        logits, y = gaussian(9, 5), torch.from_numpy(tiny_data().labels[rows]).double()
        found = own.loss({"z": gaussian(9, L, seed=1), "logits": logits}, batch_of(rows))
        p = torch.sigmoid(logits)
        expected = -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean()
        assert float(found.backward) == pytest.approx(float(expected), rel=1e-12)

    @pytest.mark.parametrize("pairs", ["halves", "all"])
    def test_unsupervised_match_is_the_loop_over_pairs(self, pairs: str) -> None:
        b, x = straight_through.sign(gaussian(9, L)), gaussian(9, 30, seed=1)
        chosen = [(i, i + 4) for i in range(4)]
        if pairs == "all":
            chosen = [(i, j) for i in range(9) for j in range(9) if i != j]
        cosine = torch.nn.functional.cosine_similarity
        expected = np.mean([float(cosine(b[i], b[j], dim=0) - cosine(x[i], x[j], dim=0)) ** 2 for i, j in chosen])
        found = deep("greedyhash_unsupervised").match(b, x, pairs)  # type: ignore[attr-defined]
        assert float(found) == pytest.approx(expected, rel=1e-12)


class TestSSDH:
    @pytest.mark.parametrize(("mode", "left", "right"), [(0.7, 0.05, 0.12), (0.9, 0.2, 0.04)])
    def test_fit_finds_the_two_half_gaussians(self, mode: float, left: float, right: float) -> None:
        """Half the mass on either side, each |N(0, sigma)| away from the mode."""
        rng = np.random.default_rng(0)
        d = np.concatenate(
            [mode - np.abs(rng.normal(0, left, 200_000)), mode + np.abs(rng.normal(0, right, 200_000))]
        ).clip(0, 1.999)
        found = ssdh.halves_of(binned(d))
        assert found.mode == pytest.approx(mode, abs=0.0301)
        assert found.sigma_left == pytest.approx(left, abs=0.02)
        assert found.sigma_right == pytest.approx(right, abs=0.02)

    def test_fit_is_that_of_the_mirrored_distances(self) -> None:
        """scipy's norm.fit of each side and its mirror image at the mode, as re-implementations have it."""
        features = np.random.default_rng(0).gamma(0.5, size=(90, 20)).astype(np.float32)
        unit = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
        d = (1 - unit @ unit.T)[~np.eye(90, dtype=bool)]
        found = ssdh.fit_halves(features, 1000)
        for side, sigma in ((d[d < found.mode], found.sigma_left), (d[d >= found.mode], found.sigma_right)):
            mean, expected = scipy.stats.norm.fit(np.concatenate([side, 2 * found.mode - side]))
            assert mean == pytest.approx(found.mode)
            assert sigma == pytest.approx(expected, rel=1e-4)
        counts = [((d >= b / 100) & (d < (b + 1) / 100)).sum() for b in range(200)]
        assert counts[round(found.mode * 100)] >= max(counts) - 4  # a distance may fall on the other side of an edge

    def test_loss_is_the_double_loop(self) -> None:
        own, rows, z = method("ssdh", alpha=0.5, beta=0.5), rows_of(), torch.tanh(gaussian(9, L))
        own.halves = halves = ssdh.Halves(0.6, 0.2, 0.4)
        x, total, kinds = tiny_data().features[rows].astype(np.float64), 0.0, set()
        for i in range(9):
            for j in range(9):
                d = 1 - float(x[i] @ x[j]) / float(np.linalg.norm(x[i]) * np.linalg.norm(x[j]))
                s = 1 if d <= halves.mode - 0.1 else -1 if d >= halves.mode + 0.2 else 0
                total += abs(s) * (float(z[i] @ z[j]) / L - s) ** 2
                kinds.add(s)
        assert kinds == {-1, 0, 1}
        assert float(own.loss({"z": z}, batch_of(rows)).backward) == pytest.approx(total / 81, rel=1e-12)

    def test_training_without_features_is_refused(self) -> None:
        settings, data = ssdh.Settings(), replace(tiny_data(), features=None)
        with pytest.raises(InvalidInput, match="commit features"):
            ssdh.Method(settings, Place(L, False, data, SingleProcess()))


def binned(d: np.ndarray) -> np.ndarray:
    bins = (d * 100).astype(int)
    return np.array([np.bincount(bins, weights=d**power, minlength=200) for power in range(3)])


class TestDSDH:
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        codes = straight_through.sign(gaussian(60, 6))
        labels = torch.nn.functional.one_hot(torch.arange(60) % 4).double()
        return codes, labels, gaussian(60, 6, seed=1)

    def test_classifier_is_ridge_regression(self) -> None:
        codes, labels, _ = self.parts()
        expected = Ridge(alpha=0.3, fit_intercept=False).fit(codes.numpy(), labels.numpy()).coef_.T
        assert np.allclose(dsdh.classifier(codes, labels, 0.3).numpy(), expected, rtol=1e-8)

    def test_one_sweep_sets_each_bit_to_the_better_of_its_two_values(self) -> None:
        codes, labels, h = self.parts()
        w = dsdh.classifier(codes, labels, 0.1)
        expected = codes.clone()
        for k in range(6):
            for i in range(60):
                costs = []
                for bit in (-1.0, 1.0):
                    trial = expected[i].clone()
                    trial[k] = bit
                    costs.append(code_cost(trial, w, labels[i], h[i], 0.2))
                expected[i, k] = -1.0 if costs[0] < costs[1] else 1.0
        assert torch.equal(dsdh.discrete_codes(codes, w, labels, h, 0.2, 1), expected)

    def test_descent_ends_where_no_single_bit_helps_and_near_the_best_code(self) -> None:
        codes, labels, h = self.parts()
        w = dsdh.classifier(codes, labels, 0.1)
        found = dsdh.discrete_codes(codes, w, labels, h, 0.2, 50)
        every = torch.tensor([[1.0 if c >> k & 1 else -1.0 for k in range(6)] for c in range(64)]).double()
        best = 0
        for i in range(60):
            cost = code_cost(found[i], w, labels[i], h[i], 0.2)
            assert cost <= code_cost(codes[i], w, labels[i], h[i], 0.2) + 1e-12
            for k in range(6):
                flipped = found[i].clone()
                flipped[k] *= -1
                assert cost <= code_cost(flipped, w, labels[i], h[i], 0.2) + 1e-12
            best += cost <= min(code_cost(c, w, labels[i], h[i], 0.2) for c in every) + 1e-12
        assert best >= 50

    def test_loss_pulls_towards_the_codes_and_not_the_signs(self) -> None:
        own, rows, z = method("dsdh", eta=3.0), rows_of(), gaussian(9, L).requires_grad_()
        own.bank.u_nL.copy_(gaussian(230, L, seed=1))
        own.start_epoch(0, lambda: torch.zeros(0))
        found = own.loss({"z": z}, batch_of(rows))
        found.backward.backward()
        fixed, u = z.detach(), own.bank.u_nL
        s = torch.tensor([[same_class(i, j) for j in range(230)] for i in rows], dtype=torch.float64)
        codes = own.codes_nL[torch.from_numpy(rows)]
        expected = (torch.sigmoid(fixed @ u.T / 2) - s) @ u + 2 * 3.0 * (fixed - codes)
        assert z.grad is not None
        assert torch.allclose(z.grad, expected / (9 * 230), rtol=1e-12)
        assert set(codes.unique().tolist()) == {-1.0, 1.0}


def code_cost(code: Tensor, w: Tensor, label: Tensor, h: Tensor, ratio: float) -> float:
    return float(((label - code @ w) ** 2).sum() + ratio * ((code - h) ** 2).sum())


class TestDHN:
    def test_loss_is_the_double_loop(self) -> None:
        own, rows, z = method("dhn", lambda_=0.7), rows_of(), torch.tanh(gaussian(9, L))
        total = 0.0
        for i in range(9):
            for j in range(9):
                theta = 0.5 * float(z[i] @ z[j])
                total += (np.log1p(np.exp(theta)) - same_class(rows[i], rows[j]) * theta) / 81
        total += 0.7 * float(torch.log(torch.cosh(z.abs() - 1)).mean())
        assert float(own.loss({"z": z}, batch_of(rows)).backward) == pytest.approx(total, rel=1e-12)


class TestDTSH:
    def test_loss_is_the_triple_loop(self) -> None:
        own, rows, u = method("dtsh", alpha=1.5, lambda_=0.2), rows_of(), gaussian(9, L)
        losses = []
        for q in range(9):
            for p in range(9):
                for n in range(9):
                    if p != q and same_class(rows[q], rows[p]) and not same_class(rows[q], rows[n]):
                        margin = 0.5 * float(u[q] @ u[p]) - 0.5 * float(u[q] @ u[n]) - 1.5
                        losses.append(-np.log(1 / (1 + np.exp(-margin))))
        expected = np.mean(losses) + 0.2 * float(((u - torch.where(u >= 0, 1.0, -1.0)) ** 2).mean())
        assert len(losses) > 20
        assert float(own.loss({"z": u}, batch_of(rows)).backward) == pytest.approx(expected, rel=1e-12)

    def test_a_batch_without_triplets_has_a_finite_gradient(self) -> None:
        own = method("dtsh")
        labels = tiny_data().labels
        assert labels is not None
        rows, u = np.flatnonzero(labels[:, 0])[:6], gaussian(6, L).requires_grad_()
        found = own.loss({"z": u}, batch_of(rows))
        found.backward.backward()
        assert float(found.terms["triplet"]) == 0
        assert u.grad is not None
        assert bool(torch.isfinite(u.grad).all())


class TestDBDH:
    def test_loss_is_the_double_loop_over_outputs_cut_off(self) -> None:
        own, rows, z = method("dbdh", alpha=0.4), rows_of(), gaussian(9, L, scale=1.5)
        own.bank.u_nL.copy_(gaussian(230, L, seed=1).clamp(-1, 1))
        found = own.loss({"z": z}, batch_of(rows))
        u, total = z.clamp(-1, 1), 0.0
        for i in range(9):
            for j in range(230):
                theta = 0.5 * float(u[i] @ own.bank.u_nL[j])
                total += (np.log1p(np.exp(theta)) - same_class(rows[i], j) * theta) / (9 * 230)
            total += 0.4 * float(u[i].mean()) ** 2 / 9
        assert torch.equal(own.bank.u_nL[torch.from_numpy(rows)], u)
        assert float(found.backward) == pytest.approx(total, rel=1e-12)

    def test_no_gradient_beyond_the_cut_off(self) -> None:
        own, z = method("dbdh"), gaussian(9, L, scale=2.0).requires_grad_()
        own.bank.u_nL.copy_(gaussian(230, L, seed=1).clamp(-1, 1))
        own.loss({"z": z}, batch_of(rows_of())).backward.backward()
        assert z.grad is not None
        assert torch.equal(z.grad == 0, z.detach().abs() > 1)


class TestDSH:
    def test_loss_is_the_double_loop(self) -> None:
        own, rows, b = method("dsh", alpha=0.3), rows_of(), gaussian(9, L)
        m, total = 2 * L, 0.0
        for i in range(9):
            for j in range(9):
                if i != j:
                    d, y = float(((b[i] - b[j]) ** 2).sum()), 1 - same_class(rows[i], rows[j])
                    total += (1 - y) / 2 * d + y / 2 * max(m - d, 0)
                    total += 0.3 * float((b[i].abs() - 1).abs().sum() + (b[j].abs() - 1).abs().sum())
        assert float(own.loss({"z": b}, batch_of(rows)).backward) == pytest.approx(total / 72, rel=1e-12)


class TestMLS3RDUH:
    def test_diffusion_sums_the_walks(self) -> None:
        """(1 - a) sum_t (a S)^t, the series of which the inverse is the limit."""
        x = torch.nn.functional.normalize(gaussian(40, 6).abs(), dim=1)
        cosine = (x @ x.T).fill_diagonal_(0)
        near = mls3rduh.nearest(cosine, 6)
        w = cosine * (near & near.T)
        scale = torch.diag(w.sum(1).clamp_min(1e-300) ** -0.5)
        walk, term, total = scale @ w @ scale, torch.eye(40, dtype=torch.float64), torch.zeros(40, 40).double()
        assert bool((w.sum(1) > 0).all())
        for _ in range(4000):
            total += (1 - 0.99) * term
            term = 0.99 * walk @ term
        assert torch.allclose(mls3rduh.diffusion(cosine, near, 0.99), total, atol=1e-10)

    def test_similarity_is_the_rule_pair_by_pair(self) -> None:
        x = np.random.default_rng(0).gamma(0.5, size=(60, 8)).astype(np.float32)
        settings = mls3rduh.Settings(share=0.1)
        found = mls3rduh.reconstruct(x, settings)
        unit = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
        cosine = unit @ unit.T
        off = cosine - np.diag(np.diag(cosine))
        near = [set(np.argsort(-row)[:6].tolist()) for row in off]
        mutual = np.array([[j in near[i] and i in near[j] for j in range(60)] for i in range(60)])
        degree = (off * mutual).sum(1)
        scale = np.where(degree > 0, degree, 1) ** -0.5
        manifold = np.linalg.inv(np.eye(60) - 0.99 * scale[:, None] * (off * mutual) * scale)
        alive = degree > 0
        manifold[:, ~alive] = 0
        close = [set(np.argsort(-row)[:9].tolist()) for row in manifold]
        seen = set()
        for i in range(60):
            for j in range(60):
                kinds = set()
                for a, b in ((i, j), (j, i)):
                    if b in near[a] and alive[a] and alive[b]:
                        kinds.add(1 if b in close[a] else 0)
                expected = 1.0 if 1 in kinds else 0.0 if 0 in kinds else float(cosine[i, j])
                seen |= kinds
                assert float(found[i, j]) == pytest.approx(2 * expected - 1, abs=1e-5)
        assert seen == {0, 1}

    def test_too_many_images_are_refused(self) -> None:
        many = replace(tiny_data(), ids=np.arange(20_000))
        with pytest.raises(InvalidInput, match="at most 12000"):
            mls3rduh.Method(mls3rduh.Settings(), Place(L, True, many, SingleProcess()))


def test_bgan_pair_term_is_the_double_loop() -> None:
    own, rows, z = method("bgan_pair", beta_last=1.0), rows_of(), gaussian(9, L)
    graph, b = tiny_data().graph, torch.tanh(z)
    assert graph is not None
    total = 0.0
    for i, row in enumerate(rows):
        positive = set(graph.indices[graph.indptr[row] : graph.indptr[row + 1]].tolist()) | {int(row)}
        for j, column in enumerate(rows):
            total += 0.5 * (float(b[i] @ b[j]) / L - (1 if int(column) in positive else -1)) ** 2
    assert float(own.loss({"z": z}, batch_of(rows)).backward) == pytest.approx(total / 81, rel=1e-12)


class TestCNNH:
    def test_each_step_is_the_derivative_of_the_objective_and_it_falls(self) -> None:
        """Half the slope used is a finite difference's of sum c_g c_h (h_g.h_h - q s_gh)^2, over a set's weight."""
        rng = np.random.default_rng(0)
        labels = rng.random((7, 3)) < 0.5
        s = np.where(labels.astype(int) @ labels.T.astype(int) > 0, 1.0, -1.0)
        counts = rng.integers(1, 6, 7)

        def objective(h: np.ndarray) -> float:
            return float((counts[:, None] * counts * (h @ h.T - 8 * s) ** 2).sum())

        values = [objective(cnnh.factorise(s, counts, 8, t, np.random.default_rng(1))) for t in (0, 1, 2, 5, 20)]
        assert sorted(values, reverse=True) == values
        h = cnnh.factorise(s, counts, 8, 300, np.random.default_rng(1))
        assert np.abs(h).max() <= 1
        for i in range(7):
            for k in range(8):
                for move in (-1e-4, 1e-4):
                    near = h.copy()
                    near[i, k] = np.clip(h[i, k] + move, -1, 1)
                    assert objective(near) >= objective(h) - 1e-3 * abs(move)

    def test_codes_of_classes_that_share_nothing_are_far_apart(self) -> None:
        own = method("cnnh")
        own.prepare(deep("cnnh").network(own.settings, 12, L, torch.Generator(), classes=5), lambda: torch.zeros(0))
        labels = tiny_data().labels
        assert labels is not None
        codes = own.targets_nL.double()
        firsts = [int(np.flatnonzero(labels[:, c])[0]) for c in range(5)]
        inner = (codes[firsts] @ codes[firsts].T)[~torch.eye(5, dtype=torch.bool)]
        assert float(inner.mean()) < 0  # five codes cannot all be opposite: -L / 4 at best
        for c in range(5):
            assert len(torch.unique(codes[torch.from_numpy(labels[:, c])], dim=0)) == 1
