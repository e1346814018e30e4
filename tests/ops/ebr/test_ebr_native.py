"""The native EBR step: fuzzed against the float64 reference, the same bits everywhere, and its manners inside torch."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ebr_oracle import NO_NATIVE, Case, actual, draw_case, grouped, in_float64, sensitivity
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from training_data import small, tiny

from mmc_fast import functional
from mmc_fast.experiments.training import train
from mmc_fast.nn import EBRHead
from mmc_fast.ops import dispatch as backends
from mmc_fast.ops import native as library
from mmc_fast.testing import assert_as_accurate

pytestmark = pytest.mark.skipif(bool(NO_NATIVE), reason=f"no native EBR step: {NO_NATIVE}")

WIDTHS = (1, 7, 16, 33, 257)


def wide_case(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """A random configuration around the edges of register tiles; everything follows from the seed."""
    rng = random.Random(f"wide {seed}")
    fixed = {
        "widths": WIDTHS,
        "hidden_dim": rng.choice(WIDTHS),
        "latent_dim": rng.choice(WIDTHS),
        "psi_dims": rng.choice([(), (1,), (33,), (7, 257), (16, 33, 7)]),
        "batch": rng.choice([1, 2, 4, 5, 13, 40]),
        "reversal": rng.choice([0.0, 0.5, 1.0] if dtype == torch.float16 else [0.0, 0.5, 1.0, 1e4]),
    }
    return draw_case(seed, dtype, **fixed)


def check_against_float64(case: Case, line: str) -> list[float]:
    """Error by norm, cosine and signed drift; returns the errors as multiples of plain torch's."""
    eps = torch.finfo(case.features[0].dtype).eps
    wanted = actual(in_float64(case), "reference")
    got = actual(case, "cpp")
    truths, plains, gots = grouped(*wanted), grouped(*actual(case, "reference")), grouped(*got)
    ratios = []
    for kind, truth in truths.items():
        scale = max(float(truth.norm()), 1e-2)
        error, plain = (float((v[kind] - truth).norm()) / scale for v in (gots, plains))
        allowed = 4 * plain + 64 * eps  # one ill-conditioned case in a thousand comes near; the median is held below
        if error > allowed:
            allowed += 4 * sensitivity(case)[kind]
        assert error <= allowed, f"{line}: {kind} {error:.2e}, plain torch {plain:.2e}"
        cosine = float(F.cosine_similarity(gots[kind], truth, dim=0)) if float(truth.norm()) > 1e-6 else 1.0
        assert cosine > 1 - allowed, f"{line}: {kind} turns by 1 - {1 - cosine:.1e}"
        drift = float(((gots[kind] - truth) * truth.sign()).sum()) / max(float(truth.abs().sum()), 1e-2)
        assert abs(drift) <= allowed, f"{line}: {kind} drifts by {drift:.1e}"
        if plain > eps / 8:
            ratios.append(error / plain)
    for name, truth in wanted[1].items():
        kind = f"gradients of {name.split('.')[0]}"
        size = max(float(truth.norm()), 0.1 * float(truths[kind].norm()), 1e-2)
        error = float((got[1][name].double() - truth).norm()) / size
        allowed = 1e3 * eps
        if error > allowed:
            allowed += 40 * sensitivity(case)[kind]
        assert error <= allowed, f"{line}: gradient of {name} differs by {error:.1e}"
    return ratios


def fuzz(seeds: range, dtype: torch.dtype) -> None:
    ratios: list[float] = []
    for seed in seeds:
        case = wide_case(seed, dtype)
        ratios += check_against_float64(case, f"wide_case({seed}, {dtype}); {case.describe()}")
    if not ratios:  # every case of a short range may have all of its rows absent: nothing to take a median of
        return
    median = sorted(ratios)[len(ratios) // 2]
    assert median <= 1.5, f"seeds {seeds}, {dtype}: the median error is {median:.2f} times that of plain torch"


@pytest.mark.parametrize("ways", ["tiles", "blas"])
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 50), (torch.bfloat16, 12), (torch.float16, 12)])
def test_fuzz_every_dtype_and_way_to_multiply(dtype, count, ways, seed):
    with library.forced_ways(ways):
        fuzz(range(seed, seed + count), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_fuzz_thousand(part):
    fuzz(range(100 * part, 100 * part + 100), torch.float32)


@pytest.mark.parametrize("ways", ["tiles", "blas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_go_through_every_path(dtype, ways, seed):
    """Products long enough for chunks along the sum, for threads and for blocks of the epilogue after the BLAS."""
    case = draw_case(seed, dtype, m=2, widths=[257], hidden_dim=1100, latent_dim=130, psi_dims=(140, 70), batch=300)
    case.reversal, case.normalizer = 1.0, None
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            with library.forced_ways(ways):
                check_against_float64(case, f"seed {seed}, {threads} threads, {ways}")
        finally:
            torch.set_num_threads(1)


def everything(case: Case) -> dict[str, Tensor]:
    values, gradients = actual(case, "cpp")
    return {**values, **gradients}


def big_case(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    return draw_case(
        seed, dtype, m=3, widths=[33, 70], hidden_dim=190, latent_dim=96, psi_dims=(64, 33), batch=200, mask="some"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_on_a_rerun_and_on_any_number_of_threads(dtype, seed):
    case = big_case(seed, dtype)
    first = everything(case)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            again = everything(case)
        finally:
            torch.set_num_threads(1)
        for name in first:
            assert torch.equal(first[name], again[name]), f"{case.describe()}: {name} with {threads} threads"


def test_instruction_sets_agree(seed):
    case = big_case(seed)
    exact: dict[str, dict[str, Tensor]] = {}
    for isa in library.supported_isas():
        with library.forced_isa(isa):
            backends.reset_ran()
            exact[isa] = everything(case)
            assert backends.ran()[f"ebr_step/cpp/{isa}"] == 1
    fused = [isa for isa in exact if isa not in library.FOR_TESTS]  # base rounds products before it adds them
    for isa in fused[1:]:
        for name in exact[isa]:
            assert torch.equal(exact[isa][name], exact[fused[0]][name]), f"{case.describe()}: {name} on {isa}"
    for isa in fused[:1]:
        for name, value in exact["base"].items():  # a unit next to its kink may have another gradient
            apart = float((value - exact[isa][name]).norm() / (value.norm() + 1e-3))
            assert apart < (
                1e-5 if name.startswith(("recovered", "latents", "discrimination_", "reconstruction_")) else 5e-2
            ), f"{case.describe()}: {name} on {isa}, {apart}"


def products_by(isa, precision, attribute, head, x):
    """Outputs, gradients and explain's words under a precision, set by torch's old interface or by the new one's attribute."""
    matmul = torch.backends.mkldnn.matmul
    try:
        if attribute:
            matmul.fp32_precision = attribute
        else:
            torch.set_float32_matmul_precision(precision)
        with library.forced_isa(isa), library.forced_ways("tiles"):
            out = head(x, reversal=0.5)
            loss = out.recovered[0].square().sum() + out.discrimination_loss + out.reconstruction_loss
            reason = backends.explain("ebr_step", [*x], [*head.parameters()])[0].reason
            gradients = torch.autograd.grad(loss, [*head.parameters()])
            outputs = torch.cat([r.detach().flatten() for r in (*out.recovered, *out.latents)])
            return outputs, torch.cat([g.flatten() for g in gradients]), reason
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"


def test_a_precision_that_the_user_asks_for_is_taken_where_there_are_matrix_tiles(generator):
    head = EBRHead([70, 33], 48, 90, (40,), backend="cpp")
    x = [torch.randn(64, d, generator=generator) for d in head.dims]
    plain = products_by("base", "highest", "", head, x)
    for isa, precision, attribute, least, most, gradient in [
        ("base", "high", "tf32", 0, 0, 0),
        ("amx_emulated", "highest", "ieee", 0, 0, 0),
        ("amx_emulated", "high", "tf32", 2**-23, 2**-14, 2**-7),  # gradients: a unit may lie next to its kink
        ("amx_emulated", "medium", "bf16", 2**-12, 2**-6, 2**-3),
    ]:
        got, again = products_by(isa, precision, "", head, x), products_by(isa, precision, attribute, head, x)
        assert all(torch.equal(a, b) for a, b in zip(got[:2], again[:2], strict=True))
        assert ("bfloat16 product" in got[2]) == bool(most)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(got[:2], plain[:2], strict=True)]
        assert least <= errors[0] <= most, (isa, precision, errors)
        assert least <= errors[1] <= gradient, (isa, precision, errors)


@pytest.mark.parametrize("isa", ["amx_emulated", "base", "avx2", "avx512", "avx512_vpopcntdq", "amx"])
def test_low_precision_on_every_instruction_set(isa, seed):
    if isa not in library.supported_isas():
        pytest.skip(f"this processor has no {isa}")
    with library.forced_isa(isa):
        fuzz(range(seed, seed + 8), torch.bfloat16)
        fuzz(range(seed, seed + 8), torch.float16)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 13])
def test_a_row_does_not_depend_on_its_neighbours(rows):
    head = EBRHead([33, 70], 96, 190, (64, 33), residual=True, backend="cpp")
    x = [torch.randn(40, d) for d in head.dims]
    with torch.no_grad():
        whole, part = head(x), head([f[:rows] for f in x])
    assert torch.equal(whole.latents[:, :rows], part.latents)
    for a, b in zip(whole.recovered, part.recovered, strict=True):
        assert torch.equal(a[:rows], b)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "sliced": lambda t: torch.stack([t, t.flip(0)], -1)[..., 0],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_bits_of_dense_tensors(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    laid = LAYOUTS[layout]
    head = EBRHead([33, 7], 16, 40, (9,), residual=True, backend="cpp")
    x = [laid(torch.randn(21, d, generator=generator)) for d in head.dims]
    given = [laid(torch.randn(21, d, generator=generator)) for d in head.dims]
    latents = laid(torch.randn(2, 21, 16, generator=generator))
    present = laid(torch.rand(21, 2, generator=generator) < 0.7)
    source = laid(torch.randint(-1, 2, (21, 2), generator=generator))

    def run(change, head: EBRHead) -> list[Tensor]:
        leaves = [change(f).detach().requires_grad_() for f in x]
        out = head(leaves, change(present), change(source))
        cotangents = [*map(change, given), change(latents), torch.tensor(1.0), torch.tensor(0.5)]
        outputs = [*out.recovered, out.latents, out.discrimination_loss, out.reconstruction_loss]
        return [*outputs, *torch.autograd.grad(outputs, [*leaves, *head.parameters()], cotangents)]

    strided = copy.deepcopy(head)
    for p in strided.parameters():
        p.data = p.data if layout == "expanded" else laid(p.data)
    for dense, got in zip(run(torch.Tensor.contiguous, head), run(lambda t: t, strided), strict=True):
        assert torch.equal(dense, got)


def test_only_what_is_asked_for_is_computed(seed):
    generator = torch.Generator().manual_seed(seed)
    head = EBRHead([5, 4], 16, 24, (9, 6), backend="cpp")
    x = [torch.randn(11, d, generator=generator) for d in head.dims]
    groups = {"encoders": head.encoders, "decoders": head.decoders, "discriminator": head.discriminator}

    def gradients(*trained: str) -> dict[str, Tensor | None]:
        for name, module in groups.items():
            module.requires_grad_(name in trained)
        head.zero_grad()
        out = head(x)
        loss = sum(r.square().sum() for r in out.recovered) + out.discrimination_loss + out.reconstruction_loss
        loss.backward()
        return {name: p.grad for name, p in head.named_parameters()}

    whole = gradients(*groups)
    for trained in [("encoders",), ("decoders",), ("discriminator",), ("encoders", "discriminator")]:
        for name, grad in gradients(*trained).items():
            if name.split(".")[0] in trained:
                assert torch.equal(grad, whole[name]), f"{trained}: {name}"
            else:
                assert grad is None, f"{trained}: {name}"


def test_a_gradient_that_nobody_needs_comes_back_empty():
    head = EBRHead([5, 4], 6, 7, (3,))
    x = [torch.randn(11, d) for d in head.dims]
    params = [p.detach() for p in head.parameters()]
    ops, one = torch.ops.mmc_fast, torch.tensor(1.0)
    recovered, latents, _, _, saved = ops.ebr_step(x, None, None, one, None, params, False, False, False, "cpp")
    needs = [1, 0, 0] + [n % 2 for n in range(len(params))]
    d_features, d_source, d_params = ops.ebr_step_backward(
        [None, None], None, one, one, x, None, None, one, None, params, False, False, False, "cpp",
        recovered, latents, saved, needs,
    )  # fmt: skip
    assert [d.numel() > 0 for d in [*d_features, d_source, *d_params]] == [n == 1 for n in needs]


def test_saved_bytes_at_the_paper_s_widths():
    head = EBRHead([128] * 4)
    x = [torch.randn(32, 128) for _ in range(4)]
    skip = {p.data_ptr() for p in head.parameters()}

    def kept(step) -> int:
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.data_ptr()] = max(seen.get(t.data_ptr(), 0), t.numel() * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = step()
        del result
        return sum(size for pointer, size in seen.items() if pointer not in skip)

    def eager():
        latents = [encoder(f) for encoder, f in zip(head.encoders, x, strict=True)]
        recovered = [decoder(g) for decoder, g in zip(head.decoders, latents, strict=True)]
        logits = head.discriminator(functional.grad_reverse(torch.cat(latents), 1.0))
        losses = [F.mse_loss(r, f) for r, f in zip(recovered, x, strict=True)]
        return F.cross_entropy(logits, torch.arange(4).repeat_interleave(32)), sum(losses)

    plain = kept(eager)
    head.backend = "cpp"
    default = kept(lambda: head(x))
    head.recompute = True
    again = kept(lambda: head(x))
    assert default <= 0.85 * plain
    assert again <= 0.16 * plain


def test_rows_that_are_absent_are_kept_as_zeros():
    """Compact rows first: what is saved holds no memory of another computation."""
    head = EBRHead([5, 4], 6, 7, (3, 4), normalize=True)
    x = [torch.full((9, d), float("nan")) for d in head.dims]
    present = torch.zeros(9, 2, dtype=torch.bool)
    params = [p.detach() for p in head.parameters()]
    out = torch.ops.mmc_fast.ebr_step(x, present, None, torch.tensor(1.0), None, params, True, True, False, "cpp")
    assert all(not t.any() for t in out[4])


def test_a_training_run_goes_through_the_native_kernel():
    backends.reset_ran()
    result = train(tiny(0), small("ebr"), seed=1)
    ran = {row.split("/")[0]: n for row, n in backends.ran().items() if row.startswith("ebr_step") and "/cpp/" in row}
    steps = len(result.results["history"])
    assert ran["ebr_step_backward"] >= steps > 0
    assert ran["ebr_step"] >= ran["ebr_step_backward"]
    assert not [row for row in backends.ran() if row.startswith("ebr_step") and row.endswith(("/eager", "/reference"))]


def test_an_explicit_backend_never_falls_back():
    x = [torch.randn(4, 3), torch.randn(4, 2)]
    head = EBRHead([3, 2], 4, 5, (6,))
    for head.backend in ("cpp", "eager", "reference"):
        backends.reset_ran()
        head(x)
        assert [row.split("/")[:2] for row in backends.ran()] == [["ebr_step", head.backend]]
    for head.backend in ("cpp", "eager"):
        with pytest.raises(RuntimeError, match=f"backend='{head.backend}' cannot run: .* torch.float64"):
            head.double()([f.double() for f in x])


def test_auto_takes_the_first_row_that_explain_calls_usable():
    head = EBRHead([3, 2], 4, 5, (6,))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = [torch.randn(4, d, dtype=dtype) for d in head.dims]
        backends.reset_ran()
        head.to(dtype)(x)
        first = next(row.backend for row in backends.explain("ebr_step", *x) if row.usable)
        assert [row.split("/")[1] for row in backends.ran()] == [first]
    assert [row.backend for row in backends.explain("ebr_step")] == ["cpp", "eager", "triton", "reference"]


_NO_LIBRARY = """
import sys, torch
load = torch.ops.load_library
def refuse(path):
    if "mmc_ebr" in str(path):
        raise OSError("taken away")
    load(path)
torch.ops.load_library = refuse
sys.path.insert(0, "tests")
import warnings
warnings.simplefilter("ignore")
from ebr_oracle import NO_NATIVE, actual, draw_case
from mmc_fast.nn import EBRHead
from mmc_fast.ops.dispatch import ran
assert "taken away" in NO_NATIVE, NO_NATIVE
for seed in range(6):
    case = draw_case(seed, torch.float32)
    for recompute in (False, True):
        case.head.recompute = recompute
        for got, want in zip(actual(case, "auto"), actual(case, "reference")):
            for name, value in want.items():
                size = max(1.0, float(value.norm())) * max(1.0, case.reversal)
                assert float((got[name] - value).norm()) <= 4e-5 * size, f"{case.describe()}: {name}"
assert {row.split("/")[1] for row in ran()} == {"eager", "reference"}, ran()
case = draw_case(7, torch.float32, m=3, batch=5, mask="some", source="weights")
params = list(case.head.parameters())
op = torch.ops.mmc_fast.ebr_step.default
call = (case.features, case.present, case.source, torch.tensor(0.5), None, params, True, True)
torch.library.opcheck(op, (*call, False, "eager"))
head = EBRHead([3, 2], 16, 64, (6,))
x = [torch.randn(4, d, requires_grad=True) for d in head.dims]
step = torch.compile(lambda x: head(x).recovered[0].square().sum(), fullgraph=True, backend="aot_eager")
torch.testing.assert_close(torch.autograd.grad(step(x), x[0]), torch.autograd.grad(head(x).recovered[0].square().sum(), x[0]))
for backend, message in (("cpp", "backend='cpp' cannot run"), ("eager", "backend='reference' for double backward")):
    head.backend = backend
    try:
        (g,) = torch.autograd.grad(head(x).recovered[0].square().sum(), x[0], create_graph=True)
        g.sum().backward()
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise SystemExit(f"{backend} did not raise")
"""


def test_without_the_library_python_registers_the_same_autograd():
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", _NO_LIBRARY], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_another_torch_release_is_named(monkeypatch):
    monkeypatch.setattr(library.torch, "__version__", "99.1.2+cpu")
    reason = library.load_ebr.__wrapped__()
    running = torch.version.__version__.split("+")[0]
    assert f"built for torch {running} and torch 99.1.2 is running: build again" in reason


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    head = EBRHead([33, 7], 16, 40, (9,), backend="cpp")
    x = [torch.randn(12, d, requires_grad=True) for d in head.dims]

    def step(*features: Tensor) -> Tensor:
        out = head(list(features))
        return sum(r.square().sum() for r in out.recovered) + out.discrimination_loss

    leaves = [*x, *head.parameters()]
    whole = torch.autograd.grad(step(*x), leaves)
    if reentrant:  # works with backward() only
        checkpoint(step, *x, use_reentrant=True).backward()
        again = [leaf.grad for leaf in leaves]
    else:
        again = torch.autograd.grad(checkpoint(step, *x, use_reentrant=False), leaves)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)


def test_backward_twice_and_offloaded_saved_tensors():
    head = EBRHead([33, 7], 16, 40, (9,), backend="cpp")
    x = [torch.randn(12, d) for d in head.dims]
    parameters = list(head.parameters())
    with torch.autograd.graph.save_on_cpu():
        out = head(x)
    loss = sum(r.square().sum() for r in out.recovered) + out.discrimination_loss
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


def test_distributed_data_parallel(tmp_path):
    """One process: hooks on every parameter, buckets and all, around the C++ node."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        head = EBRHead([33, 7], 16, 40, (9,), backend="cpp")
        x = [torch.randn(12, d) for d in head.dims]
        parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(head))
        for model in (head, parallel):
            out = model(x)
            (sum(r.square().sum() for r in out.recovered) + out.discrimination_loss).backward()
        for p, q in zip(head.parameters(), parallel.module.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    head = EBRHead([33, 7], 16, 40, (9,), backend="cpp")
    x = [torch.randn(12, d) for d in head.dims]
    want = head(x)
    with mode():
        got = head(x)
    for a, b in zip([*want.recovered, *want[1:]], [*got.recovered, *got[1:]], strict=True):
        assert torch.equal(a, b)
        assert not b.requires_grad


@pytest.mark.parametrize("normalize", [False, True])
def test_long_sums_are_as_accurate_as_torch(normalize, seed):
    """Gradients of weights sum over 6000 rows; the loss averages as many."""
    case = draw_case(seed, torch.float32, m=2, widths=[16], hidden_dim=33, latent_dim=16, psi_dims=(16,), batch=6000,
                     mask="all", source="own", normalize=normalize, reversal=1.0)  # fmt: skip
    case.normalizer = None
    values, gradients = actual(in_float64(case), "reference")
    plain_values, plain_gradients = actual(case, "reference")
    got_values, got_gradients = actual(case, "cpp")
    for truth, plain, got in [(values, plain_values, got_values), (gradients, plain_gradients, got_gradients)]:
        for name in truth:
            assert_as_accurate(got[name], plain[name], truth[name], what=f"seed {seed}: {name}")
