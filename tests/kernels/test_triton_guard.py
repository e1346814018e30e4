"""The sanitizing interpreter: correct kernels pass and are counted, every planted mistake is caught, numbers are a GPU's."""

from __future__ import annotations

import pytest
import torch
import triton_guard
from triton_guard import GuardFault

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at + SHIFT, tl.load(x + at, mask=at < n, other=0.0), mask=at < n + LIMIT)


@triton.jit
def _columns(x, y, stride_x, stride_y, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(y + row * stride_y + column, tl.load(x + row * stride_x + column, mask=column < COLUMNS, other=0.0))


@triton.jit
def _sum(x, total, n, BLOCK: tl.constexpr, MODE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.sum(tl.load(x + at, mask=at < n, other=0.0))
    if MODE == "atomic":
        tl.atomic_add(total, value)
    else:
        tl.store(total, tl.load(total) + value)


@triton.jit
def _twice(x, out, FIRST: tl.constexpr, SECOND: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, 16)
    value = tl.zeros((16,), tl.float32)
    if FIRST == "load" or FIRST == "both":
        value += tl.load(x + at)
    if FIRST == "both":
        value += tl.load(x + 15 - at)
    if FIRST == "store":
        tl.store(x + at, value)
    if FIRST == "add":
        tl.atomic_add(x + at, value, sem="relaxed")
    if BARRIER:
        tl.debug_barrier()
    if SECOND == "load":
        value += tl.load(x + at)
    if SECOND == "store":
        tl.store(x + at, value)
    if SECOND == "reversed store":
        tl.store(x + 15 - at, value)
    if SECOND == "add":
        tl.atomic_add(x + at, value, sem="relaxed")
    tl.store(out + at, value)


@triton.jit
def _last_one_sums(x, parts, counter, y, WRONG: tl.constexpr):
    """Four programs leave the sum of 16 elements each in ``parts``; the last to arrive adds them and clears what it used."""
    program, lanes = tl.program_id(0), tl.arange(0, 16)
    value = tl.sum(tl.load(x + program * 16 + lanes)) + tl.load(x + 64)
    if WRONG == "barrier moved up":
        tl.debug_barrier()
    if WRONG == "parts added, no barrier" or WRONG == "parts added, cached":
        tl.atomic_add(parts + program, value, sem="relaxed")
    elif WRONG != "stored after arrival":
        tl.store(parts + program, value)
    if WRONG != "no barrier before" and WRONG != "barrier moved up" and WRONG != "parts added, no barrier":
        tl.debug_barrier()
    if WRONG == "loaded after the barrier":
        value += tl.sum(tl.load(x + program * 16 + lanes))
    if WRONG == "shared, loaded after the barrier":
        value += tl.load(x + 64)
    if WRONG == "relaxed" or WRONG == "acquire" or WRONG == "release":
        before = tl.atomic_add(counter, 1, sem=WRONG)
    elif WRONG == "scope":
        before = tl.atomic_add(counter, 1, scope="cta")
    elif WRONG == "arrival masked":
        before = tl.atomic_add(counter, 1, mask=program > 3)
    else:
        before = tl.atomic_add(counter, 1)
    if WRONG == "stored after arrival":
        tl.store(parts + program, value)
    last = before == 3
    if WRONG == "order of the grid" or WRONG == "arrival masked":
        last = program == 3
    if WRONG == "one too early":
        last = before == 2
    if last:
        if WRONG != "no barrier after":
            tl.debug_barrier()
        at = parts + tl.arange(0, 4)
        if WRONG == "cached" or WRONG == "parts added, cached":
            tl.store(y, tl.sum(tl.load(at, cache_modifier=".ca")))
        elif WRONG == "cached by default":
            tl.store(y, tl.sum(tl.load(at)))
        else:
            tl.store(y, tl.sum(tl.load(at, cache_modifier=".cg")))
        tl.store(x + tl.arange(0, 64), 0.0)
        tl.store(x + 64, 0.0)
        if WRONG != "counter not reset":
            tl.store(counter, 0)


@triton.jit
def _one_at_a_time(x, total, lock, WRONG: tl.constexpr):
    value = tl.load(x + tl.program_id(0))
    if WRONG == "scope":
        while tl.atomic_cas(lock, 0, 1, scope="cta") == 1:
            pass
    elif WRONG == "relaxed":
        while tl.atomic_cas(lock, 0, 1, sem="relaxed") == 1:
            pass
    else:
        while tl.atomic_cas(lock, 0, 1) == 1:
            pass
    tl.debug_barrier()
    tl.store(total, value + tl.load(total, cache_modifier=".cg"))
    if WRONG != "no barrier":
        tl.debug_barrier()
    if WRONG == "relaxed":
        tl.atomic_xchg(lock, 0, sem="relaxed")
    else:
        tl.atomic_xchg(lock, 0)


@triton.jit
def _masked(x, y, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=OTHER)
    tl.store(y, tl.sum(value.to(tl.float32)))


@triton.jit
def _some(x, y, n, WHERE: tl.constexpr):
    at = tl.arange(0, 16)
    mask = tl.where(n > 2, at < 4, at < 0) if WHERE else (at < 4) & (n > 2)
    tl.store(y + at, tl.load(x + at, mask=mask, other=0.0))


@triton.jit
def _aligned(x, y, SHIFT: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(y + at, tl.load(tl.multiple_of(x + SHIFT, 16) + at))


@triton.jit
def _product(a, b, c, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * M + m[None, :])
    if PRECISION is None:
        out = tl.dot(left, right, out_dtype=tl.int32)
    else:
        out = tl.dot(left, right, input_precision=PRECISION)
    tl.store(c + m[:, None] * M + m[None, :], out.to(c.dtype.element_ty))


@triton.jit
def _arithmetic(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a * b + a)
    tl.store(out + BLOCK + at, tl.maximum(a, b))
    tl.store(out + 2 * BLOCK + at, tl.where(a > b, a, b))
    tl.store(out + 3 * BLOCK + at, (a.to(tl.float32) / 3).to(a.dtype))


def test_a_correct_kernel_runs_and_is_counted(generator):
    x, y = torch.randn(100, generator=generator), torch.full((130,), float("nan"))
    with triton_guard.watch(seed=3) as watch:
        _copy[(4,)](x, y[:100], 100, BLOCK=32, SHIFT=0, LIMIT=0)
        _copy[(4,)](x, y[:100], 100, BLOCK=32, SHIFT=0, LIMIT=0)
    assert torch.equal(y[:100], x)
    assert y[100:].isnan().all()
    assert [launch.name for launch in watch.launches] == ["_copy"] * 2
    launch = watch.launches[0]
    assert (launch.programs, launch.read_bytes, launch.written_bytes, launch.atomics) == (4, 400, 400, 0)
    assert (launch.loaded_bytes, launch.stored_bytes) == (400, 400)
    assert launch.arguments == {"x": (400, 0), "y": (0, 400)}
    assert watch.global_bytes == 1600


@pytest.mark.parametrize(("shift", "limit"), [(0, 1), (1, 0), (-1, 0), (-40, 0)])
def test_out_of_bounds_is_caught_on_either_side(shift, limit):
    x, y = torch.ones(100), torch.zeros(100)
    with triton_guard.watch(), pytest.raises(GuardFault, match=r"out of bounds.*'y'"):
        _copy[(4,)](x, y, 100, BLOCK=32, SHIFT=shift, LIMIT=limit)
    assert y.eq(0).all(), "nothing of a failed launch is written back"


def test_a_view_protects_what_lies_between_its_rows():
    wide, y = torch.ones(4, 20), torch.zeros(4, 16)
    with triton_guard.watch():
        _columns[(4,)](wide[:, :13], y, 20, 16, COLUMNS=13, BLOCK=16)
    assert y.sum() == 52
    with triton_guard.watch(), pytest.raises(GuardFault, match=r"out of bounds.*load"):
        _columns[(4,)](wide[:, :13], y, 20, 16, COLUMNS=14, BLOCK=16)


def test_programs_that_store_to_one_element_are_caught(generator):
    x, total = torch.randn(100, generator=generator), torch.zeros(1)
    with triton_guard.watch() as watch:
        _sum[(4,)](x, total, 100, BLOCK=32, MODE="atomic")
    torch.testing.assert_close(total[0], x.sum())
    assert watch.launches[0].atomics == 4
    with triton_guard.watch(), pytest.raises(GuardFault, match="race"):
        _sum[(4,)](x, total, 100, BLOCK=32, MODE="plain")
    with triton_guard.watch(), pytest.raises(GuardFault, match=r"race: store .* store by another"):
        _columns[(4,)](x.expand(4, 100), torch.zeros(16).expand(4, 16), 0, 0, COLUMNS=16, BLOCK=16)


@triton.jit
def _meet(y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at // 2, at)


def test_lanes_of_one_store_that_meet_are_caught():
    with triton_guard.watch(), pytest.raises(GuardFault, match="two lanes"):
        _meet[(1,)](torch.zeros(16, dtype=torch.int32), BLOCK=16)


IN_ORDER = [("load", "load"), ("load", "store"), ("store", "store"), ("add", "add")]
OUT_OF_ORDER = [
    ("load", "reversed store"), ("both", "store"), ("both", "reversed store"), ("load", "add"), ("store", "load"), ("store", "reversed store"),
    ("store", "add"), ("add", "load"), ("add", "store"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), IN_ORDER + OUT_OF_ORDER)
def test_what_threads_of_a_program_do_to_one_element_needs_a_barrier(first, second):
    for barrier in (True, False):
        x, out = torch.arange(16.0), torch.zeros(16)
        with triton_guard.watch():
            if barrier or (first, second) in IN_ORDER:
                _twice[(1,)](x, out, FIRST=first, SECOND=second, BARRIER=barrier)
                assert out.sum() == sum({"load": 120, "both": 240}.get(what, 0) for what in (first, second)) * (
                    first != "store"
                )
            else:
                with pytest.raises(GuardFault, match="without a barrier"):
                    _twice[(1,)](x, out, FIRST=first, SECOND=second, BARRIER=barrier)


RACES = (
    "no barrier before", "barrier moved up", "stored after arrival", "parts added, no barrier", "loaded after the barrier",
    "shared, loaded after the barrier", "relaxed", "acquire", "release", "arrival masked", "order of the grid", "one too early", "no barrier after",
)  # fmt: skip
MUTANTS = {
    **dict.fromkeys(RACES, "race"),
    "scope": "scope 'cta'",
    **dict.fromkeys(("cached", "cached by default", "parts added, cached"), "first-level cache"),
}


@pytest.mark.parametrize("wrong", MUTANTS)
def test_mistakes_of_a_last_program_are_caught(seed, wrong):
    caught = []
    for order in range(seed, seed + 12):
        x, y, parts, counter = torch.arange(65.0), torch.zeros(1), torch.zeros(4), torch.zeros(1, dtype=torch.int32)
        with triton_guard.watch(order):
            try:
                _last_one_sums[(4,)](x, parts, counter, y, WRONG=wrong)
            except GuardFault as fault:
                caught.append(str(fault))
    assert caught
    assert len(caught) == 12 or wrong == "order of the grid"  # which may happen to be that of arrival
    assert all(MUTANTS[wrong] in fault for fault in caught)


@pytest.mark.parametrize("wrong", ["nothing", "counter not reset"])
def test_the_last_program_may_read_what_a_counter_released(seed, wrong):
    x, y, parts, counter = torch.arange(65.0), torch.zeros(1), torch.zeros(4), torch.zeros(1, dtype=torch.int32)
    with triton_guard.watch(seed) as watch:
        _last_one_sums[(4,)](x, parts, counter, y, WRONG=wrong)
        assert (y.item(), x.abs().sum(), watch.launches[0].working) == (63 * 32 + 4 * 64, 0, 4)
        if wrong == "nothing":
            _last_one_sums[(4,)](x, parts, counter, y, WRONG=wrong)
            assert y == 0
        else:
            with pytest.raises(GuardFault, match="counter starts the launch at 4"):
                _last_one_sums[(4,)](x, parts, counter, y, WRONG=wrong)


@pytest.mark.parametrize(
    ("wrong", "message"), [("nothing", ""), ("scope", "scope 'cta'"), ("relaxed", "race"), ("no barrier", "race")]
)
def test_a_lock_orders_what_it_protects(seed, wrong, message):
    x, total, lock = torch.arange(5.0), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    with triton_guard.watch(seed):
        if wrong == "nothing":
            _one_at_a_time[(5,)](x, total, lock, WRONG=wrong)
            assert (total, lock) == (10, 0)
        else:
            with pytest.raises(GuardFault, match=message):
                _one_at_a_time[(5,)](x, total, lock, WRONG=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_lanes_hold_garbage_unless_told_otherwise(dtype):
    x, y = torch.ones(20, dtype=dtype), torch.zeros(1)
    with triton_guard.watch():
        _masked[(1,)](x, y, 20, OTHER=0.0, BLOCK=32)
        assert y.item() == 20
        _masked[(1,)](x, y, 20, OTHER=None, BLOCK=32)
    assert y.isnan().all()


def test_masks_are_booleans_in_every_version_of_the_interpreter():
    x, y = torch.ones(16), torch.zeros(16)
    with triton_guard.watch():
        _some[(1,)](x, y, 3, WHERE=True)
        assert y.sum() == 4
        with pytest.raises(GuardFault, match="load under a mask of integers"):
            _some[(1,)](x, y, 3, WHERE=False)


def test_claims_of_alignment_are_checked():
    x, y = torch.arange(24.0), torch.zeros(16)
    with triton_guard.watch():
        _aligned[(1,)](x, y, SHIFT=4)
        assert torch.equal(y, x[4:20])
        with pytest.raises(GuardFault, match="multiple_of"):
            _aligned[(1,)](x, y, SHIFT=2)


def test_order_of_programs_is_shuffled():
    @triton.jit
    def order(y, counter):
        tl.store(y + tl.atomic_add(counter, 1), tl.program_id(0) * 6 + tl.program_id(1) * 2 + tl.program_id(2))

    orders = torch.full((4, 24), -1, dtype=torch.int32)
    for seed, y in enumerate(orders):
        with triton_guard.watch(seed):
            order[(4, 3, 2)](y, torch.zeros(1, dtype=torch.int32))
        assert sorted(y.tolist()) == list(range(24))
    assert len(orders.unique(dim=0)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arithmetic_is_rounded_as_by_torch(dtype, generator):
    x, y = (torch.randn(64, generator=generator).mul(10).to(dtype) for _ in range(2))
    out = torch.zeros(4, 64, dtype=dtype)
    with triton_guard.watch():
        _arithmetic[(1,)](x, y, out, BLOCK=64)
    larger = torch.maximum(x, y)
    expected = [x * y + x, larger, larger, (x.float() / 3).to(dtype)]
    for got, wanted in zip(out, expected, strict=True):
        assert torch.equal(got, wanted)
    with triton_guard.watch():
        _arithmetic[(1,)](torch.full_like(x, float("nan")), torch.zeros_like(y), out, BLOCK=64)
    assert out[1].eq(0).all(), "maximum swallows NaN, as the instruction does"
    assert out[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_each_precision(dtype, generator):
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    truth = a.double() @ b.double()
    errors = {}
    for precision in ("ieee", "tf32", "tf32x3"):
        c = torch.full((32, 32), float("nan"))
        with triton_guard.watch() as watch:
            _product[(1,)](a, b, c, M=32, K=32, PRECISION=precision)
        assert watch.dot_flops == 2 * 32**3
        errors[precision] = float((c.double() - truth).norm() / truth.norm())
    assert errors["ieee"] < 1e-6
    assert errors["tf32x3"] < 1e-6
    assert (1e-5 < errors["tf32"] < 1e-3) if dtype == torch.float32 else errors["tf32"] < 1e-6


def test_float32_products_of_halves_are_off_by_little_and_keep_infinities(generator):
    a, b = (torch.randn(32, 32, generator=generator).exp2() for _ in range(2))
    b *= torch.eye(32)  # sums of one product
    b[0, 0], a[0, 0], a[1, 1], a[2, 2] = -float("inf"), 0.0, float("inf"), float("nan")
    c = torch.full((32, 32), float("nan"))
    with triton_guard.watch():
        _product[(1,)](a, b, c, M=32, K=32, PRECISION="tf32x3")
    truth = a.double() @ b.double()
    finite = truth.isfinite()
    assert torch.equal(c.double()[~finite].nan_to_num(7.0), truth[~finite].nan_to_num(7.0))
    assert ((c - truth).abs() <= 2.0**-21 * truth.abs())[finite].all()
    assert ((c - truth).abs() > 2.0**-24 * truth.abs())[finite].any(), "the product of the rests is left out"


def test_integer_products_are_exact_and_shallow_ones_refused(generator):
    a, b = (torch.randint(-128, 128, (16, 64), generator=generator).to(torch.int8) for _ in range(2))
    b = b.reshape(64, 16)
    c = torch.zeros(16, 16, dtype=torch.int32)
    with triton_guard.watch() as watch:
        _product[(1,)](a, b, c, M=16, K=64, PRECISION=None)
    assert torch.equal(c, a.int() @ b.int())
    assert watch.launches[0].dot_flops == {"int8": 2 * 16 * 16 * 64}
    with triton_guard.watch(), pytest.raises(GuardFault, match="at least 32"):
        _product[(1,)](a[:, :16].contiguous(), b[:16], c, M=16, K=16, PRECISION=None)


def test_a_sample_of_programs_shows_what_is_launched(generator):
    x, y = torch.randn(100, generator=generator), torch.zeros(100)
    with triton_guard.watch(sample=1) as watch:
        _copy[(4,)](x, y, 100, BLOCK=32, SHIFT=0, LIMIT=0, num_warps=8, maxnreg=64)
    assert torch.equal(y, torch.cat([x[:32], torch.zeros(68)]))
    launch = watch.launches[0]
    assert launch.programs == 1
    found = launch.specialisation
    assert found["signature"]["x"] == "*fp32"
    assert found["signature"]["BLOCK"] == "constexpr"
    assert found["constants"] == [[[3], 32], [[4], 0], [[5], 0]]
    assert found["aligned"] == [[0], [1]]
    assert (found["kernel"], found["options"]) == ("_copy", {"num_warps": 8, "num_stages": 3, "maxnreg": 64})
