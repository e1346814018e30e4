"""An EBR step written row by row from its contract, with nothing shared with the package, and random cases for it."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmc_fast.nn import EBRHead
from mmc_fast.ops.dispatch import explain

BACKENDS = ("cpp", "eager", "reference")
GROUPS = ("features", "encoders", "decoders", "discriminator", "source")
NO_NATIVE = "".join(row.reason for row in explain("ebr_step") if row.backend == "cpp" and not row.usable)


@dataclass
class Case:
    """One configuration and its inputs; ``describe()`` is the line that reproduces it."""

    seed: int
    head: EBRHead
    features: list[Tensor]
    present: Tensor | None
    source: Tensor | None
    reversal: float
    normalizer: Tensor | None
    cotangents: dict = field(default_factory=dict)

    def describe(self) -> str:
        kind = "none" if self.source is None else ("weights" if self.source.is_floating_point() else "integers")
        return (
            f"draw_case(seed={self.seed}): dims={self.head.dims} batch={self.features[0].shape[0]} "
            f"present={'all' if self.present is None else 'mask'} source={kind} reversal={self.reversal} "
            f"residual={self.head.residual} normalize={self.head.normalize}"
        )


def draw_case(seed: int, dtype: torch.dtype = torch.float64, **fixed) -> Case:
    """A random configuration; ``fixed`` overrides drawn options by name."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    m = fixed.get("m", rng.randint(1, 7))
    dims = [rng.choice(fixed.get("widths", [1, 2, 3, 7, 16, 33])) for _ in range(m)]
    options = {
        "latent_dim": rng.choice([2, 5, 16]),
        "hidden_dim": rng.choice([1, 4, 17]),
        "psi_dims": rng.choice([(), (3,), (8, 5)]),
        "residual": rng.random() < 0.5,
        "normalize": rng.random() < 0.5,
    }
    options |= {k: v for k, v in fixed.items() if k in options}
    if options["normalize"] and dtype != torch.float64:
        # The gradient of a layer norm over two values cancels to almost nothing: no measure of precision.
        options["latent_dim"] = max(16, options["latent_dim"])
    head = EBRHead(dims, **options)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) / p.shape[-1] ** 0.5)
    head.to(dtype)
    batch = fixed.get("batch", rng.choice([1, 2, 5, 9]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    features = [_layout(normal(batch, d), rng).requires_grad_() for d in dims]
    kind = fixed.get("mask", rng.choice(["all", "some", "some", "none", "column"]))
    present = None
    if kind != "all":
        present = torch.rand(batch, m, generator=gen) < (0.6 if kind != "none" else -1.0)
        if kind == "column":
            present[:, rng.randrange(m)] = False
        for i in range(m):
            with torch.no_grad():
                features[i][~present[:, i]] = float("nan")
    sources = {
        "own": None,
        "integers": torch.randint(-1, m, (batch, m), generator=gen),
        "weights": normal(batch, m, m) * (torch.rand(batch, m, m, generator=gen) < 0.7),
    }
    source = sources[fixed.get("source", rng.choice(list(sources)))]
    if source is not None and source.is_floating_point():
        source.requires_grad_()
    case = Case(
        seed,
        head,
        features,
        present,
        source,
        fixed.get("reversal", rng.choice([0.0, 1.0, 0.3, 1e4])),
        rng.choice([None, None, torch.tensor(7.0), torch.tensor([5.0, 3.0])]),
    )
    case.cotangents = {
        "recovered": [normal(batch, d) for d in dims],
        "latents": normal(m, batch, head.latent_dim),
        "discrimination": 1.7,
        "reconstruction": 0.6,
    }
    return case


def _layout(x: Tensor, rng: random.Random) -> Tensor:
    """The same values in another memory layout: contiguous, transposed, sliced with offset."""
    kind = rng.choice(["contiguous", "transposed", "sliced"])
    if kind == "transposed":
        return x.t().contiguous().t()
    if kind == "sliced":
        wide = torch.zeros(x.shape[0] + 1, 2 * x.shape[1] + 1, dtype=x.dtype)
        wide[1:, 1::2] = x
        return wide[1:, 1::2].detach()
    return x.detach()


def row_by_row(case: Case, head: EBRHead, features: list[Tensor], source: Tensor | None):
    """(recovered, latents, L_md, L_rec) of the contract; no reversal: L_md is returned as a plain loss."""
    m, batch = len(features), features[0].shape[0]
    k, dtype = head.latent_dim, features[0].dtype
    present = torch.ones(batch, m, dtype=torch.bool) if case.present is None else case.present
    latents = [[torch.zeros(k, dtype=dtype) for _ in range(batch)] for _ in range(m)]
    recovered = [[torch.zeros(d, dtype=dtype) for _ in range(batch)] for d in head.dims]
    l_md = torch.zeros((), dtype=dtype)
    l_rec = torch.zeros((), dtype=dtype)
    n_present = n_rows = 0
    for b in range(batch):
        for i in range(m):
            if present[b, i]:
                g = head.encoders[i](features[i][b])
                if head.normalize:
                    g = (g - g.mean()) / torch.sqrt(g.var(unbiased=False) + 1e-5)
                latents[i][b] = g
                l_md = l_md + F.cross_entropy(head.discriminator(g), torch.tensor(i))
                n_present += 1
        for i in range(m):
            weight = {}
            for j in range(m):
                if source is None:
                    w = float(i == j)
                elif source.is_floating_point():
                    w = source[b, i, j]
                else:
                    w = float(int(source[b, i]) == j)
                if present[b, j]:
                    weight[j] = w
            if any(w != 0 for w in weight.values()):
                decoded = head.decoders[i](sum(w * latents[j][b] for j, w in weight.items()))
                recovered[i][b] = decoded
                if present[b, i]:
                    l_rec = l_rec + ((decoded - features[i][b].detach()) ** 2).sum() / head.dims[i]
                    n_rows += 1
            if head.residual and present[b, i]:
                recovered[i][b] = features[i][b] + recovered[i][b]
    n_md, n_rec = max(1, n_present), max(1, n_rows)
    if case.normalizer is not None:
        flat = case.normalizer.flatten().tolist()
        n_md, n_rec = flat[0], flat[-1]
    stacked = torch.stack([torch.stack(rows) for rows in latents])
    return [torch.stack(rows) for rows in recovered], stacked, l_md / n_md, l_rec / n_rec


def expected(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and gradients of the row-by-row version in float64, the reversal by two separate losses."""
    head = copy.deepcopy(case.head).double()
    features = [f.detach().double().requires_grad_() for f in case.features]
    source = case.source
    if source is not None and source.is_floating_point():
        source = source.detach().double().requires_grad_()
    recovered, latents, l_md, l_rec = row_by_row(case, head, features, source)
    c = case.cotangents
    task = sum((r * t).sum() for r, t in zip(recovered, c["recovered"], strict=True))
    task = task + (latents * c["latents"]).sum() + c["reconstruction"] * l_rec
    named = {f"features.{i}": f for i, f in enumerate(features)} | dict(head.named_parameters())
    if source is not None and source.is_floating_point():
        named["source"] = source
    g_task = _grads(task, named)
    g_md = _grads(c["discrimination"] * l_md, named)
    gradients = {
        name: g_task[name] + (1.0 if name.startswith("discriminator") else -case.reversal) * g_md[name]
        for name in named
    }
    values = {f"recovered.{i}": r for i, r in enumerate(recovered)} | {"latents": latents, "l_md": l_md, "l_rec": l_rec}
    return {k: v.detach() for k, v in values.items()}, gradients


def actual(case: Case, name: str, reversal=None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and gradients of ``EBRHead`` with this backend."""
    head = case.head
    if name == "cpp" and NO_NATIVE:
        pytest.skip(f"no native EBR step: {NO_NATIVE}")
    head.backend = name
    out = head(
        case.features, case.present, case.source, case.reversal if reversal is None else reversal, case.normalizer
    )
    c = case.cotangents
    loss = sum((r * t).sum() for r, t in zip(out.recovered, c["recovered"], strict=True))
    loss = loss + (out.latents * c["latents"]).sum()
    loss = loss + c["discrimination"] * out.discrimination_loss + c["reconstruction"] * out.reconstruction_loss
    named = {f"features.{i}": f for i, f in enumerate(case.features)} | dict(head.named_parameters())
    if case.source is not None and case.source.is_floating_point():
        named["source"] = case.source
    values = {f"recovered.{i}": r.detach() for i, r in enumerate(out.recovered)} | {
        "latents": out.latents.detach(),
        "l_md": out.discrimination_loss.detach(),
        "l_rec": out.reconstruction_loss.detach(),
    }
    return values, _grads(loss, named)


def _grads(loss: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    if not loss.requires_grad:
        return {name: torch.zeros_like(t) for name, t in named.items()}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(named.items(), grads, strict=True)}


def in_float64(case: Case) -> Case:
    """The same numbers in float64, for the reference."""
    wide = copy.deepcopy(case)
    wide.head.double()
    wide.features = [f.detach().double().requires_grad_() for f in case.features]
    if case.source is not None and case.source.is_floating_point():
        wide.source = case.source.detach().double().requires_grad_()
    return wide


def grouped(values: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results of a kind as one vector: a single number may cancel to nothing, a group seldom does."""
    named = {**values, **{f"gradients of {name}": g for name, g in gradients.items()}}
    kinds = ["recovered", "latents", "l_md", "l_rec", *(f"gradients of {group}" for group in GROUPS)]
    parts = {kind: [v.double().flatten() for name, v in named.items() if name.startswith(kind)] for kind in kinds}
    return {kind: torch.cat(part) for kind, part in parts.items() if part}


def sensitivity(case: Case, eps: float | None = None) -> dict[str, float]:
    """How far the float64 results move when weights and features move by 32 eps: a pre-activation at the kink of a
    ReLU makes a gradient jump, and no arithmetic of this precision can know to which side."""
    eps = eps or torch.finfo(case.features[0].dtype).eps
    generator = torch.Generator().manual_seed(case.seed)
    truths, moved = grouped(*actual(in_float64(case), "reference")), {}
    for _ in range(8):
        other = in_float64(case)
        with torch.no_grad():
            for t in (*other.head.parameters(), *other.features):
                t.mul_(1 + 32 * eps * torch.randn(t.shape, generator=generator, dtype=torch.float64))
        for kind, value in grouped(*actual(other, "reference")).items():
            scale = max(float(truths[kind].norm()), 1e-2)
            moved[kind] = max(moved.get(kind, 0.0), float((value - truths[kind]).norm()) / scale)
    return moved
