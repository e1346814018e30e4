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

from .parts import (
    address,
    any_row,
    grouped_product,
    number,
    present_rows,
    relu,
    reversed_scale,
    round16,
    valid_rows,
    whose,
)

__all__ = ["ebr_bwd_kernel", "ebr_fwd_kernel"]


@triton.jit
def _head_widths(table, i, H, K, M: tl.constexpr, LAYER: tl.constexpr):
    """``(inputs, outputs)`` of a layer of head i, rounded up to 16."""
    if LAYER == 0:
        return round16(number(table, 10 * M + i)), round16(H)
    elif LAYER == 1:
        return round16(H), round16(K)
    elif LAYER == 2:
        return round16(K), round16(H)
    else:
        return round16(H), round16(number(table, 10 * M + i))


@triton.jit
def _cropped(matrix, r0, rows, c, D, columns, EVEN: tl.constexpr):
    """Addresses and mask of columns c of a matrix that is not rounded up: ``D`` columns, ``EVEN``: 16 divides D."""
    if EVEN:
        D = tl.multiple_of(D, 16)
    return matrix + tl.cast(r0, tl.int64) * D + (rows[:, None] * D + c[None, :]), (c < D) & columns


@triton.jit(do_not_specialize=["B", "psi_layer"])
def ebr_fwd_kernel(
    table, a, c, psi_a, psi_c, squared, present, source, B, H, K, psi_layer,
    M: tl.constexpr, LAYERS: tl.constexpr, LAYER: tl.constexpr, FIRST: tl.constexpr, PSI: tl.constexpr,
    RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``c = a Wᵀ + b``, through a ReLU but in layers 1 and 3; layer 3 adds the residual and sums the squared error.

    A program of layer 3 leaves ``Σ ‖error‖² / width`` of its tile in ``squared``. FIRST: 1 where only the discriminator
    takes part, PSI: whether it does.
    """
    dtype = c.dtype.element_ty
    t, i, head = whose(tl.program_id(0), M, FIRST, PSI)
    IN, OUT = _head_widths(table, i, H, K, M, LAYER)
    inputs = a + tl.cast(i, tl.int64) * B * IN
    stride = IN
    if LAYER == 0:
        inputs = address(table, 8 * M + i, dtype)
        stride = tl.multiple_of(number(table, 9 * M + i), 16)
    output = c + tl.cast(i, tl.int64) * B * OUT
    weight_at, bias_at = 2 * LAYER * M + i, (2 * LAYER + 1) * M + i
    if PSI:
        psi_in = round16(number(table, 12 * M + 2 * LAYERS + psi_layer))
        psi_out = round16(number(table, 12 * M + 2 * LAYERS + psi_layer + 1))
        inputs = tl.where(head, inputs, psi_a + tl.cast(i, tl.int64) * B * psi_in)
        output = tl.where(head, output, psi_c + tl.cast(i, tl.int64) * B * psi_out)
        IN, OUT, stride = tl.where(head, IN, psi_in), tl.where(head, OUT, psi_out), tl.where(head, stride, psi_in)
        weight_at = tl.where(head, weight_at, 12 * M + 2 * psi_layer)
        bias_at = tl.where(head, bias_at, 12 * M + 2 * psi_layer + 1)
    row_tiles = tl.cdiv(B, BM)
    tiles = row_tiles * tl.cdiv(OUT, BN)
    if LAYER == 3:
        if (t >= tiles) | (head == 0):
            tl.store(squared + tl.program_id(0), 0.0)
    if t >= tiles:
        return
    r0 = (t % row_tiles) * BM
    rows = tl.arange(0, BM)
    r = r0 + rows
    o = (t // row_tiles) * BN + tl.arange(0, BN)
    inside, columns = r < B, o < OUT
    keep = present_rows(present, r, inside, i, M)
    here = keep
    if LAYER >= 2 and source is not None:
        valid = valid_rows(source, present, r, inside, i, M, dtype)
        keep = (head & valid) | ((head == 0) & keep)
    k = tl.arange(0, BK)
    weight = address(table, weight_at, dtype)
    acc = grouped_product(
        tl.zeros((BM, BN), tl.float32), inputs + tl.cast(r0, tl.int64) * stride, rows[:, None] * stride + k[None, :],
        1, keep, weight, o[None, :] * IN + k[:, None], 1, columns, tl.where(any_row(keep), IN, 0), None,
        M, PREC, BK,
    )  # fmt: skip
    acc += tl.load(address(table, bias_at, dtype) + o, mask=columns, other=0.0).to(tl.float32)[None, :]
    if LAYER == 3:
        if head:
            D = number(table, 10 * M + i)
            y = tl.where(keep[:, None], acc, 0.0)
            x = address(table, 8 * M + i, dtype)
            stride = tl.multiple_of(number(table, 9 * M + i), 16)
            at, columns = _cropped(address(table, 11 * M + i, dtype), r0, rows, o, D, columns, EVEN)
            x += tl.cast(r0, tl.int64) * stride
            x = tl.load(x + (rows[:, None] * stride + o[None, :]), mask=here[:, None] & columns[None, :], other=0.0).to(
                tl.float32
            )
            error = tl.where((here & keep)[:, None] & columns[None, :], y - x, 0.0)
            tl.store(squared + tl.program_id(0), tl.sum(tl.sum(error * error, axis=1), axis=0) / D)
            if RESIDUAL:
                y += x
            tl.store(at, y.to(dtype), mask=inside[:, None] & columns[None, :])
            return
    if LAYER == 1:
        acc = tl.where(head, acc, relu(acc))
    else:
        acc = relu(acc)
    at = output + tl.cast(r0, tl.int64) * OUT + (rows[:, None] * OUT + o[None, :])
    tl.store(at, tl.where(keep[:, None], acc, 0.0).to(dtype), mask=inside[:, None] & columns[None, :])


@triton.jit
def _weight_grad(
    w, w_tiles, split, d, ND, s, s_stride, NS, s_present, rows, per_split, slab, d_w, d_b, direct,
    EVEN: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile w of ``dW = Dᵀ S`` over one share of the rows, or, past the tiles, BN elements of ``db = Σ D``.

    To the gradient itself where ``direct`` and widths are EVEN, else to this share's slab ``[ND, NS]``, then ``[ND]``, in float32.
    """
    begin = tl.cast(split * per_split, tl.int64)
    depth = tl.minimum(rows - split * per_split, per_split)
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


@triton.jit(do_not_specialize=["B", "psi_layer", "per_split", "splits", "psi_per_split", "psi_splits", "region"])
def ebr_bwd_kernel(
    table, heads, psi, sums, d_latents, losses, present, source, B, H, K, psi_layer, per_split, splits, psi_per_split, psi_splits, region,
    M: tl.constexpr, LAYERS: tl.constexpr, LAYER: tl.constexpr, FIRST: tl.constexpr, PSI: tl.constexpr,
    DIRECT: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """With output gradient D, weight W and input S: ``C = D W`` (where S > 0, behind a ReLU), ``dW = Dᵀ S``, ``db = Σ D``.

    ``heads``, ``psi``: D, S and C; ``sums``: slabs of the heads and their size, slabs of the discriminator and theirs. The
    first ``region`` programs of a modality work on weight gradients, in ``splits`` shares of ``per_split`` rows,
    folded by ``ebr_fold_kernel``; those of the discriminator share the rows of all modalities among them. None for
    the discriminator's C: no such part. DIRECT: C of layer 2 is the whole gradient of the latents: λ, the discriminator
    (``psi_d``, by its first layer's weight) and ``d_latents`` are added; ``losses``: λ, d_md, counts.
    """
    d, s, c = heads
    psi_d, psi_s, psi_c = psi
    slabs, slab_size, psi_slabs, psi_slab_size = sums
    dtype = d.dtype.element_ty
    t, i, head = whose(tl.program_id(0), M, FIRST, PSI)
    NS, ND = _head_widths(table, i, H, K, M, LAYER)
    G = 12 * M + 3 * LAYERS + 1  # the backward's part of the table
    left = d + tl.cast(i, tl.int64) * B * ND
    if LAYER == 3:
        left = address(table, G + 9 * M + i, dtype)
    units = s + tl.cast(i, tl.int64) * B * NS
    stride, rows_of = NS, None
    if LAYER == 0:
        if present is not None:
            rows_of = present + i
        units = address(table, 8 * M + i, dtype)
        stride = tl.multiple_of(number(table, 9 * M + i), 16)
    out = c + tl.cast(i, tl.int64) * B * NS
    weight_at, grads_at = 2 * LAYER * M + i, G + 2 * LAYER * M + i
    if PSI:
        p_in = round16(number(table, 12 * M + 2 * LAYERS + psi_layer))
        p_out = round16(number(table, 12 * M + 2 * LAYERS + psi_layer + 1))
        left = tl.where(head, left, psi_d + tl.cast(i, tl.int64) * B * p_out)
        units = tl.where(head, units, psi_s + tl.cast(i, tl.int64) * B * p_in)
        if psi_c is not None:
            out = tl.where(head, out, psi_c + tl.cast(i, tl.int64) * B * p_in)
        NS, ND, stride = tl.where(head, NS, p_in), tl.where(head, ND, p_out), tl.where(head, stride, p_in)
        weight_at = tl.where(head, weight_at, 12 * M + 2 * psi_layer)

    if t < region:
        w_tiles = tl.cdiv(ND, BM) * tl.cdiv(NS, BN)
        tiles = w_tiles + tl.cdiv(ND, BN)
        slab = slabs + (tl.cast(LAYER * M, tl.int64) + i) * splits * slab_size
        n_shares, per, n_rows = splits, per_split, B
        if PSI:  # shares of the rows of all modalities, dealt out to the groups
            t = tl.where(head, t, t * M + i)
            n_shares, per = tl.where(head, splits, psi_splits), tl.where(head, per_split, psi_per_split)
            n_rows = tl.where(head, B, B * M)
            left, units = tl.where(head, left, psi_d), tl.where(head, units, psi_s)
            slab = tl.where(head, slab, psi_slabs + tl.cast(psi_layer, tl.int64) * psi_splits * psi_slab_size)
            slab_size = tl.where(head, slab_size, psi_slab_size)
        if t < n_shares * tiles:
            slab += tl.cast(t // tiles, tl.int64) * slab_size
            _weight_grad(
                t % tiles, w_tiles, t // tiles, left, ND, units, stride, NS, rows_of, n_rows, per, slab,
                address(table, grads_at, dtype), address(table, grads_at + M, dtype), head & (splits == 1),
                EVEN, M, dtype, PREC, BM, BN, BK,
            )  # fmt: skip
        return
    if PSI and psi_c is None:
        if head == 0:
            return
    t -= region
    row_tiles = tl.cdiv(B, BM)
    if t >= row_tiles * tl.cdiv(NS, BN):
        return
    r0 = (t % row_tiles) * BM
    rows = tl.arange(0, BM)
    r = r0 + rows
    f = (t // row_tiles) * BN + tl.arange(0, BN)
    inside, columns = r < B, f < NS
    keep = present_rows(present, r, inside, i, M)
    if LAYER >= 2 and source is not None:
        valid = valid_rows(source, present, r, inside, i, M, dtype)
        keep = (head & valid) | ((head == 0) & keep)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    some = any_row(keep)
    if DIRECT:
        lambda_, d_md, counts = losses
        if d_md is not None:
            scale = reversed_scale(lambda_, d_md, counts)
            if head & (scale != 0):
                if LAYERS > 1:
                    P = round16(number(table, 12 * M + 2 * LAYERS + 1))
                    acc = grouped_product(
                        acc, psi_d + (tl.cast(i, tl.int64) * B + r0) * P, rows[:, None] * P + k[None, :], 1, keep,
                        address(table, 12 * M, dtype), k[:, None] * NS + f[None, :], NS, columns,
                        tl.where(some, P, 0), None, M, PREC, BK,
                    )  # fmt: skip
                else:
                    at = psi_d + (tl.cast(i, tl.int64) * B + r0) * NS + (rows[:, None] * NS + f[None, :])
                    acc = tl.load(at, mask=keep[:, None] & columns[None, :], other=0.0).to(tl.float32)
                acc *= scale
    acc = grouped_product(
        acc, left + tl.cast(r0, tl.int64) * ND, rows[:, None] * ND + k[None, :], 1, keep,
        address(table, weight_at, dtype), k[:, None] * NS + f[None, :], NS, columns, tl.where(some, ND, 0),
        None, M, PREC, BK,
    )  # fmt: skip
    mask = keep[:, None] & columns[None, :]
    if LAYER == 0:
        if head:
            D = number(table, 10 * M + i)
            at, real = _cropped(address(table, G + 8 * M + i, dtype), r0, rows, f, D, columns, EVEN)
            if RESIDUAL:  # what the residual hands down lies there already
                acc += tl.load(at, mask=keep[:, None] & real[None, :], other=0.0).to(tl.float32)
            acc = tl.where(keep[:, None], acc, 0.0)
            tl.store(at, acc.to(dtype), mask=inside[:, None] & real[None, :])
            return
    offsets = rows[:, None] * NS + f[None, :]
    if LAYER != 2 or PSI:
        gated = head if LAYER != 2 else False
        if PSI:
            gated = gated | ((head == 0) & (psi_layer > 0))
        if gated:
            gate = tl.load(units + tl.cast(r0, tl.int64) * NS + offsets, mask=mask, other=0.0)
            acc = tl.where(gate > 0, acc, 0.0)
    if DIRECT and d_latents is not None:
        if head:
            at = d_latents + (tl.cast(i, tl.int64) * B + r)[:, None] * K + f[None, :]
            acc += tl.load(at, mask=mask & (f < K)[None, :], other=0.0).to(tl.float32)
    at = out + tl.cast(r0, tl.int64) * NS + offsets
    tl.store(at, tl.where(keep[:, None], acc, 0.0).to(dtype), mask=inside[:, None] & columns[None, :])
