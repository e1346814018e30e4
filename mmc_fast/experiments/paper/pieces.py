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
from typing import Any

import numpy as np

from mmc_fast._util.atomic import save_errors, write_json, write_npz
from mmc_fast.errors import InputError

from ..compare.grid import Event, Job, work_on
from ..compare.grid import finish as finish_units
from ..compare.rows import load_source
from ..data import MultimodalDataset
from ..training import LoadedRun, Progress, TrainConfig, TrainingDiverged, load_run, train
from ..training.pool import Emit

__all__ = ["Measured", "Measurement", "Task", "Training", "finish", "measured"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Training:
    """A training of the standard loop whose model is kept, by everything that it depends on.

    ``source``: :attr:`~mmc_fast.experiments.compare.rows.Source.key` of the data; ``fingerprint``: of the whole data set.
    """

    row: str
    data: str
    source: str
    fingerprint: str
    seed: int
    config: Mapping[str, Any]

    stage = "trainings"

    @property
    def label(self) -> str:
        return f"{self.data} · {self.row} · seed {self.seed}"

    @property
    def key(self) -> str:
        """12 digits of the SHA-256 over all of it but the name of the row."""
        return _hash([self.data, self.source, self.fingerprint, self.seed, dict(self.config)])

    @property
    def path(self) -> str:
        """File within the grid's folder that says that the training is finished."""
        return f"{self.run}.json"

    @property
    def run(self) -> str:
        """Folder of the run within the grid's."""
        return f"runs/{_plain(self.data)}/{_plain(self.row)}-{self.seed}-{self.key}"

    def work(self, folder: Path, progress: Progress) -> None:
        """Train, or continue what a killed process left; a run that diverges is finished without a model."""
        config, reason = TrainConfig.from_dict(self.config), None
        try:
            train(
                load_source(self.source), config, seed=self.seed, run_dir=folder / self.run, resume="auto",
                evaluate_on=(), distributed=False, progress=progress,
            )  # fmt: skip
        except TrainingDiverged as error:
            reason = " ".join(str(error).split())
        except InputError as error:
            raise InputError(f"{self.row} on {self.data}: {error}") from error
        with save_errors(folder / self.path, lambda: f"finished trainings are in {folder}"):
            write_json(folder / self.path, {"run": self.run, "diverged": reason})

    def diverged(self, folder: Path) -> str | None:
        """Why the finished training has no model, if it has none."""
        reason = json.loads((folder / self.path).read_text(encoding="utf-8"))["diverged"]
        return None if reason is None else str(reason)


@dataclass(frozen=True)
class Task:
    """What a measuring function gets: the trainings by name, and its options."""

    folder: Path
    trainings: Mapping[str, Training]
    options: Mapping[str, Any]
    seed: int

    def run(self, name: str) -> LoadedRun:
        """A finished training, from its folder."""
        return load_run(self.folder / self.trainings[name].run)

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

    stage = "measurements"

    @property
    def label(self) -> str:
        return f"{self.data} · {self.row} · seed {self.seed}"

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

    def work(self, folder: Path, progress: Progress) -> None:
        started = time.perf_counter()
        reasons = [t.diverged(folder) for t in self.trainings.values()]
        meta: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "row": self.row, "data": self.data, "seed": self.seed}
        meta |= {"trainings": {name: t.run for name, t in self.trainings.items()}, "options": dict(self.options)}
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


def finish(pieces: Sequence[Training] | Sequence[Measurement], folder: Path, *, jobs: int, on_event: Event) -> None:
    """Do what is not done yet, each piece once; a training continues from the last checkpoint of a killed one.

    Events and errors as in :func:`mmc_fast.experiments.compare.grid.run_grid`.
    """
    unique: dict[str, Training | Measurement] = {piece.path: piece for piece in pieces}
    finish_units(list(unique.values()), folder, jobs, on_event, _work)


def _work(job: Job, emit: Emit) -> None:
    work_on(job, emit, lambda progress: job.unit.work(job.folder, progress))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_+" else "_" for c in name)
