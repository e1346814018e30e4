"""Every measure against an independent computation: torch.func, NumPy, SciPy, scikit-learn, brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

import mmc_fast
from mmc_fast.diagnose.measures import blocks, similarity, weights
from mmc_fast.errors import InputError

BLOCKS = {"a": 5, "b": 3, "c": 4}
SLICES = [slice(0, 5), slice(5, 8), slice(8, 12)]


def layer_sums(generator: torch.Generator) -> tuple[Tensor, Tensor, nn.Sequential, Tensor]:
    """AGOP by the library, covariance, head and inputs, float64; columns are correlated and of different spread."""
    head = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)).double()
    for p in head.parameters():
        p.data.normal_(generator=generator)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(300, 12, generator=generator, dtype=torch.float64) @ mix + 1
    result = mmc_fast.AGOPAccumulator(head, input_cov=True).update(x).compute()
    return result.matrix, result.input_cov, head, x


def brute_jacobians(head: nn.Sequential, x: Tensor) -> np.ndarray:
    return vmap(jacrev(head))(x).detach().numpy()  # [N, C, d]


def test_use_shares_are_the_mean_squared_response_to_each_modality(generator: torch.Generator) -> None:
    gram, covariance, head, x = layer_sums(generator)
    jacobian = brute_jacobians(head, x)
    sigma = np.cov(x.numpy().T, bias=True)
    response = np.array([np.einsum("ncd,de,nce->", jacobian[:, :, s], sigma[s, s], jacobian[:, :, s]) for s in SLICES])
    shares = blocks.use_shares(gram, covariance, BLOCKS).numpy()
    np.testing.assert_allclose(shares, response / response.sum(), rtol=1e-10)
    assert shares.sum() == pytest.approx(1)


def test_blocks_of_the_whitened_agop(generator: torch.Generator) -> None:
    gram, covariance, head, x = layer_sums(generator)
    sigma = np.cov(x.numpy().T, bias=True)
    root = scipy.linalg.block_diag(*[scipy.linalg.sqrtm(sigma[s, s]).real for s in SLICES])
    jacobian = brute_jacobians(head, x) @ root
    g = np.einsum("nci,ncj->ij", jacobian, jacobian)
    np.testing.assert_allclose(blocks.whitened(gram, covariance, BLOCKS).numpy(), g, rtol=1e-7, atol=1e-7 * g.max())
    energy = np.array([[np.square(g[i, j]).sum() for j in SLICES] for i in SLICES])
    got = blocks.block_energies(gram, covariance, BLOCKS).numpy()
    np.testing.assert_allclose(got, energy / energy.sum(), rtol=1e-7)
    off = 1 - np.trace(energy) / energy.sum()
    assert blocks.entanglement(gram, covariance, BLOCKS) == pytest.approx(off, rel=1e-7)
    values, vectors, shares = blocks.top_directions(gram, covariance, BLOCKS, 3)
    expected, basis = np.linalg.eigh(g)
    np.testing.assert_allclose(values.numpy(), expected[::-1][:3], rtol=1e-7)
    np.testing.assert_allclose(np.abs(vectors[:, 0].numpy() @ basis[:, -1]), 1, rtol=1e-6)
    expected_shares = [np.square(basis[s, -1]).sum() for s in SLICES]
    np.testing.assert_allclose(shares[0].numpy(), expected_shares, rtol=1e-6)
    assert len(blocks.top_directions(gram, covariance, BLOCKS)[0]) == 5


def test_blocks_do_not_change_under_maps_inside_of_a_modality(generator: torch.Generator) -> None:
    gram, covariance, head, x = layer_sums(generator)
    maps = []
    for width, scale in zip(BLOCKS.values(), (0.01, 1.0, 100.0), strict=True):
        rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
        maps.append(scale * rotation)
    change = torch.block_diag(*maps)
    head[0].weight.data = head[0].weight.data @ torch.linalg.inv(change)
    other = mmc_fast.AGOPAccumulator(head, input_cov=True).update(x @ change.t()).compute()
    for function in (blocks.use_shares, blocks.block_energies):
        torch.testing.assert_close(
            function(other.matrix, other.input_cov, BLOCKS), function(gram, covariance, BLOCKS), rtol=1e-6, atol=1e-9
        )
    before, after = (
        blocks.spectrum(blocks.whitened(g, s, BLOCKS)) for g, s in ((gram, covariance), (other.matrix, other.input_cov))
    )
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7 * float(before[0]))
    raw = torch.stack([gram.diagonal()[s].sum() for s in SLICES])
    raw_after = torch.stack([other.matrix.diagonal()[s].sum() for s in SLICES])
    assert not torch.allclose(raw / raw.sum(), raw_after / raw_after.sum(), rtol=0.1)  # what the weighting is for


def test_columns_that_repeat_each_other_leave_the_root_finite(generator: torch.Generator) -> None:
    x = torch.randn(50, 2, generator=generator, dtype=torch.float64) @ torch.randn(2, 12, generator=generator).double()
    covariance = similarity.covariance_of(x)
    root = blocks.whitened(torch.eye(12), covariance, [12])
    torch.testing.assert_close(root, covariance, rtol=1e-6, atol=1e-9)


def test_shared_directions_entangle_by_a_half() -> None:
    gram = torch.ones(2, 2, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    assert blocks.entanglement(gram, eye, [1, 1]) == pytest.approx(0.5)
    assert blocks.entanglement(eye, eye, [1, 1]) == 0
    assert blocks.entanglement(torch.zeros(2, 2), eye, [1, 1]) == 0
    assert blocks.use_shares(torch.zeros(2, 2), eye, [1, 1]).tolist() == [0, 0]


def test_ranks(generator: torch.Generator) -> None:
    values = torch.rand(9, generator=generator, dtype=torch.float64)
    p = values.numpy() / values.numpy().sum()
    assert blocks.effective_rank(values) == pytest.approx(math.exp(scipy.stats.entropy(p)))
    a = torch.randn(30, 9, generator=generator, dtype=torch.float64)
    singular = torch.linalg.svdvals(a)
    stable = np.linalg.norm(a.numpy()) ** 2 / np.linalg.norm(a.numpy(), 2) ** 2
    assert blocks.stable_rank(singular) == pytest.approx(stable)
    a[:, 3] = 2 * a[:, 1]
    singular = torch.linalg.svdvals(a)
    assert blocks.numerical_rank(singular, 1e-10) == np.linalg.matrix_rank(a.numpy()) == 8
    assert blocks.ranks(torch.zeros(3)) == blocks.Ranks(0, 0.0, 0.0, 1e-3)
    gram = a.t() @ a
    np.testing.assert_allclose(blocks.spectrum(gram).numpy(), singular.square().numpy(), atol=1e-9)
    assert blocks.effective_rank(torch.ones(7)) == pytest.approx(7)
    for scale in (1e-6, 1e6):  # no rank depends on units
        assert blocks.ranks(scale * values, 0.3) == blocks.Ranks(
            int((values > 0.3 * values.max()).sum()), pytest.approx(math.exp(scipy.stats.entropy(p))),
            pytest.approx(float(values.square().sum() / values.max() ** 2)), 0.3,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blocks.use_shares(torch.eye(3), torch.eye(4), [3]), "give two"),
        (lambda: blocks.use_shares(torch.full((2, 2), math.nan), torch.eye(2), [1, 1]), "NaN"),
        (lambda: blocks.use_shares(torch.eye(3), torch.eye(3), [1, 1]), "add up"),
        (lambda: blocks.top_directions(torch.eye(3), torch.eye(3), [3], 4), "from 1 to 3"),
        (lambda: blocks.top_directions(torch.eye(3), torch.eye(3), [3], 0), "from 1 to 3"),
        (lambda: blocks.numerical_rank(torch.ones(2), -1e-9), "share"),
        (lambda: blocks.spectrum(torch.ones(2, 3)), "square"),
        (lambda: blocks.numerical_rank(torch.ones(2), 1.0), "share"),
        (lambda: weights.collision_bound([3, 0]), "positive"),
        (lambda: weights.feature_capacity(torch.ones(3)), "Linear"),
        (
            lambda: weights.degree_of_polysemanticity(torch.eye(3), torch.eye(3)[:, :2] * torch.tensor([1.0, 0.0])),
            "zero direction",
        ),
        (lambda: weights.degree_of_polysemanticity(torch.eye(3), torch.ones(2, 1)), r"\[3, features\]"),
        (lambda: weights.neural_feature_matrix(torch.eye(3), torch.eye(2)), "one shape"),
        (lambda: similarity.linear_cka(torch.ones(3, 1), torch.ones(4, 1)), "one N"),
        (lambda: similarity.variance_inflation(torch.eye(2), 0.0), "ridge"),
        (lambda: similarity.variance_inflation(torch.ones(2, 3)), r"give \[p, p\]"),
        (lambda: similarity.covariance_of(torch.ones(0, 3)), "N >= 1"),
        (lambda: similarity.linear_cka(torch.ones(3), torch.ones(3, 1)), "one N"),
        (lambda: blocks.spectrum(torch.full((2, 2), math.inf)), "NaN or infinite"),
        (lambda: weights.matrix_cosine(torch.eye(3), torch.eye(2)), "one shape"),
        (lambda: weights.neuron_overlap(torch.full((2, 2), math.nan)), "NaN or infinite"),
        (lambda: weights.degree_of_polysemanticity(torch.eye(3), torch.eye(3), tau=0.0), "tau 0.0"),
        (lambda: weights.degree_of_polysemanticity(torch.eye(3), torch.eye(3), energy=1.1), "energy 1.1"),
        (lambda: weights.attribution_shares(torch.eye(3), torch.ones(5, 2), torch.ones(5, 3), [3]), "for a weight"),
        (lambda: weights.attribution_shares(torch.eye(3), torch.ones(5, 3), torch.ones(4, 3), [3]), "for a weight"),
        (lambda: weights.signal_noise_shares(torch.eye(3), torch.ones(5, 3), torch.ones(4), [3]), "and 4 labels"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# Weights


def test_collision_bound_against_counting(seed: int) -> None:
    widths = np.random.default_rng(seed).integers(1, 9, size=4).tolist()
    owner = np.repeat(np.arange(4), widths)
    pairs = list(itertools.combinations(owner, 2))
    found = weights.collision_bound(widths)
    assert found.exact == pytest.approx(np.mean([i != j for i, j in pairs]))
    assert found.bound == pytest.approx(12 * min(widths) ** 2 / sum(widths) ** 2)
    assert found.bound <= found.exact + 1e-12
    equal = weights.collision_bound([7, 7, 7])
    assert equal.bound == pytest.approx(1 - 1 / 3)
    assert (equal.loose, equal.warning) == (False, None)
    assert [weights.collision_bound([10, wide]).loose for wide in (15, 16)] == [False, True]
    unequal = weights.collision_bound([100, 5])
    assert unequal.loose
    assert "loose" in unequal.warning
    assert weights.collision_bound([9]).exact == 0


def test_neural_feature_matrix_and_cosine(generator: torch.Generator) -> None:
    w, start = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    moved = (w - start).numpy()
    np.testing.assert_allclose(weights.neural_feature_matrix(w, start).numpy(), moved.T @ moved)
    a, b = weights.neural_feature_matrix(w), weights.neural_feature_matrix(start)
    cosine = 1 - scipy.spatial.distance.cosine(a.numpy().ravel(), b.numpy().ravel())
    assert weights.matrix_cosine(a, b) == pytest.approx(cosine)
    assert weights.matrix_cosine(a, 3 * a) == pytest.approx(1)
    assert math.isnan(weights.matrix_cosine(a, torch.zeros(4, 4)))


def test_capacity_and_overlap(generator: torch.Generator) -> None:
    w = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    w[:, 2] = 0

    def loops(columns: np.ndarray) -> list[float]:
        dots = [[float(p @ q) for q in columns] for p in columns]
        return [(d[j] ** 2 / sum(v * v for v in d)) if any(d) else 0.0 for j, d in enumerate(dots)]

    np.testing.assert_allclose(weights.feature_capacity(w).numpy(), loops(w.numpy().T), rtol=1e-10)
    np.testing.assert_allclose(weights.neuron_overlap(w).numpy(), loops(w.numpy()), rtol=1e-10)
    assert float(weights.feature_capacity(w).sum()) <= 5 + 1e-9
    assert weights.feature_capacity(torch.eye(4)).tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(weights.feature_capacity(torch.ones(3, 4)), torch.full((4,), 0.25, dtype=torch.float64))


def test_degree_of_polysemanticity(generator: torch.Generator) -> None:
    d = 10
    w = torch.randn(3, d, generator=generator, dtype=torch.float64)
    v = torch.randn(d, 40, generator=generator, dtype=torch.float64)
    found = weights.degree_of_polysemanticity(w, v, tau=0.4, energy=1.0)
    projector = scipy.linalg.orth(w.numpy().T)
    unit = v.numpy() / np.linalg.norm(v.numpy(), axis=0)
    encoded = int((np.square(projector.T @ unit).sum(0) >= 0.4).sum())
    assert (found.encoded, found.rank, found.features) == (encoded, 3, 40)
    assert found.gamma == pytest.approx(encoded / 3)
    # Three features in a plane: each is encoded, over two dimensions.
    angles = torch.tensor([0.0, 2.1, 4.2], dtype=torch.float64)
    plane = torch.zeros(4, 3, dtype=torch.float64)
    plane[0], plane[1] = angles.cos(), angles.sin()
    assert weights.degree_of_polysemanticity(torch.eye(4)[:2], plane).gamma == pytest.approx(1.5)
    # A direction that holds less than 1 % of the energy is not encoded, full column rank or not.
    assert weights.degree_of_polysemanticity(torch.diag(torch.tensor([1.0, 1.0, 0.05])), torch.eye(3)).encoded == 2
    nothing = weights.degree_of_polysemanticity(torch.zeros(2, 3), torch.eye(3)[:, :2])
    assert nothing == weights.Polysemanticity(0.0, 0, 0, 2, 0.5, 0.99)


def test_pca_dictionary(generator: torch.Generator) -> None:
    from sklearn.decomposition import PCA

    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) * torch.arange(1, 13)
    x[:, 5:8] = 2.5  # a constant modality has no direction
    dictionary, owner = weights.pca_dictionary(similarity.covariance_of(x), BLOCKS, energy=0.9)
    assert owner.tolist() == sorted(owner.tolist())
    assert 1 not in owner
    for index, columns in ((0, SLICES[0]), (2, SLICES[2])):
        pca = PCA(0.9).fit(x[:, columns].numpy())
        mine = dictionary[columns][:, owner == index].numpy()
        assert mine.shape[1] == pca.n_components_
        np.testing.assert_allclose(np.abs(np.diag(pca.components_ @ mine)), 1, atol=1e-8)
    empty = weights.pca_dictionary(torch.zeros(12, 12), BLOCKS)
    assert [t.shape for t in empty] == [(12, 0), (0,)]
    small, same = weights.pca_dictionary(1e-9 * similarity.covariance_of(x), BLOCKS)
    assert torch.equal(same, owner)
    torch.testing.assert_close(small.abs(), dictionary.abs())
    outside = dictionary.clone()
    for index, columns in enumerate(SLICES):
        outside[columns, owner == index] = 0
    assert not outside.any()


def test_neuron_shares_and_entropy(generator: torch.Generator) -> None:
    _, covariance, head, x = layer_sums(generator)
    w = head[0].weight.data
    w[3] = 0
    expected = np.array([[np.var(x[:, s].numpy() @ w[k, s].numpy()) for s in SLICES] for k in range(len(w))])
    total = expected.sum(1, keepdims=True)
    shares = weights.neuron_modality_shares(w, BLOCKS, covariance)
    np.testing.assert_allclose(shares.numpy(), np.divide(expected, total, where=total > 0, out=np.zeros_like(expected)))
    norms = weights.neuron_modality_shares(w, BLOCKS)
    assert float(norms[0, 1]) == pytest.approx(float(w[0, 5:8].square().sum() / w[0].square().sum()))
    entropy = weights.modality_entropy(shares)
    assert math.isnan(entropy[3])
    assert float(entropy[0]) == pytest.approx(scipy.stats.entropy(shares[0].numpy()) / math.log(3))
    assert weights.modality_entropy(torch.ones(1, 3) / 3).item() == pytest.approx(1)
    assert weights.modality_entropy(torch.ones(2, 1)).tolist() == [0, 0]
    assert weights.modality_entropy(torch.tensor([[0.0, 1.0], [0.5, 0.5]])).tolist() == pytest.approx([0, 1])


def test_attribution_and_signal_noise_shares(generator: torch.Generator) -> None:
    _, _, head, x = layer_sums(generator)
    w = head[0].weight.data
    jacobian = vmap(jacrev(head[1:]))(head[0](x).detach()).detach().numpy()  # [N, C, h]
    squared = np.square(jacobian).sum(1)
    centred = x.numpy() - x.numpy().mean(0)
    parts = np.stack([(squared * np.square(centred[:, s] @ w[:, s].numpy().T)).sum(0) for s in SLICES], 1)
    found = weights.attribution_shares(w, x, torch.from_numpy(squared), BLOCKS)
    np.testing.assert_allclose(found.numpy(), parts / parts.sum(1, keepdims=True), rtol=1e-9)

    labels = torch.randint(3, (300,), generator=generator)
    x += torch.randn(3, 12, generator=generator, dtype=torch.float64)[labels]
    signal, noise = weights.signal_noise_shares(w, x, labels, BLOCKS)
    expected = np.zeros((20, 6))
    for i, s in enumerate(SLICES):
        z = x[:, s].numpy() @ w[:, s].numpy().T
        means = np.stack([z[labels == c].mean(0) for c in range(3)])[labels]
        expected[:, i], expected[:, 3 + i] = means.var(0), (z - means).var(0)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(torch.cat([signal, noise], 1).numpy(), expected, rtol=1e-8)


# Similarity


def test_cka(generator: torch.Generator) -> None:
    x, y = (torch.randn(90, k, generator=generator, dtype=torch.float64) + 3 for k in (5, 8))
    y[:, :3] += x[:, :3]
    centre = np.eye(90) - 1 / 90
    kx, ky = (centre @ t.numpy() @ t.numpy().T @ centre for t in (x, y))
    expected = (kx * ky).sum() / np.linalg.norm(kx) / np.linalg.norm(ky)
    assert similarity.linear_cka(x, y) == pytest.approx(expected, rel=1e-10)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    assert similarity.linear_cka(x, 7 * x @ rotation - 1) == pytest.approx(1)
    assert math.isnan(similarity.linear_cka(x, torch.ones(90, 2)))


def test_variance_inflation_is_that_of_regressions(generator: torch.Generator) -> None:
    from sklearn.linear_model import LinearRegression

    x = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    x[:, 4] = x[:, 0] + x[:, 1] + 0.3 * x[:, 4]
    x[:, 2] = 5.0
    covariance = similarity.covariance_of(x)
    factors = similarity.variance_inflation(covariance, ridge=1e-12).numpy()
    moving = [0, 1, 3, 4, 5]
    for j in moving:
        others = x[:, [k for k in moving if k != j]].numpy()
        r2 = LinearRegression().fit(others, x[:, j]).score(others, x[:, j])
        assert factors[j] == pytest.approx(1 / (1 - r2), rel=1e-6)
    assert math.isnan(factors[2])
    x[:, 5] = x[:, 3]
    collinear = similarity.variance_inflation(similarity.covariance_of(x), ridge=1e-4)
    assert 1e3 < float(collinear[3]) <= 1e4
    rounded = torch.tensor([[4.0, 3.0], [3.0, 1.0]])  # a correlation of 1.5: eigenvalues 2.5 and less than none
    found = similarity.variance_inflation(rounded, ridge=0.01)
    torch.testing.assert_close(found, torch.full((2,), 0.5 / 2.51 + 0.5 / 0.01, dtype=torch.float64))
