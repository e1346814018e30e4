"""The Triton EBR kernels with their shipped tiles in the sanitizing interpreter, against float64."""

from __future__ import annotations

import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton_guard
from ebr_oracle import Case, actual, draw_case, grouped, in_float64, sensitivity

pytest.importorskip("triton")
from mmc_fast.kernels import common
from mmc_fast.kernels.ebr import launch as ebr

from mmc_fast.nn import EBRHead
from mmc_fast.ops import dispatch as backends
from mmc_fast.ops.ebr import triton as ebr_triton

REFERENCE = "reference"
EDGES = (1, 15, 16, 17, 63, 65)
PSI = ((), (1,), (15,), (63,), (65,), (17, 33), (16, 17, 5), (3, 17, 16, 9))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Allocations hold garbage: what a kernel leaves unwritten or reads too early shows as NaN."""
    empty = torch.empty

    def garbage(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", garbage)
    monkeypatch.setattr(torch, "empty_like", lambda t: garbage(t.shape, dtype=t.dtype, device=t.device))


def random_case(seed: int, dtype: torch.dtype = torch.float32, **fixed) -> Case:
    rng = random.Random(f"triton {seed}")
    chosen = {
        "m": rng.choice([1, 2, 3]),
        "widths": EDGES,
        "hidden_dim": rng.choice(EDGES),
        "latent_dim": rng.choice([1, 3, 16, 17, 33, 65, 127]),
        "psi_dims": rng.choice(PSI),
        "batch": rng.choice([*EDGES, 127, 129]),
        "reversal": rng.choice([0.0, 1.0, 0.5, 2.0]),
    }
    return draw_case(seed, dtype, **{**chosen, **fixed})


def compare(case: Case, seed: int) -> triton_guard.Watch:
    """Errors by norm, cosine and drift in every group of results, as multiples of plain torch's."""
    eps = torch.finfo(case.features[0].dtype).eps
    if case.features[0].dtype == torch.float32 and common.input_precision() == "tf32":
        eps = 2.0**-11  # which plain torch does not round to on a CPU
    truths = grouped(*actual(in_float64(case), REFERENCE))
    plains = grouped(*actual(case, REFERENCE))
    before = backends.ran().get("ebr_step/triton", 0)
    with triton_guard.watch(seed=seed) as watch:
        gots = grouped(*actual(case, "triton"))
    assert backends.ran()["ebr_step/triton"] == before + 1
    moved = None
    for kind, truth in truths.items():
        scale = max(float(truth.norm()), 1e-2)
        error, plain = (float((v[kind] - truth).norm()) / scale for v in (gots, plains))
        allowed = 4 * plain + 64 * eps
        if not error <= allowed:  # a pre-activation at a kink may fall to either side
            moved = moved or sensitivity(case, eps)
            allowed += 4 * moved[kind]
        assert error <= allowed, f"{case.describe()}: {kind} {error:.2e}, plain torch {plain:.2e}"
        if float(truth.norm()) > 1e-6:
            cosine = float(F.cosine_similarity(gots[kind], truth, dim=0))
            assert cosine > 1 - max(allowed, 1e-6), f"{case.describe()}: {kind} turns by 1 - {1 - cosine:.1e}"
        drift = float(((gots[kind] - truth) * truth.sign()).sum()) / max(float(truth.abs().sum()), 1e-2)
        assert abs(drift) <= allowed, f"{case.describe()}: {kind} drifts by {drift:.1e}"
    return watch


ONES = {"m": 2, "widths": (1,), "hidden_dim": 1, "latent_dim": 1, "psi_dims": (1,), "batch": 5}
MANY = {"m": 8, "widths": (1, 3, 17), "hidden_dim": 9, "latent_dim": 5, "batch": 17}
MASKED = {"m": 3, "batch": 33, "mask": "some"}
CASES = {
    "tall": {"m": 3, "batch": 129, "mask": "some"},
    "wide": {"m": 2, "latent_dim": 131, "hidden_dim": 66, "psi_dims": (70, 40), "batch": 33, "widths": (65, 74)},
    "drawn 1": {},
    "drawn 2": {},
    "all widths 1": ONES,
    "eight modalities": MANY,
    "blocks of units": {"m": 2, "psi_dims": (9, 193), "latent_dim": 17, "hidden_dim": 9, "batch": 33},
    "no hidden layer": {"m": 2, "psi_dims": (), "latent_dim": 150, "hidden_dim": 9, "batch": 33},
    "integers": {**MASKED, "source": "integers"},
    "weights": {**MASKED, "source": "weights"},
    "even, one share": {
        "m": 3,
        "widths": (16, 32),
        "hidden_dim": 256,
        "latent_dim": 48,
        "psi_dims": (32,),
        "batch": 70,
    },
    "eight with weights": {**MANY, "source": "weights", "mask": "some"},
}


@pytest.mark.parametrize("name", CASES)
def test_float32_against_float64(seed, name):
    launches = compare(random_case(seed + len(name), **CASES[name]), seed).launches
    assert len(launches) <= 10 + 13


@pytest.mark.parametrize("widths", [(16, 32), (15, 33)])
def test_shares_of_rows_are_folded(seed, widths, monkeypatch):
    monkeypatch.setattr(ebr, "_SHARE", 32)
    monkeypatch.setattr(ebr, "_PSI_SHARE", 64)
    sizes = {"hidden_dim": 32, "latent_dim": 16, "psi_dims": (16, 48), "batch": 150}
    watch = compare(random_case(seed, m=2, widths=widths, mask="some", **sizes), seed)
    assert watch.launches[-1].name == "ebr_fold_kernel"


@pytest.mark.parametrize("name", ["drawn 1", "all widths 1", "integers", "weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_against_float64(seed, name, dtype):
    compare(random_case(seed, dtype, **CASES[name]), seed)


@pytest.mark.parametrize("name", ["drawn 1", "weights"])
def test_tf32_against_float64(seed, name):
    torch.set_float32_matmul_precision("high")
    try:
        watch = compare(random_case(seed, **CASES[name]), seed)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert any("fp32:tf32" in launch.dot_flops for launch in watch.launches)


def small_call(seed: int, m: int = 2, batch: int = 18):
    generator = torch.Generator().manual_seed(seed)
    head = EBRHead([20, 9, 17][:m], latent_dim=18, hidden_dim=12, psi_dims=(12,), backend="triton")
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return head, [torch.randn(batch, d, generator=generator).requires_grad_() for d in head.dims]


def gradients(head: EBRHead, features, **call) -> list[torch.Tensor]:
    out = head(features, **call)
    loss = sum(r.square().sum() for r in out.recovered) + out.discrimination_loss + out.reconstruction_loss
    return torch.autograd.grad(loss, [*features, *head.parameters()])


def test_every_step_repeats_every_bit_and_leaves_nothing_behind(seed, monkeypatch):
    """Programs in another order; no tensor but the results outlives a call."""
    head, features = small_call(seed, batch=70)
    made: list[weakref.ref] = []
    for name in ("empty", "zeros", "empty_like"):
        original = getattr(torch, name)

        def remembered(*args, original=original, **kwargs):
            out = original(*args, **kwargs)
            made.append(weakref.ref(out))
            return out

        monkeypatch.setattr(torch, name, remembered)
    runs = []
    for order in range(2):
        with triton_guard.watch(seed=order) as watch:
            runs.append([g.numpy().copy() for g in gradients(head, features)])
    monkeypatch.undo()
    assert all(np.array_equal(one, two) for one, two in zip(*runs, strict=True))
    assert all(launch.atomics == 0 for launch in watch.launches)
    assert len(made) > 20
    assert not [ref for ref in made if ref() is not None]


def test_lambda_is_read_from_the_device_and_zero_cuts(seed):
    head, features = small_call(seed)
    lambda_ = torch.tensor(0.0)

    def encoder_grads(value: float) -> list[torch.Tensor]:
        lambda_.fill_(value)
        loss = head(features, reversal=lambda_).discrimination_loss
        return torch.autograd.grad(loss, [head.encoders[0][0].weight, head.discriminator[0].weight])

    base, psi = encoder_grads(1.0)
    assert base.norm() > 0
    doubled, psi_doubled = encoder_grads(2.0)
    torch.testing.assert_close(doubled, 2 * base, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(psi_doubled, psi, rtol=1e-5, atol=1e-7)
    assert torch.equal(encoder_grads(0.0)[0], torch.zeros_like(base))
    with torch.no_grad():  # an infinite weight of the discriminator must not become 0 * inf
        head.discriminator[2].weight[0, 0] = float("inf")
    assert torch.equal(encoder_grads(0.0)[0], torch.zeros_like(base))


def test_a_nan_reaches_its_row_and_no_other(seed):
    head, features = small_call(seed, m=3)
    with torch.no_grad():
        features[1][7, 3] = float("nan")
        out = head(features)
    assert [torch.isnan(r).any(1).nonzero().flatten().tolist() for r in out.recovered] == [[], [7], []]
    assert torch.isnan(out.discrimination_loss)
    psi = torch.autograd.grad(head(features).recovered[0].sum(), head.discriminator[0].weight, allow_unused=True)[0]
    assert psi is None or torch.equal(psi, torch.zeros_like(psi)), "no loss, no gradient: not even NaN"


def test_recompute_and_no_grad_and_an_empty_batch(seed):
    head, features = small_call(seed)
    kept = gradients(head, features)
    with torch.no_grad():
        silent = head(features)
    loud = head(features)
    assert torch.equal(silent.latents, loud.latents)
    assert torch.equal(silent.discrimination_loss, loud.discrimination_loss)
    head.recompute = True
    for one, two in zip(kept, gradients(head, features), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    none = [f.detach()[:0].requires_grad_() for f in features]
    out = head(none)
    assert out.discrimination_loss == out.reconstruction_loss == 0
    assert all(torch.equal(p, torch.zeros_like(p)) for p in gradients(head, none)[2:])


def test_the_operator_keeps_its_contract(seed):
    head, features = small_call(seed)
    params = [p.detach().requires_grad_() for p in head.parameters()]
    args = (features, None, None, torch.tensor(0.5), None, params, True, True, False, "triton")
    torch.library.opcheck(torch.ops.mmc_fast.ebr_step.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("source", ["own", "integers", "weights"])
def test_no_number_of_a_step_is_read_by_the_host(seed, source, monkeypatch):
    """What a CUDA graph needs: sizes come from shapes; λ and the denominators stay tensors."""
    case = random_case(seed, m=2, batch=17, mask="some", source=source, reversal=1.0)
    monkeypatch.setattr(ebr_triton, "check_source_range", lambda *args: None)  # on the CPU alone
    monkeypatch.setattr(common, "launch", lambda *args, **options: None)  # an interpreted launch would read tensors

    def refuse(self, *args):
        raise AssertionError("the host reads a tensor of the step")

    def watched(function):
        def call(*args, **kwargs):
            with pytest.MonkeyPatch.context() as patch:
                for name in (
                    "item",
                    "tolist",
                    "cpu",
                    "numpy",
                    "nonzero",
                    "__bool__",
                    "__int__",
                    "__float__",
                    "__index__",
                ):
                    patch.setattr(torch.Tensor, name, refuse)
                return function(*args, **kwargs)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(ebr, name, watched(getattr(ebr, name)))
    actual(case, "triton")


@pytest.mark.parametrize("what", ["present", "features"])
def test_offsets_past_32_bits(seed, what, monkeypatch):
    """A row of the mask, or of the features, lies more than 2³¹ elements past the first. The gap is never touched."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)  # it copies whole storages
    head, features = small_call(seed)
    head.half()
    rows = [f.detach()[:2].half() for f in features]
    wanted = [r.clone().requires_grad_() for r in rows]
    present = torch.tensor([[True, False], [True, True]])
    truth = head(wanted, present=present.clone())
    space = torch.from_numpy(np.zeros(2**31 + 64, np.bool_ if what == "present" else np.float16))
    if what == "present":
        present = space.as_strided((2, 2), (2**31 + 32, 1)).copy_(present)
    else:
        rows[0] = space.as_strided(rows[0].shape, (2**31 + 16, 1)).copy_(rows[0])
    given = [r.requires_grad_() for r in rows]
    got = head(given, present=present)
    torch.testing.assert_close(got.latents, truth.latents)
    torch.testing.assert_close(got.recovered, truth.recovered)
    sums = [sum(r.float().sum() for r in out.recovered) + out.discrimination_loss for out in (truth, got)]
    for one, two in zip(torch.autograd.grad(sums[0], wanted), torch.autograd.grad(sums[1], given), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("asked", ["features", "source", "parameters"])
def test_gradients_that_nobody_asks_for_cost_nothing(seed, asked):
    case = random_case(seed, m=2, batch=33, source="weights", mask="some", reversal=0.5)
    groups = {"features": case.features, "source": [case.source], "parameters": list(case.head.parameters())}
    everything = [t for group in groups.values() for t in group]
    case.head.backend = "triton"

    def run(wanted: list[torch.Tensor]):
        for tensor in everything:
            tensor.requires_grad_(any(tensor is one for one in wanted))
        with triton_guard.watch(seed) as watch:
            out = case.head(case.features, case.present, case.source, case.reversal, case.normalizer)
            loss = sum(r.square().sum() for r in out.recovered) + out.discrimination_loss + out.reconstruction_loss
            forward = len(watch.launches)
            return torch.autograd.grad(loss, wanted), watch.launches[forward:]

    full, most = run(everything)
    some, launches = run(groups[asked])
    expected = [g for t, g in zip(everything, full, strict=True) if any(t is one for one in groups[asked])]
    for got, truth in zip(some, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max() + 1))

    names = [launch.name for launch in launches]
    assert ("ebr_fold_kernel" in names) == (asked == "parameters")
    assert ("ebr_source_grad_kernel" in names) == (asked == "source")
    products = [sum(sum(launch.dot_flops.values()) for launch in found) for found in (launches, most)]
    assert products[0] < (1.0 if asked == "parameters" else 0.55) * products[1]
    assert len(launches) < len(most)


def test_gradients_arrive_in_any_layout(seed):
    head, features = small_call(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    cotangents = [normal(20, 18).t(), normal(1, 1).expand(18, 9), normal(18, 2, 18).permute(1, 2, 0)]
    results = []
    for given in (cotangents, [c.contiguous() for c in cotangents]):
        with triton_guard.watch(seed):
            out = head(features)
            wanted = [*features, head.encoders[0][0].weight]
            results.append(torch.autograd.grad([*out.recovered, out.latents], wanted, given))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_losses_of_more_programs_than_one_sum_holds(seed):
    """The sums of all programs are added 256 at a time."""
    generator = torch.Generator().manual_seed(seed)
    head = EBRHead([3, 5], latent_dim=4, hidden_dim=6, psi_dims=(), backend="triton")
    features = [torch.randn(4200, d, generator=generator) for d in head.dims]
    present = torch.rand(4200, 2, generator=generator) < 0.8
    losses = []
    with torch.no_grad(), triton_guard.watch(seed) as watch:
        for head.backend in ("triton", REFERENCE):
            out = head(features, present)
            losses.append((out.discrimination_loss, out.reconstruction_loss))
    assert watch.launches[-2].programs > 256
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_a_latent_of_weight_zero_adds_nothing_to_the_gradient_of_its_weight(seed):
    head, features = small_call(seed, m=3)
    with torch.no_grad():
        features[1][7, 3] = float("nan")
    weights = torch.eye(3).repeat(18, 1, 1)
    weights[:, 0, 2] = 0.5
    results = []
    for head.backend in ("triton", REFERENCE):
        source = weights.clone().requires_grad_()
        out = head(features, source=source)
        results.append(torch.autograd.grad(out.recovered[0].square().sum(), source)[0])
    assert torch.isfinite(results[0][7, 0]).all()
    torch.testing.assert_close(results[0][:, 0], results[1][:, 0], rtol=1e-4, atol=1e-5)


def test_launches_do_not_depend_on_the_number_of_modalities(seed):
    for m in (1, 2, 8, 17):
        dims = [7, 5] * (m // 2) + [3] * (m % 2)
        head = EBRHead(dims, latent_dim=16, hidden_dim=9, psi_dims=(9, 7), backend="triton")
        features = [torch.ones(17, d, requires_grad=True) for d in head.dims]
        with triton_guard.watch(seed, sample=1) as watch:  # one program of each launch: what is launched, no numbers
            out = head(features)
            sum([*(r.sum() for r in out.recovered), out.discrimination_loss, out.reconstruction_loss]).backward()
        names = [launch.name for launch in watch.launches]
        forward = ["table", "pack", *["fwd"] * 4, "loss", "finish"]
        backward = ["table", "pack", "output_grad", *["bwd"] * 4, "fold"]
        assert names == [f"ebr_{name}_kernel" for name in forward + backward], f"{m} modalities"
