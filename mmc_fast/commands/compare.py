"""``mmc-fast compare``: rows and data by name or file, the grid, tables in every form."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

from .. import __version__
from ..comparison.cells import Cell, recompute
from ..comparison.grid import Grid, run_grid
from ..comparison.output import TEST_COLUMNS, score_rows, tested_rows, write_outputs
from ..comparison.rows import Row, Source, configs_folder
from ..comparison.table import Findings, find
from ..data.names import unknown
from ..errors import InputError
from ..methods import METHODS
from ..training.atomic import write_json
from ..training.pool import check_workers
from .settings import read_toml
from .terminal import Countdown, _Bars, describe_epoch, error_console, print_table

__all__ = ["check_cell", "print_comparison", "run_compare"]

SCHEMA_VERSION = 1


def load_rows(names: Sequence[str]) -> list[Row]:
    """Rows by name (of a method, or of a file in configs/rows) or by path of a TOML file."""
    return [_row(name.strip()) for name in names]


def _row(name: str) -> Row:
    path = Path(name)
    if name.endswith(".toml"):
        return Row.parse(path.stem, read_toml(path))
    stored = configs_folder() / "rows" / f"{name}.toml"
    if stored.is_file():
        return Row.parse(name, read_toml(stored))
    if name in METHODS:
        return Row.parse(name, {"method": name})
    raise unknown("method", name, tuple(METHODS))


def load_sources(names: Sequence[str]) -> list[Source]:
    """Data by name (a file in configs/data, or a data set), or by path of a TOML or npz file."""
    return [_source(name.strip()) for name in names]


def _source(name: str) -> Source:
    path = Path(name)
    if name.endswith(".toml"):
        return Source.parse(path.stem, read_toml(path), path.parent)
    stored = configs_folder() / "data" / f"{name}.toml"
    if stored.is_file():
        return Source.parse(name, read_toml(stored))
    return Source.parse(path.stem if name.endswith(".npz") else name, {"data": name})


def run_compare(
    methods: Sequence[str],
    data: Sequence[str],
    out: Path,
    *,
    seeds: int,
    rates: tuple[float, ...] | None,
    epochs: int | None,
    jobs: int,
    tune: Literal["auto", "always", "never"],
    reference: str | None,
) -> list[Findings]:
    """Finish the grid in ``out`` and write its tables; what is there already is taken over."""
    check_workers(jobs)
    if seeds < 1:
        raise InputError(f"compare: seeds is {seeds}; give a number of seeds, 1 or more")
    changes: dict[str, Any] = {} if rates is None else {"rates": list(rates)}
    if rates == ():
        changes["selection"] = "complete"
    if epochs is not None:
        changes["epochs"] = epochs
    grid = Grid(load_rows(methods), load_sources(data), range(seeds), changes, tune)
    names = [row.name for row in grid.rows]
    if reference is not None and reference not in names:
        raise InputError(f"compare: the reference {reference!r} is none of the rows {', '.join(names)}")
    _prepare(out)
    started = time.monotonic()
    with GridDisplay(error_console()) as display:
        settings, cells = run_grid(grid, out, jobs=jobs, on_event=display.on_event)
    findings = find(cells, out, grid.rows, settings, reference=reference)
    seconds = time.monotonic() - started
    about = {"schema_version": SCHEMA_VERSION, "mmc_fast_version": __version__, "kind": "comparison"}
    facts = {
        "mmc-fast": __version__,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "seeds": ", ".join(map(str, grid.seeds)),
        "time of this call": f"{seconds:.0f} s with {jobs} job(s) of one thread",
        "time of all test cells": f"{sum(r.seconds * seeds for f in findings for r in f.rows.values()):.0f} s",
    }
    write_outputs(findings, out, facts, about | {"seeds": list(grid.seeds), "facts": facts})
    return findings


def _prepare(out: Path) -> None:
    """Refuse a folder that is something else."""
    mark = out / "comparison.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not mark.is_file():
        raise InputError(f"{out} exists and holds no comparison; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    if not mark.is_file():
        write_json(mark, {"kind": "comparison", "schema_version": SCHEMA_VERSION})


def check_cell(path: Path) -> list[str]:
    """Names of what differs when a cell is computed again from its stored settings."""
    return recompute(path)


def print_comparison(console: Console, findings: Sequence[Findings], out: Path) -> None:
    """Scores of every data set and metric, the tests, and where the files are."""
    for f in findings:
        for metric, comparison in f.comparisons.items():
            title = f"{f.data}: test {metric}, mean ± s.d. over {len(comparison.seeds)} seed(s)"
            print_table(console, title, ["row", *comparison.conditions], score_rows(f, metric))
        if f.tests:
            titles = {name: facts.title for name, facts in f.rows.items()}
            title = f"{f.data}: against the reference, Holm over {f.tests[0].family} tests"
            print_table(console, title, TEST_COLUMNS, tested_rows(f.tests, titles))
    console.print(f"Tables, figures and report: {out}", markup=False)


class GridDisplay(_Bars):
    """Progress of a grid: cells of the stage, the time left, the cell that spoke last."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[note]}"),
        )
        self.task: TaskID | None = None
        self.clock, self.done, self.total = Countdown(), 0, 0

    def on_event(self, event: tuple[str, Cell, Any]) -> None:
        kind, cell, value = event
        if kind == "plan":
            self.clock, self.done, self.total = Countdown(), 0, value
            label = "test cells" if cell.part == "test" else "search"
            self.task = self.bars.add_task(label, total=value, note="", left="")
        elif self.task is not None:
            name = f"{cell.data} · {cell.row} · seed {cell.seed}"
            if kind == "done":
                self.done += 1
                left = self.clock.left(self.done / max(1, self.total))
                self.bars.update(self.task, completed=self.done, note=name, left=left)
            elif kind == "epoch":
                self.bars.update(self.task, note=f"{name}  {describe_epoch(value)}")
