"""Plain values (TOML, JSON) to frozen dataclasses, refusing unknown keys and wrong types in one line."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

from mmc_fast._util.names import unknown
from mmc_fast._util.numbers import plain
from mmc_fast.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["check_choices", "from_mapping", "read_toml"]


def check_choices(where: str, config: Any) -> None:
    """Raise InputError where a field annotated with ``Literal`` holds another value."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal and getattr(config, name) not in typing.get_args(hint):
            raise unknown(f"{where} {name}", getattr(config, name), typing.get_args(hint))


def from_mapping(base: Any, values: Mapping[str, Any], where: str) -> Any:
    """``base`` (a dataclass) with ``values`` on top; nested tables change nested dataclasses.

    A nested table whose field is None in ``base`` starts from the defaults of its class.

    Raises:
        InputError: unknown key (the nearest one is named), wrong type, or a value that the class refuses.
    """
    hints = typing.get_type_hints(type(base))
    known = [f.name for f in dataclasses.fields(base)]
    changes = {}
    for key, value in values.items():
        if key not in known:
            raise unknown(f"{where} key", key, known)
        changes[key] = _convert(value, hints[key], getattr(base, key), f"{where}.{key}")
    try:
        return dataclasses.replace(base, **changes)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _convert(value: Any, hint: Any, current: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), current, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}; give a table of settings")
        return from_mapping(hint() if current is None else current, value, where)  # type: ignore[operator]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} is {value!r}; give a list")
        return tuple(_convert(v, args[0], None, f"{where}[{n}]") for n, v in enumerate(value))
    if origin is Literal:
        if value not in args:
            raise unknown(where, value, args)
        return value
    return _scalar(value, hint, where)


def _scalar(value: Any, kind: type, where: str) -> Any:
    value = plain(value)
    fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not fits:
        wanted = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[kind]
        raise InputError(f"{where} is {value!r}; give {wanted}")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ``InputError`` where it cannot be read or parsed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"config {path} cannot be read: {' '.join((reason or 'unknown reason').split())}; give a TOML file"
        ) from error
