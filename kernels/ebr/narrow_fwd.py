"""The EBR step of narrow heads (which ones: ebr_plan.py): one launch forward, two or three backward, for all modalities.

Formulas: docs/ebr.md. A program owns (modality, tile of rows); hidden activations stay in registers, in blocks of the
hidden width, and are computed again in backward. In: features ``[B, d_i]`` of any strides, weights as ``nn.Linear``
holds them, contiguous. Out: recovered ``[B, d_i]``, latents ``[M, B, K]``, in the dtype of the features. Products
accumulate in float32; losses and their denominators are float32. Saved for backward: latents, recovered, the two
denominators, and with ``normalize`` the reciprocal standard deviations. With a source, a program encodes every latent
that its rows use, so no program waits for another.

Forward; backward is in ebr_narrow_bwd.py. Nothing here depends on the order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .narrow_parts import decoder_hidden, encoder_hidden, load_feature, psi_logits
from .tiles import (
    NO_SOURCE,
    any_row,
    cross_entropy,
    finish_losses,
    load_bias,
    load_weight_t,
    pick,
    pick_as,
    pick_int,
    present_rows,
    source_weight,
    times_weight_t,
)

__all__ = ["ebr_narrow_fwd_kernel"]


@triton.jit
def _encode(
    x, w1, b1, w2, b2, r, keep, D, H, stride_xb, stride_xd, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr, NORMALIZE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """float32 ``[BM, KP]`` latents, zero in rows that keep leaves out, and their reciprocal standard deviation."""
    k = tl.arange(0, KP)
    g = tl.zeros((BM, KP), tl.float32)
    for h0 in tl.range(0, tl.where(any_row(keep), H, 0), BH):
        h = h0 + tl.arange(0, BH)
        hidden = encoder_hidden(x, w1, b1, r, keep, h, D, H, stride_xb, stride_xd, BM, BH, BD, PREC)
        g = tl.dot(hidden.to(x.dtype.element_ty), load_weight_t(w2, k, K, h, H), g, input_precision=PREC)
    g += load_bias(b2, k, K)[None, :]
    rstd = tl.zeros((BM,), tl.float32)
    if NORMALIZE:
        mean = tl.sum(g, axis=1) / K  # columns past K are zero
        centred = tl.where((k < K)[None, :], g - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / K + 1e-5)
        g = centred * rstd[:, None]
    return tl.where(keep[:, None], g, 0.0), rstd


@triton.jit
def ebr_narrow_fwd_kernel(
    x, recovered, enc_w1, enc_b1, enc_w2, enc_b2, dec_w1, dec_b1, dec_w2, dec_b2, psi,
    present, source, normalizer, latents, rstd_out, partials, counter, md_out, rec_out, counts,
    dims, stride_xb, stride_xd, B, H, tiles, second,
    stride_pb, stride_pm, stride_sb, stride_si, stride_sj,
    M: tl.constexpr, PSI_DIMS: tl.constexpr, PSI_PADS: tl.constexpr, HIDDEN: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, DEPTH: tl.constexpr, SOURCE: tl.constexpr,
    HAS_PRESENT: tl.constexpr, HAS_NORMALIZER: tl.constexpr, RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr, PREC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = program // tiles  # programs of one modality are neighbours and share its weights in the cache
    r = ((program % tiles) * BM + tl.arange(0, BM)).to(INDEX)
    inside = r < B
    K: tl.constexpr = PSI_DIMS[0]
    KP: tl.constexpr = PSI_PADS[0]
    dtype = latents.dtype.element_ty
    k = tl.arange(0, KP)
    here = present_rows(present, r, inside, i, stride_pb, stride_pm, HAS_PRESENT)

    if SOURCE == NO_SOURCE:
        own, rstd = _encode(
            pick(x, i, M), pick(enc_w1, i, M), pick(enc_b1, i, M), pick(enc_w2, i, M), pick(enc_b2, i, M), r, here,
            pick_int(dims, i, M), H, pick_as(stride_xb, i, M, INDEX), pick_as(stride_xd, i, M, INDEX),
            K, KP, BM, BH, BD, NORMALIZE, PREC,
        )  # fmt: skip
        g = own.to(dtype)
        u, valid = g, here
    else:
        own = tl.zeros((BM, KP), tl.float32)
        mixed = tl.zeros((BM, KP), tl.float32)
        rstd = tl.zeros((BM,), tl.float32)
        valid = inside & False
        for j in tl.range(0, M):
            w = source_weight(
                source, present, r, inside, i, j, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
                SOURCE, HAS_PRESENT, dtype,
            )  # fmt: skip
            used = w != 0
            mine = here & (i == j)
            other, other_rstd = _encode(
                pick(x, j, M), pick(enc_w1, j, M), pick(enc_b1, j, M), pick(enc_w2, j, M), pick(enc_b2, j, M), r,
                used | mine, pick_int(dims, j, M), H, pick_as(stride_xb, j, M, INDEX), pick_as(stride_xd, j, M, INDEX),
                K, KP, BM, BH, BD, NORMALIZE, PREC,
            )  # fmt: skip
            rounded = other.to(dtype).to(tl.float32)
            mixed += tl.where(used[:, None], w[:, None] * rounded, 0.0)
            own = tl.where(mine[:, None], other, own)
            rstd = tl.where(mine, other_rstd, rstd)
            valid = valid | used
        g = own.to(dtype)
        u = mixed.to(dtype)
    at = (tl.cast(i, INDEX) * B + r)[:, None] * K + k[None, :]
    tl.store(latents + at, g, mask=inside[:, None] & (k < K)[None, :])
    if NORMALIZE:
        tl.store(rstd_out + tl.cast(i, INDEX) * B + r, rstd, mask=inside)

    some = any_row(here)
    OUT: tl.constexpr = PSI_PADS[1]
    z = times_weight_t(
        tl.zeros((BM, OUT), tl.float32), g, psi[0], tl.arange(0, OUT), PSI_DIMS[1], 0, some, K, DEPTH, PREC
    )
    _, logits = psi_logits(z, psi, some, PSI_DIMS, PSI_PADS, HIDDEN, BM, DEPTH, PREC)
    ce, _ = cross_entropy(logits, i, M, PSI_PADS[HIDDEN + 1])

    counted = here & valid
    D = pick_int(dims, i, M)
    xi, out = pick(x, i, M), pick(recovered, i, M)
    w3, b3, w4, b4 = pick(dec_w1, i, M), pick(dec_b1, i, M), pick(dec_w2, i, M), pick(dec_b2, i, M)
    s_xb, s_xd = pick_as(stride_xb, i, M, INDEX), pick_as(stride_xd, i, M, INDEX)
    units = tl.where(any_row(valid), H, 0)
    squared = tl.zeros((BM,), tl.float32)
    for d0 in tl.range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        y = tl.zeros((BM, BD), tl.float32)
        for h0 in tl.range(0, units, BH):
            h = h0 + tl.arange(0, BH)
            hidden = decoder_hidden(u, w3, b3, h, H, any_row(valid), K, BM, BH, DEPTH, PREC)
            y = tl.dot(hidden.to(dtype), load_weight_t(w4, d, D, h, H), y, input_precision=PREC)
        y = tl.where(valid[:, None], y + load_bias(b4, d, D)[None, :], 0.0)
        feature = load_feature(xi, r, here, d, D, s_xb, s_xd).to(tl.float32)
        error = tl.where(counted[:, None] & (d < D)[None, :], y - feature, 0.0)
        squared += tl.sum(error * error, axis=1)
        if RESIDUAL:
            y += feature
        tl.store(out + r[:, None] * D + d[None, :], y.to(dtype), mask=inside[:, None] & (d < D)[None, :])

    finish_losses(
        partials, counter, normalizer, md_out, rec_out, counts, program, tiles * M, second,
        tl.where(here, ce, 0.0), squared / D, here, counted, HAS_NORMALIZER, BLOCK=128,
    )  # fmt: skip
