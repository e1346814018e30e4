"""AGOP by its definition: every Jacobian is formed, nothing is clever. One page, any dtype, small sizes only."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def jacobians(head: nn.Module, inputs: Tensor, *, layer: int = 0, output: str = "logits") -> Tensor:
    """``J[n] = ∂y[n] / ∂u[n]`` with ``u`` the input of the given Linear layer: ``[N, D] -> [N, C, d]``.

    ``head`` is an ``nn.Sequential`` (nested or not) in which row n of the output depends on row n of the input alone;
    ``layer`` counts its Linear modules; ``output`` is "logits" (what the head returns) or "probs" (softmax of that).
    """
    modules = _flat(head)
    start = [i for i, module in enumerate(modules) if isinstance(module, nn.Linear)][layer]
    with torch.no_grad():
        u = nn.Sequential(*modules[:start])(inputs)
    u = u.detach().requires_grad_()
    y = nn.Sequential(*modules[start:])(u)
    if output == "probs":
        y = torch.softmax(y, dim=1)
    # rows are independent, so the gradient of a column's sum holds that column's gradient for every sample
    columns = [torch.autograd.grad(y[:, c].sum(), u, retain_graph=True)[0] for c in range(y.shape[1])]
    return torch.stack(columns, dim=1)  # [N, C, d]


def agop(
    head: nn.Module,
    inputs: Tensor,
    *,
    layer: int = 0,
    output: str = "logits",
    center: bool = False,
    reduction: str = "sum",
) -> Tensor:
    """Average gradient outer product ``G = Σ_n J[n]ᵀ J[n]``, ``[d, d]`` (lemma 2 of the paper that ``docs/guides/agop.md`` names).

    ``center=True`` takes the mean Jacobian over all samples from every ``J[n]`` first; ``reduction="mean"`` divides
    by N. Memory and time are those of ``[N, C, d]``.
    """
    jacobian = jacobians(head, inputs, layer=layer, output=output)
    if center and len(jacobian):
        jacobian = jacobian - jacobian.mean(dim=0)
    matrix = torch.einsum("ncd,nce->de", jacobian, jacobian)
    return matrix / len(jacobian) if reduction == "mean" else matrix


def _flat(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential):
        return [leaf for child in module for leaf in _flat(child)]
    return [module]
