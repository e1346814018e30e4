"""Parts that the narrow and the wide EBR kernels share: choice by modality, row weights, gradients of a decoded tile.

Tensors of one kind come as tuples, one entry a modality; a kernel picks its entry by scalar comparisons, so one launch
serves modalities of different widths without a table of addresses in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_SOURCE: tl.constexpr = tl.constexpr(0)  # slot i decodes latent i
INDEX_SOURCE: tl.constexpr = tl.constexpr(1)  # int64 [B, m]
WEIGHT_SOURCE: tl.constexpr = tl.constexpr(2)  # float [B, m, m]


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
def load_weight(w, rows, n_rows, columns, n_columns, some=True):
    """Tile ``[rows, columns]`` of a contiguous matrix with ``n_columns`` columns.

    ``some``: whether the tile of rows that it meets holds any row. It also ties the load to that tile: a weight that the
    compiler hoists out of a loop over rows occupies registers for all of it, more than there are.
    """
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :] & some
    return tl.load(w + rows[:, None] * n_columns + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_weight_t(w, rows, n_rows, columns, n_columns, some=True):
    """The same tile transposed, ``[columns, rows]``."""
    mask = (columns < n_columns)[:, None] & (rows < n_rows)[None, :] & some
    return tl.load(w + rows[None, :] * n_columns + columns[:, None], mask=mask, other=0.0)


@triton.jit
def halves(a):
    """Left and right half of the columns of a tile."""
    parts = tl.reshape(a, (a.shape[0], 2, a.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def times_weight_t(acc, a, w, o, OUT, first, some, IN, DEPTH: tl.constexpr, PREC: tl.constexpr):
    """``acc + a Wᵀ`` at outputs o, from column ``first`` of W on, at most DEPTH columns in one product.

    Without a matrix unit a thread holds the operands of its outputs over the whole depth of a product, which decides
    whether it spills.
    """
    if a.shape[1] <= DEPTH:
        weight = load_weight_t(w, o, OUT, tl.arange(0, a.shape[1]) + first, IN, some)
        return tl.dot(a, weight, acc, input_precision=PREC)
    else:
        left, right = halves(a)
        acc = times_weight_t(acc, left, w, o, OUT, first, some, IN, DEPTH, PREC)
        return times_weight_t(acc, right, w, o, OUT, first + a.shape[1] // 2, some, IN, DEPTH, PREC)


@triton.jit
def times_weight(acc, d, w, first, OUT, k, some, IN, DEPTH: tl.constexpr, PREC: tl.constexpr):
    """``acc + d W`` at inputs k, from row ``first`` of W on, at most DEPTH rows in one product."""
    if d.shape[1] <= DEPTH:
        weight = load_weight(w, tl.arange(0, d.shape[1]) + first, OUT, k, IN, some)
        return tl.dot(d, weight, acc, input_precision=PREC)
    else:
        left, right = halves(d)
        acc = times_weight(acc, left, w, first, OUT, k, some, IN, DEPTH, PREC)
        return times_weight(acc, right, w, first + d.shape[1] // 2, OUT, k, some, IN, DEPTH, PREC)


@triton.jit
def load_bias(b, at, n):
    return tl.load(b + at, mask=at < n, other=0.0).to(tl.float32)


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
def present_rows(present, r, inside, i, stride_pb, stride_pm, HAS_PRESENT: tl.constexpr):
    """bool ``[BM]``: rows of the batch in which modality i is present."""
    if HAS_PRESENT:
        return tl.load(present + r * stride_pb + tl.cast(i, r.dtype) * stride_pm, mask=inside, other=0) != 0
    else:
        return inside


@triton.jit
def source_weight(
    source, present, r, inside, i, j, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
    SOURCE: tl.constexpr, HAS_PRESENT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """float32 ``[BM]``: weight of latent j in slot i; zero where j is absent. A float weight is rounded to DTYPE."""
    if SOURCE == WEIGHT_SOURCE:
        w = tl.load(
            source + r * stride_sb + tl.cast(i, r.dtype) * stride_si + tl.cast(j, r.dtype) * stride_sj,
            mask=inside,
            other=0.0,
        )
        w = w.to(DTYPE).to(tl.float32)
    elif SOURCE == INDEX_SOURCE:
        w = (tl.load(source + r * stride_sb + tl.cast(i, r.dtype) * stride_si, mask=inside, other=-1) == j).to(
            tl.float32
        )
    else:
        w = tl.where(inside & (i == j), 1.0, 0.0)
    return tl.where(present_rows(present, r, inside, j, stride_pb, stride_pm, HAS_PRESENT), w, 0.0)


@triton.jit
def valid_rows(
    source, present, r, inside, i, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
    SOURCE: tl.constexpr, HAS_PRESENT: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """bool ``[BM]``: rows in which some present latent has weight in slot i."""
    if SOURCE == NO_SOURCE:
        return present_rows(present, r, inside, i, stride_pb, stride_pm, HAS_PRESENT)
    else:
        valid = inside & False
        for j in tl.range(0, M):
            w = source_weight(
                source, present, r, inside, i, j, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
                SOURCE, HAS_PRESENT, DTYPE,
            )  # fmt: skip
            valid = valid | (w != 0)
        return valid


@triton.jit
def mixed_latents(
    latents, source, present, r, inside, c, c_inside, i, B, K,
    stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
    SOURCE: tl.constexpr, HAS_PRESENT: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``[BM, BC]``: columns c of what slot i decodes, ``Σ_j w_ij g_j`` of stored latents ``[M, B, K]``."""
    dtype = latents.dtype.element_ty
    if SOURCE == NO_SOURCE:
        at = (tl.cast(i, r.dtype) * B + r)[:, None] * K + c[None, :]
        return tl.load(latents + at, mask=inside[:, None] & c_inside[None, :], other=0.0)
    else:
        u = tl.zeros((BM, BC), tl.float32)
        for j in tl.range(0, M):
            w = source_weight(
                source, present, r, inside, i, j, stride_sb, stride_si, stride_sj, stride_pb, stride_pm,
                SOURCE, HAS_PRESENT, dtype,
            )  # fmt: skip
            used = (w != 0)[:, None]
            at = (tl.cast(j, r.dtype) * B + r)[:, None] * K + c[None, :]
            g = tl.load(latents + at, mask=used & c_inside[None, :], other=0.0).to(tl.float32)
            u += tl.where(used, w[:, None] * g, 0.0)
        return u.to(dtype)


@triton.jit
def decoded_grad(
    d_recovered, recovered, x, r, c, c_inside, valid, counted, has_grad, coefficient,
    stride_db, stride_dc, stride_xb, stride_xc, D, RESIDUAL: tl.constexpr, REC_LOSS: tl.constexpr,
):  # fmt: skip
    """float32 ``[BM, BC]``: gradient of decoder i's output: that of ``recovered`` plus that of the squared error."""
    at = r[:, None] * stride_db + c[None, :] * stride_dc
    grad = tl.load(d_recovered + at, mask=(valid & has_grad)[:, None] & c_inside[None, :], other=0.0).to(tl.float32)
    if REC_LOSS:
        mask = counted[:, None] & c_inside[None, :]
        y = tl.load(recovered + r[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.load(x + r[:, None] * stride_xb + c[None, :] * stride_xc, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            y -= z
        grad += tl.where(mask, coefficient * (y - z), 0.0)
    return grad


@triton.jit
def denominators(normalizer, present_total, rows_total, second, HAS_NORMALIZER: tl.constexpr):
    """``(max(1, #present), max(1, #rows))`` or the normalizer's one or two values, where 0 counts as 1."""
    if HAS_NORMALIZER:
        a = tl.load(normalizer).to(tl.float32)
        b = tl.load(normalizer + second).to(tl.float32)
    else:
        a, b = present_total, rows_total
    return tl.where(a == 0, 1.0, a), tl.where(b == 0, 1.0, b)


@triton.jit
def finish_losses(
    partials, counter, normalizer, md_out, rec_out, counts, program, programs, second, ce, squared, here, counted,
    HAS_NORMALIZER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Publish this program's sums; the last program to arrive adds all of them in order and writes the losses.

    ``ce, squared`` float32 ``[BM]`` and ``here, counted`` bool ``[BM]`` of the program's rows. ``counts`` float32
    ``[2]``: the denominators of the two losses. The counter is left at zero.
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
        n_md, n_rec = denominators(normalizer, n_md, n_rec, second, HAS_NORMALIZER)
        tl.store(md_out, md / n_md)
        tl.store(rec_out, rec / n_rec)
        tl.store(counts, n_md)
        tl.store(counts + 1, n_rec)
        tl.atomic_xchg(counter, 0)
