"""Checkpoints: one safetensors file per state, whole or not there, listed with its hash. No pickle."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, optim

from mmc_fast._util.atomic import read_tensors, save_errors, write_tensors
from mmc_fast._util.documents import parse_json, validated
from mmc_fast.errors import InputError

from ..manifest import Manifest


@dataclass
class Checkpoint:
    """``weights``: the model's state dict. ``tensors``: optimiser moments, generator states, best weights, data order.
    ``meta``: counters, history and other plain values."""

    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class CheckpointStore:
    """The newest ``keep`` checkpoints of one stage of a run, in ``folder``, whose name is that of the stage.

    Only files that ``manifest``, the run's own, lists count: others are what a kill has left.
    """

    def __init__(self, folder: Path, keep: int, manifest: Manifest) -> None:
        self.folder, self.keep, self.manifest = folder, keep, manifest

    def save(self, checkpoint: Checkpoint, epoch: int, step: int) -> Path:
        """Write a checkpoint taken after ``epoch`` whole epochs and ``step`` more steps; drop the oldest ones.

        A place that is saved and intact stays as it is: it holds the same state.

        Raises:
            SaveFailed: a full disk, a folder that is gone or cannot be written; what was there before is still there.
        """
        target = self.folder / f"epoch-{epoch:06d}-step-{step:06d}.safetensors"
        if self._intact(target):
            return target
        tensors = prefixed("model", checkpoint.weights) | prefixed("state", checkpoint.tensors)
        about = {
            "run": self.manifest.id,
            "place": self._place(target),
            "meta": json.dumps(checkpoint.meta, allow_nan=False),
        }
        with save_errors(target, lambda: f"last good checkpoint: {self.newest() or 'none was written'}"):
            self.manifest.alive()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(target, tensors, about)
        files = sorted({*self._files(), target})
        # Those after the one just written are what a resumed run passed over as damaged.
        current = files.index(target) + 1
        self.manifest.add([target], drop=[*files[: max(0, current - self.keep)], *files[current:]])
        kept = self._files()
        for path in self.folder.glob("*epoch-*"):  # half-written ones begin with a dot
            if path not in kept:
                path.unlink(missing_ok=True)
        return target

    def clear(self) -> None:
        """Remove all checkpoints: the result of the stage is kept elsewhere."""
        if files := self._files():
            self.manifest.add([], drop=files)
        shutil.rmtree(self.folder, ignore_errors=True)

    def newest(self) -> Path | None:
        """Path of the newest checkpoint, intact or not."""
        return next(reversed(self._files()), None)

    def latest(self, schema: Any = dict[str, Any]) -> Checkpoint | None:
        """The newest checkpoint that is intact (others are passed over with a warning); None where none was made.

        ``schema``: of its plain values, as in :func:`mmc_fast._util.documents.validated`.

        Raises:
            InputError: none of several is intact.
        """
        files, reason = self._files(), ""
        if files and not self.folder.is_dir():
            warnings.warn(f"the folder {self.folder} is gone; its stage is repeated", stacklevel=2)
            return None
        for path in reversed(files):
            try:
                tensors, about = read_tensors(self.manifest.content(path))
                validated(about, dict[str, str], path.name, "it is passed over")
                if (about.get("run"), about.get("place")) != (self.manifest.id, self._place(path)):
                    raise ValueError("it belongs to another run, stage or step")
                meta = parse_json(about.get("meta", ""), schema, path.name, "it is passed over")
            except ValueError as error:  # InputError is one
                reason = " ".join(str(error).split()) or type(error).__name__
                before = "; trying the one before" if path != files[0] else ""
                warnings.warn(f"checkpoint {path.name} is damaged ({reason}){before}", stacklevel=2)
                continue
            return Checkpoint(stripped("model", tensors), stripped("state", tensors), meta)
        if files:
            raise InputError(
                f"none of the {len(files)} checkpoint(s) in {self.folder} is intact ({reason}); "
                "restore one, or remove that folder to repeat this stage"
            )
        return None

    def _intact(self, path: Path) -> bool:
        if path not in self.manifest or not path.exists():
            return False
        try:
            return bool(self.manifest.check(path))
        except InputError:
            return False

    def _place(self, path: Path) -> str:
        return f"{path.parent.name}/{path.stem}"

    def _files(self) -> list[Path]:
        return self.manifest.below(self.folder.relative_to(self.manifest.folder).as_posix())


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
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the checkpoint of stage {stage} does not fit this run ({reason}); put the run's own back, or remove the "
            "folder of that stage below checkpoints to repeat it"
        ) from error


def check_like(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], optional: Iterable[str] = ()) -> None:
    """Raise ValueError unless there are the tensors of ``expected`` (but for ``optional``), in its types and shapes."""
    lacking, foreign = expected.keys() - tensors.keys() - {*optional}, tensors.keys() - expected.keys()
    if lacking or foreign:
        raise ValueError(f"tensors lack {sorted(lacking)[:3]} and have {sorted(foreign)[:3]}")
    for name, t in tensors.items():
        wanted = expected[name]
        if (t.dtype, t.shape) != (wanted.dtype, wanted.shape):
            raise ValueError(f"{name} is {t.dtype} {list(t.shape)}, not {wanted.dtype} {list(wanted.shape)}")


def moments_like(optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the moments in ``tensors`` have to look like: a step count is a number, all else has its parameter's shape.

    Raises ValueError for a name that is none of the optimiser's.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = {}
    for name in tensors:
        index, _, key = name.partition(".")
        if key not in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer") or not index.isdecimal():
            raise ValueError(f"optimiser state {name!r} is unknown")
        expected[name] = torch.zeros(()) if key == "step" else parameters[int(index)].detach().cpu()
    return expected


def check_rows(order: Tensor | None, rows: int) -> None:
    """Raise ValueError unless ``order`` (None: between two epochs) is a permutation of so many rows."""
    if order is None:
        return
    if order.dtype != torch.int64 or not torch.equal(order.sort().values, torch.arange(rows)):
        raise ValueError(f"the order of rows is no permutation of {rows}")


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


def stripped(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
