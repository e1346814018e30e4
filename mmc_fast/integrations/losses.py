"""Losses over what the heads of one forward left, with any number of rows in a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc_fast._util.autocast import autocast_enabled
from mmc_fast.functional import grad_reverse


class EBRLosses(NamedTuple):
    """Two scalars to add to your loss: the reversal is already inside the first; the second takes a weight."""

    discrimination: Tensor
    reconstruction: Tensor


class Record(NamedTuple):
    """What one call of a site leaves: modality index, recovered rows ``[B, ..., d]``, latents (see :attr:`latents`), which rows
    are present (bool ``[B, ...]``; None: all), whether the latents are those of all modalities, and ``(B, ...)``."""

    modality: int
    recovered: Tensor
    kept: Tensor
    present: Tensor | None
    together: bool
    rows: torch.Size

    @property
    def latents(self) -> Tensor:
        """``[B, ..., k]``; one call of the op leaves those of all modalities, ``[m, rows, k]``."""
        mine = self.kept[self.modality] if self.together else self.kept
        return mine.reshape(*self.rows, mine.shape[-1])


def loss_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def counts(record: Record) -> Tensor | int:
    """The number of samples with at least one present row."""
    rows = record.rows
    if record.present is None:
        return rows[0] if all(s > 0 for s in rows[1:]) else 0
    return (record.present if record.present.dim() == 1 else record.present.flatten(1).any(1)).sum()


def sum_of_sample_means(values: Tensor, present: Tensor | None) -> Tensor:
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


def sum_of_errors(decoded: Tensor, features: Tensor, present: Tensor | None) -> Tensor:
    """Sum over samples of the mean of ``||decoded - stopgrad(z)||^2 / d`` over a sample's rows."""
    dtype = loss_dtype(features)
    return sum_of_sample_means((decoded.to(dtype) - features.detach().to(dtype)).square().mean(-1), present)


def divide(sums: Sequence[Tensor], n: Sequence[Tensor | int], normalizer: Tensor | None, which: int) -> Tensor:
    """``sum(sums) / max(1, sum(n))``, or over the element ``which`` of ``normalizer``."""
    device = sums[0].device
    total = sums[0] if len(sums) == 1 else torch.stack([s.to(device) for s in sums]).sum()
    if normalizer is not None:
        count = normalizer.detach().to(device).reshape(-1).expand(2)[which]
    elif all(isinstance(c, int) for c in n):
        return total / max(1, sum(n))
    else:
        count = torch.stack([torch.as_tensor(c, device=device) for c in n]).sum()
    return total / torch.where(count == 0, 1, count).to(total.dtype)


def psi_logits(latents: Tensor, psi: nn.Module) -> Tensor:
    """Logits ``[..., m]`` of the discriminator for latents ``[..., k]``, on its device and in its dtype."""
    weight = next(psi.parameters(), None)  # quantised layers have no parameters
    if weight is not None:
        latents = latents.to(weight.device)
        if not autocast_enabled(weight.device.type):
            latents = latents.to(weight.dtype)
    return psi(latents)


def sum_of_cross_entropy(
    latents: Tensor, i: int, present: Tensor | None, psi: nn.Module, reversal: float | Tensor
) -> Tensor:
    """Sum over samples of the mean ``CE(psi(g), i)`` over a sample's rows, with the reversed gradient."""
    logits = psi_logits(grad_reverse(latents, reversal), psi)
    cross_entropy = -F.log_softmax(logits.to(loss_dtype(logits)), dim=-1)[..., i]
    return sum_of_sample_means(cross_entropy, None if present is None else present.to(logits.device))
