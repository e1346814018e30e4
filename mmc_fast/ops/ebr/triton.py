"""The EBR step on Triton behind the op's contract: implementation, fake and backward, as ``ops/ebr.py`` registers them.

Triton is imported at the first call: installations without it work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import record
from .reference import check_source_range

__all__ = ["check", "step", "step_backward", "step_fake"]


def check(*tensors: Tensor | None) -> str | None:
    """Say why the kernels cannot run on these tensors, None where they can."""
    try:
        from mmc_fast.kernels.ebr import launch as kernels
        from mmc_fast.kernels.ebr.plan import DTYPES
    except ImportError as error:
        return f"Triton is not installed ({error}); pip install 'mmc-fast[triton]'"
    given = [t for t in tensors if t is not None]
    for tensor in given:
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16 and a tensor is {tensor.dtype}"
    return kernels.usable(given)


def check_call(features: Sequence[Tensor], params: Sequence[Tensor]) -> str | None:
    """The same for one call, whose widths count too."""
    reason = check(*features, *params)
    if reason is not None:
        return reason
    from mmc_fast.kernels.ebr import launch as kernels

    return kernels.unsupported(features, params)


def step(features, present, source, reversal, normalizer, params, residual, normalize, recompute):
    from mmc_fast.kernels.ebr import launch as kernels

    record("ebr_step", "triton")
    if source is not None and not source.is_floating_point():
        check_source_range(source, len(features))
    return kernels.forward(features, present, source, normalizer, params, residual, normalize, not recompute)


def step_fake(features, present, source, reversal, normalizer, params, residual, normalize, recompute):
    from mmc_fast.kernels.ebr import launch as kernels

    like = features[0]
    latents = like.new_empty(len(features), like.shape[0], params[2].shape[0])
    recovered = [f.new_empty(f.shape) for f in features]
    losses = [like.new_empty((), dtype=torch.float32) for _ in range(2)]
    return recovered, latents, *losses, [] if recompute else kernels.saved_like(features, params, normalize)


def step_backward(
    d_recovered, d_latents, d_discrimination, d_reconstruction,
    features, present, source, reversal, normalizer, params,
    recovered, latents, saved, residual, normalize, needs,
):  # fmt: skip
    from mmc_fast.kernels.ebr import launch as kernels

    record("ebr_step_backward", "triton")
    m = len(features)
    d_features, d_source, d_params = kernels.backward(
        kernels.Upstream(tuple(d_recovered), d_latents, d_discrimination, d_reconstruction),
        features, present, source, reversal, normalizer, params, recovered, latents, saved, residual, normalize,
        kernels.Needs(any(needs[:m]), bool(needs[m]), any(needs[m + 1 :])),
    )  # fmt: skip
    nothing = features[0].new_empty(0)
    wanted = [d if need else nothing.clone() for d, need in zip(d_features, needs[:m], strict=True)]
    grads = [d if need else nothing.clone() for d, need in zip(d_params, needs[m + 1 :], strict=True)]
    return wanted, nothing if d_source is None else d_source, grads
