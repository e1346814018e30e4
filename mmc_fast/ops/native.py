"""The native library: loaded once, likely causes named once where that fails, and the instruction set that it runs."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from mmc_fast import __version__
from mmc_fast._env import env
from mmc_fast.errors import InputError

FOR_TESTS = ("amx_emulated", "base")  # instruction sets that every machine has, there to be right and not fast
_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARY = _PACKAGE / "libmmc_ops.so"


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str | None]:
    """Load the native library once; return (module ``_C``, None) or (None, one line that says why not).

    Raises :class:`InputError` where ``MMC_CPU_ISA`` names an instruction set that this build or this processor has not, and
    for an unknown ``MMC_GEMM``.
    """
    if importlib.util.find_spec("mmc_fast._C") is None or not _LIBRARY.exists():
        return None, (
            "the native library was not built (no C++ compiler at installation, or MMC_BUILD=0); "
            "install again with a compiler for exact AGOP at the cost of a forward pass"
        )
    try:
        module = importlib.import_module("mmc_fast._C")
        torch.ops.load_library(str(_LIBRARY))
    except (ImportError, OSError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = (
            f"the native library did not load ({detail}); likely causes: torch {torch.__version__} is older than 2.10, "
            f"the package was built for another Python, or on a machine with a newer C++ runtime; reinstall it here"
        )
        warnings.warn(f"mmc_fast: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    built = module.build_info()["version"]
    if built != __version__:
        reason = f"the native library is version {built} and the package {__version__}: build again (pip install -e .)"
        warnings.warn(f"mmc_fast: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    try:
        module.select_isa(env("MMC_CPU_ISA") or "")
    except ValueError as error:
        raise InputError(f"MMC_CPU_ISA: {error}") from None
    try:
        module.pin_ways(env("MMC_GEMM"))
    except ValueError as error:
        raise InputError(f"MMC_GEMM: {error}") from None
    return module, None


@lru_cache(maxsize=1)
def load_ebr() -> str | None:
    """Load the EBR operators, which belong to one torch release; return None, or one line that says why not."""
    reason = load()[1]
    if reason is not None:
        return reason
    running = torch.__version__.split("+")[0]
    path = _PACKAGE / f"libmmc_ebr-{running}.so"
    if not path.exists():
        built = sorted(p.stem.removeprefix("libmmc_ebr-") for p in _PACKAGE.glob("libmmc_ebr-*.so"))
        made_for = f"for torch {', '.join(built)}" if built else "without the EBR operators"
        return f"the native library was built {made_for} and torch {running} is running: build again (pip install -e .)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = f"the native EBR operators did not load ({str(error).splitlines()[0]}): build again (pip install -e .)"
        warnings.warn(f"mmc_fast: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


def loaded_module() -> ModuleType | None:
    """Return the native module where it has been loaded already, without loading it."""
    return load()[0] if load.cache_info().currsize else None


def unavailable_reason() -> str | None:
    """Say why native kernels cannot run, None where they can."""
    return load()[1]


def native() -> ModuleType:
    """Return the native module; raises ``RuntimeError`` with the reason where there is none."""
    module, reason = load()
    if module is None:
        raise RuntimeError(reason)
    return module


def supported_isas() -> list[str]:
    """List the instruction sets that this build and this processor have, slowest first; empty without the library."""
    module = load()[0]
    return [] if module is None else list(module.supported_isas())


def current_isa() -> str | None:
    """Name the instruction set that native kernels use; None without the library."""
    module = load()[0]
    return None if module is None else str(module.current_isa())


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run native kernels on one instruction set inside the block (the whole process, so for tests and benchmarks).

    Raises :class:`InputError` where this build or this processor has not got it.
    """
    module = native()
    before = module.current_isa()
    try:
        module.select_isa(name)
    except ValueError as error:
        raise InputError(str(error)) from None
    module.forget_ways()  # rates belong to an instruction set
    try:
        yield
    finally:
        module.select_isa(before)
        module.forget_ways()


@contextmanager
def forced_ways(name: str) -> Iterator[None]:
    """Multiply by "tiles", by "blas" or as measured ("auto") inside the block (the whole process)."""
    module = native()
    before = module.pinned_ways()
    module.pin_ways(name)
    try:
        yield
    finally:
        module.pin_ways(before)


def describe() -> dict[str, object]:
    """Facts for ``mmc-fast info``: whether the library runs, on what, and from which build."""
    module, reason = load()
    if module is None:
        return {"native": False, "reason": reason}
    return {
        "native": True,
        "isa": module.current_isa(),
        "supported_isas": list(module.supported_isas()),
        "forced": env("MMC_CPU_ISA"),
        "products": module.pinned_ways(),
        "build": dict(module.build_info()),
        "torch_threads": torch.get_num_threads(),
    }
