"""How a run reports to its caller; the library itself never prints."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """Callbacks of one run.

    ``on_start`` comes once, with the number of epochs of all stages together (unimodal models, distillation, the run
    itself, its λ = 0 control). ``on_epoch`` comes after each of these epochs; ``record["stage"]`` names the stage
    (``"unimodal"``, ``"distillation"``, ``"train"``, ``"control"``) and ``record["epoch"]`` counts from 1 within it.
    A resumed run starts counting where it stopped: ``on_start`` gets the epochs that are left.
    ``on_end`` comes once, with the finished results.
    """

    def on_start(self, total_epochs: int, label: str) -> None: ...

    def on_epoch(self, record: dict[str, Any]) -> None: ...

    def on_end(self, results: dict[str, Any]) -> None: ...


class Silent:
    """The progress of a caller that does not look."""

    def on_start(self, total_epochs: int, label: str) -> None:
        pass

    def on_epoch(self, record: dict[str, Any]) -> None:
        pass

    def on_end(self, results: dict[str, Any]) -> None:
        pass


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a run: the step was finished and, where there is a run folder, the state saved."""


class TrainingDiverged(RuntimeError):
    """A loss became NaN or infinite. The message names epoch and step and the last good checkpoint."""


class ProcessesDiffer(RuntimeError):
    """The processes of a distributed run do not hold the same values where they must."""


class ProcessLost(RuntimeError):
    """Another process of a distributed run died or stopped answering. The message names the last good checkpoint."""
