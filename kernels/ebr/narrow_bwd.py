"""The backward of narrow EBR heads: gradients of rows, then of weights over the same rows, and a launch for their sums.

Tensors and what accumulates where: ebr_narrow_fwd.py. Hidden activations are computed again; gradients of latents go
through memory between the two halves of a program. Float32 sums of weight gradients, cast by the finish launch.

Not deterministic: with ATOMIC the sums of weight gradients over slices of rows meet in float32 atomics; without it every
slice has a slab of its own and the last launch adds the slabs in order. Nothing else depends on the order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .narrow_parts import decoder_hidden, encoder_hidden, load_feature, psi_grads
from .tiles import (
    NO_SOURCE,
    any_row,
    decoded_grad,
    group_of,
    load_weight,
    mixed_latents,
    pick,
    pick_as,
    pick_int,
    pick_long,
    present_rows,
    source_weight,
    times_weight,
    valid_rows,
)

__all__ = ["ebr_narrow_bwd_kernel", "ebr_narrow_finish_kernel"]


@triton.jit
def _emit(out, rows, n_rows, columns, n_columns, value, ATOMIC: tl.constexpr):
    """Add a tile of a weight gradient to the sums of all programs, or store it in this program's slab."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    at = out + rows[:, None] * n_columns + columns[None, :]
    if ATOMIC:
        tl.atomic_add(at, value, mask=mask, sem="relaxed")
    else:
        tl.store(at, value, mask=mask)


@triton.jit
def _emit_bias(out, at, n, value, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(out + at, value, mask=at < n, sem="relaxed")
    else:
        tl.store(out + at, value, mask=at < n)


@triton.jit
def _decoded_rows(
    latents, source, present, r, inside, slot, B, stride_pb, stride_pm, stride_sb, stride_si, stride_sj,
    K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, M: tl.constexpr, SOURCE: tl.constexpr,
    HAS_PRESENT: tl.constexpr,
):  # fmt: skip
    """Rows in which a slot decodes something, those of them that the reconstruction loss counts, and what it decodes."""
    valid = valid_rows(
        source, present, r, inside, slot, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
        SOURCE, HAS_PRESENT, M, latents.dtype.element_ty,
    )  # fmt: skip
    counted = valid & present_rows(present, r, inside, slot, stride_pb, stride_pm, HAS_PRESENT)
    k = tl.arange(0, KP)
    u = mixed_latents(
        latents, source, present, r, valid, k, k < K, slot, B, K, stride_sb, stride_si, stride_sj,
        stride_pb, stride_pm, SOURCE, HAS_PRESENT, M, BM, KP,
    )  # fmt: skip
    return valid, counted, u


@triton.jit
def _latent_grad(
    u, d_recovered, recovered, x, w3, b3, w4, r, valid, counted, has_grad, coefficient, stride_db, stride_dd,
    stride_xb, stride_xd, D, H, some, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
    BD: tl.constexpr, DEPTH: tl.constexpr, RESIDUAL: tl.constexpr, REC_LOSS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """float32 ``[BM, KP]``: gradient of a decoder's input u from that of its output."""
    d_u = tl.zeros((BM, KP), tl.float32)
    for h0 in tl.range(0, tl.where(some, H, 0), BH):
        h = h0 + tl.arange(0, BH)
        hidden = decoder_hidden(u, w3, b3, h, H, some, K, BM, BH, DEPTH, PREC)
        d_h = tl.zeros((BM, BH), tl.float32)
        for d0 in tl.range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            d_y = decoded_grad(
                d_recovered, recovered, x, r, d, d < D, valid, counted, has_grad, coefficient,
                stride_db, stride_dd, stride_xb, stride_xd, D, RESIDUAL, REC_LOSS,
            ).to(u.dtype)  # fmt: skip
            d_h = tl.dot(d_y, load_weight(w4, d, D, h, H), d_h, input_precision=PREC)
        d_h = tl.where(hidden > 0, d_h, 0.0).to(u.dtype)
        d_u = tl.dot(d_h, load_weight(w3, h, H, tl.arange(0, KP), K), d_u, input_precision=PREC)
    return d_u


@triton.jit
def _psi_weight_grad(
    out, latents, present, psi, first, end, j, B, md_scale, stride_pb, stride_pm,
    LAYER: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, INP: tl.constexpr, OUTP: tl.constexpr,
    M: tl.constexpr, DIMS: tl.constexpr, PADS: tl.constexpr, HIDDEN: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr,
    HAS_PRESENT: tl.constexpr, MD_LOSS: tl.constexpr, ATOMIC: tl.constexpr, PREC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Gradient of one layer of the discriminator over a slice of modality j's rows: weight, then bias, at ``out``."""
    o = tl.arange(0, OUTP)
    COLUMNS: tl.constexpr = min(INP, 64)
    for c0 in tl.range(0, IN, COLUMNS):
        c = c0 + tl.arange(0, COLUMNS)
        acc = tl.zeros((OUTP, COLUMNS), tl.float32)
        acc_b = tl.zeros((OUTP,), tl.float32)
        for r0 in tl.range(first, tl.where(MD_LOSS, end, first), BM):
            r = (r0 + tl.arange(0, BM)).to(INDEX)
            here = present_rows(present, r, r < end, j, stride_pb, stride_pm, HAS_PRESENT)
            g_rows = latents + (tl.cast(j, INDEX) * B + r) * DIMS[0]
            a, d_first, d_last = psi_grads(g_rows, psi, here, j, M, DIMS, PADS, HIDDEN, BM, DEPTH, PREC)
            if LAYER == 0:
                d_out = d_first
                below = tl.load(g_rows[:, None] + c[None, :], mask=here[:, None] & (c < IN)[None, :], other=0.0)
            else:
                d_out, below = d_last, a
            acc_b += tl.sum(d_out.to(tl.float32), axis=0)
            acc = tl.dot(tl.trans(d_out), below, acc, input_precision=PREC)
        _emit(out, o, OUT, c, IN, acc * md_scale, ATOMIC)
        if c0 == 0:
            _emit_bias(out + OUT * IN, o, OUT, acc_b * md_scale, ATOMIC)


@triton.jit
def ebr_narrow_bwd_kernel(
    x, recovered, d_recovered, d_x, enc_w1, enc_b1, enc_w2, dec_w1, dec_b1, dec_w2, psi, has_grad,
    present, source, latents, d_latents, rstd_in, counts, d_md, d_rec, reversal, d_source, d_z, slabs,
    dims, stride_xb, stride_xd, stride_db, stride_dd, enc_at, dec_at, B, H, slices, slice_rows, heads_size, psi_at,
    psi_size, slab_size, stride_pb, stride_pm, stride_sb, stride_si, stride_sj, stride_lm, stride_lb, stride_lk,
    M: tl.constexpr, PSI_DIMS: tl.constexpr, PSI_PADS: tl.constexpr, HIDDEN: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, DEPTH: tl.constexpr, SOURCE: tl.constexpr, HAS_PRESENT: tl.constexpr,
    RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr, MD_LOSS: tl.constexpr, REC_LOSS: tl.constexpr,
    HAS_D_LATENTS: tl.constexpr, HAS_D_SOURCE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
    FEATURES: tl.constexpr, ATOMIC: tl.constexpr, PREC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A program owns (modality j, slice of rows): gradients of its rows (ROWS), then those of j's weights over them
    (WEIGHTS). The two may be two launches; the first then clears the sums that the second adds to."""
    j = tl.program_id(0) // slices
    piece = tl.program_id(0) % slices
    K: tl.constexpr = PSI_DIMS[0]
    KP: tl.constexpr = PSI_PADS[0]
    dtype = latents.dtype.element_ty
    k = tl.arange(0, KP)
    first = tl.cast(piece, INDEX) * slice_rows
    end = tl.minimum(first + slice_rows, B)

    D = pick_int(dims, j, M)
    xj, rec_j, d_rec_j, d_xj = pick(x, j, M), pick(recovered, j, M), pick(d_recovered, j, M), pick(d_x, j, M)
    s_xb, s_xd = pick_as(stride_xb, j, M, INDEX), pick_as(stride_xd, j, M, INDEX)
    s_db, s_dd = pick_as(stride_db, j, M, INDEX), pick_as(stride_dd, j, M, INDEX)
    grad_j = pick_int(has_grad, j, M) != 0
    w1, b1, w2 = pick(enc_w1, j, M), pick(enc_b1, j, M), pick(enc_w2, j, M)
    w3, b3, w4 = pick(dec_w1, j, M), pick(dec_b1, j, M), pick(dec_w2, j, M)
    md_scale, strength, rec_scale = 0.0, 0.0, 0.0
    if MD_LOSS:
        md_scale = tl.load(d_md).to(tl.float32) / tl.load(counts)
        strength = tl.load(reversal).to(tl.float32)
    if REC_LOSS:
        rec_scale = 2.0 * tl.load(d_rec).to(tl.float32) / tl.load(counts + 1)

    # Rows: gradients of latents, then of features.
    if ROWS and not WEIGHTS:
        e = tl.arange(0, 1024)
        for e0 in tl.range(tl.program_id(0) * 1024, slab_size, tl.num_programs(0) * 1024):
            tl.store(slabs + e0 + e, tl.zeros((1024,), tl.float32), mask=e0 + e < slab_size)
    if ROWS:
        for r0 in tl.range(first, end, BM):
            r = (r0 + tl.arange(0, BM)).to(INDEX)
            inside = r < end
            here = present_rows(present, r, inside, j, stride_pb, stride_pm, HAS_PRESENT)
            d_g = tl.zeros((BM, KP), tl.float32)
            g_at = (tl.cast(j, INDEX) * B + r)[:, None] * K + k[None, :]
            g_mask = here[:, None] & (k < K)[None, :]
            if SOURCE == NO_SOURCE:
                u = tl.load(latents + g_at, mask=g_mask, other=0.0)
                d_g = _latent_grad(
                    u, d_rec_j, rec_j, xj, w3, b3, w4, r, here, here, grad_j, rec_scale / D, s_db, s_dd, s_xb, s_xd, D, H,
                    any_row(here), K, KP, BM, BH, BD, DEPTH, RESIDUAL, REC_LOSS, PREC,
                )  # fmt: skip
            else:
                for slot in tl.range(0, M):
                    w = source_weight(
                        source, present, r, inside, slot, j, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
                        SOURCE, HAS_PRESENT, dtype,
                    )  # fmt: skip
                    valid, counted, u = _decoded_rows(
                        latents, source, present, r, inside, slot, B, stride_pb, stride_pm, stride_sb, stride_si, stride_sj,
                        K, KP, BM, M, SOURCE, HAS_PRESENT,
                    )  # fmt: skip
                    wanted = w != 0
                    if HAS_D_SOURCE:
                        wanted = valid & here
                    Ds = pick_int(dims, slot, M)
                    d_u = _latent_grad(
                        u, pick(d_recovered, slot, M), pick(recovered, slot, M), pick(x, slot, M), pick(dec_w1, slot, M),
                        pick(dec_b1, slot, M), pick(dec_w2, slot, M), r, valid, counted, pick_int(has_grad, slot, M) != 0,
                        rec_scale / Ds, pick_as(stride_db, slot, M, INDEX), pick_as(stride_dd, slot, M, INDEX),
                        pick_as(stride_xb, slot, M, INDEX), pick_as(stride_xd, slot, M, INDEX), Ds, H, any_row(wanted),
                        K, KP, BM, BH, BD, DEPTH, RESIDUAL, REC_LOSS, PREC,
                    )  # fmt: skip
                    d_g += tl.where((w != 0)[:, None], w[:, None] * d_u, 0.0)
                    if HAS_D_SOURCE:
                        g = tl.load(latents + g_at, mask=g_mask, other=0.0).to(tl.float32)
                        # a latent of weight zero contributes nothing, not even a NaN
                        usable = (w != 0) | (tl.sum(tl.where(tl.abs(g) < float("inf"), 0, 1), axis=1) == 0)
                        d_w = tl.sum(tl.where(usable[:, None], d_u * g, 0.0), axis=1)
                        d_source_at = d_source + (r * M + slot) * M + j
                        tl.store(d_source_at, tl.where(wanted, d_w, 0.0).to(d_source.dtype.element_ty), mask=inside)

            if MD_LOSS and strength != 0:  # zero cuts the branch, so that 0 times infinity never becomes NaN
                g_rows = latents + (tl.cast(j, INDEX) * B + r) * K
                _, d_first, _ = psi_grads(g_rows, psi, here, j, M, PSI_DIMS, PSI_PADS, HIDDEN, BM, DEPTH, PREC)
                # more outputs to a thread leave less room for the depth
                NARROW_DEPTH: tl.constexpr = DEPTH if KP <= 64 else max(16, DEPTH // 2)
                reversed_grad = times_weight(
                    tl.zeros((BM, KP), tl.float32), d_first, psi[0], 0, PSI_DIMS[1], k, any_row(here), K, NARROW_DEPTH, PREC
                )  # fmt: skip
                d_g -= strength * md_scale * reversed_grad
            if HAS_D_LATENTS:
                d_latents_at = tl.cast(j, INDEX) * stride_lm + r[:, None] * stride_lb + k[None, :] * stride_lk
                d_g += tl.load(d_latents + d_latents_at, mask=g_mask, other=0.0).to(tl.float32)
            if NORMALIZE:
                y = tl.load(latents + g_at, mask=g_mask, other=0.0).to(tl.float32)
                rstd = tl.load(rstd_in + tl.cast(j, INDEX) * B + r, mask=here, other=0.0)
                d_g = tl.where((k < K)[None, :], d_g, 0.0)
                along, mean = tl.sum(d_g * y, axis=1) / K, tl.sum(d_g, axis=1) / K
                d_g = (d_g - mean[:, None] - y * along[:, None]) * rstd[:, None]
            d_g = tl.where(g_mask, d_g, 0.0).to(dtype)
            tl.store(d_z + g_at, d_g, mask=inside[:, None] & (k < K)[None, :])

        if FEATURES:
            tl.debug_barrier()  # gradients of latents are read back by other threads
            for r0 in tl.range(first, end, BM):
                r = (r0 + tl.arange(0, BM)).to(INDEX)
                inside = r < end
                here = present_rows(present, r, inside, j, stride_pb, stride_pm, HAS_PRESENT)
                g_at = (tl.cast(j, INDEX) * B + r)[:, None] * K + k[None, :]
                d_g = tl.load(d_z + g_at, mask=here[:, None] & (k < K)[None, :], other=0.0)
                units = tl.where(any_row(here), H, 0)
                for d0 in tl.range(0, D, BD):
                    d = d0 + tl.arange(0, BD)
                    acc = tl.zeros((BM, BD), tl.float32)
                    for h0 in tl.range(0, units, BH):
                        h = h0 + tl.arange(0, BH)
                        hidden = encoder_hidden(xj, w1, b1, r, here, h, D, H, s_xb, s_xd, BM, BH, BD, PREC)
                        none = tl.zeros((BM, BH), tl.float32)
                        d_h = times_weight(none, d_g, w2, 0, K, h, True, H, DEPTH, PREC)
                        d_h = tl.where(hidden > 0, d_h, 0.0).to(dtype)
                        acc = tl.dot(d_h, load_weight(w1, h, H, d, D), acc, input_precision=PREC)
                    mask = here[:, None] & (d < D)[None, :]
                    if RESIDUAL:
                        d_rec_at = r[:, None] * s_db + d[None, :] * s_dd
                        acc += tl.load(d_rec_j + d_rec_at, mask=mask & grad_j, other=0.0).to(tl.float32)
                    d_x_at = r[:, None] * D + d[None, :]
                    tl.store(d_xj + d_x_at, tl.where(mask, acc, 0.0).to(dtype), mask=inside[:, None] & (d < D)[None, :])
    if WEIGHTS:
        if ROWS:
            tl.debug_barrier()  # gradients of latents are read back by other threads

        # Weights: sums over the rows of the slice, one block of hidden units at a time.
        slab = slabs + tl.cast(piece, tl.int64) * (0 if ATOMIC else heads_size)
        d_w1 = slab + pick_long(enc_at, j, M)
        d_b1 = d_w1 + H * D
        d_w2 = d_b1 + H
        d_b2 = d_w2 + K * H
        d_w3 = slab + pick_long(dec_at, j, M)
        d_b3 = d_w3 + H * K
        d_w4 = d_b3 + H
        d_b4 = d_w4 + D * H
        for h0 in tl.range(0, H, BH):
            h = h0 + tl.arange(0, BH)
            acc_w3 = tl.zeros((BH, KP), tl.float32)
            acc_b3 = tl.zeros((BH,), tl.float32)
            for r0 in tl.range(first, end, BM):
                r = (r0 + tl.arange(0, BM)).to(INDEX)
                inside = r < end
                valid, counted, u = _decoded_rows(
                    latents, source, present, r, inside, j, B, stride_pb, stride_pm, stride_sb, stride_si, stride_sj,
                    K, KP, BM, M, SOURCE, HAS_PRESENT,
                )  # fmt: skip
                hidden = decoder_hidden(u, w3, b3, h, H, any_row(valid), K, BM, BH, DEPTH, PREC)
                d_h = tl.zeros((BM, BH), tl.float32)
                for d0 in tl.range(0, D, BD):
                    d = d0 + tl.arange(0, BD)
                    d_y = decoded_grad(
                        d_rec_j, rec_j, xj, r, d, d < D, valid, counted, grad_j, rec_scale / D, s_db, s_dd, s_xb, s_xd,
                        D, RESIDUAL, REC_LOSS,
                    )  # fmt: skip
                    d_h = tl.dot(d_y.to(dtype), load_weight(w4, d, D, h, H), d_h, input_precision=PREC)
                d_h = tl.where(hidden > 0, d_h, 0.0)
                acc_b3 += tl.sum(d_h, axis=0)
                acc_w3 = tl.dot(tl.trans(d_h.to(dtype)), u, acc_w3, input_precision=PREC)
            _emit(d_w3, h, H, k, K, acc_w3, ATOMIC)
            _emit_bias(d_b3, h, H, acc_b3, ATOMIC)

            for d0 in tl.range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                acc_w4 = tl.zeros((BD, BH), tl.float32)
                acc_b4 = tl.zeros((BD,), tl.float32)
                for r0 in tl.range(first, end, BM):
                    r = (r0 + tl.arange(0, BM)).to(INDEX)
                    inside = r < end
                    valid, counted, u = _decoded_rows(
                        latents, source, present, r, inside, j, B, stride_pb, stride_pm, stride_sb, stride_si, stride_sj,
                        K, KP, BM, M, SOURCE, HAS_PRESENT,
                    )  # fmt: skip
                    hidden = decoder_hidden(u, w3, b3, h, H, any_row(valid), K, BM, BH, DEPTH, PREC)
                    d_y = decoded_grad(
                        d_rec_j, rec_j, xj, r, d, d < D, valid, counted, grad_j, rec_scale / D, s_db, s_dd, s_xb, s_xd,
                        D, RESIDUAL, REC_LOSS,
                    )  # fmt: skip
                    acc_b4 += tl.sum(d_y, axis=0)
                    acc_w4 = tl.dot(tl.trans(d_y.to(dtype)), hidden.to(dtype), acc_w4, input_precision=PREC)
                _emit(d_w4, d, D, h, H, acc_w4, ATOMIC)
                if h0 == 0:
                    _emit_bias(d_b4, d, D, acc_b4, ATOMIC)

        for h0 in tl.range(0, H, BH):
            h = h0 + tl.arange(0, BH)
            acc_w2 = tl.zeros((KP, BH), tl.float32)
            acc_b2 = tl.zeros((KP,), tl.float32)
            for r0 in tl.range(first, end, BM):
                r = (r0 + tl.arange(0, BM)).to(INDEX)
                inside = r < end
                here = present_rows(present, r, inside, j, stride_pb, stride_pm, HAS_PRESENT)
                hidden = encoder_hidden(xj, w1, b1, r, here, h, D, H, s_xb, s_xd, BM, BH, BD, PREC)
                at = (tl.cast(j, INDEX) * B + r)[:, None] * K + k[None, :]
                d_g = tl.load(d_z + at, mask=here[:, None] & (k < K)[None, :], other=0.0)
                acc_b2 += tl.sum(d_g.to(tl.float32), axis=0)
                acc_w2 = tl.dot(tl.trans(d_g), hidden.to(dtype), acc_w2, input_precision=PREC)
            _emit(d_w2, k, K, h, H, acc_w2, ATOMIC)
            if h0 == 0:
                _emit_bias(d_b2, k, K, acc_b2, ATOMIC)

            for d0 in tl.range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                acc_w1 = tl.zeros((BH, BD), tl.float32)
                acc_b1 = tl.zeros((BH,), tl.float32)
                for r0 in tl.range(first, end, BM):
                    r = (r0 + tl.arange(0, BM)).to(INDEX)
                    inside = r < end
                    here = present_rows(present, r, inside, j, stride_pb, stride_pm, HAS_PRESENT)
                    hidden = encoder_hidden(xj, w1, b1, r, here, h, D, H, s_xb, s_xd, BM, BH, BD, PREC)
                    at = (tl.cast(j, INDEX) * B + r)[:, None] * K + k[None, :]
                    d_g = tl.load(d_z + at, mask=here[:, None] & (k < K)[None, :], other=0.0)
                    none = tl.zeros((BM, BH), tl.float32)
                    d_h = times_weight(none, d_g, w2, 0, K, h, any_row(here), H, DEPTH, PREC)
                    d_h = tl.where(hidden > 0, d_h, 0.0)
                    acc_b1 += tl.sum(d_h, axis=0)
                    feature = load_feature(xj, r, here, d, D, s_xb, s_xd)
                    acc_w1 = tl.dot(tl.trans(d_h.to(dtype)), feature, acc_w1, input_precision=PREC)
                _emit(d_w1, h, H, d, D, acc_w1, ATOMIC)
                if d0 == 0:
                    _emit_bias(d_b1, h, H, acc_b1, ATOMIC)

        # The discriminator's own gradient keeps its sign; lambda does not reach it.
        at_layer = slabs + psi_at + tl.cast(tl.program_id(0), tl.int64) * (0 if ATOMIC else psi_size)
        for layer in tl.static_range(HIDDEN + 1):
            _psi_weight_grad(
                at_layer, latents, present, psi, first, end, j, B, md_scale, stride_pb, stride_pm, layer,
                PSI_DIMS[layer], PSI_DIMS[layer + 1], PSI_PADS[layer], PSI_PADS[layer + 1],
                M, PSI_DIMS, PSI_PADS, HIDDEN, BM, DEPTH, HAS_PRESENT, MD_LOSS, ATOMIC, PREC, INDEX,
            )  # fmt: skip
            at_layer += PSI_DIMS[layer + 1] * PSI_DIMS[layer] + PSI_DIMS[layer + 1]


@triton.jit
def ebr_narrow_finish_kernel(
    out, slabs, ends, sizes, first_at, heads_size, psi_at, psi_size, head_slabs, psi_slabs,
    N_PARAMS: tl.constexpr, N_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the slabs of every parameter and write its gradient in its own dtype; ``ends``: last block of each, plus one."""
    program = tl.program_id(0)
    t, begin = group_of(program, ends, N_PARAMS)
    head = t < N_HEADS
    e = (program - begin) * BLOCK + tl.arange(0, BLOCK)
    mask = e < pick_int(sizes, t, N_PARAMS)
    base = slabs + pick_long(first_at, t, N_PARAMS) + tl.where(head, 0, psi_at)
    step = tl.where(head, heads_size, psi_size).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.range(0, tl.where(head, head_slabs, psi_slabs)):
        total += tl.load(base + s * step + e, mask=mask, other=0.0)
    target = pick(out, t, N_PARAMS)
    tl.store(target + e, total.to(target.dtype.element_ty), mask=mask)
