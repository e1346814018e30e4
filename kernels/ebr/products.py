"""Products of the EBR step: one launch for a layer of all heads, with a layer of the discriminator beside it.

Groups are the heads, one a modality, then the discriminator over the rows of each modality. Layers are 0, 1 (encoder) and
2, 3 (decoder). Buffers between launches are ``[M, B, width]``, contiguous, widths rounded up to 16 and
filled with zeros, in the dtype of the features; weights are as ``nn.Linear`` holds them. Products accumulate in float32.
Every element has one owner: nothing depends on the order of programs. Rows that are absent are not read; a tile without
present rows does no product. Programs are as many as tiles and not persistent: their depths differ, and the device's own
queue balances them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import address, any_of, grouped_product, number, present_rows, relu, reversed_scale, round16, valid_rows


@triton.jit
def _group(table, psi_layer, M: tl.constexpr, LAYERS: tl.constexpr, LAYER: tl.constexpr, PSI: tl.constexpr):
    """``(tile, modality, whether it is a head's, inputs, outputs)`` of a program, widths rounded up to 16.

    Tile 0 of all groups comes first: the heads (none where LAYER is −1), then, with PSI, the discriminator's.
    """
    GROUPS: tl.constexpr = 2 * M if PSI and LAYER >= 0 else M
    group = tl.program_id(0) % GROUPS
    i, head = group % M, (group < M) & (LAYER >= 0)
    H, K = number(table, 12 * M + 3 * LAYERS + 1), number(table, 12 * M + 2 * LAYERS)
    D = number(table, 10 * M + i)
    if LAYER <= 0:
        IN, OUT = round16(D), round16(H)
    elif LAYER == 1:
        IN, OUT = round16(H), round16(K)
    elif LAYER == 2:
        IN, OUT = round16(K), round16(H)
    else:
        IN, OUT = round16(H), round16(D)
    if PSI:
        at = table + 12 * M + 2 * LAYERS + psi_layer
        IN, OUT = tl.where(head, IN, round16(number(at, 0))), tl.where(head, OUT, round16(number(at, 1)))
    return tl.program_id(0) // GROUPS, i, head, IN, OUT


@triton.jit
def _tile(
    t, B, width, present, source, i, head,
    M: tl.constexpr, LAYER: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``(first row, columns, rows of the batch, columns in the width, rows that take part, present rows)`` of tile t."""
    row_tiles = tl.cdiv(B, BM)
    r0 = (t % row_tiles) * BM
    r = r0 + tl.arange(0, BM)
    columns = (t // row_tiles) * BN + tl.arange(0, BN)
    here = present_rows(present, r, r < B, i, M)
    keep = here
    if LAYER >= 2 and source is not None:
        valid = valid_rows(source, present, r, r < B, i, M, DTYPE)
        keep = tl.where(head, valid, here)
    return r0, columns, r < B, columns < width, keep, here


@triton.jit
def _cropped(matrix, r0, rows, c, D, columns, EVEN: tl.constexpr):
    """Addresses and mask of columns c of a matrix that is not rounded up: ``D`` columns, ``EVEN``: 16 divides D."""
    if EVEN:
        D = round16(D)
    return matrix + tl.cast(r0, tl.int64) * D + (rows * D + c[None, :]), (c < D) & columns


@triton.jit(do_not_specialize=["B", "psi_layer"])
def ebr_fwd_kernel(
    table, a, c, psi_a, psi_c, squared, present, source, B, psi_layer,
    M: tl.constexpr, LAYERS: tl.constexpr, LAYER: tl.constexpr, PSI: tl.constexpr, RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``c = a Wᵀ + b``, through a ReLU but in layers 1 and 3; layer 3 adds the residual and sums the squared error.

    A program of layer 3 leaves ``Σ ‖error‖² / width`` of its tile in ``squared``. PSI: whether the discriminator takes part,
    alone where LAYER is −1.
    """
    dtype = c.dtype.element_ty
    t, i, head, IN, OUT = _group(table, psi_layer, M, LAYERS, LAYER, PSI)
    weight_at, bias_at = 2 * LAYER * M + i, (2 * LAYER + 1) * M + i
    if PSI:
        a, c = tl.where(head, a, psi_a), tl.where(head, c, psi_c)
        weight_at = tl.where(head, weight_at, 12 * M + 2 * psi_layer)
        bias_at = tl.where(head, bias_at, 12 * M + 2 * psi_layer + 1)
    inputs, stride = a + tl.cast(i, tl.int64) * B * IN, IN
    if LAYER == 0:
        inputs = address(table, 8 * M + i, dtype)
        stride = round16(number(table, 9 * M + i))
    tiles = tl.cdiv(B, BM) * tl.cdiv(OUT, BN)
    if LAYER == 3:
        if (t >= tiles) | (head == 0):
            tl.store(squared + tl.program_id(0), 0.0)
    if t >= tiles:
        return
    r0, o, inside, columns, keep, here = _tile(t, B, OUT, present, source, i, head, M, LAYER, dtype, BM, BN)
    rows, k = tl.arange(0, BM)[:, None], tl.arange(0, BK)
    acc = grouped_product(
        tl.zeros((BM, BN), tl.float32), inputs + tl.cast(r0, tl.int64) * stride, rows * stride + k[None, :],
        1, keep, address(table, weight_at, dtype), o[None, :] * IN + k[:, None], 1, columns,
        tl.where(any_of(keep), IN, 0), None, M, PREC, BK,
    )  # fmt: skip
    acc += tl.load(address(table, bias_at, dtype) + o, mask=columns, other=0.0).to(tl.float32)[None, :]
    if LAYER == 3:
        if head:
            D = number(table, 10 * M + i)
            y = tl.where(keep[:, None], acc, 0.0)
            stride = round16(number(table, 9 * M + i))
            at, real = _cropped(address(table, 11 * M + i, dtype), r0, rows, o, D, columns, EVEN)
            x = address(table, 8 * M + i, dtype) + tl.cast(r0, tl.int64) * stride + (rows * stride + o[None, :])
            x = tl.load(x, mask=here[:, None] & columns[None, :], other=0.0).to(tl.float32)
            error = tl.where((here & keep)[:, None] & columns[None, :], y - x, 0.0)
            tl.store(squared + tl.program_id(0), tl.sum(error * error) / D)
            if RESIDUAL:
                y += x
            tl.store(at, y.to(dtype), mask=inside[:, None] & real[None, :])
            return
    if LAYER == 1:
        acc = tl.where(head, acc, relu(acc))
    else:
        acc = relu(acc)
    at = c + (tl.cast(i, tl.int64) * B + r0) * OUT + (rows * OUT + o[None, :])
    tl.store(at, tl.where(keep[:, None], acc, 0.0).to(dtype), mask=inside[:, None] & columns[None, :])


@triton.jit
def _weight_grad(
    w, w_tiles, split, d, ND, s, s_stride, NS, s_present, rows, n_shares, slab, d_w, d_b, direct,
    EVEN: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile w of ``dW = Dᵀ S`` over one share of the rows, or, past the tiles, BN elements of ``db = Σ D``.

    To the gradient itself where ``direct`` and widths are EVEN, else to this share's slab ``[ND, NS]``, then ``[ND]``, in float32.
    """
    share = tl.cdiv(tl.cdiv(rows, n_shares), 64) * 64  # as plan.shares has it
    begin = tl.cast(split * share, tl.int64)
    depth = tl.minimum(rows - split * share, share)
    k = tl.arange(0, BK)
    if w < w_tiles:
        d_tiles = tl.cdiv(ND, BM)
        e = (w % d_tiles) * BM + tl.arange(0, BM)
        f = (w // d_tiles) * BN + tl.arange(0, BN)
        s_rows = s_present
        if s_present is not None:
            s_rows += begin * M
        acc = grouped_product(
            tl.zeros((BM, BN), tl.float32), d + begin * ND, k[None, :] * ND + e[:, None], ND, e < ND,
            s + begin * s_stride, k[:, None] * s_stride + f[None, :], s_stride, f < NS, depth,
            s_rows, M, PREC, BK,
        )  # fmt: skip
        at = e[:, None] * NS + f[None, :]
        if EVEN and direct:
            tl.store(d_w + at, acc.to(DTYPE), mask=(e < ND)[:, None] & (f < NS)[None, :])
        else:
            tl.store(slab + at, acc, mask=(e < ND)[:, None] & (f < NS)[None, :])
    else:
        n = (w - w_tiles) * BN + tl.arange(0, BN)
        total = tl.zeros((BN,), tl.float32)
        for k0 in tl.range(0, depth, BK):
            at = d + (begin + k0) * ND + (k[:, None] * ND + n[None, :])
            part = tl.load(at, mask=(k0 + k < depth)[:, None] & (n < ND)[None, :], other=0.0)
            total += tl.sum(part.to(tl.float32), axis=0)
        if EVEN and direct:
            tl.store(d_b + n, total.to(DTYPE), mask=n < ND)
        else:
            tl.store(slab + ND * NS + n, total, mask=n < ND)


@triton.jit(do_not_specialize=["B", "psi_layer", "splits", "psi_splits", "region"])
def ebr_bwd_kernel(
    table, heads, psi, slabs, d_latents, losses, present, source, B, psi_layer, splits, psi_splits, region,
    M: tl.constexpr, LAYERS: tl.constexpr, LAYER: tl.constexpr, PSI: tl.constexpr, RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """With output gradient D, weight W and input S: ``C = D W`` (where S > 0, behind a ReLU), ``dW = Dᵀ S``, ``db = Σ D``.

    ``heads``, ``psi``: D, S and C; ``slabs``: of the heads and of the discriminator. The first ``region`` programs of a
    modality work on weight gradients, in ``splits`` shares of the rows, folded by ``ebr_fold_kernel``; those of the
    discriminator share the rows of all modalities among them. None for the discriminator's C: no such part. ``losses``
    (λ, d_md, counts): C of layer 2 is the whole gradient of the latents: the discriminator's, by its first layer's weight
    and λ, and ``d_latents`` are added; else both None.
    """
    d, s, c = heads
    psi_d, psi_s, psi_c = psi
    dtype = d.dtype.element_ty
    t, i, head, NS, ND = _group(table, psi_layer, M, LAYERS, LAYER, PSI)
    G = 12 * M + 3 * LAYERS + 2  # the backward's part of the table
    weight_at = 2 * LAYER * M + i
    grads_at = G + 2 * (LAYER if LAYER > 0 else 0) * M + i  # of a head; no address stands at -1
    if PSI:
        d, s = tl.where(head, d, psi_d), tl.where(head, s, psi_s)
        if psi_c is not None:
            c = tl.where(head, c, psi_c)
        weight_at = tl.where(head, weight_at, 12 * M + 2 * psi_layer)
    first = tl.cast(i, tl.int64) * B  # row of the modality
    left, units, stride, rows_of = d + first * ND, s + first * NS, NS, None
    if LAYER == 3:
        gradient = address(table, G + 9 * M + i, dtype)
        if PSI:
            left = tl.where(head, gradient, left)
        else:
            left = gradient
    if LAYER == 0:
        if present is not None:
            rows_of = present + i
        units = address(table, 8 * M + i, dtype)
        stride = round16(number(table, 9 * M + i))

    if t < region:
        w_tiles = tl.cdiv(ND, BM) * tl.cdiv(NS, BN)
        tiles = w_tiles + tl.cdiv(ND, BN)
        slab_size = tl.load(table + G + 13 * M + 2 * LAYERS)
        slab = slabs[0] + (tl.cast(LAYER * M, tl.int64) + i) * splits * slab_size
        n_shares, n_rows = splits, B
        if PSI:  # shares of the rows of all modalities, dealt out to the groups
            t = tl.where(head, t, t * M + i)
            n_shares, n_rows = tl.where(head, splits, psi_splits), tl.where(head, B, B * M)
            left, units = tl.where(head, left, psi_d), tl.where(head, units, psi_s)
            psi_slab_size = tl.load(table + G + 13 * M + 2 * LAYERS + 1)
            slab = tl.where(head, slab, slabs[1] + psi_layer * psi_splits * psi_slab_size)
            slab_size = tl.where(head, slab_size, psi_slab_size)
        if t < n_shares * tiles:
            _weight_grad(
                t % tiles, w_tiles, t // tiles, left, ND, units, stride, NS, rows_of, n_rows, n_shares,
                tl.multiple_of(slab + (t // tiles) * slab_size, 16), address(table, grads_at, dtype), address(table, grads_at + M, dtype),
                head & (splits == 1), EVEN, M, dtype, PREC, BM, BN, BK,
            )  # fmt: skip
        return
    if PSI and psi_c is None:
        if head == 0:
            return
    t -= region
    if t >= tl.cdiv(B, BM) * tl.cdiv(NS, BN):
        return
    r0, f, inside, columns, keep, _ = _tile(t, B, NS, present, source, i, head, M, LAYER, dtype, BM, BN)
    rows, k = tl.arange(0, BM)[:, None], tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    some = any_of(keep)
    if losses is not None:
        lambda_, d_md, counts = losses
        if d_md is not None:
            scale = tl.where(head, reversed_scale(lambda_, d_md, counts), 0.0)
            if LAYERS > 1:
                P = round16(number(table, 12 * M + 2 * LAYERS + 1))
                acc = grouped_product(
                    acc, psi_d + (first + r0) * P, rows * P + k[None, :], 1, keep, address(table, 12 * M, dtype),
                    k[:, None] * NS + f[None, :], NS, columns, tl.where(some & (scale != 0), P, 0), None, M, PREC, BK,
                )  # fmt: skip
            else:
                wanted = keep[:, None] & (f < tl.where(scale != 0, NS, 0))[None, :]
                at = psi_d + (first + r0) * NS + (rows * NS + f[None, :])
                acc = tl.load(at, mask=wanted, other=0.0).to(tl.float32)
            acc *= scale
    acc = grouped_product(
        acc, left + tl.cast(r0, tl.int64) * ND, rows * ND + k[None, :], 1, keep, address(table, weight_at, dtype),
        k[:, None] * NS + f[None, :], NS, columns, tl.where(some, ND, 0), None, M, PREC, BK,
    )  # fmt: skip
    if LAYER == 0:
        if head:  # a block of its own, which takes fewer registers
            D = number(table, 10 * M + i)
            at, real = _cropped(address(table, G + 8 * M + i, dtype), r0, rows, f, D, columns, EVEN)
            if RESIDUAL:  # what the residual hands down lies there already
                acc += tl.load(at, mask=keep[:, None] & real[None, :], other=0.0).to(tl.float32)
            tl.store(at, tl.where(keep[:, None], acc, 0.0).to(dtype), mask=inside[:, None] & real[None, :])
            return
    mask = keep[:, None] & columns[None, :]
    offsets = rows * NS + f[None, :]
    gated = head & (LAYER != 2)
    if PSI:
        gated = gated | ((head == 0) & (psi_layer > 0))
    if gated:
        gate = tl.load(units + tl.cast(r0, tl.int64) * NS + offsets, mask=mask, other=0.0)
        acc = tl.where(gate > 0, acc, 0.0)
    if d_latents is not None:
        if head:
            K = number(table, 12 * M + 2 * LAYERS)
            if EVEN:
                K = round16(K)
            at = d_latents + (first + r0) * K + (rows * K + f[None, :])
            acc += tl.load(at, mask=mask & (f < K)[None, :], other=0.0).to(tl.float32)
    at = c + (first + r0) * NS + offsets
    tl.store(at, tl.where(keep[:, None], acc, 0.0).to(dtype), mask=inside[:, None] & columns[None, :])
