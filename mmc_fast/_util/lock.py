"""One writer per folder: a lock that the system itself gives back when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
from pathlib import Path

import filelock

from mmc_fast.errors import InputError

from .files import check_regular

LOCK_NAME = ".lock"


class FolderLock:
    """Context manager that holds the file ``path`` for this process alone; ``what`` names it in the error.

    A file that a killed process leaves behind holds nobody up. Two holders within one process exclude each other too.
    ``wait``: seconds for another holder to end.

    Raises:
        InputError: on entering, where another one holds it, or where the file is a link, a FIFO or a device.
    """

    def __init__(self, path: Path, what: str, wait: float = 0.0) -> None:
        self.path, self.what = path, what
        self._lock = filelock.FileLock(path, timeout=wait, is_singleton=False)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, or raise InputError."""
        if not self.try_acquire():
            raise InputError(
                f"{self.what} is in use by another process; wait for it to end, stop it, or choose another folder"
            )

    def try_acquire(self) -> bool:
        """Take the lock where nobody else holds it; whether it was taken."""
        with contextlib.suppress(FileNotFoundError):
            check_regular(self.path, follow=False)  # opening it would empty what a link leads to
        try:
            self._lock.acquire()
        except filelock.Timeout:
            return False
        return True

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        self._lock.release()
