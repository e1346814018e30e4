"""The grid: which cells there are, working through them with several processes, and choosing settings by search."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmc_fast._util.atomic import write_json
from mmc_fast._util.numbers import check_seed
from mmc_fast.errors import InputError

from ..training import Progress
from ..training.parts import fingerprint
from ..training.pool import Emit, run_jobs
from .cells import Cell, Unit, claimed, compute, mean_missing, read_cell, write_cell
from .rows import Row, Source, load_source

__all__ = ["Event", "Grid", "Job", "check_once", "finish", "run_grid", "work_on"]

SEARCH_SEED = 900  # of the trainings that only choose settings
_WAIT = 1.0  # seconds between looks at cells that another process holds


@dataclass(frozen=True)
class Grid:
    """Rows x data x seeds. ``changes``: settings of the budget for all data. ``tune``: where settings come from.

    "auto": the stored choice of a row, else a search; "always": a search; "never": the stored choice, else the first
    candidate.
    """

    rows: Sequence[Row]
    sources: Sequence[Source]
    seeds: Sequence[int]
    changes: Mapping[str, Any] = field(default_factory=dict)
    tune: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        check_once("methods", [row.name for row in self.rows])
        check_once("data", [source.name for source in self.sources])
        object.__setattr__(self, "seeds", [check_seed(seed) for seed in self.seeds])
        check_once("seeds", self.seeds)
        for source in self.sources:  # refuse settings that do not fit each other before any data are looked for
            budget = source.budget_with(self.changes)
            for row in self.rows:
                for settings in (*self.candidates(row), *row.chosen.values()):
                    row.resolve(settings, budget)

    def searched(self, row: Row, source: Source) -> bool:
        """Whether the settings of this row on these data are searched for."""
        return self.tune == "always" or (self.tune == "auto" and source.name not in row.chosen)

    def candidates(self, row: Row) -> Sequence[Mapping[str, Any]]:
        return row.plugin.search

    def cell(self, row: Row, source: Source, settings: Mapping[str, Any], part: str, seed: int, print_: str) -> Cell:
        config, options = row.resolve(settings, source.budget_with(self.changes))
        return Cell(row.name, row.method, source.name, source.key, print_, part, seed, config.to_dict(), options)


def check_once(what: str, names: Sequence[Any]) -> None:
    """Raise InputError where there is no name, or one of them twice."""
    if not names or len(set(names)) < len(names):
        raise InputError(f"compare: {what} is {list(names)}; name at least one, and each once")


Event = Callable[[tuple[str, Unit, Any]], None]


def run_grid(grid: Grid, folder: Path, *, jobs: int, on_event: Event) -> tuple[dict[tuple[str, str], Any], list[Cell]]:
    """Finish every cell; returns the settings by (row, data) and the test cells.

    Finished cells are taken over. Events: ("plan", None, n) with the number of cells that are left of a stage,
    ("epoch", cell, record), ("done", cell, None). Raises Interrupted after Ctrl-C; cells in progress are repeated later.
    """
    prints = {source.name: fingerprint(load_source(source.key)) for source in grid.sources}
    tried = {
        (row.name, source.name): [
            grid.cell(row, source, settings, "validation", SEARCH_SEED, prints[source.name])
            for settings in grid.candidates(row)
        ]
        for source in grid.sources
        for row in grid.rows
        if grid.searched(row, source)
    }
    finish([cell for cells in tried.values() for cell in cells], folder, jobs, on_event)
    settings = {}
    for source in grid.sources:
        for row in grid.rows:
            pair = (row.name, source.name)
            if pair in tried:
                settings[pair] = _choose(grid, row, source, tried[pair], folder)
            else:
                settings[pair] = row.chosen.get(source.name, grid.candidates(row)[0])
    cells = [
        grid.cell(row, source, settings[row.name, source.name], "test", seed, prints[source.name])
        for seed in grid.seeds
        for source in grid.sources
        for row in grid.rows
    ]
    finish(cells, folder, jobs, on_event)
    return settings, cells


def _choose(grid: Grid, row: Row, source: Source, cells: Sequence[Cell], folder: Path) -> Mapping[str, Any]:
    """The candidate with the best mean of complete and masked validation scores; the first of equals. Kept on disk."""
    values: list[float | None] = []
    for cell in cells:
        found = read_cell(folder / cell.path)[0]["scores"]
        if found is None:
            values.append(None)
            continue
        complete, missing = found["complete"]["score"], mean_missing(found)
        values.append(complete if missing is None else (complete + missing) / 2)
    usable = [v for v in values if v is not None]
    if not usable:
        raise InputError(
            f"{row.name} on {source.name}: every candidate of the search diverged; give a row with a smaller lr "
            "among its settings (a TOML file)"
        )
    best = values.index(max(usable))
    chosen = grid.candidates(row)[best]
    record = {"row": row.name, "data": source.name, "seed": SEARCH_SEED, "part": "validation", "chosen": dict(chosen)}
    record["candidates"] = [
        {"settings": dict(s), "score": v, "cell": c.path}
        for s, v, c in zip(grid.candidates(row), values, cells, strict=True)
    ]
    path = folder / "choices" / f"{source.name}-{row.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(record)):
        write_json(path, record)
    return chosen


@dataclass(frozen=True)
class Job:
    """One unit of work of a folder, for a worker process."""

    unit: Any
    folder: Path


class _Events:
    def __init__(self, unit: Unit, emit: Emit) -> None:
        self.unit, self.emit = unit, emit

    def on_start(self, total_epochs: int, label: str) -> None:
        self.emit(("start", self.unit, total_epochs))

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.emit(("epoch", self.unit, record))

    def on_end(self, results: dict[str, Any]) -> None:
        pass


def work_on(job: Job, emit: Emit, make: Callable[[Progress], None]) -> None:
    """Call ``make``, which writes the unit's file, unless the file is there or somebody else is at it."""
    path = job.folder / job.unit.path
    if not path.is_file():
        with claimed(job.folder, job.unit) as mine:
            if mine and not path.is_file():
                make(_Events(job.unit, emit))
    if path.is_file():
        emit(("done", job.unit, None))


def _work(job: Job, emit: Emit) -> None:
    """Compute one cell."""

    def make(progress: Progress) -> None:
        write_cell(job.folder, job.unit, compute(job.unit, load_source(job.unit.source), progress))

    work_on(job, emit, make)


def finish(
    units: Sequence[Unit], folder: Path, jobs: int, on_event: Event, work: Callable[[Job, Emit], None] = _work
) -> None:
    """Work until every unit's file is there; several processes may share the folder.

    ``work`` is a function of a module that calls :func:`work_on`; by itself the one for cells.
    """
    left = [unit for unit in units if not (folder / unit.path).is_file()]
    if units:
        on_event(("plan", units[0], len(left)))
    while left:
        run_jobs([Job(unit, folder) for unit in left], work, workers=jobs, on_event=on_event)
        left = [unit for unit in left if not (folder / unit.path).is_file()]
        while left and not any(_free(folder, unit) for unit in left):
            time.sleep(_WAIT)


def _free(folder: Path, unit: Unit) -> bool:
    """Whether there is something to do about a unit: it is finished by now, or nobody holds it."""
    if (folder / unit.path).is_file():
        return True
    with claimed(folder, unit) as mine:
        return mine
