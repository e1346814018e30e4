"""The registered op ``mmc_fast::ebr_step``: schema, fake, autograd; every backend lives behind this contract.

The contract is registered three times. ``ebr_step`` is what native kernels implement (``csrc/ops/ebr/op.cpp`` on the CPU,
with autograd in C++); ``ebr_step_triton`` is the Triton kernels of ``kernels/ebr/launch.py``; ``ebr_step_torch`` always is the
plain torch kernel of ``_ebr_kernel.py``, for devices and builds without another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmc_fast._env import env
from mmc_fast.errors import InputError

from .. import native as library
from ..dispatch import BACKENDS, record, register
from . import triton as _ebr_triton
from .eager import Params, Saved, backward, forward, split_params

__all__ = ["SCHEMA_VERSION", "ebr_step", "resolve_backend"]

SCHEMA_VERSION = 1

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INPUTS = "Tensor[] features, Tensor? present, Tensor? source, Tensor reversal, Tensor? normalizer, Tensor[] params"
_FORWARD = (
    f"({_INPUTS}, bool residual, bool normalize, bool recompute)"
    " -> (Tensor[] recovered, Tensor latents, Tensor discrimination_loss, Tensor reconstruction_loss, Tensor[] saved)"
)
# needs: one flag per feature, one for the source, one per parameter; what is not needed comes back empty
_BACKWARD = (
    "(Tensor?[] d_recovered, Tensor? d_latents, Tensor? d_discrimination, Tensor? d_reconstruction,"
    f" {_INPUTS}, Tensor[] recovered, Tensor? latents, Tensor[] saved, bool residual, bool normalize, int[] needs)"
    " -> (Tensor[] d_features, Tensor d_source, Tensor[] d_params)"
)


def _step(features, present, source, reversal, normalizer, params, residual, normalize, recompute):
    record("ebr_step", "torch")
    recovered, latents, discrimination, reconstruction, saved = forward(
        features, present, source, normalizer, split_params(params, len(features)), residual, normalize
    )
    return recovered, latents, discrimination, reconstruction, [] if recompute else saved.flat()


def _step_fake(features, present, source, reversal, normalizer, params, residual, normalize, recompute):
    m, batch = len(features), features[0].shape[0]
    split = split_params(params, m)
    like = features[0]
    saved: list[Tensor] = []
    if not recompute:
        saved = [like.new_empty(batch, head[0].shape[0]) for head in (*split.encoders, *split.decoders)]
        widths = [w.shape[1] for w in split.discriminator[0::2]]  # of the inputs of its layers
        saved += [like.new_empty(m * batch, p) for p in widths[1:-1]]
        if len(widths) > 1:
            saved.append(like.new_empty(m * batch, widths[-1], dtype=torch.uint8))
        shapes = [(m * batch, m), (m, widths[-1]), (m,)] + [(m, batch)] * normalize
        saved += [like.new_empty(shape, dtype=torch.float32) for shape in shapes]
    latents = like.new_empty(m, batch, split.encoders[0][2].shape[0])
    recovered = [f.new_empty(f.shape) for f in features]
    return recovered, latents, *(like.new_empty((), dtype=torch.float32) for _ in range(2)), saved


def _step_backward(
    d_recovered, d_latents, d_discrimination, d_reconstruction,
    features, present, source, reversal, normalizer, params,
    recovered, latents, saved, residual, normalize, needs,
):  # fmt: skip
    record("ebr_step_backward", "torch")
    m = len(features)
    split = split_params(params, m)
    if saved:
        kept = Saved.unflatten(saved, m, len(split.discriminator) // 2, normalize)
    else:
        recovered, latents, _, _, kept = forward(features, present, source, normalizer, split, residual, normalize)
    d_features, d_source, d_params = backward(
        (d_recovered, d_latents, d_discrimination, d_reconstruction),
        features, present, source, reversal, normalizer, split, recovered, latents, kept, residual, bool(needs[m]),
    )  # fmt: skip
    nothing = features[0].new_empty(0)
    wanted = [d.contiguous() if need else nothing.clone() for d, need in zip(d_features, needs[:m], strict=True)]
    grads = [d if need else nothing.clone() for d, need in zip(_flatten(d_params), needs[m + 1 :], strict=True)]
    return wanted, nothing if d_source is None else d_source.contiguous(), grads


def _step_backward_fake(
    d_recovered, d_latents, d_discrimination, d_reconstruction,
    features, present, source, reversal, normalizer, params,
    recovered, latents, saved, residual, normalize, needs,
):  # fmt: skip
    tensors = [*features, source, *params]
    shapes = [t.shape if need else (0,) for t, need in zip(tensors, needs, strict=True)]
    like = [features[0] if t is None or not need else t for t, need in zip(tensors, needs, strict=True)]
    grads = [t.new_empty(shape) for t, shape in zip(like, shapes, strict=True)]
    m = len(features)
    return grads[:m], grads[m], grads[m + 1 :]


def _flatten(params: Params) -> list[Tensor]:
    return [t for head in (*params.encoders, *params.decoders) for t in head] + list(params.discriminator)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    features, present, source, reversal, normalizer, params, residual, normalize, recompute = inputs
    recovered, latents, _, _, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    kept = () if recompute else (latents, *recovered, *saved)
    ctx.save_for_backward(present, source, reversal, normalizer, *features, *params, *kept)
    ctx.sizes = (len(features), len(params))
    ctx.flags = (residual, normalize, recompute)


def _autograd_of(op: Any) -> Any:
    """The autograd formula that calls the backward op ``op``."""

    def autograd(ctx: Any, d_recovered, d_latents, d_discrimination, d_reconstruction, d_saved):
        m, n_params = ctx.sizes
        residual, normalize, recompute = ctx.flags
        present, source, reversal, normalizer, *rest = ctx.saved_tensors
        features, params, kept = rest[:m], rest[m : m + n_params], rest[m + n_params :]
        latents, recovered, saved = (None, [], []) if recompute else (kept[0], kept[1 : 1 + m], kept[1 + m :])
        need_features, _, need_source, _, _, need_params, *_ = ctx.needs_input_grad
        need_source = bool(need_source) and source is not None and source.is_floating_point()
        needs = [*map(int, need_features), int(need_source), *map(int, need_params)]
        d_features, d_source, d_params = op(
            list(d_recovered or [None] * m), d_latents, d_discrimination, d_reconstruction,
            features, present, source, reversal, normalizer, params,
            recovered, latents, saved, residual, normalize, needs,
        )  # fmt: skip
        d_features = [d if need else None for d, need in zip(d_features, need_features, strict=True)]
        d_params = [d if need else None for d, need in zip(d_params, need_params, strict=True)]
        return d_features, None, d_source if need_source else None, None, None, d_params, None, None, None

    return autograd


def _refuse_double_backward(ctx: Any, *grads: Any):
    raise RuntimeError(
        "ebr_step: the fused backward cannot be differentiated again; use backend='torch' for double backward"
    )


_PLAIN = (_step, _step_fake, _step_backward)
_IMPLEMENTATIONS = {
    "ebr_step": _PLAIN,  # the native library adds its own for the CPU
    "ebr_step_torch": _PLAIN,
    "ebr_step_triton": (_ebr_triton.step, _ebr_triton.step_fake, _ebr_triton.step_backward),
}
for _name, (_forward, _fake, _backward) in _IMPLEMENTATIONS.items():
    _forward_name, _backward_name = f"mmc_fast::{_name}", f"mmc_fast::{_name}_backward"
    torch.library.define(_forward_name, _FORWARD)
    torch.library.define(_backward_name, _BACKWARD)
    torch.library.impl(_forward_name, "CompositeExplicitAutograd", _forward)
    torch.library.impl(_backward_name, "CompositeExplicitAutograd", _backward)
    torch.library.register_fake(_forward_name, _fake)
    torch.library.register_fake(_backward_name, _step_backward_fake)
    torch.library.register_autograd(
        _forward_name, _autograd_of(getattr(torch.ops.mmc_fast, f"{_name}_backward")), setup_context=_setup_context
    )
    torch.library.register_autograd(_backward_name, _refuse_double_backward)


def _load() -> tuple[str | None, str | None]:
    try:
        return library.load_ebr(), None
    except InputError as error:
        return str(error), str(error)


# Loaded here and not at the first call: torch.compile cannot trace the loading of a library. A wrong setting is told to
# whoever calls, not to whoever imports.
_native_reason, _wrong_setting = _load()


def _cpp_check(*tensors: Tensor | None) -> str | None:
    if _native_reason is not None:
        return _native_reason
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"it runs on the CPU and a tensor is on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in _NATIVE_DTYPES:
            return f"it computes in float32, bfloat16 and float16 and a tensor is {tensor.dtype}"
    return None


def _torch_check(*tensors: Tensor | None) -> str | None:
    return None


# The portable tiles are there to be right everywhere; torch's own products are faster than they are.
_prefers_native = library.current_isa() != "base" or env("MMC_CPU_ISA") is not None if _wrong_setting is None else False
for _backend in ("cpp", "triton", "torch") if _prefers_native else ("triton", "torch", "cpp"):
    register("ebr_step", _backend, {"cpp": _cpp_check, "triton": _ebr_triton.check, "torch": _torch_check}[_backend])

_OPS = {
    "cpp": torch.ops.mmc_fast.ebr_step.default,
    "triton": torch.ops.mmc_fast.ebr_step_triton.default,
    "op": torch.ops.mmc_fast.ebr_step_torch.default,
}


def ebr_step(
    features: Sequence[Tensor],
    params: Sequence[Tensor],
    present: Tensor | None,
    source: Tensor | None,
    reversal: Tensor,
    normalizer: Tensor | None,
    residual: bool,
    normalize: bool,
    recompute: bool,
    which: str = "cpp",
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Call the registered op; ``params`` in the order of :class:`mmc_fast.ops.ebr.eager.Params`, flattened.

    ``which`` is what :func:`resolve_backend` returned.
    """
    recompute = recompute or not torch.is_grad_enabled()  # nothing will be asked for again, so nothing need be kept
    recovered, latents, discrimination, reconstruction, _ = _OPS[which](
        features, present, source, reversal, normalizer, params, residual, normalize, recompute
    )
    return recovered, latents, discrimination, reconstruction


def resolve_backend(backend: str, features: Sequence[Tensor], params: Sequence[Tensor]) -> str:
    """Return what runs for a call: "cpp", "triton", "op" (the plain kernel) or "torch" (the reference).

    Raises ``RuntimeError`` with the reason where an explicit backend cannot run, :class:`InputError` for an unknown
    one.
    """
    like = features[0]
    if backend == "torch" or (backend == "auto" and like.dtype == torch.float64):
        return "torch"
    if backend in ("auto", "cpp"):
        if _wrong_setting is not None:
            raise InputError(_wrong_setting)
        reason = _cpp_check(like)
        if reason is None and (backend == "cpp" or _prefers_native):
            return "cpp"
        if backend == "auto":
            return "triton" if like.is_cuda and _ebr_triton.check_call(features, params) is None else "op"
    elif backend == "triton":
        reason = _ebr_triton.check_call(features, params)
        if reason is None:
            return "triton"
    elif backend in BACKENDS:
        reason = "it has no kernel for this op"
    else:
        raise InputError(f"ebr_step: backend='{backend}'; allowed are {', '.join(map(repr, BACKENDS))}")
    raise RuntimeError(f"ebr_step: backend='{backend}' cannot run: {reason}; backend='auto' takes one that can")
