"""λ, the factor of the reversed gradient: what it may be, and the identity that applies it."""

from __future__ import annotations

import numbers
from functools import lru_cache

import torch
from torch import Tensor, nn

from mmc_fast.errors import InputError


def check_reversal(reversal: float | Tensor, where: str = "reversal") -> float | Tensor:
    """λ as it may be used, or :class:`InputError`: a finite number at or above 0, or a 0-d tensor that takes no gradient.

    The value of a tensor is looked at on the CPU alone: elsewhere that would synchronise.
    """
    if type(reversal) is float and 0 <= reversal < float("inf"):
        return reversal
    if isinstance(reversal, Tensor):
        if reversal.dim() != 0 or reversal.dtype == torch.bool or reversal.is_complex():
            raise InputError(f"{where}: λ is {reversal.dtype} {list(reversal.shape)}; give a number or a 0-d tensor")
        if reversal.requires_grad or isinstance(reversal, nn.Parameter):
            raise InputError(
                f"{where}: λ is a parameter, but it takes no gradient; give a number or a tensor's .detach()"
            )
        traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
        if reversal.device.type == "cpu" and not traced and not 0 <= reversal.item() < float("inf"):
            raise InputError(f"{where}: λ is {reversal.item()}; it must be finite and not negative (0 cuts the branch)")
        return reversal
    if isinstance(reversal, bool) or not isinstance(reversal, numbers.Real):
        raise InputError(f"{where}: λ is {reversal!r} ({type(reversal).__name__}); give a number or a 0-d tensor")
    if not 0 <= reversal < float("inf"):
        raise InputError(f"{where}: λ is {reversal}; it must be finite and not negative (0 cuts the branch)")
    return float(reversal)


def lambda_tensor(
    reversal: float | Tensor, device: torch.device, dtype: torch.dtype, where: str = "ebr_step"
) -> Tensor:
    """λ as a 0-d tensor without history; raises what :func:`check_reversal` raises."""
    value = check_reversal(reversal, where)
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    if value > torch.finfo(dtype).max:
        raise InputError(f"{where}: λ is {value:g}, which {dtype} cannot hold; give less")
    plain = device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
    if plain and not torch._C._len_torch_dispatch_stack():  # no fake tensors are being made
        return _constant(value, dtype)
    return torch.full((), value, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """Nobody writes to it; a new one in each step takes as long as a tenth of a small step."""
    return torch.full((), value, dtype=dtype, device="cpu")


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

    Examples:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> mmc_fast.functional.grad_reverse(x, reversal=0.5).sum().backward()
        >>> x.grad.tolist()
        [-0.5, -0.5]
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _GradReverse.apply(x, lambda_tensor(reversal, x.device, dtype, "grad_reverse"))
