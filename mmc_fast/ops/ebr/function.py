"""The EBR step on Triton as a plain ``autograd.Function``: the registered op without the dispatcher.

In eager mode alone. Under ``torch.compile``, ``torch.func``, dispatch modes and for subclasses of tensors the op runs, which
they can see. What runs, what is kept and what backward returns is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton
from .reference import Call

__all__ = ["applies", "apply"]


def applies(call: Call) -> bool:
    """Whether nothing but plain autograd looks at this call."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.overrides.has_torch_function((*call.features, *call.params))  # modes too
        or any(t.__class__ not in _PLAIN for t in call.features)
    )


_PLAIN = (Tensor, torch.nn.Parameter)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, source: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        recovered, latents, md, rec, saved = triton.step(call)
        ctx.set_materialize_grads(False)
        kept = () if call.recompute else (latents, *recovered, *saved)
        ctx.flags, ctx.sizes = call[6:], (len(call.features), len(call.params))
        ctx.save_for_backward(*call[1:5], *tensors, *kept)
        return *recovered, latents, md, rec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        m, n_params = ctx.sizes
        saved_tensors = ctx.saved_tensors
        masks, rest = saved_tensors[:4], saved_tensors[4:]
        call = Call._make((rest[:m], *masks, rest[m : m + n_params], *ctx.flags))
        kept = rest[m + n_params :]
        latents, recovered, saved = (None, (), ()) if call.recompute else (kept[0], kept[1 : 1 + m], kept[1 + m :])
        wanted = ctx.needs_input_grad[2:]
        source = ctx.needs_input_grad[1] and call.source is not None and call.source.is_floating_point()
        d_features, d_source, d_params = triton.step_backward(
            (grads[:m], grads[m], grads[m + 1], grads[m + 2]),
            call,
            recovered,
            latents,
            saved,
            (*wanted[:m], source, *wanted[m:]),
        )
        d_tensors = [d if need else None for d, need in zip((*d_features, *d_params), wanted, strict=True)]
        return None, d_source if source else None, *d_tensors


def apply(call: Call) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """(recovered, latents, both losses) of a call for which :func:`applies` holds."""
    m = len(call.features)
    if not torch.is_grad_enabled():
        recovered, latents, md, rec, _ = triton.step(call._replace(recompute=True))
        return recovered, latents, md, rec
    out = _Step.apply(call, call.source, *call.features, *call.params)
    return list(out[:m]), *out[m:]
