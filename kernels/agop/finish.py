"""``G = Wᵀ S W`` from co-activation counts or a Gram matrix, in two launches: ``P = U W`` with U half of S, then ``Wᵀ P + Pᵀ W``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import PROGRAMS, Tile, cdiv, input_precision, launch
from .coactivation import upper_tile

__all__ = ["agop_finalise"]

# small tiles where larger ones would leave most of the machine idle
SMALL = Tile({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2)
LARGE = {
    "tf32x3": Tile({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 8, 2),
    "tf32": Tile({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 3),
}
OUTER_ROWS = 128  # more rows of W₂ are multiplied once and not for every tile
DEPTH = tl.constexpr(16)  # rows of W₂ at a time


@triton.jit
def _half_product_kernel(
    inner_ptr, outer_ptr, w_ptr, p_ptr, H, D, C, stride_ih, stride_oc, stride_oh, stride_wh, stride_wd,
    OUTER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``p = U W``, fp32 ``[H, D]``: ``U_ij = inner_ij outer_ij`` for ``j > i``, half of it for ``j = i``, 0 below.

    In: ``inner [H, H]`` int64 or float64; ``w [H, D]``. OUTER: ``"rows"``: ``outer [C, H]``, whose ``outerᵀ outer`` is
    formed here; ``"gram"``: that itself, ``[H, H]``; ``""``: ones. Accumulates in fp32 along the units.
    """
    tiles = tl.cdiv(D, BLOCK_N)
    first = tl.program_id(0) // tiles * BLOCK_M
    i = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    d = (tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for j0 in tl.range(first, H, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K).to(tl.int64)
        above = (i[:, None] <= j[None, :]) & (j[None, :] < H)
        s = tl.load(inner_ptr + i[:, None] * stride_ih + j[None, :], mask=above, other=0).to(tl.float32)
        s = tl.where(i[:, None] == j[None, :], 0.5 * s, s)
        if OUTER == "rows":
            gram = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
            for c0 in tl.range(0, C, DEPTH):
                c = c0 + tl.arange(0, DEPTH).to(tl.int64)
                left = tl.load(
                    outer_ptr + c[None, :] * stride_oc + i[:, None] * stride_oh,
                    mask=(c[None, :] < C) & (i[:, None] < H), other=0.0,
                )  # [BLOCK_M, DEPTH]  # fmt: skip
                right = tl.load(
                    outer_ptr + c[:, None] * stride_oc + j[None, :] * stride_oh,
                    mask=(c[:, None] < C) & (j[None, :] < H), other=0.0,
                )  # [DEPTH, BLOCK_K]  # fmt: skip
                gram = tl.dot(left, right, gram, input_precision=PRECISION)
            s *= gram
        elif OUTER == "gram":
            s *= tl.load(outer_ptr + i[:, None] * stride_oc + j[None, :] * stride_oh, mask=above, other=0.0).to(
                tl.float32
            )
        w = tl.load(
            w_ptr + j[:, None] * stride_wh + d[None, :] * stride_wd,
            mask=(j[:, None] < H) & (d[None, :] < D), other=0.0,
        ).to(tl.float32)  # [BLOCK_K, BLOCK_N]  # fmt: skip
        acc = tl.dot(s, w, acc, input_precision=PRECISION)
    tl.store(p_ptr + i[:, None] * D + d[None, :], acc, mask=(i[:, None] < H) & (d[None, :] < D))


@triton.jit
def _load(ptr, h, d, H, D, stride_h, stride_d):
    """fp32 values of a matrix ``[H, D]``; h and d are indices that broadcast."""
    return tl.load(ptr + h * stride_h + d * stride_d, mask=(h < H) & (d < D), other=0.0).to(tl.float32)


@triton.jit
def _symmetric_product_kernel(
    p_ptr, w_ptr, g_ptr, flag_ptr, H, D, scale, stride_wh, stride_wd,
    HAS_FLAG: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``g = scale (Wᵀ P + Pᵀ W)``, ``[D, D]`` and exactly symmetric: tiles of the upper triangle, stored twice.

    In: ``p [H, D]`` fp32, contiguous; ``w [H, D]``. NaN throughout where ``flag`` (int64) is above zero. Accumulates in fp32.
    """
    a, b = upper_tile(tl.program_id(0))
    row = (a * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    column = (b * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for h0 in tl.range(0, H, BLOCK_K):
        h = h0 + tl.arange(0, BLOCK_K).to(tl.int64)
        w, p = _load(w_ptr, h[None, :], row, H, D, stride_wh, stride_wd), _load(p_ptr, h[:, None], column, H, D, D, 1)
        acc = tl.dot(w, p, acc, input_precision=PRECISION)
        p, w = _load(p_ptr, h[None, :], row, H, D, D, 1), _load(w_ptr, h[:, None], column, H, D, stride_wh, stride_wd)
        acc = tl.dot(p, w, acc, input_precision=PRECISION)
    acc *= scale
    if HAS_FLAG:
        acc = tl.where(tl.load(flag_ptr) > 0, float("nan"), acc)
    value = acc.to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + row * D + column, value, mask=(row <= column) & (column < D))
    tl.store(g_ptr + column * D + row, value, mask=(row < column) & (column < D))


def _tile(tiles: int, large: Tile) -> Tile:
    """The large tile where ``tiles`` of its size fill half of the machine."""
    return large if 2 * tiles >= PROGRAMS else SMALL


def agop_finalise(
    weight: Tensor, outer: Tensor | None, inner: Tensor, scale: float = 1.0, nonfinite: Tensor | None = None
) -> Tensor:
    """``scale Wᵀ S W``, ``[d, d]``, with ``S_ij = (outerᵀ outer)_ij inner_ij``; NaN where ``nonfinite[0]`` is above zero."""
    units, width = weight.shape
    kind = "" if outer is None else "rows"
    if outer is not None and outer.shape[0] > OUTER_ROWS:
        kind, outer = "gram", outer.t() @ outer
    given = weight if outer is None else outer
    product = torch.empty(units, width, dtype=torch.float32, device=weight.device)
    out = torch.empty(width, width, dtype=weight.dtype, device=weight.device)
    precision = input_precision()
    large = LARGE[precision] if weight.dtype == torch.float32 else SMALL
    edge = large.blocks["BLOCK_M"]
    tile = _tile(cdiv(units, edge) * cdiv(width, edge), large)
    if out.numel():
        grid = (cdiv(units, tile.blocks["BLOCK_M"]) * cdiv(width, tile.blocks["BLOCK_N"]),)
        if units:
            launch(
                _half_product_kernel, grid, weight.device,
                inner, given, weight, product, units, width, given.shape[0], inner.stride(0),
                *given.stride(), *weight.stride(), OUTER=kind, PRECISION=precision, **tile.options,
            )  # fmt: skip
        tiles = cdiv(width, edge)
        tile = _tile(tiles * (tiles + 1) // 2, large)
        tiles = cdiv(width, tile.blocks["BLOCK_M"])
        launch(
            _symmetric_product_kernel, (tiles * (tiles + 1) // 2,), weight.device,
            product, weight, out, nonfinite, units, width, scale, *weight.stride(),
            HAS_FLAG=nonfinite is not None, PRECISION=precision, **tile.options,
        )  # fmt: skip
    return out
