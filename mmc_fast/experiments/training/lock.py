"""One writer per folder: a lock that the system itself gives back when its holder dies, however it dies."""

from __future__ import annotations

from pathlib import Path

import filelock

from mmc_fast.errors import InputError

__all__ = ["LOCK_NAME", "FolderLock"]

LOCK_NAME = ".lock"


class FolderLock:
    """Context manager that holds the file ``path`` for this process alone; ``what`` names it in the error.

    A file that a killed process leaves behind holds nobody up. Two holders within one process exclude each other too.

    Raises:
        InputError: on entering, where another one holds it.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._lock = filelock.FileLock(path, timeout=0, is_singleton=False)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, or raise InputError at once."""
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise InputError(
                f"{self.what} is in use by another process; wait for it to end, stop it, or choose another folder"
            ) from None

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        self._lock.release()
