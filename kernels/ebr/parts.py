"""Parts of the EBR kernels: choice by modality, row weights, gradients of a decoded tile, the sums of both losses.

Tensors of one kind come as tuples, one entry a modality; a kernel picks its entry by scalar comparisons, so one launch
serves modalities of different widths without a table of addresses in memory. What belongs together is one argument:

    mask      (uint8 [B, m] or None, stride of rows, of modalities)
    routing   (None: target i decodes latent i; int64 [B, m]; or float [B, m, m]; then three strides)
    features  (matrices, strides of rows, strides of columns)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(pointers, i, N: tl.constexpr):
    """``pointers[i]`` for an i that is known only at run time."""
    chosen = pointers[0]
    for n in tl.static_range(1, N):
        chosen = tl.where(i == n, pointers[n], chosen)
    return chosen


@triton.jit
def pick_as(values, i, N: tl.constexpr, DTYPE: tl.constexpr):
    """``values[i]`` in an integer type of choice; entries may be compile-time constants."""
    chosen = tl.cast(values[0], DTYPE)
    for n in tl.static_range(1, N):
        chosen = tl.where(i == n, tl.cast(values[n], DTYPE), chosen)
    return chosen


@triton.jit
def pick_int(values, i, N: tl.constexpr):
    """``values[i]`` as int32."""
    return pick_as(values, i, N, tl.int32)


@triton.jit
def pick_long(values, i, N: tl.constexpr):
    """``values[i]`` as int64, for strides and offsets."""
    return pick_as(values, i, N, tl.int64)


@triton.jit
def group_of(program, ends, N: tl.constexpr):
    """``(group, its first program)`` of a program; ``ends``: last program of each of N groups, plus one."""
    group = tl.cast(0, tl.int32)
    begin = tl.cast(0, tl.int32)
    for n in tl.static_range(N - 1):
        passed = program >= ends[n]
        group += passed.to(tl.int32)
        begin = tl.where(passed, tl.cast(ends[n], tl.int32), begin)
    return group, begin


@triton.jit
def relu(z):
    """Zero where z <= 0; NaN stays NaN, which ``tl.maximum`` would swallow."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def any_row(keep):
    """Whether some row of a tile is to be worked on, as a scalar."""
    return tl.max(keep.to(tl.int32), axis=0) > 0


@triton.jit
def load_weight(w, rows, n_rows, columns, n_columns):
    """Tile ``[rows, columns]`` of a contiguous matrix with ``n_columns`` columns."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(w + rows[:, None] * n_columns + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_weight_t(w, rows, n_rows, columns, n_columns):
    """The same tile transposed, ``[columns, rows]``."""
    mask = (columns < n_columns)[:, None] & (rows < n_rows)[None, :]
    return tl.load(w + rows[None, :] * n_columns + columns[:, None], mask=mask, other=0.0)


@triton.jit
def load_bias(b, at, n):
    return tl.load(b + at, mask=at < n, other=0.0).to(tl.float32)


@triton.jit
def load_strided(matrices, i, r, c, keep, M: tl.constexpr):
    """``[BM, BC]`` of matrix i of ``(pointers, strides of rows, strides of columns, ...)`` where ``keep``, else zero."""
    at = r[:, None] * pick_long(matrices[1], i, M) + c[None, :] * pick_long(matrices[2], i, M)
    return tl.load(pick(matrices[0], i, M) + at, mask=keep, other=0.0)


@triton.jit
def cross_entropy(logits, i, M: tl.constexpr, MP: tl.constexpr):
    """``[BM]`` cross entropy with target i, and its gradient ``[BM, MP]``."""
    c = tl.arange(0, MP)[None, :]
    shifted = tl.where(c < M, logits, float("-inf"))
    top = tl.max(shifted, axis=1)
    weight = tl.where(c < M, tl.exp(logits - top[:, None]), 0.0)
    total = tl.sum(weight, axis=1)
    ce = top + tl.log(total) - tl.sum(tl.where(c == i, logits, 0.0), axis=1)
    return ce, weight / total[:, None] - tl.where(c == i, 1.0, 0.0)


@triton.jit
def present_rows(mask, r, inside, i):
    """bool ``[BM]``: rows of the batch in which modality i is present."""
    present, stride_b, stride_m = mask
    if present is None:
        return inside
    else:
        return tl.load(present + r * stride_b + tl.cast(i, r.dtype) * stride_m, mask=inside, other=0) != 0


@triton.jit
def stacked_present(mask, q, inside, B):
    """bool: rows of the stacked ``[M * B]`` that are present."""
    present, stride_b, stride_m = mask
    if present is None:
        return inside
    else:
        return tl.load(present + (q % B) * stride_b + (q // B) * stride_m, mask=inside, other=0) != 0


@triton.jit
def source_weight(routing, mask, r, inside, i, j, DTYPE: tl.constexpr):
    """float32 ``[BM]``: weight of latent j in target i; zero where j is absent. A float weight is rounded to DTYPE."""
    source, stride_b, stride_i, stride_j = routing
    if source is None:
        w = tl.where(inside & (i == j), 1.0, 0.0)
    else:
        at = source + r * stride_b + tl.cast(i, r.dtype) * stride_i
        if source.dtype.element_ty.is_int():
            w = (tl.load(at, mask=inside, other=-1) == j).to(tl.float32)
        else:
            w = tl.load(at + tl.cast(j, r.dtype) * stride_j, mask=inside, other=0.0).to(DTYPE).to(tl.float32)
    return tl.where(present_rows(mask, r, inside, j), w, 0.0)


@triton.jit
def valid_rows(routing, mask, r, inside, i, M: tl.constexpr, DTYPE: tl.constexpr):
    """bool ``[BM]``: rows in which some present latent has weight in target i."""
    if routing[0] is None:
        return present_rows(mask, r, inside, i)
    else:
        valid = inside & False
        for j in tl.range(0, M):
            valid = valid | (source_weight(routing, mask, r, inside, i, j, DTYPE) != 0)
        return valid


@triton.jit
def mixed_latents(
    latents, routing, mask, r, inside, c, c_inside, i, B, K, M: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """``[BM, BC]``: columns c of what target i decodes, ``Σ_j w_ij g_j`` of stored latents ``[M, B, K]``."""
    dtype = latents.dtype.element_ty
    if routing[0] is None:
        at = (tl.cast(i, r.dtype) * B + r)[:, None] * K + c[None, :]
        return tl.load(latents + at, mask=inside[:, None] & c_inside[None, :], other=0.0)
    else:
        u = tl.zeros((BM, BC), tl.float32)
        for j in tl.range(0, M):
            w = source_weight(routing, mask, r, inside, i, j, dtype)
            used = (w != 0)[:, None]
            at = (tl.cast(j, r.dtype) * B + r)[:, None] * K + c[None, :]
            g = tl.load(latents + at, mask=used & c_inside[None, :], other=0.0).to(tl.float32)
            u += tl.where(used, w[:, None] * g, 0.0)
        return u.to(dtype)


@triton.jit
def decoded_grad(
    features, recovered, given, scale, i, r, c, D, valid, counted, M: tl.constexpr, RESIDUAL: tl.constexpr
):
    """float32 ``[BM, BC]``: gradient of decoder i's output: that of ``recovered`` plus that of the squared error.

    ``given``: gradients as ``features``, then which of them are real. ``scale``: ``2 d_loss / #rows``, or None.
    """
    inside = (c < D)[None, :]
    real = pick_int(given[3], i, M) != 0
    grad = load_strided(given, i, r, c, (valid & real)[:, None] & inside, M).to(tl.float32)
    if scale is not None:
        keep = counted[:, None] & inside
        at = r[:, None] * D + c[None, :]
        y = tl.load(pick(recovered, i, M) + at, mask=keep, other=0.0).to(tl.float32)
        x = load_strided(features, i, r, c, keep, M).to(tl.float32)
        if RESIDUAL:
            y -= x
        grad += tl.where(keep, scale / D * (y - x), 0.0)
    return grad


@triton.jit
def denominators(normalizer, present_total, rows_total):
    """``(max(1, #present), max(1, #rows))`` or the normalizer's one or two values, where 0 counts as 1."""
    values, second = normalizer
    if values is None:
        a, b = present_total, rows_total
    else:
        a = tl.load(values).to(tl.float32)
        b = tl.load(values + second).to(tl.float32)
    return tl.where(a == 0, 1.0, a), tl.where(b == 0, 1.0, b)


@triton.jit
def finish_losses(
    partials, counter, normalizer, losses, program, programs, ce, squared, here, counted, BLOCK: tl.constexpr
):
    """Publish this program's sums; the last program to arrive adds all of them in order and writes the losses.

    ``ce, squared`` float32 ``[BM]`` and ``here, counted`` bool ``[BM]`` of the program's rows. ``losses``: where to
    write the two, and float32 ``[2]`` for their denominators. The counter is zero when the launch starts.
    """
    which = tl.arange(0, 4)
    column = which[None, :]
    # one sum over rows of four columns: four sums of vectors are four exchanges between warps, and where a vector is
    # itself a sum over a product's columns, Triton 3.7 does not compile them for sm_100
    numbers = tl.where(column < 2, tl.where(column == 0, ce[:, None], squared[:, None]), 0.0)
    rows = tl.where(column == 2, here[:, None], counted[:, None] & (column == 3))
    tl.store(partials + program * 4 + which, tl.sum(numbers + rows.to(tl.float32), axis=0))
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived == programs - 1:
        tl.debug_barrier()
        n = tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK, 4), tl.float32)
        for p0 in tl.range(0, programs, BLOCK):
            mask = (p0 + n < programs)[:, None] & (which < 4)[None, :]
            # past the first-level cache: other programs wrote these
            sums += tl.load(
                partials + (p0 + n)[:, None] * 4 + which[None, :], mask=mask, other=0.0, cache_modifier=".cg"
            )
        total = tl.sum(sums, axis=0)  # [4]
        md = tl.sum(tl.where(which == 0, total, 0.0))
        rec = tl.sum(tl.where(which == 1, total, 0.0))
        n_md = tl.sum(tl.where(which == 2, total, 0.0))
        n_rec = tl.sum(tl.where(which == 3, total, 0.0))
        n_md, n_rec = denominators(normalizer, n_md, n_rec)
        md_out, rec_out, counts = losses
        tl.store(md_out, md / n_md)
        tl.store(rec_out, rec / n_rec)
        tl.store(counts, n_md)
        tl.store(counts + 1, n_rec)
