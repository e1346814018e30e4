"""Parts of the EBR kernels: the table of addresses, widths, which rows take part, and the grouped product.

A call's addresses, widths and strides lie in one int64 table on the device (``ebr_table_kernel`` writes it), M entries a
column, the discriminator's after them; plan.py has the layout. So a launch takes a handful of arguments, whatever the
number of modalities, and compiles once for all batch sizes and widths. What a product reads has widths that 16 divides:
buffers between launches are allocated so, and parameters and features that are not are copied before (``ebr_pack_kernel``).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(table, at):
    """Entry ``at`` as int32."""
    return tl.load(table + at).to(tl.int32)


@triton.jit
def address(table, at, DTYPE: tl.constexpr):
    """Entry ``at`` as the address of a matrix that begins at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(table + at).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def round16(n):
    """The next multiple of 16."""
    return (n + 15) // 16 * 16


@triton.jit
def relu(z):
    """A NaN must stay one, which ``tl.maximum`` would swallow."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def any_of(keep):
    """Whether some row of a tile is to be worked on, as a scalar."""
    return tl.max(keep.to(tl.int32), axis=0) > 0


@triton.jit
def grouped_product(
    acc, left, left_at, left_step, rows, right, right_at, right_step, columns, depth, k_present,
    M: tl.constexpr, PREC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``acc + A B`` over ``depth``: A ``[rows, depth]`` at ``left + left_at``, B ``[depth, columns]``, masks of both.

    ``left_at, right_at``: int32 offsets of the first block; ``left_step, right_step``: elements from one k to the next.
    Addresses are a scalar plus a small offset: one register an element, not two. ``k_present``: None, or where k runs
    over rows of features, of which absent ones are not read: their column of the mask.
    """
    k = tl.arange(0, BK)
    for k0 in tl.range(0, depth, BK):
        at = tl.cast(k0, tl.int64)
        inside = k0 + k < depth
        if k_present is not None:
            inside = inside & (tl.load(k_present + (at + k) * M, mask=inside, other=0) != 0)
        a = tl.load(left + at * left_step + left_at, mask=rows[:, None] & inside[None, :], other=0.0)
        b = tl.load(right + at * right_step + right_at, mask=inside[:, None] & columns[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PREC)
    return acc


@triton.jit
def present_rows(present, r, inside, i, M: tl.constexpr):
    """bool ``[BM]``: rows of the batch in which modality i is present; ``present`` uint8 ``[B, M]`` or None."""
    if present is None:
        return inside
    else:
        return tl.load(present + r.to(tl.int64) * M + i, mask=inside, other=0) != 0


@triton.jit
def source_weight(source, present, r, inside, i, j, M: tl.constexpr, DTYPE: tl.constexpr):
    """float32 ``[BM]``: weight of latent j in target i; zero where j is absent. A float weight is rounded to DTYPE.

    ``source``: None (target i decodes latent i), int64 ``[B, M]`` or float ``[B, M, M]``.
    """
    if source is None:
        w = tl.where(inside & (i == j), 1.0, 0.0)
    else:
        at = source + r.to(tl.int64) * M + i
        if source.dtype.element_ty.is_int():
            w = (tl.load(at, mask=inside, other=-1) == j).to(tl.float32)
        else:
            at = source + (r.to(tl.int64) * M + i) * M + j
            w = tl.load(at, mask=inside, other=0.0).to(DTYPE).to(tl.float32)
    return tl.where(present_rows(present, r, inside, j, M), w, 0.0)


@triton.jit
def valid_rows(source, present, r, inside, i, M: tl.constexpr, DTYPE: tl.constexpr):
    """bool ``[BM]``: rows in which some present latent has weight in target i."""
    if source is None:
        return present_rows(present, r, inside, i, M)
    else:
        valid = inside & False
        for j in tl.range(0, M):
            valid = valid | (source_weight(source, present, r, inside, i, j, M, DTYPE) != 0)
        return valid


@triton.jit
def loss_scale(d_loss, counts):
    """``d_loss / counts`` as float32, None where that loss has no gradient."""
    if d_loss is None:
        return None
    else:
        return tl.load(d_loss).to(tl.float32) / tl.load(counts)


@triton.jit
def reversed_scale(reversal, d_md, counts):
    """``−λ d_md / #present``; zero where λ is, so that 0 times infinity never becomes NaN."""
    lambda_ = tl.load(reversal).to(tl.float32)
    return tl.where(lambda_ == 0, 0.0, -lambda_ * loss_scale(d_md, counts))
