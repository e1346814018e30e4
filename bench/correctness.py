"""Whether a candidate is right enough to be timed: its error against float64 beside that of plain PyTorch.

A ReLU's pre-activation that rounding moves across 0 changes gradients by far more than rounding does, in any
implementation. So inputs are drawn away from such kinks, and what is left is compared with eager's own error: a
candidate may have twice that plus a floor of a few ``eps``, in the whole and in every tensor. Eager sets the measure
and is not refused for rounding, nor for a kink; one that computes another function (``ANOTHER``) ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16)}
FACTOR = 2.0  # times eager's own error
FLOOR = {torch.float32: 8 * EPS[torch.float32], torch.bfloat16: 2 * EPS[torch.bfloat16]}  # of the whole
# of one tensor: the error of a bias of three numbers is luck, in eager too
TENSOR_FLOOR = {torch.float32: 64 * EPS[torch.float32], torch.bfloat16: 2 * EPS[torch.bfloat16]}
ANOTHER = {torch.float32: 1e-2, torch.bfloat16: 0.2}  # kinks move the whole by up to 1e-3 in float32
MARGIN = 64 * EPS[torch.float32]  # distance from a kink, in root mean squares of the layer


def away_from_kinks(
    model: nn.Module, run: Callable[[Tensor], object], draw: Callable[[int], Tensor], count: int
) -> Tensor:
    """``count`` samples ``[count, …]`` of ``draw(n)`` with every pre-activation ``z`` of every ``nn.ReLU`` of ``model``
    (float64) at ``|z| > MARGIN · rms(z)`` under ``run(samples)``. A layer may see a sample in several rows: row ``r`` of
    its input belongs to sample ``r mod n``. Raises ``RuntimeError`` where after ten draws too few are left.
    """
    kept: list[Tensor] = []
    need = count
    for _ in range(10):
        samples = draw(need + need // 4 + 8)
        clear = torch.ones(len(samples), dtype=torch.bool)

        def look(_: nn.Module, inputs: tuple[Tensor, ...], clear: Tensor = clear) -> None:
            z = inputs[0].detach().abs()
            near = (z <= MARGIN * z.square().mean().sqrt()).flatten(1).any(1)
            clear.logical_and_(~near.view(-1, len(clear)).any(0))

        hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, nn.ReLU)]
        try:
            with torch.no_grad():
                run(samples.double())
        finally:
            for hook in hooks:
                hook.remove()
        kept.append(samples[clear][:need])
        need -= len(kept[-1])
        if not need:
            return torch.cat(kept)
    raise RuntimeError(f"{need} of {count} samples still lie at a kink after ten draws")


@dataclass(frozen=True)
class Errors:
    """Relative errors in the Frobenius norm: of all tensors as one vector, and of each."""

    whole: float
    each: tuple[float, ...]


def errors(got: Sequence[Tensor | None], truth: Sequence[Tensor]) -> Errors:
    """The errors of ``got`` against ``truth``, tensor by tensor; an absent one and one of another shape are off by ∞."""
    off, size = [], []
    for g, t in zip(got, truth, strict=True):
        fits = g is not None and g.shape == t.shape
        off.append(float((g.detach().double() - t.detach().double()).norm()) if fits else math.inf)
        size.append(float(t.detach().double().norm()))
    each = tuple(o / s if s else o for o, s in zip(off, size, strict=True))
    return Errors(math.hypot(*off) / (math.hypot(*size) or 1.0), each)


def refused(name: str, found: Errors, eager: Errors, dtype: torch.dtype) -> str | None:
    """Why the candidate ``name`` must not be timed, or None. ``eager``: the errors of plain PyTorch in that dtype."""
    if not eager.whole < ANOTHER[dtype]:
        return f"eager is off by {eager.whole:.1e}, which no rounding explains: its result is another"
    limit = FACTOR * eager.whole + FLOOR[dtype]
    if not found.whole <= limit:
        return f"{name} is off by {found.whole:.1e}, eager by {eager.whole:.1e}, allowed are {limit:.1e}"
    for i, (error, own) in enumerate(zip(found.each, eager.each, strict=True)):
        limit = FACTOR * own + TENSOR_FLOOR[dtype]
        if not error <= limit:
            return f"{name} is off by {error:.1e} in tensor {i}, eager by {own:.1e}, allowed are {limit:.1e}"
    return None
