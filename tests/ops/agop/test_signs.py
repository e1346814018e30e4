"""The signs that AGOP counts are those of exact arithmetic: every backend and instruction set against Python's fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmc_fast.ops import native as library
from mmc_fast.ops.agop import op as agop
from mmc_fast.ops.agop import signs

ISAS = library.supported_isas()
LARGEST = {
    torch.float32: Fraction(2) ** 128 - Fraction(2) ** 103,
    torch.float64: Fraction(2) ** 1024 - Fraction(2) ** 970,
}


PRODUCTS = ["BLAS"] if ISAS and library.load_ebr() is None else []
RUNNERS = [*ISAS, *PRODUCTS, "eager", "eager in Python's integers"]


def count(runner, x, weight, bias):
    """Counts and whether a pre-activation is not finite; instruction sets take float32, PyTorch float64 and 16-bit numbers."""
    counts, flag = torch.zeros(len(weight), len(weight), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    if runner in ISAS and x.dtype == torch.float32:
        with library.forced_isa(runner), library.forced_ways("tiles"):
            agop.relu_coactivation_update(x, weight, bias, counts, flag, backend="cpp")
    elif runner == "BLAS" and x.dtype == torch.float32:
        for isa in ISAS:
            once, bad = torch.zeros_like(counts), torch.zeros_like(flag)
            with library.forced_isa(isa), library.forced_ways("blas"):
                agop.relu_coactivation_update(x, weight, bias, once, bad, backend="cpp")
            assert isa == ISAS[0] or torch.equal(once, counts) or bool(bad)
            counts, flag = once, bad
    else:
        with pytest.MonkeyPatch.context() as patch:
            if runner != "eager":
                patch.setattr(signs, "exact_signs", signs.signs_by_integers)
            agop.relu_coactivation_update(x, weight, bias, counts, flag, backend="eager")
    return counts, bool(flag.item())


def truth(x, weight, bias):
    """Counts and whether a pre-activation is not finite, by fractions."""
    rows, units = ([list(map(Fraction, row)) for row in t.double().tolist()] for t in (x, weight))
    offsets = [Fraction(0)] * len(units) if bias is None else list(map(Fraction, bias.double().tolist()))
    z = [
        [
            sum((a * b for a, b in zip(row, unit, strict=True)), offset)
            for unit, offset in zip(units, offsets, strict=True)
        ]
        for row in rows
    ]
    limit = LARGEST[torch.float64 if x.dtype == torch.float64 else torch.float32]
    active = torch.tensor([[int(value > 0) for value in row] for row in z]).reshape(len(rows), len(units))
    return (active.t() @ active).triu(), any(abs(value) >= limit for row in z for value in row)


def agree(x, weight, bias, runners=RUNNERS):
    """Every way to count finds what fractions find."""
    expected, expected_flag = truth(x, weight, bias)
    for runner in runners if x.dtype == torch.float32 else RUNNERS[-2:]:
        counts, flag = count(runner, x, weight, bias)
        assert flag == expected_flag, runner
        assert flag or torch.equal(counts, expected), runner


def near_orthogonal(n, d, h, generator, dtype):
    """Samples that are orthogonal to a unit each up to rounding."""
    x, weight = (torch.randn(k, d, generator=generator).double() for k in (n, h))
    own = weight[torch.arange(n) % h]
    x -= own * ((x * own).sum(1) / own.square().sum(1))[:, None]
    return x.to(dtype), weight.to(dtype), None


def cancelling(n, d, h, generator, dtype):
    """Every product occurs with both signs, at places of their own; a bias of the smallest number decides."""
    half = torch.randn(1, d, generator=generator).to(dtype)
    order = torch.randperm(2 * d, generator=generator)
    x = (torch.cat([half, half], 1) * 2.0 ** torch.randint(-3, 4, (n, 1), generator=generator))[:, order]
    weight = torch.randn(h, d, generator=generator).to(dtype)
    bias = torch.randint(-1, 2, (h,), generator=generator).to(dtype) * torch.finfo(dtype).smallest_normal / 4
    return x, torch.cat([weight, -weight], 1)[:, order], bias


def small_integers(n, d, h, generator, dtype):
    """Many exact zeros, samples and units of zeros among them."""
    x, weight, bias = (torch.randint(-1, 2, shape, generator=generator).to(dtype) for shape in ((n, d), (h, d), (h,)))
    x[0], weight[0], weight[-1], bias[-1] = 0, -0.0, 0, 0
    return x, weight, bias


def any_magnitude(n, d, h, generator, dtype):
    """Exponents over the whole range, subnormal numbers and overflow of the sum among them."""
    low, high = (-148, 124) if dtype == torch.float32 else (-1073, 1020)

    def numbers(*shape):
        exponent = torch.randint(low, high, shape, generator=generator).double()
        half = (exponent / 2).floor()  # in two steps, as 2 to that power may be subnormal
        return (torch.randn(shape, generator=generator).double() * 2.0**half * 2.0 ** (exponent - half)).to(dtype)

    return numbers(n, d), numbers(h, d), numbers(h)


def tiny(n, d, h, generator, dtype):
    """Products far below the smallest number."""
    x, weight, bias = near_orthogonal(n, d, h, generator, dtype)
    scale = torch.finfo(dtype).smallest_normal * 8
    return x * scale, weight * scale, bias


FAMILIES = (near_orthogonal, cancelling, small_integers, any_magnitude, tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_adversarial_signs_are_exact(family, dtype, generator):
    for n, d, h in [(1, 1, 1), (5, 2, 3), (9, 17, 13), (70, 20, 7)]:
        made = torch.float64 if dtype == torch.float64 else torch.float32
        x, weight, bias = family(n, d, h, generator, made)
        x, weight, bias = (t if t is None or dtype == made else t.clamp(-1e4, 1e4).to(dtype) for t in (x, weight, bias))
        agree(x, weight, bias)
        agree(x.t().contiguous().t(), weight.t().contiguous().t(), None)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_floats(data):
    wide = data.draw(st.booleans())
    n, d, h = (data.draw(st.integers(1, 4)) for _ in range(3))
    number = st.floats(width=64 if wide else 32, allow_nan=False, allow_infinity=False)

    def numbers(*shape):
        count = torch.Size(shape).numel()
        values = data.draw(st.lists(number, min_size=count, max_size=count))
        return torch.tensor(values, dtype=torch.float64 if wide else torch.float32).reshape(shape)

    x, weight, bias = numbers(n, d), numbers(h, d), numbers(h)
    if data.draw(st.booleans()):  # equal terms that cancel
        x, weight = torch.cat([x, x], 1), torch.cat([weight, -weight], 1)
    rows, units = torch.arange(n).repeat_interleave(h), torch.arange(h).repeat(n)
    by_integers = signs.signs_by_integers(x, weight, bias, rows, units)
    for row, unit, sign in zip(rows.tolist(), units.tolist(), by_integers.tolist(), strict=True):
        terms = [Fraction(a) * Fraction(b) for a, b in zip(x[row].tolist(), weight[unit].tolist(), strict=True)]
        z = sum(terms, Fraction(bias[unit].item()))
        assert sign == (2 if abs(z) >= LARGEST[x.dtype] else (z > 0) - (z < 0))
    if ISAS:
        assert torch.equal(torch.ops.mmc_fast.exact_signs(x, weight, bias, rows, units), by_integers)
    agree(x, weight, bias, [*ISAS[-1:], *PRODUCTS, "eager"])


def worst_case(d, first_is_bias):
    """Products 1, almost half a unit in the last place of it d − 2 times, and −1 − c: summed in this order every small one
    is lost, and a float32 sum is −c, with c three quarters of what was lost. The exact sum is positive."""
    small, c = 2.0**-12, round(0.75 * (d - 2) / 2) * 2.0**-23
    x = torch.full((1, d), small)
    weight = torch.full((1, d), small * (1 - 2.0**-10))
    x[0, -1], weight[0, -1] = -1, 1 + c
    x[0, 0] = weight[0, 0] = 0 if first_is_bias else 1
    return x, weight, torch.tensor([1.0 if first_is_bias else 0.0])


@pytest.mark.parametrize("d", [100, 1000])
@pytest.mark.parametrize(("scale_x", "scale_w"), [(1, 1), (2**10, 1), (1, 2**10)])
@pytest.mark.parametrize("first_is_bias", [False, True])
def test_a_bound_of_half_the_size_or_without_a_norm_would_be_wrong(d, scale_x, scale_w, first_is_bias):
    x, weight, bias = worst_case(d, first_is_bias)
    x, weight, bias = x * scale_x, weight * scale_w, bias * scale_x * scale_w
    total = bias.clone()
    for k in range(d):
        total += x[0, k] * weight[0, k]
    assert total.item() < 0, "the plain float32 sum must be wrong for this test to say something"
    agree(x, weight, bias)
    agree(-x, weight, -bias)


def split_case(what):
    """(products, bias): the exact pre-activation is positive, and the sum without ``what`` is negative by less than its bound."""
    ones = [1.0] * 4
    if what == "rests":  # 1 + x2 + rest, the rest almost half a unit in the last place of x2
        rest = 2.0**-17 - 2.0**-23
        return [1 + 2.0**-9 + rest] * 4, ones, -(4 * (1 + 2.0**-9) + 3 * rest)
    if what == "second parts":
        second = 2.0**-8 - 2.0**-16
        return [1 + second] * 4, [1 + second] * 4, -(4 * (1 + 2 * second) + 3 * 2.0**-16)
    if what == "flushed products":  # below the smallest normal number, but for the last
        return [2.0**-64] * 7 + [2.0**-63], [2.0**-64] * 7 + [-(2.0**-63)], 0.0
    lost = 2.0**-12 * (1 - 2.0**-7)  # half a unit in the last place of the first product, thirty times
    return [1.0] + [2.0**-12] * 30 + [-1.0], [1.0] + [lost] * 30 + [1 + 11 * 2.0**-23], 0.0


@pytest.mark.parametrize("what", ["rests", "second parts", "flushed products", "sums"])
@pytest.mark.parametrize("scale", [1.0, 2.0**40, 2.0**-30])
def test_a_split_bound_of_half_the_size_or_without_a_part_would_be_wrong(what, scale):
    row, unit, offset = split_case(what)
    x, weight, bias = torch.tensor([row]) * scale, torch.tensor([unit]), torch.tensor([offset]) * scale
    assert truth(x, weight, bias)[0].item() == 1
    for a, b in ((x, weight), (weight, x)):
        agree(a, b, bias)
        agree(-a, b, -bias)


@pytest.mark.parametrize(("count", "less"), [(32, 10), (256, 100)])
def test_float64_sums_that_are_wrong(count, less):
    """The same at the scale of float64, in every sixteenth place: a float64 dot product of 16 partial sums errs too."""
    x, weight = torch.zeros(3, 16 * count), torch.zeros(3, 16 * count)
    x[:, ::16], weight[:, ::16] = 2.0**-27, 2.0**-26 * 0.9
    x[:, 0] = weight[:, 0] = 1
    x[:, 1], weight[:, 1] = -1, 1
    x[:, 2], weight[:, 2] = -(2.0**-27), 2.0**-26 * less
    agree(x, weight, None)
    agree(-x, weight, None)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_reported_beside_zeros(runner, value):
    for dtype in (torch.float32, torch.float64):
        zeros = torch.zeros(3, 4, dtype=dtype)
        spoilt = zeros.clone()
        spoilt[1, 2] = value
        bias = torch.tensor([1.0, value, 1.0], dtype=dtype)
        assert not count(runner, zeros, zeros, None)[1]
        assert count(runner, spoilt, zeros, None)[1], "0 times infinity"
        assert count(runner, zeros, spoilt, None)[1], "0 times infinity"
        assert count(runner, zeros, zeros, bias)[1]


def test_a_sum_that_overflows_on_the_way_is_finite():
    for dtype in (torch.float32, torch.float64):
        large = torch.finfo(dtype).max
        x = torch.tensor([[large, large, -large, -large, -1.0]], dtype=dtype)
        agree(x, torch.ones(2, 5, dtype=dtype), torch.tensor([0.0, 1.5], dtype=dtype))


def test_a_product_that_overflows_is_reported_where_norms_do_not():
    for dtype, large in ((torch.float32, 2.0**100), (torch.float64, 2.0**1000)):
        agree(torch.full((1, 3), large, dtype=dtype), torch.full((2, 3), 2.0**40, dtype=dtype), None)


@pytest.mark.parametrize("find", [signs.exact_signs, signs.signs_by_integers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_a_sum_rounds_to_infinity(find, dtype):
    """From half a unit above the largest number."""
    largest, half = torch.finfo(dtype).max, 2.0 ** (103 if dtype == torch.float32 else 970)
    below = torch.nextafter(torch.tensor(half, dtype=dtype), torch.tensor(0.0, dtype=dtype)).item()
    for last, sign in ((half, signs.NOT_FINITE), (below, 1), (0.0, 1), (-largest, 0)):
        for way in (1, -1):
            x = torch.tensor([[way * largest, last]], dtype=dtype)
            found = find(
                x, torch.tensor([[1.0, way]], dtype=dtype), x.new_zeros(1), torch.zeros(1).long(), torch.zeros(1).long()
            )
            assert found.tolist() == [sign if sign == signs.NOT_FINITE else way * sign], (last, way)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.skipif(not torch.set_flush_denormal(True), reason="this processor does not flush subnormal numbers")
def test_signs_do_not_depend_on_flushed_subnormal_numbers(runner):
    cases = [
        ([2.0**-130, -(2.0**-31)], [2.0**100, 1.0], 0.0, 1),  # the subnormal number decides
        ([2.0**-149, 0.0], [1.0, 0.0], 0.0, 1),
        ([0.0, 0.0], [1.0, 1.0], 2.0**-149, 1),
        ([2.0**-140, 0.0], [2.0**-9, 3.0], -(2.0**-149), 0),
        ([2.0**-70, 0.0], [-(2.0**-60), 0.0], 2.0**-127, 1),  # of the bias, beside a small product
    ]
    tensors = [(torch.tensor([x]), torch.tensor([w]), torch.tensor([b]), count) for x, w, b, count in cases]
    torch.set_flush_denormal(True)
    try:
        results = [count(runner, x, weight, bias)[0].item() for x, weight, bias, _ in tensors]
    finally:
        torch.set_flush_denormal(False)
    assert results == [count for *_, count in cases]


torch.set_flush_denormal(False)  # what the condition of the test above has switched on


def test_counts_do_not_depend_on_the_backend(generator):
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((600, 300), (40, 300), (40,)))
    first, _ = count("eager", x.double(), weight.double(), bias.double())
    assert all(torch.equal(count(runner, x, weight, bias)[0], first) for runner in RUNNERS)


def test_bad_indices_are_refused():
    if not ISAS:
        pytest.skip(library.unavailable_reason() or "")
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="out of range"):
        torch.ops.mmc_fast.exact_signs(x, x, x[:, 0], torch.tensor([2]), torch.tensor([0]))
