"""Every environment variable that the package reads, in one table."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class EnvVariable:
    """One environment variable: its name, the value when it is unset, and what it does."""

    name: str
    default: str | None
    meaning: str


VARIABLES: tuple[EnvVariable, ...] = (
    EnvVariable("MMC_DATA", None, "folder with the benchmark data sets that are not part of the package"),
    EnvVariable(
        "MMC_CPU_ISA",
        None,
        "instruction set of the native kernels: base, avx2, avx512, avx512_vpopcntdq or amx; amx_emulated for tests",
    ),
    EnvVariable("MMC_GEMM", "auto", "how the native EBR step multiplies: tiles, blas, or auto (as measured here)"),
    EnvVariable(
        "MMC_BUILD", None, "at installation: 0 leaves the native library out, 1 fails where it cannot be built"
    ),
    EnvVariable(
        "MMC_WITH_CUDA",
        "auto",
        "at installation: auto builds the CUDA library where nvcc is, 1 fails without, 0 leaves it",
    ),
    EnvVariable("MMC_TORCH_DIR", None, "at installation: folder of the torch package to build against"),
)


def env(name: str) -> str | None:
    """Value of a variable of the table; its default where it is unset or empty.

    Raises ``KeyError`` for a name that is not in the table, so that none is read behind the table's back.
    """
    table = {variable.name: variable for variable in VARIABLES}
    if name not in table:
        raise KeyError(f"{name} is not in the table of mmc_fast._env; add a row for it")
    return os.environ.get(name) or table[name].default
