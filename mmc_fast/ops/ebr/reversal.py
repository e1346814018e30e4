"""λ, the factor of the reversed gradient: what it may be, and the identity that applies it."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor, nn

from mmc_fast.errors import InputError

__all__ = ["grad_reverse", "lambda_tensor"]


def lambda_tensor(
    reversal: float | Tensor, device: torch.device, dtype: torch.dtype, where: str = "ebr_step"
) -> Tensor:
    """Return λ as a 0-d tensor without history: a finite number at or above 0, or a 0-d tensor.

    The value of a tensor is not looked at: that would synchronise with its device. Raises :class:`InputError`.
    """
    if isinstance(reversal, Tensor):
        if reversal.dim() != 0:
            raise InputError(f"{where}: reversal has shape {list(reversal.shape)}; pass a float or a 0-d tensor")
        if reversal.requires_grad or type(reversal) is nn.Parameter:
            raise InputError(f"{where}: reversal is a parameter, but λ takes no gradient; pass reversal.detach()")
        return reversal.to(device=device, dtype=dtype)
    if type(reversal) is not float and (isinstance(reversal, bool) or not isinstance(reversal, numbers.Real)):
        raise InputError(f"{where}: reversal is a {type(reversal).__name__}; pass a float or a 0-d tensor")
    if not 0 <= reversal < float("inf"):
        raise InputError(f"{where}: reversal is {reversal}; it must be finite and not negative (0 cuts the branch)")
    return torch.full((), float(reversal), dtype=dtype, device=device)


class _GradReverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, lambda_: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (lambda_,) = ctx.saved_tensors
        # Zero cuts the branch instead of multiplying it, so that 0 * inf never becomes NaN.
        reversed_grad = torch.where(lambda_ == 0, torch.zeros_like(grad), -lambda_.to(grad.dtype) * grad)
        return reversed_grad, None


def grad_reverse(x: Tensor, reversal: float | Tensor = 1.0) -> Tensor:
    """Return ``x`` unchanged; the gradient through it is multiplied by ``-reversal``.

    ``reversal`` is λ, a float or a 0-d tensor (then it can change without recompilation). At 0 the gradient is
    exactly zero, also where the incoming gradient is not finite. Differentiable twice.

    Raises:
        InputError: λ is negative, not finite, a parameter, or a tensor with more than one element.
    Source: Ganin & Lempitsky 2015; used between latents and discriminator in EBR (paper, section 3.3).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _GradReverse.apply(x, lambda_tensor(reversal, x.device, dtype, "grad_reverse"))
