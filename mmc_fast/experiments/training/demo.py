"""The demo's runs: all presets on the embedded data sets with several seeds, in parallel and resumable.

One job is one data set and one seed; its methods share the unimodal models. Every run has a folder of its own, so an
interrupted demo continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmc_fast._util.names import choose
from mmc_fast.errors import InputError

from ..data import load
from .config import PRESETS, TrainConfig
from .loop import train
from .pool import Emit, run_jobs
from .runfolder import RunFolder, load_predictions
from .unimodal import UnimodalModels

__all__ = ["DATASETS", "DemoPlan", "DemoProgress", "DemoRun", "demo_config", "load_demo_run", "run_demo"]

DATASETS = ("mfeat", "support2")

# Rough relative times, for the remaining time on the screen only. Vanilla comes first and trains the unimodal models;
# EBR trains its λ = 0 control as well.
_COST_METHOD = {"vanilla": 2.0, "dropout": 1.0, "kd": 2.0, "ebr": 10.0, "robust": 15.0}
_COST_DATA = {"mfeat": 1.0, "support2": 2.6}


@dataclass(frozen=True)
class DemoPlan:
    """What the demo runs; ``methods`` are presets of ``TrainConfig``.

    With ``quick`` it is a smoke test whose numbers mean nothing.
    """

    datasets: tuple[str, ...] = DATASETS
    methods: tuple[str, ...] = PRESETS
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 40
    quick: bool = False

    @classmethod
    def smoke(cls) -> DemoPlan:
        """Two epochs and one seed."""
        return cls(seeds=(0,), epochs=2, quick=True)

    def __post_init__(self) -> None:
        if not self.datasets or not self.methods or not self.seeds:
            raise InputError("demo: give at least one data set, one method and one seed")
        for method in self.methods:
            choose("demo method", method, PRESETS)
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"demo: seeds are {list(self.seeds)}; name each once")

    @property
    def runs(self) -> list[DemoRun]:
        """All runs: by data set, then method, then seed."""
        return [DemoRun(d, m, s) for d in self.datasets for m in self.methods for s in self.seeds]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


@dataclass(frozen=True)
class DemoRun:
    """One run of the demo."""

    dataset: str
    method: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.dataset}-{self.method}-{self.seed}"


class DemoProgress(Protocol):
    """What the demo tells its caller: the relative cost of every run, then the epochs of all stages of each run."""

    def on_plan(self, costs: Mapping[DemoRun, float]) -> None: ...

    def on_start(self, run: DemoRun, epochs: int) -> None: ...

    def on_epoch(self, run: DemoRun, record: dict[str, Any]) -> None: ...

    def on_end(self, run: DemoRun) -> None: ...


def demo_config(plan: DemoPlan, method: str) -> TrainConfig:
    """Settings of one method: its small preset. Checkpoints are written at the end and on Ctrl-C."""
    config = TrainConfig.preset(method, epochs=plan.epochs, checkpoint_every=plan.epochs, keep_checkpoints=1)
    if plan.quick and config.kd is not None:
        config = replace(config, kd=replace(config.kd, epochs=1))
    return config


def run_demo(plan: DemoPlan, folder: Path, progress: DemoProgress, *, workers: int = 1) -> None:
    """Run ``plan``, one folder per run below ``folder``; what is there already is continued or taken over.

    Raises ``Interrupted`` after Ctrl-C, when every run in progress has saved its state, and ``InputError`` for a folder
    with runs of other settings.
    """
    # Names sort the longer job last; starting with it leaves no long job for the end.
    jobs = [_Job(plan, dataset, seed, folder) for dataset in sorted(plan.datasets, reverse=True) for seed in plan.seeds]
    folder.mkdir(parents=True, exist_ok=True)
    progress.on_plan({run: _COST_METHOD[run.method] * _COST_DATA.get(run.dataset, 1.0) for run in plan.runs})

    def on_event(event: tuple[str, DemoRun, Any]) -> None:
        kind, run, value = event
        if kind == "start":
            progress.on_start(run, value)
        elif kind == "epoch":
            progress.on_epoch(run, value)
        else:
            progress.on_end(run)

    run_jobs(jobs, _run_job, workers=workers, on_event=on_event)


def load_demo_run(folder: Path, run: DemoRun) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Results and test predictions of a finished run.

    The results carry the preset, which tells two forms of one method apart. The predictions hold "labels" [N] and
    class probabilities [N, C] per condition: "complete", "missing_0.1", ….
    """
    path = folder / run.folder
    test = load_predictions(path)["test"]
    arrays = {"labels": test.labels.numpy()} | {name: p.numpy() for name, p in test.probabilities.items()}
    return RunFolder(path).results() | {"preset": run.method}, arrays


@dataclass(frozen=True)
class _Job:
    plan: DemoPlan
    dataset: str
    seed: int
    folder: Path


class _RunEvents:
    """Passes what a run reports on, with the run's name, less the parts that a progress display does not need."""

    def __init__(self, run: DemoRun, emit: Emit) -> None:
        self.run, self.emit = run, emit

    def on_start(self, total_epochs: int, label: str) -> None:
        self.emit(("start", self.run, total_epochs))

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.emit(("epoch", self.run, record))

    def on_end(self, results: dict[str, Any]) -> None:
        pass


def _run_job(job: _Job, emit: Emit) -> None:
    dataset = load(job.dataset)
    unimodal: UnimodalModels | None = None
    for method in job.plan.methods:
        run = DemoRun(job.dataset, method, job.seed)
        path = job.folder / run.folder
        config = demo_config(job.plan, method)
        started = (path / "run.json").is_file()
        result = train(
            dataset,
            config,
            seed=job.seed,
            run_dir=path,
            resume=started,
            unimodal=unimodal,
            progress=_RunEvents(run, emit),
        )
        unimodal = unimodal or result.unimodal
        emit(("end", run, None))
