"""Heads that are no chain of Linear layers: chunked vector-Jacobian products, and a check that rows are independent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmc_fast.errors import InputError
from mmc_fast.ops.agop.reference import flag_nonfinite

from .head import Affine, OpaqueHead
from .rows import step

__all__ = ["OpaqueRunner", "check_independent_rows", "run_prefix"]


def run_prefix(x: Tensor, prefix: list[nn.Module | Affine], nonfinite: Tensor) -> Tensor:
    """What the modules before the layer make of ``x``; non-finite pre-activations are noted."""
    for module in prefix:
        if isinstance(module, Affine):
            x, _ = step(x, module, nonfinite)
        else:
            x = module(x)
    return x


class OpaqueRunner:
    """Rows of ``∂y/∂u`` of any module, an output (or probe) at a time: one backward pass over the chunk for each.

    Memory: the activations that the head keeps for one chunk, plus four tensors ``[chunk, d]``.
    """

    def __init__(self, head: OpaqueHead, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._tail, self._inner = head.tail, head.inner
        tensors = [*head.tail.parameters(), *head.tail.buffers()]
        if any(t.is_floating_point() and t.dtype != dtype for t in tensors):
            names = {module: name for name, module in head.tail.named_modules()}
            self._tail = copy.deepcopy(head.tail).to(dtype)
            if head.inner is not None:
                self._inner = dict(self._tail.named_modules())[names[head.inner]]
        # buffers are copied on every call: a head that writes to one must not be changed by an analysis
        self._buffers = dict(self._tail.named_buffers())
        widths = [m.weight.shape[0] for m in head.tail.modules() if isinstance(m, nn.Linear)]
        self.floats_per_sample = 4 * sum(widths) + 64

    def shape(self, u: Tensor) -> tuple[int, int]:
        """Width of the layer's input and number of outputs, from a few rows."""
        leaf, y = self.forward(u)
        self.floats_per_sample += 4 * leaf.shape[1] + 2 * y.shape[1]
        return leaf.shape[1], y.shape[1]

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

    def rows(self, u: Tensor, output: str, signs: Tensor | None, nonfinite: Tensor) -> Iterator[tuple[int, Tensor]]:
        """``(index, rows [n, d])`` of every output, or of every probe of ``signs [n, k, C]``."""
        leaf, y = self.forward(u)
        flag_nonfinite(leaf, nonfinite)
        flag_nonfinite(y, nonfinite)
        with torch.enable_grad():
            y = torch.softmax(y, dim=1) if output == "probs" else y
            directions = None if signs is None else signs.to(y.dtype)
        count = y.shape[1] if directions is None else directions.shape[1]
        for index in range(count):
            if not y.requires_grad:
                yield index, torch.zeros_like(leaf)
                continue
            with torch.enable_grad():
                total = (y[:, index] if directions is None else (y * directions[:, index]).sum(dim=1)).sum()
            (rows,) = torch.autograd.grad(
                total, leaf, retain_graph=index + 1 < count, allow_unused=True, materialize_grads=True
            )
            yield index, rows

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


def check_independent_rows(call: Callable[[Tensor], Tensor], rows: Tensor, what: str) -> None:
    """Change one of a few rows and see that the outputs of the others stay; raise InputError where they move."""
    rows = torch.nan_to_num(rows.detach()[:4], nan=0.0, posinf=1.0, neginf=-1.0)
    if len(rows) < 3:
        rows = torch.cat([rows, rows.new_ones(3, rows.shape[1]) * torch.tensor([[0.5], [-1.0], [2.0]]).to(rows)])
    changed = rows.clone()
    changed[0] = 1.5 * changed[0].roll(1) + 1
    with torch.no_grad():
        before, after = call(rows).detach(), call(changed).detach()
    if not bool(torch.isfinite(before).all()):
        return  # nothing to compare; the sums will be NaN
    tolerance = 64 * torch.finfo(before.dtype).eps * before.abs().max()
    if not bool((after[1:] - before[1:]).abs().max() <= tolerance):
        raise InputError(
            f"agop: {what} gave other outputs for rows 1.. after only row 0 was changed, so its rows depend on each "
            "other (batch statistics, attention across the batch, noise) and there is no Jacobian per sample; "
            "call head.eval(), or pass the part of the model that treats rows one by one"
        )
