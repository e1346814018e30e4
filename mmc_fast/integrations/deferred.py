"""``Deferred``: stands for features that a head has not recovered yet; the first read of any of them runs all heads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_map_only

from mmc_fast._util.autocast import autocast_enabled

# What is known before the values are: asking for it reads nothing.
_METADATA = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.__hash__, torch.is_floating_point}  # fmt: skip


# What makes another tensor of that shape, dtype or device, and reads nothing.
_NEW = {getattr(Tensor, f"new_{kind}") for kind in ("zeros", "ones", "empty", "full", "tensor")} | {
    getattr(torch, f"{kind}_like") for kind in ("zeros", "ones", "empty", "full", "rand", "randn")
}

# What reads and returns something new: no copy has to be made for it.
_READERS = {torch.cat, torch.concat, torch.stack, F.linear, torch.add, torch.mul, torch.matmul} | {
    getattr(Tensor, name)
    for name in ("add", "__add__", "__radd__", "mul", "__mul__", "__rmul__", "matmul", "__matmul__")
}


class Deferred(Tensor):
    """A tensor without values, of the shape that the recovered features will have.

    Any torch function that reads it gets the recovered tensor in its place, with its autograd history. Code that takes
    tensors past that interface is refused, never given other values.
    """

    _value: Callable[[str, bool], Tensor]
    _name: str

    @staticmethod
    def __new__(cls, like: Tensor, requires_grad: bool, value: Callable[[str, bool], Tensor], name: str) -> Deferred:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, like.stride(), dtype=like.dtype, device=like.device, requires_grad=requires_grad
        )
        made._value, made._name = value, name
        if requires_grad:  # a gradient comes here only where the values were read without their history
            with torch._C.DisableTorchFunctionSubclass():
                made.register_hook(partial(_refuse_gradient, name))
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def recovered(self, reader: str, keeps: bool = True) -> Tensor:
        """The tensor that this one stands for. ``reader``: what asks, for the report; ``keeps``: it may change what it gets,
        return it or a view of it."""
        return self._value(reader, keeps)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _NEW:
            args, kwargs = tree_map_only(Deferred, _empty, (args, kwargs or {}))
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "an attribute")
        args, kwargs = unwrap((args, kwargs or {}), name, bool(kwargs) or func not in _READERS)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        names: list[str] = []
        tree_map_only(Deferred, lambda d: names.append(d._name), (args, kwargs))
        raise _refusal(names[0] if names else "features", str(func))


def _empty(like: Deferred) -> Tensor:
    return torch.empty((), dtype=like.dtype, device=like.device).expand(like.shape)


def unwrap(tree: Any, reader: str, keeps: bool = True) -> Any:
    """``tree`` with every :class:`Deferred` in lists, tuples, mappings and the like replaced by what it stands for."""
    kind = type(tree)
    if kind is Deferred:
        return tree.recovered(reader, keeps)
    if kind is tuple or kind is list:
        return kind([unwrap(child, reader, keeps) for child in tree])
    if kind is dict:
        return {key: unwrap(child, reader, keeps) for key, child in tree.items()}
    if kind is Tensor or kind is int or kind is str or kind is float or kind is bool or tree is None:
        return tree
    return tree_map_only(Deferred, lambda d: d.recovered(reader, keeps), tree)


def _refusal(name: str, reader: str) -> RuntimeError:
    return RuntimeError(
        f"apply_ebr: {name} is read by {reader} past torch's Python functions (an autograd.Function, a reentrant checkpoint, "
        "an extension); name the module that does so as fusion=, or give one_call=False to run each head at its site"
    )


def _refuse_gradient(name: str, gradient: Tensor) -> Tensor:
    raise _refusal(name, "code")


def saving_hooks() -> Any:
    """The innermost saved-tensor hooks (activation checkpointing, offloading), or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class Context:
    """The surroundings in which a site ran, so that its head runs in the same ones: grad mode, autocast, saving hooks."""

    def __init__(self, device: str) -> None:
        self.device, self.grad, self.inference = device, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast = autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if self.autocast else None

    def check_reader(self, name: str) -> None:
        """Refuse a read from which no gradient would come back."""
        if self.grad and not torch.is_grad_enabled() and _inside_a_function():
            raise _refusal(name, "code")

    def entered(self) -> ExitStack:
        """The surroundings of the site, until the stack is closed."""
        stack = ExitStack()
        if torch.is_inference_mode_enabled() != self.inference:
            stack.enter_context(torch.inference_mode(self.inference))
        if torch.is_grad_enabled() != self.grad:
            stack.enter_context(torch.set_grad_enabled(self.grad))
        if autocast_enabled(self.device) != self.autocast:
            stack.enter_context(torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast))
        if saving_hooks() is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        return stack


def _same(x: Any) -> Any:
    return x


def _inside_a_function() -> bool:
    """Whether the forward of an ``autograd.Function`` runs: what is read there has no history afterwards.

    One without ``ctx`` shows itself by :func:`_refuse_gradient` where torch calls it without a frame of its own.
    """
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "apply" and code.co_filename.endswith("function.py"):
            return True
        if code.co_name == "forward" and code.co_argcount and isinstance(_first(frame), FunctionCtx):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _first(frame: Any) -> Any:
    return frame.f_locals.get(frame.f_code.co_varnames[0])
