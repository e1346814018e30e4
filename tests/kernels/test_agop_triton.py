"""The AGOP kernels with their shipped tiles in the sanitizing interpreter, against float64."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import triton_guard
from torch import nn

import mmc_fast
from mmc_fast.agop import reference as definition
from mmc_fast.ops import native
from mmc_fast.ops.agop import op as agop
from mmc_fast.ops.agop.reference import activation_derivative
from mmc_fast.testing import assert_as_accurate

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from mmc_fast.kernels.agop import coactivation as kernels  # noqa: E402
from mmc_fast.kernels.agop import finish  # noqa: E402
from mmc_fast.kernels.agop import gram as gram_kernels  # noqa: E402
from mmc_fast.kernels.agop.signs import certificate  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from gpu_audit import OperatorCount  # noqa: E402

SIZES = (1, 15, 16, 17, 63, 65, 127, 129)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(options, generator):
    return options[int(torch.randint(len(options), (), generator=generator))]


def strided(values, generator):
    """The same values in a wider buffer: odd strides, NaN (or 127) around them."""
    filler = float("nan") if values.is_floating_point() else 127
    rows, columns = values.shape
    if torch.rand((), generator=generator) < 0.5:
        wide = torch.full((rows, 2 * columns + 3), filler, dtype=values.dtype)
        view = wide[:, 2 : 2 + 2 * columns : 2]
    else:
        wide = torch.full((columns + 1, rows + 5), filler, dtype=values.dtype)
        view = wide[1:, 3 : 3 + rows].t()
    view.copy_(values)
    return view


def layer(generator, dtype, samples, inputs, units):
    """An input and a layer whose pre-activations are exact multiples of 1/4 away from the kink: ±1/4, ±3/4, …"""
    x = torch.randint(-2, 3, (samples, inputs), generator=generator)
    weight = torch.randint(-1, 2, (units, inputs), generator=generator)
    bias = torch.randint(-2, 2, (units,), generator=generator)
    return x.to(dtype), (weight / 2).to(dtype), (bias / 2 + 0.25).to(dtype)


@pytest.mark.parametrize("case", range(8))
def test_counts_equal_those_of_the_reference(case, seed):
    generator = torch.Generator().manual_seed(seed + case)
    dtype = DTYPES[case % 3]
    samples, inputs, units = SIZES[case], draw(SIZES, generator), draw(SIZES, generator)
    x, weight, bias = layer(generator, dtype, samples, inputs, units)
    weight[0], bias[0] = 0, 0  # a pre-activation of zero is not active
    z = x.double() @ weight.double().t() + bias.double()
    active = (z > 0).long()
    before = torch.randint(-5, 5, (units, units), generator=generator)
    counts, flag = before.clone(), torch.zeros(1, dtype=torch.int64)
    with triton_guard.watch(seed) as watch:
        used = agop.relu_coactivation_update(
            strided(x, generator), strided(weight, generator), bias, counts, flag, backend="triton"
        )
    assert used == "triton"
    assert torch.equal(counts.triu(), (before + active.t() @ active).triu()), (samples, inputs, units)
    assert torch.equal(counts.tril(-1), before.tril(-1)), "below the diagonal nothing may change"
    assert flag.item() == 0
    names = ["_hidden_fwd_kernel", "_decide_kernel", "_coactivation_fwd_kernel"]
    assert [launch.name for launch in watch.launches] == names
    assert watch.launches[-1].dot_flops.keys() == {"int8"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [5, 70])
def test_signs_that_a_product_leaves_open_are_exact(dtype, d, generator):
    """Pre-activations that are zero, or that a float32 or a float64 sum takes for one; numbers of any size."""
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((6, d), (2, d)))
    x, weight = torch.cat([x, x], 1), torch.cat([weight, -weight], 1)  # every product with both signs
    smallest = torch.finfo(dtype).smallest_normal / 4
    bias = torch.tensor([smallest, 0.0]).to(dtype)
    x[1], x[2] = 0, torch.cat([x[2, :d] * 64, x[2, d:] / 64])
    x[3, 0] += 2 * torch.finfo(dtype).eps
    if dtype != torch.float16:  # products beyond float32's range, and below it
        x[4], weight[1, 0], weight[1, d] = x[4] * 2.0**100, 2.0**110, -(2.0**110)
        x[5] *= 2.0**-120
    counts, flag = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with triton_guard.watch() as watch:
        agop.relu_coactivation_update(x, weight, bias, counts, flag, backend="triton")
    expected, expected_flag = torch.zeros_like(counts), torch.zeros_like(flag)
    agop.relu_coactivation_update(x, weight, bias, expected, expected_flag, backend="eager")
    assert torch.equal(counts, expected)
    assert flag.item() == expected_flag.item() == 0
    unsure = next(launch for launch in watch.launches if launch.name == "_decide_kernel")
    assert unsure.programs == 2
    assert counts[0, 0] >= 3, "the bias decides"


def test_a_pre_activation_that_rounds_to_infinity_raises_the_flag():
    large = torch.finfo(torch.float32).max
    limit = torch.tensor([[large, 2.0**103, 0.0]])
    weight = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]])
    for last, expected in ((0.0, 1), (-1.0, 0)):  # at the limit, and below it for both units
        limit[0, 2] = last
        signs = weight * torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0]])
        counts, flag = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        with triton_guard.watch():
            agop.relu_coactivation_update(limit, signs, None, counts, flag, backend="triton")
        assert (flag.item() > 0) == bool(expected)


def lossy(d, places, lost):
    """Products 1, many below half a unit in its last place at ``places``, and −1 less ``lost`` of what they sum to: where
    each is added to 1 alone a float32 sum is negative, though the exact one is positive."""
    x, weight = torch.zeros(1, d), torch.zeros(1, d)
    x[0, places], weight[0, places] = 2.0**-12, 2.0**-12 * (1 - 2.0**-10)
    x[0, 0] = weight[0, 0] = 1
    count = int(x.count_nonzero()) - 1
    x[0, -1], weight[0, -1] = -1, 1 + round(lost * count / 2) * 2.0**-23
    return x, weight


@pytest.mark.parametrize(("depth", "block"), [(100, 16), (1000, 16), (70, 70)])
def test_the_bound_covers_truncated_blocks_and_lost_halves(depth, block):
    """Units that truncate 22 bits below the largest term of a block, and numbers whose bfloat16 halves leave out the most."""
    gamma, loss, least, growth, least_norm = certificate(depth, block)
    blocks = -(-depth // block)
    assert gamma >= (block + 1) * 2.0**-22 + (blocks + 1) * 2.0**-24 + 3 * 2.0**-18
    x = torch.full((depth,), 1 + 2.0**-9 + 2.0**-18 - 2.0**-23)  # half a unit above 1, and again in the rest
    high = x.bfloat16().float()
    low = (x - high).bfloat16().float()
    left_out = (x.double() ** 2 - (high * high + 2 * high * low).double()).abs().sum()
    assert 2.0**-18 * depth < left_out <= 3 * 2.0**-18 * depth
    small = torch.full((depth,), 2.0**-62, dtype=torch.float64)  # squares that float32 flushes
    assert torch.zeros(()).sqrt().double() * growth + least_norm >= small.norm()
    ones = torch.ones(depth).cumsum(0)[-1].sqrt().double() * (1 - (depth + 8) * 2.0**-24)
    assert ones * growth >= depth**0.5
    assert loss > 0 < least


def test_a_float32_sum_that_is_wrong_is_not_trusted():
    x, weight = lossy(64 * 20, slice(0, None, 64), 0.5)  # one to a block of the sum
    for sign in (1, -1):
        counts, flag = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        with triton_guard.watch():
            agop.relu_coactivation_update(sign * x, weight, None, counts, flag, backend="triton")
        assert counts.item() == int(sign > 0)


def test_a_bias_decides_by_its_size():
    x, weight = torch.tensor([[1.0, 2.0**-60, 1.0]]), torch.tensor([[1.0, 1.0, -1.0]]).expand(2, 3)
    counts, flag = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with triton_guard.watch():
        bias = torch.tensor([-(2.0**-59), -(2.0**-61)])
        agop.relu_coactivation_update(x, weight, bias, counts, flag, backend="triton")
    assert counts.tolist() == [[0, 0], [0, 1]]


def test_exact_sums_carry_from_digit_to_digit():
    x = torch.cat([torch.full((64,), 2.0**12 * (1 + 2.0**-23)), torch.tensor([-(2.0**18), -(2.0**-5)])])[None]
    counts, flag = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with triton_guard.watch():
        bias = torch.tensor([2.0**-100, -(2.0**-100)])
        agop.relu_coactivation_update(x, torch.ones(2, 66), bias, counts, flag, backend="triton")
    assert counts.tolist() == [[1, 0], [0, 0]]


def test_counts_do_not_depend_on_chunks_or_splits(generator, monkeypatch):
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((400, 20), (80, 20), (80,)))
    results = []
    for chunk, programs, most in ((0, 264, 1 << 20), (100, 1, 1 << 20), (313, 20, 1 << 20), (0, 264, 130)):
        monkeypatch.setattr("mmc_fast.kernels.common.PROGRAMS", programs)
        monkeypatch.setattr(kernels, "MAX_ROWS", most)
        results.append(torch.zeros(80, 80, dtype=torch.int64))
        flag = torch.zeros(1, dtype=torch.int64)
        with triton_guard.watch() as watch:
            agop.relu_coactivation_update(x, weight, bias, results[-1], flag, chunk, backend="triton")
    assert all(torch.equal(results[0], counts) for counts in results[1:])
    assert len(watch.launches) == 2 + 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_raises_the_flag(bad, generator):
    x, weight = torch.randn(130, 17, generator=generator), torch.randn(65, 17, generator=generator)
    x[129, 16] = bad
    counts, flag = torch.zeros(65, 65, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with triton_guard.watch():
        agop.relu_coactivation_update(x, weight, None, counts, flag, backend="triton")
    assert flag.item() > 0
    gram = torch.zeros(65, 65, dtype=torch.float64)
    with triton_guard.watch():
        agop.derivative_gram_update(x, weight, None, "gelu", gram, gram[0].clone(), flag.zero_(), backend="triton")
    assert flag.item() > 0


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("activation", sorted(agop.ACTIVATIONS))
def test_derivative_gram_is_as_accurate_as_plain_torch(activation, deterministic, seed, monkeypatch):
    monkeypatch.setattr(gram_kernels, "CHAIN_ROWS", 64)  # several splits
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(DTYPES, generator)
    samples, inputs, units = (draw(SIZES, generator) for _ in range(3))
    x, weight, bias = layer(generator, dtype, samples + 130, inputs, units)
    z = x.double() @ weight.double().t() + bias.double()
    a = activation_derivative(z, activation, 0.3, 2.0)
    before = torch.randn(units, units, generator=generator, dtype=torch.float64)
    gram, total, flag = before.clone(), torch.zeros(units, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    arguments = (strided(x, generator), strided(weight, generator), bias, activation, gram, total, flag, 0.3, 2.0)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with triton_guard.watch(seed) as watch:
            assert agop.derivative_gram_update(*arguments, backend="triton") == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    plain = activation_derivative(z.float(), activation, 0.3, 2.0)
    assert_as_accurate((gram - before).triu(), (plain.t() @ plain).triu(), (a.t() @ a).triu(), what=activation)
    assert_as_accurate(total, plain.sum(0), a.sum(0), what="total")
    assert torch.equal(gram.tril(-1), before.tril(-1))
    gram_launch = watch.launches[1]
    assert (gram_launch.atomics == 0) == deterministic


def test_deterministic_sums_do_not_depend_on_the_order_of_programs(generator):
    rows = torch.randn(2000, 70, generator=generator)
    results = torch.zeros(2, 70, 70, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        for order, gram in enumerate(results):
            with triton_guard.watch(order) as watch:
                agop.syrk_update(rows, gram, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert watch.launches[0].programs > 3, "the rows must be split for this test to say something"
    assert torch.equal(*results)
    assert_as_accurate(results[0], (rows.t() @ rows).triu(), (rows.double().t() @ rows.double()).triu())


@pytest.mark.parametrize("case", range(8))
def test_chain_of_rows_against_float64(case, seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed + case)
    dtype = DTYPES[case % 3]
    wide = case >= 4
    if case % 2:  # several splits, or chunks, of a batch that the interpreter can afford
        monkeypatch.setattr(gram_kernels, "CHAIN_ROWS", 64)
        monkeypatch.setattr(gram_kernels, "CHUNK_BYTES", 20_000)
    samples, per_sample, depth = draw(SIZES[:6], generator), draw((1, 2, 3, 10), generator), draw(SIZES, generator)
    if case % 2:
        samples, per_sample = 65, max(per_sample, 3)
    units = draw((129, 150), generator) if wide else draw(SIZES[:-1], generator)
    own = bool(torch.rand((), generator=generator) < 0.5)

    def numbers(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    left = numbers(samples, per_sample, depth) if own else numbers(per_sample, depth)
    inner, v = numbers(samples, depth), numbers(depth, units)
    outer = numbers(samples, units) if torch.rand((), generator=generator) < 0.7 else None
    gram = torch.zeros(units, units, dtype=torch.float64)
    torch.use_deterministic_algorithms(case % 4 in (1, 2))
    try:
        with triton_guard.watch(seed) as watch:
            views = (left, strided(inner, generator), strided(v, generator))
            agop.chain_gram_update(*views, outer, gram, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    names = [launch.name for launch in watch.launches]
    assert names[0] == ("_rows_fwd_kernel" if wide else "_chain_fwd_kernel")
    if case % 2:
        assert names.count("_rows_fwd_kernel") > 1 if wide else watch.launches[0].programs > 1

    def rows(dtype):
        b = (left.to(dtype) * inner.to(dtype)[:, None, :]) @ v.to(dtype)
        return (b if outer is None else b * outer.to(dtype)[:, None, :]).flatten(0, 1)

    plain = rows(dtype)
    truth = rows(torch.float64)
    assert_as_accurate(
        gram, (plain.t() @ plain).triu(), (truth.t() @ truth).triu(), what=f"{samples} {per_sample} {depth} {units}"
    )
    assert gram.tril(-1).eq(0).all()


def head(*sizes, activation=nn.ReLU, generator):
    modules = []
    for index, (a, b) in enumerate(pairwise(sizes)):
        linear = nn.Linear(a, b)
        for parameter in linear.parameters():
            parameter.data.normal_(generator=generator).mul_(a**-0.5)
        modules += [linear] if index + 2 == len(sizes) else [linear, activation()]
    return nn.Sequential(*modules)


@pytest.mark.parametrize(
    ("sizes", "activation", "options"),
    [
        ((20, 70, 5), nn.ReLU, {"center": True}),
        ((20, 33, 5), nn.Tanh, {"center": True}),
        ((20, 40, 33, 5), nn.ReLU, {}),
        ((20, 140, 33, 5), nn.ReLU, {}),
        ((20, 40, 33, 5), nn.GELU, {"center": True}),
        ((20, 40, 33, 17, 5), nn.SiLU, {}),
        ((20, 40, 5), nn.ReLU, {"output": "probs"}),
    ],
)
def test_agop_by_triton_equals_the_definition(sizes, activation, options, generator):
    model = head(*sizes, activation=activation, generator=generator)
    x = torch.randn(130, sizes[0], generator=generator)
    with triton_guard.watch() as watch:
        got = mmc_fast.agop(model, x, backend="triton", **options)
    assert watch.launches
    truth = definition.agop(model.double(), x.double(), **options)
    plain = definition.agop(model.float(), x, **options)
    assert_as_accurate(got, plain, truth, amplification=10 if options.get("center") else 1)


@pytest.mark.parametrize("case", range(8))
def test_the_finished_matrix_is_as_accurate_as_plain_torch(case, seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed + case)
    units, width, outputs = (draw(SIZES, generator) for _ in range(3))
    monkeypatch.setattr(finish, "PROGRAMS", draw((1, 264), generator))  # both tiles
    monkeypatch.setattr(finish, "OUTER_ROWS", draw((8, 200), generator))  # multiplied before, or for each tile
    weight, outer = (torch.randn(rows, n, generator=generator) for rows, n in ((units, width), (outputs, units)))
    rows = torch.randn(40, units, generator=generator)
    counts = ((rows > 0).long().t() @ (rows > 0).long()) if case % 2 else (rows.double().t() @ rows.double())
    inner = counts.triu() + torch.full_like(counts, 7).tril(-1)  # below the diagonal nothing is read
    flag = torch.zeros(1, dtype=torch.int64)
    arguments = (strided(weight, generator), strided(outer, generator) if case % 3 else None, inner)
    with triton_guard.watch(seed) as watch:
        got = agop.agop_finalise(*arguments, scale=0.25, nonfinite=flag, backend="triton")
        bad = agop.agop_finalise(*arguments, nonfinite=flag + 3, backend="triton")
    assert [launch.name for launch in watch.launches] == 2 * ["_half_product_kernel", "_symmetric_product_kernel"]
    assert torch.equal(got, got.t())
    assert bad.isnan().all()

    def plain(dtype):
        s = counts.to(dtype) if case % 3 == 0 else counts.to(dtype) * (outer.to(dtype).t() @ outer.to(dtype))
        return 0.25 * (weight.to(dtype).t() @ s @ weight.to(dtype))

    assert_as_accurate(got, plain(torch.float32), plain(torch.float64), what=f"{units} {width} {outputs}")


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_whole_agop_takes_six_launches_and_reads_nothing_on_the_host(chunks, generator):
    """The exact counts of the CPU, and no number that the host waits for before the result is asked for."""
    model, x = head(20, 130, 5, generator=generator), torch.randn(150, 20, generator=generator)
    size = {"chunk_size": 128} if chunks == 2 else {}
    with triton_guard.watch() as watch, OperatorCount() as count:
        accumulator = mmc_fast.AGOPAccumulator(model, backend="triton", **size).update(x)
        got = accumulator.compute().matrix
    assert [work.name for work in count.operators] == ["zeros"]
    assert len(watch.launches) == 2 + 3 * chunks
    theirs = mmc_fast.AGOPAccumulator(model, backend="cpp" if native.unavailable_reason() is None else "eager").update(
        x
    )
    assert torch.equal(accumulator.method.state.counts, theirs.method.state.counts)
    assert_as_accurate(got, theirs.compute().matrix, definition.agop(model.double(), x.double()))
    x[3, 2] = float("nan")
    with triton_guard.watch():
        assert mmc_fast.agop(model.float(), x, backend="triton").isnan().all()


@triton.jit
def _tiles_kernel(t_ptr, i_ptr, j_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, j = kernels.upper_tile(tl.load(t_ptr + at))
    tl.store(i_ptr + at, i)
    tl.store(j_ptr + at, j)


def test_tiles_of_the_triangle_are_numbered_without_a_gap():
    """First and last tile of columns up to 30,000: there the square root in float32 is off by more than one."""
    columns = torch.cat([torch.arange(1, 1025), torch.arange(1, 30_000, 29)[:1024]])
    first = columns * (columns + 1) // 2
    t = torch.cat([first, first + columns]).to(torch.int32)
    i, j = torch.empty_like(t), torch.empty_like(t)
    with triton_guard.watch():
        _tiles_kernel[(1,)](t, i, j, BLOCK=t.numel())
    assert torch.equal(j.long(), torch.cat([columns, columns]))
    assert torch.equal(i.long(), torch.cat([torch.zeros_like(columns), columns]))


def test_nothing_to_add_launches_nothing():
    counts, flag = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    x, v, gram = torch.ones(0, 3), torch.ones(3, 4), counts.double()
    with triton_guard.watch() as watch:
        agop.relu_coactivation_update(x, v.t(), None, counts, flag, backend="triton")
        agop.syrk_update(torch.ones(0, 4), gram, backend="triton")
        agop.chain_gram_update(torch.ones(2, 3), x, v, None, gram, backend="triton")
    assert watch.launches == []
    assert counts.sum() == gram.sum() == 0


def test_strides_that_pass_32_bits(generator):
    stride = 2**30 + 64
    huge = torch.empty(3 * stride + 130, dtype=torch.int8)  # virtual: only the rows are touched
    active = huge.as_strided((4, 130), (stride, 1))
    active.copy_(torch.rand(4, 130, generator=generator) < 0.5)
    counts = torch.zeros(4, 4, dtype=torch.int64)
    with triton_guard.watch(in_place=[active]):
        kernels.coactivation_fwd(active, counts)
    values = active.long()
    assert torch.equal(counts, (values @ values.t()).triu())
    wide = torch.empty(2 * stride + 20, dtype=torch.bfloat16).as_strided((3, 20), (stride, 1))
    x, weight, bias = layer(generator, torch.bfloat16, 3, 20, 17)
    wide.copy_(x)
    flag = torch.zeros(1, dtype=torch.int64)
    with triton_guard.watch(in_place=[wide]):
        signs = kernels.hidden_fwd(wide, weight, bias, flag, None)
    assert torch.equal(signs.bool(), (x.double() @ weight.double().t() + bias.double() > 0).t())
