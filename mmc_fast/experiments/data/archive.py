"""Reading of npz files that may come from anywhere: no pickles, headers checked before anything is allocated."""

from __future__ import annotations

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

from mmc_fast.errors import InputError
from mmc_fast.experiments.data.scratch import Scratch

__all__ = ["Archive", "Header"]

_DEFLATE_MOST = 1032  # bytes out of one byte in: deflate cannot do better


@dataclass(frozen=True)
class Header:
    """What an array says about itself before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False


class Archive:
    """An npz file whose members are listed at once and read only when asked for.

    Opening reads the npy header of every member and compares the declared shape and dtype with the sizes in the zip
    directory; object arrays, structured types and truncated or inflated members are refused before any data is read.

    Raises :class:`~mmc_fast.errors.InputError` for a file that cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise InputError(f"{self.path}: no such file.")
        if not self.path.is_file():
            raise InputError(f"{self.path}: not a file; give the path of an npz file.")
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.headers = self._headers(archive)
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: not an npz file ({error}); write one with numpy.savez.") from None
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self.path}: cannot be read ({error or type(error).__name__}).") from None

    def _headers(self, archive: zipfile.ZipFile) -> dict[str, Header]:
        headers: dict[str, Header] = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in headers:
                raise self._refuse(member.filename, "not an array, or there twice; write the file with numpy.savez")
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise self._refuse(name, "encrypted or packed in an unusual way; write the file with numpy.savez")
            try:
                with archive.open(member) as stream:
                    headers[name], data_start = self._read_header(name, stream)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise self._refuse(name, f"damaged ({error})") from None
            header = headers[name]
            declared = data_start + math.prod(header.shape) * header.dtype.itemsize
            if declared != member.file_size or member.file_size > _DEFLATE_MOST * member.compress_size + 1024:
                raise self._refuse(
                    name,
                    f"its header declares {header.dtype} {list(header.shape)}, {declared} bytes, and the file holds "
                    f"{member.file_size} ({member.compress_size} compressed); the file is damaged",
                )
        return headers

    def _read_header(self, name: str, stream: IO[bytes]) -> tuple[Header, int]:
        """The header of one member and the number of bytes that it takes."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy warns about headers written by Python 2, which are fine
                version = npy.read_magic(stream)
                read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
                if read is None:
                    raise self._refuse(name, f"its npy version is {version}; allowed are 1.0 and 2.0")
                shape, fortran, dtype = read(stream)
        except InputError:
            raise
        except (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError):
            raise self._refuse(name, "its npy header is not valid; the file is damaged") from None
        if dtype.hasobject:
            raise self._refuse(name, "an object array, which would need pickle; store numbers or fixed-width text")
        if dtype.kind not in "biufU" or dtype.names is not None:
            raise self._refuse(name, f"its type is {dtype}; allowed are bool, integers, floats and text")
        if any(size < 0 for size in shape):
            raise self._refuse(name, f"its shape is {shape}; the file is damaged")
        return Header(tuple(shape), dtype, bool(fortran)), stream.tell()

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
        """One array in native byte order."""
        header = self.header(name)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
                array = npy.read_array(stream, allow_pickle=False)
                stream.read(1)  # to the end, where the check sum is compared
        except MemoryError:
            raise self._refuse(name, f"{header.dtype} {list(header.shape)} does not fit into memory") from None
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise self._refuse(name, f"damaged ({error})") from None
        if array.shape != header.shape or array.dtype != header.dtype:
            raise self._refuse(name, "changed while it was read; load again")
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def map(self, name: str, scratch: Scratch) -> np.ndarray:
        """One array as :meth:`read` gives it, without holding it in memory."""
        header = self.header(name)
        if not math.prod(header.shape) or not header.dtype.isnative:
            return self.read(name)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
                self._read_header(name, stream)
                return scratch.copy(stream, header.shape, header.dtype, header.fortran)  # to the end: check sum
        except InputError:
            raise
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise self._refuse(name, f"damaged ({error})") from None

    def text(self, name: str) -> list[str]:
        """A text array [n] as a list of strings."""
        header = self.header(name)
        if header.dtype.kind != "U" or len(header.shape) != 1:
            raise self._refuse(name, f"must be text of shape [n], got {header.dtype} {list(header.shape)}")
        return [str(entry) for entry in self.read(name)]

    def _refuse(self, name: str, reason: str) -> InputError:
        return InputError(f"{self.path}: array {name!r}: {reason}.")
