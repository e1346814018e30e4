"""Gram matrices of activation derivatives and of Jacobian rows, the definition in plain PyTorch.

Only upper triangles are promised: below the diagonal a Gram accumulator holds parts of the same sums or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .coactivation import flag_nonfinite, row_stable_linear

__all__ = ["add_gram", "derivative_gram_update", "smooth_activation", "value_and_derivative"]

_CHUNK_ROWS = 2048


def add_gram(rows: Tensor, gram: Tensor) -> None:
    """``gram += rowsᵀ rows`` on the upper triangle, in place: ``rows [R, h]`` and ``gram [h, h]`` share one dtype.

    Panels of columns skip most of the lower half: 5/8 of the arithmetic of the full product.
    """
    width = rows.shape[1]
    panel = max(64, -(-width // 4))
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        gram[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])


def smooth_activation(name: str, alpha: float = 1.0) -> Callable[[Tensor], Tensor]:
    """The activation function behind a name; ``alpha`` is the scale of ELU and the beta of softplus (threshold 20)."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "elu": partial(F.elu, alpha=alpha),
        "softplus": partial(F.softplus, beta=alpha),
    }
    return functions[name]


def value_and_derivative(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """``s(z)`` and ``s'(z)`` of an elementwise function, with PyTorch's own choice at kinks (0 for ReLU)."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = function(leaf)
        (derivative,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), derivative


def derivative_gram_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | Callable[[Tensor], Tensor],
    alpha: float,
    shift: Tensor | None,
    gram: Tensor,
    sums: Tensor,
    nonfinite: Tensor,
    chunk_rows: int = 0,
) -> None:
    """Add ``AᵀA`` and ``Σ A`` of ``A = s'(x Wᵀ + b) − shift`` to ``gram`` (upper triangle) and ``sums``, in place.

    ``x [N, d]``, ``weight [h, d]``, ``bias [h]`` or None and ``shift [h]`` or None share one floating dtype, in which
    each step is summed; ``gram [h, h]`` and ``sums [h]`` are float64; ``nonfinite`` is int64 ``[1]``. A shift near
    the mean keeps a later ``AᵀA − Σ A Σ Aᵀ / N`` free of cancellation.
    """
    function = smooth_activation(activation, alpha) if isinstance(activation, str) else activation
    width = weight.shape[0]
    for part in x.split(chunk_rows or _CHUNK_ROWS):
        z = row_stable_linear(part, weight, bias)
        flag_nonfinite(z, nonfinite)
        _, derivative = value_and_derivative(function, z)
        if shift is not None:
            derivative = derivative - shift
        step = derivative.new_zeros(width, width)
        add_gram(derivative, step)
        gram += step
        sums += derivative.sum(dim=0)
