"""The Triton EBR kernels where little room is left: what nobody asks for, odd layouts, many programs, weights of zero."""

from __future__ import annotations

import pytest
import torch
import triton_guard
from ebr_oracle import Case

pytest.importorskip("triton")
from mmc_fast.kernels import common as configs
from triton_cases import NARROW_PSI, gradients, poison, random_case, small_call

from mmc_fast.nn import EBRHead


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    poison(monkeypatch)


def test_rows_and_weights_apart_are_what_they_are_together(seed, monkeypatch):
    """In TF32 they are apart; the sums are then cleared by the rows."""
    case = random_case(seed, NARROW_PSI, m=2, latent_dim=33, batch=33, source="weights", mask="some", reversal=0.5)
    everything = [*case.features, case.source, *case.head.parameters()]
    tile = configs.ebr_narrow_tile(torch.float32, "backward", "tf32", 64, d_source=True)
    assert tile.weights is not None
    assert configs.ebr_narrow_tile(torch.float32, "backward", "ieee", 64).weights is None
    key = ("ieee", "backward of a source")
    monkeypatch.setitem(configs.EBR_NARROW, key, tile._replace(weights=None))
    together, usual = gradients_of(case, everything, seed)
    monkeypatch.setitem(configs.EBR_NARROW, key, tile)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            apart, launches = gradients_of(case, everything, seed)
        finally:
            torch.use_deterministic_algorithms(False)
        assert [launch.name for launch in launches] == [launch.name for launch in (usual[0], *usual)]
        assert sum(sum(launch.dot_flops.values()) for launch in launches) == sum(usual[0].dot_flops.values())
        for one, two in zip(together, apart, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max() + 1))


def gradients_of(case: Case, asked: list[torch.Tensor], seed: int) -> tuple[list[torch.Tensor], list]:
    """Gradients of ``asked``, all else taken for constant, and the launches of backward."""
    tensors = [*case.features, case.source, *case.head.parameters()]
    for tensor in tensors:
        tensor.requires_grad_(any(tensor is one for one in asked))
    case.head.backend, c = "triton", case.cotangents
    with triton_guard.watch(seed) as watch:
        out = case.head(case.features, case.present, case.source, case.reversal, case.normalizer)
        loss = sum((r * t).sum() for r, t in zip(out.recovered, c["recovered"], strict=True))
        loss = loss + (out.latents * c["latents"]).sum() + 1.7 * out.discrimination_loss + out.reconstruction_loss
        forward = len(watch.launches)
        got = torch.autograd.grad(loss, asked, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(asked, got, strict=True)], watch.launches[forward:]


@pytest.mark.parametrize("asked", ["features", "one feature", "source", "parameters", "one parameter"])
def test_gradients_that_nobody_asks_for_cost_nothing(seed, path, asked):
    case = random_case(seed, NARROW_PSI, m=2, batch=33, source="weights", mask="some", reversal=0.5)
    parameters = list(case.head.parameters())
    wanted = {
        "features": case.features,
        "one feature": case.features[1:],
        "source": [case.source],
        "parameters": parameters,
        "one parameter": parameters[2:3],
    }[asked]
    everything = [*case.features, case.source, *parameters]
    full, most = gradients_of(case, everything, seed)
    some, launches = gradients_of(case, list(wanted), seed)
    expected = [g for t, g in zip(everything, full, strict=True) if any(t is one for one in wanted)]
    for got, truth in zip(some, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max() + 1))

    def written(found: list, *names: str) -> int:
        return sum(n[1] for launch in found for name, n in launch.arguments.items() if name.split("[")[0] in names)

    sums = ("slabs", "out") if path == "narrow" else ("d_w", "d_b", "d_last_w", "d_last_b")
    assert written(most, *sums) > 0
    assert (written(launches, *sums) > 0) == ("parameter" in asked)
    assert (written(launches, "d_source") > 0) == (asked == "source")
    if path == "narrow":
        assert len(launches) == (2 if "parameter" in asked else 1)
        assert len(most) == 2
        assert (written(launches, "d_x") > 0) == ("feature" in asked)
    else:
        assert len(launches) < len(most)
    assert sum(launch.written_bytes for launch in launches) < sum(launch.written_bytes for launch in most)


def test_gradients_arrive_in_any_layout(seed, path):
    head, features = small_call(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    cotangents = [normal(20, 18).t(), normal(1, 1).expand(18, 9), normal(18, 2, 18).permute(1, 2, 0)]
    assert not any(c.is_contiguous() for c in cotangents)
    results = []
    for given in (cotangents, [c.contiguous() for c in cotangents]):
        with triton_guard.watch(seed):
            out = head(features)
            results.append(
                torch.autograd.grad([*out.recovered, out.latents], [*features, head.encoders[0][0].weight], given)
            )
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_losses_of_more_programs_than_one_sum_holds(seed, path):
    """The last program adds the sums of all others 128 at a time."""
    generator = torch.Generator().manual_seed(seed)
    head = EBRHead([3, 5], latent_dim=4, hidden_dim=6, psi_dims=(), backend="triton")
    features = [torch.randn(1050, d, generator=generator) for d in head.dims]
    present = torch.rand(1050, 2, generator=generator) < 0.8
    losses = []
    with torch.no_grad(), triton_guard.watch(seed) as watch:
        for head.backend in ("triton", "eager"):
            out = head(features, present)
            losses.append((out.discrimination_loss, out.reconstruction_loss))
    assert watch.launches[-1].programs > 128
    for one, two in zip(*losses, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_a_latent_of_weight_zero_adds_nothing_to_the_gradient_of_its_weight(seed, path):
    head, features = small_call(seed, m=3)
    with torch.no_grad():
        features[1][7, 3] = float("nan")
    weights = torch.eye(3).repeat(18, 1, 1)
    weights[:, 0, 2] = 0.5
    results = []
    for head.backend in ("triton", "eager"):
        source = weights.clone().requires_grad_()
        out = head(features, source=source)
        results.append(torch.autograd.grad(out.recovered[0].square().sum(), source)[0])
    assert torch.isfinite(results[0][7, 0]).all()
    torch.testing.assert_close(results[0][:, 0], results[1][:, 0], rtol=1e-4, atol=1e-5)


def test_a_slot_that_points_to_an_absent_latent_is_empty(seed, path):
    head, features = small_call(seed, m=3)
    present = torch.ones(18, 3, dtype=torch.bool)
    present[:, 1] = False
    present[3:9] = False
    source = torch.tensor([1, 2, 2]).repeat(18, 1)  # slot 0 decodes a latent that is nowhere
    with triton_guard.watch(seed):
        out = head(features, present, source)
    assert torch.equal(out.recovered[0], torch.where(present[:, :1] & head.residual, features[0], 0.0))
    assert out.recovered[1][0].abs().sum() > 0
    assert torch.equal(out.recovered[1][3:9], torch.zeros(6, head.dims[1]))
    grads = gradients(head, features, present=present, source=source)
    assert torch.equal(grads[1], torch.zeros_like(features[1]))
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(
    ("latent", "psi", "forward", "backward"),
    [
        (16, (9,), ["ebr_narrow_fwd_kernel"], ["ebr_narrow_bwd_kernel", "ebr_narrow_finish_kernel"]),
        (144, (9, 7), ["ebr_wide_fwd_kernel"] * 4 + ["ebr_wide_loss_kernel"], ["ebr_wide_bwd_kernel"] * 4),
    ],
    ids=["narrow", "wide"],
)
def test_launches_do_not_depend_on_the_number_of_modalities(seed, latent, psi, forward, backward):
    for m in (1, 2, 4, 8, 17):
        head = EBRHead(
            [7, 5] * (m // 2) + [3] * (m % 2), latent_dim=latent, hidden_dim=9, psi_dims=psi, backend="triton"
        )
        features = [torch.ones(17, d, requires_grad=True) for d in head.dims]
        with triton_guard.watch(seed, sample=1) as watch:  # one program of each launch: what is launched, no numbers
            out = head(features)
            first = len(watch.launches)
            sum([*(r.sum() for r in out.recovered), out.discrimination_loss, out.reconstruction_loss]).backward()
        names = [launch.name for launch in watch.launches]
        assert names[:first] == forward, f"{m} modalities"
        assert names[first:] == backward, f"{m} modalities"
