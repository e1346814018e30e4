"""The EBR step (encode, reconstruct, discriminate) in its plainest differentiable form, and the arguments of every form.

Loops over modalities only, never over the batch; any float dtype; first and second derivatives by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reversal import grad_reverse

LAYER_NORM_EPS = 1e-5


class Call(NamedTuple):
    """The arguments of an EBR step in the order of the registered op; meaning: :func:`mmc_fast.functional.ebr_step`."""

    features: Sequence[Tensor]  # m x [B, d_i]
    present: Tensor | None  # bool [B, m]
    source: Tensor | None  # int64 [B, m] or float [B, m, m]
    reversal: Tensor  # λ, 0-d
    normalizer: Tensor | None  # one or two elements
    params: Sequence[Tensor]  # four a head, encoders first, then two a layer of the discriminator
    residual: bool
    normalize: bool
    recompute: bool
    backend: str  # as asked for; to the registered op, the one that runs


class Params(NamedTuple):
    """Views into the flat parameter list: four tensors a head, then the discriminator's."""

    encoders: Sequence[Sequence[Tensor]]
    decoders: Sequence[Sequence[Tensor]]
    discriminator: Sequence[Tensor]


def split_params(call: Call) -> Params:
    m = len(call.features)
    heads = [call.params[4 * i : 4 * i + 4] for i in range(2 * m)]
    return Params(heads[:m], heads[m:], call.params[8 * m :])


def mlp(x: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Linear layers ``(W_1, b_1, W_2, b_2, ...)`` with ReLU between them and none after the last."""
    for n in range(0, len(layers), 2):
        x = F.linear(x, layers[n], layers[n + 1])
        if n + 2 < len(layers):
            x = F.relu(x)
    return x


def source_weights(source: Tensor | None, present: Tensor, dtype: torch.dtype) -> Tensor:
    """``w[b, i, j]``: weight of latent j for target modality i; zero for absent j. ``present`` is bool ``[B, m]``."""
    m = present.shape[1]
    if source is None:
        w = torch.eye(m, dtype=dtype, device=present.device).expand(present.shape[0], m, m)
    elif source.is_floating_point():
        w = source.to(dtype)
    else:
        check_source_range(source, m)
        w = (source.unsqueeze(-1) == torch.arange(m, device=source.device)).to(dtype)
    return torch.where(present.unsqueeze(1), w, torch.zeros((), dtype=dtype, device=w.device))


def check_source_range(source: Tensor, m: int) -> None:
    """Refuse an integer source outside -1 .. m-1 (on CPU, where looking costs no synchronisation)."""
    if source.device.type != "cpu" or torch.compiler.is_compiling() or source.numel() == 0:
        return
    low, high = int(source.min()), int(source.max())
    if low < -1 or high >= m:
        raise ValueError(
            f"ebr_step: source has values from {low} to {high}; with {m} modalities allowed are -1 (none) to {m - 1}"
        )


def ebr_step(call: Call) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return ``(recovered, latents [m, B, k], discrimination_loss, reconstruction_loss)``."""
    features, present, source = call.features, call.present, call.source
    encoders, decoders, discriminator = split_params(call)
    m, batch = len(features), features[0].shape[0]
    dtype, device = features[0].dtype, features[0].device
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=dtype, device=device)
    if present is None:
        present = torch.ones(batch, m, dtype=torch.bool, device=device)

    # Encode. Absent rows are replaced before anything reads them.
    x = [torch.where(present[:, i, None], features[i], zero) for i in range(m)]
    encoded = []
    for i in range(m):
        g = mlp(x[i], encoders[i])
        if call.normalize:
            g = F.layer_norm(g, g.shape[-1:], eps=LAYER_NORM_EPS)
        encoded.append(torch.where(present[:, i, None], g, zero))
    latents = torch.stack(encoded)  # [m, B, k]

    # Mix and decode. A latent of weight zero contributes nothing, not even a NaN.
    weights = source_weights(source, present, dtype)  # [B, m, m]
    finite = latents.isfinite().all(-1)  # [m, B]
    decoded, valid = [], (weights != 0).any(-1)  # [B, m]
    for i in range(m):
        mixed = torch.zeros_like(latents[0])
        for j in range(m):
            w = weights[:, i, j]
            used = torch.where(((w != 0) | finite[j]).unsqueeze(-1), latents[j], zero)
            mixed = mixed + w.unsqueeze(-1) * used
        keep = valid[:, i, None]
        decoded.append(torch.where(keep, mlp(torch.where(keep, mixed, zero), decoders[i]), zero))
    recovered = [x[i] + decoded[i] for i in range(m)] if call.residual else decoded

    # Losses: masked means over present rows, accumulated in at least float32.
    logits = mlp(grad_reverse(latents, call.reversal), discriminator).to(loss_dtype)  # [m, B, m]
    cross_entropy = -F.log_softmax(logits, dim=-1).diagonal(dim1=0, dim2=2)  # [B, m]
    rows = present & valid
    counts = denominators(present, rows, call.normalizer, loss_dtype)  # [2]
    discrimination = torch.where(present, cross_entropy, 0).sum() / counts[0]

    squared = torch.stack(
        [(decoded[i].to(loss_dtype) - x[i].detach().to(loss_dtype)).square().mean(-1) for i in range(m)],
        dim=1,
    )  # [B, m]
    reconstruction = torch.where(rows, squared, 0).sum() / counts[1]
    return recovered, latents, discrimination, reconstruction


def denominators(present: Tensor, rows: Tensor, normalizer: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[2]``: ``max(1, #present)`` and ``max(1, #rows)``, or ``normalizer`` where given (0 counts as 1)."""
    if normalizer is None:
        n = torch.stack([present.sum(), rows.sum()]).to(dtype)
    else:
        n = normalizer.detach().to(dtype).reshape(-1).expand(2)
    return torch.where(n == 0, torch.ones_like(n), n)
