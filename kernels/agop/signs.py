"""Signs of exact pre-activations: the bound of a product's error, and the entries that it leaves open.

Those are decided on the device, in float64 with a bound of its own and at last in integers: a float32 number is an integer
multiple of 2⁻¹⁴⁹, so a sum of products is an integer in units of 2⁻²⁹⁸, here 21 digits of 32 bits.
"""

from __future__ import annotations

from math import sqrt

import triton
import triton.language as tl
from torch import Tensor

from ..common import Tile, launch

__all__ = ["certificate", "decide_fwd"]

DECIDE = Tile({"BLOCK_N": 512, "BLOCK_K": 64}, 4, 1, 96)

_DIGITS = tl.constexpr(21)
_PADDED_DIGITS = tl.constexpr(32)
_DIGIT = tl.constexpr(0xFFFFFFFF)
_BIAS = tl.constexpr(149)  # exponent of 1 in units of 2^-298 less that of a product of two integers
# (2^25 - 1) 2^103, half a unit above the largest number: digits 12 and 13
_LIMIT_LOW = tl.constexpr((((1 << 25) - 1) << 17) & 0xFFFFFFFF)
_LIMIT_HIGH = tl.constexpr(((1 << 25) - 1) << 17 >> 32)
_SMALLEST = 2.0**-126


def certificate(depth: int, block: int) -> tuple[float, float, float, float, float]:
    """Constants (gamma, loss, least) of the bound of ``|z − exact|``, and (growth, least norm) of that of a norm.

    ``|z − exact| <= ‖x‖ (gamma ‖w‖ + loss) + gamma |b| + loss ‖w‖ + least``; a computed norm times growth plus the least
    one is an upper bound. Matrix units add ``block`` products at a time and truncate each relative to the largest of them:
    ``2⁻²²`` of ``|x|·|w|`` for each term, ``1 + 2⁻⁵`` times for the small products of halves and for ``|z|``; blocks are added
    with an error of ``2⁻²⁴`` of the sum. Products of bfloat16 halves leave out ``3 · 2⁻¹⁸`` of ``|x|·|w|``, here ``2⁻¹⁶``.
    """
    blocks = -(-depth // max(1, block))
    gamma = ((block + 1) * 2.0**-22 + (blocks + 1) * 2.0**-24) * (1 + 2.0**-5) + 2.0**-16
    if gamma > 0.25:
        gamma = float("inf")
    loss, least = 2 * sqrt(depth) * _SMALLEST, (4 * depth + 12) * _SMALLEST
    return gamma, loss, least, 1 + (depth + 8) * 2.0**-23, sqrt(depth) * 2.0**-62


@triton.jit
def _integer(value):
    """``value = mantissa 2^exponent 2⁻¹⁴⁹``: signed int64 and int32, for fp32."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 255
    fraction = (bits & 0x7FFFFF) | tl.where(exponent > 0, 0x800000, 0)
    return tl.where(bits < 0, -fraction, fraction).to(tl.int64), tl.maximum(exponent, 1) - 1


@triton.jit
def _digits(mantissa, exponent):
    """The digits, to the base 2³², of ``Σ mantissa 2^exponent`` before carries: ``[BLOCK_K]`` into ``[_PADDED_DIGITS]``."""
    shift = exponent[None, :] - 32 * tl.arange(0, _PADDED_DIGITS)[:, None]
    size = tl.abs(mantissa)[None, :]
    left = size << tl.maximum(tl.minimum(shift, 31), 0).to(tl.int64)
    right = size >> tl.maximum(tl.minimum(-shift, 63), 0).to(tl.int64)
    part = tl.where(shift >= 32, 0, tl.where(shift >= 0, left, right)) & _DIGIT
    return tl.sum(tl.where(mantissa[None, :] < 0, -part, part), axis=1)


@triton.jit
def _carried(digits):
    """The carry out of all digits, and the or of what stays in each."""
    index = tl.arange(0, _PADDED_DIGITS)
    carry = tl.cast(0, tl.int64)
    some = tl.cast(0, tl.int64)
    for digit in tl.range(0, _DIGITS):
        value = tl.sum(tl.where(index == digit, digits, 0), axis=0) + carry
        some |= value & _DIGIT
        carry = value >> 32
    return carry, some


@triton.jit
def _decide_kernel(
    x_ptr, w_ptr, bias_ptr, sign_ptr, flag_ptr, N, D, stride_xn, stride_xd, stride_wh, stride_wd, stride_sh,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Replace what is 2 in ``sign [H, N]`` (int8) by ``[w_h · x_n + b_h > 0]`` of the exact number.

    In: as the launch that wrote the signs. ``flag`` int64 ``[1]`` grows by the number of pre-activations that depend on a NaN
    or infinity or round to infinity in fp32. float64 sums are not flushed and products of fp32 numbers exact in them.
    """
    j = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    code = tl.load(sign_ptr + j * stride_sh + n, mask=n < N, other=0)
    tl.debug_barrier()  # all are read before one is replaced
    pending = tl.where(code == 2, n, N)
    first = tl.min(pending, axis=0)
    lanes = tl.arange(0, BLOCK_K).to(tl.int64)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + j).to(tl.float32)
    bad = 0
    while first < N:
        x_row = x_ptr + first.to(tl.int64) * stride_xn
        w_row = w_ptr + j * stride_wh
        total = tl.zeros((BLOCK_K,), dtype=tl.float64)
        size = tl.zeros((BLOCK_K,), dtype=tl.float64)
        for k0 in tl.range(0, D, BLOCK_K):
            k = k0 + lanes
            x = tl.load(x_row + k * stride_xd, mask=k < D, other=0.0).to(tl.float32).to(tl.float64)
            w = tl.load(w_row + k * stride_wd, mask=k < D, other=0.0).to(tl.float32).to(tl.float64)
            total += x * w
            size += tl.abs(x * w)
        own = tl.cast(bias, tl.float64)
        products = tl.sum(size, axis=0)
        z = tl.sum(total, axis=0) + own
        most = products + tl.abs(own)
        bound = most * (D + 20) * 2.220446049250313e-16
        positive = (z > 0.0).to(tl.int32)
        if most - most != 0.0:
            bad += 1
            positive = 0
        elif (products > 0.0) & ((tl.abs(z) <= bound) | (most >= 8.5e37)):
            own_mantissa, own_exponent = _integer(tl.where(lanes == 0, bias, 0.0))
            digits = _digits(own_mantissa, own_exponent + _BIAS)
            for k0 in tl.range(0, D, BLOCK_K):
                k = k0 + lanes
                x_mantissa, x_exponent = _integer(tl.load(x_row + k * stride_xd, mask=k < D, other=0.0))
                w_mantissa, w_exponent = _integer(tl.load(w_row + k * stride_wd, mask=k < D, other=0.0))
                digits += _digits(x_mantissa * w_mantissa, x_exponent + w_exponent)
            carry, some = _carried(digits)
            positive = ((carry > 0) | ((carry == 0) & (some != 0))).to(tl.int32)
            if most >= 8.5e37:
                index = tl.arange(0, _PADDED_DIGITS)
                limit = tl.cast(index == 12, tl.int64) * _LIMIT_LOW + tl.cast(index == 13, tl.int64) * _LIMIT_HIGH
                above, _ = _carried(tl.where(positive != 0, digits - limit, -limit - digits))
                if above >= 0:
                    bad += 1
                    positive = 0
        tl.store(sign_ptr + j * stride_sh + first, positive.to(tl.int8))
        pending = tl.where(n == first, N, pending)
        first = tl.min(pending, axis=0)
    tl.atomic_add(flag_ptr, tl.cast(bad, tl.int64), mask=bad > 0, sem="relaxed")


def decide_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, signs: Tensor, nonfinite: Tensor) -> None:
    """Replace what is 2 in ``signs`` (int8 ``[h, N]``) by whether the exact pre-activation of ``x Wᵀ + b`` is above zero."""
    units, samples = signs.shape
    grid = (triton.cdiv(samples, DECIDE.blocks["BLOCK_N"]), units)
    launch(
        _decide_kernel, grid, x.device,
        x, weight, weight if bias is None else bias.contiguous(), signs, nonfinite, samples, x.shape[1],
        x.stride(0), x.stride(1), weight.stride(0), weight.stride(1), signs.stride(0),
        HAS_BIAS=bias is not None, **DECIDE.options,
    )  # fmt: skip
