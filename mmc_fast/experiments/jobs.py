"""Jobs: a function of plain settings whose result is one file. Demo, comparison and the paper's experiments run them.

A finished job is never repeated: the file's name holds a hash of function and settings. Several processes, also on several
machines that share the folder, may work on the same jobs.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from mmc_fast import __version__
from mmc_fast._util.atomic import save_errors, write_json, write_npz
from mmc_fast.errors import InputError

from .pool import Emit, run_pool
from .training import Progress, TrainingDiverged

__all__ = ["Event", "Job", "Result", "Values", "Workspace", "claimed", "finish", "own_folder", "perform", "read"]

SCHEMA_VERSION = 2
_WAIT = 1.0  # seconds between looks at jobs that another process holds

Values = dict[str, Any]
Event = Callable[[tuple[str, "Job", Any]], None]
"""Gets ("plan", job, n) with the number of jobs that are left of a stage, ("start", job, epochs), ("epoch", job, record)
and ("done", job, None)."""


@dataclass(frozen=True)
class Workspace:
    """Where a job runs. ``folder``: of all jobs; ``own``: a folder for this job alone, which it may make."""

    folder: Path
    own: Path
    progress: Progress | None = None


@dataclass(frozen=True)
class Job:
    """``function(settings, workspace)`` gives JSON values and arrays.

    ``function`` is one of a module, so that a worker can be told its name. ``settings``: plain JSON values, everything that
    the result depends on. ``name``: path within the folder for people to read; it is not part of the key.
    """

    name: str
    function: Callable[[Mapping[str, Any], Workspace], tuple[Values, dict[str, np.ndarray]]]
    settings: Mapping[str, Any]
    stage: str = "runs"

    @property
    def key(self) -> str:
        """12 digits of the SHA-256 over function and settings."""
        what = [SCHEMA_VERSION, self.function.__module__, self.function.__qualname__, dict(self.settings)]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def own(self) -> str:
        """The job's own folder, relative to that of all jobs."""
        return "/".join(map(_plain, self.name.split("/"))) + f"-{self.key}"

    @property
    def path(self) -> str:
        """The file of the result, relative to the folder."""
        return f"{self.own}.npz"


@dataclass(frozen=True)
class Result:
    """What a job left. ``failed``: why there are no values (a run that diverged), else None."""

    settings: Mapping[str, Any]
    values: Values
    arrays: Mapping[str, np.ndarray]
    failed: str | None
    seconds: float
    threads: int


def perform(job: Job, folder: Path, progress: Progress | None = None) -> Result:
    """Run the job's function here and now; a diverged training is a result, nothing is written."""
    started = time.perf_counter()
    values: Values = {}
    arrays: dict[str, np.ndarray] = {}
    failed = None
    try:
        values, arrays = job.function(job.settings, Workspace(folder, folder / job.own, progress))
    except TrainingDiverged as error:
        failed = " ".join(str(error).split())
    except InputError as error:
        raise InputError(f"{job.name}: {error}") from error
    return Result(job.settings, values, arrays, failed, time.perf_counter() - started, torch.get_num_threads())


def read(path: Path) -> Result:
    """The result in a file. Raises InputError where it is no whole result."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))
        version, names = meta["schema_version"], ("settings", "values", "failed", "seconds", "threads")
        settings, values, failed, seconds, threads = (meta[name] for name in names)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a whole result"
        raise InputError(f"result {path} cannot be read ({reason}); remove it and repeat the command") from error
    if version != SCHEMA_VERSION:
        raise InputError(f"result {path} has schema {version}, not {SCHEMA_VERSION}; remove it and repeat the command")
    return Result(settings, values, arrays, failed, seconds, threads)


def finish(jobs: Sequence[Job], folder: Path, *, workers: int, on_event: Event) -> list[Result]:
    """Work until every job's file is there; the results in the order of ``jobs``.

    Raises Interrupted after Ctrl-C; jobs in progress are continued or repeated by the next call.
    """
    left = [job for path, job in {job.path: job for job in jobs}.items() if not (folder / path).is_file()]
    if jobs:
        on_event(("plan", jobs[0], len(left)))
    while left:
        run_pool([(job, folder) for job in left], _work, workers=workers, on_event=on_event)
        left = [job for job in left if not (folder / job.path).is_file()]
        while left and not any(_free(folder, job) for job in left):
            time.sleep(_WAIT)
    return [read(folder / job.path) for job in jobs]


@contextmanager
def claimed(folder: Path, job: Job) -> Iterator[bool]:
    """Whether this process may run the job now; the claim ends with the block, or with the process."""
    path = folder / f"{job.own}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def own_folder(out: Path, kind: str) -> None:
    """Make the folder, or take over one that an earlier call marked as a ``kind``.

    Raises InputError where ``out`` is a file or holds something else.
    """
    mark = out / f"{kind}.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not mark.is_file():
        raise InputError(f"{out} exists and holds no {kind}; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    if not mark.is_file():
        write_json(mark, {"kind": kind, "schema_version": SCHEMA_VERSION})


def _work(item: tuple[Job, Path], emit: Emit) -> None:
    """Run one job, unless its file is there or somebody else is at it."""
    job, folder = item
    path = folder / job.path
    if not path.is_file():
        with claimed(folder, job) as mine:
            if mine and not path.is_file():
                _write(path, perform(job, folder, _Progress(job, emit)), folder)
    if path.is_file():
        emit(("done", job, None))


def _write(path: Path, result: Result, folder: Path) -> None:
    meta = {name: value for name, value in vars(result).items() if name != "arrays"}
    meta |= {"schema_version": SCHEMA_VERSION, "mmc_fast_version": __version__, "torch": torch.__version__}
    with save_errors(path, lambda: f"finished results are in {folder}"):
        write_npz(path, {**result.arrays, "meta": np.array(json.dumps(meta, allow_nan=False))})


def _free(folder: Path, job: Job) -> bool:
    """Whether there is something to do about a job: it is finished by now, or nobody holds it."""
    if (folder / job.path).is_file():
        return True
    with claimed(folder, job) as mine:
        return mine


class _Progress:
    def __init__(self, job: Job, emit: Emit) -> None:
        self.job, self.emit = job, emit

    def on_start(self, total_epochs: int, label: str) -> None:
        self.emit(("start", self.job, total_epochs))

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.emit(("epoch", self.job, record))

    def on_end(self, results: dict[str, Any]) -> None:
        pass


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)
