"""Pulling the latents of one sample together, beside the adversarial loss or instead of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["contrastive_alignment"]


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
