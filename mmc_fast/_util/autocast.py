"""Autocast as it stands for a kind of device, and casts of many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a kind of device; it never is where there is none (meta)."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """``[t.to(dtype) for t in tensors]``: on a GPU one launch for each dtype that is there, and one for its gradients."""
    cast = list(tensors)
    for other in {t.dtype for t in tensors} - {dtype}:
        places = [i for i, t in enumerate(tensors) if t.dtype == other]
        for i, t in zip(places, _Cast.apply(dtype, *(tensors[i] for i in places)), strict=True):
            cast[i] = t
    return cast


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        copies = _copies(tensors, dtype)
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(c for c, t in zip(copies, tensors, strict=True) if not t.requires_grad))
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        copies = iter(_copies([g for g in grads if g is not None], ctx.dtype))
        return None, *(None if g is None else next(copies) for g in grads)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies
