"""Pieces of work that are files: trainings whose folders are kept, and measurements on them; each is done once."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..comparison.cells import claimed
from ..comparison.rows import load_source
from ..data import MultimodalDataset
from ..errors import InputError
from ..training import LoadedRun, TrainConfig, TrainingDiverged, load_run, train
from ..training.atomic import save_errors, write_json, write_npz
from ..training.pool import Emit, run_jobs

__all__ = ["Measured", "Measurement", "Piece", "Task", "Training", "finish", "measured"]

SCHEMA_VERSION = 1
_DIVERGED = "diverged.json"
_WAIT = 1.0  # seconds between looks at pieces that another process holds


class Piece(Protocol):
    """Something that leaves a file or folder. ``part``: "training" or "measurement"."""

    @property
    def row(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def part(self) -> str: ...
    @property
    def path(self) -> str: ...

    def done(self, folder: Path) -> bool: ...

    def work(self, folder: Path, emit: Emit) -> None: ...


@dataclass(frozen=True)
class Training:
    """A training of the standard loop whose model is kept, by everything that it depends on.

    ``source``: :attr:`~mmc_fast.comparison.rows.Source.key` of the data; ``fingerprint``: of the whole data set.
    """

    row: str
    data: str
    source: str
    fingerprint: str
    seed: int
    config: Mapping[str, Any]

    part = "training"

    @property
    def key(self) -> str:
        """12 digits of the SHA-256 over all of it but the name of the row."""
        return _hash([self.data, self.source, self.fingerprint, self.seed, dict(self.config)])

    @property
    def path(self) -> str:
        """Folder of the run within the grid's."""
        return f"runs/{_plain(self.data)}/{_plain(self.row)}-{self.seed}-{self.key}"

    def done(self, folder: Path) -> bool:
        path = folder / self.path
        return (path / "results.json").is_file() or (path / _DIVERGED).is_file()

    def work(self, folder: Path, emit: Emit) -> None:
        """Train, or continue what a killed process left; a run that diverges is marked as such."""
        path = folder / self.path
        config = TrainConfig.from_dict(self.config)
        try:
            train(
                load_source(self.source), config, seed=self.seed, run_dir=path, resume="auto", evaluate_on=(),
                distributed=False, progress=_Epochs(self, emit),
            )  # fmt: skip
        except TrainingDiverged as error:
            with save_errors(path, lambda: f"finished trainings are in {folder}"):
                write_json(path / _DIVERGED, {"reason": " ".join(str(error).split())})
        except InputError as error:
            raise InputError(f"{self.row} on {self.data}: {error}") from error

    def diverged(self, folder: Path) -> str | None:
        """Why the finished training has no model, if it has none."""
        path = folder / self.path / _DIVERGED
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"]) if path.is_file() else None


@dataclass(frozen=True)
class Task:
    """What a measuring function gets: the trainings by name, and its options."""

    folder: Path
    trainings: Mapping[str, Training]
    options: Mapping[str, Any]
    seed: int

    def run(self, name: str) -> LoadedRun:
        """A finished training, from its folder."""
        return load_run(self.folder / self.trainings[name].path)

    def dataset(self, name: str) -> MultimodalDataset:
        """The data that a training saw."""
        return load_source(self.trainings[name].source)


Values = dict[str, Any]
Measure = Callable[[Task], tuple[Values, dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Measurement:
    """``measure(task)`` on finished trainings: plain JSON values and arrays, kept in a file.

    ``measure`` is a function of a module, so that a worker process can be told its name; ``options`` are plain values.
    """

    measure: Measure
    row: str
    data: str
    seed: int
    trainings: Mapping[str, Training]
    options: Mapping[str, Any] = field(default_factory=dict)

    part = "measurement"

    @property
    def key(self) -> str:
        trainings = {name: training.key for name, training in self.trainings.items()}
        return _hash([SCHEMA_VERSION, self._name, self.seed, trainings, dict(self.options)])

    @property
    def _name(self) -> str:
        return self.measure.__module__.rpartition(".")[2]

    @property
    def path(self) -> str:
        return f"measurements/{self._name}/{_plain(self.data)}/{_plain(self.row)}-{self.seed}-{self.key}.npz"

    def done(self, folder: Path) -> bool:
        return (folder / self.path).is_file()

    def work(self, folder: Path, emit: Emit) -> None:
        started = time.perf_counter()
        reasons = [t.diverged(folder) for t in self.trainings.values()]
        meta: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "row": self.row, "data": self.data, "seed": self.seed}
        meta |= {"trainings": {name: t.path for name, t in self.trainings.items()}, "options": dict(self.options)}
        meta["diverged"] = next((r for r in reasons if r is not None), None)
        values: Values = {}
        arrays: dict[str, np.ndarray] = {}
        if meta["diverged"] is None:
            values, arrays = self.measure(Task(folder, self.trainings, self.options, self.seed))
        meta |= {"values": values, "seconds": time.perf_counter() - started}
        path = folder / self.path
        with save_errors(path, lambda: f"finished measurements are in {folder}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(path, arrays | {"meta": np.array(json.dumps(meta, allow_nan=False))})


@dataclass(frozen=True)
class Measured:
    """A finished measurement. ``diverged``: why there are no values."""

    values: Values
    arrays: Mapping[str, np.ndarray]
    diverged: str | None


def measured(measurement: Measurement, folder: Path) -> Measured:
    """Read what a finished measurement left. Raises InputError where its file is damaged."""
    path = folder / measurement.path
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))
        return Measured(meta["values"], arrays, meta["diverged"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a whole measurement"
        raise InputError(f"measurement {path} cannot be read ({reason}); remove it and repeat the call") from error


def finish(
    pieces: Sequence[Training] | Sequence[Measurement],
    folder: Path,
    *,
    jobs: int,
    on_event: Callable[[tuple[str, Any, Any]], None],
) -> None:
    """Do what is not done yet, each piece once, also where several processes share the folder.

    Events: ("plan", piece, n) with the number of pieces that are left, ("start" and "epoch", piece, value), ("done",
    piece, None). Raises Interrupted after Ctrl-C; a training continues from its last checkpoint, others are repeated.
    """
    unique: dict[str, Training | Measurement] = {piece.path: piece for piece in pieces}
    left = [piece for piece in unique.values() if not piece.done(folder)]
    if unique:
        on_event(("plan", next(iter(unique.values())), len(left)))
    while left:
        run_jobs([_Job(piece, folder) for piece in left], _work, workers=jobs, on_event=on_event)
        left = [piece for piece in left if not piece.done(folder)]
        while left and not any(_free(folder, piece) for piece in left):
            time.sleep(_WAIT)


@dataclass(frozen=True)
class _Job:
    piece: Training | Measurement
    folder: Path


def _work(job: _Job, emit: Emit) -> None:
    """Do one piece unless it is finished or somebody else is at it."""
    if not job.piece.done(job.folder):
        with claimed(job.folder, job.piece) as mine:
            if mine and not job.piece.done(job.folder):
                job.piece.work(job.folder, emit)
    if job.piece.done(job.folder):
        emit(("done", job.piece, None))


def _free(folder: Path, piece: Training | Measurement) -> bool:
    if piece.done(folder):
        return True
    with claimed(folder, piece) as mine:
        return mine


class _Epochs:
    """Progress of a training as events."""

    def __init__(self, training: Training, emit: Emit) -> None:
        self.training, self.emit = training, emit

    def on_start(self, total_epochs: int, label: str) -> None:
        self.emit(("start", self.training, total_epochs))

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.emit(("epoch", self.training, record))

    def on_end(self, results: dict[str, Any]) -> None:
        pass


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_+" else "_" for c in name)
