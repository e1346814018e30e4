"""``Site``: where the features of one modality come out of a model, and how they are put back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast.errors import InputError

Key = str | int


@dataclass(frozen=True)
class Site:
    """The output of a named submodule, or one tensor inside of it.

    Attributes:
        module: dotted name as in ``model.named_modules()``.
        output: where the tensor lies if the submodule returns more than one: an index, a key or an attribute, or a
            tuple of these for a nested place. None: the output is the tensor.
        feature_dim: dimension of width ``d``; the others are rows (tokens, pixels). ``1`` for maps ``[B, C, H, W]``. None: the
            last one of up to three; of four and more it must be said.
        batch_dim: dimension of the samples; ``1`` for sequence-first ``[T, B, d]``.
        call: which call of the submodule in a forward, from 0, where one submodule serves several modalities. None: its
            only one.

    Examples:
        >>> mmc_fast.integrations.Site("backbone", feature_dim=1).module  # maps [B, C, H, W]
        'backbone'
    """

    module: str
    output: Key | Sequence[Key] | None = None
    feature_dim: int | None = None
    batch_dim: int = 0
    call: int | None = None

    @property
    def path(self) -> tuple[Key, ...]:
        if self.output is None:
            return ()
        return (self.output,) if isinstance(self.output, (str, int)) else tuple(self.output)

    def __str__(self) -> str:
        call = "" if self.call is None else f" call {self.call}"
        return self.module + "".join(f"[{key!r}]" for key in self.path) + call

    def told(self) -> dict[str, Any]:
        """The fields that were given, as JSON keeps them."""
        given = {"module": self.module, "output": list(self.path) or None, "batch_dim": self.batch_dim or None}
        given |= {"feature_dim": self.feature_dim, "call": self.call}
        return {key: value for key, value in given.items() if value is not None}

    def read(self, output: Any) -> Tensor:
        """The feature tensor inside of the submodule's output, as it is.

        Raises:
            InputError: nothing is at that place, or no floating-point tensor of two or more dimensions.
        """
        usual = (
            self.output is None and type(output) is Tensor and output.layout is torch.strided and not output.is_nested
        )
        if usual and output.is_floating_point() and output.dim() > 1:
            return output
        found = output
        for key in self.path:
            found = _get(self, found, key)
        if not isinstance(found, Tensor):
            places = ", ".join(f"{_spell(p)} {list(t.shape)}" for p, t in tensors_in(output)) or "nowhere"
            raise InputError(
                f"apply_ebr: {self} is {type(found).__name__}, not a tensor; tensors are at: {places}; "
                f"name one: Site({self.module!r}, output=...)"
            )
        if isinstance(found, torch.masked.MaskedTensor) or found.is_nested or found.layout != torch.strided:
            raise InputError(
                f"apply_ebr: {self} gave a nested, masked or sparse tensor; a head needs dense [rows, ..., width]"
            )
        if not found.is_floating_point() or found.dim() < 2:
            raise InputError(
                f"apply_ebr: {self} gave {found.dtype} {list(found.shape)}; a head needs floating-point features "
                "[rows, ..., width]"
            )
        return found

    def feature_rows(self, x: Tensor) -> Tensor:
        """:meth:`to_rows` where it is sure which dimension holds the features; InputError for maps without a word on it."""
        if self.feature_dim is None and x.dim() > 3:
            raise InputError(
                f"apply_ebr: {self} gave {list(x.shape)}; say which dimension holds the features: "
                f"Site({self.module!r}, feature_dim=1) for channels first, feature_dim=-1 for channels last"
            )
        return self.to_rows(x)

    def to_rows(self, x: Tensor) -> Tensor:
        """View with samples first and features last: ``[B, ..., d]``."""
        if self.feature_dim in (None, -1, x.dim() - 1) and self.batch_dim == 0:
            return x
        batch, feature = self._dims(x)
        return x.movedim((batch, feature), (0, -1))

    def from_rows(self, rows: Tensor) -> Tensor:
        """Inverse of :meth:`to_rows`."""
        if self.feature_dim in (None, -1, rows.dim() - 1) and self.batch_dim == 0:
            return rows
        return rows.movedim((0, -1), self._dims(rows))

    def _dims(self, x: Tensor) -> tuple[int, int]:
        n, feature = x.dim(), -1 if self.feature_dim is None else self.feature_dim
        if not (-n <= self.batch_dim < n and -n <= feature < n) or self.batch_dim % n == feature % n:
            raise InputError(
                f"apply_ebr: {self} gave {list(x.shape)} but the site says batch_dim={self.batch_dim}, "
                f"feature_dim={feature}; give two different dimensions of that tensor"
            )
        return self.batch_dim % n, feature % n

    def write(self, output: Any, value: Tensor) -> Any:
        """A copy of ``output`` with ``value`` in place of the feature tensor; ``output`` itself is not changed."""
        return replace_tensor(output, self.path, value)


def _get(site: Site, found: Any, key: Key) -> Any:
    try:
        if isinstance(found, Mapping):
            return found[key] if key in found or isinstance(key, str) else list(found.values())[key]
        if isinstance(key, str):
            return getattr(found, key)
        return found[key]
    except (KeyError, IndexError, AttributeError, TypeError):
        places = ", ".join(f"{_spell(p)} {list(t.shape)}" for p, t in tensors_in(found)) or "nowhere"
        raise InputError(
            f"apply_ebr: {site.module} returned {type(found).__name__} without {key!r}; tensors are at: {places}; "
            "correct the output of its Site"
        ) from None


def replace_tensor(output: Any, path: tuple[Key, ...], value: Tensor) -> Any:
    """A copy of a nested output with ``value`` at the place ``path``."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(output, Mapping):
        name = key if key in output or isinstance(key, str) else list(output)[key]
        changed = copy.copy(output)
        changed[name] = replace_tensor(output[name], rest, value)  # type: ignore[index]
        return changed
    if isinstance(output, (tuple, list)):
        index = key if isinstance(key, int) else type(output)._fields.index(key)  # type: ignore[union-attr]
        items = list(output)
        items[index] = replace_tensor(items[index], rest, value)
        # A named tuple takes its fields one by one, every other sequence takes one iterable.
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    changed = copy.copy(output)
    object.__setattr__(changed, str(key), replace_tensor(getattr(output, str(key)), rest, value))
    return changed


def tensors_in(output: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Tensor]]:
    """Every tensor of a nested output with its place, in order."""
    if isinstance(output, Tensor):
        yield path, output
        return
    children: list[tuple[Key, Any]] = []
    if isinstance(output, Mapping):
        children = list(output.items())
    elif hasattr(output, "_fields"):
        children = list(zip(output._fields, output, strict=True))
    elif isinstance(output, (tuple, list)):
        children = list(enumerate(output))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        children = [(f.name, getattr(output, f.name)) for f in dataclasses.fields(output)]
    for key, child in children:
        yield from tensors_in(child, (*path, key))


def _spell(path: tuple[Key, ...]) -> str:
    return repr(path[0]) if len(path) == 1 else repr(path)


def describe_output(output: Any) -> str:
    """A shape, or the kind of value, in a few words for the report."""
    if isinstance(output, Tensor):
        kind = "" if output.is_floating_point() else f"{str(output.dtype).removeprefix('torch.')} "
        return f"{kind}{list(output.shape)}"
    found = [t for _, t in tensors_in(output) if t.dtype != torch.bool]
    return f"{type(output).__name__} of {len(found)} tensors" if found else f"{type(output).__name__}, no tensor"


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` is at work on a module, around it or in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
