"""What an expert would write in plain PyTorch for the AGOP at a head's input; each returns ``[d, d]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from mmc_fast.reference.gram import activation_derivative

__all__ = ["closed_form", "closed_form_int8", "row_chain", "sum_trick", "torch_probe", "vmap_jacrev"]


def sum_trick(head: nn.Sequential, x: Tensor) -> Tensor:
    """C backward passes over the whole batch: the gradient of the sum of a column holds the rows of all samples."""
    leaf = x.detach().requires_grad_()
    logits = head(leaf)
    total = x.new_zeros(x.shape[1], x.shape[1])
    for c in range(logits.shape[1]):
        (rows,) = torch.autograd.grad(logits[:, c].sum(), leaf, retain_graph=True)
        total.addmm_(rows.t(), rows)
    return total


def vmap_jacrev(head: nn.Sequential, x: Tensor, chunk: int = 256) -> Tensor:
    """Jacobians of a chunk of samples at a time."""
    weights = {name: p.detach() for name, p in head.named_parameters()}
    jacobian = vmap(jacrev(lambda u: functional_call(head, weights, (u,))))
    total = x.new_zeros(x.shape[1], x.shape[1])
    for part in x.split(chunk):
        rows = jacobian(part).flatten(0, 1)
        total.addmm_(rows.t(), rows)
    return total


@torch.no_grad()
def closed_form(head: nn.Sequential, x: Tensor) -> Tensor:
    """One hidden layer in three lines: ``W1ᵀ ((W2ᵀW2) ∘ AᵀA) W1`` with the derivatives as a float matrix."""
    first, activation, last = head
    z = first(x)
    a = (z > 0).to(x.dtype) if isinstance(activation, nn.ReLU) else activation_derivative(z, "gelu")
    return first.weight.t() @ ((last.weight.t() @ last.weight) * (a.t() @ a)) @ first.weight


@torch.no_grad()
def closed_form_int8(head: nn.Sequential, x: Tensor) -> Tensor:
    """The same for ReLU with an int8 mask and the integer matrix product."""
    first, _, last = head
    mask = (first(x) > 0).to(torch.int8)
    counts = torch._int_mm(mask.t().contiguous(), mask)
    return first.weight.t() @ ((last.weight.t() @ last.weight) * counts) @ first.weight


@torch.no_grad()
def row_chain(head: nn.Sequential, x: Tensor, chunk: int = 512) -> Tensor:
    """Two hidden ReLU layers: rows ``(V D2) W2 D1`` of a chunk at a time, their Gram matrix, then ``W1ᵀ S W1``."""
    first, _, second, _, last = head
    s = x.new_zeros(first.out_features, first.out_features)
    for part in x.split(chunk):
        z1 = first(part)
        d2 = (second(z1.relu()) > 0).to(x.dtype)
        rows = ((last.weight * d2[:, None]) @ second.weight * (z1 > 0)[:, None]).flatten(0, 1)
        s.addmm_(rows.t(), rows)
    return first.weight.t() @ s @ first.weight


def torch_probe(head: nn.Sequential, x: Tensor, seed: int = 0) -> Tensor:
    """One random ±1 output probe per sample and one backward pass: unbiased, not exact."""
    leaf = x.detach().requires_grad_()
    logits = head(leaf)
    signs = torch.randint(0, 2, logits.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype) * 2 - 1
    (rows,) = torch.autograd.grad((logits * signs).sum(), leaf)
    return rows.t() @ rows
