"""Figures of the adversarial training: gradients of both sides, what a post-hoc probe finds, what λ changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmc_fast._util.seeds import generator
from mmc_fast.diagnose.measures.probes import fit_modality_probe

from ..data import Part
from .model import MultimodalModel
from .parts import stream_rows
from .processes import Processes

_PROBE_EPOCHS, _PROBE_TRAIN_ROWS = 200, 4096


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
    device = model.prior.device
    latents = model.latents([x.to(device) for x in part.features], part.present.to(device))
    here = model.head_present(part.present).t()  # [h, N]
    modality, sample = here.nonzero(as_tuple=True)
    return latents[modality, sample], modality, sample


def post_hoc_probe(model: MultimodalModel, train: Part, held_out: Part, seed: int) -> dict[str, Any] | None:
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
    if len(train) > _PROBE_TRAIN_ROWS:
        train = train.select(torch.randperm(len(train), generator=random)[:_PROBE_TRAIN_ROWS].to(train.labels.device))
    held_x, held_y, _ = _latent_rows(model, held_out)
    psi = model.head.psi_dims
    return fit_modality_probe(
        *_latent_rows(model, train), held_x, held_y, psi, heads, seed, random=random, epochs=_PROBE_EPOCHS
    )


def parameter_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """``||a - b|| / ||b||`` over the named tensors together (float64); exactly 0 where nothing differs."""
    difference = base = 0.0
    for name in names:
        difference += float((a[name].double() - b[name].double()).square().sum())
        base += float(b[name].double().square().sum())
    return math.sqrt(difference) / math.sqrt(base) if base else math.sqrt(difference)
