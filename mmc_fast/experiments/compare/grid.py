"""The grid: method configs x data x seeds as jobs, and the search of hyper-parameters on validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmc_fast._util.atomic import write_json
from mmc_fast._util.numbers import check_seed
from mmc_fast.errors import InputError

from ..jobs import ADVICE, Event, Job, Result, finish
from ..manifest import Manifest
from ..methods import METHODS
from .configs import DataConfig, MethodConfig, kind_of
from .runs import check_cell, mean_missing, score, settings_of

SEARCH_SEED = 900  # of the trainings that only select hyper-parameters
Tune = Literal["auto", "always", "never"]


class Run(NamedTuple):
    """One finished training of a method config on a data config."""

    method: str
    data: str
    seed: int
    job: Job
    result: Result


class Finished(NamedTuple):
    """Selected hyper-parameters by (method config, data config), and the test runs."""

    selected: dict[tuple[str, str], Mapping[str, Any]]
    runs: list[Run]


@dataclass(frozen=True)
class Grid:
    """``changes``: of the budget for all data. ``tune``: where hyper-parameters come from.

    "auto": the stored selection of a method config, else a search; "always": a search; "never": the stored selection, else
    the first candidate.
    """

    methods: Sequence[MethodConfig]
    data: Sequence[DataConfig]
    seeds: Sequence[int]
    changes: Mapping[str, Any] = field(default_factory=dict)
    tune: Tune = "auto"

    def __post_init__(self) -> None:
        check_once("methods", [m.name for m in self.methods])
        check_once("data", [d.name for d in self.data])
        object.__setattr__(self, "seeds", [check_seed(seed) for seed in self.seeds])
        check_once("seeds", self.seeds)
        if SEARCH_SEED in self.seeds:
            raise InputError(f"compare: seed {SEARCH_SEED} is that of the search of hyper-parameters; give other seeds")
        for data in self.data:  # refuse settings that do not fit each other before any data are looked for
            budget = data.budget_with(self.changes)
            for method in self.methods:
                for settings in (*method.plugin.search, *method.selected.values()):
                    method.resolve(settings, budget)

    def searched(self, method: MethodConfig, data: DataConfig) -> bool:
        """Whether the hyper-parameters of this method on these data are searched for."""
        return self.tune == "always" or (self.tune == "auto" and data.name not in method.selected)

    def job(self, method: MethodConfig, data: DataConfig, settings: Mapping[str, Any], part: str, seed: int) -> Job:
        """The training of a method with these hyper-parameters."""
        config, options = method.resolve(settings, data.budget_with(self.changes))
        everything = settings_of(data, seed, config, method=method.method, options=options, part=part)
        folder = "runs" if part == "test" else "search"
        return Job(f"{folder}/{data.name}/{method.name}-{seed}", score, everything, stage=folder)


def check_once(what: str, names: Sequence[Any]) -> None:
    """Raise InputError where there is no name, or one of them twice."""
    if not names or len(set(names)) < len(names):
        raise InputError(f"compare: {what} is {list(names)}; name at least one, and each once")


def not_for(methods: Sequence[MethodConfig], data: Sequence[DataConfig]) -> dict[str, str]:
    """The methods that cannot be trained on all of the data -> why not."""
    other = next((d for d in data if kind_of(d.key) != "classification"), None)
    if other is None:
        return {}
    reason = f"it is for classes, and {other.name} holds a task of {kind_of(other.key)}"
    return {m.name: reason for m in methods if m.plugin.classes_only}


def run_grid(grid: Grid, folder: Path, *, workers: int, on_event: Event) -> Finished:
    """Finish every run; what is finished is taken over. Events and errors as in :func:`mmc_fast.experiments.jobs.finish`.

    A method that a task refuses is refused before anything is trained.
    """
    if refused := not_for(grid.methods, grid.data):
        name, reason = next(iter(refused.items()))
        able = [m.name for m in grid.methods if m.name not in refused]
        able = able or [m for m, plugin in METHODS.items() if not plugin.classes_only]
        raise InputError(f"compare: method {name} cannot be trained here: {reason}; give --methods {','.join(able)}")
    tried = {
        (method.name, data.name): [grid.job(method, data, s, "validation", SEARCH_SEED) for s in method.plugin.search]
        for data in grid.data
        for method in grid.methods
        if grid.searched(method, data)
    }
    candidates = [job for jobs in tried.values() for job in jobs]
    searched = finish(candidates, folder, workers=workers, on_event=on_event)
    for job, result in zip(candidates, searched, strict=True):
        check_cell(folder / job.path, result)
    found = {job.path: result for job, result in zip(candidates, searched, strict=True)}
    selected = {}
    for data in grid.data:
        for method in grid.methods:
            pair = (method.name, data.name)
            if pair in tried:
                selected[pair] = _select(method, data, [(job.path, found[job.path]) for job in tried[pair]], folder)
            else:
                selected[pair] = method.selected.get(data.name, method.plugin.search[0])
    named = [
        (method.name, data.name, seed, grid.job(method, data, selected[method.name, data.name], "test", seed))
        for seed in grid.seeds
        for data in grid.data
        for method in grid.methods
    ]
    results = finish([job for *_, job in named], folder, workers=workers, on_event=on_event)
    for (*_, job), result in zip(named, results, strict=True):
        check_cell(folder / job.path, result)
    return Finished(selected, [Run(*name, result) for name, result in zip(named, results, strict=True)])


def _select(
    method: MethodConfig, data: DataConfig, results: Sequence[tuple[str, Result]], folder: Path
) -> Mapping[str, Any]:
    """The candidate with the best mean of complete and masked validation scores; the first of equals. Kept on disk."""
    values = [None if r.failed else _validation_score(r.values["scores"]) for _, r in results]
    usable = [v for v in values if v is not None]
    if not usable:
        raise InputError(
            f"{method.name} on {data.name}: every candidate of the search diverged; give a method config with a smaller lr (a TOML file)"
        )
    candidates = method.plugin.search
    selected = candidates[values.index(max(usable))]
    record = {"method": method.name, "data": data.name, "seed": SEARCH_SEED, "part": "validation"}
    record["selected"] = dict(selected)
    record["candidates"] = [
        {"settings": dict(s), "score": v, "file": path}
        for s, v, (path, _) in zip(candidates, values, results, strict=True)
    ]
    path = folder / "selected" / f"{data.name}-{method.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    Manifest.read(folder, advice=ADVICE, shared=True).add([path])
    return selected


def _validation_score(found: Mapping[str, Mapping[str, float]]) -> float:
    complete, missing = found["complete"]["score"], mean_missing(found)
    return complete if missing is None else (complete + missing) / 2
