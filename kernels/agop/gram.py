"""Gram matrices of AGOP by upper-triangular tiles: of derivatives, of given rows, and of the Jacobian rows of deep heads.

The last are ``b = ((L_r ∘ p_n) V) ∘ q_n``: L the rows that come from the layers behind, p and q the derivatives of two
activations, V the weights between. Up to FUSED_WIDTH columns b lives in registers alone; wider rows would be formed once
per tile of the Gram matrix, so they are formed once in a chunk that stays in the second-level cache and then multiplied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Tile, input_precision, launch, product_kind
from .coactivation import CHUNK_BYTES, chunks, hidden_fwd, split_grid, upper_tile

__all__ = ["FUSED_WIDTH", "chain_gram_update", "derivative_gram_update", "gram_fwd", "rows_fwd", "syrk_update"]

# kind of product (common.product_kind) -> tile
GRAM = {
    "tf32x3": Tile({"BLOCK_H": 64, "BLOCK_R": 16}, 8, 2),
    "tf32": Tile({"BLOCK_H": 64, "BLOCK_R": 32}, 8, 3),
    "half": Tile({"BLOCK_H": 64, "BLOCK_R": 64}, 8, 3),
}
CHAIN = {
    "tf32x3": Tile({"BLOCK_H": 64, "BLOCK_R": 32, "BLOCK_K": 16}, 8, 2),
    "tf32": Tile({"BLOCK_H": 64, "BLOCK_R": 64, "BLOCK_K": 32}, 8, 2),
    "half": Tile({"BLOCK_H": 64, "BLOCK_R": 64, "BLOCK_K": 32}, 8, 2),
}
ROWS = {
    "tf32x3": Tile({"BLOCK_H": 64, "BLOCK_R": 64, "BLOCK_K": 32}, 4, 2),
    "tf32": Tile({"BLOCK_H": 128, "BLOCK_R": 64, "BLOCK_K": 32}, 8, 3),
    "half": Tile({"BLOCK_H": 128, "BLOCK_R": 64, "BLOCK_K": 64}, 8, 3),
}
FOLD = Tile({"BLOCK": 256}, 4, 2)

FUSED_WIDTH = 128
CHAIN_ROWS = 512  # float32 sums are folded into float64 after so many rows


@triton.jit
def _gram_fwd_kernel(
    a_ptr, g_ptr, total_ptr, R, H, split_rows, stride_ah, stride_ar, stride_gs, stride_gi, stride_ts,
    ATOMIC: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, CHAIN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``g[i, j] += Σ_r a[i, r] a[j, r]`` for ``j >= i`` and, with TOTAL, ``total[i] += Σ_r a[i, r]``.

    In: ``a [H, R]`` fp32, bf16 or fp16, any strides. Out: float64 ``g [H, H]`` and ``total [H]`` by atomics (their order
    is not deterministic), or without ATOMIC the sums of split s stored at ``g + s stride_gs``, ``total + s stride_ts``.
    Accumulates in fp32 over at most CHAIN rows, then in float64. Below the diagonal untouched.
    """
    i, j = upper_tile(tl.program_id(0))
    split = tl.program_id(1).to(tl.int64)
    rows = (i * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    cols = (j * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    lanes = tl.arange(0, BLOCK_R).to(tl.int64)
    begin = tl.program_id(1) * split_rows
    end = tl.minimum(begin + split_rows, R)
    gram = tl.zeros((BLOCK_H, BLOCK_H), dtype=tl.float64)
    total = tl.zeros((BLOCK_H,), dtype=tl.float64)
    for c0 in tl.range(begin, end, CHAIN):
        acc = tl.zeros((BLOCK_H, BLOCK_H), dtype=tl.float32)
        for r0 in tl.range(c0, tl.minimum(c0 + CHAIN, end), BLOCK_R):
            r = r0 + lanes
            left = tl.load(
                a_ptr + rows[:, None] * stride_ah + r[None, :] * stride_ar,
                mask=(rows[:, None] < H) & (r[None, :] < end), other=0.0,
            )  # [BLOCK_H, BLOCK_R]  # fmt: skip
            right = tl.load(
                a_ptr + cols[None, :] * stride_ah + r[:, None] * stride_ar,
                mask=(cols[None, :] < H) & (r[:, None] < end), other=0.0,
            )  # [BLOCK_R, BLOCK_H]  # fmt: skip
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
            if TOTAL:
                total += tl.sum(left.to(tl.float32), axis=1).to(tl.float64)
        gram += acc.to(tl.float64)
    keep = (rows[:, None] <= cols[None, :]) & (cols[None, :] < H)
    out = g_ptr + split * stride_gs + rows[:, None] * stride_gi + cols[None, :]
    own = rows < tl.where(i == j, H, 0)
    if ATOMIC:
        tl.atomic_add(out, gram, mask=keep, sem="relaxed")
        if TOTAL:
            tl.atomic_add(total_ptr + rows, total, mask=own, sem="relaxed")
    else:
        tl.store(out, gram, mask=keep)
        if TOTAL:
            tl.store(total_ptr + split * stride_ts + rows, total, mask=own)


@triton.jit
def _fold_kernel(part_ptr, g_ptr, count, H, stride_ps, stride_pi, stride_gi, UPPER: tl.constexpr, BLOCK: tl.constexpr):
    """``g[i, j] += Σ_s part[s, i, j]`` in the order of s, for ``j >= i`` (UPPER) or for every j of one row."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(1).to(tl.int64)
    keep = j < H
    if UPPER:
        keep = keep & (j >= i)
    acc = tl.load(g_ptr + i * stride_gi + j, mask=keep, other=0.0)
    for s in tl.range(0, count):
        acc += tl.load(part_ptr + tl.cast(s, tl.int64) * stride_ps + i * stride_pi + j, mask=keep, other=0.0)
    tl.store(g_ptr + i * stride_gi + j, acc, mask=keep)


@triton.jit
def _scaled_rows(
    left_ptr, inner_ptr, sample, row, k, live, K, stride_ln, stride_lr, stride_lk, stride_in, stride_ik
):  # fmt: skip
    """``L[n, r, k] p[n, k]`` of each lane's (n, r), rounded to the type of L: ``[rows, BLOCK_K]``."""
    inside = live[:, None] & (k[None, :] < K)
    left = tl.load(
        left_ptr + sample[:, None] * stride_ln + row[:, None] * stride_lr + k[None, :] * stride_lk,
        mask=inside,
        other=0.0,
    )
    inner = tl.load(inner_ptr + sample[:, None] * stride_in + k[None, :] * stride_ik, mask=inside, other=0.0)
    return (left.to(tl.float32) * inner.to(tl.float32)).to(left_ptr.dtype.element_ty)


@triton.jit
def _load_v(v_ptr, k, h, K, H, stride_vk, stride_vh):
    """``[BLOCK_K, BLOCK_H]`` of ``v [K, H]``, zeros outside."""
    inside = (k[:, None] < K) & (h[None, :] < H)
    return tl.load(v_ptr + k[:, None] * stride_vk + h[None, :] * stride_vh, mask=inside, other=0.0)


@triton.jit
def _chain_fwd_kernel(
    left_ptr, inner_ptr, v_ptr, outer_ptr, g_ptr, Q, R, K, H, split_rows,
    stride_ln, stride_lr, stride_lk, stride_in, stride_ik, stride_vk, stride_vh, stride_on, stride_oh,
    stride_gs, stride_gi, HAS_OUTER: tl.constexpr, ATOMIC: tl.constexpr, PRECISION: tl.constexpr, CHAIN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``g[i, j] += Σ_q b[q, i] b[q, j]`` for ``j >= i``, ``q = n R + r`` below ``Q = N R``; b never leaves the chip.

    In: ``left [N, R, K]`` (stride_ln 0: one for all samples), ``inner [N, K]``, ``v [K, H]``, ``outer [N, H]``: one of
    fp32, bf16, fp16, any strides. Out: float64 ``[H, H]``, by atomics or per split. The product with V accumulates in
    fp32 and is rounded to the type of the operands; the Gram matrix in fp32 over CHAIN rows, then float64.
    """
    i, j = upper_tile(tl.program_id(0))
    rows = (i * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    cols = (j * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    begin = tl.program_id(1) * split_rows
    end = tl.minimum(begin + split_rows, Q)
    gram = tl.zeros((BLOCK_H, BLOCK_H), dtype=tl.float64)
    for c0 in tl.range(begin, end, CHAIN):
        acc = tl.zeros((BLOCK_H, BLOCK_H), dtype=tl.float32)
        for q0 in tl.range(c0, tl.minimum(c0 + CHAIN, end), BLOCK_R):
            q = q0 + tl.arange(0, BLOCK_R)
            live = q < end
            sample, row = (q // R).to(tl.int64), (q % R).to(tl.int64)
            left = tl.zeros((BLOCK_R, BLOCK_H), dtype=tl.float32)
            right = tl.zeros((BLOCK_R, BLOCK_H), dtype=tl.float32)
            for k0 in tl.range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
                scaled = _scaled_rows(
                    left_ptr, inner_ptr, sample, row, k, live, K, stride_ln, stride_lr, stride_lk, stride_in, stride_ik
                )  # [BLOCK_R, BLOCK_K]
                v = _load_v(v_ptr, k, rows, K, H, stride_vk, stride_vh)
                left = tl.dot(scaled, v, left, input_precision=PRECISION)
                if i != j:
                    v = _load_v(v_ptr, k, cols, K, H, stride_vk, stride_vh)
                    right = tl.dot(scaled, v, right, input_precision=PRECISION)
            if i == j:
                right = left
            if HAS_OUTER:
                left *= tl.load(
                    outer_ptr + sample[:, None] * stride_on + rows[None, :] * stride_oh,
                    mask=live[:, None] & (rows[None, :] < H), other=0.0,
                ).to(tl.float32)  # fmt: skip
                right *= tl.load(
                    outer_ptr + sample[:, None] * stride_on + cols[None, :] * stride_oh,
                    mask=live[:, None] & (cols[None, :] < H), other=0.0,
                ).to(tl.float32)  # fmt: skip
            kind = v_ptr.dtype.element_ty
            acc = tl.dot(tl.trans(left.to(kind)), right.to(kind), acc, input_precision=PRECISION)
        gram += acc.to(tl.float64)
    keep = (rows[:, None] <= cols[None, :]) & (cols[None, :] < H)
    out = g_ptr + tl.program_id(1).to(tl.int64) * stride_gs + rows[:, None] * stride_gi + cols[None, :]
    if ATOMIC:
        tl.atomic_add(out, gram, mask=keep, sem="relaxed")
    else:
        tl.store(out, gram, mask=keep)


@triton.jit
def _rows_fwd_kernel(
    left_ptr, inner_ptr, v_ptr, outer_ptr, out_ptr, Q, R, K, H,
    stride_ln, stride_lr, stride_lk, stride_in, stride_ik, stride_vk, stride_vh, stride_on, stride_oh, stride_bh,
    HAS_OUTER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``b[h, q] = ((L_r ∘ p_n) V)_h q_nh``, ``q = n R + r``: operands as above, ``b [H, Q]`` in their type, fp32 sums."""
    tiles_h = tl.cdiv(H, BLOCK_H)
    program = tl.program_id(0)
    h = ((program % tiles_h) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    q = (program // tiles_h) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = q < Q
    sample, row = (q // R).to(tl.int64), (q % R).to(tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK_H), dtype=tl.float32)
    for k0 in tl.range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        scaled = _scaled_rows(
            left_ptr, inner_ptr, sample, row, k, live, K, stride_ln, stride_lr, stride_lk, stride_in, stride_ik
        )  # [BLOCK_R, BLOCK_K]
        acc = tl.dot(scaled, _load_v(v_ptr, k, h, K, H, stride_vk, stride_vh), acc, input_precision=PRECISION)
    keep = live[:, None] & (h[None, :] < H)
    if HAS_OUTER:
        outer = tl.load(outer_ptr + sample[:, None] * stride_on + h[None, :] * stride_oh, mask=keep, other=0.0)
        acc *= outer.to(tl.float32)
    tl.store(out_ptr + h[None, :] * stride_bh + q.to(tl.int64)[:, None], acc.to(out_ptr.dtype.element_ty), mask=keep)


def gram_fwd(rows: Tensor, gram: Tensor, total: Tensor | None = None) -> None:
    """Add ``rows rowsᵀ`` to the upper triangle of ``gram`` and the row sums to ``total``: ``[h, R]`` into float64."""
    if not rows.numel():
        return
    units, tile = rows.shape[0], GRAM[product_kind(rows.dtype)]
    grid, split_rows = split_grid(units, tile, rows.shape[1], CHAIN_ROWS)
    atomic = not torch.are_deterministic_algorithms_enabled()
    sums, totals = gram, gram if total is None else total
    if not atomic:
        sums = torch.empty(grid[1], units, units, dtype=torch.float64, device=rows.device)
        totals = torch.empty(grid[1], units, dtype=torch.float64, device=rows.device)
    launch(
        _gram_fwd_kernel, grid, rows.device,
        rows, sums, totals, rows.shape[1], units, split_rows, rows.stride(0), rows.stride(1),
        0 if atomic else sums.stride(0), sums.stride(-2), 0 if atomic else totals.stride(0),
        ATOMIC=atomic, TOTAL=total is not None, PRECISION=input_precision(rows.dtype), CHAIN=CHAIN_ROWS, **tile.options,
    )  # fmt: skip
    if not atomic:
        _fold(sums, gram)
        if total is not None:
            _fold(totals[:, None], total[None])


def _fold(parts: Tensor, into: Tensor) -> None:
    """Add ``parts [S, h, h]`` to ``into [h, h]``, upper triangle, in the order of S; one row: all of it."""
    units, tile = parts.shape[2], FOLD
    launch(
        _fold_kernel, (triton.cdiv(units, tile.blocks["BLOCK"]), parts.shape[1]), parts.device,
        parts, into, parts.shape[0], units, parts.stride(0), parts.stride(1), into.stride(0),
        UPPER=parts.shape[1] > 1, **tile.options,
    )  # fmt: skip


def derivative_gram_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, alpha: float, beta: float,
    gram: Tensor, total: Tensor, nonfinite: Tensor, chunk_rows: int = 0,
) -> None:  # fmt: skip
    """Add ``Σ_n a_i a_j`` and ``Σ_n a_i``, ``a = s'(x Wᵀ + b)``, to ``gram`` and ``total``: two launches a chunk."""
    for part in chunks(x, weight, 4, chunk_rows):
        gram_fwd(hidden_fwd(part, weight, bias, nonfinite, activation, alpha, beta), gram, total)


def syrk_update(rows: Tensor, gram: Tensor) -> None:
    """Add ``rowsᵀ rows`` to the upper triangle of ``gram``: ``[R, h]`` into float64 ``[h, h]``."""
    gram_fwd(rows.t(), gram)


def _operands(left: Tensor, inner: Tensor, v: Tensor, outer: Tensor | None) -> tuple[Tensor, ...]:
    return left, inner, v, v if outer is None else outer


def _strides(left: Tensor, inner: Tensor, v: Tensor, outer: Tensor | None) -> tuple[int, ...]:
    last = (0, 0) if outer is None else outer.stride()
    return (left.stride(0) if left.dim() == 3 else 0, *left.stride()[-2:], *inner.stride(), *v.stride(), *last)


def rows_fwd(left: Tensor, inner: Tensor, v: Tensor, outer: Tensor | None) -> Tensor:
    """The rows b of N samples, ``[h, N R]``: left ``[R, k]`` or ``[N, R, k]``, inner ``[N, k]``, v ``[k, h]``."""
    count, units = inner.shape[0] * left.shape[-2], v.shape[1]
    out = torch.empty(units, -(-count // 16) * 16, dtype=v.dtype, device=v.device)
    tile = ROWS[product_kind(v.dtype)]
    grid = (triton.cdiv(count, tile.blocks["BLOCK_R"]) * triton.cdiv(units, tile.blocks["BLOCK_H"]),)
    launch(
        _rows_fwd_kernel, grid, v.device,
        *_operands(left, inner, v, outer), out, count, left.shape[-2], v.shape[0], units,
        *_strides(left, inner, v, outer), out.stride(0),
        HAS_OUTER=outer is not None, PRECISION=input_precision(v.dtype), **tile.options,
    )  # fmt: skip
    return out[:, :count]


def chain_gram_update(left: Tensor, inner: Tensor, v: Tensor, outer: Tensor | None, gram: Tensor) -> None:
    """Add ``Σ_n Σ_r b bᵀ`` to the upper triangle of the float64 ``gram [h, h]``; operands as in :func:`rows_fwd`."""
    samples, per_sample, units = inner.shape[0], left.shape[-2], v.shape[1]
    if not samples * per_sample * units:
        return
    if units > FUSED_WIDTH:
        step = max(1, CHUNK_BYTES // (v.element_size() * units * per_sample))
        for start in range(0, samples, step):
            part = slice(start, start + step)
            rows = rows_fwd(
                left[part] if left.dim() == 3 else left, inner[part], v, None if outer is None else outer[part]
            )
            gram_fwd(rows, gram)
        return
    most = max(1, (1 << 30) // per_sample)
    if samples > most:  # rows are numbered in 32 bits
        for start in range(0, samples, most):
            part = slice(start, start + most)
            own = left[part] if left.dim() == 3 else left
            chain_gram_update(own, inner[part], v, None if outer is None else outer[part], gram)
        return
    tile, count = CHAIN[product_kind(v.dtype)], samples * per_sample
    grid, split_rows = split_grid(units, tile, count, CHAIN_ROWS)
    atomic = not torch.are_deterministic_algorithms_enabled()
    sums = gram if atomic else torch.empty(grid[1], units, units, dtype=torch.float64, device=gram.device)
    launch(
        _chain_fwd_kernel, grid, gram.device,
        *_operands(left, inner, v, outer), sums, count, per_sample, v.shape[0], units, split_rows,
        *_strides(left, inner, v, outer), 0 if atomic else sums.stride(0), sums.stride(-2),
        HAS_OUTER=outer is not None, ATOMIC=atomic, PRECISION=input_precision(v.dtype), CHAIN=CHAIN_ROWS, **tile.options,
    )  # fmt: skip
    if not atomic:
        _fold(sums, gram)
