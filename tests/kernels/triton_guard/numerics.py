"""Arithmetic of the interpreter as a GPU does it: bfloat16, TF32, the depth of a dot, NaN in ``maximum``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from triton_guard.memory import GuardFault

__all__ = ["dot_flops", "install"]

Handle = Any
_SHALLOWEST = {8: 32, 16: 16, 32: 16, 64: 16}  # bits of an operand: smallest depth of tl.dot on CUDA, Triton 3.7.1
dot_flops: Counter[str] = Counter()  # of the launch that runs, by kind of operand


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Float32 values of bfloat16 bit patterns."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of the nearest bfloat16, ties to even; NaN stays NaN."""
    wide = np.ascontiguousarray(values, dtype=np.float32)
    bits = wide.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """Float32 values with 10 bits of mantissa: nearest, ties away from zero, as ``cvt.rna.tf32`` does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _cut_to_tf32(values: np.ndarray) -> np.ndarray:
    """Float32 values without the 13 bits at which a TF32 unit does not look."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    return TensorHandle(from_bf16(handle.data), tl.float32) if _is_bf16(handle) else handle


def _in_float32(method: Callable[..., Handle]) -> Callable[..., Handle]:
    """Carry an operation on bfloat16 out in float32 and round its result; others pass through."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Handle:
        if np.where in args or not any(_is_bf16(a) for a in args):  # a selection moves bits
            return method(self, *args, **kwargs)
        result = method(self, *[_widened(a) for a in args], **kwargs)
        if result.data.dtype == np.bool_:
            return result
        return TensorHandle(to_bf16(result.data), tl.bfloat16)

    return wrapped


def _cast(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def cast(self: Any, source: Handle, target: Any) -> Handle:
        if source.dtype.scalar == target.scalar:
            return source
        if target.scalar == tl.bfloat16:
            return TensorHandle(to_bf16(source.data), tl.bfloat16)
        if _is_bf16(source):
            wide = _widened(source)
            return wide if target.scalar == tl.float32 else original(self, wide, target)
        return original(self, source, target)

    return cast


def _fp_to_fp(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def convert(self: Any, source: Handle, target: Any, rounding: Any) -> Handle:
        if "8" in source.dtype.scalar.name or "8" in target.scalar.name:
            return original(self, source, target, rounding)
        if rounding not in (None, ir.ROUNDING_MODE.RTNE):
            raise GuardFault(f"the interpreter cannot round {source.dtype} to {target} other than to nearest even")
        return self.cast_impl(source, target)

    return convert


def _dot(self: Any, a: Handle, b: Handle, d: Handle, precision: Any, imprecise: Any) -> Handle:
    scalar = a.dtype.scalar
    depth = _SHALLOWEST[scalar.primitive_bitwidth]
    if a.data.shape[-1] < depth:
        raise GuardFault(f"tl.dot of {scalar} with depth {a.data.shape[-1]}: CUDA needs at least {depth}")
    if scalar != b.dtype.scalar:
        raise GuardFault(f"tl.dot of {scalar} and {b.dtype.scalar}: operands must have one type")
    x, y, kind = a.data, b.data, str(scalar)
    if scalar == tl.bfloat16:
        x, y = from_bf16(x), from_bf16(y)
    elif scalar == tl.float16:
        x, y = x.astype(np.float32), y.astype(np.float32)
    elif scalar in (tl.int8, tl.uint8):
        x, y = x.astype(np.float64), y.astype(np.float64)  # exact below 2^53, and BLAS is quick
    elif scalar == tl.float32:
        kind += ":" + str(precision).rsplit(".", 1)[-1].lower()
    elif scalar != tl.float64:
        raise GuardFault(f"tl.dot of {scalar} is not checked here")
    dot_flops[kind] += 2 * a.data.size * b.data.shape[-1]
    if kind == "fp32:tf32x3":
        x_high, y_high = to_tf32(x), to_tf32(y)
        small = _cut_to_tf32(x - x_high) @ y_high + x_high @ _cut_to_tf32(y - y_high)
        product = (
            np.where(np.isnan(small), np.float32(0), small) + x_high @ y_high
        )  # an infinity leaves NaN as its rest
    elif kind == "fp32:tf32":
        product = to_tf32(x) @ to_tf32(y)
    else:
        product = x @ y
    return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _clamp(self: Any, value: Handle, low: Handle, high: Handle, propagate: Any) -> Handle:
    least, most = (np.maximum, np.minimum) if propagate == ir.PROPAGATE_NAN.ALL else (np.fmax, np.fmin)
    return self.binary_op(self.binary_op(value, low, least), high, most)


def _reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, inputs: Any) -> Any:
        if any(t.dtype == tl.bfloat16 for t in inputs):
            raise GuardFault("a reduction or scan of bfloat16 values: cast to float32 first")
        return original(self, inputs)

    return apply


def _bf16_constant(self: Any, value: float) -> Handle:
    return TensorHandle(to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)


def install() -> None:
    """Replace the operations that the interpreter gets wrong, in this process."""
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    replaced: dict[str, Any] = {
        "cast_impl": _cast(InterpreterBuilder.cast_impl),
        "create_fp_to_fp": _fp_to_fp(InterpreterBuilder.create_fp_to_fp),
        "create_dot": _dot,
        "create_clampf": _clamp,
        "get_bf16": _bf16_constant,
        # PTX max and min return the operand that is a number
        "create_maxnumf": lambda self, a, b: self.binary_op(a, b, np.fmax),
        "create_minnumf": lambda self, a, b: self.binary_op(a, b, np.fmin),
    }
    for name, method in replaced.items():
        setattr(InterpreterBuilder, name, method)
    ReduceOps.apply_impl = _reduce(ReduceOps.apply_impl)
