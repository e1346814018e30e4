"""Heads and truths that the AGOP tests share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from strategies import ACTIVATIONS
from torch import Tensor, nn


def chain(
    sizes: Sequence[int], activation: str, generator: torch.Generator, *, bias: bool = True, last: bool = False
) -> nn.Sequential:
    """Linear layers of these sizes with an activation between them (and after the last)."""
    modules: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        linear = nn.Linear(inputs, outputs, bias=bias)
        for parameter in linear.parameters():
            parameter.data.normal_(generator=generator).mul_(inputs**-0.5)
        modules.append(linear)
        if last or index + 2 < len(sizes):
            modules.append(ACTIVATIONS[activation]())
    return nn.Sequential(*modules)


def module_agop(head: nn.Module, u: Tensor, output: str = "logits", center: bool = False) -> Tensor:
    """AGOP at the input of any module that treats rows one by one: ``torch.func`` in float64, independent of the package."""
    head, u = copy.deepcopy(head).double(), u.detach().double()

    def outputs(row: Tensor) -> Tensor:
        y = head(row[None])[0].reshape(-1)
        return torch.softmax(y, dim=-1) if output == "probs" else y

    if not len(u):
        return torch.zeros(u.shape[1], u.shape[1], dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(outputs))(u).detach()  # [N, C, d]
    if center:
        jacobian = jacobian - jacobian.mean(dim=0)
    flat = jacobian.flatten(0, 1)
    return flat.t() @ flat


def jacrev_agop(
    head: nn.Sequential, x: Tensor, layer: int = 0, output: str = "logits", center: bool = False, reduction: str = "sum"
) -> Tensor:
    """The same at the input of a Linear layer of a (nested) ``nn.Sequential``."""
    head = copy.deepcopy(head).double()
    modules = [leaf for leaf in head.modules() if not isinstance(leaf, nn.Sequential)]
    start = [index for index, module in enumerate(modules) if isinstance(module, nn.Linear)][layer]
    with torch.no_grad():
        u = nn.Sequential(*modules[:start])(x.detach().double())
    total = module_agop(nn.Sequential(*modules[start:]), u, output, center)
    return total / len(u) if reduction == "mean" and len(u) else total


def away_from_kinks(head: nn.Sequential, x: Tensor, distance: float = 1e-4) -> Tensor:
    """The rows of ``x`` on which no pre-activation of the head is within ``distance`` of zero."""
    keep = torch.ones(len(x), dtype=torch.bool)
    with torch.no_grad():
        z = x.double()
        for module in copy.deepcopy(head).double().modules():
            if isinstance(module, nn.Sequential):
                continue
            z = module(z)
            if isinstance(module, nn.Linear):
                keep &= (z.abs() > distance).all(dim=1)
    return x[keep]
