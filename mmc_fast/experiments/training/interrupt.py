"""How a stage ends in order: signals that ask for it, and the state that it saves then and from time to time."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from .checkpoint import Checkpoint, CheckpointStore
from .progress import Interrupted, ProcessLost

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a person's Ctrl-C; a cluster that takes its machine back


class InterruptGuard:
    """Context manager that turns SIGINT and SIGTERM into ``requested = True``; the loop finishes its step and saves.

    The handlers are installed in the main thread only (elsewhere Python delivers no signals) and put back on exit. A
    second signal raises KeyboardInterrupt at once. Without ``with`` it is a plain flag that nobody sets.

    After a ProcessLost SIGTERM stays ignored: the launcher that saw the death sends it to the processes that are left,
    and it must not cut off the line that they print (a launcher kills what has not ended after its grace time).
    """

    def __init__(self) -> None:
        self.requested = False
        self.agreed: bool | None = None  # of several processes: whether all of them stop here
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        lost = kind is not None and issubclass(kind, ProcessLost)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if lost and number == signal.SIGTERM else handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    @property
    def stop(self) -> bool:
        """Whether to end now: one process after any step, several only where they have agreed to."""
        return self.requested if self.agreed is None else self.agreed

    def check(self, stage: str) -> None:
        """Raise Interrupted where a signal came during a stage that is repeated rather than saved."""
        if self.stop:
            raise Interrupted(f"interrupted during {stage}; a resumed run repeats this stage")


@dataclass
class Stage:
    """A stage of a run: its name, who hears of its epochs, where it saves itself and how often, what may interrupt it,
    and the state that it continues from. ``store`` None saves nothing."""

    name: str = "train"
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None
    store: CheckpointStore | None = None
    guard: InterruptGuard = field(default_factory=InterruptGuard)
    seconds: float = 300.0
    checkpoint: Checkpoint | None = None


class Autosave:
    """Saves what ``capture() -> (state, epoch, step)`` gives whenever it is time to; that changes no number of the run."""

    def __init__(self, stage: Stage, capture: Callable[[], tuple[Checkpoint, int, int]]) -> None:
        self.store, self.guard, self.stage, self.capture = stage.store, stage.guard, stage, capture
        self._saved = time.monotonic()

    def save(self) -> None:
        if self.store is not None:
            self.store.save(*self.capture())
        self._saved = time.monotonic()

    def after_step(self) -> None:
        """Save where it is time to; end the stage where a signal asks for it.

        Raises:
            Interrupted: the guard saw a signal; the state was saved.
        """
        if self.guard.stop:
            if self.store is None:
                raise Interrupted(f"interrupted in stage {self.stage.name}; nothing was saved by this process")
            self.save()
            raise Interrupted(f"interrupted; saved {self.store.newest()}")
        if self.store is not None and time.monotonic() - self._saved >= self.stage.seconds:
            self.save()

    def after_epoch(self) -> None:
        """The same, without looking at the clock; a folder that is gone ends the stage (SaveFailed)."""
        if self.store is not None:
            self.store.manifest.alive()
        if self.guard.stop:
            self.after_step()
