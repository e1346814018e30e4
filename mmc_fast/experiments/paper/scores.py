"""Experiments whose numbers are test scores: their trainings are cells of the grid that all experiments share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmc_fast import __version__

from ..compare.cells import Cell
from ..compare.grid import Grid, run_grid
from ..compare.rows import Row, Source, load_rows
from ..compare.table import GATE, Findings, find
from ..report.comparison import AVERAGE, COMPLETE
from ..report.drawings import metric_name
from .base import Direction, Estimate, Plan, Value

__all__ = ["Scored", "machine_facts", "rows_on_bases", "score_rows", "task_of"]

_RESAMPLES = 400


@dataclass(frozen=True)
class Scored:
    """Findings by the name of the source, and the cells behind them."""

    findings: Mapping[str, Findings]
    cells: Sequence[Cell]

    def title(self, row: str) -> str:
        """How a row is called."""
        return next(iter(self.findings.values())).rows[row].title

    @property
    def footnote(self) -> str:
        """What the marks of the values mean; empty where there is none."""
        found = {
            (mark, note) for f in self.findings.values() for r in f.rows.values() for mark, note in r.notes.items()
        }
        explained = {GATE: f"{GATE}, below vanilla by more than one standard error with nothing removed"}
        return "; ".join(f"{mark} {explained.get(note, note)}" for mark, note in sorted(found))

    def value(self, data: str, metric: str, row: str, condition: str, paper: float | None, unit: float = 1.0) -> Value:
        """Mean ± s.d. over the seeds; not measured where the row diverged. ``unit``: ours are multiplied by it."""
        f = self.findings[data]
        scores, mark = f.comparisons[metric].scores, "".join(f.rows[row].notes)
        if row not in scores:
            return Value(paper=paper, mark=mark)
        found = scores[row][condition]
        return Value(found.mean * unit, None if found.sd is None else found.sd * unit, paper, mark)

    def direction(
        self, data: str, metric: str, pair: tuple[str, str], condition: str, paper: float, *, unit: float = 1.0
    ) -> Direction:
        """That the first row of the pair is above (paper > 0) or below (paper < 0) the second."""
        f, (first, second) = self.findings[data], pair
        claim = f"{f.rows[first].title} {'above' if paper > 0 else 'below'} {f.rows[second].title}, {data}"
        claim += f", {metric_name(metric)}" + ("" if condition in (COMPLETE, AVERAGE) else f", {condition}")
        comparison = f.comparisons[metric]
        mark = "†" if GATE in (f.rows[first].gate, f.rows[second].gate) else ""
        if not {first, second} <= set(comparison.scores):
            return Direction(claim, paper, None, mark=mark)
        found = comparison.difference(first, second, condition)
        low, high = found.low * unit, found.high * unit
        if len(comparison.seeds) == 1:  # one training of each says nothing about the methods
            low, high = -math.inf, math.inf
        return Direction(claim, paper, Estimate(found.estimate * unit, low, high), mark=mark)

    def record(self) -> dict[str, Any]:
        """Plain JSON values: the findings and the cells with every setting."""
        cells = [
            {"row": c.row, "data": c.data, "seed": c.seed, "file": c.path, "config": dict(c.config)}
            | {"options": dict(c.options)}
            for c in self.cells
        ]
        return {"findings": {data: f.to_dict() for data, f in self.findings.items()}, "cells": cells}

    def facts(self) -> dict[str, str]:
        """Machine, budget, settings by search or as declared, time."""
        seconds = sum(r.seconds * len(f.main.seeds) for f in self.findings.values() for r in f.rows.values())
        budget = {c.data: f"{c.config['epochs']} epochs, batch {c.config['batch_size']}" for c in self.cells}
        return {
            **machine_facts(),
            "budget": "; ".join(f"{data}: {b}" for data, b in budget.items()),
            "time of all test cells": f"{seconds:.0f} s on one thread",
        }


def score_rows(plan: Plan, rows: Sequence[Row], sources: Sequence[Source], changes: Mapping[str, Any]) -> Scored:
    """Finish the cells of rows x sources x seeds in the shared grid. ``changes``: of the budget of every source."""
    epochs = {} if plan.epochs is None else {"epochs": plan.epochs}
    grid = Grid(rows, sources, plan.seeds, {**changes, **epochs}, plan.tune)
    settings, cells = run_grid(grid, plan.grid, jobs=plan.jobs, on_event=plan.on_event)
    found = find(cells, plan.grid, grid.rows, settings, resamples=_RESAMPLES)
    return Scored({f.data: f for f in found}, cells)


def rows_on_bases(names: Sequence[str]) -> list[Row]:
    """Rows by name; one such as "muse+ebr" takes the stored choices of "muse" where it has none of its own."""
    rows = load_rows(names)
    bases = {row.name: row for row in load_rows(sorted({name.partition("+")[0] for name in names}))}
    return [replace(row, chosen={**bases[row.name.partition("+")[0]].chosen, **row.chosen}) for row in rows]


def task_of(source: Source) -> str:
    """Which of the paper's two clinical tasks a source stands for: "readmission" where it is that, else "mortality"."""
    return "readmission" if source.options.get("task") == "readmission" else "mortality"


def machine_facts() -> dict[str, str]:
    """Versions and processor."""
    return {
        "mmc-fast": __version__,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
