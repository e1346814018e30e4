"""Experiments whose numbers are test scores: their trainings are cells of the grid that all experiments share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import __version__
from ..analysis.report.comparison import AVERAGE, COMPLETE
from ..analysis.report.drawings import metric_name
from ..comparison.cells import Cell
from ..comparison.grid import Grid, run_grid
from ..comparison.rows import Row, Source, load_rows
from ..comparison.table import GATE, Findings, find
from .base import Direction, Estimate, Plan, Value

__all__ = ["Scored", "machine_facts", "rows_on_bases", "score_rows", "task_of"]

_RESAMPLES = 400


@dataclass(frozen=True)
class Scored:
    """Findings by the name of the source, and the cells behind them."""

    findings: Mapping[str, Findings]
    cells: Sequence[Cell]

    def labels(self, rows: Sequence[str]) -> list[str]:
        """Label of each row: title and notes (gate, divergence, batch), with the number of data sets that a note is for."""
        result = []
        for name in rows:
            about = Counter(note for f in self.findings.values() for note in f.rows[name].notes)
            n = len(self.findings)
            notes = [note if k == n else f"{note} on {k} of {n} sets" for note, k in about.items()]
            title = next(iter(self.findings.values())).rows[name].title
            result.append(title + (f" ({'; '.join(notes)})" if notes else ""))
        return result

    def value(self, data: str, metric: str, row: str, condition: str, paper: float | None, unit: float = 1.0) -> Value:
        """Mean ± s.d. over the seeds; not measured where the row diverged. ``unit``: ours are multiplied by it."""
        scores = self.findings[data].comparisons[metric].scores
        if row not in scores:
            return Value(paper=paper)
        found = scores[row][condition]
        return Value(found.mean * unit, None if found.sd is None else found.sd * unit, paper)

    def direction(
        self, data: str, metric: str, pair: tuple[str, str], condition: str, paper: float, *, unit: float = 1.0
    ) -> Direction:
        """That the first row of the pair is above (paper > 0) or below (paper < 0) the second."""
        f, (first, second) = self.findings[data], pair
        claim = f"{f.rows[first].title} {'above' if paper > 0 else 'below'} {f.rows[second].title}, {data}"
        claim += f", {metric_name(metric)}" + ("" if condition in (COMPLETE, AVERAGE) else f", {condition}")
        comparison = f.comparisons[metric]
        if not {first, second} <= set(comparison.scores):
            return Direction(claim, paper, None)
        found = comparison.difference(first, second, condition)
        if len(comparison.seeds) == 1:  # one training of each says nothing about the methods
            return Direction(claim, paper, Estimate(found.estimate * unit, -math.inf, math.inf))
        return Direction(claim, paper, Estimate(found.estimate * unit, found.low * unit, found.high * unit))

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

    def gate_note(self) -> str | None:
        """A sentence on the re-implementations below the gate, None where there is none."""
        failed = {
            f"{r.title} on {data}" for data, f in self.findings.items() for r in f.rows.values() if r.gate == GATE
        }
        if not failed:
            return None
        return f"{GATE[0].upper()}{GATE[1:]} (below vanilla by more than one standard error with nothing removed): " + (
            f"{', '.join(sorted(failed))}. Such a number says little about the method."
        )


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
