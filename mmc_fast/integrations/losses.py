"""Losses over what the heads of one forward left, with any number of rows in a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc_fast.functional import grad_reverse

__all__ = ["EBRLosses", "Record", "counts", "divide", "psi_logits", "sum_of_errors", "sum_of_sample_means"]


class EBRLosses(NamedTuple):
    """Two scalars to add to your loss: the reversal is already inside the first; the second takes a weight."""

    discrimination: Tensor
    reconstruction: Tensor


class Record(NamedTuple):
    """What one call of a site leaves: modality index, recovered rows ``[B, ..., d]``, latents (see :attr:`latents`), which rows
    are present (bool ``[B, ...]``; None: all), whether psi has seen the latents (in the fused op), and ``(B, ...)``."""

    modality: int
    recovered: Tensor
    kept: Tensor
    present: Tensor | None
    judged: bool
    rows: torch.Size

    @property
    def latents(self) -> Tensor:
        """``[B, ..., k]``; one call of the op leaves those of all modalities, ``[m, rows, k]``."""
        mine = self.kept[self.modality] if self.judged else self.kept
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


def psi_logits(records: Sequence[Record], psi: nn.Module, reversal: float | Tensor | None) -> list[Tensor]:
    """Logits ``[B, ..., m]`` of the discriminator for each record, in one call of it.

    ``reversal``: λ of the gradient reversal before psi; None leaves it out.
    """
    weight = next(psi.parameters(), None)
    like = records[0].kept if weight is None else weight  # quantised layers have no parameters
    flat = torch.cat([r.latents.flatten(0, -2).to(like.device) for r in records])
    if not torch.is_autocast_enabled(like.device.type):
        flat = flat.to(like.dtype)
    logits = psi(flat if reversal is None else grad_reverse(flat, reversal))
    sizes = [r.rows.numel() for r in records]
    return [part.reshape(*r.rows, part.shape[-1]) for part, r in zip(logits.split(sizes), records, strict=True)]


def sums_of_cross_entropy(records: Sequence[Record], psi: nn.Module, reversal: float | Tensor) -> list[Tensor]:
    """For each record the sum over samples of the mean ``CE(psi(g), i)`` over its rows."""
    sums = []
    for r, logits in zip(records, psi_logits(records, psi, reversal), strict=True):
        cross_entropy = -F.log_softmax(logits.to(loss_dtype(logits)), dim=-1)[..., r.modality]
        sums.append(sum_of_sample_means(cross_entropy, r.present))
    return sums
