"""Gradient reversal: the identity whose gradient is multiplied by ``-strength``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grad_reverse"]


class _GradReverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, strength: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (strength,) = ctx.saved_tensors
        # Zero strength cuts the branch instead of multiplying it, so that 0 * inf never becomes NaN.
        reversed_grad = torch.where(strength == 0, torch.zeros_like(grad), -strength.to(grad.dtype) * grad)
        return reversed_grad, None


def grad_reverse(x: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """Return ``x`` unchanged; the gradient through it is multiplied by ``-strength``.

    ``strength`` is a float or a 0-d tensor (then it can change without recompilation). At 0 the gradient is
    exactly zero, also where the incoming gradient is not finite. Differentiable twice.

    Raises:
        ValueError: ``strength`` is a tensor with more than one element.
    Source: Ganin & Lempitsky 2015; used between latents and discriminator in EBR (paper, section 3.3).
    """
    if not isinstance(strength, Tensor):
        strength = torch.full((), float(strength), dtype=torch.float64, device=x.device)
    elif strength.dim() != 0:
        raise ValueError(f"grad_reverse: strength has shape {list(strength.shape)}; pass a float or a 0-d tensor")
    return _GradReverse.apply(x, strength.detach())
