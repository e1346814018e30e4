"""Products and Gram matrices of rows on the fastest route there is, and the derivative of any elementwise function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmc_fast.ops.agop import op as primitives
from mmc_fast.ops.agop.reference import flag_nonfinite

__all__ = ["add_gram", "fast_linear", "shifted_derivative_gram", "stable_linear", "value_and_derivative"]

_STEP_ROWS = 2048
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` for ``x [..., d]``. float32 on the CPU goes to oneDNN, which uses AVX-512 where MKL does not."""
    if _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and weight.numel():
        flat = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
        return flat.view(*x.shape[:-1], weight.shape[0])
    return linear(x, weight, bias)


def stable_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` whose rows do not depend on how the samples are cut into calls (see ``row_stable_linear``)."""
    rows = x.shape[0]
    ragged = rows % 64
    if not ragged:
        return fast_linear(x, weight, bias)
    padded = x.new_zeros(rows + 64 - ragged, x.shape[1])
    padded[:rows] = x
    return fast_linear(padded, weight, bias)[:rows]


def add_gram(rows: Tensor, gram: Tensor) -> None:
    """``gram += rowsᵀ rows`` on the upper triangle, in place: ``rows [R, h]`` and ``gram [h, h]`` share one dtype.

    Panels of columns skip most of the lower half: 5/8 of the arithmetic of the full product. Below the diagonal of
    ``gram`` there are parts of the same sums or nothing.
    """
    width = rows.shape[1]
    panel = max(64, -(-width // 4))
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        gram[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])


def value_and_derivative(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """``s(z)`` and ``s'(z)`` of an elementwise function, with PyTorch's own choice at kinks (0 for ReLU)."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = function(leaf)
        (derivative,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), derivative


def shifted_derivative_gram(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    function: Callable[[Tensor], Tensor],
    shift: Tensor | None,
    gram: Tensor,
    total: Tensor,
    nonfinite: Tensor,
    chunk_rows: int = 0,
    kernel: str | None = None,
) -> None:
    """Add ``AᵀA`` and ``Σ A`` of ``A = s'(x Wᵀ + b) − shift`` to ``gram`` (upper triangle) and ``total``, in place.

    ``x [N, d]``, ``weight [h, d]``, ``bias [h]`` or None and ``shift [h]`` or None share one floating dtype, in which
    each step is summed; ``gram [h, h]`` and ``total [h]`` are float64; ``nonfinite`` is int64 ``[1]``. A shift near the
    mean keeps a later ``AᵀA − Σ A Σ Aᵀ / N`` free of cancellation. ``kernel``: the backend of the Gram matrix.
    """
    width = weight.shape[0]
    for part in x.split(chunk_rows or _STEP_ROWS):
        z = stable_linear(part, weight, bias)
        flag_nonfinite(z, nonfinite)
        _, derivative = value_and_derivative(function, z)
        if shift is not None:
            derivative = derivative - shift
        if kernel is not None:
            primitives.syrk_update(derivative, gram, backend=kernel)
        else:
            step = derivative.new_zeros(width, width)
            add_gram(derivative, step)
            gram += step
        total += derivative.sum(dim=0)
