"""What an extra of the package brings: told in one line where it is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from mmc_fast.errors import InputError


class MissingExtra(InputError, ImportError):
    """A package of an extra is not installed. The message is one line with the pip command that brings it."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module`` (such as ``"scipy.stats"``), which the extra ``extra`` of this package brings, and return it.

    Raises MissingExtra where its top-level package is not installed. Call it inside of functions, in front of an ordinary
    import where names and types are wanted.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is installed and lacks something of its own
        raise MissingExtra(f"{package} is not installed; run: pip install 'mmc-fast[{extra}]'") from error
