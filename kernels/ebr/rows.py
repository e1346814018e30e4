"""EBR kernels without products of layers: the table, copies, normalisation, mixing, losses, gradients of rows, folds.

Buffers as in products.py. Sums run in float32 and in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import address, any_of, loss_scale, number, present_rows, reversed_scale, round16, source_weight, valid_rows


@triton.jit
def ebr_table_kernel(table, values, N: tl.constexpr):
    """Write addresses, widths and strides where the other kernels find them; stream-ordered, so graphs record it."""
    for n in tl.static_range(N):
        tl.store(table + n, tl.cast(values[n], tl.int64))


@triton.jit(do_not_specialize=["B"])
def ebr_pack_kernel(table, like, present, B, M: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Copy matrix n to rows and columns rounded up to 16, filled with zeros.

    Seven entries a matrix: from, to, rows (−1: B), columns, strides, and which modality's rows it holds, or −1: absent
    ones become zeros unread.
    """
    dtype = like.dtype.element_ty
    entry = table + 7 * tl.program_id(1)
    rows, columns, i = number(entry, 2), number(entry, 3), number(entry, 6)
    rows = tl.where(rows < 0, B, rows)
    width = round16(columns)
    column_tiles = tl.cdiv(width, BC)
    r = (tl.program_id(0) // column_tiles) * BR + tl.arange(0, BR)
    c = (tl.program_id(0) % column_tiles) * BC + tl.arange(0, BC)
    inside = r < rows
    if present is not None:
        inside = tl.where(i < 0, inside, present_rows(present, r, r < tl.where(i < 0, 0, rows), tl.maximum(i, 0), M))
    at = r.to(tl.int64)[:, None] * tl.load(entry + 4) + c.to(tl.int64)[None, :] * tl.load(entry + 5)
    x = tl.load(
        tl.load(entry).to(tl.pointer_type(dtype)) + at, mask=inside[:, None] & (c < columns)[None, :], other=0.0
    )
    to = address(entry, 1, dtype) + r.to(tl.int64)[:, None] * width + c[None, :]
    tl.store(to, x, mask=(r < tl.where(i < 0, round16(rows), rows))[:, None] & (c < width)[None, :])


@triton.jit(do_not_specialize=["B"])
def ebr_norm_kernel(latents, rstd_out, present, B, K, M: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr):
    """Layer-normalise the latents in place, without parameters; absent rows stay zero, with reciprocal deviation zero."""
    i = tl.program_id(1)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    keep = present_rows(present, r, r < B, i, M)
    k = tl.arange(0, KP)
    here = keep[:, None] & (k < K)[None, :]
    q = tl.cast(i, tl.int64) * B + r
    at = latents + q[:, None] * round16(K) + k[None, :]
    g = tl.load(at, mask=here, other=0.0).to(tl.float32)
    centred = tl.where(here, g - (tl.sum(g, axis=1) / K)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / K + 1e-5)
    tl.store(at, (centred * rstd[:, None]).to(latents.dtype.element_ty), mask=here)
    tl.store(rstd_out + q, tl.where(keep, rstd, 0.0), mask=r < B)


@triton.jit(do_not_specialize=["B"])
def ebr_mix_kernel(latents, mixed, present, source, B, K, M: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr):
    """``u_i = Σ_j w_ij g_j``; a latent of weight zero contributes nothing, not even a NaN."""
    dtype = latents.dtype.element_ty
    i = tl.program_id(1)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.arange(0, KP)
    width = round16(K)
    u = tl.zeros((BR, KP), tl.float32)
    for j in tl.range(0, M):
        w = source_weight(source, present, r, r < B, i, j, M, dtype)
        used = (w != 0)[:, None] & (k < width)[None, :]
        at = (tl.cast(j, tl.int64) * B + r)[:, None] * width + k[None, :]
        g = tl.load(latents + at, mask=used, other=0.0).to(tl.float32)
        u += tl.where(used, w[:, None] * g, 0.0)
    at = (tl.cast(i, tl.int64) * B + r)[:, None] * width + k[None, :]
    tl.store(mixed + at, u.to(dtype), mask=(r < B)[:, None] & (k < width)[None, :])


@triton.jit(do_not_specialize=["B"])
def ebr_loss_kernel(
    table, below, train, partials, present, source, B, M: tl.constexpr, LAYERS: tl.constexpr, MP: tl.constexpr,
    PREC: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The discriminator's output and cross entropy from its last hidden units ``below`` (the latents where it has none).

    ``train (d_top, shares)``, or None: for the summed cross entropy the gradient at the last hidden layer's
    pre-activation (at the latents without one), and each program's share of the output layer's own gradient, float32
    ``[m, width]`` and ``[m]``. ``partials``: each program's cross entropy, present rows, rows with a source.
    """
    dtype = below.dtype.element_ty
    program = tl.program_id(0)
    i = program % M
    r0 = (program // M) * BM
    r = r0 + tl.arange(0, BM)
    inside = r < B
    here = present_rows(present, r, inside, i, M)
    valid = valid_rows(source, present, r, inside, i, M, dtype)
    P = round16(number(table, 12 * M + 2 * LAYERS + LAYERS - 1))
    weight = address(table, 12 * M + 2 * LAYERS - 2, dtype)
    bias = tl.load(table + 12 * M + 2 * LAYERS - 1).to(tl.pointer_type(dtype))
    units = below + (tl.cast(i, tl.int64) * B + r0) * P
    c = tl.arange(0, MP)
    rows = tl.arange(0, BM)[:, None] * P
    logits = tl.zeros((BM, MP), tl.float32)
    for p0 in tl.range(0, tl.where(any_of(here), P, 0), BP):
        p = p0 + tl.arange(0, BP)
        top = tl.load(units + (rows + p[None, :]), mask=here[:, None] & (p < P)[None, :], other=0.0)
        w = tl.load(weight + c[None, :] * P + p[:, None], mask=(c < M)[None, :] & (p < P)[:, None], other=0.0)
        logits = tl.dot(top, w, logits, input_precision=PREC)
    logits += tl.load(bias + c, mask=c < M, other=0.0).to(tl.float32)[None, :]
    shifted = tl.where(c[None, :] < M, logits, float("-inf"))
    highest = tl.max(shifted, axis=1)
    e = tl.where(c[None, :] < M, tl.exp(logits - highest[:, None]), 0.0)
    total = tl.sum(e, axis=1)
    ce = highest + tl.log(total) - tl.sum(tl.where(c[None, :] == i, logits, 0.0), axis=1)
    # one sum of four columns: Triton 3.7 does not compile several sums of vectors for sm_100
    which = tl.arange(0, 4)[None, :]
    counted = tl.where(which == 1, here[:, None], (here & valid)[:, None] & (which == 2))
    numbers = tl.where((which == 0) & here[:, None], ce[:, None], counted.to(tl.float32))
    tl.store(partials + program * 4 + tl.arange(0, 4), tl.sum(numbers, axis=0))
    if train is not None:
        d_top, shares = train
        d = tl.where(here[:, None], e / total[:, None] - tl.where(c[None, :] == i, 1.0, 0.0), 0.0)
        d_low = d.to(dtype)
        share = shares + tl.cast(program, tl.int64) * (M * P + M)
        tl.store(share + M * P + c, tl.sum(d, axis=0), mask=c < M)
        d_units = d_top + (tl.cast(i, tl.int64) * B + r0) * P
        for p0 in tl.range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            top = tl.load(units + (rows + p[None, :]), mask=here[:, None] & (p < P)[None, :], other=0.0)
            sums = tl.dot(tl.trans(d_low), top, input_precision=PREC)
            tl.store(share + c[:, None] * P + p[None, :], sums, mask=(c < M)[:, None] & (p < P)[None, :])
            w = tl.load(weight + c[:, None] * P + p[None, :], mask=(c < M)[:, None] & (p < P)[None, :], other=0.0)
            back = tl.dot(d_low, w, input_precision=PREC)
            if LAYERS > 1:
                back = tl.where(top > 0, back, 0.0)
            tl.store(d_units + (rows + p[None, :]), back.to(dtype), mask=inside[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["n_partials", "n_squared", "second"])
def ebr_finish_kernel(
    partials, n_partials, squared, n_squared, normalizer, second, md, rec, counts, BLOCK: tl.constexpr
):
    """Both losses: sums of all programs in order over ``max(1, #present), max(1, #rows)`` or the normalizer's values.

    A normalizer of 0 counts as 1; ``second``: where its second value lies.
    """
    n = tl.arange(0, BLOCK)
    which = tl.arange(0, 4)[None, :]
    sums = tl.zeros((BLOCK, 4), tl.float32)
    for p0 in tl.range(0, n_partials, BLOCK):
        at = partials + (p0 + n)[:, None] * 4 + which
        sums += tl.load(at, mask=(p0 + n < n_partials)[:, None] & (which < 4), other=0.0)
    error = tl.zeros((BLOCK,), tl.float32)
    for p0 in tl.range(0, n_squared, BLOCK):
        error += tl.load(squared + p0 + n, mask=p0 + n < n_squared, other=0.0)
    total = tl.sum(sums, axis=0)[None, :]
    n_md = tl.sum(tl.where(which == 1, total, 0.0))
    n_rec = tl.sum(tl.where(which == 2, total, 0.0))
    if normalizer is not None:
        n_md = tl.load(normalizer).to(tl.float32)
        n_rec = tl.load(normalizer + second).to(tl.float32)
    n_md, n_rec = tl.where(n_md == 0, 1.0, n_md), tl.where(n_rec == 0, 1.0, n_rec)
    tl.store(md, tl.sum(tl.where(which == 0, total, 0.0)) / n_md)
    tl.store(rec, tl.sum(error) / n_rec)
    tl.store(counts, n_md)
    tl.store(counts + 1, n_rec)


@triton.jit(do_not_specialize=["B"])
def ebr_output_grad_kernel(
    table, like, d_rec, counts, present, source, B, M: tl.constexpr, LAYERS: tl.constexpr,
    RESIDUAL: tl.constexpr, HAND_DOWN: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradient of decoder i's output ``[B, d_i]``, rounded up: that of ``recovered`` plus that of the squared error.

    RESIDUAL: the gradient of ``recovered`` is handed down to the features, whose own is then added to it.
    """
    dtype = like.dtype.element_ty
    i = tl.program_id(1)
    D = number(table, 10 * M + i)
    width = round16(D)
    if EVEN:
        D = width
    column_tiles = tl.cdiv(width, BC)
    r = (tl.program_id(0) // column_tiles) * BR + tl.arange(0, BR)
    c = (tl.program_id(0) % column_tiles) * BC + tl.arange(0, BC)
    inside = r < B
    valid = valid_rows(source, present, r, inside, i, M, dtype)
    G = 12 * M + 3 * LAYERS + 2
    grad = tl.zeros((BR, BC), tl.float32)
    given = tl.load(table + G + 10 * M + i)
    rows = r.to(tl.int64)[:, None]
    if given != 0:
        at = rows * tl.load(table + G + 11 * M + i) + c.to(tl.int64)[None, :] * tl.load(table + G + 12 * M + i)
        at += given.to(tl.pointer_type(dtype))
        grad = tl.load(at, mask=inside[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    if RESIDUAL and HAND_DOWN:
        down = tl.load(table + G + 8 * M + i).to(tl.pointer_type(dtype)) + rows * D + c[None, :]
        tl.store(down, grad.to(dtype), mask=inside[:, None] & (c < D)[None, :])
    grad = tl.where(valid[:, None], grad, 0.0)
    scale = loss_scale(d_rec, counts + 1)
    if scale is not None:
        keep = (valid & present_rows(present, r, inside, i, M))[:, None] & (c < D)[None, :]
        y = tl.load(address(table, 11 * M + i, dtype) + rows * D + c[None, :], mask=keep, other=0.0).to(tl.float32)
        x = address(table, 8 * M + i, dtype) + rows * round16(number(table, 9 * M + i)) + c[None, :]
        x = tl.load(x, mask=keep, other=0.0).to(tl.float32)
        if RESIDUAL:
            y -= x
        grad += tl.where(keep, 2 * scale / D * (y - x), 0.0)
    to = address(table, G + 9 * M + i, dtype) + rows * width + c[None, :]
    tl.store(to, grad.to(dtype), mask=inside[:, None] & (c < width)[None, :])


@triton.jit(do_not_specialize=["B"])
def ebr_latent_grad_kernel(
    d_mixed, back, d_latents, latents, rstd, losses, d_out, present, source, B, K,
    M: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``Σ_t w_ti d_u_t`` plus the reversed ``back`` of the discriminator plus ``d_latents``, through the normalisation.

    None for ``back``, ``d_latents``, ``rstd``: no such part. ``losses``: λ, d_md, counts.
    """
    dtype = d_mixed.dtype.element_ty
    i = tl.program_id(1)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = r < B
    keep = present_rows(present, r, inside, i, M)
    k = tl.arange(0, KP)
    width = round16(K)
    here = keep[:, None] & (k < K)[None, :]
    own = (tl.cast(i, tl.int64) * B + r)[:, None]
    d = tl.zeros((BR, KP), tl.float32)
    for t in tl.range(0, M):
        w = source_weight(source, present, r, inside, t, i, M, dtype)
        used = (w != 0)[:, None] & (k < K)[None, :]
        at = (tl.cast(t, tl.int64) * B + r)[:, None] * width + k[None, :]
        d += tl.where(used, w[:, None] * tl.load(d_mixed + at, mask=used, other=0.0).to(tl.float32), 0.0)
    if back is not None:
        lambda_, d_md, counts = losses
        scale = reversed_scale(lambda_, d_md, counts)
        if scale != 0:
            d += scale * tl.load(back + own * width + k[None, :], mask=here, other=0.0).to(tl.float32)
    if d_latents is not None:
        d += tl.load(d_latents + own * K + k[None, :], mask=here, other=0.0).to(tl.float32)
    if rstd is not None:
        y = tl.load(latents + own * width + k[None, :], mask=here, other=0.0).to(tl.float32)
        s = tl.load(rstd + tl.cast(i, tl.int64) * B + r, mask=keep, other=0.0)
        d = tl.where(here, d, 0.0)
        mean, along = tl.sum(d, axis=1) / K, tl.sum(d * y, axis=1) / K
        d = (d - mean[:, None] - y * along[:, None]) * s[:, None]
    tl.store(
        d_out + own * width + k[None, :], tl.where(here, d, 0.0).to(dtype), mask=inside[:, None] & (k < width)[None, :]
    )


@triton.jit(do_not_specialize=["B"])
def ebr_source_grad_kernel(
    latents, d_mixed, d_source, present, source, B, K, M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):
    """``d_source[b, i, j] = d_u_i[b] · g_j[b]`` where target i is valid and j present; a program owns (rows, i)."""
    i = tl.program_id(1)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = r < B
    dtype = latents.dtype.element_ty
    width = round16(K)
    valid = valid_rows(source, present, r, inside, i, M, dtype)
    for j in tl.range(0, M):
        w = source_weight(source, present, r, inside, i, j, M, dtype)
        keep = valid & present_rows(present, r, inside, j, M)
        total = tl.zeros((BR,), tl.float32)
        bad = tl.zeros((BR,), tl.int32)
        for k0 in tl.range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            here = keep[:, None] & (k < K)[None, :]
            row = tl.cast(i, tl.int64) * B + r
            d_u = tl.load(d_mixed + row[:, None] * width + k[None, :], mask=here, other=0.0).to(tl.float32)
            row = tl.cast(j, tl.int64) * B + r
            g = tl.load(latents + row[:, None] * width + k[None, :], mask=here, other=0.0).to(tl.float32)
            bad += tl.sum(tl.where(tl.abs(g) < float("inf"), 0, 1), axis=1)
            total += tl.sum(d_u * g, axis=1)
        # a latent of weight zero contributes nothing, not even a NaN
        total = tl.where(keep & ((w != 0) | (bad == 0)), total, 0.0)
        at = (r.to(tl.int64) * M + i) * M + j
        tl.store(d_source + at, total.to(d_source.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits", "psi_splits", "shares", "first"])
def ebr_fold_kernel(
    table, like, slabs, splits, psi_slabs, psi_splits, last, shares, d_md, counts, first,
    M: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias of one layer: the sum of all shares' slabs, in their order.

    Axis 1: the heads' layers (left out where ``first`` is 4 M: they stored theirs), then the discriminator's, whose shares are
    of the summed cross entropy; without ``d_md`` they have none and their gradient is zero.
    """
    dtype = like.dtype.element_ty
    entry = tl.program_id(1) + first
    G = 12 * M + 3 * LAYERS + 2
    scale = tl.cast(1.0, tl.float32)
    sizes = table + G + 13 * M + 2 * LAYERS
    if entry < 4 * M:
        layer, i = entry // M, entry % M
        D, K, H = number(table, 10 * M + i), number(table, 12 * M + 2 * LAYERS), number(table, 12 * M + 3 * LAYERS + 1)
        rows = tl.where(layer % 2 == 0, H, tl.where(layer == 1, K, D))
        columns = tl.where(layer % 2 == 1, H, tl.where(layer == 2, K, D))
        size, n = tl.load(sizes), splits
        slab = slabs + tl.cast(entry, tl.int64) * splits * size
        bias_at = round16(rows) * round16(columns)
        w_at = G + 2 * layer * M + i
        b_at = w_at + M
    else:
        layer = entry - 4 * M
        columns = number(table, 12 * M + 2 * LAYERS + layer)
        rows = number(table, 12 * M + 2 * LAYERS + layer + 1)
        top = layer == LAYERS - 1
        size = tl.load(sizes + 1)
        slab = tl.where(top, last, psi_slabs + layer * psi_splits * size)
        bias_at = tl.where(top, rows, round16(rows)) * round16(columns)
        size = tl.where(top, bias_at + M, size)
        n = tl.where(top, shares, psi_splits)
        w_at = G + 13 * M + 2 * layer
        b_at = w_at + 1
        if d_md is None:
            n = n * 0
        else:
            scale = loss_scale(d_md, counts)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weights = rows * columns
    if tl.program_id(0) * BLOCK >= weights + rows:
        return
    at = tl.where(e < weights, (e // columns) * round16(columns) + e % columns, bias_at + e - weights)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in tl.range(0, n):
        total += tl.load(slab + share * size + at, mask=e < weights + rows, other=0.0)
    total = (total * scale).to(dtype)
    tl.store(tl.load(table + w_at).to(tl.pointer_type(dtype)) + e, total, mask=e < weights)
    biases = tl.load(table + b_at).to(tl.pointer_type(dtype)) + (e - weights)
    tl.store(biases, total, mask=(e >= weights) & (e < weights + rows))
