"""When a stage that takes long saves its state: after so many seconds, and before it gives way to a signal."""

from __future__ import annotations

import time
from collections.abc import Callable

from .checkpoint import Checkpoint, CheckpointStore
from .interrupt import InterruptGuard
from .progress import Interrupted

__all__ = ["Autosave"]


class Autosave:
    """Calls ``capture() -> (state, epoch, step)`` and writes to ``store`` whenever ``seconds`` have passed.

    ``store`` None saves nothing. Saving changes no number of the run.
    """

    def __init__(
        self,
        stage: str,
        store: CheckpointStore | None,
        guard: InterruptGuard,
        seconds: float,
        capture: Callable[[], tuple[Checkpoint, int, int]],
    ) -> None:
        self.stage, self.store, self.guard, self.seconds, self.capture = stage, store, guard, seconds, capture
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        return self.store is not None and time.monotonic() - self._saved >= self.seconds

    def save(self) -> None:
        if self.store is not None:
            self.store.save(*self.capture())
        self._saved = time.monotonic()

    def after_step(self) -> None:
        """Save where it is time to; end the stage where a signal asks for it.

        Raises:
            Interrupted: the guard saw a signal.
        """
        if self.guard.stop:
            self.stop()
        elif self.due:
            self.save()

    def stop(self) -> None:
        """Save and raise ``Interrupted``."""
        if self.store is None:
            raise Interrupted(f"interrupted in stage {self.stage}; nothing was saved")
        self.save()
        raise Interrupted(f"interrupted; saved {self.store.newest()}")
