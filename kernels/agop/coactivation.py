"""AGOP on a GPU: a hidden layer with its sign or derivative in one launch, and Gram matrices by upper-triangular tiles.

Every matrix that a Gram kernel reads lies with the samples contiguous (``[h, N]``), the layout that int8 and TF32
matrix units take without a transposition. Row chains of deep heads are in ``agop_chain.py``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import AGOP, input_precision, product_kind, splits

__all__ = [
    "MAX_ROWS",
    "coactivation_fwd",
    "derivative_gram_update",
    "fold_partials",
    "gram_fwd",
    "hidden_fwd",
    "relu_coactivation_update",
    "syrk_update",
    "upper_tile",
    "usable",
]

MAX_ROWS = 1 << 20  # samples of one co-activation launch: int32 sums cannot overflow
CHAIN_ROWS = 512  # float32 sums are folded into float64 after so many rows
_CHUNK_BYTES = 32 << 20  # of a mask or derivative between two launches: it stays in the second-level cache


@triton.jit
def upper_tile(t):
    """Tile ``(i, j)``, ``i <= j``, of the upper triangle, columns in order: ``t = j (j + 1) / 2 + i``."""
    j = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)  # the square root is rounded
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)
    return t - j * (j + 1) // 2, j


@triton.jit
def _derivative(z, alpha, beta, ACTIVATION: tl.constexpr):
    if ACTIVATION == "identity":
        return z * 0.0 + 1.0
    elif ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, 1.0, alpha)
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        s = tl.sigmoid(2.0 * inner)
        peak = s * tl.sigmoid(-2.0 * inner)  # zero far out, where the slope may overflow
        return s + tl.where(peak == 0.0, 0.0, 2.0 * z * peak * (0.7978845608028654 * (1.0 + 0.134145 * z * z)))
    elif ACTIVATION == "silu":
        return tl.sigmoid(z) * (1.0 + z * tl.sigmoid(-z))
    elif ACTIVATION == "tanh":
        return 4.0 * tl.sigmoid(2.0 * z) * tl.sigmoid(-2.0 * z)
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(z) * tl.sigmoid(-z)
    elif ACTIVATION == "elu":
        return tl.where(z > 0, 1.0, alpha * tl.exp(tl.where(z > 0, 0.0, z)))
    else:
        tl.static_assert(ACTIVATION == "softplus")
        return tl.where(z * alpha > beta, 1.0, tl.sigmoid(z * alpha))


@triton.jit
def _hidden_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, flag_ptr, N, D, H, stride_xn, stride_xd, stride_wh, stride_wd, stride_oh,
    alpha, beta, ACTIVATION: tl.constexpr, SIGNS: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[j, n] = [z_nj > 0]`` (SIGNS, int8) or ``s'(z_nj)`` (float32), ``z = x Wᵀ + b``; counts non-finite z.

    In: ``x [N, D]``, ``w [H, D]`` with any strides, one of fp32, bf16, fp16; ``bias [H]``. Out: ``[H, N]`` with rows
    ``stride_oh`` apart; ``flag`` int64 ``[1]`` grows where a z is not finite (by how much is not deterministic).
    Accumulates in fp32 along D in one order, so a sample's result does not depend on those beside it.
    """
    tiles_h = tl.cdiv(H, BLOCK_H)
    program = tl.program_id(0)  # tiles of one group of samples are neighbours: x is read from memory once
    h = ((program % tiles_h) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    n = (program // tiles_h).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    z = tl.zeros((BLOCK_H, BLOCK_N), dtype=tl.float32)
    for k0 in tl.range(0, D, BLOCK_K):
        inside = k0 + k < D
        w = tl.load(
            w_ptr + h[:, None] * stride_wh + (k0 + k)[None, :] * stride_wd,
            mask=(h[:, None] < H) & inside[None, :], other=0.0,
        )  # [BLOCK_H, BLOCK_K]  # fmt: skip
        x = tl.load(
            x_ptr + n[None, :] * stride_xn + (k0 + k)[:, None] * stride_xd,
            mask=(n[None, :] < N) & inside[:, None], other=0.0,
        )  # [BLOCK_K, BLOCK_N]  # fmt: skip
        z = tl.dot(w, x, z, input_precision=PRECISION)
    if HAS_BIAS:
        z += tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)[:, None]
    keep = (h[:, None] < H) & (n[None, :] < N)
    bad = tl.sum(tl.where(keep & (z - z != 0.0), 1, 0))
    tl.atomic_add(flag_ptr, bad.to(tl.int64), mask=bad > 0, sem="relaxed")
    out = out_ptr + h[:, None] * stride_oh + n[None, :]
    if SIGNS:
        tl.store(out, (z > 0).to(tl.int8), mask=keep)
    else:
        tl.store(out, _derivative(z, alpha, beta, ACTIVATION), mask=keep)


@triton.jit
def _coactivation_fwd_kernel(
    a_ptr, c_ptr, N, H, split_rows, stride_ah, stride_an, stride_ci, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """``c[i, j] += Σ_n a[i, n] a[j, n]`` for ``j >= i``: int8 0 or 1 into int64, on the int8 matrix units.

    In: ``a [H, N]`` with any strides. Out: ``c [H, H]``, row stride ``stride_ci``; below the diagonal untouched.
    Accumulates in int32 inside a program, in int64 by atomics across them: exact, so deterministic in any order.
    """
    i, j = upper_tile(tl.program_id(0))
    rows = (i * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    cols = (j * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    samples = tl.arange(0, BLOCK_N).to(tl.int64)
    begin = tl.program_id(1) * split_rows
    end = tl.minimum(begin + split_rows, N)
    acc = tl.zeros((BLOCK_H, BLOCK_H), dtype=tl.int32)
    for n0 in tl.range(begin, end, BLOCK_N):
        n = n0 + samples
        left = tl.load(
            a_ptr + rows[:, None] * stride_ah + n[None, :] * stride_an,
            mask=(rows[:, None] < H) & (n[None, :] < end), other=0,
        )  # [BLOCK_H, BLOCK_N]  # fmt: skip
        right = tl.load(
            a_ptr + cols[None, :] * stride_ah + n[:, None] * stride_an,
            mask=(cols[None, :] < H) & (n[:, None] < end), other=0,
        )  # [BLOCK_N, BLOCK_H]  # fmt: skip
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
    keep = (rows[:, None] <= cols[None, :]) & (cols[None, :] < H)
    tl.atomic_add(c_ptr + rows[:, None] * stride_ci + cols[None, :], acc.to(tl.int64), mask=keep, sem="relaxed")


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
    own = (rows < H) & (i == j)
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


def usable(tensors: Sequence[Tensor]) -> str | None:
    """Say why the kernels cannot run on these tensors, None where they can."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):  # older ones were never compiled or interpreted
        return f"Triton {triton.__version__} is installed and the kernels need 3.7 or newer"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    devices = {tensor.device.type for tensor in tensors}
    if interpreted:
        if not devices <= {"cpu"}:
            return "TRITON_INTERPRET=1 interprets kernels on CPU tensors only"
    elif not torch.cuda.is_available():
        return "Triton kernels need a GPU and torch sees none (TRITON_INTERPRET=1 interprets them, for tests)"
    elif not devices <= {"cuda"}:
        return f"Triton kernels need tensors on the GPU and got {', '.join(sorted(devices))}"
    wrong = {t.dtype for t in tensors if t.is_floating_point()} - {torch.float32, torch.bfloat16, torch.float16}
    return f"they compute in float32, bfloat16 and float16 and a tensor is {wrong.pop()}" if wrong else None


def hidden_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, nonfinite: Tensor,
    activation: str | None, alpha: float = 0.0, beta: float = 20.0,
) -> Tensor:  # fmt: skip
    """Signs (``activation=None``, int8) or derivatives (float32) of ``z = x Wᵀ + b``: ``[N, d] -> [h, N]``."""
    samples, units = x.shape[0], weight.shape[0]
    out = torch.empty(units, -(-samples // 16) * 16, dtype=torch.float32 if activation else torch.int8, device=x.device)
    config = AGOP["hidden"][product_kind(x.dtype)]
    blocks = config.blocks
    grid = (triton.cdiv(samples, blocks["BLOCK_N"]) * triton.cdiv(units, blocks["BLOCK_H"]),)
    _hidden_fwd_kernel[grid](
        x, weight, weight if bias is None else bias.contiguous(), out, nonfinite, samples, x.shape[1], units,
        x.stride(0), x.stride(1), weight.stride(0), weight.stride(1), out.stride(0), alpha, beta,
        ACTIVATION=activation, SIGNS=activation is None, HAS_BIAS=bias is not None, PRECISION=input_precision(),
        **config.launch,
    )  # fmt: skip
    return out[:, :samples]


def coactivation_fwd(active: Tensor, counts: Tensor) -> None:
    """Add ``active activeᵀ`` to the upper triangle of ``counts``: int8 ``[h, N]`` of 0 and 1 into int64 ``[h, h]``."""
    config = AGOP["coactivation"]["int8"]
    units = active.shape[0]
    tiles = triton.cdiv(units, config.blocks["BLOCK_H"])
    tiles = tiles * (tiles + 1) // 2
    for part in active.split(MAX_ROWS, dim=1):
        if part.numel():
            grid, rows = _split_grid(tiles, part.shape[1], config.blocks["BLOCK_N"])
            _coactivation_fwd_kernel[grid](
                part, counts, part.shape[1], units, rows, part.stride(0), part.stride(1), counts.stride(0),
                **config.launch,
            )  # fmt: skip


def gram_fwd(rows: Tensor, gram: Tensor, total: Tensor | None = None) -> None:
    """Add ``rows rowsᵀ`` to the upper triangle of ``gram`` and the row sums to ``total``: ``[h, R]`` into float64."""
    if not rows.numel():
        return
    config = AGOP["gram"][product_kind(rows.dtype)]
    units = rows.shape[0]
    tiles = triton.cdiv(units, config.blocks["BLOCK_H"])
    grid, split_rows = _split_grid(tiles * (tiles + 1) // 2, rows.shape[1], CHAIN_ROWS)
    atomic = not torch.are_deterministic_algorithms_enabled()
    sums, totals = gram, gram if total is None else total
    if not atomic:
        sums = torch.empty(grid[1], units, units, dtype=torch.float64, device=rows.device)
        totals = torch.empty(grid[1], units, dtype=torch.float64, device=rows.device)
    _gram_fwd_kernel[grid](
        rows, sums, totals, rows.shape[1], units, split_rows, rows.stride(0), rows.stride(1),
        0 if atomic else sums.stride(0), sums.stride(-2), 0 if atomic else totals.stride(0),
        ATOMIC=atomic, TOTAL=total is not None, PRECISION=input_precision(), CHAIN=CHAIN_ROWS, **config.launch,
    )  # fmt: skip
    if not atomic:
        fold_partials(sums, gram)
        if total is not None:
            fold_partials(totals[:, None], total[None])


def fold_partials(parts: Tensor, into: Tensor) -> None:
    """Add ``parts [S, h, h]`` to ``into [h, h]``, upper triangle, in the order of S; one row: all of it."""
    units, config = parts.shape[2], AGOP["fold"]["all"]
    _fold_kernel[(triton.cdiv(units, config.blocks["BLOCK"]), parts.shape[1])](
        parts, into, parts.shape[0], units, parts.stride(0), parts.stride(1), into.stride(0),
        UPPER=parts.shape[1] > 1, **config.launch,
    )  # fmt: skip


def relu_coactivation_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, nonfinite: Tensor, chunk_rows: int = 0
) -> None:
    """Add the co-activation counts of ``z = x Wᵀ + b`` to the upper triangle of ``counts``: two launches a chunk."""
    for part in _chunks(x, weight, 1, chunk_rows):
        coactivation_fwd(hidden_fwd(part, weight, bias, nonfinite, None), counts)


def derivative_gram_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, alpha: float, beta: float,
    gram: Tensor, total: Tensor, nonfinite: Tensor, chunk_rows: int = 0,
) -> None:  # fmt: skip
    """Add ``Σ_n a_i a_j`` and ``Σ_n a_i``, ``a = s'(x Wᵀ + b)``, to ``gram`` and ``total``: two launches a chunk."""
    for part in _chunks(x, weight, 4, chunk_rows):
        gram_fwd(hidden_fwd(part, weight, bias, nonfinite, activation, alpha, beta), gram, total)


def syrk_update(rows: Tensor, gram: Tensor) -> None:
    """Add ``rowsᵀ rows`` to the upper triangle of ``gram``: ``[R, h]`` into float64 ``[h, h]``."""
    gram_fwd(rows.t(), gram)


def _chunks(x: Tensor, weight: Tensor, item_size: int, chunk_rows: int) -> Sequence[Tensor]:
    rows = chunk_rows or max(1024, _CHUNK_BYTES // (item_size * max(1, weight.shape[0])))
    return x.split(rows) if x.numel() or (x.shape[0] and weight.shape[0]) else ()


def _split_grid(tiles: int, rows: int, multiple: int) -> tuple[tuple[int, int], int]:
    """The grid (tiles, splits) and the rows of a split, a multiple of ``multiple``."""
    parts = splits(tiles, rows, multiple)
    size = -(-rows // (parts * multiple)) * multiple
    return (tiles, -(-rows // size)), size
