"""A package that is called like the function of its name: ``mmc_fast.agop(head, x)`` beside ``mmc_fast.agop.head``."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[self.__name__.rpartition(".")[2]](*args, **kwargs)


def make_callable(package: str) -> None:
    """Let the package ``a.b`` pass calls on to its function ``b``; ``help`` and ``inspect`` show that function."""
    module = sys.modules[package]
    module.__class__ = _CallablePackage
    function = module.__dict__[package.rpartition(".")[2]]
    module.__doc__ = function.__doc__
    module.__dict__["__signature__"] = inspect.signature(function)
