"""TOML files of settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mmc_fast._util.files import open_regular, user_path
from mmc_fast.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["read_toml"]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ``InputError`` where it cannot be read or parsed."""
    try:
        with open_regular(user_path(path)) as file:
            return tomllib.loads(file.read().decode("utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # those of tomllib and of digits without end are ValueErrors
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"config {path} cannot be read: {' '.join((reason or 'unknown reason').split())}; give a TOML file"
        ) from error
