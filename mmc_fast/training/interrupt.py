"""Ctrl-C during a run: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from .progress import Interrupted

__all__ = ["InterruptGuard"]


class InterruptGuard:
    """Context manager that turns SIGINT into ``requested = True``, so that the loop can finish its step and save.

    The handler is installed in the main thread only (elsewhere Python delivers no signals) and put back on exit. A
    second Ctrl-C raises KeyboardInterrupt at once. Without ``with`` it is a plain flag that nobody sets.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)
            self._installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def check(self, stage: str) -> None:
        """Raise Interrupted where Ctrl-C came during a stage that is repeated rather than saved."""
        if self.requested:
            raise Interrupted(f"interrupted during {stage}; a resumed run repeats this stage")
