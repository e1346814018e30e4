"""Pulling the latents of one sample together: alternatives to, or companions of, the discrimination game."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["contrastive_alignment", "distance_alignment"]


def distance_alignment(latents: Tensor, present: Tensor | None = None, normalizer: Tensor | None = None) -> Tensor:
    r"""Mean squared distance of unit latents to their sample's mean.

    .. math::
        \frac{1}{\#rows} \sum_{(b,i)} \lVert \hat g_i[b] - \tfrac{1}{|P_b|} \sum_{j \in P_b} \hat g_j[b] \rVert^2

    over present modalities ``P_b`` of samples that have at least two. ``latents`` ``[m, B, k]``, ``present`` bool
    ``[B, m]``; 0 where no sample has two modalities. ``normalizer`` replaces ``#rows``, for exact means over pieces of
    a batch.
    """
    unit = F.normalize(latents, dim=-1)
    if present is None:
        present = torch.ones(latents.shape[1], latents.shape[0], dtype=torch.bool, device=latents.device)
    here = (present & (present.sum(1, keepdim=True) > 1)).t().to(latents.dtype)  # [m, B]
    mean = (unit * here.unsqueeze(-1)).sum(0) / here.sum(0).clamp(min=1).unsqueeze(-1)  # [B, k]
    squared = (unit - mean).square().sum(-1)  # [m, B]
    rows = here.sum() if normalizer is None else normalizer
    return (squared * here).sum() / rows.clamp(min=1)


def contrastive_alignment(latents: Tensor, present: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    """Symmetric InfoNCE between every pair of modalities, negatives from the batch; mean over pairs.

    Rows in which either modality of a pair is absent take no part in it; 0 for a single modality.
    """
    m, batch, _ = latents.shape
    unit = F.normalize(latents, dim=-1)
    truth = torch.arange(batch, device=latents.device)
    total, pairs = latents.new_zeros(()), 0
    for i in range(m):
        for j in range(i + 1, m):
            logits = unit[i] @ unit[j].t() / temperature
            if present is None:
                total = total + (F.cross_entropy(logits, truth) + F.cross_entropy(logits.t(), truth)) / 2
            else:
                both = present[:, i] & present[:, j]
                # A large negative number, not -inf: a row without any partner stays finite and is left out below.
                logits = logits.masked_fill(~(both.unsqueeze(0) & both.unsqueeze(1)), -1e4)
                losses = F.cross_entropy(logits, truth, reduction="none") + F.cross_entropy(
                    logits.t(), truth, reduction="none"
                )
                total = total + torch.where(both, losses / 2, 0).sum() / both.sum().clamp(min=1)
            pairs += 1
    return total / max(1, pairs)
