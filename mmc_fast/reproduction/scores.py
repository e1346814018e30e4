"""Experiments whose numbers are test scores: their trainings are cells of the grid that all experiments share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import __version__
from ..analysis.report.drawings import metric_name
from ..comparison.cells import Cell
from ..comparison.grid import Grid, run_grid
from ..comparison.rows import Row, Source
from ..comparison.table import GATE, Findings, find
from .base import Direction, Estimate, Plan, Value

__all__ = ["Scored", "machine_facts", "score_rows", "task_of"]

_RESAMPLES = 400


@dataclass(frozen=True)
class Scored:
    """Findings by the name of the source, and the cells behind them."""

    findings: Mapping[str, Findings]
    cells: Sequence[Cell]

    def labels(self, rows: Sequence[str]) -> list[str]:
        """Label of each row: title, and what every data set says about it (gate, divergence, batch)."""
        result = []
        for name in rows:
            facts = {data: f.rows[name] for data, f in self.findings.items()}
            found = {data: f.label.removeprefix(f.title).strip(" ()") for data, f in facts.items()}
            title = next(iter(facts.values())).title
            if len(set(found.values())) == 1:
                notes = [note for note in {*found.values()} if note]
            else:
                notes = [f"{data}: {note}" for data, note in found.items() if note]
            result.append(title + (f" ({'; '.join(notes)})" if notes else ""))
        return result

    def value(self, data: str, metric: str, row: str, condition: str, paper: float | None) -> Value:
        """Mean ± s.d. over the seeds; not measured where the row diverged or the data have another metric."""
        comparison = self.findings[data].comparisons.get(metric)
        if comparison is None or row not in comparison.scores:
            return Value(paper=paper)
        score = comparison.scores[row][condition]
        return Value(score.mean, score.sd, paper)

    def direction(
        self, data: str, metric: str, first: str, second: str, condition: str, paper: float, claim: str = ""
    ) -> Direction:
        """The claim that ``first`` is above (paper > 0) or below (paper < 0) ``second``."""
        f = self.findings[data]
        words = f"{f.rows[first].title} {'above' if paper > 0 else 'below'} {f.rows[second].title}"
        comparison = f.comparisons[metric]
        measured = first in comparison.scores and second in comparison.scores
        ours = None
        if measured:
            ours = Estimate.of(comparison.difference(first, second, condition))
            if len(comparison.seeds) == 1:  # one training of each says nothing about the methods
                ours = replace(ours, low=-math.inf, high=math.inf)
        return Direction(f"{claim or words}, {data}, {metric_name(metric)}", paper, ours)

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
        return f"{GATE[0].upper()}{GATE[1:]} (below vanilla by more than one standard error on complete data): " + (
            f"{', '.join(sorted(failed))}. Such a number says little about the method."
        )


def score_rows(plan: Plan, rows: Sequence[Row], sources: Sequence[Source], changes: Mapping[str, Any]) -> Scored:
    """Finish the cells of rows x sources x seeds in the shared grid. ``changes``: of the budget of every source."""
    epochs = {} if plan.epochs is None else {"epochs": plan.epochs}
    grid = Grid(rows, sources, plan.seeds, {**changes, **epochs}, plan.tune)
    settings, cells = run_grid(grid, plan.grid, jobs=plan.jobs, on_event=plan.on_event)
    found = find(cells, plan.grid, grid.rows, settings, resamples=_RESAMPLES)
    return Scored({f.data: f for f in found}, cells)


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
