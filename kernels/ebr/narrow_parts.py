"""What forward and backward of the narrow EBR kernels compute alike: hidden units of a head, and the discriminator.

Tiles of a program's rows, in registers; products accumulate in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import any_row, cross_entropy, load_bias, load_weight_t, relu, times_weight, times_weight_t

__all__ = ["decoder_hidden", "encoder_hidden", "load_feature", "psi_grads", "psi_logits"]


@triton.jit
def load_feature(x, r, keep, d, D, stride_xb, stride_xd):
    at = r[:, None] * stride_xb + d[None, :] * stride_xd
    return tl.load(x + at, mask=keep[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def encoder_hidden(
    x, w1, b1, r, keep, h, D, H, stride_xb, stride_xd, BM: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """float32 ``[BM, BH]``: ``relu(x W₁ᵀ + b₁)`` at hidden units h."""
    z = tl.zeros((BM, BH), tl.float32)
    for d0 in tl.range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        z = tl.dot(
            load_feature(x, r, keep, d, D, stride_xb, stride_xd), load_weight_t(w1, h, H, d, D), z, input_precision=PREC
        )
    return relu(z + load_bias(b1, h, H)[None, :])


@triton.jit
def decoder_hidden(
    u, w1, b1, h, H, some, K: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, DEPTH: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """float32 ``[BM, BH]``: ``relu(u W₃ᵀ + b₃)`` at hidden units h."""
    z = times_weight_t(tl.zeros((BM, BH), tl.float32), u, w1, h, H, 0, some, K, DEPTH, PREC)
    return relu(z + load_bias(b1, h, H)[None, :])


@triton.jit
def psi_logits(
    z, psi, some, DIMS: tl.constexpr, PADS: tl.constexpr, HIDDEN: tl.constexpr, BM: tl.constexpr, DEPTH: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Activations of the hidden layer, and the logits (which are both where there is none), from ``z = g W₁ᵀ``."""
    z += load_bias(psi[1], tl.arange(0, PADS[1]), DIMS[1])[None, :]
    if HIDDEN == 0:
        return z, z
    else:
        a = relu(z).to(psi[0].dtype.element_ty)
        OUT: tl.constexpr = PADS[2]
        c = tl.arange(0, OUT)
        none = tl.zeros((BM, OUT), tl.float32)
        logits = times_weight_t(none, a, psi[2], c, DIMS[2], 0, some, DIMS[1], DEPTH, PREC)
        return a, logits + load_bias(psi[3], c, DIMS[2])[None, :]


@triton.jit
def psi_grads(
    latents, psi, keep, i, M: tl.constexpr, DIMS: tl.constexpr, PADS: tl.constexpr, HIDDEN: tl.constexpr,
    BM: tl.constexpr, DEPTH: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """For the summed cross entropy: hidden activations, gradients of the outputs of the first and the last layer.

    ``latents``: pointers to the rows, read a step of the depth at a time; whole rows in registers are registers missing.
    """
    some = any_row(keep)
    STEP: tl.constexpr = min(PADS[0], DEPTH)
    OUT: tl.constexpr = PADS[1]
    o = tl.arange(0, OUT)
    z = tl.zeros((BM, OUT), tl.float32)
    for k0 in tl.range(0, DIMS[0], STEP):
        k = k0 + tl.arange(0, STEP)
        g = tl.load(latents[:, None] + k[None, :], mask=keep[:, None] & (k < DIMS[0])[None, :], other=0.0)
        z = tl.dot(g, load_weight_t(psi[0], o, DIMS[1], k, DIMS[0], some), z, input_precision=PREC)
    a, logits = psi_logits(z, psi, some, DIMS, PADS, HIDDEN, BM, DEPTH, PREC)
    _, d = cross_entropy(logits, i, M, PADS[HIDDEN + 1])
    d_last = tl.where(keep[:, None], d, 0.0).to(psi[0].dtype.element_ty)
    d_first = d_last
    if HIDDEN:
        none = tl.zeros((BM, OUT), tl.float32)
        below = times_weight(none, d_last, psi[2], 0, DIMS[2], o, some, DIMS[1], DEPTH, PREC)
        d_first = tl.where(a > 0, below, 0.0).to(a.dtype)
    return a, d_first, d_last
