"""One writer per folder: a lock that the system itself gives back when its holder dies, however it dies."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import TracebackType

from mmc_fast.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_NAME", "FolderLock"]

LOCK_NAME = ".lock"


class FolderLock:
    """Context manager that holds ``path`` (a file that is made, and removed at the end) for this process alone.

    The lock is ``flock`` on the open file, so that it ends with the process, also by ``kill -9``: a file that is left
    behind holds nobody up. Two holders within one process exclude each other as well. Shared file systems must pass
    ``flock`` on (NFS since Linux 2.6.12 does).

    Raises:
        InputError: on entering, where another one holds it; names its process and host.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, or raise InputError at once."""
        if fcntl is None:
            return
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                by = f" by {holder}" if holder else ""
                raise InputError(
                    f"{self.what} is in use{by}; wait for it to end, stop it, or choose another folder"
                ) from None
            except OSError:
                os.close(descriptor)
                raise
            if self._still_named(descriptor):
                self._descriptor = descriptor
            else:  # its last holder removed it between our opening and our locking
                os.close(descriptor)
        self._sign(self._descriptor)

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        if self._descriptor is None:
            return
        self.path.unlink(missing_ok=True)  # while it is held: who opens the old file finds it without a name
        os.close(self._descriptor)
        self._descriptor = None

    def _still_named(self, descriptor: int) -> bool:
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return False
        opened = os.fstat(descriptor)
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    def _sign(self, descriptor: int) -> None:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
