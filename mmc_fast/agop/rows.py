"""Jacobian rows of deep heads in chunks: contraction order by cost, softmax factor, random output probes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mmc_fast.ops.agop.reference import flag_nonfinite

from .gram import fast_linear, stable_linear, value_and_derivative
from .head import Activation, Affine

__all__ = ["RowChain", "collapse", "forward_chain", "step"]


def step(x: Tensor, affine: Affine, nonfinite: Tensor) -> tuple[Tensor, Tensor | None]:
    """One affine map and its activation: ``(s(z), s'(z))``, the derivative None where no activation follows."""
    z = stable_linear(x, affine.weight, affine.bias)
    flag_nonfinite(z, nonfinite)
    if affine.activation is None:
        return z, None
    return _activate(affine.activation, z)


def forward_chain(x: Tensor, chain: list[Affine], nonfinite: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output for ``x [n, d]`` and the derivative of every activation on the way, each ``[n, h_q]``."""
    derivatives = []
    for affine in chain:
        x, derivative = step(x, affine, nonfinite)
        if derivative is not None:
            derivatives.append(derivative)
    return x, derivatives


def _activate(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    if activation.kind == "relu":
        value = torch.relu(z)
        return value, value.sign()  # 0 at 0, as the derivative of ReLU is here
    return value_and_derivative(activation.function, z)


def collapse(chain: list[Affine]) -> tuple[Tensor, list[Tensor]]:
    """Multiply runs of weights without an activation between them: ``P [h_1, d]`` and ``V_1 .. V_r`` in

    ``∂y/∂u = V_r D_r … V_1 D_1 P`` with ``D_q`` the diagonal of the q-th activation's derivative. Where the output
    itself is activated, ``V_r`` is the identity.
    """
    factors: list[Tensor] = []
    run: Tensor | None = None
    for affine in chain:
        weight = affine.weight
        run = weight if run is None else (weight.double() @ run.double()).to(weight.dtype)
        if affine.activation is not None:
            factors.append(run)
            run = None
    if run is None:
        last = factors[-1]
        run = torch.eye(last.shape[0], dtype=last.dtype, device=last.device)
    factors.append(run)
    return factors[0], factors[1:]


@dataclass(frozen=True)
class RowChain:
    """Rows ``B = L V_r D_r … V_1 D_1 [P]``, with L the identity, the softmax Jacobian, or random signs times either.

    The rows end at the first activation (width h_1, then ``G = Pᵀ S P``) or at the layer's input (width d): whichever
    costs less. For plain logits ``V_r`` is replaced by the R factor of its QR where that has fewer rows: the Gram
    matrix is the same.
    """

    factors: list[Tensor]  # V_r, …, V_1 [, P], in the working precision of the rows
    transposed: list[Tensor]  # the same as weights of a linear layer
    ends_at_input: bool
    output: str
    probes: int | None
    outputs: int  # C
    order: dict[tuple[int, int], int]
    cost: float  # multiply-adds per sample, Gram matrix included

    @staticmethod
    def build(p: Tensor, v: list[Tensor], output: str, probes: int | None, dtype: torch.dtype) -> RowChain:
        """The cheaper end of the rows and the cheapest order of their products."""
        outputs = (v[-1] if v else p).shape[0]
        v = list(v)
        if v and output == "logits" and probes is None and outputs > v[-1].shape[1]:
            v[-1] = torch.linalg.qr(v[-1].double(), mode="r").R.to(v[-1].dtype)
        backwards = v[::-1]
        candidates = []
        for at_input in (False, True):
            factors = [*backwards, p] if at_input else backwards
            factors = factors or [torch.eye(outputs, dtype=p.dtype, device=p.device)]
            leading = probes or (1 if output == "probs" and outputs == 2 else factors[0].shape[0])
            per_sample_left = output == "probs" or probes is not None
            cost, order = _cheapest_order(leading, factors, per_sample_left)
            width = factors[-1].shape[1]
            candidates.append((cost + leading * width * width / 2, at_input, factors, order))
        cost, at_input, factors, order = min(candidates, key=lambda candidate: candidate[0])
        cast = [factor.to(dtype).contiguous() for factor in factors]
        transposed = [factor.t().contiguous() for factor in cast]
        return RowChain(cast, transposed, at_input, output, probes, outputs, order, cost)

    @property
    def width(self) -> int:
        """Width of the rows."""
        return self.factors[-1].shape[1]

    @property
    def rows(self) -> int:
        """Rows per sample."""
        if self.probes is not None:
            return self.probes
        return 1 if self.output == "probs" and self.outputs == 2 else self.factors[0].shape[0]

    @property
    def floats_per_sample(self) -> int:
        """Numbers alive per sample while its rows are formed, about."""
        widths = [factor.shape[1] for factor in self.factors]
        return 2 * self.rows * max(widths) + 3 * sum(widths)

    def __call__(self, logits: Tensor, derivatives: list[Tensor], signs: Tensor | None) -> Tensor:
        """Rows ``[n, R, width]`` from logits ``[n, C]``, derivatives (forward order), probes ``[n, k, C]`` or None."""
        dtype = self.factors[0].dtype
        diagonals = [d.to(dtype) for d in reversed(derivatives)]
        rows = self._leftmost(logits, signs)
        if rows is None:
            rows = self._product(0, len(self.factors) - 1, diagonals)
        else:
            for q in range(1, len(self.factors)):
                rows = fast_linear(_scaled(rows, diagonals[q - 1]), self.transposed[q])
        if not self.ends_at_input and diagonals:
            rows = _scaled(rows, diagonals[-1])
        return rows

    def last_step(
        self, logits: Tensor, derivatives: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
        """The operands (left, inner, v, outer) of the last product of the rows, for a kernel that does not store them.

        ``B_r = ((left_r ∘ inner) v) ∘ outer``; None where the cheapest order ends in another product.
        """
        last = len(self.factors) - 1
        if last < 1:
            return None
        diagonals = [d.to(self.factors[0].dtype) for d in reversed(derivatives)]
        left = self._leftmost(logits, None)
        if left is None:
            if self.order[0, last] != last - 1:
                return None
            left = self._product(0, last - 1, diagonals)
        else:
            for q in range(1, last):
                left = fast_linear(_scaled(left, diagonals[q - 1]), self.transposed[q])
        outer = None if self.ends_at_input else diagonals[-1]
        return left, diagonals[last - 1], self.factors[last], outer

    def _leftmost(self, logits: Tensor, signs: Tensor | None) -> Tensor | None:
        """``L V_r``, ``[n, R, h_r]``; None for plain logits, where the products can go in any order."""
        factor = self.factors[0]
        if self.output == "logits":
            return None if signs is None else fast_linear(signs.to(factor.dtype), self.transposed[0])
        p = torch.softmax(logits, dim=1)
        if signs is not None:  # rᵀ(diag p − ppᵀ)
            signs = p[:, None, :] * (signs - signs @ p[:, :, None])
            return fast_linear(signs.to(factor.dtype), self.transposed[0])
        if self.outputs == 2:  # both rows are ±p₀p₁(1, −1): one row of their joint length
            weight = (2**0.5) * p[:, 0] * p[:, 1]
            return (weight[:, None] * (factor[0] - factor[1])).to(factor.dtype)[:, None, :]
        p = p.to(factor.dtype)
        return p[:, :, None] * (factor - (p @ factor)[:, None, :])

    def _product(self, i: int, j: int, diagonals: list[Tensor]) -> Tensor:
        if i == j:
            return self.factors[i]
        k = self.order[i, j]
        left = _scaled(self._product(i, k, diagonals), diagonals[k])
        if k + 1 == j:
            return fast_linear(left, self.transposed[j])
        return left @ self._product(k + 1, j, diagonals)


def _scaled(rows: Tensor, diagonal: Tensor) -> Tensor:
    """``rows · diag``, per sample: ``[R, h]`` or ``[n, R, h]`` by ``[n, h]``."""
    if rows.dim() == 3:
        return rows.mul_(diagonal[:, None, :])  # made by a product just before, so it is ours to change
    return rows * diagonal[:, None, :]


def _cheapest_order(
    leading: int, factors: list[Tensor], per_sample_left: bool
) -> tuple[float, dict[tuple[int, int], int]]:
    """Matrix-chain order (dynamic programming) in multiply-adds per sample; a lone factor costs nothing to look up.

    With a per-sample factor on the left the products go from left to right.
    """
    sizes = [factors[0].shape[0], *(factor.shape[1] for factor in factors)]
    count = len(factors)
    order: dict[tuple[int, int], int] = {}
    if per_sample_left:
        return float(sum(leading * a * b for a, b in pairwise(sizes))), order
    best = {(i, i): 0.0 for i in range(count)}
    for length in range(1, count):
        for i in range(count - length):
            j = i + length
            costs = [(best[i, k] + best[k + 1, j] + sizes[i] * sizes[k + 1] * sizes[j + 1], -k) for k in range(i, j)]
            best[i, j], minus_k = min(costs)
            order[i, j] = -minus_k
    return best[0, count - 1], order
