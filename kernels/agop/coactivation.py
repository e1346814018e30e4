"""AGOP of one hidden layer: its signs or derivatives in one launch, and exact co-activation counts of the signs.

A sign is that of the exact real pre-activation. Where the product of the launch is not far enough from zero for that it stores
UNSURE, which ``signs.py`` decides.

Every matrix that a co-activation or Gram kernel reads lies with the samples contiguous (``[h, N]``), the layout that int8
and TF32 matrix units take without a transposition.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import common
from ..common import Tile, input_precision, launch, product_kind, splits
from .signs import certificate, decide_fwd

__all__ = [
    "MAX_ROWS",
    "chunks",
    "coactivation_fwd",
    "hidden_fwd",
    "relu_coactivation_update",
    "split_grid",
    "upper_tile",
]

HIDDEN = {  # kind of product (common.product_kind), or signs of float32 and of 16 bits -> tile
    "tf32x3": Tile({"BLOCK_H": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2),
    "tf32": Tile({"BLOCK_H": 128, "BLOCK_N": 128, "BLOCK_K": 32}, 8, 3),
    "signs": Tile({"BLOCK_H": 128, "BLOCK_N": 128, "BLOCK_K": 16}, 8, 4),
    "half signs": Tile({"BLOCK_H": 128, "BLOCK_N": 128, "BLOCK_K": 32}, 8, 4),
    "half": Tile({"BLOCK_H": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 3),
}
UNSURE = tl.constexpr(2)
COACTIVATION = Tile({"BLOCK_H": 128, "BLOCK_N": 128}, 8, 3)

MAX_ROWS = 1 << 20  # samples of one co-activation launch: int32 sums cannot overflow
CHUNK_BYTES = 32 << 20  # of a mask or derivative between two launches: it stays in the second-level cache


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
def _bounded(squares, growth, least):
    """An upper bound of a norm from the sum of its squares; infinite from 2⁶² on and for NaN."""
    norm = tl.sqrt(squares) * growth + least
    return tl.where(norm < 4611686018427387904.0, norm, float("inf"))


@triton.jit
def _hidden_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, flag_ptr, N, D, H,
    stride_xn, stride_xd, stride_wh, stride_wd, stride_oh, alpha, beta, gamma, loss, least, growth, least_norm,
    ACTIVATION: tl.constexpr, SIGNS: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[j, n] = [z_nj > 0]`` or UNSURE (SIGNS, int8) or ``s'(z_nj)`` (float32), ``z = x Wᵀ + b``; counts non-finite z.

    In: ``x [N, D]``, ``w [H, D]`` with any strides, one of fp32, bf16, fp16; ``bias [H]``. Out: ``[H, N]`` with rows
    ``stride_oh`` apart; ``flag`` int64 ``[1]`` grows where a z is not finite (by how much is not deterministic; not with
    SIGNS, for which it is UNSURE). Accumulates in fp32 along D; with SIGNS the squares of the rows of x and w too, whose
    norms, made larger by ``growth`` and ``least_norm``, are upper bounds and scale that of the error. SPLIT: products of
    the upper and lower halves of fp32 operands in bf16, without that of the lower halves.
    """
    tiles_h = tl.cdiv(H, BLOCK_H)
    program = tl.program_id(0)  # tiles of one group of samples are neighbours: x is read from memory once
    h = ((program % tiles_h) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    n = (program // tiles_h).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    z = tl.zeros((BLOCK_H, BLOCK_N), dtype=tl.float32)
    if SIGNS:
        w_squares = tl.zeros((BLOCK_H, BLOCK_K), dtype=tl.float32)
        x_squares = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
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
        if SPLIT:
            w_high, x_high = w.to(tl.bfloat16), x.to(tl.bfloat16)
            w_low, x_low = (w - w_high.to(tl.float32)).to(tl.bfloat16), (x - x_high.to(tl.float32)).to(tl.bfloat16)
            part = tl.dot(w_low, x_high, input_precision="ieee")
            part = tl.dot(w_high, x_low, part, input_precision="ieee")
            z += tl.dot(
                w_high, x_high, part, input_precision="ieee"
            )  # an addition of its own: it rounds where matrix units truncate
        else:
            z = tl.dot(w, x, z, input_precision=PRECISION)
        if SIGNS:
            w_squares += w.to(tl.float32) * w.to(tl.float32)
            x_squares += x.to(tl.float32) * x.to(tl.float32)
    bias = tl.zeros((BLOCK_H,), dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        z += bias[:, None]
    keep = (h[:, None] < H) & (n[None, :] < N)
    out = out_ptr + h[:, None] * stride_oh + n[None, :]
    if SIGNS:
        norm = _bounded(tl.sum(w_squares, axis=1), growth, least_norm)
        x_norm = _bounded(tl.sum(x_squares, axis=0), growth, least_norm)
        size = tl.abs(bias)
        large = (norm == float("inf")) | (size >= 2e37)  # a sum may overflow
        scale = tl.where(large, float("inf"), gamma * norm + loss)
        offset = tl.where(large, float("inf"), gamma * size + loss * norm + least)
        bound = scale[:, None] * x_norm[None, :] + offset[:, None]
        sign = tl.where(z > bound, 1, tl.where(z < -bound, 0, UNSURE))
        tl.store(out, sign.to(tl.int8), mask=keep)
    else:
        bad = tl.sum(tl.where(keep & (z - z != 0.0), 1, 0))
        tl.atomic_add(flag_ptr, bad.to(tl.int64), mask=bad > 0, sem="relaxed")
        tl.store(out, _derivative(z, alpha, beta, ACTIVATION), mask=keep)


@triton.jit
def _signs(a_ptr, h, n, H, end, stride_ah, stride_an):
    """``[BLOCK_H, BLOCK_N]`` of ``a [H, N]``, zeros outside."""
    inside = (h[:, None] < H) & (n[None, :] < end)
    return tl.load(a_ptr + h[:, None] * stride_ah + n[None, :] * stride_an, mask=inside, other=0)


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
    if i == j:  # both operands are one tile
        for n0 in tl.range(begin, end, BLOCK_N):
            own = _signs(a_ptr, rows, n0 + samples, H, end, stride_ah, stride_an)
            acc = tl.dot(own, tl.trans(own), acc, out_dtype=tl.int32)
    else:
        for n0 in tl.range(begin, end, BLOCK_N):
            left = _signs(a_ptr, rows, n0 + samples, H, end, stride_ah, stride_an)
            right = _signs(a_ptr, cols, n0 + samples, H, end, stride_ah, stride_an)
            acc = tl.dot(left, tl.trans(right), acc, out_dtype=tl.int32)
    keep = (rows[:, None] <= cols[None, :]) & (cols[None, :] < H)
    tl.atomic_add(c_ptr + rows[:, None] * stride_ci + cols[None, :], acc.to(tl.int64), mask=keep, sem="relaxed")


def hidden_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, nonfinite: Tensor,
    activation: str | None, alpha: float = 0.0, beta: float = 20.0,
) -> Tensor:  # fmt: skip
    """Signs (``activation=None``, int8) or derivatives (float32) of ``z = x Wᵀ + b``: ``[N, d] -> [h, N]``.

    Signs of float32 come from three products of bfloat16 halves, whatever precision products may have: their bound says
    which are left open.
    """
    samples, units = x.shape[0], weight.shape[0]
    out = torch.empty(units, -(-samples // 16) * 16, dtype=torch.float32 if activation else torch.int8, device=x.device)
    signs, split = activation is None, activation is None and x.dtype == torch.float32
    tile = HIDDEN["signs" if split else "half signs" if signs else product_kind(x.dtype)]
    constants = certificate(x.shape[1], tile.blocks["BLOCK_K"] if split else x.shape[1])
    grid = (triton.cdiv(samples, tile.blocks["BLOCK_N"]) * triton.cdiv(units, tile.blocks["BLOCK_H"]),)
    launch(
        _hidden_fwd_kernel, grid, x.device,
        x, weight, weight if bias is None else bias.contiguous(), out, nonfinite, samples, x.shape[1], units,
        x.stride(0), x.stride(1), weight.stride(0), weight.stride(1), out.stride(0), alpha, beta, *constants,
        ACTIVATION=activation, SIGNS=signs, SPLIT=split and common.BFLOAT16_PRODUCTS,
        HAS_BIAS=bias is not None, PRECISION="ieee" if split else input_precision(x.dtype),
        **tile.options,
    )  # fmt: skip
    return out[:, :samples]


def coactivation_fwd(active: Tensor, counts: Tensor) -> None:
    """Add ``active activeᵀ`` to the upper triangle of ``counts``: int8 ``[h, N]`` of 0 and 1 into int64 ``[h, h]``."""
    units, tile = active.shape[0], COACTIVATION
    for part in active.split(MAX_ROWS, dim=1):
        if part.numel():
            grid, rows = split_grid(units, tile, part.shape[1], tile.blocks["BLOCK_N"])
            launch(
                _coactivation_fwd_kernel, grid, counts.device,
                part, counts, part.shape[1], units, rows, part.stride(0), part.stride(1), counts.stride(0),
                **tile.options,
            )  # fmt: skip


def relu_coactivation_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, nonfinite: Tensor, chunk_rows: int = 0
) -> None:
    """Add the co-activation counts of ``z = x Wᵀ + b`` to the upper triangle of ``counts``: three launches a chunk."""
    for part in chunks(x, weight, 1, chunk_rows):
        active = hidden_fwd(part, weight, bias, nonfinite, None)
        decide_fwd(part, weight, bias, active, nonfinite)
        coactivation_fwd(active, counts)


def chunks(x: Tensor, weight: Tensor, item_size: int, chunk_rows: int) -> Iterator[Tensor]:
    """The samples in parts whose hidden units take CHUNK_BYTES; none where there is nothing to add."""
    rows = chunk_rows or max(1024, CHUNK_BYTES // (item_size * max(1, weight.shape[0])))
    yield from x.split(rows) if x.numel() or (x.shape[0] and weight.shape[0]) else ()


def split_grid(units: int, tile: Tile, rows: int, multiple: int) -> tuple[tuple[int, int], int]:
    """The grid (tiles of the upper triangle, splits of the rows) and the rows of a split, a multiple of ``multiple``."""
    tiles = triton.cdiv(units, tile.blocks["BLOCK_H"])
    tiles = tiles * (tiles + 1) // 2
    parts = splits(tiles, rows, multiple)
    size = -(-rows // (parts * multiple)) * multiple
    return (tiles, -(-rows // size)), size
