"""The registered op ``mmc_fast::ebr_step``: schema, fake, autograd, and which backend a call takes.

One op and its backward. Their last argument names the backend, chosen before the call: a graph that
``torch.compile`` or ``torch.export`` took keeps it. On the CPU the native library registers its kernel and hands calls
of another backend to the kernel registered here, which serves every device: Triton's, or ``eager.py``. The library also
brings the autograd formula, for every device; where it was not built, the same formula is registered here.
``reference.py`` is differentiable by itself and needs no op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmc_fast._env import env
from mmc_fast.errors import InputError

from .. import measured, native
from ..dispatch import prefer, register
from . import eager, products, triton
from .reference import Call

SCHEMA_VERSION = 1

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CALL = (  # the fields of Call
    "Tensor[] features, Tensor? present, Tensor? source, Tensor reversal, Tensor? normalizer, Tensor[] params,"
    " bool residual, bool normalize, bool recompute, str backend"
)
_SCHEMAS = {
    "mmc_fast::ebr_step": f"({_CALL}) -> (Tensor[] recovered, Tensor latents, Tensor discrimination_loss,"
    " Tensor reconstruction_loss, Tensor[] saved)",
    # needs: one flag per feature, one for the source, one per parameter; what is not needed comes back empty
    "mmc_fast::ebr_step_backward": "(Tensor?[] d_recovered, Tensor? d_latents, Tensor? d_discrimination,"
    f" Tensor? d_reconstruction, {_CALL}, Tensor[] recovered, Tensor? latents, Tensor[] saved, int[] needs)"
    " -> (Tensor[] d_features, Tensor d_source, Tensor[] d_params)",
}
_STEP, _BACKWARD = _SCHEMAS
_FIELDS = len(Call._fields)


def _kernels(call: Call) -> ModuleType:
    if call.backend == "triton":
        return triton
    if call.backend == "eager":
        return eager
    raise RuntimeError(
        f"ebr_step: backend='{call.backend}' has no kernel here for tensors on {call.features[0].device}"
    )


def _step(*arguments: Any):
    call = Call(*arguments)
    return _kernels(call).step(call)


def _step_fake(*arguments: Any):
    call = Call(*arguments)
    like, latent = call.features[0], call.params[2].shape[0]
    saved = [] if call.recompute else (triton if call.backend == "triton" else eager).saved_like(call)
    latents = like.new_empty(len(call.features), like.shape[0], latent)
    losses = [like.new_empty((), dtype=torch.float32) for _ in range(2)]
    return [f.new_empty(f.shape) for f in call.features], latents, *losses, saved


def _step_backward(*arguments: Any):
    call, (recovered, latents, saved, needs) = Call(*arguments[4 : 4 + _FIELDS]), arguments[4 + _FIELDS :]
    kernels, m = _kernels(call), len(call.features)
    d_features, d_source, d_params = kernels.step_backward(arguments[:4], call, recovered, latents, saved, needs)
    nothing = call.features[0].new_empty(0)
    wanted = [d if need else nothing.clone() for d, need in zip(d_features, needs[:m], strict=True)]
    grads = [d if need else nothing.clone() for d, need in zip(d_params, needs[m + 1 :], strict=True)]
    return wanted, nothing if d_source is None else d_source.contiguous(), grads


def _step_backward_fake(*arguments: Any):
    call, needs = Call(*arguments[4 : 4 + _FIELDS]), arguments[-1]
    tensors = [*call.features, call.source, *call.params]
    like = [t if t is not None and need else call.features[0] for t, need in zip(tensors, needs, strict=True)]
    grads = [t.new_empty(t.shape if need else (0,)) for t, need in zip(like, needs, strict=True)]
    m = len(call.features)
    return grads[:m], grads[m], grads[m + 1 :]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    call = Call(*inputs)
    recovered, latents, _, _, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    kept = () if call.recompute else (latents, *recovered, *saved)
    ctx.sizes, ctx.flags = (len(call.features), len(call.params)), call[6:]
    ctx.save_for_backward(*call[1:5], *call.features, *call.params, *kept)


def _autograd(ctx: Any, d_recovered, d_latents, d_discrimination, d_reconstruction, d_saved):
    m, n_params = ctx.sizes
    stored = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
    masks, rest = stored[:4], stored[4:]
    call, kept = Call._make((rest[:m], *masks, rest[m : m + n_params], *ctx.flags)), rest[m + n_params :]
    latents, recovered, saved = (None, [], []) if call.recompute else (kept[0], kept[1 : 1 + m], kept[1 + m :])
    wanted = Call(*ctx.needs_input_grad)
    need_source = bool(wanted.source) and call.source is not None and call.source.is_floating_point()
    needs = [*map(int, wanted.features), int(need_source), *map(int, wanted.params)]
    d_features, d_source, d_params = torch.ops.mmc_fast.ebr_step_backward(
        list(d_recovered or [None] * m), d_latents, d_discrimination, d_reconstruction,
        *call, recovered, latents, saved, needs,
    )  # fmt: skip
    grads: list[Any] = [None] * _FIELDS
    grads[0] = [d if need else None for d, need in zip(d_features, wanted.features, strict=True)]
    grads[2] = d_source if need_source else None
    grads[5] = [d if need else None for d, need in zip(d_params, wanted.params, strict=True)]
    return tuple(grads)


def _refuse_double_backward(ctx: Any, *grads: Any):
    raise RuntimeError(
        "ebr_step: the fused backward cannot be differentiated again; use backend='reference' for double backward"
    )


for _name, _kernel, _fake in ((_STEP, _step, _step_fake), (_BACKWARD, _step_backward, _step_backward_fake)):
    torch.library.define(_name, _SCHEMAS[_name])
    torch.library.impl(_name, "CompositeExplicitAutograd", _kernel)
    torch.library.register_fake(_name, _fake)


def _load() -> tuple[str | None, str | None]:
    try:
        return native.load_ebr(), None
    except InputError as error:
        return str(error), str(error)


# Loaded here and not at the first call: torch.compile cannot trace the loading of a library. A wrong setting is told to
# whoever calls, not to whoever imports.
_native_reason, _wrong_setting = _load()
if _native_reason is not None:
    torch.library.register_autograd(_STEP, _autograd, setup_context=_setup_context)
    torch.library.register_autograd(_BACKWARD, _refuse_double_backward)
else:
    products.serve()


def _cpp_check(features: Sequence[Tensor], params: Sequence[Tensor] | None = None) -> str | None:
    if _native_reason is not None:
        if _wrong_setting is not None:
            raise InputError(_wrong_setting)
        return _native_reason
    for tensor in features:
        if not tensor.is_cpu:
            return f"it runs on the CPU and a tensor is on {tensor.device}"
        if tensor.dtype not in _NATIVE_DTYPES and tensor.is_floating_point():
            return f"it computes in float32, bfloat16 and float16 and a tensor is {tensor.dtype}"
    return None


def _reference_check(features: Sequence[Tensor], params: Sequence[Tensor] | None = None) -> str | None:
    return None


def _cpp_note(features: Sequence[Tensor], params: Sequence[Tensor] | None = None) -> str:
    return products.describe("bfloat16" if any(t.dtype == torch.bfloat16 for t in features) else "float32")


def _judges(check: Callable[..., Any]) -> Callable[..., Any]:
    """The check as the registry calls it: on the features and parameters of a call, two lists, or on tensors, or nothing."""

    def judge(*args: Any) -> Any:
        if args and type(args[0]) is list:
            return check(*args)
        return check([t for t in args if t is not None])

    return judge


_CHECKS = {"cpp": _cpp_check, "triton": triton.check, "eager": eager.check, "reference": _reference_check}


def _measured(features: Sequence[Tensor], params: Sequence[Tensor] | None = None) -> str | None:
    return measured.faster("ebr_step", features[0] if features else None)


def _triton_note(features: Sequence[Tensor], params: Sequence[Tensor] | None = None) -> str:
    return measured.note("ebr_step", features[0] if features else None)


_NOTES: dict[str, Any] = {"cpp": _judges(_cpp_note), "triton": _judges(_triton_note)}
# The portable tiles are there to be right everywhere; torch's own products are faster than they are.
_native_wins = _native_reason is None and (native.current_isa() != "base" or env("MMC_CPU_ISA") is not None)
# A GPU kernel is taken where a measurement on that class of devices shows that it is faster than eager, else by name only.
prefer("ebr_step", _judges(_measured))
for _name in ("cpp", "eager", "triton", "reference") if _native_wins else ("eager", "cpp", "triton", "reference"):
    register("ebr_step", _name, _judges(_CHECKS[_name]), note=_NOTES.get(_name, ""))

ebr_step = torch.ops.mmc_fast.ebr_step.default
