"""Tables of settings: TOML files, and tables on top of each other."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmc_fast._util.files import open_regular, user_path
from mmc_fast.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a text. Raises ValueError or RecursionError."""
    return tomllib.loads(text)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ``InputError`` where it cannot be read or parsed."""
    try:
        with open_regular(user_path(path)) as file:
            return parse_toml(file.read().decode("utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # those of tomllib and of digits without end are ValueErrors
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"config {path} cannot be read: {' '.join((reason or 'unknown reason').split())}; give a TOML file"
        ) from error


def merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Tables on top of each other, nested ones too; the arguments stay as they are."""
    result: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            before = result.get(key)
            both = isinstance(value, Mapping) and isinstance(before, Mapping)
            result[key] = merged(before, value) if both else merged(value) if isinstance(value, Mapping) else value  # type: ignore[arg-type]
    return result
