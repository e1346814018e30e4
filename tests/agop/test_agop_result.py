"""What a result offers without the matrix, random probes, input moments, and exact centring beyond 63 bits."""

from __future__ import annotations

import pytest
import torch
from agop_heads import chain, jacrev_agop
from torch import nn

from mmc_fast.agop.accumulator import AGOPAccumulator, agop
from mmc_fast.agop.explain import explain
from mmc_fast.agop.state import centered_counts
from mmc_fast.errors import InputError
from mmc_fast.testing import relative_error

HEADS = [([12, 30, 5], "relu"), ([12, 30, 5], "gelu"), ([12, 20, 16, 5], "tanh"), ([12, 5], "relu")]


@pytest.mark.parametrize(("sizes", "activation"), HEADS)
@pytest.mark.parametrize("center", [False, True])
def test_diagonal_block_traces_and_eigenvectors_need_no_matrix(sizes, activation, center, generator):
    head = chain(sizes, activation, generator).double()
    x = torch.randn(150, 12, generator=generator, dtype=torch.float64)
    blocks = {"image": 7, "audio": 0, "text": 5}
    result = AGOPAccumulator(head, blocks=blocks, center=center, reduction="mean").update(x).compute()
    truth = jacrev_agop(head, x, center=center, reduction="mean")
    diagonal, traces = result.diagonal(), result.block_traces()
    values, vectors = result.eigh(3)
    assert "matrix" not in vars(result)  # it was not formed on the way
    assert (diagonal - truth.diagonal()).abs().max() <= 1e-12 * max(1, truth.norm())
    expected = torch.stack(
        [truth.diagonal()[:7].sum(), torch.zeros((), dtype=torch.float64), truth.diagonal()[7:].sum()]
    )
    assert torch.allclose(traces, expected, atol=1e-12)
    assert result.blocks == blocks
    assert torch.allclose(values, torch.linalg.eigvalsh(truth).flip(0)[:3], atol=1e-10)
    assert torch.allclose(truth @ vectors, vectors * values, atol=1e-9)
    assert torch.allclose(vectors.t() @ vectors, torch.eye(3, dtype=torch.float64), atol=1e-10)
    assert torch.equal(vectors.max(0).values, vectors.abs().max(0).values), "the largest entry is positive"
    assert relative_error(result.matrix, truth) < 1e-12 or truth.norm() < 1e-12


def test_lanczos_on_a_wide_input(generator):
    head = chain([300, 24, 6], "silu", generator)
    x = torch.randn(200, 300, generator=generator)
    result = AGOPAccumulator(head).update(x).compute()
    truth = jacrev_agop(head, x)
    for k in (1, 4, 150):
        values, vectors = result.eigh(k)
        assert vectors.shape == (300, k)
        assert torch.allclose(values, torch.linalg.eigvalsh(truth).flip(0)[:k], atol=1e-5 * float(truth.norm()))
        assert (truth @ vectors - vectors * values).norm() <= 1e-5 * truth.norm()
        assert torch.equal(vectors.max(0).values, vectors.abs().max(0).values)
    again = result.eigh(4)
    assert torch.equal(again[1], result.eigh(4)[1])
    empty = AGOPAccumulator(head).compute()
    assert not empty.eigh(2)[0].any()
    assert torch.allclose(empty.eigh(2)[1].t() @ empty.eigh(2)[1], torch.eye(2, dtype=torch.float64))
    for k in (0, 301, 1.0, True):
        with pytest.raises(InputError, match=r"pass an integer in 1\.\.300"):
            result.eigh(k)


def test_the_largest_eigenvalues_of_an_estimate_that_has_negative_ones(generator):
    """Two samples and many outputs: signs of the probes decide, and a centred estimate is indefinite."""
    head, x = chain([100, 90, 80], "tanh", generator), torch.randn(2, 100, generator=generator)
    result = AGOPAccumulator(head, probes=1, center=True).update(x).compute()
    values = torch.linalg.eigvalsh(result.matrix.double())
    assert values[0] < -0.1 * values[-1]
    for k in (2, 5):
        assert torch.allclose(result.eigh(k)[0], values.flip(0)[:k], atol=1e-5 * float(values[-1]))


def test_a_result_tells_how_it_was_made(generator):
    head, x = chain([6, 9, 8, 3], "relu", generator), torch.randn(7, 6, generator=generator)
    options = {"layer": -2, "output": "probs", "center": True, "reduction": "mean", "probes": 2, "blocks": [4, 5]}
    result = AGOPAccumulator(head, **options).update(x).compute()
    assert (result.n, result.layer, result.output, result.centered) == (7, 1, "probs", True)
    assert (result.reduction, result.probes, result.blocks) == ("mean", 2, {"0": 4, "1": 5})
    plain = AGOPAccumulator(head, layer="0").compute()
    assert (plain.n, plain.layer, plain.output, plain.centered) == (0, 0, "logits", False)
    assert (plain.reduction, plain.probes, plain.blocks, plain.backend) == ("sum", None, {"input": 6}, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_explain_names_the_backend_that_runs(dtype, generator):
    for sizes, activation in HEADS:
        head = chain(sizes, activation, generator).to(dtype)
        x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        first = next(row for row in explain("agop", head, x) if row.usable)
        result = AGOPAccumulator(head).update(x).compute()
        assert (first.backend, first.reason.split(": ")[1].split(",")[0]) == (result.backend, result.method)


def test_input_moments(generator):
    head = chain([6, 9, 8, 3], "relu", generator)
    x = torch.randn(333, 6, generator=generator) + 100
    accumulator = AGOPAccumulator(head, layer=1, input_cov=True, chunk_size=64)
    result = accumulator.update(x.split(90)).compute()
    u = head[:2].double()(x.double()).detach()
    assert torch.allclose(result.input_mean, u.mean(dim=0), rtol=1e-5, atol=1e-5)
    assert relative_error(result.input_cov, torch.cov(u.t(), correction=0)) < 1e-4
    assert AGOPAccumulator(chain([6, 3], "relu", generator)).update(x).compute().input_cov is None


@pytest.mark.parametrize("sizes", [[6, 10, 4], [6, 10, 8, 4], [6, 4]])
@pytest.mark.parametrize("output", ["logits", "probs"])
@pytest.mark.parametrize("center", [False, True])
def test_probes_are_unbiased_and_know_their_error(sizes, output, center, generator):
    head = chain(sizes, "tanh", generator).double()
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    truth = jacrev_agop(head, x, output=output, center=center)
    scale = jacrev_agop(head, x, output=output).norm()
    for probes in (1, 3):
        estimates, errors = [], []
        for seed in range(300):
            accumulator = AGOPAccumulator(head, output=output, center=center, probes=probes, seed=seed).update(x)
            result = accumulator.compute()
            estimates.append(result.matrix)
            errors.append(result.probe_error)
        stack = torch.stack(estimates)
        spread = float((stack - truth).square().sum(dim=(1, 2)).mean().sqrt())  # of one estimate
        assert (stack.mean(dim=0) - truth).norm() <= 4 * spread / 300**0.5 + 1e-12 * scale
        if probes == 1:
            assert set(errors) == {None}
        else:
            told = torch.tensor([e * float(m.norm()) for e, m in zip(errors, estimates, strict=True)])
            assert 0.85 * spread <= float(told.square().mean().sqrt()) <= 1.15 * spread + 1e-9 * scale


def test_an_estimate_of_nothing_has_no_error(generator):
    head = chain([6, 10, 4], "tanh", generator)
    torch.nn.init.zeros_(head[0].weight)
    assert AGOPAccumulator(head, probes=3).update(torch.randn(20, 6, generator=generator)).compute().probe_error == 0.0


def test_probes_repeat_with_their_seed_whatever_the_chunks(generator):
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = chain([6, 10, 40], "tanh", generator)

        def forward(self, x):
            return self.inner(x)

    x = torch.randn(300, 6, generator=generator)
    head = Custom()
    for module in (head, head.inner):
        first = agop(module, x, probes=2, seed=5)
        assert relative_error(agop(module, x, probes=2, seed=5, chunk_size=64), first) < 1e-6
        assert relative_error(agop(module, x.split(77), probes=2, seed=5), first) < 1e-6
        assert relative_error(agop(module, x, probes=2, seed=6), first) > 1e-4
    assert relative_error(agop(head, x, probes=2, seed=5), agop(head.inner, x, probes=2, seed=5)) < 1e-5
    rough = agop(head.inner, x, probes=2, seed=5, precision="bf16")
    assert 1e-6 < relative_error(rough, agop(head.inner, x, probes=2, seed=5)) < 2e-2


def test_centred_counts_are_exact_beyond_63_bits(generator):
    """``n c − a b`` where the products need up to 120 bits and nearly cancel, against Python integers."""
    draw = lambda high: int(torch.randint(0, high, (), generator=generator))  # noqa: E731
    for n in (10, 2**31 - 1, 2**31, 2**40 + 12345, 2**53 - 1, 2**60):
        for _ in range(60):
            a, b = draw(n + 1), draw(n + 1)
            near = a * b // n
            for c in {near, near + 1, max(0, near - 5), draw(n + 1), n, 0}:
                got = centered_counts(torch.tensor([[c]]), torch.tensor([[a]]), torch.tensor([b]), n)
                exact = n * c - a * b
                assert abs(int(got) - exact) <= abs(exact) * 2**-52, (n, a, b, c)
