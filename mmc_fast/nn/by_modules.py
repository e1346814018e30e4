"""The EBR step by calling the head's layers one after another: for layers that are no plain ``nn.Linear`` any more.

Adapters (LoRA), quantised layers, hooks on layers and ``torch.func`` transforms have no place in the fused op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmc_fast.functional import EBROutput, grad_reverse
from mmc_fast.ops.ebr.reference import LAYER_NORM_EPS, source_weights


def keep(rows: Tensor, where: Tensor | None) -> Tensor:
    """Rows where ``where``, zeros elsewhere; never multiplies, so that NaN in an absent row goes nowhere."""
    return rows if where is None else torch.where(where.unsqueeze(-1), rows, rows.new_zeros(()))


def encode(head: Any, i: int, x: Tensor, present: Tensor | None) -> Tensor:
    """Latents ``[..., k]`` of the rows ``x`` of modality ``i``."""
    latent = head.encoders[i](x)
    if head.normalize:
        latent = F.layer_norm(latent, latent.shape[-1:], eps=LAYER_NORM_EPS)
    return keep(latent, present)


def decode(head: Any, i: int, latent: Tensor, valid: Tensor | None) -> Tensor:
    """Decoded rows ``[..., d_i]``, without the residual."""
    return keep(head.decoders[i](latent), valid)


def step(
    head: Any,
    features: Sequence[Tensor | None],
    present: Tensor | None,
    source: Tensor | None,
    reversal: float | Tensor,
    normalizer: Tensor | None,
) -> EBROutput:
    """What :func:`mmc_fast.functional.ebr_step` computes, with the head's own modules."""
    m = len(features)
    like = next(f for f in features if f is not None)
    loss_dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    here = like.new_ones(like.shape[0], m, dtype=torch.bool) if present is None else present
    here = here & torch.tensor([f is not None for f in features], device=like.device)
    x = [
        keep(like.new_zeros(like.shape[0], head.dims[i]) if f is None else f, here[:, i])
        for i, f in enumerate(features)
    ]
    latents = torch.stack([encode(head, i, x[i], here[:, i]) for i in range(m)])
    weights = source_weights(source, here, latents.dtype)  # [B, m, m]
    valid = (weights != 0).any(-1)
    decoded = []
    for i in range(m):
        parts = [torch.where(weights[:, i, j, None] != 0, weights[:, i, j, None] * latents[j], 0) for j in range(m)]
        decoded.append(decode(head, i, torch.stack(parts).sum(0), valid[:, i]))
    logits = head.discriminator(grad_reverse(latents, reversal)).to(loss_dtype)
    cross_entropy = -F.log_softmax(logits, dim=-1).diagonal(dim1=0, dim2=2)  # [B, m]
    errors = [(d.to(loss_dtype) - z.detach().to(loss_dtype)).square().mean(-1) for d, z in zip(decoded, x, strict=True)]
    rows = here & valid
    n = torch.stack([here.sum(), rows.sum()]) if normalizer is None else normalizer.detach().reshape(-1).expand(2)
    n = torch.where(n == 0, torch.ones_like(n), n).to(loss_dtype)
    recovered = [z + d for z, d in zip(x, decoded, strict=True)] if head.residual else decoded
    discrimination = torch.where(here, cross_entropy, 0).sum() / n[0]
    return EBROutput(recovered, latents, discrimination, torch.where(rows, torch.stack(errors, 1), 0).sum() / n[1])
