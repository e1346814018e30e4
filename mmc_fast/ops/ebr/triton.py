"""The EBR step on Triton: what the registered op calls, and the same as a plain ``autograd.Function`` without the dispatcher.

The latter in eager mode alone. Under ``torch.compile``, ``torch.func``, dispatch modes and for subclasses of tensors the op
runs, which they can see. What runs, what is kept and what backward returns is the same. Triton is imported at the first
call: installations without it work.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import record
from .reference import Call, check_source_range

_INSTALLED = importlib.util.find_spec("triton") is not None
_PLAIN = (Tensor, torch.nn.Parameter)


def check(features: Sequence[Tensor], params: Sequence[Tensor] | None = None) -> str | None:
    """Say why the kernels cannot run on these tensors, None where they can; ``params``: of a call, whose widths count."""
    if not _INSTALLED:
        return "Triton is not installed; pip install 'mmc-fast[triton]'"
    if features and not features[0].is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels need a GPU and a tensor is on {features[0].device}"
    try:
        from mmc_fast.kernels.ebr import launch as kernels
    except ImportError as error:
        return f"Triton does not load ({error}); pip install 'mmc-fast[triton]'"
    reason = kernels.usable([*features, *(params or ())])
    return kernels.unsupported(features, params) if reason is None and params is not None else reason


def step(call: Call) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:
    """(recovered, latents, both losses, what backward needs); the last is empty with ``recompute``."""
    from mmc_fast.kernels.ebr import launch as kernels

    record("ebr_step", "triton")
    if call.source is not None and not call.source.is_floating_point():
        check_source_range(call.source, len(call.features))
    tensors = call.features, call.present, call.source, call.normalizer, call.params
    return kernels.forward(*tensors, call.residual, call.normalize, not call.recompute)


def saved_like(call: Call) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes that :func:`step` saves."""
    from mmc_fast.kernels.ebr import launch as kernels

    return kernels.saved_like(call.features, call.params, call.source, call.normalize)


def step_backward(
    upstream: tuple[Sequence[Tensor | None], Tensor | None, Tensor | None, Tensor | None],
    call: Call,
    recovered: Sequence[Tensor],
    latents: Tensor | None,
    saved: Sequence[Tensor],
    needs: Sequence[int],
) -> tuple[Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]:
    """Gradients of features, source and parameters for those of (recovered, latents, two losses)."""
    from mmc_fast.kernels.ebr import launch as kernels

    record("ebr_step_backward", "triton")
    m, (d_recovered, *others) = len(call.features), upstream
    wanted = kernels.Needs(any(needs[:m]), bool(needs[m]), any(needs[m + 1 :]))
    *tensors, residual, normalize, _, _ = call
    return kernels.backward(
        kernels.Upstream(tuple(d_recovered), *others), *tensors, recovered, latents, saved, residual, normalize, wanted
    )


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


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, source: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        recovered, latents, md, rec, saved = step(call)
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
        d_features, d_source, d_params = step_backward(
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
        recovered, latents, md, rec, _ = step(call._replace(recompute=True))
        return recovered, latents, md, rec
    out = _Step.apply(call, call.source, *call.features, *call.params)
    return list(out[:m]), *out[m:]
