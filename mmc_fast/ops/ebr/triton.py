"""The EBR step on Triton behind the op's contract. Triton is imported at the first call: installations without it work."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

from torch import Tensor

from ..dispatch import record
from .reference import Call, check_source_range

__all__ = ["check", "saved_like", "step", "step_backward"]

_INSTALLED = importlib.util.find_spec("triton") is not None


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
