"""What forward and backward of the narrow EBR kernels compute alike: hidden units of a head, and the discriminator.

Tiles of a program's rows, in registers; products accumulate in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ebr_tiles import any_row, cross_entropy, load_bias, load_weight, load_weight_t, relu

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
def decoder_hidden(u, w1, b1, h, H, some, K: tl.constexpr, KP: tl.constexpr, PREC: tl.constexpr):
    """float32 ``[BM, BH]``: ``relu(u W₃ᵀ + b₃)`` at hidden units h."""
    z = tl.dot(u, load_weight_t(w1, h, H, tl.arange(0, KP), K, some), input_precision=PREC)
    return relu(z + load_bias(b1, h, H)[None, :])


@triton.jit
def _psi_layer(
    a, w, b, some, IN: tl.constexpr, OUT: tl.constexpr, INP: tl.constexpr, OUTP: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    o = tl.arange(0, OUTP)
    z = tl.dot(a, load_weight_t(w, o, OUT, tl.arange(0, INP), IN, some), input_precision=PREC)
    return z + load_bias(b, o, OUT)[None, :]


@triton.jit
def _psi_back(
    d, a, w, some, IN: tl.constexpr, OUT: tl.constexpr, INP: tl.constexpr, OUTP: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """Gradient of the pre-activation below a layer: ``d W`` where the activation ``a`` is positive."""
    below = tl.dot(d, load_weight(w, tl.arange(0, OUTP), OUT, tl.arange(0, INP), IN, some), input_precision=PREC)
    return tl.where(a > 0, below, 0.0).to(a.dtype)


@triton.jit
def psi_logits(g, psi, some, DIMS: tl.constexpr, PADS: tl.constexpr, HIDDEN: tl.constexpr, PREC: tl.constexpr):
    """Activations of the hidden layer, g itself where there is none, and the logits."""
    a = g
    if HIDDEN:
        a = relu(_psi_layer(g, psi[0], psi[1], some, DIMS[0], DIMS[1], PADS[0], PADS[1], PREC)).to(g.dtype)
    logits = _psi_layer(
        a, psi[2 * HIDDEN], psi[2 * HIDDEN + 1], some,
        DIMS[HIDDEN], DIMS[HIDDEN + 1], PADS[HIDDEN], PADS[HIDDEN + 1], PREC,
    )  # fmt: skip
    return a, logits


@triton.jit
def psi_grads(
    g, psi, keep, i, M: tl.constexpr, DIMS: tl.constexpr, PADS: tl.constexpr, HIDDEN: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """For the summed cross entropy: input of the last layer, gradients of the outputs of the first and the last layer."""
    some = any_row(keep)
    a, logits = psi_logits(g, psi, some, DIMS, PADS, HIDDEN, PREC)
    _, d = cross_entropy(logits, i, M, PADS[HIDDEN + 1])
    d_last = tl.where(keep[:, None], d, 0.0).to(g.dtype)
    d_first = d_last
    if HIDDEN:
        d_first = _psi_back(d_last, a, psi[2], some, DIMS[1], DIMS[2], PADS[1], PADS[2], PREC)
    return a, d_first, d_last
