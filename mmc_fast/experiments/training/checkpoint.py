"""Checkpoints: one safetensors file per state, whole or not there, with a checksum. No pickle."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, optim

from mmc_fast._util.atomic import read_tensors, save_errors, write_tensors
from mmc_fast.errors import InputError

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "fits_checkpoint",
    "optimizer_tensors",
    "prefixed",
    "restore_optimizer",
    "stripped",
]


@dataclass
class Checkpoint:
    """``weights``: the model's state dict. ``tensors``: optimiser moments, generator states, best weights, data order.
    ``meta``: counters, history and other plain values."""

    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class CheckpointStore:
    """The newest ``keep`` checkpoints of one stage of a run, in ``folder``; ``run`` identifies the run."""

    def __init__(self, folder: Path, keep: int, run: str = "") -> None:
        self.folder, self.keep, self.run = folder, keep, run

    def save(self, checkpoint: Checkpoint, epoch: int, step: int) -> Path:
        """Write a checkpoint taken after ``epoch`` whole epochs and ``step`` more steps; drop the oldest ones.

        Raises:
            SaveFailed: a full disk or a folder that cannot be written; what was there before is still there.
        """
        target = self.folder / f"epoch-{epoch:06d}-step-{step:06d}.safetensors"
        tensors = prefixed("model", checkpoint.weights) | prefixed("state", checkpoint.tensors)
        about = {"run": self.run, "meta": json.dumps(checkpoint.meta, allow_nan=False)}
        with save_errors(target, lambda: f"last good checkpoint: {self.newest() or 'none was written'}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(target, tensors, about)
        files = self._files()
        # Those after the one just written are what a resumed run passed over as damaged.
        current = files.index(target) + 1
        for old in [*files[: max(0, current - self.keep)], *files[current:], *self.folder.glob(".epoch-*.tmp")]:
            old.unlink(missing_ok=True)
        return target

    def clear(self) -> None:
        """Remove all checkpoints: the result of the stage is kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def newest(self) -> Path | None:
        """Path of the newest checkpoint, intact or not."""
        return next(reversed(self._files()), None)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is intact (a damaged one is passed over with a warning); None where none was made.

        Raises:
            InputError: a checkpoint of another run, or none of several intact.
        """
        files, reason = self._files(), ""
        for path in reversed(files):
            try:
                tensors, about = read_tensors(path)
                run, meta = about["run"], json.loads(about["meta"])
            except (OSError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                before = "; trying the one before" if path != files[0] else ""
                warnings.warn(f"checkpoint {path.name} is damaged ({reason}){before}", stacklevel=2)
                continue
            if run != self.run:
                raise InputError(
                    f"checkpoint {path} belongs to another run; put the run's own back, or remove it to go on without"
                )
            return Checkpoint(stripped("model", tensors), stripped("state", tensors), meta)
        if files:
            raise InputError(
                f"none of the {len(files)} checkpoint(s) in {self.folder} is intact ({reason}); "
                "restore one, or remove that folder to repeat this stage"
            )
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-*.safetensors"))


def optimizer_tensors(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser as named tensors ``"<parameter index>.<key>"``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": v for i, entries in state.items() for k, v in entries.items() if isinstance(v, Tensor)}


def restore_optimizer(optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`; learning rates are not part of it, the schedule sets them."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@contextlib.contextmanager
def fits_checkpoint(stage: str) -> Iterator[None]:
    """Turn the errors of taking up a state that was made for something else into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the checkpoint of stage {stage} does not fit this run ({reason}); put the run's own back, or remove the "
            "folder of that stage below checkpoints to repeat it"
        ) from error


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


def stripped(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
