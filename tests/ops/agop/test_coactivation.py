"""AGOP primitives against plain PyTorch and float64, on every instruction set of this machine."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mmc_fast.errors import InputError
from mmc_fast.ops import dispatch as backends
from mmc_fast.ops import native as library
from mmc_fast.ops.agop import op as agop
from mmc_fast.ops.agop.reference import activation_derivative, mirror

ISAS = library.supported_isas()
NO_NATIVE = library.unavailable_reason() or ""
native_only = pytest.mark.skipif(not ISAS, reason=NO_NATIVE)
SIZES = [1, 3, 63, 64, 65, 511, 513]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=[*ISAS, "eager"])
def runner(request):
    """Every instruction set of the native library, and eager torch, behind one name."""
    if request.param == "eager":
        yield "eager"
        return
    with library.forced_isa(request.param):
        yield "cpp"


def layer(n, d, h, generator, integers=False):
    """Inputs, weight and bias; with ``integers`` every pre-activation is exact in any order of summation."""
    if integers:
        return (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((n, d), (h, d), (h,)))
    return (torch.randn(shape, generator=generator) for shape in ((n, d), (h, d), (h,)))


def accumulators(h):
    return torch.zeros(h, h, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)


def true_counts(x, weight, bias):
    z = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    active = (z > 0).long()
    return active.t() @ active


def counts_of(x, weight, bias, backend, chunk_rows=0):
    counts, flag = accumulators(weight.shape[0])
    agop.relu_coactivation_update(x, weight, bias, counts, flag, chunk_rows, backend=backend)
    assert flag.item() == 0
    return counts


@pytest.mark.parametrize("n", SIZES)
def test_counts_are_exact(runner, n, generator):
    for h in (1, 12, 25, 65) if n > 65 else SIZES[:5]:
        x, weight, bias = layer(n, 7, h, generator, integers=True)
        for b in (bias, None):
            assert torch.equal(counts_of(x, weight, b, runner), true_counts(x, weight, b).triu()), (n, h)


@pytest.mark.parametrize("h", [511, 513])
def test_counts_are_exact_for_wide_layers(runner, h, generator):
    x, weight, bias = layer(70, 4, h, generator, integers=True)
    assert torch.equal(counts_of(x, weight, bias, runner), true_counts(x, weight, bias).triu())


def test_update_adds_and_leaves_the_lower_triangle(runner, generator):
    x, weight, bias = layer(100, 5, 70, generator, integers=True)
    counts, flag = torch.full((70, 70), 1000, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for _ in range(2):
        agop.relu_coactivation_update(x, weight, bias, counts, flag, backend=runner)
    truth = true_counts(x, weight, bias)
    assert torch.equal(counts.triu(), (2 * truth + 1000).triu())
    assert torch.equal(counts.tril(-1), torch.full((70, 70), 1000).tril(-1))


def test_strided_and_offset_inputs(runner, generator):
    x, weight, bias = layer(150, 9, 40, generator, integers=True)
    truth = true_counts(x, weight, bias).triu()
    wide = torch.full((302, 20), float("nan"))
    wide[1:301:2, 1:19:2] = x
    cases = [(wide[1:301:2, 1:19:2], weight), (x.t().contiguous().t(), weight), (x, weight.t().contiguous().t())]
    for a, w in cases:
        assert torch.equal(counts_of(a, w, bias.repeat_interleave(2)[::2], runner), truth)
    row = torch.randint(-3, 4, (1, 9), generator=generator).float()
    assert torch.equal(
        counts_of(row.expand(130, 9), weight, bias, runner), true_counts(row.expand(130, 9), weight, bias).triu()
    )


def test_no_samples_and_no_inputs(runner):
    assert counts_of(torch.zeros(0, 4), torch.ones(6, 4), None, runner).sum() == 0
    bias = torch.tensor([1.0, -1.0, 0.0, 2.0])  # without inputs z is the bias, and z = 0 is not active
    counts = counts_of(torch.zeros(5, 0), torch.zeros(4, 0), bias, runner)
    assert counts.nonzero().tolist() == [[0, 0], [0, 3], [3, 3]]
    assert counts.sum() == 15


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 63, 64, 129])
def test_a_non_finite_pre_activation_is_reported(runner, value, where, generator):
    x, weight, bias = layer(130, 3, 30, generator)
    x[where, 1] = value
    counts, flag = accumulators(30)
    agop.relu_coactivation_update(x, weight, bias, counts, flag, backend=runner)
    gram, total, smooth = (
        torch.zeros(30, 30, dtype=torch.float64),
        torch.zeros(30, dtype=torch.float64),
        torch.zeros_like(flag),
    )
    agop.derivative_gram_update(x, weight, bias, "tanh", gram, total, smooth, backend=runner)
    assert flag.item() > 0
    assert smooth.item() > 0


def test_overflow_inside_the_layer_is_reported(runner):
    counts, flag = accumulators(2)
    agop.relu_coactivation_update(torch.full((3, 2), 3e38), torch.ones(2, 2), None, counts, flag, backend=runner)
    assert flag.item() > 0


@native_only
def test_counts_depend_on_nothing_but_the_inputs(generator):
    """Bitwise: instruction sets, chunk sizes, threads, batches; on inputs whose pre-activations are rounded."""
    x, weight, bias = layer(2000, 61, 130, generator)
    first = counts_of(x, weight, bias, "cpp")
    threads = torch.get_num_threads()
    try:
        for isa in ISAS:
            with library.forced_isa(isa):
                for chunk in (1, 64, 100, 640, 5000) if isa not in library.FOR_TESTS else (0, 100):
                    assert torch.equal(counts_of(x, weight, bias, "cpp", chunk), first), (isa, chunk)
                for count in (2, 3):
                    torch.set_num_threads(count)
                    assert torch.equal(counts_of(x, weight, bias, "cpp"), first), (isa, count)
                torch.set_num_threads(1)
    finally:
        torch.set_num_threads(threads)
    counts, flag = accumulators(130)
    for part in x.split([1, 62, 700, 1237]):
        agop.relu_coactivation_update(part, weight, bias, counts, flag, backend="cpp")
    assert torch.equal(counts, first)


_OTHER_PROCESS = """
import sys, torch
from mmc_fast.ops import native as library
from mmc_fast.ops.agop import op as agop
g = torch.Generator().manual_seed(int(sys.argv[1]))
x, w, b = (torch.randn(s, generator=g) for s in ((700, 61), (130, 61), (130,)))
c, f = torch.zeros(130, 130, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
agop.relu_coactivation_update(x, w, b, c, f, backend="cpp")
print(library.current_isa(), hash(tuple(c.flatten().tolist())))
"""


def in_other_process(isa, *arguments, code=_OTHER_PROCESS):
    environment = {**os.environ, "MMC_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


@native_only
def test_mmc_cpu_isa_forces_one_in_another_process(seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = layer(700, 61, 130, generator)
    digest = hash(tuple(counts_of(x, weight, bias, "cpp").flatten().tolist()))
    for isa in ("base", ISAS[-1]):
        done = in_other_process(isa, str(seed))
        assert done.stdout.split() == [isa, str(digest)], done.stderr[-500:]


@native_only
def test_an_unknown_instruction_set_is_refused_in_one_line():
    done = in_other_process("pentium", "1")
    assert done.returncode != 0
    assert (
        "MMC_CPU_ISA: unknown instruction set 'pentium'; this build has: amx_emulated, base"
        in done.stderr.splitlines()[-1]
    )
    with pytest.raises(InputError, match="unknown instruction set"), library.forced_isa("altivec"):
        pass


ACTIVATIONS = {
    "identity": (lambda z: z, {}),
    "relu": (torch.relu, {}),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.2), {"alpha": 0.2}),
    "gelu": (F.gelu, {}),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), {}),
    "silu": (F.silu, {}),
    "tanh": (torch.tanh, {}),
    "sigmoid": (torch.sigmoid, {}),
    "elu": (lambda z: F.elu(z, 1.5), {"alpha": 1.5}),
    "softplus": (lambda z: F.softplus(z, 2.0, 5.0), {"alpha": 2.0, "beta": 5.0}),
}


def true_derivative(function, z):
    z = z.double().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gram_of_derivatives(runner, name, generator):
    function, options = ACTIVATIONS[name]
    for n, d, h in [(1, 1, 1), (65, 5, 33), (700, 20, 97)]:
        x, weight, bias = layer(n, d, h, generator)
        z = x.double() @ weight.double().t() + bias.double()
        x = x[z.abs().min(1).values > 1e-4]  # away from the kink of piecewise functions
        gram, total = torch.zeros(h, h, dtype=torch.float64), torch.zeros(h, dtype=torch.float64)
        flag = torch.zeros(1, dtype=torch.int64)
        for part in x.split(500):
            agop.derivative_gram_update(
                part, weight, bias, name, gram, total, flag, backend=runner, chunk_rows=130, **options
            )
        a = true_derivative(function, x.double() @ weight.double().t() + bias.double())
        truth = (a.t() @ a).triu()
        plain = activation_derivative(x @ weight.t() + bias, name, **{"alpha": 0.0, "beta": 20.0} | options)
        budget = 2 * (mirror((plain.t() @ plain).double()).triu() - truth).norm() + 8 * EPS * truth.norm()
        budget += (
            4 * EPS * len(a) * float(a.abs().max() if len(a) else 0)
        )  # s' is of size 1, and where it crosses zero only its absolute error is small
        assert torch.equal(gram.tril(-1), torch.zeros_like(gram))
        assert (gram - truth).norm() <= budget, (name, n, h)
        assert (total - a.sum(0)).norm() <= 16 * EPS * (a.abs().sum(0) + 1).norm(), (name, n, h)
        assert flag.item() == 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_far_out_and_at_kinks(runner, name):
    """One unit, one sample: from deep saturation to the edge of float32; PyTorch's own choice at kinks (0; 2.5 for softplus)."""
    function, options = ACTIVATIONS[name]
    for value in (
        -3e38,
        -1e13,
        -200.0,
        -88.0,
        -30.0,
        -9.0,
        -1e-3,
        0.0,
        1e-3,
        2.0,
        2.5,
        9.0,
        30.0,
        88.0,
        200.0,
        1e13,
        3e38,
    ):
        gram, total, flag = (
            torch.zeros(1, 1, dtype=torch.float64),
            torch.zeros(1, dtype=torch.float64),
            torch.zeros(1).long(),
        )
        agop.derivative_gram_update(
            torch.tensor([[value]]), torch.ones(1, 1), None, name, gram, total, flag, backend=runner, **options
        )
        truth = true_derivative(function, torch.tensor([value]))
        truth = torch.where(truth.isnan(), torch.tensor(float(value > 0)), truth)  # torch's own inf * 0 far out
        assert flag.item() == 0
        torch.testing.assert_close(total, truth, rtol=1e-6, atol=5e-7, msg=lambda m, v=value: f"{name}({v}): {m}")


def test_gram_of_rows(runner, generator):
    for n, h in [(0, 4), (1, 1), (65, 33), (2500, 100)]:
        rows = torch.randn(n, h, generator=generator)
        gram = torch.zeros(h, h, dtype=torch.float64)
        agop.syrk_update(rows, gram, backend=runner)
        agop.syrk_update(rows.t().contiguous().t(), gram, backend=runner)
        truth = 2 * (rows.double().t() @ rows.double()).triu()
        assert (gram - truth).norm() <= 8 * EPS * truth.norm()
        assert torch.equal(gram.tril(-1), torch.zeros_like(gram))


@pytest.mark.parametrize("own", [False, True])
def test_gram_of_the_last_step_of_a_chain(own, generator):
    """Rows that nobody stores, in steps of about 1024, against rows that are."""
    for n, rows, k, h in [(1, 1, 1, 1), (70, 40, 5, 9), (3, 2000, 4, 6)]:
        inner, v, outer = (torch.randn(*shape, generator=generator) for shape in ((n, k), (k, h), (n, h)))
        left = torch.randn(*((n,) if own else ()), rows, k, generator=generator)
        for scale in (outer, None):
            gram = torch.full((h, h), 3.0, dtype=torch.float64)
            assert agop.chain_gram_update(left, inner, v, scale, gram, backend="eager") == "eager"
            b = (
                (left.double() * inner.double()[:, None])
                @ v.double()
                * (1 if scale is None else scale.double()[:, None])
            )
            truth = 3 + torch.einsum("nri,nrj->ij", b, b).triu()
            assert (gram - truth).norm() <= 32 * EPS * truth.norm()
    for change, told in (
        ({"left": left[..., 0]}, "see its arguments" if not own else "do not fit"), ({"left": left[..., :3]}, "do not fit"), ({"inner": inner[:, :3]}, "do not fit"),
        ({"inner": inner[:, 0]}, "see its arguments"), ({"v": v.long()}, "see its arguments"), ({"outer": outer[:, :5]}, "outer has shape"),
        ({"v": v.double()}, "differ in dtype"), ({"gram": gram.float()}, "gram is"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told) as caught:
            agop.chain_gram_update(**{"left": left, "inner": inner, "v": v, "outer": outer, "gram": gram} | change)
        assert "\n" not in str(caught.value)
    if own:
        with pytest.raises(InputError, match="do not fit"):
            agop.chain_gram_update(left[:2], inner, v, outer, gram)


@pytest.mark.parametrize("kind", ["counts", "gram"])
def test_final_product(runner, kind, generator):
    for h, d, outputs in [(1, 1, 1), (5, 40, 3), (65, 33, 70), (520, 50, 4)]:
        weight, outer = torch.randn(h, d, generator=generator), torch.randn(outputs, h, generator=generator)
        a = torch.rand(200, h, generator=generator, dtype=torch.float64)
        inner = ((a > 0.5).long().t() @ (a > 0.5).long()) if kind == "counts" else a.t() @ a
        noise = torch.full_like(inner, -123456).tril(-1)  # below the diagonal: must not be read
        for left in (outer, None):
            got = agop.agop_finalise(weight, left, inner.triu() + noise, backend=runner)
            s = inner.double() * (1 if left is None else left.double().t() @ left.double())
            truth = weight.double().t() @ s @ weight.double()
            plain = weight.t() @ s.float() @ weight
            assert torch.equal(got, got.t())
            assert (got - truth).norm() <= 2 * (plain - truth).norm() + 8 * EPS * truth.norm(), (h, d)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weight": torch.zeros(4)}, "weight is"), ({"weight": torch.zeros(4, 2).long()}, "weight is int64"),
        ({"outer": torch.zeros(4)}, "outer is"), ({"outer": torch.zeros(3, 5)}, "outer is"), ({"outer": torch.zeros(3, 4).half()}, "outer is"),
        ({"inner": torch.zeros(4, 4)}, "inner is float32"), ({"inner": torch.zeros(5, 5).double()}, "inner is"),
        ({"nonfinite": torch.zeros(2).long()}, "nonfinite is"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_final_product(change, told):
    good = {"weight": torch.ones(4, 2), "outer": torch.ones(3, 4), "inner": torch.ones(4, 4).double()}
    assert agop.agop_finalise(**good, scale=0.5).tolist() == [[24.0, 24.0]] * 2  # 3 outputs, 4 · 4 pairs, half of them
    with pytest.raises(InputError, match=told) as caught:
        agop.agop_finalise(**good | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_every_backend_has_each_op_with_its_arguments(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    ops = ("relu_coactivation_update", "derivative_gram_update", "syrk_update", "chain_gram_update", "agop_finalise")
    for op in ops if backend == "triton" else ops[:1]:
        ours, theirs = (agop._implementation(op, which) for which in ("eager", backend))
        named = [list(inspect.signature(f).parameters) for f in (ours, theirs)]
        assert theirs.__module__ != ours.__module__
        assert (theirs.__name__, named[1][: len(named[0])]) == (op, named[0])


@native_only
def test_what_ran_is_counted_where_it_ran(generator):
    x, weight, bias = layer(64, 3, 5, generator)
    backends.reset_ran()
    with library.forced_isa("base"):
        counts_of(x, weight, bias, "auto")
    counts_of(x.double(), weight.double(), bias.double(), "auto")
    assert backends.ran() == {"relu_coactivation_update/cpp/base": 1, "relu_coactivation_update/eager": 1}


def test_explicit_backends_never_fall_back(generator):
    x, weight, bias = layer(8, 3, 5, generator)
    for backend, message in (("cuda", "backend='cuda' cannot run"), ("fpga", "allowed are 'auto'")):
        with pytest.raises((RuntimeError, InputError), match=message):
            counts_of(x, weight, bias, backend)
    if ISAS:
        with pytest.raises(RuntimeError, match=r"computes in float32 and a tensor is torch\.float64"):
            counts_of(x.double(), weight.double(), bias.double(), "cpp")


def test_explain_gives_every_backend_with_a_reason(generator):
    x, weight, _ = layer(8, 3, 5, generator)
    rows = {row.backend: row for row in backends.explain("relu_coactivation_update", x.double(), weight.double())}
    assert list(rows) == ["cpp", "triton", "cuda", "eager"]
    assert rows["eager"].usable
    assert not rows["cpp"].usable
    assert all(row.reason for row in rows.values())
    with pytest.raises(InputError, match="unknown op 'agopp'"):
        backends.explain("agopp")


@native_only
def test_explain_tells_of_matrix_tiles(generator):
    x, weight, _ = layer(8, 3, 5, generator)
    for isa in ISAS:
        with library.forced_isa(isa):
            reason = backends.explain("relu_coactivation_update", x, weight)[0].reason
        products = {"amx": "float32 product (depth below 16)", "amx_emulated": "three bfloat16 products"}
        assert reason == (
            f"usable; signs by {'a ' * (isa == 'amx')}{products[isa]}, counts by int8 tiles"
            if isa in products
            else "usable"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, "x is float32"),
        ({"weight": torch.zeros(4, 5)}, "weight has shape .4, 5. but x has 2 columns"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"weight": torch.zeros(4, 2, dtype=torch.float64)}, "differ in dtype"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, "differ in dtype"),
        ({"counts": torch.zeros(4, 4)}, "pass a contiguous int64 .4, 4."),
        ({"counts": torch.zeros(4, 8, dtype=torch.int64)[:, ::2]}, "not contiguous"),
        ({"nonfinite": torch.zeros(2, dtype=torch.int64)}, "nonfinite is"),
        ({"chunk_rows": -1}, "chunk_rows=-1"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    good = {
        "x": torch.zeros(3, 2), "weight": torch.zeros(4, 2), "bias": torch.zeros(4), "chunk_rows": 0,
        "counts": torch.zeros(4, 4, dtype=torch.int64), "nonfinite": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(InputError, match=message) as caught:
        agop.relu_coactivation_update(**{**good, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "allowed are identity, relu"), ({"x": torch.zeros(3)}, "x is float32"),
        ({"weight": torch.zeros(4, 5)}, "weight has shape"), ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"gram": torch.zeros(4, 4)}, "gram is float32"), ({"gram": torch.zeros(3, 4).double()}, "gram is"),
        ({"total": torch.zeros(4)}, "total is float32"), ({"total": torch.zeros(3).double()}, "total is"),
        ({"total": torch.zeros(8).double()[::2]}, "not contiguous"), ({"nonfinite": torch.zeros(1)}, "nonfinite is"),
        ({"chunk_rows": -1}, "chunk_rows=-1"),
    ],
)  # fmt: skip
def test_bad_input_of_smooth_layers_is_one_clear_line(change, message):
    good = {
        "x": torch.zeros(3, 2), "weight": torch.zeros(4, 2), "bias": torch.zeros(4), "activation": "tanh", "chunk_rows": 0,
        "gram": torch.zeros(4, 4).double(), "total": torch.zeros(4).double(), "nonfinite": torch.zeros(1).long(),
    }  # fmt: skip
    agop.derivative_gram_update(**good)
    with pytest.raises(InputError, match=message) as caught:
        agop.derivative_gram_update(**good | change)
    assert "\n" not in str(caught.value)


@native_only
def test_registered_ops_pass_opcheck(generator):
    x, weight, bias = layer(70, 3, 5, generator)
    ops = torch.ops.mmc_fast
    counts, flag = accumulators(5)
    gram, total = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    calls = [
        (ops.relu_coactivation_update, (x, weight, bias, counts, flag, 0)),
        (ops.relu_coactivation_update, (x, weight, None, counts, flag, 0)),
        (ops.derivative_gram_update, (x, weight, bias, 6, 0.0, 0.0, gram, total, flag, 0)),
        (ops.syrk_update, (x, torch.zeros(3, 3, dtype=torch.float64))),
        (ops.agop_finalise, (weight, x[:, :1].expand(70, 5), gram)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@native_only
def test_native_ops_check_what_they_are_given(generator):
    x, weight, bias = layer(8, 3, 5, generator)
    counts, flag = accumulators(5)
    for arguments in ((x, weight[:, :2], bias, counts, flag, 0), (x.double(), weight, bias, counts, flag, 0),
                      (x, weight, bias[:2], counts, flag, 0), (x, weight, bias, counts[:2], flag, 0)):  # fmt: skip
        with pytest.raises(RuntimeError):
            torch.ops.mmc_fast.relu_coactivation_update(*arguments)


# VmHWM and not getrusage: the peak of a new process starts there at that of the process which started it
_MEMORY = """
import pathlib, resource, torch
from mmc_fast.ops.agop import op as agop
torch.set_num_threads(1)
x, w = torch.randn(300_000, 8), torch.randn(512, 8)
c, f = torch.zeros(512, 512, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
agop.relu_coactivation_update(x[:64], w, None, c, f, backend="cpp")
status = pathlib.Path("/proc/self/status")
def peak():
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
before = peak()
agop.relu_coactivation_update(x, w, None, c, f, backend="cpp")
print((peak() - before) // 1024)
"""


@native_only
def test_memory_does_not_grow_with_samples():
    """The pre-activations of these samples alone would take 586 MiB."""
    done = in_other_process("", code=_MEMORY)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) < 16, f"{done.stdout} MiB more at the peak"


def test_selftest_covers_every_backend_and_notices_a_wrong_kernel(monkeypatch):
    from mmc_fast.ops import selftest

    rows = [row for row in selftest.selftest() if row.name != "native library"]
    assert all(row.passed for row in rows), rows
    assert len(rows) == 3 * (len(ISAS) + 1)
    real = agop.relu_coactivation_update
    monkeypatch.setattr(
        agop, "relu_coactivation_update", lambda x, *a, **k: real(x[:-1], *a, **k)
    )  # the last word is lost
    assert not all(row.passed for row in selftest.selftest())
