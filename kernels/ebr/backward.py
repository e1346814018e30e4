"""Backward kernels of the EBR step. A launch computes, for each of its groups with output gradient D, weight W and input S,

    C = D W (where S > 0, behind a ReLU),    dW = Dᵀ S,    db = Σ D

so that D, W and S are read once for both products. Groups, buffers and ownership are as in forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    any_row,
    decoded_grad,
    group_of,
    load_strided,
    load_weight,
    mixed_latents,
    pick,
    pick_int,
    present_rows,
    source_weight,
    stacked_present,
    valid_rows,
)

__all__ = ["ebr_bwd_kernel", "ebr_norm_bwd_kernel", "ebr_source_kernel"]


@triton.jit
def _weight_grads(
    t, groups, widths, ends, features, recovered, given, mask, routing, latents, md_scale, rec_scale, B, K,
    M: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr, STAGE: tl.constexpr, RESIDUAL: tl.constexpr,
    PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile t of dW, over all rows of its group, BK at a time; the first tile of a row of tiles also stores db."""
    dtype = latents.dtype.element_ty
    n, begin = group_of(t, ends, GROUPS)
    i = n + FIRST
    head = i < M
    ND, NS = pick_int(widths[0], n, GROUPS), pick_int(widths[1], n, GROUPS)
    d_tiles = tl.cdiv(ND, BM)
    e = ((t - begin) % d_tiles) * BM + tl.arange(0, BM)
    f = ((t - begin) // d_tiles) * BN + tl.arange(0, BN)
    rows = tl.where(head, B, B * M)
    acc = tl.zeros((BM, BN), tl.float32)
    acc_b = tl.zeros((BM,), tl.float32)
    dn, sn = pick(groups[0], n, GROUPS), pick(groups[2], n, GROUPS)
    for r0 in tl.range(0, rows, BK):
        r = (r0 + tl.arange(0, BK)).to(tl.int64)
        inside = r < rows
        left = tl.zeros((BK, BM), tl.float32)
        if STAGE == "decoded" and head:
            valid = valid_rows(routing, mask, r, inside, i, M, dtype)
            counted = valid & present_rows(mask, r, inside, i)
            left = decoded_grad(features, recovered, given, rec_scale, i, r, e, ND, valid, counted, M, RESIDUAL)
        else:
            at = dn + r[:, None] * ND + e[None, :]
            left = tl.load(at, mask=inside[:, None] & (e < ND)[None, :], other=0.0).to(tl.float32)
        if STAGE == "mixed" and routing[0] is not None and head:
            valid = valid_rows(routing, mask, r, inside, i, M, dtype)
            right = mixed_latents(latents, routing, mask, r, valid, f, f < NS, i, B, K, M, BK, BN)
        elif STAGE == "feature":
            here = present_rows(mask, r, inside, i)
            right = load_strided(features, i, r, f, here[:, None] & (f < NS)[None, :], M)
        else:
            right = tl.load(sn + r[:, None] * NS + f[None, :], mask=inside[:, None] & (f < NS)[None, :], other=0.0)
        acc_b += tl.sum(left, axis=0)
        acc = tl.dot(tl.trans(left.to(dtype)), right, acc, input_precision=PREC)
    if head == 0:  # the discriminator's own gradient keeps its sign; lambda does not reach it
        acc = tl.zeros((BM, BN), tl.float32) if md_scale is None else acc * md_scale
        acc_b = tl.zeros((BM,), tl.float32) if md_scale is None else acc_b * md_scale
    at = pick(groups[4], n, GROUPS) + e[:, None] * NS + f[None, :]
    tl.store(at, acc.to(dtype), mask=(e < ND)[:, None] & (f < NS)[None, :])
    if (t - begin) // d_tiles == 0:
        tl.store(pick(groups[5], n, GROUPS) + e, acc_b.to(dtype), mask=e < ND)


@triton.jit
def _gathered(acc, routing, mask, d_mixed, r, inside, i, f, B, NS, M: tl.constexpr, DTYPE: tl.constexpr):
    """``acc + Σ_t w_ti d_u_t``: the gradient of latent i over the targets t that decode it."""
    for target in tl.range(0, M):
        weight = source_weight(routing, mask, r, inside, target, i, DTYPE)
        used = (weight != 0)[:, None] & (f < NS)[None, :]
        at = (tl.cast(target, tl.int64) * B + r)[:, None] * NS + f[None, :]
        d_u = tl.load(d_mixed + at, mask=used, other=0.0).to(tl.float32)
        acc += tl.where(used, weight[:, None] * d_u, 0.0)
    return acc


@triton.jit
def _latent_grad(
    acc, psi, d_latents, reversal, md_scale, i, r, f, keep, some, B, NS, PREC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``acc`` minus λ times the discriminator's gradient of latent i, plus the gradient that came from above."""
    kept = keep[:, None] & (f < NS)[None, :]
    if md_scale is not None:
        lambda_ = tl.load(reversal).to(tl.float32)
        if lambda_ != 0:  # zero cuts the branch, so that 0 times infinity never becomes NaN
            q = tl.cast(i, tl.int64) * B + r
            psi_d, psi_w, width = psi
            back = tl.zeros((BM, BN), tl.float32)
            if psi_w is None:
                back = tl.load(psi_d + q[:, None] * NS + f[None, :], mask=kept, other=0.0).to(tl.float32)
            else:
                for k0 in tl.range(0, tl.where(some, width, 0), BK):
                    k = k0 + tl.arange(0, BK)
                    left = tl.load(
                        psi_d + q[:, None] * width + k[None, :], mask=keep[:, None] & (k < width)[None, :], other=0.0
                    )
                    back = tl.dot(left, load_weight(psi_w, k, width, f, NS), back, input_precision=PREC)
            acc -= lambda_ * md_scale * back
    given, stride_m, stride_b, stride_k = d_latents
    if given is not None:
        at = given + tl.cast(i, tl.int64) * stride_m + r[:, None] * stride_b + f[None, :] * stride_k
        acc += tl.load(at, mask=kept, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _row_grads(
    t, groups, widths, ends, features, recovered, given, mask, routing, latents, d_latents, d_mixed, psi, reversal,
    md_scale, rec_scale, B, M: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr, STAGE: tl.constexpr,
    RESIDUAL: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile t of C."""
    dtype = latents.dtype.element_ty
    n, begin = group_of(t, ends, GROUPS)
    i = n + FIRST
    head = i < M
    ND, NS = pick_int(widths[0], n, GROUPS), pick_int(widths[1], n, GROUPS)
    row_tiles = tl.cdiv(tl.where(head, B, B * M), BM)
    r = (((t - begin) % row_tiles) * BM + tl.arange(0, BM)).to(tl.int64)
    f = ((t - begin) // row_tiles) * BN + tl.arange(0, BN)
    inside = r < tl.where(head, B, B * M)
    if head:
        here = present_rows(mask, r, inside, i)
        keep = here
        if STAGE == "decoded" or (STAGE == "mixed" and routing[0] is not None):
            keep = valid_rows(routing, mask, r, inside, i, M, dtype)
    else:
        keep = stacked_present(mask, r, inside, B)
        here = keep
    some = any_row(keep)
    depth = tl.where(some, ND, 0)
    if STAGE == "latent":
        depth = depth * 0
    dn, wn = pick(groups[0], n, GROUPS), pick(groups[1], n, GROUPS)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, depth, BK):
        k = k0 + tl.arange(0, BK)
        if STAGE == "decoded" and head:
            left = decoded_grad(
                features, recovered, given, rec_scale, i, r, k, ND, keep, keep & here, M, RESIDUAL
            ).to(dtype)  # fmt: skip
        else:
            left = tl.load(dn + r[:, None] * ND + k[None, :], mask=keep[:, None] & (k < ND)[None, :], other=0.0)
        acc = tl.dot(left, load_weight(wn, k, ND, f, NS), acc, input_precision=PREC)

    kept = keep[:, None] & (f < NS)[None, :]
    if STAGE == "latent":
        acc = _gathered(acc, routing, mask, d_mixed, r, inside, i, f, B, NS, M, dtype)
    if STAGE == "latent" or (STAGE == "mixed" and routing[0] is None):
        acc = _latent_grad(acc, psi, d_latents, reversal, md_scale, i, r, f, keep, some, B, NS, PREC, BM, BN, BK)
    if STAGE == "decoded" or STAGE == "hidden":
        gate = tl.load(pick(groups[2], n, GROUPS) + r[:, None] * NS + f[None, :], mask=kept, other=0.0)
        acc = tl.where(gate > 0, acc, 0.0)
    if STAGE == "feature" and RESIDUAL:
        real = pick_int(given[3], i, M) != 0
        acc += load_strided(given, i, r, f, kept & real, M).to(tl.float32)
    at = pick(groups[3], n, GROUPS) + r[:, None] * NS + f[None, :]
    tl.store(at, tl.where(keep[:, None], acc, 0.0).to(dtype), mask=inside[:, None] & (f < NS)[None, :])


@triton.jit
def _last_layer_grads(t, last, md_scale, M: tl.constexpr, DTYPE: tl.constexpr):
    """256 elements of the gradient of the discriminator's last layer: shares of the loss kernel's programs, in order."""
    sums, d_w, d_b, shares, width = last
    e = t * 256 + tl.arange(0, 256)
    size = M * width + M
    total = tl.zeros((256,), tl.float32)
    for share in tl.range(0, shares):
        total += tl.load(sums + tl.cast(share, tl.int64) * size + e, mask=e < size, other=0.0)
    total = (tl.zeros((256,), tl.float32) if md_scale is None else total * md_scale).to(DTYPE)
    tl.store(d_w + e, total, mask=e < M * width)
    tl.store(d_b + e - M * width, total, mask=(e >= M * width) & (e < size))


@triton.jit
def ebr_bwd_kernel(
    groups, widths, weight_ends, data_ends, features, recovered, given, mask, routing, latents, d_latents, d_mixed,
    losses, psi, last, reversal, B, K, M: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr,
    STAGE: tl.constexpr, RESIDUAL: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Programs in order: tiles of weight gradients (the longest), tiles of row gradients, sums of the last layer's shares.

    ``groups (D, W, S, C, dW, db)``. ``losses``: the denominators and the gradients of both losses, None where there is
    none. ``psi``: the gradient at the discriminator's first layer, its weight and width, or the gradient at the latents
    and None. ``last``: None, or what the sums of its last layer need.

    STAGE "decoded": D of a head is the gradient of its decoder's output, formed as it is read; S the hidden units.
    "mixed": S of a head is what its target decodes; without a source C is the whole gradient of the latent.
    "latent": no product of heads, C gathers the gradient of the latent over targets. "hidden": S the hidden units.
    "feature": S the feature, C its gradient.
    """
    program = tl.program_id(0)
    weight_programs = weight_ends[GROUPS - 1]
    data_programs = data_ends[GROUPS - 1]
    counts, d_md, d_rec = losses
    md_scale = None
    if d_md is not None:
        md_scale = tl.load(d_md).to(tl.float32) / tl.load(counts)
    rec_scale = None
    if d_rec is not None:
        rec_scale = 2.0 * tl.load(d_rec).to(tl.float32) / tl.load(counts + 1)
    if program < weight_programs:
        _weight_grads(
            program, groups, widths, weight_ends, features, recovered, given, mask, routing, latents,
            md_scale, rec_scale, B, K, M, GROUPS, FIRST, STAGE, RESIDUAL, PREC, BM, BN, BK,
        )  # fmt: skip
    elif program < weight_programs + data_programs:
        _row_grads(
            program - weight_programs, groups, widths, data_ends, features, recovered, given, mask, routing, latents,
            d_latents, d_mixed, psi, reversal, md_scale, rec_scale, B, M, GROUPS, FIRST, STAGE, RESIDUAL, PREC,
            BM, BN, BK,
        )  # fmt: skip
    elif last is not None:
        _last_layer_grads(program - weight_programs - data_programs, last, md_scale, M, latents.dtype.element_ty)


@triton.jit
def ebr_norm_bwd_kernel(latents, d_latents, rstd_in, B, K, M: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr):
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
def ebr_source_kernel(
    latents, d_mixed, d_source, mask, routing, B, K, tiles, M: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    """``d_source[b, i, j] = d_u_i[b] · g_j[b]`` where target i is valid and j present; a program owns (i, row tile)."""
    i = tl.program_id(0) // tiles
    r = ((tl.program_id(0) % tiles) * BM + tl.arange(0, BM)).to(tl.int64)
    inside = r < B
    dtype = latents.dtype.element_ty
    valid = valid_rows(routing, mask, r, inside, i, M, dtype)
    for j in tl.range(0, M):
        w = source_weight(routing, mask, r, inside, i, j, dtype)
        keep = valid & present_rows(mask, r, inside, j)
        total = tl.zeros((BM,), tl.float32)
        bad = tl.zeros((BM,), tl.int32)
        for k0 in tl.range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            here = keep[:, None] & (k < K)[None, :]
            row = tl.cast(i, tl.int64) * B + r
            d_u = tl.load(d_mixed + row[:, None] * K + k[None, :], mask=here, other=0.0).to(tl.float32)
            row = tl.cast(j, tl.int64) * B + r
            g = tl.load(latents + row[:, None] * K + k[None, :], mask=here, other=0.0).to(tl.float32)
            bad += tl.sum(tl.where(tl.abs(g) < float("inf"), 0, 1), axis=1)
            total += tl.sum(d_u * g, axis=1)
        # a latent of weight zero contributes nothing, not even a NaN
        total = tl.where(keep & ((w != 0) | (bad == 0)), total, 0.0)
        tl.store(d_source + (r * M + i) * M + j, total.to(d_source.dtype.element_ty), mask=inside)
