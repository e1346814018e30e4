"""AGOP primitives: schemas, fake implementations, checks and the choice of backend.

Every primitive has one contract, stated in ``reference.py``, and these backends: ``cpp`` (float32 on the CPU), ``cuda``
(co-activation alone) and ``triton`` (float32 and 16 bit on a CUDA device) and ``eager`` (any dtype and device).
Updates add to the upper triangle of an accumulator in place; nothing here records an autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmc_fast.errors import InputError

from .. import measured, native
from ..dispatch import choose, prefer, record, register
from . import cuda, reference

# the codes of csrc/core/kernel_table.h
ACTIVATIONS = {
    "identity": 0, "relu": 1, "leaky_relu": 2, "gelu": 3, "gelu_tanh": 4,
    "silu": 5, "tanh": 6, "sigmoid": 7, "elu": 8, "softplus": 9,
}  # fmt: skip

_LAYER = "Tensor x, Tensor weight, Tensor? bias"
_SCHEMAS = {
    "relu_coactivation_update": f"({_LAYER}, Tensor(a!) counts, Tensor(b!) nonfinite, int chunk_rows) -> ()",
    "derivative_gram_update": f"({_LAYER}, int activation, float alpha, float beta,"
    " Tensor(a!) gram, Tensor(b!) total, Tensor(c!) nonfinite, int chunk_rows) -> ()",
    "syrk_update": "(Tensor rows, Tensor(a!) gram) -> ()",
    "agop_finalise": "(Tensor weight, Tensor? outer, Tensor inner) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"mmc_fast::{_name}", _schema)
torch.library.define(
    "mmc_fast::exact_signs", "(Tensor x, Tensor weight, Tensor bias, Tensor rows, Tensor units) -> Tensor"
)


@torch.library.register_fake("mmc_fast::relu_coactivation_update")
@torch.library.register_fake("mmc_fast::derivative_gram_update")
@torch.library.register_fake("mmc_fast::syrk_update")
def _update_fake(*args: Any) -> None:
    return None


@torch.library.register_fake("mmc_fast::agop_finalise")
def _finalise_fake(weight: Tensor, outer: Tensor | None, inner: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[1], weight.shape[1])


@torch.library.register_fake("mmc_fast::exact_signs")
def _signs_fake(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, units: Tensor) -> Tensor:
    return rows.new_empty(len(rows), dtype=torch.int8)


def _cpp_check(*tensors: Tensor | None) -> str | None:
    reason = native.unavailable_reason()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"it runs on the CPU and a tensor is on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"it computes in float32 and a tensor is {tensor.dtype}"
    return None


def _cpp_note(*tensors: Tensor | None) -> str:
    """How signs and counts are found: by the float32 product, or by matrix tiles where there are some."""
    least = native.native().split_depth()
    if not least:
        return ""
    if tensors and tensors[0] is not None and tensors[0].shape[1] < least:
        return f"signs by a float32 product (depth below {least}), counts by int8 tiles"
    return "signs by three bfloat16 products, counts by int8 tiles"


def _triton_check(*tensors: Tensor | None) -> str | None:
    try:
        from mmc_fast.kernels import common as kernels
    except ImportError as error:
        return f"Triton is not installed ({error}); pip install 'mmc-fast[triton]'"
    return kernels.usable([t for t in tensors if t is not None])


def _triton_note(*tensors: Tensor | None) -> str:
    return measured.note("agop", tensors[0] if tensors else None)


def _cuda_check(*tensors: Tensor | None) -> str | None:
    return cuda.unusable_reason([t for t in tensors if t is not None])


def _always(*tensors: Tensor | None) -> str | None:
    return None


for _name in (*_SCHEMAS, "chain_gram_update"):
    if _name in _SCHEMAS:
        register(_name, "cpp", _cpp_check, note=_cpp_note if _name == "relu_coactivation_update" else "")
    register(_name, "triton", _triton_check, note=_triton_note)
    if _name == "relu_coactivation_update":  # after Triton: its product is float64
        register(_name, "cuda", _cuda_check)
    register(_name, "eager", _always)


prefer("relu_coactivation_update", lambda *tensors: measured.faster("agop", tensors[0] if tensors else None))


def _implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function of an op on a backend other than the native library; all have the op's arguments and its name."""
    if backend == "triton":
        from mmc_fast.kernels.agop import coactivation, finish, gram

        modules = {"relu_coactivation_update": coactivation, "agop_finalise": finish}
        return getattr(modules.get(op, gram), op)
    return getattr(cuda if backend == "cuda" else reference, op)


def _run(op: str, backend: str, tensors: Sequence[Tensor | None], *arguments: Any) -> tuple[str, Any]:
    """Call ``op`` on the backend that is chosen for ``tensors``; return the backend and what it returned."""
    which = choose(op, backend, *tensors)
    if which == "cpp":
        coded = [ACTIVATIONS[a] if isinstance(a, str) else a for a in arguments]
        return which, getattr(torch.ops.mmc_fast, op)(*coded)
    result = _implementation(op, which)(*arguments)
    record(op, which)
    return which, result


@torch.no_grad()
def relu_coactivation_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    nonfinite: Tensor,
    chunk_rows: int = 0,
    *,
    backend: str = "auto",
) -> str:
    """Add ``#{n : z_ni > 0 and z_nj > 0}``, ``z = x Wᵀ + b``, to the upper triangle of ``counts``, in place.

    The sign is that of the exact real number of the given floats, and 0 is not above 0: every backend, processor, chunk and
    order of summation gives the same counts.

    Args:
        x: ``[N, d]``, any strides. weight: ``[h, d]``. bias: ``[h]`` or None. One floating dtype.
        counts: int64 ``[h, h]``, contiguous; entries below the diagonal are left as they are.
        nonfinite: int64 ``[1]``; raised where a pre-activation depends on a NaN or infinity or rounds to infinity in the
            dtype (float32 for 16-bit numbers).
        chunk_rows: samples per step; 0 chooses.

    Returns the backend that ran. Raises :class:`InputError` for shapes or dtypes that do not fit and ``RuntimeError``
    for an explicit backend that cannot run. Cost: one forward product plus ``N h² / 2`` bit operations; memory
    ``O(hd + chunk)``.
    """
    op = "relu_coactivation_update"
    _check_layer(op, x, weight, bias, chunk_rows)
    _check_accumulator(op, "counts", counts, weight.shape[0], torch.int64)
    _check_flag(op, nonfinite)
    tensors = (x, weight, _contiguous(bias), counts, nonfinite)
    native.load_ebr()  # it has the BLAS, which the native counts take where it is faster
    return _run(op, backend, tensors, *tensors, chunk_rows)[0]


@torch.no_grad()
def derivative_gram_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gram: Tensor,
    total: Tensor,
    nonfinite: Tensor,
    alpha: float = 0.0,
    beta: float = 20.0,
    chunk_rows: int = 0,
    *,
    backend: str = "auto",
) -> str:
    """Add ``Σ_n a_i a_j`` to the upper triangle of ``gram`` and ``Σ_n a_i`` to ``total``; ``a = s'(x Wᵀ + b)``.

    Args:
        x, weight, bias, nonfinite, chunk_rows: as in :func:`relu_coactivation_update`.
        activation: a key of ``ACTIVATIONS``.
        alpha: slope of leaky ReLU, scale of ELU, beta of softplus. beta: threshold of softplus.
        gram: float64 ``[h, h]``, contiguous. total: float64 ``[h]``.

    Products in float32 chains of at most 512, sums in float64. Returns the backend that ran; raises as the function
    above.
    """
    op = "derivative_gram_update"
    if activation not in ACTIVATIONS:
        raise InputError(f"{op}: activation={activation!r}; allowed are {', '.join(ACTIVATIONS)}")
    _check_layer(op, x, weight, bias, chunk_rows)
    _check_accumulator(op, "gram", gram, weight.shape[0], torch.float64)
    if total.shape != (weight.shape[0],) or total.dtype != torch.float64 or not total.is_contiguous():
        raise InputError(f"{op}: total is {_describe(total)}; pass a contiguous float64 [{weight.shape[0]}]")
    _check_flag(op, nonfinite)
    layer = (x, weight, _contiguous(bias))
    return _run(op, backend, layer, *layer, activation, alpha, beta, gram, total, nonfinite, chunk_rows)[0]


@torch.no_grad()
def syrk_update(rows: Tensor, gram: Tensor, *, backend: str = "auto") -> str:
    """Add ``Σ_r rows[r, i] rows[r, j]`` to the upper triangle of ``gram``: floating ``[R, h]`` into float64 ``[h, h]``.

    Half the tiles of ``rowsᵀ rows``. Returns the backend that ran; raises as :func:`relu_coactivation_update`.
    """
    if rows.dim() != 2 or not rows.is_floating_point():
        raise InputError(f"syrk_update: rows is {_describe(rows)}; pass a floating [rows, units]")
    _check_accumulator("syrk_update", "gram", gram, rows.shape[1], torch.float64)
    return _run("syrk_update", backend, (rows,), rows, gram)[0]


@torch.no_grad()
def chain_gram_update(
    left: Tensor, inner: Tensor, v: Tensor, outer: Tensor | None, gram: Tensor, *, backend: str = "auto"
) -> str:
    """Add ``Σ_n Σ_r b bᵀ``, ``b = ((left_r ∘ inner_n) v) ∘ outer_n``, to the upper triangle of ``gram``, in place.

    Args:
        left: ``[R, k]``, or ``[N, R, k]`` where every sample has its own. inner: ``[N, k]``. v: ``[k, h]``.
        outer: ``[N, h]`` or None for ones. One floating dtype, any strides.
        gram: float64 ``[h, h]``, contiguous; entries below the diagonal are left as they are.

    The rows b are those of the Jacobian of a head with two activations and more. Returns the backend that ran; raises as
    :func:`relu_coactivation_update`. Cost: ``N R k h + N R h² / 2`` multiply-adds.
    """
    op = "chain_gram_update"
    if inner.dim() != 2 or v.dim() != 2 or left.dim() not in (2, 3) or not v.is_floating_point():
        raise InputError(
            f"{op}: left is {_describe(left)}, inner {_describe(inner)}, v {_describe(v)}; see its arguments"
        )
    samples, units = inner.shape[0], v.shape[1]
    if left.shape[-1] != v.shape[0] or inner.shape[1] != v.shape[0] or (left.dim() == 3 and len(left) != samples):
        raise InputError(
            f"{op}: left {list(left.shape)}, inner {list(inner.shape)}, v {list(v.shape)} do not fit; pass "
            "[R, k] or [N, R, k], [N, k] and [k, h]"
        )
    if outer is not None and outer.shape != (samples, units):
        raise InputError(f"{op}: outer has shape {list(outer.shape)}; pass [{samples}, {units}] or None")
    given = [t for t in (left, inner, v, outer) if t is not None]
    if any(t.dtype != v.dtype or t.device != v.device for t in given):
        raise InputError(f"{op}: left, inner, v and outer differ in dtype or device; convert them to one")
    _check_accumulator(op, "gram", gram, units, torch.float64)
    return _run(op, backend, given, left, inner, v, outer, gram)[0]


@torch.no_grad()
def agop_finalise(
    weight: Tensor,
    outer: Tensor | None,
    inner: Tensor,
    *,
    scale: float = 1.0,
    nonfinite: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``G = scale Wᵀ S W`` with ``S_ij = (outerᵀ outer)_ij · inner_ij``; ``S = inner`` where ``outer`` is None.

    Args:
        weight: ``[h, d]``. outer: ``[C, h]`` or None.
        inner: int64 or float64 ``[h, h]``; only its upper triangle is read.
        nonfinite: int64 ``[1]``; where it is above zero, G is NaN throughout. It is not read on the host.

    The result ``[d, d]`` has the dtype of weight and is exactly symmetric. With ``S = U + Uᵀ``, U triangular, the cost
    is ``h² d + 2 h d²`` (+ ``C h²``) flops instead of ``2 h² d + 2 h d²``.
    """
    units = weight.shape[0] if weight.dim() == 2 else -1
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InputError(f"agop_finalise: weight is {_describe(weight)}; pass a floating [units, inputs]")
    if outer is not None and (outer.dim() != 2 or outer.shape[1] != units or outer.dtype != weight.dtype):
        raise InputError(f"agop_finalise: outer is {_describe(outer)}; pass [outputs, {units}] of {weight.dtype}")
    if inner.dtype not in (torch.int64, torch.float64):
        raise InputError(f"agop_finalise: inner is {_describe(inner)}; pass an int64 or float64 [{units}, {units}]")
    _check_accumulator("agop_finalise", "inner", inner, units, inner.dtype)
    if nonfinite is not None:
        _check_flag("agop_finalise", nonfinite)
    if choose("agop_finalise", backend, weight, outer) == "triton":
        return _run("agop_finalise", "triton", (weight, outer), weight, outer, inner, scale, nonfinite)[1]
    g = _run("agop_finalise", backend, (weight, outer), weight, outer, inner)[1]
    return nan_where(nonfinite, g.mul_(scale))


def nan_where(nonfinite: Tensor | None, values: Tensor) -> Tensor:
    """NaN throughout ``values``, in place, where ``nonfinite[0]`` is above zero; the host does not wait for it."""
    return values if nonfinite is None else values.masked_fill_(nonfinite > 0, float("nan"))


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{layout}"


def _check_layer(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise InputError(f"{op}: x is {_describe(x)}; pass a floating [samples, inputs]")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise InputError(
            f"{op}: weight has shape {list(weight.shape)} but x has {x.shape[1]} columns; "
            "pass Linear.weight, [units, inputs]"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise InputError(f"{op}: bias has shape {list(bias.shape)}; pass [{weight.shape[0]}], one per row of weight")
    if any(t is not None and (t.dtype != x.dtype or t.device != x.device) for t in (weight, bias)):
        raise InputError(f"{op}: x, weight and bias differ in dtype or device; convert them to one")
    if chunk_rows < 0:
        raise InputError(f"{op}: chunk_rows={chunk_rows}; pass a positive number of samples, or 0 to let the op choose")


def _check_accumulator(op: str, name: str, tensor: Tensor, units: int, dtype: torch.dtype) -> None:
    if tensor.shape != (units, units) or tensor.dtype != dtype or not tensor.is_contiguous():
        wanted = str(dtype).removeprefix("torch.")
        raise InputError(f"{op}: {name} is {_describe(tensor)}; pass a contiguous {wanted} [{units}, {units}]")


def _check_flag(op: str, nonfinite: Tensor) -> None:
    if nonfinite.shape != (1,) or nonfinite.dtype != torch.int64:
        raise InputError(f"{op}: nonfinite is {_describe(nonfinite)}; pass torch.zeros(1, dtype=torch.int64)")
