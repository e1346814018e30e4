"""The EBR step against a row-by-row version of its contract, the signs of the game, and the torch integration."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch
from ebr_oracle import BACKENDS, NO_NATIVE, actual, draw_case, expected
from torch import nn

from mmc_fast import functional
from mmc_fast._util.autocast import cast_together
from mmc_fast.nn import EBRHead

FLOAT32_TOLERANCE = 2e-5  # relative to the norm of the float64 truth; sizes here are tiny, eps is 1.2e-7


def assert_close(got, want, tolerance, label):
    for name, truth in want.items():
        value = got[name].double()
        scale = max(float(truth.norm()), 1.0)
        assert value.shape == truth.shape, f"{label}: {name} has shape {list(value.shape)}"
        error = float((value - truth).norm()) / scale
        assert error <= tolerance, f"{label}: {name} differs by {error:.2e} (relative)"


@pytest.mark.parametrize("round_", range(60))
def test_reference_equals_row_by_row_in_float64(round_, seed):
    case = draw_case(seed + round_)
    values, gradients = expected(case)
    got_values, got_gradients = actual(case, "auto")
    assert got_values["l_md"].dtype == torch.float64
    scale = max(1.0, abs(case.reversal))
    assert_close(got_values, values, 1e-9, case.describe())
    assert_close(got_gradients, gradients, 1e-9 * scale, case.describe())


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("round_", range(40))
def test_float32_equals_row_by_row(round_, which, seed):
    case = draw_case(seed + round_, torch.float32)
    values, gradients = expected(case)
    got_values, got_gradients = actual(case, which)
    assert got_values["l_md"].dtype == torch.float32
    assert_close(got_values, values, FLOAT32_TOLERANCE, case.describe())
    assert_close(got_gradients, gradients, FLOAT32_TOLERANCE * max(1.0, abs(case.reversal)), case.describe())


@pytest.mark.parametrize("which", ["cpp", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_plain_torch(dtype, which, seed):
    """By the median over cases: where rounding moves one pre-activation across zero, a single case says nothing."""
    eps = torch.finfo(dtype).eps
    errors: dict[str, list[tuple[float, float]]] = {}
    for n in range(20):
        case = draw_case(seed + n, dtype, reversal=1.0, m=3, batch=9, hidden_dim=17, latent_dim=16, psi_dims=(8, 5))
        case.normalizer = None
        values, gradients = expected(case)
        plain_values, plain_gradients = actual(case, "reference")
        got_values, got_gradients = actual(case, which)
        got, plain = got_values | got_gradients, plain_values | plain_gradients
        for name, truth in (values | gradients).items():
            scale = max(float(truth.norm()), 1e-2)
            error, floor = (float((x[name].double() - truth).norm()) / scale for x in (got, plain))
            errors.setdefault(name, []).append((error, floor))
    for name, pairs in errors.items():
        error, floor = (statistics.median(column) for column in zip(*pairs, strict=True))
        assert error <= 2 * floor + 8 * eps, f"draw_case(seed={seed} and on): {name} {error:.2e}, plain {floor:.2e}"


@pytest.mark.parametrize("which", BACKENDS)
def test_reversal_as_tensor_equals_float(which, seed):
    case = draw_case(seed, torch.float32, reversal=0.3)
    _, as_float = actual(case, which)
    _, as_tensor = actual(case, which, torch.tensor(0.3))
    for name in as_float:
        assert torch.equal(as_float[name], as_tensor[name]), f"{case.describe()}: {name}"


@pytest.fixture(params=["cpp", "eager"])
def kernel(request):
    """A backend behind the registered op."""
    if request.param == "cpp" and NO_NATIVE:
        pytest.skip(f"no native EBR step: {NO_NATIVE}")
    return request.param


@pytest.fixture(params=BACKENDS)
def form(request):
    """Every backend in the dtype that is its own: the reference in float64."""
    if request.param == "cpp" and NO_NATIVE:
        pytest.skip(f"no native EBR step: {NO_NATIVE}")
    return {"backend": request.param}, torch.float64 if request.param == "reference" else torch.float32


def _grad(loss, params):
    return torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)


def test_signs_of_the_game(form, seed):
    """A small step along the received gradients: psi lowers L_md, the encoders raise it, decoders do not matter."""
    options, dtype = form
    torch.manual_seed(seed)
    head = EBRHead([5, 4, 3], 8, 16, (6,), **options).to(dtype)
    features = [torch.randn(64, d, dtype=dtype) for d in head.dims]
    groups = {"psi": head.discriminator, "encoders": head.encoders}
    for name, module in groups.items():
        params = list(module.parameters())
        loss = head(features, reversal=1.0).discrimination_loss
        grads, before = _grad(loss, params), loss.item()
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= 1e-2 * g
            after = head(features).discrimination_loss.item()
            for p, g in zip(params, grads, strict=True):
                p += 1e-2 * g
        assert (after < before) == (name == "psi"), f"{name}: L_md went from {before} to {after}"
    out = head(features, reversal=1.0)
    for g in _grad(out.discrimination_loss, list(head.decoders.parameters())):
        assert g is None or not g.any()
    task = sum(r.square().sum() for r in out.recovered) + out.reconstruction_loss
    for g in _grad(task, list(head.discriminator.parameters())):
        assert g is None or not g.any()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_zero_reversal_cuts_the_branch_even_for_infinite_gradients(form, as_tensor):
    options, dtype = form
    head = EBRHead([3, 3], 4, 5, (), **options).to(dtype)
    with torch.no_grad():
        head.discriminator[0].weight.fill_(float("inf"))
    x = [torch.randn(4, 3, dtype=dtype, requires_grad=True) for _ in range(2)]
    out = head(x, reversal=torch.tensor(0.0) if as_tensor else 0.0)
    for g in _grad(out.discrimination_loss, [*x, *head.encoders.parameters()]):
        assert g is None or torch.equal(g, torch.zeros_like(g))


def test_nothing_present_gives_zero_losses_and_zero_gradients(form):
    options, dtype = form
    head = EBRHead([3, 2], 4, 5, (6,), residual=True, normalize=True, **options).to(dtype)
    x = [torch.full((4, d), float("nan"), dtype=dtype, requires_grad=True) for d in head.dims]
    out = head(x, torch.zeros(4, 2, dtype=torch.bool))
    assert out.discrimination_loss == 0
    assert out.reconstruction_loss == 0
    assert not torch.stack([r.abs().sum() for r in out.recovered]).any()
    loss = sum(r.sum() for r in out.recovered) + out.discrimination_loss + out.reconstruction_loss
    for g in _grad(loss + out.latents.sum(), [*x, *head.parameters()]):
        assert g is not None
        assert not g.any()


def test_one_modality_has_no_game(form):
    options, dtype = form
    head = EBRHead([3], 4, 5, (6,), **options).to(dtype)
    out = head([torch.randn(7, 3, dtype=dtype)])
    assert out.discrimination_loss == 0
    for g in _grad(out.discrimination_loss, [*head.discriminator.parameters(), *head.encoders.parameters()]):
        assert g is not None
        assert not g.any()


def test_loss_of_invariant_latents_is_the_entropy_of_the_frequencies(kernel):
    """With a psi that answers the frequencies, L_md is H(pi) exactly: the normalisation of the game's log."""
    head = EBRHead([2, 2, 2], 4, 4, (), backend=kernel)
    present = torch.rand(400, 3) < torch.tensor([0.9, 0.5, 0.2])
    frequencies = present.float().sum(0) / present.sum()
    with torch.no_grad():
        head.discriminator[0].weight.zero_()
        head.discriminator[0].bias.copy_(frequencies.log())
    out = head([torch.randn(400, 2) for _ in range(3)], present)
    entropy = -(frequencies * frequencies.log()).sum()
    assert float(out.discrimination_loss) == pytest.approx(float(entropy), rel=1e-5)
    assert float(entropy) < math.log(3)


@pytest.mark.parametrize("source_kind", ["own", "integers", "weights"])
def test_a_nan_stays_in_the_rows_that_depend_on_it(form, source_kind, seed):
    options, dtype = form
    case = draw_case(seed, dtype, m=3, batch=6, mask="all", source=source_kind, normalize=True)
    if source_kind == "integers":
        case.source.copy_(torch.tensor([1, 1, 0]).expand(6, 3))
    if source_kind == "weights":
        with torch.no_grad():
            case.source.copy_(torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [1, 0, 0.0]]).to(dtype).expand(6, 3, 3))
    with torch.no_grad():
        case.features[0][2] = float("nan")
    case.head.backend = options["backend"]
    out = case.head(case.features, source=case.source)
    depends = {"own": [0], "integers": [2], "weights": [0, 2]}[source_kind]
    if case.head.residual:
        depends = sorted({0, *depends})
    for i, r in enumerate(out.recovered):
        rows = r.isnan().any(1).nonzero().flatten().tolist()
        assert rows == ([2] if i in depends else []), f"{case.describe()}: slot {i}"
    assert out.latents.isnan().any(-1).nonzero().tolist() == [[0, 2]]


def test_gradcheck_and_double_backward_at_minus_one(monkeypatch, seed):
    """At λ = −1, which no user may pass, the reversed gradient is the ordinary one that finite differences give."""
    monkeypatch.setattr("mmc_fast.ops.ebr.reversal.check_reversal", lambda reversal, where: reversal)
    case = draw_case(seed, torch.float64, m=2, batch=3, mask="all", source="weights")
    case.normalizer = None
    head = case.head.double()
    parameters = [p.detach().requires_grad_() for p in head.parameters()]
    encoders = [parameters[0:4], parameters[4:8]]
    decoders, psi = [parameters[8:12], parameters[12:16]], parameters[16:]

    minus_one = torch.tensor(-1.0, dtype=torch.float64)

    def step(x0, x1, source, *_):
        out = functional.ebr_step(
            [x0, x1], encoders, decoders, psi, source=source, reversal=minus_one,
            residual=head.residual, normalize=head.normalize,
        )  # fmt: skip
        return (*out.recovered, out.latents, out.discrimination_loss)

    inputs = [f.detach().contiguous().requires_grad_() for f in case.features]
    weights = (case.source.detach() + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(step, (*inputs, weights, *parameters))
    assert torch.autograd.gradgradcheck(step, (*inputs, weights))


def test_double_backward_of_the_fused_op_names_the_way_out(kernel):
    head = EBRHead([3, 2], 16, 64, (6,), backend=kernel)  # wide enough that some unit is alive for any weights
    x = [torch.randn(4, d, requires_grad=True) for d in head.dims]
    (g,) = torch.autograd.grad(head(x).recovered[0].square().sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        g.square().sum().backward()
    head.backend = "reference"
    (g,) = torch.autograd.grad(head(x).recovered[0].square().sum(), x[0], create_graph=True)
    g.square().sum().backward()
    assert x[0].grad.abs().sum() > 0


@pytest.mark.parametrize("source_kind", ["own", "integers", "weights"])
@pytest.mark.parametrize("recompute", [False, True])
def test_opcheck(source_kind, recompute, kernel):
    case = draw_case(7, torch.float32, m=3, batch=5, mask="some", source=source_kind)
    head = case.head
    params = [t for e in (*head.encoders, *head.decoders) for i in (0, 2) for t in (e[i].weight, e[i].bias)]
    params += [t for layer in head.discriminator if isinstance(layer, nn.Linear) for t in (layer.weight, layer.bias)]
    torch.library.opcheck(
        torch.ops.mmc_fast.ebr_step.default,
        (case.features, case.present, case.source, torch.tensor(0.5), None, params, True, True, recompute, kernel),
    )


def test_recompute_gives_the_same_gradients_and_keeps_only_inputs(kernel, seed):
    case = draw_case(seed, torch.float32, m=3, batch=9, mask="some")
    want = actual(case, kernel)[1]
    case.head.recompute = True
    got = actual(case, kernel)[1]
    for name in want:
        assert torch.equal(want[name], got[name]), f"{case.describe()}: {name}"
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        case.head(case.features, case.present, case.source)
    inputs = [*case.features, *case.head.parameters(), case.present, case.source]
    assert sum(sizes) <= sum(t.numel() for t in inputs if t is not None) + 8


def test_compile_fullgraph_without_recompiles_for_batch_or_strength(kernel):
    head = EBRHead([6, 4], 8, 16, (5,), residual=True, backend=kernel)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head, fullgraph=True, backend=counter, dynamic=True)
    for batch, strength in [(8, 0.1), (12, 0.2), (31, 0.7)]:
        x = [torch.randn(batch, d, requires_grad=True) for d in head.dims]
        present = torch.rand(batch, 2) < 0.7
        plain = head(x, present, reversal=torch.tensor(strength))
        out = compiled(x, present, reversal=torch.tensor(strength))
        for a, b in zip([*plain.recovered, *plain[1:]], [*out.recovered, *out[1:]], strict=True):
            torch.testing.assert_close(a, b)
        leaves = [*x, *head.parameters()]
        want = torch.autograd.grad(sum(r.sum() for r in plain.recovered) + plain.discrimination_loss, leaves)
        got = torch.autograd.grad(sum(r.sum() for r in out.recovered) + out.discrimination_loss, leaves)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_autocast_returns_gradients_in_the_dtype_of_the_parameters(form):
    head = EBRHead([6, 4], 8, 16, (5,), **form[0])
    x = [torch.randn(16, d, requires_grad=True) for d in head.dims]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(x)
    assert out.recovered[0].dtype == torch.bfloat16
    assert out.discrimination_loss.dtype == torch.float32
    (out.recovered[0].float().sum() + out.discrimination_loss).backward()
    head.backend = "reference"
    truth = head.double()([f.detach().double() for f in x])
    assert head.encoders[0][0].weight.grad.dtype == torch.float64 or x[0].grad.dtype == torch.float32
    torch.testing.assert_close(out.recovered[0].double(), truth.recovered[0], rtol=0.05, atol=0.02)


def test_autocast_casts_all_together_where_casts_are_launches(monkeypatch, generator):
    """As on a GPU: one operator each way, and what one by one would give: values, gradients, and none that nobody asked for."""
    head = EBRHead([6, 70], 8, 16, (5,), backend="eager")
    head.decoders[0][0].weight.requires_grad_(False)
    first, second = torch.randn(16, 6, generator=generator), torch.randn(16, 70, generator=generator).requires_grad_()
    found, casts = [], []
    for alone in (("cpu",), ()):
        monkeypatch.setattr(functional, "_CASTS_ALONE", alone)
        head.zero_grad(), setattr(second, "grad", None)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.profiler.profile() as seen:
            out = head([first, second])
            (out.recovered[1].float().sum() + out.discrimination_loss).backward()
        found.append([*out.recovered, out.latents, second.grad, *(p.grad for p in head.parameters())])
        assert first.grad is None
        assert head.decoders[0][0].weight.grad is None
        names = [event.name for event in seen.events()]
        casts.append((names.count("aten::_foreach_copy_"), names.count("aten::_to_copy")))
    tensors = [first, second, *head.parameters()]
    assert (casts[0][0], casts[1][0]) == (0, 2)
    assert casts[0][1] - casts[1][1] == len(tensors) + sum(t.requires_grad for t in tensors), (
        "each way, none by autograd"
    )
    assert [t.requires_grad for t in cast_together([first, second], torch.bfloat16)] == [False, True]
    for a, b in zip(*found, strict=True):
        assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize(("hidden", "rounded_once"), [(64, True), (65, False)])
def test_autocast_on_a_cpu_computes_narrow_layers_in_float32(hidden, rounded_once):
    head = EBRHead([6, 64], 8, hidden, (64,))
    x = [torch.randn(40, d, requires_grad=True) for d in head.dims]
    plain = head([f.detach() for f in x])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(x)
    same = [torch.equal(a.bfloat16(), b) for a, b in zip(plain.recovered, out.recovered, strict=True)]
    assert all(same) == rounded_once
    assert torch.equal(plain.latents.bfloat16(), out.latents) == rounded_once
    assert torch.equal(plain.discrimination_loss, out.discrimination_loss) == rounded_once
    assert {r.dtype for r in (*out.recovered, out.latents)} == {torch.bfloat16}
    (sum(r.float().square().sum() for r in out.recovered) + out.discrimination_loss).backward()
    assert {t.grad.dtype for t in (*x, *head.parameters())} == {torch.float32}


def test_empty_batch(form):
    options, dtype = form
    head = EBRHead([3, 2], 4, 5, (6,), normalize=True, **options).to(dtype)
    x = [torch.zeros(0, d, dtype=dtype, requires_grad=True) for d in head.dims]
    out = head(x, torch.zeros(0, 2, dtype=torch.bool), torch.zeros(0, 2, 2, dtype=dtype))
    (sum(r.sum() for r in out.recovered) + out.discrimination_loss + out.reconstruction_loss).backward()
    assert out.latents.shape == (2, 0, 4)
    assert all(not p.grad.any() for p in head.parameters())


def test_normalizer_makes_split_batches_add_up():
    """Two halves with the global counts sum to the whole: exact means over steps and processes."""
    head = EBRHead([3, 2], 4, 5, (6,)).double()
    x = [torch.randn(10, d, dtype=torch.float64) for d in head.dims]
    present = torch.rand(10, 2) < 0.6
    whole = head(x, present)
    n = present.sum()
    parts = [head([f[s] for f in x], present[s], normalizer=n) for s in (slice(0, 3), slice(3, 10))]
    for name in ("discrimination_loss", "reconstruction_loss"):
        torch.testing.assert_close(sum(getattr(p, name) for p in parts), getattr(whole, name))


def test_bitwise_rerun(kernel, seed):
    case = draw_case(seed, torch.float32, batch=9, source="integers")
    first, second = actual(case, kernel), actual(case, kernel)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a), case.describe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": [torch.randn(4, 3)]}, "got 1 features for 2 encoders"),
        ({"features": [torch.randn(4, 3), torch.randn(4, 9)]}, r"features\[1\] has shape \[4, 9\]; expected \[4, 2\]"),
        ({"features": [torch.randn(4, 3), torch.randn(5, 2)]}, r"expected \[4, 2\]"),
        ({"features": [None, None]}, "every modality is None"),
        ({"present": torch.ones(4, 3, dtype=torch.bool)}, r"expected torch.bool \[4, 2\]"),
        ({"present": torch.ones(4, 2)}, "present is torch.float32"),
        ({"source": torch.zeros(4, 3, dtype=torch.long)}, "expected torch.int64"),
        ({"source": torch.full((4, 2), 2)}, "allowed are -1"),
        ({"source": torch.full((4, 2), -2)}, "allowed are -1"),
        ({"normalizer": torch.ones(3)}, "normalizer must be"),
        ({"reversal": -0.5}, "λ is -0.5; it must be finite and not negative"),
        ({"reversal": float("nan")}, "λ is nan"),
        ({"reversal": float("inf")}, "λ is inf"),
        ({"reversal": True}, r"λ is True \(bool\); give a number"),
        ({"reversal": "1"}, r"λ is '1' \(str\); give a number"),
        ({"reversal": torch.ones(1)}, "0-d tensor"),
        ({"reversal": nn.Parameter(torch.ones(()))}, "takes no gradient"),
        ({"reversal": torch.ones((), requires_grad=True)}, "takes no gradient"),
    ],
)
def test_bad_input_is_named(change, message, form):
    options, dtype = form
    head = EBRHead([3, 2], 4, 5, (6,), **options).to(dtype)
    arguments = {"features": [torch.randn(4, 3), torch.randn(4, 2)]} | change
    arguments["features"] = [f if f is None else f.to(dtype) for f in arguments["features"]]
    with pytest.raises(ValueError, match=message):
        head(**arguments)


def test_bad_types_and_backends_are_named():
    head = EBRHead([3, 2], 4, 5, (6,))
    x = [torch.randn(4, 3), torch.randn(4, 2)]
    with pytest.raises(TypeError, match=r"cast the model or use torch\.autocast"):
        head([f.bfloat16() for f in x])
    with pytest.raises(TypeError, match="pass floating-point features"):
        head([f.long() for f in x])
    head.backend = "cuda"
    with pytest.raises(RuntimeError, match="backend='cuda'"):
        head(x)
    head.backend = "fastest"
    with pytest.raises(ValueError, match="allowed are 'auto'"):
        head(x)


def test_grad_reverse():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = functional.grad_reverse(x, 0.25)
    assert torch.equal(y, x)
    (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    torch.testing.assert_close(g, -0.25 * x.cos())
    (gg,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(gg, -(0.25**2) * x.sin())
    with pytest.raises(ValueError, match="0-d tensor"):
        functional.grad_reverse(x, torch.ones(2))


def test_the_schema_is_the_one_frozen_as_version_1():
    from mmc_fast.ops.ebr.op import SCHEMA_VERSION

    assert SCHEMA_VERSION == 1
    call = (
        "Tensor[] features, Tensor? present, Tensor? source, Tensor reversal, Tensor? normalizer, Tensor[] params, "
        "bool residual, bool normalize, bool recompute, str backend"
    )
    assert str(torch.ops.mmc_fast.ebr_step.default._schema) == (
        f"mmc_fast::ebr_step({call}) -> (Tensor[] recovered, Tensor latents, Tensor discrimination_loss, "
        "Tensor reconstruction_loss, Tensor[] saved)"
    )
    assert str(torch.ops.mmc_fast.ebr_step_backward.default._schema) == (
        "mmc_fast::ebr_step_backward(Tensor?[] d_recovered, Tensor? d_latents, Tensor? d_discrimination, "
        f"Tensor? d_reconstruction, {call}, Tensor[] recovered, Tensor? latents, Tensor[] saved, int[] needs)"
        " -> (Tensor[] d_features, Tensor d_source, Tensor[] d_params)"
    )
    page = " ".join((Path(__file__).resolve().parents[3] / "docs" / "design.md").read_text().split())
    assert f"mmc_fast::ebr_step({call})" in page
