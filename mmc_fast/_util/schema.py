"""Settings as frozen dataclasses whose annotations are the schema: types, allowed names, ranges of numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, Union

from mmc_fast._util.names import unknown
from mmc_fast._util.numbers import plain, shown
from mmc_fast.errors import InputError


@dataclass(frozen=True)
class Range:
    """Finite numbers from ``low`` (itself only where ``closed``) to ``high`` (itself only where ``high_closed``)."""

    low: float
    high: float = math.inf
    closed: bool = True
    high_closed: bool = False

    def holds(self, value: float) -> bool:
        below = value <= self.high if self.high_closed else value < self.high
        return below and (value >= self.low if self.closed else value > self.low)

    def __str__(self) -> str:
        low = f"{'at least' if self.closed else 'above'} {self.low:g}"
        if self.high == math.inf:
            return f"finite and {low}"
        return f"{low} and {'at most' if self.high_closed else 'below'} {self.high:g}"


_MOST = 1e30  # of a number that float32 has to hold, and its square too
Count = Annotated[int, Range(1, 1e9, high_closed=True)]
Width = Annotated[int, Range(1, 2**24, high_closed=True)]
"""Of a layer; whether the memory suffices is another question (experiments/training/size.py)."""
Depth = Annotated[int, Range(1, 1024, high_closed=True)]
Positive = Annotated[float, Range(0, _MOST, closed=False, high_closed=True)]
NonNegative = Annotated[float, Range(0, _MOST, high_closed=True)]
Share = Annotated[float, Range(0, 1)]
"""At least 0 and below 1."""
_LONGEST = 1000  # entries of a list


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def check(where: str, config: Any) -> None:
    """Hold every field of ``config`` to its annotation; whole numbers for floats and lists for tuples are converted.

    Call it in ``__post_init__``. Raises InputError naming ``where.field``, the value, and what is allowed.
    """
    for name, hint in _hints(type(config)).items():  # type: ignore[arg-type]
        object.__setattr__(config, name, _convert(getattr(config, name), hint, f"{where}.{name}"))


def check_numbers(where: str, config: Any) -> None:
    """:func:`check` for the fields that have a range, and for those that are true or false."""
    for name, hint in _hints(type(config)).items():  # type: ignore[arg-type]
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        ranged = [h for h in (hint, *inner) if typing.get_origin(h) is Annotated]
        if ranged or hint is bool:
            object.__setattr__(config, name, _convert(getattr(config, name), hint, f"{where}.{name}"))


def from_mapping(base: Any, values: Mapping[str, Any], where: str) -> Any:
    """``base`` (a dataclass) with ``values`` on top; nested tables change nested dataclasses.

    A nested table whose field is None in ``base`` starts from the defaults of its class. Raises InputError for an
    unknown key (the nearest one is named) and for what :func:`check` refuses.
    """
    hints, changes = _hints(type(base)), dict(values)  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in hints:
            raise unknown(f"{where} key", key, tuple(hints))
        tables = [a for a in (hints[key], *typing.get_args(hints[key])) if isinstance(a, type) and is_dataclass(a)]
        if tables and isinstance(value, Mapping):
            before = getattr(base, key)
            changes[key] = from_mapping(tables[0]() if before is None else before, value, f"{where}.{key}")
    return dataclasses.replace(base, **changes)


def to_plain(value: Any) -> Any:
    """Plain JSON values of a dataclass: tables, lists, numbers, text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [to_plain(v) for v in value] if isinstance(value, tuple) else value


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        number = _convert(value, args[0], where)
        if not args[1].holds(number):
            raise InputError(f"{where} is {shown(value)}; it must be {args[1]}")
        return number
    if origin in (Union, types.UnionType):
        wanted = next(a for a in args if a is not type(None))
        return None if value is None else _convert(value, wanted, where)
    if origin is Literal:
        if value not in args:
            raise unknown(where, value, args)
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} is {shown(value)}; give a list")
        if len(value) > _LONGEST:
            raise InputError(f"{where} has {len(value)} entries; give at most {_LONGEST}")
        return tuple(_convert(v, args[0], f"{where}[{n}]") for n, v in enumerate(value))
    if is_dataclass(hint):
        if not isinstance(value, hint):  # type: ignore[arg-type]
            raise InputError(f"{where} is {shown(value)}; give a table of settings")
        return value
    return _scalar(value, hint, where)


def _scalar(value: Any, kind: type, where: str) -> Any:
    value = plain(value)
    allowed = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    if not isinstance(value, allowed) or (kind is not bool and isinstance(value, bool)):
        wanted = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[kind]
        raise InputError(f"{where} is {shown(value)}; give {wanted}")
    try:
        return kind(value)
    except OverflowError:
        raise InputError(f"{where} is {shown(value)}; it must be finite") from None
