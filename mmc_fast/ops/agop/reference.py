"""The primitives of exact AGOP, the definition in plain PyTorch: what runs where no kernel is.

With ``z = x Wᵀ + b`` an update adds to the upper triangle of an accumulator and leaves the strictly lower one alone:

- co-activation counts of ReLU units, ``c[i, j] = #{n : z[n, i] > 0 and z[n, j] > 0}``, int64 and exact;
- Gram matrices of activation derivatives, ``Σ_n a[n, i] a[n, j]`` with ``a = s'(z)``, in float64: products in the dtype of
  the inputs, chunk by chunk, their sums in float32 at least.

A NaN or infinite pre-activation raises ``nonfinite[0]`` above zero (how high is unspecified). Signs are those of exact
arithmetic, see ``signs.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import signs

_CHUNK_ROWS = 2048  # a float32 mask of this height counts exactly, and stays in cache
_ROWS = 1024
_SQRT_HALF = 0.7071067811865476
_SQRT_2_OVER_PI = 0.7978845608028654
_INV_SQRT_2PI = 0.3989422804014327


def flag_nonfinite(z: Tensor, nonfinite: Tensor) -> None:
    """Add 1 to the int64 ``nonfinite[0]`` if ``z`` holds a NaN or an infinity, without a host synchronisation."""
    if z.numel():
        low, high = torch.aminmax(z.detach())
        nonfinite += ~(torch.isfinite(low) & torch.isfinite(high))


def relu_coactivation_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, nonfinite: Tensor, chunk_rows: int
) -> None:
    """Add the co-activation counts of ``z = x Wᵀ + b`` to the upper triangle of ``counts``, in place.

    ``x [N, d]``, ``weight [h, d]``, ``bias [h]`` or None share one floating dtype; ``counts`` is int64 ``[h, h]`` (its
    diagonal tells how often each unit was active); ``nonfinite`` is int64 ``[1]``. ``chunk_rows = 0`` chooses the step.
    """
    units = weight.shape[0]
    panel = max(64, -(-units // 4))
    for part in x.split(chunk_rows or _CHUNK_ROWS):
        active = signs.active(part, weight, bias, nonfinite).to(torch.float32)
        for start in range(0, units, panel):
            stop = min(start + panel, units)
            block = (active[:, start:stop].t() @ active[:, start:]).to(torch.int64)
            block[:, : stop - start].triu_()
            counts[start:stop, start:] += block


def activation_derivative(z: Tensor, activation: str, alpha: float, beta: float) -> Tensor:
    """Return ``s'(z)``; ``alpha``: slope of leaky ReLU, scale of ELU, beta of softplus; ``beta``: its threshold."""
    if activation == "identity":
        return torch.ones_like(z)
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "leaky_relu":
        return torch.where(z > 0, 1.0, alpha).to(z.dtype)
    if activation == "gelu":
        return 0.5 * torch.erfc(-z * _SQRT_HALF) + z * _INV_SQRT_2PI * torch.exp(-0.5 * z * z)
    if activation == "gelu_tanh":
        inner = _SQRT_2_OVER_PI * (z + 0.044715 * z**3)
        slope = _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * z * z)
        s = torch.sigmoid(2 * inner)
        peak = s * torch.sigmoid(-2 * inner)  # (1 - tanh²) / 4, zero far out, where the slope may overflow
        return s + torch.where(peak == 0, torch.zeros_like(z), 2 * z * peak * slope)
    if activation == "silu":
        return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))
    if activation == "tanh":
        return 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)
    if activation == "sigmoid":
        return torch.sigmoid(z) * torch.sigmoid(-z)
    if activation == "elu":
        return torch.where(z > 0, torch.ones_like(z), alpha * torch.exp(z.clamp(max=0)))
    if activation == "softplus":
        return torch.where(z * alpha > beta, torch.ones_like(z), torch.sigmoid(z * alpha))
    raise ValueError(f"activation_derivative: unknown activation {activation!r}")


def derivative_gram_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, alpha: float, beta: float,
    gram: Tensor, total: Tensor, nonfinite: Tensor, chunk_rows: int,
) -> None:  # fmt: skip
    """Add ``Σ_n a_i a_j`` to the upper triangle of ``gram`` and ``Σ_n a_i`` to ``total``, both float64, in place."""
    for part in x.split(chunk_rows or _ROWS):
        z = linear(part, weight, bias)
        if z.numel() == 0:
            continue
        nonfinite += ~torch.isfinite(z).all()
        a = _wide(activation_derivative(z, activation, alpha, beta))
        total += a.sum(0, dtype=torch.float64)
        gram += (a.t() @ a).to(torch.float64).triu_()


def syrk_update(rows: Tensor, gram: Tensor) -> None:
    """Add ``Σ_r rows[r, i] rows[r, j]`` to the upper triangle of the float64 ``gram``, in place."""
    for part in _wide(rows).split(_ROWS):
        gram += (part.t() @ part).to(torch.float64).triu_()


def chain_gram_update(left: Tensor, inner: Tensor, v: Tensor, outer: Tensor | None, gram: Tensor) -> None:
    """Add ``Σ_n Σ_r b bᵀ``, ``b = ((left_r ∘ inner_n) v) ∘ outer_n``, to the upper triangle of ``gram``, in place."""
    step = max(1, _ROWS // max(1, left.shape[-2]))
    for start in range(0, inner.shape[0], step):
        part = slice(start, start + step)
        rows = ((left[part] if left.dim() == 3 else left) * inner[part, None, :]) @ v  # [n, R, h]
        if outer is not None:
            rows = rows * outer[part, None, :]
        syrk_update(rows.flatten(0, 1), gram)


def _wide(values: Tensor) -> Tensor:
    """The values in float32 at least: 16-bit sums overflow."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def mirror(upper: Tensor) -> Tensor:
    """Return the symmetric matrix that an upper triangle stands for."""
    return torch.triu(upper) + torch.triu(upper, 1).t()


def agop_finalise(weight: Tensor, outer: Tensor | None, inner: Tensor) -> Tensor:
    """Return ``Wᵀ S W`` with ``S_ij = (outerᵀ outer)_ij · inner_ij`` (``S = inner`` without outer), dtype of weight."""
    s = mirror(inner).to(torch.float64)
    if outer is not None:
        s = s * (outer.t() @ outer)
    g = weight.t() @ (s.to(weight.dtype) @ weight)
    return (g + g.t()) / 2
