"""What the tests of the Triton EBR kernels share: drawn cases, a comparison with float64, a small call."""

from __future__ import annotations

import random
from unittest import mock

import torch
import torch.nn.functional as F
import triton_guard
from ebr_oracle import Case, actual, draw_case, grouped, in_float64, sensitivity
from mmc_fast.kernels.ebr import narrow_launch as ebr_narrow_launch

from mmc_fast.nn import EBRHead
from mmc_fast.ops import dispatch as backends

EDGES = (1, 15, 16, 17, 63, 65)
NARROW_PSI = ((), (15,), (17,), (63,))
WIDE_PSI = ((), (65,), (17, 33), (16, 17, 5), (3, 17, 16, 9))


def poison(monkeypatch) -> None:
    """Allocations hold garbage: what a kernel leaves unwritten or reads too early shows as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda t: poisoned(t.shape, dtype=t.dtype, device=t.device))


def random_case(seed: int, psi: tuple, dtype: torch.dtype = torch.float32, **fixed) -> Case:
    rng = random.Random(f"triton {seed}")
    chosen = {
        "m": rng.choice([1, 2, 3]),
        "widths": EDGES,
        "hidden_dim": rng.choice(EDGES),
        "latent_dim": rng.choice([16, 17, 33, 63, 65, 127]),
        "psi_dims": rng.choice(psi),
        "batch": rng.choice([*EDGES, 127, 129]),
        "reversal": rng.choice([0.0, 1.0, 0.5, 2.0]),
    }
    return draw_case(seed, dtype, **{**chosen, **fixed})


def compare(case: Case, seed: int, slices: int | None = None) -> triton_guard.Watch:
    """Errors by norm, cosine and drift in every group of results, as multiples of plain torch's."""
    eps = torch.finfo(case.features[0].dtype).eps
    if case.features[0].dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        eps = 2.0**-11  # TF32, which plain torch does not round to on a CPU
    truths = grouped(*actual(in_float64(case), "reference"))
    plains = grouped(*actual(case, "reference"))
    before = backends.ran().get("ebr_step/triton", 0)
    slices = slices or random.Random(seed).choice((1, 3, 128))  # narrow backward: one or more tiles of rows to a slice
    with triton_guard.watch(seed=seed) as watch, mock.patch.object(ebr_narrow_launch, "_SLICES", slices):
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


def small_call(seed: int, m: int = 2, batch: int = 18):
    generator = torch.Generator().manual_seed(seed)
    head = EBRHead([20, 9, 17][:m], latent_dim=18, hidden_dim=12, psi_dims=(12,), backend="triton")
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    features = [torch.randn(batch, d, generator=generator).requires_grad_() for d in head.dims]
    return head, features


def gradients(head: EBRHead, features, **call) -> list[torch.Tensor]:
    out = head(features, **call)
    loss = sum(r.square().sum() for r in out.recovered) + out.discrimination_loss + out.reconstruction_loss
    return torch.autograd.grad(loss, [*features, *head.parameters()])
