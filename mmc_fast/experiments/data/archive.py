"""Reading of npz files that may come from anywhere: no pickles, sizes compared before anything is allocated."""

from __future__ import annotations

import contextlib
import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from mmc_fast._util.files import check_regular, user_path
from mmc_fast._util.memory import check_memory
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.scratch import Scratch

# What damaged files make zipfile and numpy raise; none of it may reach the user as it is.
_DAMAGE = (OSError, EOFError, ValueError, TypeError, SyntaxError, KeyError, NotImplementedError, RuntimeError)
_DAMAGE += (MemoryError, TokenError, zipfile.BadZipFile, zlib.error)  # type: ignore[assignment]


@dataclass(frozen=True)
class Header:
    """What an array says about itself before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False


class Archive:
    """An npz file whose members are listed at once and read only when asked for.

    Opening reads the npy header of every member: object arrays and structured types are refused, and so are members
    whose declared size is not that of the zip directory.

    Raises :class:`~mmc_fast.errors.InputError` for a file that cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        try:
            check_regular(self.path)
        except OSError as error:
            what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
            raise InputError(f"{self.path}: {what}; give the path of an npz file.") from None
        with self._damage("not an npz file", "write one with numpy.savez"), zipfile.ZipFile(self.path) as archive:
            members = archive.infolist()
        self.headers: dict[str, Header] = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in self.headers:
                raise self._refuse(member.filename, "not an array, or there twice; write the file with numpy.savez")
            self.headers[name] = self._check(name, member.file_size)

    def _check(self, name: str, size: int) -> Header:
        with self._open(name) as stream:
            header, start = _read_header(stream)
        if header.dtype.hasobject:
            raise self._refuse(name, "an object array, which would need pickle; store numbers or fixed-width text")
        if header.dtype.kind not in "biufU" or header.dtype.names is not None:
            raise self._refuse(name, f"its type is {header.dtype}; allowed are bool, integers, floats and text")
        declared = start + math.prod(header.shape) * header.dtype.itemsize
        if declared != size or any(n < 0 for n in header.shape):
            raise self._refuse(
                name,
                f"its header declares {header.dtype} {list(header.shape)}, {declared} bytes, and the file holds {size}; "
                "the file is damaged",
            )
        return header

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        """Names of the arrays in the order of the file."""
        return iter(self.headers)

    def header(self, name: str) -> Header:
        """Shape and type of one array; InputError for a name that the file lacks."""
        if name not in self.headers:
            raise InputError(f"{self.path}: no array {name!r}; this is not the file that it should be.")
        return self.headers[name]

    def read(self, name: str) -> np.ndarray:
        """One array in native byte order. Raises InputError where there is no memory for it."""
        header = self.header(name)
        size = math.prod(header.shape) * header.dtype.itemsize
        advice = "give a memory_budget, or take fewer rows or columns"
        check_memory(size + 4 * math.prod(header.shape), f"{self.path}: array {name!r}", advice)
        with self._open(name) as stream:
            array = npy.read_array(stream, allow_pickle=False)
            stream.read(1)  # to the end, where the check sum is compared
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def map(self, name: str, scratch: Scratch) -> np.ndarray:
        """One array as :meth:`read` gives it, without holding it in memory."""
        header = self.header(name)
        if not math.prod(header.shape) or not header.dtype.isnative:
            return self.read(name)
        with self._open(name) as stream:
            _read_header(stream)
            return scratch.copy(stream, header.shape, header.dtype, header.fortran)

    def text(self, name: str) -> list[str]:
        """A text array [n] as a list of strings."""
        header = self.header(name)
        if header.dtype.kind != "U" or len(header.shape) != 1:
            raise self._refuse(name, f"must be text of shape [n], got {header.dtype} {list(header.shape)}")
        return [str(entry) for entry in self.read(name)]

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        with (
            self._damage(f"array {name!r}: damaged", "restore the file"),
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{name}.npy") as stream,
        ):
            yield stream

    @contextlib.contextmanager
    def _damage(self, what: str, advice: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except _DAMAGE as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{self.path}: {what} ({reason}); {advice}.") from None

    def _refuse(self, name: str, reason: str) -> InputError:
        return InputError(f"{self.path}: array {name!r}: {reason}.")


def _read_header(stream: IO[bytes]) -> tuple[Header, int]:
    """The header of one member and the number of bytes that it takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns about headers written by Python 2, which are fine
        read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    return Header(tuple(shape), dtype, bool(fortran)), stream.tell()
