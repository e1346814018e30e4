"""From accumulated sums to G: the symmetric S in panels, ``Pᵀ S P`` at half cost, products without ``[d, d]``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mmc_fast.ops.agop import op as primitives

__all__ = ["Factored", "centered_counts", "count_panel"]


def _as_written(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method without autograd and autocast, whatever the caller's context."""

    @wraps(method)
    def run(self: Factored) -> Any:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return method(self)

    return run


_PANEL = 512  # rows of S at least: below, eight panels would be eight times the launches for little arithmetic
# entries [start:stop, start:] of a symmetric matrix, float64 or the int64 of counts
Panel = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Factored:
    """``G = scale · Pᵀ S P`` with ``S = (VᵀV) ∘ inner`` (``inner`` alone without V), none of it multiplied out.

    ``inner(start, stop)`` gives rows ``start .. stop`` of the symmetric inner matrix from column ``start`` on.
    ``P [h, d]`` (None: the identity) and ``V [C, h]`` are in the working precision.
    """

    width: int  # h
    inner: Panel
    outer: Tensor | None  # V
    inputs: Tensor | None  # P
    scale: float
    dtype: torch.dtype
    device: torch.device
    whole: Tensor | None = None  # the inner matrix itself, contiguous, where the native final product may read it

    @property
    def size(self) -> int:
        """d, the width of G."""
        return self.width if self.inputs is None else self.inputs.shape[1]

    @_as_written
    def matrix(self) -> Tensor:
        """G in the working precision, ``[d, d]``, exactly symmetric.

        Only the upper triangle of S is formed, a panel at a time: with U = S above the diagonal plus half of the
        diagonal, ``G = X + Xᵀ``, ``X = Pᵀ U P``.
        """
        if self.whole is not None and self.inputs is not None:
            return primitives.agop_finalise(self.inputs, self.outer, self.whole, backend="cpp").mul_(self.scale)
        total = torch.zeros(self.size, self.size, dtype=self.dtype, device=self.device)
        for start, stop in self._panels():
            block = self._upper_half(start, stop, self.dtype)
            if self.inputs is None:
                total[start:stop, start:] = block
            else:
                total.addmm_(self.inputs[start:stop].t(), block @ self.inputs[start:])
        return total.add_(total.t().clone()).mul_(self.scale)

    @_as_written
    def diagonal(self) -> Tensor:
        """The diagonal of G, float64 ``[d]``, in memory O(h d / panels)."""
        result = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        for start, stop in self._panels():
            block = self._upper_half(start, stop, torch.float64)
            if self.inputs is None:
                result[start:stop] = 2 * block.diagonal()
            else:
                p = self.inputs.double()
                result += 2 * (p[start:stop] * (block @ p[start:])).sum(dim=0)
        return result * self.scale

    @_as_written
    def operator(self) -> Callable[[Tensor], Tensor]:
        """``v -> G v`` on float64 ``[d]`` or ``[d, k]`` as ``Pᵀ (S (P v))``; holds S, ``[h, h]``."""
        upper = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
        for start, stop in self._panels():
            upper[start:stop, start:] = self._upper_half(start, stop, torch.float64)
        p = None if self.inputs is None else self.inputs.double()

        def multiply(v: Tensor) -> Tensor:
            w = v if p is None else p @ v
            w = upper @ w + upper.t() @ w
            return (w if p is None else p.t() @ w) * self.scale

        return multiply

    def _panels(self) -> list[tuple[int, int]]:
        step = max(_PANEL, -(-self.width // 8))
        return [(start, min(start + step, self.width)) for start in range(0, self.width, step)]

    def _upper_half(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        block = self.inner(start, stop).to(dtype)
        if self.outer is not None:
            v = self.outer.to(dtype)
            block = block * (v[:, start:stop].t() @ v[:, start:])
        corner = block[:, : stop - start]
        corner.triu_()
        corner.diagonal().mul_(0.5)
        return block


def count_panel(counts: Tensor, n: int, slope: float, center: bool) -> Panel:
    """``AᵀA`` of ``A = 1`` where active and ``slope`` elsewhere, about the mean with ``center``, from exact counts.

    ``α² N + α (1 − α)(n_i + n_j) + (1 − α)² c_ij``; centred ``(1 − α)² (c_ij − n_i n_j / N)``.
    """
    ones = counts.diagonal()

    def panel(start: int, stop: int) -> Tensor:
        block = counts[start:stop, start:]
        if center:
            exact = centered_counts(block, ones[start:stop, None], ones[start:], n)
            return exact * ((1 - slope) ** 2 / max(1, n))
        if slope == 0:
            return block.clone()
        sums = (ones[start:stop, None] + ones[start:]).double()
        return slope**2 * n + slope * (1 - slope) * sums + (1 - slope) ** 2 * block.double()

    return panel


def centered_counts(counts: Tensor, first: Tensor, second: Tensor, n: int) -> Tensor:
    """``n·counts − first·second`` in exact integers, rounded once to float64; int64 in, broadcast.

    Below 2^31 samples the products fit 63 bits; beyond, they are formed in limbs of 31 bits (128 bits in all).
    """
    if n < 2**31:
        return (n * counts - first * second).double()
    mask = 2**31 - 1
    n1, n0 = n >> 31, n & mask
    c1, c0 = counts >> 31, counts & mask
    a1, a0 = first >> 31, first & mask
    b1, b0 = second >> 31, second & mask
    low = n0 * c0 - a0 * b0
    middle = n1 * c0 + n0 * c1 - a1 * b0 - a0 * b1 + (low >> 31)  # the shift rounds down, so the rest is not negative
    high = n1 * c1 - a1 * b1 + (middle >> 31)
    rest = ((middle & mask) << 31) + (low & mask)  # value = high · 2^62 + rest
    near_zero = (high == 0) | (high == -1)
    exact = torch.where(near_zero, rest + high.clamp(-1, 0) * 2**62, 0).double()
    return torch.where(near_zero, exact, high.double() * 2.0**62 + rest.double())
