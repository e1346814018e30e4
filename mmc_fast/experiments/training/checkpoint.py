"""Checkpoints: a folder per state with weights, everything else that a resumed run needs, and checksums. No pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, optim

from mmc_fast._util.atomic import save_errors, set_aside, write_folder
from mmc_fast.errors import InputError

__all__ = [
    "CHECKPOINT_VERSION",
    "Checkpoint",
    "CheckpointStore",
    "fits_checkpoint",
    "optimizer_tensors",
    "prefixed",
    "restore_optimizer",
    "stripped",
]

CHECKPOINT_VERSION = 2
_WEIGHTS, _STATE, _META = "model.safetensors", "state.safetensors", "state.json"
_BLOCK = 1 << 20
# What a damaged file makes the parsers raise; none of it may reach the user as it is.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _meta_digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True, allow_nan=False).encode()).hexdigest()


class CheckpointStore:
    """The newest ``keep`` checkpoints of one stage of a run, in ``folder``.

    Each is written to a temporary folder, synchronised and renamed, so a crash leaves the previous ones as they were.
    ``run`` identifies the run that they belong to.
    """

    def __init__(self, folder: Path, keep: int, run: str = "") -> None:
        self.folder, self.keep, self.run = folder, keep, run

    def save(self, checkpoint: Checkpoint, epoch: int, step: int) -> Path:
        """Write a checkpoint taken after ``epoch`` whole epochs and ``step`` more steps; drop the oldest ones.

        Raises:
            SaveFailed: a full disk or a folder that cannot be written; what was there before is still there.
        """
        target = self.folder / f"epoch-{epoch:06d}-step-{step:06d}"

        def write(folder: Path) -> None:
            save_file(_plain(checkpoint.weights), folder / _WEIGHTS)
            save_file(_plain(checkpoint.tensors), folder / _STATE)
            sums = {name: _digest(folder / name) for name in (_WEIGHTS, _STATE)}
            document = {
                "checkpoint_version": CHECKPOINT_VERSION,
                "run": self.run,
                "sha256": sums | {"meta": _meta_digest(checkpoint.meta)},
                "meta": checkpoint.meta,
            }
            (folder / _META).write_text(json.dumps(document, allow_nan=False), encoding="utf-8")

        with save_errors(target, lambda: f"last good checkpoint: {self.newest() or 'none was written'}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_folder(target, write)
        names = self._names()
        # Those after the one just written are what a resumed run passed over as damaged.
        current = names.index(target.name) + 1
        unfinished = [p.name for p in self.folder.iterdir() if p.name.startswith(".epoch-")]
        for old in [*names[: max(0, current - self.keep)], *names[current:], *unfinished]:
            shutil.rmtree(self.folder / old, ignore_errors=True)
        return target

    def clear(self) -> None:
        """Remove all checkpoints: the result of the stage is kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def newest(self) -> Path | None:
        """Path of the newest checkpoint, intact or not."""
        names = self._names()
        return self.folder / names[-1] if names else None

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is intact (a damaged one is passed over with a warning); None where none was made.

        Raises:
            InputError: a checkpoint of another format version or of another run, or none of several intact.
        """
        for name, aside in set_aside(self.folder).items():
            os.replace(aside, self.folder / name)
        names, reason = self._names(), ""
        for name in reversed(names):
            try:
                return self._load(self.folder / name)
            except InputError:
                raise
            except _DAMAGE as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                before = "; trying the one before" if name != names[0] else ""
                warnings.warn(f"checkpoint {name} is damaged ({reason}){before}", stacklevel=2)
        if names:
            raise InputError(
                f"none of the {len(names)} checkpoint(s) in {self.folder} is intact ({reason}); "
                "restore one, or remove that folder to repeat this stage"
            )
        return None

    def _names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and p.name.startswith("epoch-"))

    def _load(self, folder: Path) -> Checkpoint:
        document = json.loads((folder / _META).read_text(encoding="utf-8"))
        version = document["checkpoint_version"]
        if version != CHECKPOINT_VERSION:
            raise InputError(
                f"checkpoint {folder} has format version {version}; this version of mmc-fast reads "
                f"{CHECKPOINT_VERSION}; resume with the version that wrote it, or train again in another folder"
            )
        meta, stated = document["meta"], document["sha256"]
        found = {name: _digest(folder / name) for name in (_WEIGHTS, _STATE)} | {"meta": _meta_digest(meta)}
        for name, digest in found.items():
            if stated[name] != digest:
                raise ValueError(f"{name} does not match its checksum")
        if document["run"] != self.run:
            raise InputError(
                f"checkpoint {folder} belongs to another run; put the run's own back, or remove it to go on without"
            )
        return Checkpoint(load_file(folder / _WEIGHTS), load_file(folder / _STATE), meta)


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
