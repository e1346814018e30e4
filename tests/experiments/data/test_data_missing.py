"""Missingness completely at random: the law against enumeration, natural absence, seeds, realised rates."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from mmc_fast.errors import InputError
from mmc_fast.experiments import data


def law(natural: list[bool], rates: list[float]) -> dict[tuple[bool, ...], float]:
    """Chance of each outcome for one row: independent removal, empty outcomes excluded."""
    chances = {}
    for outcome in product([False, True], repeat=len(natural)):
        if any(outcome) and not any(kept and not had for kept, had in zip(outcome, natural, strict=True)):
            pairs = [(1 - q) if kept else q for kept, had, q in zip(outcome, natural, rates, strict=True) if had]
            chances[outcome] = float(np.prod(pairs))
    total = sum(chances.values())
    return {outcome: chance / total for outcome, chance in chances.items()}


@pytest.mark.parametrize("rates", [0.1, 0.4, 0.7, 0.97, (0.2, 0.9, 0.5, 0.0)])
def test_law_is_that_of_redrawing_empty_rows(rates: float | tuple[float, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    natural = rng.random(4) < 0.75
    natural[rng.integers(4)] = True
    n = 40_000
    present = torch.from_numpy(np.tile(natural, (n, 1)))
    got = data.mcar(present, rates, torch.Generator().manual_seed(seed))
    expected = law(natural.tolist(), list(rates) if isinstance(rates, tuple) else [rates] * 4)
    patterns, counts = np.unique(got.present.numpy(), axis=0, return_counts=True)
    seen = {tuple(bool(b) for b in p): int(c) for p, c in zip(patterns, counts, strict=True)}
    assert {outcome for outcome, chance in expected.items() if chance > 0} >= set(seen)
    likely = [o for o, chance in expected.items() if chance * n > 25]
    rest = n - sum(seen.get(o, 0) for o in likely)
    observed = [seen.get(o, 0) for o in likely] + [rest]
    wanted = [expected[o] * n for o in likely] + [n * (1 - sum(expected[o] for o in likely))]
    if wanted[-1] < 1e-6:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) > 1:
        wanted = list(np.array(wanted) * sum(observed) / sum(wanted))
        assert chisquare(observed, wanted).pvalue > 1e-7


def test_two_modalities_at_seventy_percent_lose_about_forty_one(generator: torch.Generator) -> None:
    got = data.mcar(torch.ones(50_000, 2, dtype=torch.bool), 0.7, generator)
    assert got.nominal == 0.7
    np.testing.assert_allclose(got.realised, 0.7 * 0.3 / (1 - 0.49), atol=0.02)


def test_rate_zero_changes_nothing(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    present = torch.rand(500, 5, generator=g) < 0.6
    got = data.mcar(present, 0.0, g)
    assert torch.equal(got.present, present)
    assert got.realised == [0.0] * 5


@pytest.mark.parametrize("rate", [0.3, 0.999999])
def test_natural_absence_stays_and_no_row_loses_everything(rate: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    natural = torch.rand(3000, 4, generator=g) < 0.5
    natural[:, 3] &= natural[:, 0]
    before = natural.clone()
    got = data.mcar(natural, rate, g)
    assert torch.equal(natural, before)  # the argument is not changed
    assert not (got.present & ~natural).any()
    assert torch.equal(got.present.any(1), natural.any(1))
    single = natural.sum(1) == 1
    assert torch.equal(got.present[single], natural[single])
    for i in range(4):
        had = natural[:, i]
        assert got.realised[i] == pytest.approx(1 - got.present[had, i].double().mean().item(), abs=1e-6)


def test_one_modality_alone_is_never_removed(generator: torch.Generator) -> None:
    assert data.mcar(torch.ones(100, 1, dtype=torch.bool), 0.9, generator).present.all()


def test_a_modality_that_no_row_has(generator: torch.Generator) -> None:
    natural = torch.tensor([[True, False, True]]).repeat(50, 1)
    assert data.mcar(natural, 0.5, generator).realised[1] == 0.0


def test_seeded(seed: int) -> None:
    present = torch.ones(200, 3, dtype=torch.bool)
    one, two, other = (data.mcar(present, 0.5, torch.Generator().manual_seed(seed + s)).present for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_realised_rate_of_a_modality_that_one_row_has(seed: int) -> None:
    natural = torch.tensor([[True, True], [True, False]])
    for s in range(20):
        got = data.mcar(natural, (0.5, 0.999), torch.Generator().manual_seed(seed + s))
        lost = natural & ~got.present
        assert got.realised == [lost[:, 0].sum().item() / 2, float(lost[0, 1])]


def test_no_rows(generator: torch.Generator) -> None:
    got = data.mcar(torch.ones(0, 3, dtype=torch.bool), 0.5, generator)
    assert got.present.shape == (0, 3)
    assert got.realised == [0.0] * 3


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan"), float("inf"), True, "0.4", None, [0.1, 1.0, 0.2]])
def test_bad_rate(rate: object) -> None:
    with pytest.raises(InputError, match=r"not allowed; give a number in \[0, 1\)"):
        data.mcar(torch.ones(5, 3, dtype=torch.bool), rate, torch.Generator())  # type: ignore[arg-type]


def test_other_bad_arguments() -> None:
    present = torch.ones(5, 3, dtype=torch.bool)
    with pytest.raises(InputError, match="2 rates for 3 modalities"):
        data.mcar(present, [0.1, 0.2], torch.Generator())
    for wrong, got in (
        (present.float(), r"torch.float32 \[5, 3\]"), (present[0], r"torch.bool \[3\]"), (present.numpy(), "ndarray")
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"present must be a bool tensor \[N, m\], got {got}"):
            data.mcar(wrong, 0.1, torch.Generator())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a torch\.Generator"):
        data.mcar(present, 0.1, 0)  # type: ignore[arg-type]
