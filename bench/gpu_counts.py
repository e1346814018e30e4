"""Count what a piece of PyTorch asks of a device: operators that are not views, bytes of their operands, products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Operator", "OperatorCount"]

_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_PRODUCTS: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "mm": lambda a: (a[0], a[1]),
    "bmm": lambda a: (a[0], a[1]),
    "addmm": lambda a: (a[1], a[2]),
    "addmm_": lambda a: (a[1], a[2]),
    "baddbmm": lambda a: (a[1], a[2]),
    "_int_mm": lambda a: (a[0], a[1]),
}


class Operator(NamedTuple):
    """One operator call that a GPU would carry out as at least one launch."""

    name: str
    bytes: int  # of every operand, read or written, once
    flops: int  # of matrix products, 0 for the rest
    dtype: str


class OperatorCount(TorchDispatchMode):
    """Inside the block every ATen operator is entered in ``operators``, but for views and allocations.

    An operand counts with the elements that it holds in memory: a dimension that was only expanded counts once.
    Works on tensors of the meta device, where nothing is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "aten":  # an op of a library: see `inside`
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if name not in _ALLOCATIONS and not _is_view(func, inputs, outputs):
            operands = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in inputs + outputs}
            self.operators.append(
                Operator(
                    name,
                    sum(map(_bytes, operands.values())),
                    _flops(name, args),
                    str(inputs[0].dtype) if inputs else "",
                )
            )
        return out

    @contextmanager
    def inside(self, module: Any, *names: str) -> Iterator[None]:
        """Count also what these functions of a module do when a library's op calls them, out of sight of the mode."""
        originals = {name: getattr(module, name) for name in names}

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

            return call

        try:
            for name, function in originals.items():
                setattr(module, name, counted(function))
            yield
        finally:
            for name, function in originals.items():
                setattr(module, name, function)

    @property
    def launches(self) -> int:
        """Number of operators."""
        return len(self.operators)

    @property
    def bytes(self) -> int:
        """Bytes of all operands of all operators."""
        return sum(operator.bytes for operator in self.operators)

    def names(self) -> dict[str, int]:
        """How often each operator was called."""
        return dict(Counter(operator.name for operator in self.operators).most_common())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if func._schema.is_mutable or not outputs:
        return False
    places = {t.untyped_storage()._cdata for t in inputs}
    return all(t.untyped_storage()._cdata in places for t in outputs)


def _bytes(tensor: Tensor) -> int:
    held = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        held *= size if stride or size == 0 else 1
    return held * tensor.element_size()


def _flops(name: str, args: Any) -> int:
    if name not in _PRODUCTS:
        return 0
    left, right = _PRODUCTS[name](args)
    return 2 * left.numel() * right.shape[-1]
