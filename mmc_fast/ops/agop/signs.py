"""Whether units are active: ``[w·x + b > 0]`` for the exact real number of the given floats, which no rounding can change.

Each step leaves less to the next: a product with a bound of its error that holds for every order of summation; samples and
units of zeros; integers, since every float is an integer multiple of the smallest one.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import mul

import torch
from torch import Tensor

from .. import native

NOT_FINITE = 2
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
# Added to a norm: what is lost where numbers underflow, also where subnormal ones count as zero. Below the second number
# nothing overflows.
_RANGE = {torch.float32: (2.0**-62, 2.0**126), torch.float64: (2.0**-480, 2.0**1022)}


def active(x: Tensor, weight: Tensor, bias: Tensor | None, nonfinite: Tensor) -> Tensor:
    """``[n, h]``, True where the exact pre-activation of ``x Wᵀ + b`` is above zero; ``nonfinite`` grows where one is not finite.

    ``x [n, d]``, ``weight [h, d]`` and ``bias [h]`` (or None) have one floating dtype; 16-bit numbers are taken as float32.
    A pre-activation is not finite where it depends on a NaN or infinity or rounds to infinity in the dtype; it is not active.
    The product is float64 whatever the dtype, with ``|z − exact| <= γ (‖x‖ ‖w‖ + |b|)``, ``γ ≈ (d + 5) 2⁻⁵³``.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, weight = x.to(dtype), weight.to(dtype)
    bias = weight.new_zeros(len(weight)) if bias is None else bias.to(dtype)
    z = torch.addmm(bias.double(), x.double(), weight.double().t())
    loss, safe = _RANGE[dtype]
    row_norm = x.double().norm(dim=1)[:, None] + loss
    size = torch.addcmul(bias.double().abs(), row_norm, weight.double().norm(dim=1) + loss)  # [n, h]
    terms = x.shape[1] + 5
    known = (z.abs() > terms * (2.0**-53 * 1.001 * size + loss**2)) & (size < safe)
    result = (z > 0) & known
    # samples or units of zeros: the bias alone
    alone = _is_zero(x)[:, None] & torch.isfinite(weight).all(1)
    alone |= torch.isfinite(x).all(1)[:, None] & _is_zero(weight)
    alone &= torch.isfinite(bias) & ~known
    result |= alone & (bias.view(_INTEGERS[dtype]) > 0)
    rows, units = (~(known | alone)).nonzero(as_tuple=True)
    if len(rows):
        signs = exact_signs(x, weight, bias, rows, units)
        result[rows, units] = signs == 1
        nonfinite += (signs == NOT_FINITE).any()
    return result


def exact_signs(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, units: Tensor) -> Tensor:
    """The signs of ``x[rows[k]] · weight[units[k]] + bias[units[k]]``, int8 ``[k]``: −1, 0, 1, or 2 where it is not finite."""
    if native.unavailable_reason() is None:
        signs: Tensor = torch.ops.mmc_fast.exact_signs(x.cpu(), weight.cpu(), bias.cpu(), rows.cpu(), units.cpu())
    else:
        signs = signs_by_integers(x, weight, bias, rows, units)
    return signs.to(x.device)


def signs_by_integers(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, units: Tensor) -> Tensor:
    """As :func:`exact_signs`, in Python's integers."""
    to_integer, smallest, infinity = _integers(x.dtype)
    samples = {n: list(map(to_integer, _bits(x[n]))) for n in rows.unique().tolist()}
    layer = {j: list(map(to_integer, _bits(weight[j]))) for j in units.unique().tolist()}
    biases = list(map(to_integer, _bits(bias)))

    def sign(n: int, j: int) -> int:
        numbers = (*samples[n], *layer[j], biases[j])
        if None in numbers:
            return NOT_FINITE
        total = sum(map(mul, samples[n], layer[j])) + (biases[j] << smallest)  # type: ignore[arg-type, operator]
        return NOT_FINITE if abs(total) >= infinity else (total > 0) - (total < 0)

    pairs = zip(rows.tolist(), units.tolist(), strict=True)
    return torch.tensor([sign(n, j) for n, j in pairs], dtype=torch.int8)


def _is_zero(values: Tensor) -> Tensor:
    """Whether each row holds zeros alone; from the bits, since subnormal numbers may compare equal to zero."""
    return ~values.contiguous().abs().view(_INTEGERS[values.dtype]).any(1)


def _bits(values: Tensor) -> list[int]:
    integers: list[int] = values.contiguous().view(_INTEGERS[values.dtype]).tolist()
    return integers


def _integers(dtype: torch.dtype) -> tuple[Callable[[int], int | None], int, int]:
    """From bits to multiples of the smallest number ``2^-s`` (None for NaN and infinities); s; where sums round to infinity."""
    bits, mantissa = (64, 52) if dtype == torch.float64 else (32, 23)
    top = (1 << (bits - 1 - mantissa)) - 1

    def to_integer(value: int) -> int | None:
        exponent, fraction = (value >> mantissa) & top, value & ((1 << mantissa) - 1)
        if exponent == top:
            return None
        size = (fraction | 1 << mantissa) << (exponent - 1) if exponent else fraction
        return -size if value < 0 else size

    smallest = mantissa + (top >> 1) - 1  # 149, 1074
    infinity = ((1 << (mantissa + 2)) - 1) << (top - 3 + smallest)  # half a unit above the largest number
    return to_integer, smallest, infinity
