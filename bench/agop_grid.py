"""How often ``backend="auto"`` takes native code: activations x depth x layer x sizes, and why the rest does not."""

from __future__ import annotations

from itertools import pairwise, product

import torch
from torch import nn

from mmc_fast.agop.accumulator import AGOPAccumulator
from mmc_fast.ops import dispatch as backends

__all__ = ["run_grid"]

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
}
DEPTHS = (1, 2, 3, 4)
SIZES = ((16, 64, 2), (256, 64, 10), (16, 512, 10), (256, 512, 100))  # d, h, C
OPS = ("relu_coactivation_update", "derivative_gram_update", "syrk_update", "agop_finalise")


def run_grid(samples: int = 65) -> dict:
    """Run every point; return how many were native and the points that were not, with the reason."""
    generator = torch.Generator().manual_seed(0)
    points, other, constant = 0, [], 0
    for (name, make), depth, (d, h, outputs) in product(ACTIVATIONS.items(), DEPTHS, SIZES):
        widths = [d, *[h] * depth, outputs]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Linear(a, b)] if i == depth else [nn.Linear(a, b), make()]
        head = nn.Sequential(*layers)
        x = torch.randn(samples, d, generator=generator)
        for layer in range(depth + 1):
            backends.reset_ran()
            result = AGOPAccumulator(head, layer=layer).update(x).compute()
            result.matrix.sum()
            if layer == depth:  # the last layer is linear: N VᵀV, no work per sample and so no kernel to choose
                constant += 1
                continue
            points += 1
            ran = [row for row in backends.ran() if "/cpp/" in row]
            if result.backend != "cpp" or not ran:
                point = f"{name}, depth {depth}, layer {layer}, d {d} h {h} C {outputs}"
                reason = _reason(x, head)
                other.append({"point": point, "method": result.method, "backend": result.backend, "reason": reason})
    return {"points": points, "native": points - len(other), "linear_layers": constant, "other": other}


def _reason(x: torch.Tensor, head: nn.Sequential) -> str:
    rows = {op: next(row for row in backends.explain(op, x, *head.parameters()) if row.backend == "cpp") for op in OPS}
    reasons = sorted({row.reason for row in rows.values() if not row.usable})
    return "; ".join(reasons) or "every native op can run on these tensors, and the method of this head uses none"
