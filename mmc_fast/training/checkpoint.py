"""Checkpoints: a folder per state with weights, everything else that a resumed run needs, and checksums. No pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, optim

from ..errors import InputError
from .atomic import write_folder

__all__ = [
    "CHECKPOINT_VERSION",
    "Checkpoint",
    "CheckpointStore",
    "optimizer_tensors",
    "prefixed",
    "restore_optimizer",
    "stripped",
]

CHECKPOINT_VERSION = 1
_WEIGHTS, _STATE, _META = "model.safetensors", "state.safetensors", "state.json"


@dataclass
class Checkpoint:
    """``weights``: the model's state dict. ``tensors``: optimiser moments, generator states, best weights, data order.
    ``meta``: counters, history and other plain values."""

    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class CheckpointStore:
    """The newest ``keep`` checkpoints of one run, in ``folder``.

    Each is written to a temporary folder, synchronised and renamed, so a crash leaves the previous ones as they were.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, checkpoint: Checkpoint, epoch: int, step: int) -> Path:
        """Write a checkpoint taken after ``epoch`` whole epochs and ``step`` more steps; drop the oldest ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"epoch-{epoch:06d}-step-{step:06d}"

        def write(folder: Path) -> None:
            save_file(_plain(checkpoint.weights), folder / _WEIGHTS)
            save_file(_plain(checkpoint.tensors), folder / _STATE)
            meta = {
                "checkpoint_version": CHECKPOINT_VERSION,
                "sha256": {name: _digest(folder / name) for name in (_WEIGHTS, _STATE)},
            } | checkpoint.meta
            (folder / _META).write_text(json.dumps(meta, allow_nan=False), encoding="utf-8")

        write_folder(target, write)
        unfinished = [p.name for p in self.folder.iterdir() if p.name.startswith(".epoch-")]
        for old in [*self._names()[: -self.keep], *unfinished]:
            shutil.rmtree(self.folder / old, ignore_errors=True)
        return target

    def newest(self) -> Path | None:
        """Path of the newest checkpoint, intact or not."""
        names = self._names()
        return self.folder / names[-1] if names else None

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is intact (a damaged one is passed over with a warning); None where none is.

        Raises:
            InputError: a checkpoint of another format version.
        """
        for name in reversed(self._names()):
            try:
                return self._load(self.folder / name)
            except (OSError, json.JSONDecodeError, KeyError, SafetensorError, _DamagedError) as error:
                warnings.warn(f"checkpoint {name} is damaged ({error}); trying the one before", stacklevel=2)
        return None

    def _names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and p.name.startswith("epoch-"))

    def _load(self, folder: Path) -> Checkpoint:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        version = meta["checkpoint_version"]
        if version != CHECKPOINT_VERSION:
            raise InputError(
                f"checkpoint {folder} has format version {version}; this version of mmc-fast reads {CHECKPOINT_VERSION}"
            )
        for name, digest in meta["sha256"].items():
            if _digest(folder / name) != digest:
                raise _DamagedError(f"{name} does not match its checksum")
        return Checkpoint(load_file(folder / _WEIGHTS), load_file(folder / _STATE), meta)


class _DamagedError(Exception):
    pass


def optimizer_tensors(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser as named tensors ``"<parameter index>.<key>"``."""
    found = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                found[f"{index}.{key}"] = value
    return found


def restore_optimizer(optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`; learning rates are not part of it, the schedule sets them."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


def stripped(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
