"""Files: only regular ones are opened, and what is written a reader sees old or new, never in between."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mmc_fast.errors import InputError

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that somebody gave, with ``~`` resolved. Raises InputError where it names no place at all."""
    text = os.fspath(path)
    if "\0" in text:
        raise InputError(f"path {text!r} holds a NUL character; give the path of a file or folder")
    try:
        os.fsencode(text)
        return Path(text).expanduser()
    except UnicodeEncodeError:
        raise InputError(f"path {text!a} holds characters that no file name can; give another") from None
    except RuntimeError:
        raise InputError(f"path {text!r}: there is no such user; write ./{text} for a folder of that name") from None


def command_line() -> str:
    """The command line of this process, readable whatever its bytes are."""
    return shlex.join(sys.argv).encode("utf-8", "backslashreplace").decode()


def check_regular(path: str | os.PathLike[str], *, follow: bool = True) -> None:
    """Raise InputError for what is there and no regular file; ``follow``: a symbolic link counts as what it leads to.

    Nothing is opened, so a FIFO does not block. Raises OSError where nothing is there.
    """
    mode = (os.stat if follow else os.lstat)(path).st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "no regular file")
        raise InputError(f"{os.fspath(path)} is {kind}; a regular file is needed there")


def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> BinaryIO:
    """Open for reading; refuses as :func:`check_regular` does, also where the file is exchanged in the meantime."""
    check_regular(path, follow=follow)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"{os.fspath(path)} was exchanged while it was opened; a regular file is needed there")
    return os.fdopen(handle, "rb")


def check_tree(folder: Path) -> None:
    """Raise InputError where something below ``folder`` is neither a folder nor a regular file."""
    for place, folders, files in os.walk(folder):
        for path in (os.path.join(place, name) for name in (*folders, *files)):
            with contextlib.suppress(FileNotFoundError):  # another process may tidy up
                if os.path.islink(path) or not os.path.isdir(path):
                    check_regular(path, follow=False)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path in the same folder, flush what it wrote, and rename the file to ``path``.

    Raises OSError where the folder cannot be written; the old file then stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def replace_file(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """:func:`write_file` with ``content`` (text as UTF-8) at a path that somebody gave. Makes missing folders."""
    target = user_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    write_file(target, lambda temporary: temporary.write_bytes(data))
    return target


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk; a no-op for folders where they cannot be opened."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
