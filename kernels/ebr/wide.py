"""The EBR step at any width: grouped matrix products over all modalities and the discriminator, with fused epilogues.

Formulas: docs/ebr.md; the order of launches: ebr_wide_launch.py. A launch holds groups: group n < M is modality n's
head, group M the discriminator over the ``[M * B]`` rows of all modalities. Buffers between launches are ``[M, B, width]``,
contiguous, in the dtype of the features; weights are as ``nn.Linear`` holds them. Products accumulate in float32.
A backward launch computes, for each of its groups with output gradient D, weight W and input S,

    C = D W (where S > 0, behind a ReLU),    dW = Dᵀ S,    db = Σ D

so that D, W and S are read once for both. Every element has one owner: nothing depends on the order of programs.
Rows that are absent are not read; a tile without present rows does no product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    any_row,
    cross_entropy,
    decoded_grad,
    finish_losses,
    group_of,
    load_bias,
    load_weight,
    load_weight_t,
    mixed_latents,
    pick,
    pick_int,
    pick_long,
    present_rows,
    relu,
    source_weight,
    valid_rows,
)

__all__ = [
    "ebr_wide_bwd_kernel",
    "ebr_wide_fwd_kernel",
    "ebr_wide_loss_kernel",
    "ebr_wide_norm_bwd_kernel",
    "ebr_wide_norm_fwd_kernel",
    "ebr_wide_source_kernel",
]


@triton.jit
def _stacked_present(present, q, inside, B, stride_pb, stride_pm, HAS_PRESENT: tl.constexpr):
    """bool: rows of the stacked ``[M * B]`` that are present."""
    if HAS_PRESENT:
        return tl.load(present + (q % B) * stride_pb + (q // B) * stride_pm, mask=inside, other=0) != 0
    else:
        return inside


@triton.jit
def ebr_wide_fwd_kernel(
    a, w, b, c, x, ends, widths_in, widths_out, stride_ab, stride_ac, stride_xb, stride_xd,
    present, source, latents, squared, B, K,
    stride_pb, stride_pm, stride_sb, stride_si, stride_sj,
    M: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SOURCE: tl.constexpr, HAS_PRESENT: tl.constexpr, MIX: tl.constexpr, DECODE: tl.constexpr, LAST: tl.constexpr,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """``c = a Wᵀ + b``, through a ReLU; the last launch of the decoders adds the residual and the squared error.

    Groups FIRST .. FIRST + GROUPS; ``ends``: last program of each, plus one. MIX: the decoders' input is mixed from
    stored latents as it is read. DECODE: heads work on rows with a source, not on present rows.
    """
    program = tl.program_id(0)
    n, begin = group_of(program, ends, GROUPS)
    i = n + FIRST
    head = i < M
    IN, OUT = pick_int(widths_in, n, GROUPS), pick_int(widths_out, n, GROUPS)
    row_tiles = tl.cdiv(tl.where(head, B, B * M), BM)
    r = (((program - begin) % row_tiles) * BM + tl.arange(0, BM)).to(tl.int64)
    o = ((program - begin) // row_tiles) * BN + tl.arange(0, BN)
    dtype = latents.dtype.element_ty

    if head:
        inside = r < B
        if DECODE:
            keep = valid_rows(
                source, present, r, inside, i, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
                SOURCE, HAS_PRESENT, M, dtype,
            )  # fmt: skip
        else:
            keep = present_rows(present, r, inside, i, stride_pb, stride_pm, HAS_PRESENT)
    else:
        inside = r < B * M
        keep = _stacked_present(present, r, inside, B, stride_pb, stride_pm, HAS_PRESENT)
    depth = tl.where(any_row(keep), IN, 0)
    weight = pick(w, n, GROUPS)
    acc = tl.zeros((BM, BN), tl.float32)
    if MIX and head:
        for k0 in tl.range(0, depth, BK):
            k = k0 + tl.arange(0, BK)
            left = mixed_latents(
                latents, source, present, r, keep, k, k < IN, i, B, K, stride_sb, stride_si, stride_sj,
                stride_pb, stride_pm, SOURCE, HAS_PRESENT, M, BM, BK,
            )  # fmt: skip
            acc = tl.dot(left, load_weight_t(weight, o, OUT, k, IN), acc, input_precision=PREC)
    else:
        source_of_rows = pick(a, n, GROUPS) + r[:, None] * pick_long(stride_ab, n, GROUPS)
        step = pick_long(stride_ac, n, GROUPS)
        for k0 in tl.range(0, depth, BK):
            k = k0 + tl.arange(0, BK)
            left = tl.load(source_of_rows + k[None, :] * step, mask=keep[:, None] & (k < IN)[None, :], other=0.0)
            acc = tl.dot(left, load_weight_t(weight, o, OUT, k, IN), acc, input_precision=PREC)
    acc += load_bias(pick(b, n, GROUPS), o, OUT)[None, :]
    mask = inside[:, None] & (o < OUT)[None, :]
    at = pick(c, n, GROUPS) + r[:, None] * OUT + o[None, :]
    if LAST and head:
        y = tl.where(keep[:, None], acc, 0.0)
        here = present_rows(present, r, inside, i, stride_pb, stride_pm, HAS_PRESENT)
        x_at = r[:, None] * pick_long(stride_xb, i, M) + o[None, :] * pick_long(stride_xd, i, M)
        feature = tl.load(pick(x, i, M) + x_at, mask=mask & here[:, None], other=0.0).to(tl.float32)
        error = tl.where(mask & (here & keep)[:, None], y - feature, 0.0)
        rows = program * BM + tl.arange(0, BM)
        tl.store(squared + rows, tl.sum(error * error, axis=1) / OUT)
        if RESIDUAL:
            y += feature
        tl.store(at, y.to(dtype), mask=mask)
    else:
        if RELU:
            acc = relu(acc)
        tl.store(at, tl.where(keep[:, None], acc, 0.0).to(dtype), mask=mask)


@triton.jit
def ebr_wide_norm_fwd_kernel(
    latents, rstd_out, present, B, K, stride_pb, stride_pm,
    M: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr, HAS_PRESENT: tl.constexpr,
):  # fmt: skip
    """Layer-normalise the stacked latents in place, without parameters; absent rows stay zero."""
    q = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    keep = _stacked_present(present, q, q < B * M, B, stride_pb, stride_pm, HAS_PRESENT)
    k = tl.arange(0, KP)
    mask = keep[:, None] & (k < K)[None, :]
    at = latents + q[:, None] * K + k[None, :]
    g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, g - (tl.sum(g, axis=1) / K)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / K + 1e-5)
    tl.store(at, (centred * rstd[:, None]).to(latents.dtype.element_ty), mask=mask)
    tl.store(rstd_out + q, tl.where(keep, rstd, 0.0), mask=q < B * M)


@triton.jit
def ebr_wide_norm_bwd_kernel(
    latents, d_latents, rstd_in, B, K, M: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """The gradient through the normalisation, in place; rows of absent latents have reciprocal deviation zero."""
    q = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    inside = q < B * M
    k = tl.arange(0, KP)
    rstd = tl.load(rstd_in + q, mask=inside, other=0.0)
    mask = (inside & (rstd != 0))[:, None] & (k < K)[None, :]
    at = q[:, None] * K + k[None, :]
    y = tl.load(latents + at, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(d_latents + at, mask=mask, other=0.0).to(tl.float32)
    mean, along = tl.sum(d, axis=1) / K, tl.sum(d * y, axis=1) / K
    d = (d - mean[:, None] - y * along[:, None]) * rstd[:, None]
    tl.store(d_latents + at, d.to(d_latents.dtype.element_ty), mask=mask)


@triton.jit
def ebr_wide_loss_kernel(
    below, w1, b1, w2, b2, present, source, normalizer, squared, d_top, last_sums, partials, counter,
    md_out, rec_out, counts, B, IN, P, tiles, n_squared, second,
    stride_pb, stride_pm, stride_sb, stride_si, stride_sj,
    M: tl.constexpr, MP: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, HIDDEN: tl.constexpr,
    TRAIN: tl.constexpr, SOURCE: tl.constexpr, HAS_PRESENT: tl.constexpr, HAS_NORMALIZER: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """The last hidden layer of the discriminator, its output, the cross entropy, and both losses, BP units at a time.

    With TRAIN also, for the summed loss: the gradient at the last hidden layer's pre-activation (``d_top``, at the
    latents where there is no hidden layer), and this program's share of the last layer's own gradient. Until then
    ``d_top`` holds the hidden units.
    """
    program = tl.program_id(0)
    i = program // tiles
    r = ((program % tiles) * BM + tl.arange(0, BM)).to(tl.int64)
    inside = r < B
    dtype = below.dtype.element_ty
    here = present_rows(present, r, inside, i, stride_pb, stride_pm, HAS_PRESENT)
    valid = valid_rows(
        source, present, r, inside, i, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
        SOURCE, HAS_PRESENT, M, dtype,
    )  # fmt: skip
    q = tl.cast(i, tl.int64) * B + r
    c = tl.arange(0, MP)
    some = any_row(here)
    logits = tl.zeros((BM, MP), tl.float32)
    for p0 in tl.range(0, tl.where(some, P, 0), BP):
        p = p0 + tl.arange(0, BP)
        at = q[:, None] * P + p[None, :]
        if HIDDEN:
            z = tl.zeros((BM, BP), tl.float32)
            for k0 in tl.range(0, IN, BK):
                k = k0 + tl.arange(0, BK)
                left = tl.load(below + q[:, None] * IN + k[None, :], mask=here[:, None] & (k < IN)[None, :], other=0.0)
                z = tl.dot(left, load_weight_t(w1, p, P, k, IN), z, input_precision=PREC)
            top = relu(z + load_bias(b1, p, P)[None, :]).to(dtype)
            if TRAIN:
                tl.store(d_top + at, top, mask=here[:, None] & (p < P)[None, :])
        else:
            top = tl.load(below + at, mask=here[:, None] & (p < P)[None, :], other=0.0)
        logits = tl.dot(top, load_weight_t(w2, c, M, p, P), logits, input_precision=PREC)
    logits += load_bias(b2, c, M)[None, :]
    ce, d = cross_entropy(logits, i, M, MP)
    d = tl.where(here[:, None], d, 0.0)
    if TRAIN:
        d_low = d.to(dtype)
        share = last_sums + tl.cast(program, tl.int64) * (M * P + M)
        tl.store(share + M * P + c, tl.sum(d, axis=0), mask=c < M)
        if HIDDEN:
            tl.debug_barrier()  # hidden units are read back by other threads
        for p0 in tl.range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            at = q[:, None] * P + p[None, :]
            top = tl.load((d_top if HIDDEN else below) + at, mask=here[:, None] & (p < P)[None, :], other=0.0)
            sums = tl.dot(tl.trans(d_low), top, input_precision=PREC)
            tl.store(share + c[:, None] * P + p[None, :], sums, mask=(c < M)[:, None] & (p < P)[None, :])
            back = tl.dot(d_low, load_weight(w2, c, M, p, P), input_precision=PREC)
            if HIDDEN:
                back = tl.where(top > 0, back, 0.0)
                tl.debug_barrier()
            tl.store(d_top + at, back.to(dtype), mask=inside[:, None] & (p < P)[None, :])

    programs = tiles * M
    per_program = tl.cdiv(n_squared, programs)
    s = tl.arange(0, BM)
    error = tl.zeros((BM,), tl.float32)
    for s0 in tl.range(0, per_program, BM):
        at = program * per_program + s0 + s
        error += tl.load(squared + at, mask=(s0 + s < per_program) & (at < n_squared), other=0.0)
    finish_losses(
        partials, counter, normalizer, md_out, rec_out, counts, program, programs, second,
        tl.where(here, ce, 0.0), error, here, here & valid, HAS_NORMALIZER, BLOCK=128,
    )  # fmt: skip


@triton.jit
def ebr_wide_bwd_kernel(
    d, w, s, c, d_w, d_b, x, recovered, d_recovered, has_grad,
    weight_ends, data_ends, widths_d, widths_s, stride_xb, stride_xd, stride_db, stride_dd,
    present, source, latents, d_latents, d_mixed, psi_d, psi_w, counts, d_md, d_rec, reversal, last_sums, d_last_w, d_last_b,
    B, K, psi_width, last_shares, last_width, stride_pb, stride_pm, stride_sb, stride_si, stride_sj,
    stride_lm, stride_lb, stride_lk,
    M: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGE: tl.constexpr, SOURCE: tl.constexpr, HAS_PRESENT: tl.constexpr, RESIDUAL: tl.constexpr,
    MD_LOSS: tl.constexpr, REC_LOSS: tl.constexpr, HAS_D_LATENTS: tl.constexpr, HAS_LAST: tl.constexpr,
    PSI_DIRECT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Programs in order: tiles of weight gradients (the longest), tiles of row gradients, sums of the last layer's shares.

    STAGE "decoded": D of a head is the gradient of its decoder's output, formed as it is read; S the hidden units.
    "mixed": S of a head is what its slot decodes; without a source C is the whole gradient of the latent.
    "latent": no product of heads, C gathers the gradient of the latent over slots. "hidden": S the hidden units.
    "feature": S the feature, C its gradient.
    """
    program = tl.program_id(0)
    weight_programs = weight_ends[GROUPS - 1]
    data_programs = data_ends[GROUPS - 1]
    dtype = latents.dtype.element_ty
    md_scale = 0.0
    if MD_LOSS:
        md_scale = tl.load(d_md).to(tl.float32) / tl.load(counts)
    rec_scale = 0.0
    if REC_LOSS:
        rec_scale = 2.0 * tl.load(d_rec).to(tl.float32) / tl.load(counts + 1)

    if program < weight_programs:
        n, begin = group_of(program, weight_ends, GROUPS)
        i = n + FIRST
        head = i < M
        ND, NS = pick_int(widths_d, n, GROUPS), pick_int(widths_s, n, GROUPS)
        d_tiles = tl.cdiv(ND, BM)
        e = ((program - begin) % d_tiles) * BM + tl.arange(0, BM)
        f = ((program - begin) // d_tiles) * BN + tl.arange(0, BN)
        rows = tl.where(head, B, B * M)
        acc = tl.zeros((BM, BN), tl.float32)
        acc_b = tl.zeros((BM,), tl.float32)
        dn, sn = pick(d, n, GROUPS), pick(s, n, GROUPS)
        for r0 in tl.range(0, rows, BK):
            r = (r0 + tl.arange(0, BK)).to(tl.int64)
            inside = r < rows
            left = tl.zeros((BK, BM), tl.float32)
            if STAGE == "decoded" and head:
                valid = valid_rows(
                    source, present, r, inside, i, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
                    SOURCE, HAS_PRESENT, M, dtype,
                )  # fmt: skip
                counted = valid & present_rows(present, r, inside, i, stride_pb, stride_pm, HAS_PRESENT)
                left = decoded_grad(
                    pick(d_recovered, i, M), pick(recovered, i, M), pick(x, i, M), r, e, e < ND, valid, counted,
                    pick_int(has_grad, i, M) != 0, rec_scale / ND, pick_long(stride_db, i, M),
                    pick_long(stride_dd, i, M), pick_long(stride_xb, i, M), pick_long(stride_xd, i, M), ND,
                    RESIDUAL, REC_LOSS,
                )  # fmt: skip
            else:
                mask = inside[:, None] & (e < ND)[None, :]
                left = tl.load(dn + r[:, None] * ND + e[None, :], mask=mask, other=0.0).to(tl.float32)
            if STAGE == "mixed" and SOURCE != 0 and head:
                valid = valid_rows(
                    source, present, r, inside, i, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
                    SOURCE, HAS_PRESENT, M, dtype,
                )  # fmt: skip
                right = mixed_latents(
                    latents, source, present, r, valid, f, f < NS, i, B, K, stride_sb, stride_si, stride_sj,
                    stride_pb, stride_pm, SOURCE, HAS_PRESENT, M, BK, BN,
                )  # fmt: skip
            elif STAGE == "feature":
                here = present_rows(present, r, inside, i, stride_pb, stride_pm, HAS_PRESENT)
                at = r[:, None] * pick_long(stride_xb, i, M) + f[None, :] * pick_long(stride_xd, i, M)
                right = tl.load(pick(x, i, M) + at, mask=here[:, None] & (f < NS)[None, :], other=0.0)
            else:
                right = tl.load(sn + r[:, None] * NS + f[None, :], mask=inside[:, None] & (f < NS)[None, :], other=0.0)
            acc_b += tl.sum(left, axis=0)
            acc = tl.dot(tl.trans(left.to(dtype)), right, acc, input_precision=PREC)
        if head == 0:  # the discriminator's own gradient keeps its sign; lambda does not reach it
            acc = acc * md_scale if MD_LOSS else tl.zeros((BM, BN), tl.float32)
            acc_b = acc_b * md_scale if MD_LOSS else tl.zeros((BM,), tl.float32)
        out = pick(d_w, n, GROUPS)
        mask = (e < ND)[:, None] & (f < NS)[None, :]
        tl.store(out + e[:, None] * NS + f[None, :], acc.to(dtype), mask=mask)
        if (program - begin) // d_tiles == 0:
            tl.store(pick(d_b, n, GROUPS) + e, acc_b.to(dtype), mask=e < ND)

    elif program < weight_programs + data_programs:
        t = program - weight_programs
        n, begin = group_of(t, data_ends, GROUPS)
        i = n + FIRST
        head = i < M
        ND, NS = pick_int(widths_d, n, GROUPS), pick_int(widths_s, n, GROUPS)
        row_tiles = tl.cdiv(tl.where(head, B, B * M), BM)
        r = (((t - begin) % row_tiles) * BM + tl.arange(0, BM)).to(tl.int64)
        f = ((t - begin) // row_tiles) * BN + tl.arange(0, BN)
        inside = r < tl.where(head, B, B * M)
        if head:
            here = present_rows(present, r, inside, i, stride_pb, stride_pm, HAS_PRESENT)
            keep = here
            if STAGE == "decoded" or (STAGE == "mixed" and SOURCE != 0):
                keep = valid_rows(
                    source, present, r, inside, i, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
                    SOURCE, HAS_PRESENT, M, dtype,
                )  # fmt: skip
        else:
            keep = _stacked_present(present, r, inside, B, stride_pb, stride_pm, HAS_PRESENT)
            here = keep
        some = any_row(keep)
        depth = tl.where(some, ND, 0)
        if STAGE == "latent":
            depth = depth * 0
        dn, wn = pick(d, n, GROUPS), pick(w, n, GROUPS)
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in tl.range(0, depth, BK):
            k = k0 + tl.arange(0, BK)
            if STAGE == "decoded" and head:
                left = decoded_grad(
                    pick(d_recovered, i, M), pick(recovered, i, M), pick(x, i, M), r, k, k < ND, keep, keep & here,
                    pick_int(has_grad, i, M) != 0, rec_scale / ND, pick_long(stride_db, i, M),
                    pick_long(stride_dd, i, M), pick_long(stride_xb, i, M), pick_long(stride_xd, i, M), ND,
                    RESIDUAL, REC_LOSS,
                ).to(dtype)  # fmt: skip
            else:
                left = tl.load(dn + r[:, None] * ND + k[None, :], mask=keep[:, None] & (k < ND)[None, :], other=0.0)
            acc = tl.dot(left, load_weight(wn, k, ND, f, NS), acc, input_precision=PREC)

        mask = inside[:, None] & (f < NS)[None, :]
        kept = keep[:, None] & (f < NS)[None, :]
        if STAGE == "latent":
            for slot in tl.range(0, M):
                weight = source_weight(
                    source, present, r, inside, slot, i, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
                    SOURCE, HAS_PRESENT, dtype,
                )  # fmt: skip
                used = (weight != 0)[:, None] & (f < NS)[None, :]
                at = (tl.cast(slot, tl.int64) * B + r)[:, None] * NS + f[None, :]
                d_u = tl.load(d_mixed + at, mask=used, other=0.0).to(tl.float32)
                acc += tl.where(used, weight[:, None] * d_u, 0.0)
        if STAGE == "latent" or (STAGE == "mixed" and SOURCE == 0):
            q = tl.cast(i, tl.int64) * B + r
            if MD_LOSS:
                strength = tl.load(reversal).to(tl.float32)
                if strength != 0:  # zero cuts the branch, so that 0 times infinity never becomes NaN
                    back = tl.zeros((BM, BN), tl.float32)
                    if PSI_DIRECT:
                        back = tl.load(psi_d + q[:, None] * NS + f[None, :], mask=kept, other=0.0).to(tl.float32)
                    else:
                        for k0 in tl.range(0, tl.where(some, psi_width, 0), BK):
                            k = k0 + tl.arange(0, BK)
                            k_mask = keep[:, None] & (k < psi_width)[None, :]
                            left = tl.load(psi_d + q[:, None] * psi_width + k[None, :], mask=k_mask, other=0.0)
                            right = load_weight(psi_w, k, psi_width, f, NS)
                            back = tl.dot(left, right, back, input_precision=PREC)
                    acc -= strength * md_scale * back
            if HAS_D_LATENTS:
                at = tl.cast(i, tl.int64) * stride_lm + r[:, None] * stride_lb + f[None, :] * stride_lk
                acc += tl.load(d_latents + at, mask=kept, other=0.0).to(tl.float32)
        if STAGE == "decoded" or STAGE == "hidden":
            gate = tl.load(pick(s, n, GROUPS) + r[:, None] * NS + f[None, :], mask=kept, other=0.0)
            acc = tl.where(gate > 0, acc, 0.0)
        if STAGE == "feature" and RESIDUAL:
            at = r[:, None] * pick_long(stride_db, i, M) + f[None, :] * pick_long(stride_dd, i, M)
            present_grad = kept & (pick_int(has_grad, i, M) != 0)
            acc += tl.load(pick(d_recovered, i, M) + at, mask=present_grad, other=0.0).to(tl.float32)
        out = pick(c, n, GROUPS)
        tl.store(out + r[:, None] * NS + f[None, :], tl.where(keep[:, None], acc, 0.0).to(dtype), mask=mask)

    elif HAS_LAST:
        e = (program - weight_programs - data_programs) * 256 + tl.arange(0, 256)
        size = M * last_width + M
        total = tl.zeros((256,), tl.float32)
        for share in tl.range(0, last_shares):
            total += tl.load(last_sums + tl.cast(share, tl.int64) * size + e, mask=e < size, other=0.0)
        total = (total * md_scale if MD_LOSS else tl.zeros((256,), tl.float32)).to(dtype)
        tl.store(d_last_w + e, total, mask=e < M * last_width)
        tl.store(d_last_b + e - M * last_width, total, mask=(e >= M * last_width) & (e < size))


@triton.jit
def ebr_wide_source_kernel(
    latents, d_mixed, d_source, present, source, B, K, tiles, stride_pb, stride_pm, stride_sb, stride_si, stride_sj,
    M: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SOURCE: tl.constexpr, HAS_PRESENT: tl.constexpr,
):  # fmt: skip
    """``d_source[b, i, j] = d_u_i[b] · g_j[b]`` where slot i is valid and j present; a program owns (i, row tile)."""
    i = tl.program_id(0) // tiles
    r = ((tl.program_id(0) % tiles) * BM + tl.arange(0, BM)).to(tl.int64)
    inside = r < B
    dtype = latents.dtype.element_ty
    valid = valid_rows(
        source, present, r, inside, i, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
        SOURCE, HAS_PRESENT, M, dtype,
    )  # fmt: skip
    for j in tl.range(0, M):
        w = source_weight(
            source, present, r, inside, i, j, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
            SOURCE, HAS_PRESENT, dtype,
        )  # fmt: skip
        keep = valid & present_rows(present, r, inside, j, stride_pb, stride_pm, HAS_PRESENT)
        total = tl.zeros((BM,), tl.float32)
        bad = tl.zeros((BM,), tl.int32)
        for k0 in tl.range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            mask = keep[:, None] & (k < K)[None, :]
            row = tl.cast(i, tl.int64) * B + r
            d_u = tl.load(d_mixed + row[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
            row = tl.cast(j, tl.int64) * B + r
            g = tl.load(latents + row[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
            bad += tl.sum(tl.where(tl.abs(g) < float("inf"), 0, 1), axis=1)
            total += tl.sum(d_u * g, axis=1)
        # a latent of weight zero contributes nothing, not even a NaN
        total = tl.where(keep & ((w != 0) | (bad == 0)), total, 0.0)
        tl.store(d_source + (r * M + i) * M + j, total.to(d_source.dtype.element_ty), mask=inside)
