"""Rows of Jacobians, a chunk of samples at a time: by products along a chain of layers, or by autograd for any module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmc_fast.errors import InputError
from mmc_fast.ops.agop.reference import flag_nonfinite

from .head import Affine, ParsedHead

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def step(x: Tensor, affine: Affine, nonfinite: Tensor) -> tuple[Tensor, Tensor | None]:
    """One affine map and its activation: ``(s(z), s'(z))``, the derivative None where no activation follows.

    At kinks the derivative is PyTorch's own choice (0 for ReLU).
    """
    z = _stable_linear(x, affine.weight, affine.bias)
    flag_nonfinite(z, nonfinite)
    if affine.activation is None:
        return z, None
    if affine.activation.kind == "relu":
        value = torch.relu(z)
        return value, value.sign()
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = affine.activation.function(leaf)
        (derivative,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), derivative


def run_prefix(x: Tensor, prefix: Sequence[nn.Module | Affine], nonfinite: Tensor) -> Tensor:
    """The layer's input u, which the modules before it make of ``x``; non-finite pre-activations are noted."""
    for module in prefix:
        x = step(x, module, nonfinite)[0] if isinstance(module, Affine) else module(x)
    return x


def forward_chain(u: Tensor, chain: Sequence[Affine], nonfinite: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output ``y [n, C]`` for ``u [n, d]`` and the derivatives ``a_q [n, h_q]`` of the activations on the way."""
    derivatives = []
    for affine in chain:
        u, a = step(u, affine, nonfinite)
        if a is not None:
            derivatives.append(a)
    return u, derivatives


class ChainRows:
    """Rows ``B = L V_r D_r … V_1 D_1 [W1]``, with L the identity, the softmax Jacobian, or random signs times either.

    The rows end at the first activation (width h_1, then ``G = W1ᵀ S W1``) or at the layer's input (width d): whichever
    costs less. For plain logits ``V_r`` is replaced by the R factor of its QR where that has fewer rows: the Gram
    matrix is the same.

    Attributes:
        ends_at_input: whether the rows are those of ``∂y/∂u``.
        count, width: rows per sample, and their width.
        outputs: C.
        floats_per_sample: numbers alive per sample while its rows are formed, about.
    """

    def __init__(self, w1: Tensor, v: Sequence[Tensor], output: str, probes: int | None, dtype: torch.dtype) -> None:
        self._output, self.outputs = output, (v[-1] if v else w1).shape[0]
        backwards = list(v[::-1])
        if v and output == "logits" and probes is None and self.outputs > v[-1].shape[1]:
            backwards[0] = torch.linalg.qr(v[-1].double(), mode="r").R.to(v[-1].dtype)
        plans = []
        for at_input in (False, True):
            factors = [*backwards, w1] if at_input else backwards
            factors = factors or [torch.eye(self.outputs, dtype=w1.dtype, device=w1.device)]
            count = probes or (1 if output == "probs" and self.outputs == 2 else factors[0].shape[0])
            cost, order = _cheapest_order(count, factors, output == "probs" or probes is not None)
            plans.append((cost + count * factors[-1].shape[1] ** 2 / 2, at_input, count, factors, order))
        _, self.ends_at_input, self.count, factors, self._order = min(plans, key=lambda plan: plan[0])
        self._factors = [factor.to(dtype).contiguous() for factor in factors]  # V_r, …, V_1 [, W1]
        self._weights = [factor.t().contiguous() for factor in self._factors]  # the same as weights of linear layers
        widths = [factor.shape[1] for factor in factors]
        self.width = widths[-1]
        self.floats_per_sample = 2 * self.count * max(widths) + 3 * sum(widths)

    def __call__(self, y: Tensor, derivatives: Sequence[Tensor], signs: Tensor | None) -> Tensor:
        """Rows ``[n, R, width]`` from logits ``[n, C]``, derivatives (forward order), probes ``[n, k, C]`` or None."""
        diagonals = [a.to(self._factors[0].dtype) for a in reversed(derivatives)]
        b = self._leftmost(y, signs)
        if b is None:
            b = self._product(0, len(self._factors) - 1, diagonals)
        else:
            b = self._from_left(b, 1, len(self._factors), diagonals)
        if not self.ends_at_input and diagonals:
            b = _scaled(b, diagonals[-1])
        return b

    def last_step(
        self, y: Tensor, derivatives: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
        """The operands (left, inner, v, outer) of the last product of the rows, for a kernel that does not store them.

        ``B_r = ((left_r ∘ inner) v) ∘ outer``; None where the cheapest order ends in another product.
        """
        last = len(self._factors) - 1
        if last < 1:
            return None
        diagonals = [a.to(self._factors[0].dtype) for a in reversed(derivatives)]
        left = self._leftmost(y, None)
        if left is not None:
            left = self._from_left(left, 1, last, diagonals)
        elif self._order[0, last] == last - 1:
            left = self._product(0, last - 1, diagonals)
        else:
            return None
        return left, diagonals[last - 1], self._factors[last], None if self.ends_at_input else diagonals[-1]

    def _leftmost(self, y: Tensor, signs: Tensor | None) -> Tensor | None:
        """``L V_r``, ``[n, R, h_r]``; None for plain logits, where the products can go in any order."""
        factor = self._factors[0]
        if self._output == "logits":
            return None if signs is None else _fast_linear(signs.to(factor.dtype), self._weights[0])
        p = torch.softmax(y, dim=1)
        if signs is not None:  # rᵀ(diag p − ppᵀ)
            signs = p[:, None, :] * (signs - signs @ p[:, :, None])
            return _fast_linear(signs.to(factor.dtype), self._weights[0])
        if self.outputs == 2:  # both rows are ±p₀p₁(1, −1): one row of their joint length
            length = (2**0.5) * p[:, 0] * p[:, 1]
            return (length[:, None] * (factor[0] - factor[1])).to(factor.dtype)[:, None, :]
        p = p.to(factor.dtype)
        return p[:, :, None] * (factor - (p @ factor)[:, None, :])

    def _from_left(self, b: Tensor, start: int, stop: int, diagonals: Sequence[Tensor]) -> Tensor:
        for q in range(start, stop):
            b = _fast_linear(_scaled(b, diagonals[q - 1]), self._weights[q])
        return b

    def _product(self, i: int, j: int, diagonals: Sequence[Tensor]) -> Tensor:
        if i == j:
            return self._factors[i]
        k = self._order[i, j]
        left = _scaled(self._product(i, k, diagonals), diagonals[k])
        if k + 1 == j:
            return _fast_linear(left, self._weights[j])
        return left @ self._product(k + 1, j, diagonals)


class AutogradRows:
    """Rows of ``∂y/∂u`` of any module, an output (or probe) at a time: one backward pass over the chunk for each.

    Memory: the activations that the head keeps for one chunk, plus four tensors ``[chunk, d]``.
    """

    def __init__(self, head: ParsedHead, dtype: torch.dtype) -> None:
        self.dtype, self._tail, self._inner = dtype, head.tail, head.inner
        tensors = [*head.tail.parameters(), *head.tail.buffers()]
        if any(t.is_floating_point() and t.dtype != dtype for t in tensors):
            names = {module: name for name, module in head.tail.named_modules()}
            self._tail = copy.deepcopy(head.tail).to(dtype)
            if head.inner is not None:
                self._inner = self._tail.get_submodule(names[head.inner])
        # buffers are copied on every call: a head that writes to one must not be changed by an analysis
        self._buffers = dict(self._tail.named_buffers())
        widths = [m.weight.shape[0] for m in head.tail.modules() if isinstance(m, nn.Linear)]
        self.floats_per_sample = 4 * sum(widths) + 64

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The leaf that stands for the layer's input, and the outputs ``[n, C]`` that depend on it."""
        with torch.enable_grad():
            if self._inner is None:
                leaf = u.detach().requires_grad_()
                return leaf, self._call(leaf.clone())  # a clone, since the head may work in place
            leaves: list[Tensor] = []

            def replace(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                leaves.append(args[0].detach().requires_grad_())
                return (leaves[-1].clone(), *args[1:])

            handle = self._inner.register_forward_pre_hook(replace)
            try:
                y = self._call(u.detach())
            finally:
                handle.remove()
            if len(leaves) != 1 or leaves[0].dim() != 2 or len(leaves[0]) != len(u):
                got = f"{len(leaves)} calls" if len(leaves) != 1 else f"an input of shape {list(leaves[0].shape)}"
                raise InputError(
                    f"agop: the named layer got {got} for {len(u)} samples; it must get one [samples, width]"
                )
            return leaves[0], y

    def __call__(self, u: Tensor, output: str, signs: Tensor | None, nonfinite: Tensor) -> Iterator[Tensor]:
        """Rows ``[n, d]`` of every output, or of every probe of ``signs [n, k, C]``."""
        leaf, y = self.forward(u)
        flag_nonfinite(leaf, nonfinite)
        flag_nonfinite(y, nonfinite)
        with torch.enable_grad():
            y = torch.softmax(y, dim=1) if output == "probs" else y
            directions = None if signs is None else signs.to(y.dtype)
        count = y.shape[1] if directions is None else directions.shape[1]
        for index in range(count):
            if not y.requires_grad:
                yield torch.zeros_like(leaf)
                continue
            with torch.enable_grad():
                total = (y[:, index] if directions is None else y * directions[:, index]).sum()
            yield torch.autograd.grad(total, leaf, retain_graph=index + 1 < count, materialize_grads=True)[0]

    def _call(self, u: Tensor) -> Tensor:
        buffers = {name: tensor.clone() for name, tensor in self._buffers.items()}
        try:
            y = functional_call(self._tail, buffers, (u,))
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            raise InputError(f"agop: the head cannot run on inputs of shape {list(u.shape)}: {line}") from error
        if not isinstance(y, Tensor) or y.dim() not in (1, 2) or len(y) != len(u):
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InputError(f"agop: the head returned {got} for {len(u)} samples; it must return [samples, outputs]")
        return y[:, None] if y.dim() == 1 else y


def check_independent_rows(call: Callable[[Tensor], Tensor], x: Tensor, what: str) -> None:
    """Change one of a few rows and see that the outputs of the others stay; raise InputError where they move."""
    x = torch.nan_to_num(x.detach()[:4], nan=0.0, posinf=1.0, neginf=-1.0)
    if len(x) < 3:
        x = torch.cat([x, x.new_ones(3, x.shape[1]) * x.new_tensor([[0.5], [-1.0], [2.0]])])
    changed = x.clone()
    changed[0] = 1.5 * changed[0].roll(1) + 1
    with torch.no_grad():
        before, after = call(x).detach(), call(changed).detach()
    if not bool(torch.isfinite(before).all()):
        return  # nothing to compare; the sums will be NaN
    tolerance = 64 * torch.finfo(before.dtype).eps * before.abs().max()
    if not bool((after[1:] - before[1:]).abs().max() <= tolerance):
        raise InputError(
            f"agop: {what} gave other outputs for rows 1.. after only row 0 was changed, so its rows depend on each "
            "other (batch statistics, attention across the batch, noise) and there is no Jacobian per sample; "
            "call head.eval(), or pass the part of the model that treats rows one by one"
        )


def _fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` for ``x [..., d]``. float32 on the CPU goes to oneDNN, which uses AVX-512 where MKL does not."""
    if _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and weight.numel():
        flat = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
        return flat.view(*x.shape[:-1], weight.shape[0])
    return nn.functional.linear(x, weight, bias)


def _stable_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` whose rows do not depend on how the samples are cut into calls.

    BLAS libraries use other kernels for the last rows of an odd height, and so round them otherwise. A height that is a
    multiple of 64 has no such rows, so a ragged end is computed with zero rows below it.
    """
    rows = x.shape[0]
    ragged = rows % 64
    if not ragged:
        return _fast_linear(x, weight, bias)
    padded = x.new_zeros(rows + 64 - ragged, x.shape[1])
    padded[:rows] = x
    return _fast_linear(padded, weight, bias)[:rows]


def _scaled(b: Tensor, diagonal: Tensor) -> Tensor:
    """``b · diag``, per sample: ``[R, h]`` or ``[n, R, h]`` by ``[n, h]``."""
    if b.dim() == 3:
        return b.mul_(diagonal[:, None, :])  # made by a product just before, so it is ours to change
    return b * diagonal[:, None, :]


def _cheapest_order(
    leading: int, factors: Sequence[Tensor], from_left: bool
) -> tuple[float, dict[tuple[int, int], int]]:
    """Matrix-chain order (dynamic programming) in multiply-adds per sample; a lone factor costs nothing to look up.

    ``from_left``: with a factor of each sample's own on the left the products go from left to right.
    """
    sizes = [factors[0].shape[0], *(factor.shape[1] for factor in factors)]
    order: dict[tuple[int, int], int] = {}
    if from_left:
        return float(sum(leading * a * b for a, b in pairwise(sizes))), order
    best = {(i, i): 0.0 for i in range(len(factors))}
    for length in range(1, len(factors)):
        for i in range(len(factors) - length):
            j = i + length
            costs = [(best[i, k] + best[k + 1, j] + sizes[i] * sizes[k + 1] * sizes[j + 1], -k) for k in range(i, j)]
            best[i, j], minus_k = min(costs)
            order[i, j] = -minus_k
    return best[0, len(factors) - 1], order
