"""What an expert would write in plain PyTorch for the AGOP at a head's input.

Each baseline is a function of the head that returns the function to run: ``x [N, d] -> G [d, d]``. With
``compiled=True`` its inner part goes through ``torch.compile``, for the shape of its first call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from mmc_fast.ops.agop.reference import activation_derivative

Baseline = Callable[..., Callable[[Tensor], Tensor]]


def sum_trick(head: nn.Sequential, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    """C backward passes over the whole batch: the gradient of the sum of a column holds the rows of all samples."""
    forward = _compiled(head) if compiled else head

    def run(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        y = forward(leaf)
        return _gram(torch.autograd.grad(y[:, c].sum(), leaf, retain_graph=True)[0] for c in range(y.shape[1]))

    return run


def jacrev_rows(head: nn.Sequential, compiled: bool = False, chunk: int = 256) -> Callable[[Tensor], Tensor]:
    """``vmap(jacrev)``: Jacobians of a chunk of samples at a time."""
    weights = {name: p.detach() for name, p in head.named_parameters()}
    jacobian = vmap(jacrev(lambda u: functional_call(head, weights, (u,))))
    if compiled:
        jacobian = _compiled(jacobian)

    return lambda x: _gram(jacobian(part).flatten(0, 1) for part in x.split(chunk))


def closed_form(head: nn.Sequential, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    """One hidden layer in three lines: ``W1ᵀ ((W2ᵀW2) ∘ AᵀA) W1`` with the derivatives as a float matrix."""
    first, activation, last = head
    w1, b1, w2 = first.weight.detach(), first.bias.detach(), last.weight.detach()
    relu = isinstance(activation, nn.ReLU)

    def run(x: Tensor) -> Tensor:
        z = nn.functional.linear(x, w1, b1)
        a = (z > 0).to(x.dtype) if relu else activation_derivative(z, "gelu", 0.0, 0.0)
        return w1.t() @ ((w2.t() @ w2) * (a.t() @ a)) @ w1

    return _compiled(run) if compiled else run


def closed_form_int8(head: nn.Sequential, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    """The same for ReLU with an int8 mask and the integer matrix product."""
    first, _, last = head
    w1, b1, w2 = first.weight.detach(), first.bias.detach(), last.weight.detach()

    def run(x: Tensor) -> Tensor:
        mask = (nn.functional.linear(x, w1, b1) > 0).to(torch.int8)
        counts = torch._int_mm(mask.t().contiguous(), mask)
        return w1.t() @ ((w2.t() @ w2) * counts) @ w1

    return _compiled(run) if compiled else run


def row_chain(head: nn.Sequential, compiled: bool = False, chunk: int = 512) -> Callable[[Tensor], Tensor]:
    """Two hidden ReLU layers: rows ``(V D2) W2 D1`` of a chunk at a time, their Gram matrix, then ``W1ᵀ S W1``."""
    w1, b1, w2, b2, v = (p.detach() for p in list(head.parameters())[:5])

    def rows_of(part: Tensor) -> Tensor:
        z1 = nn.functional.linear(part, w1, b1)
        d2 = (nn.functional.linear(z1.relu(), w2, b2) > 0).to(part.dtype)
        return ((v * d2[:, None]) @ w2 * (z1 > 0)[:, None]).flatten(0, 1)

    step = _compiled(rows_of) if compiled else rows_of

    return lambda x: w1.t() @ _gram(step(part) for part in x.split(chunk)) @ w1


def torch_probe(head: nn.Sequential, compiled: bool = False, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """One random ±1 output probe per sample and one backward pass: unbiased, not exact."""
    forward = _compiled(head) if compiled else head

    def run(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        logits = forward(leaf)
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, logits.shape, generator=generator).to(x.dtype) * 2 - 1
        (rows,) = torch.autograd.grad((logits * signs).sum(), leaf)
        return rows.t() @ rows

    return run


BASELINES: dict[str, Baseline] = {
    "closed_form": closed_form,
    "int8": closed_form_int8,
    "sum_trick": sum_trick,
    "jacrev": jacrev_rows,
    "row_chain": row_chain,
    "torch_probe": torch_probe,
}


def _gram(parts: Iterable[Tensor]) -> Tensor:
    """``Σ BᵀB`` of rows B ``[R, d]``, in place."""
    total = None
    for rows in parts:
        total = rows.new_zeros(rows.shape[1], rows.shape[1]) if total is None else total
        total.addmm_(rows.t(), rows)
    return total


def _compiled(function: Callable) -> Callable:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # the sum trick goes backward through one forward pass C times
    return torch.compile(function, dynamic=False)
