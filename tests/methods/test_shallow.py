"""Shallow methods without labels, each against what its paper says it is."""

from itertools import pairwise, product

import faiss
import numpy as np
import pytest
import torch
from scipy.optimize import check_grad, minimize_scalar
from scipy.spatial.distance import cdist
from scipy.stats import norm
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from hashdist.ground.errors import InvalidInput
from hashdist.methods import agh, isoh, itq, kmh, pcah, sgh, sh, sp, sphh
from hashdist.methods.parts.anchors import draw_anchors, k_means, squared_distances
from hashdist.methods.parts.projections import signs


def cloud(n: int = 500, width: int = 24, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Clusters with unequal variances, off the origin."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((6, width)) * 2
    noise = rng.standard_normal((n, width)) * np.linspace(2, 0.3, width)
    return (centres[rng.integers(0, 6, n)] + noise + 3).astype(dtype)


def up_to_sign(a_NL: np.ndarray, b_NL: np.ndarray) -> float:
    """The largest difference of two matrices whose columns may differ in sign, relative to the largest entry."""
    flips = np.where((a_NL * b_NL).sum(0) < 0, -1, 1)
    return float(abs(a_NL - b_NL * flips).max() / abs(a_NL).max())


class TestPcah:
    def test_outputs_are_the_scores_of_scikit_learn_and_faiss(self) -> None:
        features = cloud()
        z = pcah.fit(features, 8, 0)(features)
        assert up_to_sign(PCA(8, svd_solver="full").fit_transform(features.astype(np.float64)), z) < 1e-5
        reference = faiss.PCAMatrix(24, 8)
        reference.train(features)
        assert up_to_sign(reference.apply_py(features), z) < 1e-4

    def test_no_more_bits_than_directions(self) -> None:
        with pytest.raises(InvalidInput, match=r"PCAH finds at most min.* = 24 bits, found 32; use LSH"):
            pcah.fit(cloud(), 32, 0)
        with pytest.raises(InvalidInput, match="= 0 bits"):
            pcah.fit(cloud()[:0], 32, 0)


class TestSh:
    @pytest.mark.parametrize("bits", [8, 24, 48])
    def test_chosen_modes_have_the_smallest_analytic_eigenvalues(self, bits: int) -> None:
        range_P = np.random.default_rng(1).uniform(0.5, 9, 6)
        epsilon = 0.05
        eigenvalues = {
            (d, k): 1 - np.exp(-(epsilon**2) / 2 * (k * np.pi / range_P[d]) ** 2)
            for d, k in product(range(6), range(1, 200))
        }
        directions, half_waves = sh.smallest_modes(range_P, bits)
        wanted = sorted(eigenvalues, key=lambda mode: eigenvalues[mode])[:bits]
        assert list(zip(directions.tolist(), half_waves.tolist(), strict=True)) == wanted

    def test_outputs_are_the_paper_s_eigenfunctions_of_principal_coordinates(self) -> None:
        features = cloud()
        coordinates = PCA(16, svd_solver="full").fit_transform(features.astype(np.float64))
        encoder = sh.fit(features, 16, 0)
        z = encoder(features)
        low, high = coordinates.min(0), coordinates.max(0)
        directions, half_waves = sh.smallest_modes(high - low, 16)
        for bit, (d, k) in enumerate(zip(directions, half_waves, strict=True)):
            phase = k * np.pi / (high[d] - low[d]) * (coordinates[:, d] - low[d])
            mirrored = k * np.pi / (high[d] - low[d]) * (high[d] - coordinates[:, d])  # if PCA's sign differs
            wanted = [np.sin(np.pi / 2 + phase), np.sin(np.pi / 2 + mirrored)]
            assert min(abs(z[:, bit] - w).max() for w in wanted) < 1e-4

    def test_more_bits_than_directions_cut_a_direction_more_often(self) -> None:
        features = cloud(width=3)
        encoder = sh.fit(features, 16, 0)
        assert len(set(zip(encoder.coordinate_L, encoder.frequencies_L, strict=True))) == 16
        assert set(encoder.coordinate_L) == {0, 1, 2}

    def test_directions_without_variance_carry_no_bit(self) -> None:
        features = np.zeros((50, 5), np.float32)
        features[:, 2] = np.linspace(0, 1, 50)
        encoder = sh.fit(features, 8, 0)
        assert np.isfinite(encoder(features)).all()
        assert len(set(encoder.coordinate_L)) == 1

    def test_bad_input(self) -> None:
        with pytest.raises(InvalidInput, match="SH needs features that differ"):
            sh.fit(np.ones((20, 5), np.float32), 8, 0)
        with pytest.raises(InvalidInput, match="found none"):
            sh.fit(cloud()[:0], 8, 0)


class TestAnchors:
    def test_squared_distances_far_from_the_origin(self) -> None:
        a, b = cloud(30) + 1000, cloud(7, seed=1) + 1000
        np.testing.assert_allclose(squared_distances(a, b), cdist(a, b, "sqeuclidean"), rtol=1e-4)

    def test_k_means_with_fewer_distinct_features_than_centres(self) -> None:
        assert len(k_means(np.repeat(cloud(5), 8, axis=0), 20, 0, 10)) == 5

    def test_sampled_anchors_are_distinct_rows(self) -> None:
        features = cloud(30, dtype=np.float16)
        anchors = draw_anchors(features, 10, 0)
        assert anchors.dtype == np.float32
        assert len({row.tobytes() for row in anchors} & {row.astype(np.float32).tobytes() for row in features}) == 10


class TestAgh:
    def graph(self, n: int = 400) -> tuple[np.ndarray, np.ndarray, agh.AnchorGraphFunctions]:
        """Features, the dense A = Z Lambda^-1 Z^T by double loops over nearest anchors, and the fitted encoder."""
        features = cloud(n) * np.linspace(1, 0.1, 24, dtype=np.float32)
        encoder = agh.fit(features, 16, 0)
        z = np.zeros((n, len(encoder.anchors_MD)))
        for i in range(n):
            distances = ((features[i].astype(np.float64) - encoder.anchors_MD) ** 2).sum(1)
            for j in np.argsort(distances)[: agh.NEAREST]:
                z[i, j] = np.exp(-distances[j] / encoder.spread)
            z[i] /= z[i].sum()
        return features, z @ np.diag(1 / z.sum(0)) @ z.T, encoder

    def test_functions_are_eigenvectors_of_the_dense_laplacian(self) -> None:
        features, a, encoder = self.graph()
        laplacian = np.eye(len(a)) - a
        np.testing.assert_allclose(laplacian.sum(1), 0, atol=1e-10)
        values, vectors = np.linalg.eigh(laplacian)
        assert values[0] == pytest.approx(0, abs=1e-10)
        y = encoder(features)[:, :8]  # of the training images: their own rows of the eigenvectors
        assert up_to_sign(vectors[:, 1:9] * np.sqrt(len(a)), y) < 1e-3
        np.testing.assert_allclose(y.T @ y / len(a), np.eye(8), atol=1e-3)
        np.testing.assert_allclose(y.mean(0), 0, atol=1e-4)

    def test_one_layer_takes_the_signs_of_twice_as_many_functions(self) -> None:
        features, a, _ = self.graph()
        z = agh.fit(features, 16, 0, layers=1)(features)
        _, vectors = np.linalg.eigh(np.eye(len(a)) - a)
        assert up_to_sign(vectors[:, 1:17] * np.sqrt(len(a)), z) < 1e-3

    def test_second_layer_is_the_smoothest_balanced_cut_of_both_sides(self) -> None:
        features, a, encoder = self.graph()
        laplacian = np.eye(len(a)) - a
        z = encoder(features).astype(np.float64)
        for y, second, found in zip(z[:, :8].T, z[:, 8:].T, encoder.thresholds_2R.T, strict=True):
            above = y >= 0

            def f(plus: float, y: np.ndarray = y, above: np.ndarray = above) -> np.ndarray:
                minus = (plus * above.sum() - abs(y).sum()) / (~above).sum()  # 1^T f = 0
                return np.where(above, y - plus, -y + minus)

            best = minimize_scalar(lambda plus, f=f: f(plus) @ laplacian @ f(plus), tol=1e-12)
            assert found[0] == pytest.approx(best.x, abs=1e-3)
            np.testing.assert_allclose(second, f(best.x), atol=2e-3)

    def test_a_graph_that_falls_apart_still_has_no_constant_function(self) -> None:
        rng = np.random.default_rng(0)
        labels = np.arange(400) % 4
        features = (np.eye(4)[labels] * 1000 + rng.standard_normal((400, 4))).astype(np.float32)
        z = agh.fit(features, 8, 0)(features)
        np.testing.assert_allclose(z[:, :4].mean(0), 0, atol=1e-3)
        parts = np.stack([z[labels == label, :3] for label in range(4)])
        np.testing.assert_allclose(parts, np.broadcast_to(parts[:, :1], parts.shape), atol=1e-3)

    def test_bad_input(self) -> None:
        with pytest.raises(InvalidInput, match="at most 598 bits with 300 anchors, found 640"):
            agh.fit(cloud(), 640, 0)
        with pytest.raises(InvalidInput, match="at least 34 training images"):
            agh.fit(cloud(20), 32, 0)
        with pytest.raises(InvalidInput, match="fewer duplicates"):
            agh.fit(np.repeat(cloud(5), 20, axis=0), 16, 0)


class TestIsoh:
    def test_all_bits_have_the_mean_of_the_leading_variances(self) -> None:
        features = cloud()
        z = isoh.fit(features, 16, 0)(features).astype(np.float64)
        variances = PCA(16, svd_solver="full").fit(features.astype(np.float64)).explained_variance_ * 499 / 500
        assert variances.max() > 10 * variances.min()
        np.testing.assert_allclose(z.var(0), variances.mean(), rtol=1e-4)
        np.testing.assert_allclose(np.linalg.eigvalsh(np.cov(z.T, bias=True)), variances[::-1], rtol=1e-3)

    @pytest.mark.parametrize("bits", [2, 16, 64])
    def test_q_is_orthogonal(self, bits: int) -> None:
        variances = np.random.default_rng(0).exponential(size=bits) ** 2
        q = isoh.lift_and_project(variances, np.random.default_rng(1))
        np.testing.assert_allclose(q.T @ q, np.eye(bits), atol=1e-10)
        np.testing.assert_allclose((q.T @ np.diag(variances) @ q).diagonal(), variances.mean(), rtol=2e-6)

    def test_other_seeds_other_rotations(self) -> None:
        a, b = (isoh.fit(cloud(), 8, seed).directions_DL for seed in (0, 1))
        assert abs(a - b).max() > 0.1


class TestSphh:
    def test_spheres_hold_half_and_share_a_quarter(self) -> None:
        features = cloud(600)
        inside = (sphh.fit(features, 16, 0)(features) >= 0).astype(int)
        np.testing.assert_allclose(inside.mean(0), 0.5, atol=0.005)
        shared = (inside.T @ inside)[np.triu_indices(16, 1)] / 600
        assert abs(shared - 0.25).mean() <= 0.26 * sphh.MEAN_ERROR
        assert shared.std() <= 0.26 * sphh.SPREAD_ERROR

    def test_bit_is_the_inside_of_the_sphere(self) -> None:
        features = cloud(100)
        encoder = sphh.fit(features, 8, 0)
        wanted = cdist(features, encoder.pivots_LD) <= encoder.radii_L
        far_from_the_border = abs(encoder(features)) > 1e-3
        np.testing.assert_array_equal((encoder(features) >= 0)[far_from_the_border], wanted[far_from_the_border])

    def test_forces_by_double_loops(self) -> None:
        rng = np.random.default_rng(0)
        inside = (rng.random((40, 5)) < 0.5).astype(np.float32)
        pivots = rng.standard_normal((5, 3)).astype(np.float32)
        overlaps = inside.T @ inside
        wanted = np.zeros((5, 3))
        for i, j in product(range(5), range(5)):
            if i != j:
                wanted[i] += 0.5 * (overlaps[i, j] - 10) / 10 * (pivots[i] - pivots[j]) / 5
        np.testing.assert_allclose(sphh.forces(overlaps, 40, pivots), wanted, atol=1e-6)


class TestSp:
    def test_map_is_as_sparse_as_asked_and_keeps_most_of_the_semi_orthogonal_one(self) -> None:
        directions = sp.fit(cloud(width=64), 16, 0).directions_DL
        assert np.count_nonzero(directions) == round(sp.KEPT * 64 * 16)
        untrained = sp.largest(np.linalg.qr(np.random.default_rng(0).standard_normal((64, 16)))[0], sp.KEPT)
        assert (directions**2).sum() / 16 > 0.85 > 0.6 > (untrained**2).sum() / 16

    def test_each_step_is_the_minimum_of_the_objective(self) -> None:
        rng = np.random.default_rng(0)
        x, beta = rng.standard_normal((30, 7)), 4.0

        def objective(b: np.ndarray, r: np.ndarray, sparse: np.ndarray) -> float:
            return float(((x - b @ r) ** 2).sum() + beta * ((r - sparse) ** 2).sum())

        r = np.linalg.qr(rng.standard_normal((7, 3)))[0].T
        sparse = sp.largest(r, 0.4)
        assert np.count_nonzero(sparse) == 8
        b = signs(x @ r.T)
        every = [np.array(row) for row in product([-1.0, 1.0], repeat=3)]
        for i in range(30):
            best = min(((x[i] - row @ r) ** 2).sum() for row in every)
            assert ((x[i] - b[i] @ r) ** 2).sum() == pytest.approx(best)
        found = sp.nearest_rotation(b.T @ x + beta * sparse)
        np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-12)
        for _ in range(200):  # near it and far from it, no semi-orthogonal matrix is better
            other = np.linalg.qr((found + rng.exponential(0.3) * rng.standard_normal((3, 7))).T)[0].T
            other *= np.sign((other * found).sum(1, keepdims=True))
            assert objective(b, other, sparse) >= objective(b, found, sparse) - 1e-9


class TestKmh:
    def test_bits_are_the_number_of_the_nearest_codeword_in_each_subspace(self) -> None:
        features = cloud()
        encoder = kmh.fit(features, 8, 0)
        parts = np.split(encoder.projection(features), 2, axis=1)
        numbers = [cdist(part, words).argmin(1) for part, words in zip(parts, encoder.codewords, strict=True)]
        wanted = [[int(b) for number in row for b in f"{number:04b}"[::-1]] for row in zip(*numbers, strict=True)]
        np.testing.assert_array_equal(encoder(features) >= 0, wanted)

    def test_energy_by_double_loops_and_its_gradient(self) -> None:
        rng = np.random.default_rng(0)
        codewords, means = rng.standard_normal((2, 16, 5))
        share = rng.dirichlet(np.ones(16))
        wanted = sum(share[i] * ((codewords[i] - means[i]) ** 2).sum() for i in range(16))
        for i, j in product(range(16), range(16)):
            d_h = 0.7 * bin(i ^ j).count("1") ** 0.5
            wanted += kmh.AFFINITY * share[i] * share[j] * (np.linalg.norm(codewords[i] - codewords[j]) - d_h) ** 2
        assert kmh.energy(codewords, means, share, 0.7)[0] == pytest.approx(wanted)
        error = check_grad(
            lambda flat: kmh.energy(flat.reshape(16, 5), means, share, 0.7)[0],
            lambda flat: kmh.energy(flat.reshape(16, 5), means, share, 0.7)[1],
            codewords.ravel(),
        )
        assert error < 1e-5

    def test_turns_never_raise_the_objective(self) -> None:
        part = cloud(width=6)
        codewords = np.random.default_rng(0).standard_normal((16, 6)) + 3
        values = []
        for _ in range(6):
            number = kmh.nearest(part, codewords)
            means, share = kmh.centres(part, number, codewords)
            within = (((part - means[number]) ** 2).sum(1)).mean()
            values.append(within + kmh.energy(codewords, means, share, 2.0)[0])
            codewords = kmh.move(codewords, means, share, 2.0)
            values.append(within + kmh.energy(codewords, means, share, 2.0)[0])
        assert all(b <= a + 1e-6 for a, b in pairwise(values))
        assert values[-1] < 0.9 * values[0]

    def test_without_affinity_it_is_k_means(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kmh, "AFFINITY", 0.0)
        monkeypatch.setattr(kmh, "STEPS", 200)
        monkeypatch.setattr(kmh, "TURNS", 100)
        part = (cloud(width=6) - 3).astype(np.float32)
        words = kmh.cells(part)
        number = kmh.nearest(part, words)
        used = np.unique(number)
        np.testing.assert_allclose(words[used], [part[number == i].mean(0) for i in used], atol=1e-2)

    def test_subspaces_get_equally_many_directions_of_like_product(self) -> None:
        variances = np.sort(np.random.default_rng(0).exponential(size=32) ** 2)[::-1].copy()
        parts = kmh.allocation(variances, 4)
        assert sorted(np.concatenate(parts)) == list(range(32))
        assert {len(part) for part in parts} == {8}
        logs = [np.log(variances[part]).sum() for part in parts]
        halves = [np.log(variances[8 * i : 8 * i + 8]).sum() for i in range(4)]
        assert np.ptp(logs) < 0.3 * np.ptp(halves)


class TestSgh:
    def test_free_energy_is_the_expectation_over_all_codes(self) -> None:
        """sum over h of q(h) (log q(h) - log p(x, h)), with all densities from scipy."""
        rng = np.random.default_rng(0)
        bits, width, rho = 3, 4, 0.8
        x, z, u, prior = rng.standard_normal(width), rng.standard_normal(bits), rng.standard_normal((bits, width)), 0.3
        q, theta = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-prior))
        wanted = found = 0.0
        for h in product([0.0, 1.0], repeat=bits):
            code = np.array(h)
            weight = np.prod(np.where(code == 1, q, 1 - q))
            log_p = norm.logpdf(x, code @ u, rho).sum() + np.log(np.where(code == 1, theta, 1 - theta)).sum()
            wanted += weight * (np.log(weight) - log_p)
            tensors = [torch.tensor(a) for a in (x[None], code[None], z[None], u, np.full(bits, prior))]
            found += weight * float(sgh.helmholtz(*tensors, torch.tensor(2 * np.log(rho))))
        assert found + width / 2 * np.log(2 * np.pi) == pytest.approx(wanted)

    def test_neuron_fires_with_its_probability_and_its_gradient_is_exact_where_the_loss_is_linear(self) -> None:
        generator = torch.Generator().manual_seed(0)
        z = torch.tensor([[-1.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
        slope = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
        xi = torch.rand((100_000, 3), generator=generator, dtype=torch.float64)
        h = sgh.neuron(z.expand(100_000, 3), xi)
        assert set(h.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(h.mean(0), torch.sigmoid(z[0]).detach(), atol=0.01, rtol=0)
        (h @ slope).mean().backward()
        p = torch.sigmoid(z.detach())
        torch.testing.assert_close(z.grad, slope * p * (1 - p))  # d/dz of slope . sigmoid(z)

    def test_training_lowers_the_free_energy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.from_numpy(cloud() - 3)
        start = torch.linalg.svd(x, full_matrices=False)[2][:8].T

        def rest(w: torch.Tensor) -> float:
            """Squared error of the best linear decoder of the codes."""
            h = torch.cat([(x @ w >= 0).float(), torch.ones(len(x), 1)], 1)
            return float(((x - h @ torch.linalg.lstsq(h, x).solution) ** 2).mean())

        assert rest(sgh.train(x, start, torch.Generator().manual_seed(0))) < 0.97 * rest(start)


@pytest.mark.parametrize("method", [agh, isoh, sgh, sp, sphh])
def test_same_seed_same_codes_and_other_seeds_others(method) -> None:
    features = cloud(dtype=np.float16)
    z = [method.fit(features, 16, seed)(features) for seed in (0, 0, 1)]
    assert z[0].dtype == np.float32
    np.testing.assert_array_equal(z[0], z[1])
    assert ((z[0] >= 0) != (z[2] >= 0)).any()


@pytest.mark.parametrize("method", [agh, isoh, itq, kmh, pcah, sh, sp, sphh])
def test_threads_do_not_change_the_code(method) -> None:
    features = cloud(900, 96)
    z = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            z.append(method.fit(features, 16, 0)(features))
    assert ((z[0] >= 0) != (z[1] >= 0)).mean() < 1e-3


@pytest.mark.parametrize("method", [isoh, kmh, sgh, sp])
def test_no_more_bits_than_principal_directions(method) -> None:
    with pytest.raises(InvalidInput, match="= 24 bits, found 32; use LSH"):
        method.fit(cloud(), 32, 0)


def test_itq_reaches_the_objective_of_faiss() -> None:
    """||B - V R||^2 of both rotations of the same principal components."""
    features = cloud(2000)
    centred = features - features.mean(0, dtype=np.float64).astype(np.float32)
    z = itq.fit(features, 16, 0)(features)
    pca = pcah.fit(features, 16, 0).directions_DL
    reference = faiss.ITQMatrix(16)
    reference.train(centred @ pca)

    def loss(z_NL: np.ndarray) -> float:
        return float(((np.where(z_NL >= 0, 1, -1) - z_NL) ** 2).sum())

    assert loss(z) < 1.02 * loss(reference.apply_py(centred @ pca))
