"""Figures of the adversarial training: gradients of both sides, what a post-hoc probe finds, what λ changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from mmc_fast._util.seeds import generator, seeded_init

from ..data import Part
from .model import MultimodalModel
from .parts import stream_rows
from .processes import Processes

__all__ = ["fresh_discriminator", "judge_rows", "parameter_distance", "probe"]

_FRESH_EPOCHS, _FRESH_PATIENCE, _FRESH_ROWS = 200, 8, 4096
_FRESH_STEPS = 16  # at least so many in an epoch, so that small data sets do not stop it too early
# Nats by which the stopping loss must fall to count: a perfect discriminator would otherwise sharpen for ever.
_FRESH_PROGRESS = 1e-3


def _norm(gradients: Iterable[Tensor | None]) -> float:
    squares = [g.double().square().sum() for g in gradients if g is not None]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0


def probe(
    model: MultimodalModel, part: Part, reversal: float, processes: Processes | None = None
) -> dict[str, float | None]:
    """Gradient norms of psi and encoders under ``L_md`` and the accuracy of psi, on the rows of ``part``.

    "grad_norm_psi": of d L_md / d psi. "grad_norm_encoders": of the reversed gradient ``-lambda d L_md / d (f, h)``
    that the encoders receive; exactly 0 at lambda 0. "psi_accuracy": over present (row, modality) pairs, None where
    there is none. The processes of ``processes`` share the rows.
    """
    if model.head is None:
        raise RuntimeError("probe: this model has no EBR heads, so there is nothing to probe")
    processes = processes or Processes()
    groups = model.groups()
    parameters = groups["discriminator"] + groups["encoders"]
    pairs, normalizer = model.head_present(part.present).sum().double(), None
    if processes.size > 1:
        mine = processes.rows(len(part))
        part = Part([x[mine] for x in part.features], part.present[mine], part.labels[mine], part.index[mine])
        normalizer = pairs.float()
    present = None if bool(part.present.all()) else part.present
    out = model.apply_head(model.encode(part.features, present), present, None, reversal, normalizer)
    gradients: Sequence[Tensor | None] = torch.autograd.grad(out.discrimination_loss, parameters, allow_unused=True)
    with torch.no_grad():
        guess = model.head.discriminator(out.latents).argmax(-1)  # [h, B]
        truth = torch.arange(guess.shape[0], device=guess.device)[:, None]
        here = model.head_present(part.present).t()
        right = (guess == truth)[here].double().sum()
    if processes.size > 1:
        gradients, right = _over_processes(gradients, parameters, right, processes)
    n = len(groups["discriminator"])
    return {
        "grad_norm_psi": _norm(gradients[:n]),
        "grad_norm_encoders": _norm(gradients[n:]),
        "psi_accuracy": float(right / pairs) if pairs > 0 else None,
    }


def _over_processes(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], right: Tensor, processes: Processes
) -> tuple[list[Tensor | None], Tensor]:
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    *flat, right = processes.sum(torch.cat([*(p.double().reshape(-1) for p in parts), right.reshape(1)])).split(
        [*(p.numel() for p in parts), 1]
    )
    return [piece.view_as(p) for piece, p in zip(flat, parts, strict=True)], right[0]


@torch.no_grad()
def _latent_rows(model: MultimodalModel, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Present latents ``[R, k]``, their modality ``[R]`` and their sample ``[R]``."""
    if part.streamed:
        pieces = torch.arange(len(part)).split(stream_rows(part))
        found = [_latent_rows(model, part.select(rows)) for rows in pieces]
        samples = [sample + int(rows[0]) for (_, _, sample), rows in zip(found, pieces, strict=True)]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]), torch.cat(samples)
    device = model.class_prior.device
    latents = model.latents([x.to(device) for x in part.features], part.present.to(device))
    here = model.head_present(part.present).t()  # [h, N]
    modality, sample = here.nonzero(as_tuple=True)
    return latents[modality, sample], modality, sample


def fresh_discriminator(model: MultimodalModel, train: Part, held_out: Part, seed: int) -> dict[str, Any] | None:
    """Train a new discriminator of psi's shape on frozen latents to convergence; judge it on held-out rows.

    A weak psi also has a high loss, so invariance is judged by this one: "balanced_accuracy" near "chance" (1 / number
    of modalities) means that latents do not tell their modality. Latents are standardised by the statistics of the
    train latents, so that shrinking them hides nothing. A fifth of the train samples (at most 4096 are used) stops the
    training early. None where fewer than two modalities have a head.
    """
    heads = len(model.columns)
    if model.head is None or heads < 2:
        return None
    random = generator(seed, "fresh", "order")
    if len(train) > _FRESH_ROWS:
        train = train.select(torch.randperm(len(train), generator=random)[:_FRESH_ROWS].to(train.labels.device))
    held_x, held_y, _ = _latent_rows(model, held_out)
    return judge_rows(*_latent_rows(model, train), held_x, held_y, model.head.psi_dims, heads, seed, random)


def judge_rows(
    x: Tensor,
    y: Tensor,
    sample: Tensor,
    held_x: Tensor,
    held_y: Tensor,
    hidden: Sequence[int],
    classes: int,
    seed: int,
    random: torch.Generator,
) -> dict[str, Any]:
    """The judge of :func:`fresh_discriminator` on rows ``x [R, k]`` of modality ``y [R]`` and sample ``sample [R]``."""
    x, y, sample, held_x, held_y = (t.cpu() for t in (x, y, sample, held_x, held_y))
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-12)
    x = (x - mean) / scale
    samples = int(sample.max()) + 1
    stop_sample = torch.zeros(samples, dtype=torch.bool)
    stop_sample[torch.randperm(samples, generator=random)[: max(1, samples // 5)]] = True
    stopping = stop_sample[sample]
    widths = [x.shape[1], *hidden, classes]
    with seeded_init(seed, "fresh", "init"):
        layers: list[nn.Module] = []
        for n in range(len(widths) - 1):
            layers += [nn.Linear(widths[n], widths[n + 1]), nn.ReLU()]
        judge = nn.Sequential(*layers[:-1])
    epochs, converged = _fit_judge(judge, x[~stopping], y[~stopping], x[stopping], y[stopping], random)
    with torch.no_grad():
        guess = judge((held_x - mean) / scale).argmax(-1)
    return {
        "balanced_accuracy": float(balanced_accuracy_score(held_y.numpy(), guess.numpy())),
        "chance": 1.0 / classes,
        "epochs": epochs,
        "converged": converged,
        "rows": len(held_y),
    }


def _fit_judge(
    judge: nn.Sequential, x: Tensor, y: Tensor, stop_x: Tensor, stop_y: Tensor, random: torch.Generator
) -> tuple[int, bool]:
    """Adam on cross-entropy until the loss on the stopping rows has not improved for some epochs; keeps the best.

    Returns its epoch, and whether the loss had settled before the epochs ran out.
    """
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3, fused=True)
    best, bad, best_epoch = math.inf, 0, 0
    state = {k: v.clone() for k, v in judge.state_dict().items()}
    batch = min(512, max(32, len(x) // _FRESH_STEPS))
    for epoch in range(1, _FRESH_EPOCHS + 1):
        order = torch.randperm(len(x), generator=random)
        for rows in order.split(batch):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(judge(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(F.cross_entropy(judge(stop_x), stop_y))
        if loss < best - _FRESH_PROGRESS:
            best, bad, best_epoch = loss, 0, epoch
            state = {k: v.clone() for k, v in judge.state_dict().items()}
        else:
            bad += 1
            if bad >= _FRESH_PATIENCE:
                break
    judge.load_state_dict(state)
    return best_epoch, bad >= _FRESH_PATIENCE


def parameter_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """``||a - b|| / ||b||`` over the named tensors together (float64); exactly 0 where nothing differs."""
    difference = base = 0.0
    for name in names:
        difference += float((a[name].double() - b[name].double()).square().sum())
        base += float(b[name].double().square().sum())
    return math.sqrt(difference) / math.sqrt(base) if base else math.sqrt(difference)
