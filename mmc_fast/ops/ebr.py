"""The registered op ``mmc_fast::ebr_step``: schema, fake, autograd; every backend lives behind this contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._ebr_kernel import Params, Saved, backward, forward, split_params

__all__ = ["SCHEMA_VERSION", "ebr_step", "resolve_backend"]

SCHEMA_VERSION = 1

_INPUTS = "Tensor[] features, Tensor? present, Tensor? source, Tensor reversal, Tensor? normalizer, Tensor[] params"

torch.library.define(
    "mmc_fast::ebr_step",
    f"({_INPUTS}, bool residual, bool normalize, bool recompute)"
    " -> (Tensor[] recovered, Tensor latents, Tensor discrimination_loss, Tensor reconstruction_loss, Tensor[] saved)",
)
torch.library.define(
    "mmc_fast::ebr_step_backward",
    "(Tensor?[] d_recovered, Tensor? d_latents, Tensor? d_discrimination, Tensor? d_reconstruction,"
    f" {_INPUTS}, Tensor[] recovered, Tensor? latents, Tensor[] saved, bool residual, bool normalize, bool need_source)"
    " -> (Tensor[] d_features, Tensor d_source, Tensor[] d_params)",
)


@torch.library.impl("mmc_fast::ebr_step", "CompositeExplicitAutograd")
def _ebr_step(features, present, source, reversal, normalizer, params, residual, normalize, recompute):
    recovered, latents, discrimination, reconstruction, saved = forward(
        features, present, source, normalizer, split_params(params, len(features)), residual, normalize
    )
    return recovered, latents, discrimination, reconstruction, [] if recompute else saved.flat()


@torch.library.register_fake("mmc_fast::ebr_step")
def _ebr_step_fake(features, present, source, reversal, normalizer, params, residual, normalize, recompute):
    m, batch = len(features), features[0].shape[0]
    split = split_params(params, m)
    like = features[0]
    saved: list[Tensor] = []
    if not recompute:
        saved = [like.new_empty(batch, head[0].shape[0]) for head in (*split.encoders, *split.decoders)]
        saved += [like.new_empty(m * batch, w.shape[0]) for w in split.discriminator[0::2]]
        if normalize:
            saved.append(like.new_empty(m, batch, dtype=torch.float32))
    latents = like.new_empty(m, batch, split.encoders[0][2].shape[0])
    recovered = [f.new_empty(f.shape) for f in features]
    return recovered, latents, *(like.new_empty((), dtype=torch.float32) for _ in range(2)), saved


@torch.library.impl("mmc_fast::ebr_step_backward", "CompositeExplicitAutograd")
def _ebr_step_backward(
    d_recovered, d_latents, d_discrimination, d_reconstruction,
    features, present, source, reversal, normalizer, params,
    recovered, latents, saved, residual, normalize, need_source,
):  # fmt: skip
    m = len(features)
    split = split_params(params, m)
    if saved:
        kept = Saved.unflatten(saved, m, normalize)
    else:
        recovered, latents, _, _, kept = forward(features, present, source, normalizer, split, residual, normalize)
    d_features, d_source, d_params = backward(
        (d_recovered, d_latents, d_discrimination, d_reconstruction),
        features, present, source, reversal, normalizer, split, recovered, latents, kept, residual, need_source,
    )  # fmt: skip
    d_features = [d.contiguous() for d in d_features]
    d_source = features[0].new_empty(0) if d_source is None else d_source.contiguous()
    return d_features, d_source, _flatten(d_params)


@torch.library.register_fake("mmc_fast::ebr_step_backward")
def _ebr_step_backward_fake(
    d_recovered, d_latents, d_discrimination, d_reconstruction,
    features, present, source, reversal, normalizer, params,
    recovered, latents, saved, residual, normalize, need_source,
):  # fmt: skip
    d_source = source.new_empty(source.shape) if need_source else features[0].new_empty(0)
    return [f.new_empty(f.shape) for f in features], d_source, [p.new_empty(p.shape) for p in params]


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


def _autograd(ctx: Any, d_recovered, d_latents, d_discrimination, d_reconstruction, d_saved):
    m, n_params = ctx.sizes
    residual, normalize, recompute = ctx.flags
    present, source, reversal, normalizer, *rest = ctx.saved_tensors
    features, params, kept = rest[:m], rest[m : m + n_params], rest[m + n_params :]
    latents, recovered, saved = (None, [], []) if recompute else (kept[0], kept[1 : 1 + m], kept[1 + m :])
    need_source = source is not None and source.is_floating_point() and ctx.needs_input_grad[2]
    d_features, d_source, d_params = torch.ops.mmc_fast.ebr_step_backward(
        list(d_recovered or [None] * m), d_latents, d_discrimination, d_reconstruction,
        features, present, source, reversal, normalizer, params,
        recovered, latents, saved, residual, normalize, need_source,
    )  # fmt: skip
    return d_features, None, d_source if need_source else None, None, None, d_params, None, None, None


def _refuse_double_backward(ctx: Any, *grads: Any):
    raise RuntimeError(
        "ebr_step: the fused backward cannot be differentiated again; use backend='torch' for double backward"
    )


torch.library.register_autograd("mmc_fast::ebr_step", _autograd, setup_context=_setup_context)
torch.library.register_autograd("mmc_fast::ebr_step_backward", _refuse_double_backward)


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
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Call the registered op; ``params`` in the order of :class:`mmc_fast.ops._ebr_kernel.Params`, flattened."""
    recovered, latents, discrimination, reconstruction, _ = torch.ops.mmc_fast.ebr_step(
        list(features), present, source, reversal, normalizer, list(params), residual, normalize, recompute
    )
    return recovered, latents, discrimination, reconstruction


def resolve_backend(backend: str, like: Tensor) -> str:
    """Return "op" (the registered operator) or "torch" (the differentiable reference) for a tensor like ``like``."""
    if backend == "torch" or (backend == "auto" and like.dtype == torch.float64):
        return "torch"
    if backend == "auto":
        return "op"
    if backend in ("cpp", "triton", "cuda"):
        raise RuntimeError(
            f"ebr_step: backend='{backend}' has no kernel for this op in this build; use 'auto' or 'torch'"
        )
    raise ValueError(f"ebr_step: backend='{backend}'; allowed are 'auto', 'cpp', 'triton', 'cuda', 'torch'")
