"""The EBR step in Triton: which path a head takes, and the calls of ``mmc_fast/ops`` in the terms of both paths."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..agop.coactivation import usable
from . import narrow_launch as ebr_narrow_launch
from . import wide_launch as ebr_wide_launch
from .plan import Inputs, Needs, Sizes, Upstream, unsupported

__all__ = ["Needs", "Upstream", "backward", "forward", "saved_like", "unsupported", "usable"]


def _on_device(like: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it that of the tensors."""
    return torch.cuda.device(like.device) if like.device.type == "cuda" else nullcontext()


def forward(
    features: Sequence[Tensor],
    present: Tensor | None,
    source: Tensor | None,
    normalizer: Tensor | None,
    params: Sequence[Tensor],
    residual: bool,
    normalize: bool,
    keep: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:
    """Return (recovered, latents, both losses, what backward needs); the last is empty unless ``keep``."""
    inputs = Inputs.of(features, params, present, source, normalizer, residual, normalize)
    with _on_device(features[0]):
        if inputs.sizes.narrow(features[0].dtype):
            *outputs, saved = ebr_narrow_launch.forward(inputs)
        else:
            *outputs, saved = ebr_wide_launch.forward(inputs, keep)
    recovered, latents, discrimination, reconstruction = outputs
    return recovered, latents, discrimination, reconstruction, saved if keep else []


def saved_like(features: Sequence[Tensor], params: Sequence[Tensor], normalize: bool) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes that ``forward`` saves."""
    sizes, like = Sizes.of(features, params), features[0]
    if sizes.narrow(like.dtype):
        shapes = ebr_narrow_launch.saved_shapes(sizes.m, like.shape[0], normalize)
        return [like.new_empty(shape, dtype=torch.float32) for shape in shapes]
    wide = ebr_wide_launch.saved_shapes(sizes, like, normalize)
    return [like.new_empty(shape, dtype=dtype) for shape, dtype in wide]


def backward(
    upstream: Upstream,
    features: Sequence[Tensor],
    present: Tensor | None,
    source: Tensor | None,
    reversal: Tensor,
    normalizer: Tensor | None,
    params: Sequence[Tensor],
    recovered: Sequence[Tensor],
    latents: Tensor | None,
    saved: Sequence[Tensor],
    residual: bool,
    normalize: bool,
    needs: Needs,
) -> tuple[Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]:
    """Gradients of features, source and parameters; a kind of which none is wanted comes back as None."""
    if latents is None or not saved:
        recovered, latents, _, _, saved = forward(
            features, present, source, normalizer, params, residual, normalize, keep=True
        )
    inputs = Inputs.of(features, params, present, source, normalizer, residual, normalize)
    launch = ebr_narrow_launch if inputs.sizes.narrow(features[0].dtype) else ebr_wide_launch
    with _on_device(features[0]):
        return launch.backward(inputs, upstream, reversal, recovered, latents, saved, needs)
