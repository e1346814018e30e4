"""Forward kernels of the EBR step: grouped products, normalisation of the latents, end of the discriminator with both losses.

Formulas: docs/guides/ebr.md; the order of launches: launch.py. A launch of products holds groups: group n < M is modality n's
head, group M the discriminator over the ``[M * B]`` rows of all modalities. Buffers between launches are ``[M, B, width]``,
contiguous, in the dtype of the features; weights are as ``nn.Linear`` holds them. Products accumulate in float32. Every
element has one owner: nothing depends on the order of programs. Rows that are absent are not read; a tile without present
rows does no product. Arguments that are tuples: parts.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    any_row,
    cross_entropy,
    finish_losses,
    group_of,
    load_bias,
    load_strided,
    load_weight,
    load_weight_t,
    mixed_latents,
    pick,
    pick_int,
    pick_long,
    present_rows,
    relu,
    stacked_present,
    valid_rows,
)

__all__ = ["ebr_fwd_kernel", "ebr_loss_kernel", "ebr_norm_fwd_kernel"]


@triton.jit
def ebr_fwd_kernel(
    groups, strides, widths, ends, features, mask, routing, latents, squared, B, K,
    M: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr, MIX: tl.constexpr, DECODE: tl.constexpr,
    LAST: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``c = a Wᵀ + b``, through a ReLU; the last launch of the decoders adds the residual and the squared error.

    ``groups (a, W, b, c)``, ``strides`` of a (rows, columns) and ``widths`` (in, out) hold an entry for each of the groups
    FIRST .. FIRST + GROUPS; ``ends``: last program of each, plus one. MIX: the decoders' input is mixed from stored
    latents as it is read. DECODE: heads work on rows with a source, not on present rows. LAST: a program's rows of
    ``squared`` are ``‖error‖² / width``.
    """
    program = tl.program_id(0)
    n, begin = group_of(program, ends, GROUPS)
    i = n + FIRST
    head = i < M
    IN, OUT = pick_int(widths[0], n, GROUPS), pick_int(widths[1], n, GROUPS)
    row_tiles = tl.cdiv(tl.where(head, B, B * M), BM)
    r = (((program - begin) % row_tiles) * BM + tl.arange(0, BM)).to(tl.int64)
    o = ((program - begin) // row_tiles) * BN + tl.arange(0, BN)
    dtype = latents.dtype.element_ty

    if head:
        inside = r < B
        if DECODE:
            keep = valid_rows(routing, mask, r, inside, i, M, dtype)
        else:
            keep = present_rows(mask, r, inside, i)
    else:
        inside = r < B * M
        keep = stacked_present(mask, r, inside, B)
    depth = tl.where(any_row(keep), IN, 0)
    weight = pick(groups[1], n, GROUPS)
    acc = tl.zeros((BM, BN), tl.float32)
    if MIX and head:
        for k0 in tl.range(0, depth, BK):
            k = k0 + tl.arange(0, BK)
            left = mixed_latents(latents, routing, mask, r, keep, k, k < IN, i, B, K, M, BM, BK)
            acc = tl.dot(left, load_weight_t(weight, o, OUT, k, IN), acc, input_precision=PREC)
    else:
        rows = pick(groups[0], n, GROUPS) + r[:, None] * pick_long(strides[0], n, GROUPS)
        step = pick_long(strides[1], n, GROUPS)
        for k0 in tl.range(0, depth, BK):
            k = k0 + tl.arange(0, BK)
            left = tl.load(rows + k[None, :] * step, mask=keep[:, None] & (k < IN)[None, :], other=0.0)
            acc = tl.dot(left, load_weight_t(weight, o, OUT, k, IN), acc, input_precision=PREC)
    acc += load_bias(pick(groups[2], n, GROUPS), o, OUT)[None, :]
    out = inside[:, None] & (o < OUT)[None, :]
    at = pick(groups[3], n, GROUPS) + r[:, None] * OUT + o[None, :]
    if LAST and head:
        y = tl.where(keep[:, None], acc, 0.0)
        here = present_rows(mask, r, inside, i)
        x = load_strided(features, i, r, o, out & here[:, None], M).to(tl.float32)
        error = tl.where(out & (here & keep)[:, None], y - x, 0.0)
        tl.store(squared + program * BM + tl.arange(0, BM), tl.sum(error * error, axis=1) / OUT)
        if RESIDUAL:
            y += x
        tl.store(at, y.to(dtype), mask=out)
    else:
        if RELU:
            acc = relu(acc)
        tl.store(at, tl.where(keep[:, None], acc, 0.0).to(dtype), mask=out)


@triton.jit
def ebr_norm_fwd_kernel(latents, rstd_out, mask, B, K, M: tl.constexpr, KP: tl.constexpr, BR: tl.constexpr):
    """Layer-normalise the stacked latents in place, without parameters; absent rows stay zero."""
    q = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    keep = stacked_present(mask, q, q < B * M, B)
    k = tl.arange(0, KP)
    here = keep[:, None] & (k < K)[None, :]
    at = latents + q[:, None] * K + k[None, :]
    g = tl.load(at, mask=here, other=0.0).to(tl.float32)
    centred = tl.where(here, g - (tl.sum(g, axis=1) / K)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / K + 1e-5)
    tl.store(at, (centred * rstd[:, None]).to(latents.dtype.element_ty), mask=here)
    tl.store(rstd_out + q, tl.where(keep, rstd, 0.0), mask=q < B * M)


@triton.jit
def ebr_loss_kernel(
    below, hidden, last, mask, routing, normalizer, squared, train, partials, counter, losses,
    B, P, tiles, n_squared, M: tl.constexpr, MP: tl.constexpr, PREC: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The last hidden layer of the discriminator, its output, the cross entropy, and both losses, BP units at a time.

    ``below [M, B, IN]``: input of that hidden layer ``(W, b, IN)``, or, where ``hidden`` is None, of the output layer
    ``last (W, b)``; P: inputs of the latter. ``train (d_top, last_sums)``, or None: for the summed cross entropy the
    gradient at the last hidden layer's pre-activation (at the latents without one), which holds the hidden units until
    then, and each program's share of the last layer's own gradient.
    """
    program = tl.program_id(0)
    i = program // tiles
    r = ((program % tiles) * BM + tl.arange(0, BM)).to(tl.int64)
    inside = r < B
    dtype = below.dtype.element_ty
    here = present_rows(mask, r, inside, i)
    valid = valid_rows(routing, mask, r, inside, i, M, dtype)
    q = tl.cast(i, tl.int64) * B + r
    c = tl.arange(0, MP)
    some = any_row(here)
    logits = tl.zeros((BM, MP), tl.float32)
    for p0 in tl.range(0, tl.where(some, P, 0), BP):
        p = p0 + tl.arange(0, BP)
        at = q[:, None] * P + p[None, :]
        if hidden is not None:
            IN = hidden[2]
            z = tl.zeros((BM, BP), tl.float32)
            for k0 in tl.range(0, IN, BK):
                k = k0 + tl.arange(0, BK)
                left = tl.load(below + q[:, None] * IN + k[None, :], mask=here[:, None] & (k < IN)[None, :], other=0.0)
                z = tl.dot(left, load_weight_t(hidden[0], p, P, k, IN), z, input_precision=PREC)
            top = relu(z + load_bias(hidden[1], p, P)[None, :]).to(dtype)
            if train is not None:
                tl.store(train[0] + at, top, mask=here[:, None] & (p < P)[None, :])
        else:
            top = tl.load(below + at, mask=here[:, None] & (p < P)[None, :], other=0.0)
        logits = tl.dot(top, load_weight_t(last[0], c, M, p, P), logits, input_precision=PREC)
    logits += load_bias(last[1], c, M)[None, :]
    ce, d = cross_entropy(logits, i, M, MP)
    d = tl.where(here[:, None], d, 0.0)
    if train is not None:
        d_top, last_sums = train
        d_low = d.to(dtype)
        share = last_sums + tl.cast(program, tl.int64) * (M * P + M)
        tl.store(share + M * P + c, tl.sum(d, axis=0), mask=c < M)
        if hidden is not None:
            tl.debug_barrier()  # hidden units are read back by other threads
        for p0 in tl.range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            at = q[:, None] * P + p[None, :]
            units = below + at if hidden is None else d_top + at
            top = tl.load(units, mask=here[:, None] & (p < P)[None, :], other=0.0)
            sums = tl.dot(tl.trans(d_low), top, input_precision=PREC)
            tl.store(share + c[:, None] * P + p[None, :], sums, mask=(c < M)[:, None] & (p < P)[None, :])
            back = tl.dot(d_low, load_weight(last[0], c, M, p, P), input_precision=PREC)
            if hidden is not None:
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
        partials,
        counter,
        normalizer,
        losses,
        program,
        programs,
        tl.where(here, ce, 0.0),
        error,
        here,
        here & valid,
        128,
    )
