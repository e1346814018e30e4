"""AGOP against float64 ``torch.func``: every activation, depth, layer, output, centring and backend; counts bitwise."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from agop_heads import away_from_kinks, chain, jacrev_agop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import ACTIVATIONS, heads, sample_counts
from torch import nn

from mmc_fast.agop import result as agop_result
from mmc_fast.agop.accumulator import AGOPAccumulator, agop
from mmc_fast.agop.reference import agop as reference_agop
from mmc_fast.agop.reference import jacobians
from mmc_fast.ops import native as library
from mmc_fast.testing import assert_as_accurate, relative_error

NATIVE = library.unavailable_reason() is None
BACKENDS = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(not NATIVE, reason="the native library is not built")),
]
CASES = list(itertools.product(["logits", "probs"], [False, True], ["sum", "mean"]))


def truths(head: nn.Sequential, x: torch.Tensor, **options):
    """Plain PyTorch in the head's dtype, float64 truth, and how much centring amplifies rounding.

    Of plain results on inputs that differ by a rounding error the worst one counts: a sum of few terms can come out right by
    luck, or stand where a derivative crosses zero, which no method in this precision can resolve.
    """
    truth = jacrev_agop(head, x, **options)
    step = torch.finfo(x.dtype).eps * torch.randint(-1, 2, (6, *x.shape), generator=torch.Generator().manual_seed(0))
    step[0] = 0
    candidates = [reference_agop(head, x * (1 + change), **options) for change in step]
    plain = max(candidates, key=lambda candidate: relative_error(candidate, truth))
    amplification = 1.0
    if options.get("center"):
        whole = jacrev_agop(head, x, **{**options, "center": False})
        amplification = float(whole.norm() / truth.norm()) if truth.norm() > 0 else float("inf")
    return plain, truth, amplification


def test_the_reference_equals_torch_func(generator):
    for activation in ACTIVATIONS:
        head = chain([5, 7, 6, 4], activation, generator).double()
        x = torch.randn(13, 5, generator=generator, dtype=torch.float64)
        assert not reference_agop(head, x[:1], center=True).any(), "one sample is its own mean"
        for layer, (output, center, reduction) in [(0, CASES[0]), (1, CASES[3]), (-1, CASES[6])]:
            options = {"layer": layer, "output": output, "center": center, "reduction": reduction}
            assert relative_error(reference_agop(head, x, **options), jacrev_agop(head, x, **options)) < 1e-12


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_float64_is_exact_everywhere(activation, depth, generator):
    for outputs, bias, last in [(1, True, False), (2, True, True), (5, False, False), (20, True, False)]:
        head = chain([*[7, 9, 6, 8][:depth], outputs], activation, generator, bias=bias, last=last).double()
        x = torch.randn(70, 7, generator=generator, dtype=torch.float64)
        for layer, output in itertools.product([*range(depth), -1], ["logits", "probs"]):
            jacobian = jacobians(head, x, layer=layer, output=output)
            scale = jacobian.square().sum()
            for center, reduction in itertools.product([False, True], ["sum", "mean"]):
                rows = (jacobian - jacobian.mean(dim=0) if center else jacobian).flatten(0, 1)
                truth = rows.t() @ rows / (len(x) if reduction == "mean" else 1)
                ours = agop(head, x, layer=layer, output=output, center=center, reduction=reduction)
                assert torch.equal(ours, ours.t())
                assert (ours - truth).norm() <= 1e-12 * scale, (outputs, layer, output, center, reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"identity"}))
def test_one_hidden_layer_in_float32(activation, backend, generator):
    for n, d, h, c in [(1, 3, 1, 2), (63, 5, 17, 3), (64, 20, 64, 1), (513, 33, 65, 12), (2100, 40, 130, 7)]:
        head = chain([d, h, c], activation, generator)
        x = away_from_kinks(head, torch.randn(n, d, generator=generator))
        for center in (False, True):
            plain, truth, amplification = truths(head, x, center=center)
            if truth.norm() == 0:
                assert agop(head, x, center=center, backend=backend).norm() <= 1e-12
                continue
            ours = agop(head, x, center=center, backend=backend)
            assert_as_accurate(ours, plain, truth, amplification=amplification, what=f"{(n, d, h, c)} center={center}")


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
def test_auto_takes_native_code_at_every_layer_before_an_activation(generator):
    x = torch.randn(65, 6, generator=generator)
    for activation, hidden in itertools.product(sorted(set(ACTIVATIONS) - {"identity"}), range(1, 5)):
        head = chain([6, *[9] * hidden, 3], activation, generator)
        for layer in range(hidden):
            assert AGOPAccumulator(head, layer=layer).update(x).compute().backend == "cpp", (activation, hidden, layer)
    assert AGOPAccumulator(head, backend="eager").update(x).compute().backend == "eager"
    assert AGOPAccumulator(head).compute().backend is None


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(head=heads(largest=40), n=sample_counts(200), data=st.data())
def test_random_heads_in_float32(head, n, data):
    seed = data.draw(st.integers(0, 2**31))
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    layer = data.draw(st.integers(-len(linears), len(linears) - 1))
    output, center, reduction = data.draw(st.sampled_from(CASES))
    x = torch.randn(n, linears[0].in_features, generator=torch.Generator().manual_seed(seed))
    x = away_from_kinks(head, x, 1e-5)
    if not len(x):
        assert not agop(head, x, layer=layer, output=output, center=center).any()
        return
    options = {"layer": layer, "output": output, "center": center, "reduction": reduction}
    plain, truth, amplification = truths(head, x, **options)
    ours = agop(head, x, chunk_size=data.draw(st.sampled_from([None, 1, 64, 100])), **options)
    whole = jacrev_agop(head, x, **{**options, "center": False}).norm()
    if truth.norm() <= 1e-6 * whole:  # nothing is left after centring: compare with what was subtracted
        assert (ours.double() - truth).norm() <= 1e-5 * whole
        return
    assert_as_accurate(ours, plain, truth, amplification=amplification)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_do_not_depend_on_chunks_threads_or_batches(backend, generator):
    head = chain([37, 129, 4], "relu", generator)
    x = torch.randn(700, 37, generator=generator)
    whole = AGOPAccumulator(head, backend=backend).update(x).method.state.counts
    exact = (nn.functional.linear(x.double(), head[0].weight.double(), head[0].bias.double()) > 0).long()
    assert (torch.triu(exact.t() @ exact) - whole).abs().max() <= 2  # signs at the last bit may differ from float64
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for chunk in (1, 192, 1000):
                counts = AGOPAccumulator(head, backend=backend, chunk_size=chunk).update(x).method.state.counts
                assert torch.equal(counts, whole), (count, chunk)
    finally:
        torch.set_num_threads(threads)
    pieces = AGOPAccumulator(head, backend=backend).update(x[cut : cut + 100] for cut in range(0, 700, 100))
    assert torch.equal(pieces.method.state.counts, whole)


def test_inputs_of_any_layout(generator):
    head = chain([6, 9, 3], "gelu", generator)
    x = torch.randn(200, 12, generator=generator)
    columns = x.t().contiguous().t()
    for view in (x[:, :6], x[:, ::2], x[3:150:2, 6:], columns[:, :6], x.double()[:, :6], x.half()[:, :6]):
        truth = jacrev_agop(head, view.to(torch.float32))
        assert relative_error(agop(head, view), truth) < 2e-6
    tracked = x[:, :6].clone().requires_grad_()
    result = agop(head, tracked)
    assert not result.requires_grad
    assert tracked.grad is None
    deep = chain([6, 9, 8, 3], "relu", generator)
    normalised = nn.Sequential(head[0], nn.LayerNorm(9), head[2])
    for kind, options in itertools.product((head, deep, normalised), ({}, {"center": True}, {"backend": "eager"})):
        expected = AGOPAccumulator(kind, **options).update(x[:, :6]).update(x[:, :6]).compute().matrix
        with torch.inference_mode():
            accumulator = AGOPAccumulator(kind, **options).update(x[:, :6].clone())
        assert relative_error(accumulator.update(x[:, :6]).compute().matrix, expected) < 2e-6
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(agop(head, x[:, :6]), agop(head, x[:, :6].clone()))
        assert relative_error(agop(head, x[:, :6]), jacrev_agop(head, x[:, :6])) < 2e-6


@pytest.mark.parametrize("sizes", [[6, 3], [6, 9, 3], [6, 9, 8, 3]])
def test_no_samples_and_one_sample(sizes, generator):
    for activation, (output, center, reduction) in itertools.product(["relu", "leaky_relu", "silu"], CASES):
        head = chain(sizes, activation, generator)
        empty = agop(head, torch.empty(0, 6), output=output, center=center)
        assert empty.shape == (6, 6)
        assert not empty.any()
        one = torch.randn(1, 6, generator=generator)
        ours = agop(head, one, output=output, center=center, reduction=reduction)
        if center:
            assert not ours.any()  # one sample is its own mean
        else:
            assert relative_error(ours, jacrev_agop(head, one, output=output)) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_nonfinite_pre_activation_makes_everything_nan(bad, backend, generator):
    for activation, sizes in itertools.product(ACTIVATIONS, [[5, 3], [5, 7, 3], [5, 7, 6, 3]]):
        head = chain(sizes, activation, generator)
        x = torch.randn(130, 5, generator=generator)
        x[129, 2] = bad
        for layer in range(len(sizes) - 1):
            accumulator = AGOPAccumulator(head, layer=layer, backend=backend, input_cov=True).update(x)
            result = accumulator.compute()
            assert result.matrix.isnan().all()
            assert result.diagonal().isnan().all()
            assert result.eigh(1)[0].isnan().all()
            assert result.input_cov.isnan().all()
            assert accumulator.update(torch.randn(3, 5)).compute().matrix.isnan().all()


def test_the_derivative_of_relu_at_zero_is_zero():
    head = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(head[0].bias)
    assert not agop(head, torch.zeros(70, 2)).any()
    deep = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(deep[0].bias)
    assert not agop(deep, torch.zeros(70, 2)).any()


def test_centring_does_not_cancel(generator):
    """Units that are active on all samples but one, and a sigmoid whose derivative varies by 1e-3 about 1/4."""
    head = chain([4, 16, 3], "relu", generator)
    head[0].weight.data.mul_(0.01)
    head[0].bias.data.fill_(1.0)
    x = torch.randn(5000, 4, generator=generator)
    x[77] = -500 * head[0].weight[0].detach() / head[0].weight[0].norm() ** 2 * 0.01
    x = away_from_kinks(head, x)
    truth = jacrev_agop(head, x, center=True)
    whole = jacrev_agop(head, x)
    assert 0 < truth.norm() < 1e-3 * whole.norm()
    assert relative_error(agop(head, x, center=True), truth) < 3e-6
    head = chain([6, 20, 3], "sigmoid", generator)
    head[0].weight.data.mul_(0.05)
    head[0].bias.data.fill_(0.3)
    x = torch.randn(4000, 6, generator=generator)
    truth = jacrev_agop(head, x, center=True)
    assert truth.norm() < 1e-3 * jacrev_agop(head, x).norm()
    for accumulate in (x, list(x.split(300))):
        assert relative_error(agop(head, accumulate, center=True), truth) < 2e-4


def test_the_mean_is_taken_over_all_samples_not_per_chunk(generator):
    """Two halves with different Jacobians: a mean per chunk or batch would lose the difference between them."""
    cases = [("relu", "logits", [5, 30, 4]), ("gelu", "logits", [5, 30, 4])]
    for activation, output, sizes in [*cases, ("tanh", "logits", [5, 9, 8, 4]), ("relu", "probs", [5, 9, 4])]:
        head = chain(sizes, activation, generator)
        shift = torch.tensor([3.0, -2.0, 1.0, 2.0, -3.0])
        halves = torch.randn(256, 5, generator=generator) + shift, torch.randn(320, 5, generator=generator) - shift
        x = torch.cat(halves)
        x = away_from_kinks(head, x)
        truth = jacrev_agop(head, x, center=True, output=output)
        for options in ({}, {"chunk_size": 64}):
            assert relative_error(agop(head, x, center=True, output=output, **options), truth) < 1e-5
        assert relative_error(agop(head, x.split(50), center=True, output=output), truth) < 1e-5


def test_precision_of_the_head_and_of_the_call(generator):
    for dtype, sizes in itertools.product([torch.bfloat16, torch.float16], [[20, 40, 5], [20, 40, 30, 5]]):
        head = chain(sizes, "gelu", generator).to(dtype)
        x = torch.randn(300, 20, generator=generator).to(dtype)
        ours = agop(head, x, reduction="mean")
        assert ours.dtype == dtype
        truth = jacrev_agop(head, x, reduction="mean")
        assert_as_accurate(ours, reference_agop(head, x, reduction="mean"), truth)
        assert relative_error(ours, truth) < torch.finfo(dtype).eps
    mixed = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval().half()
    mixed[1].float()
    assert agop(mixed, torch.randn(9, 5, generator=generator)).dtype == torch.float16, "that of the weights"
    head = chain([20, 40, 30, 5], "tanh", generator)
    x = torch.randn(500, 20, generator=generator)
    truth = jacrev_agop(head, x)
    assert agop(head, x, precision="float64").dtype == torch.float32
    assert relative_error(agop(head, x, precision="float64"), truth) < 6e-8  # rounded once, at the end
    rough = agop(head, x, precision="bf16")
    assert 1e-5 < relative_error(rough, truth) < 1e-2
    assert relative_error(agop(copy.deepcopy(head).double(), x, precision="float32"), truth) < 2e-6


def test_memory_budget_and_chunk_size_change_rounding_only(generator):
    head = chain([20, 33, 25, 6], "silu", generator)
    x = torch.randn(200, 20, generator=generator)
    truth = jacrev_agop(head, x, output="probs")
    for options in ({"memory_budget": 1}, {"memory_budget": 200_000}, {"chunk_size": 1}, {"chunk_size": 5000}):
        assert relative_error(agop(head, x, output="probs", **options), truth) < 3e-6


@pytest.mark.parametrize("probes", [None, 1, 3])
@pytest.mark.parametrize("center", [False, True])
def test_panels_of_the_final_product_change_rounding_only(center, probes, generator, monkeypatch):
    """Several panels, the last one partial: every entry of the symmetric matrix is taken once."""
    accumulator = AGOPAccumulator(chain([40, 150, 3], "relu", generator), center=center, backend="eager", probes=probes)
    accumulator.update(torch.randn(200, 40, generator=generator))

    def parts() -> tuple[torch.Tensor, ...]:
        result = accumulator.compute()
        return result.matrix, result.diagonal(), result.eigh(2)[0]

    whole = parts()
    monkeypatch.setattr(agop_result, "_PANEL", 16)
    for some, all_at_once in zip(parts(), whole, strict=True):
        # in the norm: a small entry is a sum that nearly cancels
        assert relative_error(some, all_at_once.double()) < 2e-6


def test_wide_and_narrow_shapes_choose_other_contractions(generator):
    """Many outputs (R factor), a bottleneck, a small input (rows end at the input), a wide middle layer."""
    for sizes in ([30, 8, 40, 70], [4, 50, 60, 9], [40, 6, 64, 30, 50], [12, 60, 5, 60, 20]):
        head = chain(sizes, "tanh", generator)
        x = torch.randn(150, sizes[0], generator=generator)
        for layer in range(len(sizes) - 1):
            plain, truth, _ = truths(head, x, layer=layer)
            assert_as_accurate(agop(head, x, layer=layer), plain, truth, what=f"{sizes} layer {layer}")
