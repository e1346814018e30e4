"""Jobs: a function of plain settings whose result is one file. Demo, comparison and the paper's experiments run them.

A finished job is never repeated: the file's name holds a hash of function and settings. Several processes, also on several
machines that share the folder, may work on the same jobs.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from typing_extensions import TypedDict

from mmc_fast import __version__
from mmc_fast._util.atomic import save_errors, write_npz
from mmc_fast._util.documents import Count0, Finite, parse_json
from mmc_fast._util.files import check_tree
from mmc_fast._util.lock import FolderLock
from mmc_fast.errors import InputError

from .data.archive import Archive
from .manifest import MANIFEST, Manifest
from .pool import Emit, run_pool
from .training import Progress, TrainingDiverged
from .training.progress import Silent

SCHEMA_VERSION = 2
_WAIT = 1.0  # seconds between looks at jobs that another process holds

ADVICE = "remove it and repeat the command"
Values = dict[str, Any]
Event = Callable[[tuple[str, "Job", Any]], None]
"""Gets ("plan", job, n) with the number of jobs that are left of a stage, ("start", job, epochs), ("epoch", job, record)
and ("done", job, None)."""


class _Stored(TypedDict):
    schema_version: Literal[2]
    settings: dict[str, Any]
    values: dict[str, Any]
    failed: str | None
    seconds: Finite
    threads: Count0


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


def read(path: Path, settings: Mapping[str, Any] | None = None) -> Result:
    """The result in a file, checked against the manifest above it. ``settings``: of the job whose result it must be.

    Raises InputError where it is no whole result, or that of another job.
    """
    if not os.path.lexists(path):
        raise InputError(f"result {path} cannot be read (there is no such file); give a file that a command wrote")
    manifest = Manifest.above(path, advice=ADVICE)
    if manifest is None:
        raise InputError(f"result {path} has no {MANIFEST} above it; give a file in the folder that a command wrote")
    return _read(path, manifest, settings)


def _read(path: Path, manifest: Manifest, settings: Mapping[str, Any] | None) -> Result:
    archive = Archive(manifest.check(path))
    if "meta" not in archive or archive.header("meta").dtype.kind != "U" or archive.header("meta").shape:
        raise InputError(f"{path} is not a whole result; {ADVICE}")
    found: _Stored = parse_json(str(archive.read("meta")), _Stored, str(path), ADVICE)
    if settings is not None and found["settings"] != json.loads(json.dumps(dict(settings))):
        raise InputError(f"{path} is the result of another job (its settings are others); {ADVICE}")
    arrays = {name: archive.read(name) for name in archive if name != "meta"}
    return Result(found["settings"], found["values"], arrays, found["failed"], found["seconds"], found["threads"])


def finish(jobs: Sequence[Job], folder: Path, *, workers: int, on_event: Event) -> list[Result]:
    """Work until every job's file is there; the results in the order of ``jobs``. A listed file that is gone is made again.

    Raises Interrupted after Ctrl-C; jobs in progress are continued or repeated by the next call.
    """
    manifest = own_folder(folder, "jobs") if not (folder / MANIFEST).exists() else _manifest(folder)
    for path in {job.path for job in jobs}:
        if path in manifest and not os.path.lexists(folder / path):
            warnings.warn(f"{folder / path} is missing; it is computed again", stacklevel=2)
    left = [job for path, job in {job.path: job for job in jobs}.items() if not _done(manifest, path)]
    if jobs:
        on_event(("plan", jobs[0], len(left)))
    while left:
        run_pool([(job, folder) for job in left], _work, workers=workers, on_event=on_event)
        left = [job for job in left if not _done(_manifest(folder), job.path)]
        while left and not any(_free(folder, job) for job in left):
            time.sleep(_WAIT)
    manifest = _manifest(folder)
    return [_read(folder / job.path, manifest, job.settings) for job in jobs]


def _manifest(folder: Path) -> Manifest:
    return Manifest.read(folder, advice=ADVICE, shared=True)


def _done(manifest: Manifest, path: str) -> bool:
    """Whether a result is there; one that is not listed was being written when its process was killed."""
    return path in manifest and os.path.lexists(manifest.folder / path)


@contextmanager
def claimed(folder: Path, job: Job) -> Iterator[bool]:
    """Whether this process may run the job now; the claim ends with the block, or with the process."""
    path = folder / f"{job.own}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(path, job.name)
    if not lock.try_acquire():
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def own_folder(out: Path, kind: str) -> Manifest:
    """Make the folder of a ``kind``, or take over one that an earlier call has made; returns its manifest.

    Raises InputError where ``out`` is a file, holds something else, or holds links, FIFOs or devices.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder with --out")
    begun = os.path.lexists(out / MANIFEST)
    if begun:
        check_tree(out)
        return Manifest.read(out, kind, advice=ADVICE, shared=True)
    # A kill during the very first write leaves its temporary file.
    if out.is_dir() and any(not p.name.startswith(f".{MANIFEST}.") for p in out.iterdir()):
        raise InputError(f"{out} exists and holds no {kind}; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    return Manifest.begin(out, kind, {"schema_version": SCHEMA_VERSION}, advice=ADVICE, shared=True)


def _work(item: tuple[Job, Path], emit: Emit) -> None:
    """Run one job, unless its file is there or somebody else is at it."""
    job, folder = item
    path, manifest = folder / job.path, _manifest(folder)
    if not _done(manifest, job.path):
        with claimed(folder, job) as mine:
            if mine and not _done(_manifest(folder), job.path):
                _write(path, perform(job, folder, _Progress(job, emit)), manifest)
    if _done(_manifest(folder), job.path):
        emit(("done", job, None))


def _write(path: Path, result: Result, manifest: Manifest) -> None:
    meta = {name: value for name, value in vars(result).items() if name != "arrays"}
    meta |= {"schema_version": SCHEMA_VERSION, "mmc_fast_version": __version__, "torch": torch.__version__}
    with save_errors(path, lambda: f"finished results are in {manifest.folder}"):
        manifest.alive()
        write_npz(path, {**result.arrays, "meta": np.array(json.dumps(meta, allow_nan=False))})
    manifest.add([path])


def _free(folder: Path, job: Job) -> bool:
    """Whether there is something to do about a job: it is finished by now, or nobody holds it."""
    if _done(_manifest(folder), job.path):
        return True
    with claimed(folder, job) as mine:
        return mine


class _Progress(Silent):
    def __init__(self, job: Job, emit: Emit) -> None:
        self.job, self.emit = job, emit

    def on_start(self, total_epochs: int, label: str) -> None:
        self.emit(("start", self.job, total_epochs))

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.emit(("epoch", self.job, record))


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)
