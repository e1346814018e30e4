"""Product of experts, masked copies, ensembles and the subset oracle against formulas and trainings of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from test_methods import BUDGET
from training_data import tiny

from mmc_fast._util.seeds import derive_seed
from mmc_fast.experiments.methods import get
from mmc_fast.experiments.methods.sklearn_baselines import masked_copies
from mmc_fast.experiments.training.experts import ExpertProduct


def votes(seed: int, rows: int = 40, fused: bool = True):
    g = torch.Generator().manual_seed(seed)
    experts, whole = torch.randn(2, rows, 3, generator=g), torch.randn(rows, 3, generator=g)
    present = torch.rand(rows, 2, generator=g) < 0.6
    present[~present.any(1), 0] = True
    labels = (experts[0] + 0.5 * experts[1] + 0.3 * whole + torch.randn(rows, 3, generator=g)).argmax(1)
    logs = [x.double().log_softmax(-1) for x in (experts, whole)]
    return logs[0], logs[1] if fused else None, present, labels


def product_by_row(parameters, experts, whole, present, prior):
    """The formula of the class, sample by sample, from the logarithms of w, s and f in one vector."""
    w, s, f = np.exp(parameters[:2]), np.exp(parameters[2:4]), np.exp(parameters[4:6])
    found = np.empty(experts.shape[1:])
    for n in range(len(found)):
        here = [i for i in range(2) if present[n, i]]
        total = prior.copy()
        for i in here:
            total = total + w[i] * s[len(here) - 1] * (experts[i, n] - prior)
        if whole is not None:
            total = total + f[len(here) - 1] * (whole[n] - prior)
        found[n] = total - logsumexp(total)
    return found


@pytest.mark.parametrize("fused", [True, False])
def test_the_product_is_its_formula_and_its_fit_the_minimum(fused, seed):
    experts, whole, present, labels = votes(seed, fused=fused)
    prior = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    product = ExpertProduct(2, prior, fused)
    start = torch.cat([product.weight, product.size, product.fused]).detach().numpy().copy()
    product.fit(experts, whole, present, labels, 0.02)
    fitted = torch.cat([product.weight, product.size, product.fused]).detach().numpy()
    arrays = experts.numpy(), None if whole is None else whole.numpy(), present.numpy(), prior.log().numpy()
    expected = product_by_row(fitted, *arrays)
    np.testing.assert_allclose(product(experts, whole, present).detach().numpy(), expected, atol=1e-10)
    moving = 6 if fused else 4

    def objective(x):
        everything = np.concatenate([x, fitted[moving:]])
        found = product_by_row(everything, *arrays)[np.arange(len(labels)), labels.numpy()]
        return -found.mean() + 0.02 * ((x - start[:moving]) ** 2).sum()

    best = minimize(objective, start[:moving], method="BFGS")
    assert objective(fitted[:moving]) == pytest.approx(best.fun, abs=1e-6)
    assert objective(start[:moving]) > best.fun + 1e-4


def test_equal_weights_are_naive_bayes(seed):
    """p(y | x_1, x_2) ~ p(x_1 | y) p(x_2 | y) p(y), from a table of two conditionally independent symbols."""
    g = torch.Generator().manual_seed(seed)
    prior = torch.rand(3, generator=g, dtype=torch.float64).softmax(0)
    tables = [torch.rand(3, 4, generator=g, dtype=torch.float64).softmax(1) for _ in range(2)]
    x = torch.randint(4, (2, 10), generator=g)
    joint = [(t[:, symbols] * prior[:, None]).t() for t, symbols in zip(tables, x, strict=True)]
    experts = torch.stack([(j / j.sum(1, keepdim=True)).log() for j in joint])
    exact = (tables[0][:, x[0]] * tables[1][:, x[1]] * prior[:, None]).t()
    product = ExpertProduct(2, prior, False)
    torch.nn.init.zeros_(product.size)
    found = product(experts, None, torch.ones(10, 2, dtype=torch.bool)).exp().detach()
    torch.testing.assert_close(found, exact / exact.sum(1, keepdim=True))


def test_masked_copies_keep_the_rows_and_hide_in_the_copies_only(seed):
    part = tiny(seed, absent=0.2).part("train")
    copies = masked_copies(part, 3, torch.Generator().manual_seed(seed))
    n = len(part)
    assert len(copies) == 4 * n
    assert torch.equal(copies.present[:n], part.present)
    hidden = part.present.repeat(4, 1) & ~copies.present
    assert bool((copies.present <= part.present.repeat(4, 1)).all())
    assert [bool(h.any()) for h in hidden.split(n)] == [False, True, True, True]
    assert torch.equal(copies.labels, part.labels.repeat(4))
    assert torch.equal(copies.features[1], part.features[1].repeat(4, 1))


def test_the_oracle_answers_with_the_model_of_the_present_subset(seed):
    dataset, part = tiny(seed), tiny(seed).part("test")
    oracle = get("subset-oracle").fit(dataset, None, 5, budget=BUDGET)
    present = torch.tensor([True, False, True]).expand(len(part), 3).clone()
    present[::2] = torch.tensor([False, True, False])
    found = oracle.predict(part.features, present)
    for names, rows in ((("a", "c"), slice(1, None, 2)), (("b",), slice(0, None, 2))):
        member = derive_seed(derive_seed(5, "subset", *names) % 2**31, "member", 0) % 2**31
        alone = get("vanilla").fit(dataset.keep(names), None, member, budget=BUDGET)
        features = [part.features[dataset.modalities.index(name)][rows] for name in names]
        expected = alone.predict(features, torch.ones(len(features[0]), len(names), dtype=torch.bool))
        torch.testing.assert_close(found[rows], expected, rtol=0, atol=0)


def test_an_ensemble_is_the_mean_of_its_members(seed):
    dataset = tiny(seed)
    method, part = get("consistency-x5"), dataset.part("test")
    found = method.fit(dataset, method.search[0] | {"options": {"members": 2}}, 5, budget=BUDGET)
    seeds = [derive_seed(5, "member", n) % 2**31 for n in range(2)]
    members = [
        get("consistency").fit(dataset, None, s, budget=BUDGET).predict(part.features, part.present) for s in seeds
    ]
    assert not torch.allclose(*members, atol=1e-4)
    torch.testing.assert_close(found.predict(part.features, part.present), (members[0] + members[1]) / 2)
