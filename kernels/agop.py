"""Co-activation counts on the int8 matrix units: ``counts += Aᵀ A`` with ``A = [z > 0]``, upper-triangular tiles.

Formula: ``c[i, j] += Σ_n a[n, i] a[n, j]`` for ``j >= i``, ``a`` 0 or 1. In: ``a`` int8 ``[N, h]`` with any strides.
Out: int64 ``[h, h]``, row stride ``stride_ci``, entries below the diagonal untouched. Accumulates in int32 inside a
launch (at most ``MAX_ROWS`` samples, so it cannot overflow) and in int64 across launches. Nothing is saved, nothing is
recomputed. Deterministic: one program owns one tile, and integers do not depend on the order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MAX_ROWS", "coactivation_fwd", "relu_coactivation_update", "usable"]

MAX_ROWS = 1 << 20  # samples of one launch
_CHUNK_BYTES = 256 << 20  # pre-activations that live at a time
_BLOCK_H = 64
_BLOCK_N = 128


@triton.jit
def _coactivation_fwd_kernel(
    a_ptr, c_ptr, N, H, stride_an, stride_ah, stride_ci, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    # tile t of the upper triangle, columns in order: t = j (j + 1) / 2 + i with i <= j
    t = tl.program_id(0)
    j = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)  # the square root is rounded
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)
    i = t - j * (j + 1) // 2
    rows = (i * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    cols = (j * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    samples = tl.arange(0, BLOCK_N).to(tl.int64)
    acc = tl.zeros((BLOCK_H, BLOCK_H), dtype=tl.int32)
    for n0 in tl.range(0, N, BLOCK_N):
        n = n0 + samples
        left = tl.load(
            a_ptr + n[None, :] * stride_an + rows[:, None] * stride_ah,
            mask=(n[None, :] < N) & (rows[:, None] < H),
            other=0,
        )  # [BLOCK_H, BLOCK_N]
        right = tl.load(
            a_ptr + n[:, None] * stride_an + cols[None, :] * stride_ah,
            mask=(n[:, None] < N) & (cols[None, :] < H),
            other=0,
        )  # [BLOCK_N, BLOCK_H]
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
    keep = (rows[:, None] <= cols[None, :]) & (cols[None, :] < H)
    out = c_ptr + rows[:, None] * stride_ci + cols[None, :]
    tl.store(out, tl.load(out, mask=keep, other=0) + acc.to(tl.int64), mask=keep)


def usable(tensors: Sequence[Tensor]) -> str | None:
    """Say why the kernels cannot run on these tensors, None where they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    devices = {tensor.device.type for tensor in tensors}
    if interpreted:
        return None if devices <= {"cpu"} else "TRITON_INTERPRET=1 interprets kernels on CPU tensors only"
    if not torch.cuda.is_available():
        return "Triton kernels need a GPU and torch sees none (TRITON_INTERPRET=1 interprets them, for tests)"
    if not devices <= {"cuda"}:
        return f"Triton kernels need tensors on the GPU and got {', '.join(sorted(devices))}"
    return None


def coactivation_fwd(active: Tensor, counts: Tensor) -> None:
    """Add ``activeᵀ active`` to the upper triangle of ``counts``: int8 ``[N, h]`` of 0 and 1 into int64 ``[h, h]``."""
    units = active.shape[1]
    tiles = triton.cdiv(units, _BLOCK_H)
    for part in active.split(MAX_ROWS):
        if part.numel():
            _coactivation_fwd_kernel[(tiles * (tiles + 1) // 2,)](
                part, counts, part.shape[0], units, part.stride(0), part.stride(1), counts.stride(0),
                BLOCK_H=_BLOCK_H, BLOCK_N=_BLOCK_N,
            )  # fmt: skip


def relu_coactivation_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, nonfinite: Tensor, chunk_rows: int = 0
) -> None:
    """Add the co-activation counts of ``z = x Wᵀ + b`` to the upper triangle of ``counts`` without a host sync."""
    rows = chunk_rows or max(1024, _CHUNK_BYTES // max(1, x.element_size() * weight.shape[0]))
    for part in x.split(rows):
        z = torch.nn.functional.linear(part, weight, bias)  # [n, h]
        nonfinite += ~torch.isfinite(z).all()
        coactivation_fwd((z > 0).view(torch.int8), counts)
