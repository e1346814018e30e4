"""Pure functions that users call: the EBR step and gradient reversal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmc_fast._util.autocast import autocast_enabled, cast_together
from mmc_fast.ops.dispatch import choose, record
from mmc_fast.ops.ebr import op, reference, triton
from mmc_fast.ops.ebr.reference import Call
from mmc_fast.ops.ebr.reversal import check_reversal, grad_reverse, lambda_tensor

__all__ = ["EBROutput", "check_reversal", "ebr_step", "grad_reverse"]

_NARROW = 64  # widest layer that autocast computes in float32 (docs/performance.md)
_CASTS_ALONE = ("cpu",)  # there a gradient is still in the cache when it is added to a parameter's


class EBROutput(NamedTuple):
    """Result of an EBR step; add the two losses to yours and call backward once."""

    recovered: Any  # list of [B, d_i], or a dict of them where a mapping went in
    latents: Tensor
    discrimination_loss: Tensor
    reconstruction_loss: Tensor


def ebr_step(
    features: Sequence[Tensor | None],
    encoders: Sequence[Sequence[Tensor]],
    decoders: Sequence[Sequence[Tensor]],
    discriminator: Sequence[Tensor],
    *,
    present: Tensor | None = None,
    source: Tensor | None = None,
    reversal: float | Tensor = 1.0,
    normalizer: Tensor | None = None,
    residual: bool = False,
    normalize: bool = False,
    backend: str = "auto",
    recompute: bool = False,
) -> EBROutput:
    r"""Encode, reconstruct and discriminate all modalities: one step of explicit basis reallocation.

        g_i = encoder_i(z_i),   r_i = decoder_i(Σ_j s_ij g_j)
        L_md  = Σ_{present (b,i)} CE(ψ(g_i[b]), i) / max(1, #present)
        L_rec = Σ_rows ‖r_i[b] - stopgrad(z_i[b])‖² / d_i / max(1, #rows)

    The gradient of ``L_md`` reaches the latents multiplied by ``-reversal``; the discriminator's own
    gradient keeps its sign. An absent row is never read: its latent is zero, it takes no gradient and counts nowhere.

    Args:
        features: m tensors ``[B, d_i]``, any strides; None for a modality that is absent from the whole batch.
        encoders: m tuples ``(W1 [h, d_i], b1 [h], W2 [k, h], b2 [k])``; ReLU between the two layers.
        decoders: m tuples ``(W1 [h, k], b1 [h], W2 [d_i, h], b2 [d_i])``.
        discriminator: ``(W_1, b_1, ..., W_L [m, p], b_L [m])``, ReLU between layers, first width k.
        present: bool ``[B, m]``; None means all present.
        source: int64 ``[B, m]`` (which latent is decoded for modality i; -1 = none) or float ``[B, m, m]`` (weights,
            differentiable); None decodes each modality from its own latent. Absent latents have no weight; a target
            without any is a zero row.
        reversal: λ of the gradient reversal, finite and not negative: a float, or a 0-d tensor, whose value is
            checked on the CPU alone (elsewhere that would synchronise); 0 cuts the branch.
        normalizer: replaces both denominators (one element), or #present and #rows (two elements): exact means
            over processes and accumulation steps.
        residual: add the decoded row to the feature where the modality is present.
        normalize: layer-normalise latents (no affine parameters, eps 1e-5) before every further use.
        backend: "auto", "cpp" (native), "triton", "eager" (torch, arranged by hand) or "reference" (the definition:
            float64 and double backward). An explicit one is used or raises with the reason; "auto" takes the first row
            of ``mmc_fast.explain("ebr_step", ...)`` that is usable.
        recompute: keep only the inputs for backward and compute the activations again.

    Returns:
        ``EBROutput(recovered: m x [B, d_i], latents [m, B, k], discrimination_loss, reconstruction_loss)``; the
        losses are float32 scalars (float64 for float64 inputs), never synchronised to the host.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, λ, or an integer source out of range (on CPU).
        RuntimeError: an explicit backend cannot run here.

    Autocast: computes and returns autocast's dtype, losses in float32; on a CPU layers of at most 64 units are computed
    in float32 and only what is returned is rounded.

    Cost: ``2 B (sum_i 2 h (d_i + k) ... + m * psi)`` multiply-adds forward, about twice that backward.
    Source: Chaudhuri et al., ICML 2025, section 3.3 and appendix; L_rec from the authors' slides.

    Examples:
        >>> head = mmc_fast.nn.EBRHead([6, 4], latent_dim=8, hidden_dim=16, psi_dims=(8,))
        >>> heads = [[p for layer in part for p in layer.parameters()] for part in (*head.encoders, *head.decoders)]
        >>> psi = list(head.discriminator.parameters())
        >>> out = mmc_fast.functional.ebr_step([torch.randn(5, 6), torch.randn(5, 4)], heads[:2], heads[2:], psi)
        >>> [list(r.shape) for r in out.recovered], list(out.latents.shape)
        ([[5, 6], [5, 4]], [2, 5, 8])
    """
    filled, present = _fill_absent(features, present, encoders)
    params = [t for head in (*encoders, *decoders) for t in head] + list(discriminator)
    like = filled[0]
    device, double = like.device, like.dtype == torch.float64
    low = autocast_enabled(device.type) and not double
    given = (filled, encoders, decoders, discriminator, present, source, normalizer)
    chosen = None if low or torch.compiler.is_compiling() else choose("ebr_step", backend, filled, params)
    native = chosen == "cpp" and source is None
    if not native:
        _check(*given)
    lambda_ = lambda_tensor(reversal, device, torch.float64 if double else torch.float32)
    call = Call(filled, present, source, lambda_, normalizer, params, residual, normalize, recompute, backend)
    if low:
        return _autocast(call)
    if not native:
        return _run(call, chosen)
    try:  # the native kernel looks at everything itself, and these checks would cost as much as a small step
        return _by(call, "cpp")
    except Exception:
        _check(*given)  # where something does not fit, in the words of this function
        raise


def _run(call: Call, chosen: str | None = None) -> EBROutput:
    backend = chosen or choose("ebr_step", call.backend, call.features, call.params)
    if backend != "cpp":  # the native kernel looks for itself, at less cost
        like = call.features[0]
        for i, p in enumerate(call.params):
            if p.dtype != like.dtype or p.device != like.device:
                raise TypeError(
                    f"ebr_step: parameter {i} is {p.dtype} on {p.device} but features[0] is {like.dtype} on {like.device}; "
                    "cast the model or use torch.autocast"
                )
    return _by(call, backend)


def _by(call: Call, backend: str) -> EBROutput:
    if backend == "reference":  # differentiable by itself: it needs no op
        if not torch.compiler.is_compiling():
            record("ebr_step", "reference")
        return EBROutput(*reference.ebr_step(call))
    if backend == "triton" and triton.applies(call):
        return EBROutput(*triton.apply(call))
    recompute = call.recompute or not torch.is_grad_enabled()  # nothing will be asked for again: keep nothing
    return EBROutput(*op.ebr_step(*call[:8], recompute, backend)[:4])


def _autocast(call: Call) -> EBROutput:
    device = call.features[0].device.type
    dtype = torch.get_autocast_dtype(device)
    # narrow layers take longer in bfloat16 on a CPU than in float32, and are less exact
    narrow = device == "cpu" and call.backend != "reference" and max(max(p.shape) for p in call.params) <= _NARROW
    inside = torch.float32 if narrow else dtype
    m, tensors = len(call.features), [*call.features, *call.params]
    # one by one: where casts are not launched, for a compiler, and to be differentiated twice
    alone = device in _CASTS_ALONE or call.backend == "reference" or not triton.applies(call)
    tensors = [t.to(inside) for t in tensors] if alone else cast_together(tensors, inside)
    features, params = tensors[:m], tensors[m:]
    with torch.autocast(device, enabled=False):
        out = _run(call._replace(features=features, params=params))
    return EBROutput([r.to(dtype) for r in out.recovered], out.latents.to(dtype), *out[2:]) if narrow else out


def _fill_absent(
    features: Sequence[Tensor | None], present: Tensor | None, encoders: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], Tensor | None]:
    """Stand-ins of zeros for modalities given as None, with their column of ``present`` cleared."""
    if len(features) != len(encoders):
        raise ValueError(f"ebr_step: got {len(features)} features for {len(encoders)} encoders; pass one per modality")
    given = [f for f in features if f is not None]
    if not given:
        raise ValueError("ebr_step: every modality is None; at least one tensor is needed to know the batch size")
    like = given[0]
    if len(given) == len(features):
        return given, present
    column = torch.tensor([f is not None for f in features], device=like.device)
    if present is None:
        present = column.expand(like.shape[0], -1)
    elif present.shape[-1] == len(features):
        present = present & column
    filled = [
        like.new_zeros(like.shape[0], e[0].shape[1]) if f is None else f
        for f, e in zip(features, encoders, strict=True)
    ]
    return filled, present


def _check(
    features: list[Tensor],
    encoders: Sequence[Sequence[Tensor]],
    decoders: Sequence[Sequence[Tensor]],
    discriminator: Sequence[Tensor],
    present: Tensor | None,
    source: Tensor | None,
    normalizer: Tensor | None,
) -> None:
    m = len(features)
    batch, dtype = features[0].shape[0], features[0].dtype
    if not dtype.is_floating_point:
        raise TypeError(f"ebr_step: features[0] is {dtype}; pass floating-point features, for example x.float()")
    if len(decoders) != m:
        raise ValueError(f"ebr_step: got {len(decoders)} decoders for {m} modalities; pass one per modality")
    for i, f in enumerate(features):
        if f.dim() != 2 or f.shape[0] != batch or f.shape[1] != encoders[i][0].shape[1]:
            raise ValueError(
                f"ebr_step: features[{i}] has shape {list(f.shape)}; expected [{batch}, {encoders[i][0].shape[1]}] "
                "(batch of features[0], width of its encoder)"
            )
        if f.dtype != dtype or f.device != features[0].device:
            raise TypeError(
                f"ebr_step: features[{i}] is {f.dtype} on {f.device} but features[0] is {dtype} on "
                f"{features[0].device}; cast them to one dtype and device"
            )
    if len(discriminator) < 2 or discriminator[-2].shape[0] != m:
        raise ValueError(f"ebr_step: the discriminator must end in a layer of {m} outputs, one per modality")
    for name, given in (("present", present), ("source", source)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"ebr_step: {name} must be a tensor or None, got {type(given).__name__}")
    for name, given in (("present", present), ("source", source), ("normalizer", normalizer)):
        if isinstance(given, Tensor) and given.device != features[0].device:
            raise TypeError(
                f"ebr_step: {name} is on {given.device} but features[0] is on {features[0].device}; move it there"
            )
    if present is not None and (present.dtype != torch.bool or tuple(present.shape) != (batch, m)):
        raise ValueError(
            f"ebr_step: present is {present.dtype} {list(present.shape)}; expected torch.bool [{batch}, {m}]"
        )
    if source is not None:
        expected = [batch, m, m] if source.is_floating_point() else [batch, m]
        if list(source.shape) != expected or source.dtype not in (
            torch.int64,
            torch.float64,
            dtype,
            torch.float32,
        ):
            raise ValueError(
                f"ebr_step: source is {source.dtype} {list(source.shape)}; expected torch.int64 [{batch}, {m}] or "
                f"{dtype} [{batch}, {m}, {m}]"
            )
    if normalizer is not None and (not isinstance(normalizer, Tensor) or normalizer.numel() not in (1, 2)):
        raise ValueError("ebr_step: normalizer must be a tensor of one element, or of two (#present, #rows)")
