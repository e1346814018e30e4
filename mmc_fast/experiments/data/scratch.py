"""Arrays larger than the memory: they lie in files without a name, mapped, and are read where they are used."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import IO

import numpy as np

from mmc_fast._util.numbers import integer
from mmc_fast.errors import InputError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_ROWS = 8192  # at most so many rows are worked on at a time


def budget_bytes(budget: int | str) -> int:
    """Bytes of a number, or of a text such as ``"2GB"`` or ``"512 MiB"``. Raises InputError for anything else."""
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", budget)
        if found and found[2].lower() in _UNITS:
            budget = int(float(found[1]) * _UNITS[found[2].lower()])
    size = integer(budget)
    if size is None or size < 1:
        raise InputError(f"memory_budget is {budget!r}; give a number of bytes, or a text such as 2GB or 512MiB")
    return size


class Scratch:
    """Makes mapped arrays in ``folder`` (None: the system's folder for temporary files).

    Their files have no name, so their space is free again when the process ends, however it ends. ``budget``: bytes;
    what is held at a time stays well below it.
    """

    def __init__(self, budget: int, folder: str | Path | None = None) -> None:
        self.budget, self.folder = budget, folder

    def rows(self, width: int) -> int:
        """Rows of so many columns that are worked on at a time, in float64 and with a few copies."""
        return max(1, min(_ROWS, self.budget // (64 * max(1, width))))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """A mapped array of zeros."""
        return self.copy(None, shape, np.dtype(dtype), False)

    def copy(self, stream: IO[bytes] | None, shape: tuple[int, ...], dtype: np.dtype, fortran: bool) -> np.ndarray:
        """The values that follow in ``stream`` (None: zeros), as a mapped array."""
        where = Path(self.folder or tempfile.gettempdir())
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        try:
            free = shutil.disk_usage(where).free
            if size > free:
                raise InputError(
                    f"{size} bytes are needed in {where} and {free} are free; name another folder with scratch=, or by "
                    "the environment variable TMPDIR"
                )
            with tempfile.TemporaryFile(dir=where) as file:
                if stream is not None:
                    shutil.copyfileobj(stream, file, 1 << 20)
                    if file.tell() != size:
                        raise EOFError(f"{file.tell()} bytes instead of {size}")
                file.truncate(size)
                file.flush()
                return np.memmap(file, dtype, "r+", shape=shape, order="F" if fortran else "C")  # type: ignore[call-overload]
        except OSError as error:
            raise InputError(
                f"scratch folder {where} cannot be used ({error.strerror or error}); name another"
            ) from None
