"""A cell of the grid: one training of one row on one data source with one seed, in a file of its own."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmc_fast import __version__
from mmc_fast._util.atomic import save_errors, write_npz
from mmc_fast.errors import InputError

from ..data import MultimodalDataset
from ..methods import BATCH_ROWS, Task, get
from ..training import Progress, TrainConfig, TrainingDiverged
from ..training.evaluate import hidden_column, masks_at
from ..training.lock import FolderLock
from ..training.metrics import scores
from ..training.parts import fingerprint
from .rows import load_source

__all__ = ["SCHEMA_VERSION", "Cell", "Unit", "claimed", "compute", "plain_name", "read_cell", "recompute", "write_cell"]

SCHEMA_VERSION = 1


class Unit(Protocol):
    """A piece of work whose result is one file: ``path`` within the folder, ``label`` and ``stage`` for the display."""

    @property
    def path(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def stage(self) -> str: ...


@dataclass(frozen=True)
class Cell:
    """What identifies a cell: everything that its numbers depend on, in plain values.

    ``part``: "test", or "validation" for a candidate of the search. ``source``: :attr:`Source.key`. ``fingerprint``: of
    the data. ``config``, ``options``: every setting.
    """

    row: str
    method: str
    data: str
    source: str
    fingerprint: str
    part: str
    seed: int
    config: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """12 digits of the SHA-256 over all of it but the name of the row."""
        values = asdict(self) | {"row": None, "schema": SCHEMA_VERSION}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def path(self) -> str:
        """File of the cell within a grid's folder."""
        folder = "cells" if self.part == "test" else "search"
        return f"{folder}/{plain_name(self.data)}/{plain_name(self.row)}-{self.seed}-{self.key}.npz"

    @property
    def label(self) -> str:
        return f"{self.data} · {self.row} · seed {self.seed}"

    @property
    def stage(self) -> str:
        return "test cells" if self.part == "test" else "search"


def plain_name(name: str) -> str:
    """A name as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)


def compute(cell: Cell, dataset: MultimodalDataset, progress: Progress | None = None) -> dict[str, np.ndarray]:
    """Train and score; the arrays of the file.

    "meta" is JSON text with the cell, its scores and facts about the training; "labels", "index" and class
    probabilities by condition ("complete", "missing_0.3", ...) are there for test cells. A run that diverges is a result
    with "diverged" set and no scores.
    """
    started = time.perf_counter()
    method, config = get(cell.method), TrainConfig.from_dict(cell.config)
    meta: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "mmc_fast_version": __version__, "cell": asdict(cell)}
    meta |= {"metric": dataset.metric, "batch_rows": BATCH_ROWS if method.batch_dependent else None}
    meta |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "diverged": None, "scores": None}
    arrays: dict[str, np.ndarray] = {}
    try:
        fitted = method.fitter(Task(dataset, config, cell.options, cell.seed, progress))
    except TrainingDiverged as error:
        meta["diverged"] = " ".join(str(error).split())
    except InputError as error:
        raise InputError(f"{cell.row} on {cell.data}: {error}") from error
    else:
        part = dataset.part(cell.part)
        answers: dict[str, Tensor] = {"complete": fitted.predict(part.features, part.present)}
        realised: dict[str, list[float]] = {}
        column = hidden_column(dataset, config.rates_modality)
        for rate in config.rates:
            present, realised[f"missing_{rate:g}"] = masks_at(part.present, rate, cell.seed, cell.part, column)
            answers[f"missing_{rate:g}"] = fitted.predict(part.features, present)
        meta["scores"] = {name: scores(p, part.labels, dataset.metric) for name, p in answers.items()}
        meta |= {"realised": realised, "training": fitted.record}
        if cell.part == "test":
            arrays = {name: p.numpy() for name, p in answers.items()}
            arrays |= {"labels": part.labels.numpy(), "index": part.index.numpy()}
    meta["seconds"] = time.perf_counter() - started
    return arrays | {"meta": np.array(json.dumps(meta))}


def write_cell(folder: Path, cell: Cell, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the file in one step. Raises SaveFailed where it cannot be written."""
    path = folder / cell.path
    with save_errors(path, lambda: f"finished cells are in {folder}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, arrays)


def read_cell(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """ "meta" and the other arrays of a file. Raises InputError where it is no cell."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a whole cell"
        raise InputError(f"cell {path} cannot be read ({reason}); remove it and repeat the comparison") from error
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"cell {path} has schema {meta.get('schema_version')}, not {SCHEMA_VERSION}; remove it")
    return meta, arrays


def recompute(path: Path) -> list[str]:
    """Repeat a finished cell from its stored settings; the names of what is different (empty: the same numbers)."""
    meta, stored = read_cell(path)
    cell = Cell(**meta["cell"])
    dataset = load_source(cell.source)
    if fingerprint(dataset) != cell.fingerprint:
        raise InputError(f"cell {path}: its data {cell.data} have changed since")
    threads = torch.get_num_threads()
    torch.set_num_threads(meta["threads"])
    try:
        again = compute(cell, dataset)
    finally:
        torch.set_num_threads(threads)
    found = json.loads(str(again.pop("meta")))
    different = [name for name in ("scores", "diverged") if found[name] != meta[name]]
    return different + [n for n in sorted(stored.keys() | again.keys()) if not _same(stored.get(n), again.get(n))]


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


@contextmanager
def claimed(folder: Path, cell: Unit) -> Iterator[bool]:
    """Whether this process may compute the unit now; the claim ends with the block, or with the process.

    The lock is the system's (``flock``): one that a dead process left behind is free.
    """
    path = (folder / cell.path).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(path, f"cell {path.stem}")
    try:
        lock.acquire()
    except InputError:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def mean_missing(found: Mapping[str, Mapping[str, float]], key: str = "score") -> float | None:
    """Mean over the missing rates of a cell's scores; None without rates."""
    values = [s[key] for name, s in found.items() if name != "complete"]
    return statistics.fmean(values) if values else None
