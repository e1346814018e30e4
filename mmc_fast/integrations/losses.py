"""Losses over latents that were collected one modality at a time, with any number of rows in a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc_fast.functional import grad_reverse

__all__ = ["EBRLosses", "Record", "counts", "discrimination_loss", "psi_logits", "reconstruction_loss"]


class EBRLosses(NamedTuple):
    """Two scalars to add to your loss: the reversal is already inside the first; the second takes a weight."""

    discrimination: Tensor
    reconstruction: Tensor


class Record(NamedTuple):
    """What one call of a site leaves: modality index, features and decoded rows ``[B, ..., d]``, latents
    ``[B, ..., k]``, and which rows are present (bool ``[B, ...]``; None: all)."""

    modality: int
    features: Tensor
    latents: Tensor
    decoded: Tensor
    present: Tensor | None


def _loss_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def counts(records: Sequence[Record]) -> list[Tensor]:
    """For each record, the number of samples with at least one present row (0-d, int64)."""
    out = []
    for r in records:
        rows = r.latents.shape[:-1]
        if r.present is None:
            n = rows[0] if all(s > 0 for s in rows[1:]) else 0
            out.append(torch.full((), n, dtype=torch.int64, device=r.latents.device))
        else:
            out.append(r.present.reshape(rows[0], -1).any(1).sum())
    return out


def _sum_of_sample_means(values: Tensor, present: Tensor | None) -> Tensor:
    """Sum over samples of the mean over a sample's present rows; ``values`` and ``present`` are ``[B, ...]``.

    A sample counts once however many rows it has, so that a long sequence does not outweigh a single vector.
    """
    if values.dim() > 1:
        values = values.flatten(1)
        if present is None:
            return values.sum() / max(1, values.shape[1])
        present = present.flatten(1)
        kept = torch.where(present, values, 0).sum(1)
        return (kept / present.sum(1).clamp(min=1)).sum()
    return values.sum() if present is None else torch.where(present, values, 0).sum()


def _mean(sums: list[Tensor], n: list[Tensor], normalizer: Tensor | None, which: int) -> Tensor:
    device, dtype = sums[0].device, sums[0].dtype
    total = torch.stack([s.to(device) for s in sums]).sum()
    if normalizer is None:
        count = torch.stack([c.to(device) for c in n]).sum()
    else:
        count = normalizer.detach().to(device).reshape(-1).expand(2)[which]
    return total / torch.where(count == 0, 1, count).to(dtype)


def psi_logits(records: Sequence[Record], psi: nn.Module, reversal: float | Tensor | None) -> list[Tensor]:
    """Logits ``[B, ..., m]`` of the discriminator for each record, in one call of it.

    ``reversal``: λ of the gradient reversal before psi; None leaves it out.
    """
    weight = next(psi.parameters())
    flat = torch.cat([r.latents.flatten(0, -2).to(weight.device) for r in records])
    if not torch.is_autocast_enabled(weight.device.type):
        flat = flat.to(weight.dtype)
    logits = psi(flat if reversal is None else grad_reverse(flat, reversal))
    sizes = [r.latents[..., 0].numel() for r in records]
    return [part.reshape(*r.latents.shape[:-1], -1) for part, r in zip(logits.split(sizes), records, strict=True)]


def discrimination_loss(
    records: Sequence[Record], psi: nn.Module, reversal: float | Tensor, normalizer: Tensor | None
) -> Tensor:
    """``L_md = sum over present (sample, modality) of the mean CE(psi(g), i) over its rows / max(1, #present)``."""
    sums = []
    for r, logits in zip(records, psi_logits(records, psi, reversal), strict=True):
        cross_entropy = -F.log_softmax(logits.to(_loss_dtype(logits)), dim=-1)[..., r.modality]
        sums.append(_sum_of_sample_means(cross_entropy, r.present))
    return _mean(sums, counts(records), normalizer, 0)


def reconstruction_loss(records: Sequence[Record], normalizer: Tensor | None) -> Tensor:
    """``L_rec``: the mean of ``||decoded - stopgrad(z)||^2 / d`` over the same rows with the same weights."""
    sums = []
    for r in records:
        dtype = _loss_dtype(r.features)
        error = (r.decoded.to(dtype) - r.features.detach().to(dtype)).square().mean(-1)
        sums.append(_sum_of_sample_means(error, r.present))
    return _mean(sums, counts(records), normalizer, 1)
