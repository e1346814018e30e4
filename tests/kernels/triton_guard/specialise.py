"""What Triton would compile for a launch: types, constants and alignment of its arguments, as plain data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from torch import Tensor
from triton.runtime.jit import mangle_type

__all__ = ["specialisation"]

_OPTIONS = {"num_warps": 4, "num_stages": 3}  # Triton's defaults; others count where a launch names them


def specialisation(function: Callable[..., Any], constexprs: list[str], args: tuple, kwargs: dict) -> dict[str, Any]:
    """Module, name, ``signature`` (argument -> type), ``constants``, ``aligned`` (paths of indices), ``options``.

    The rules are those of a launch on a GPU: an integer 1 and None become constants, addresses and integers that 16
    divides are marked, but not those that the kernel names in ``do_not_specialize``. Paths go through tuples: ``[2, 0]`` is
    the first element of the third argument.
    """
    jitted = function.__globals__.get(function.__name__)
    general = getattr(jitted, "kwargs", {}).get("do_not_specialize") or ()
    names = inspect.signature(function).parameters
    options = _OPTIONS | {name: value for name, value in kwargs.items() if name not in names}
    bound = inspect.signature(function).bind(*args, **{k: v for k, v in kwargs.items() if k in names})
    bound.apply_defaults()
    constants: list[list[Any]] = []
    aligned: list[list[int]] = []

    def kind(value: Any, path: list[int], constant: bool, special: bool = True) -> Any:
        if isinstance(value, tl.constexpr):
            value = value.value
        if constant or value is None or (special and type(value) is int and value == 1):
            constants.append([path, _plain(value)])
            return "constexpr"
        if isinstance(value, tuple):
            return [kind(item, [*path, i], False) for i, item in enumerate(value)]
        if isinstance(value, Tensor):
            if value.data_ptr() % 16 == 0:
                aligned.append(path)
        elif special and type(value) is int and value % 16 == 0:
            aligned.append(path)
        return mangle_type(value)

    signature = {
        name: kind(value, [index], name in constexprs, name not in general)
        for index, (name, value) in enumerate(bound.arguments.items())
    }
    return {
        "module": function.__globals__["__name__"],
        "kernel": function.__name__,
        "signature": signature,
        "constants": constants,
        "aligned": aligned,
        "options": options,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tl.dtype):
        return {"dtype": value.name}
    if isinstance(value, tl.constexpr):
        return _plain(value.value)
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
