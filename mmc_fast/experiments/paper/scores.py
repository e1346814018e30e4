"""Experiments whose numbers are test scores: their trainings are runs of the grid that all experiments share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmc_fast import __version__

from ..compare.configs import DataConfig, MethodConfig, load_method_configs
from ..compare.findings import UNDER_PERFORMING, Findings, find
from ..compare.grid import Grid, Run, run_grid
from ..report.comparison import AVERAGE, COMPLETE
from ..report.drawings import metric_name
from .base import Direction, Estimate, Plan, Value

_RESAMPLES = 400


@dataclass(frozen=True)
class Scored:
    """Findings by the name of the data config, and the runs behind them."""

    findings: Mapping[str, Findings]
    runs: Sequence[Run]

    def title(self, method: str) -> str:
        """How a method config is called."""
        return next(iter(self.findings.values())).methods[method].title

    @property
    def footnote(self) -> str:
        """What the marks of the values mean; empty where there is none."""
        notes = {item for f in self.findings.values() for m in f.methods.values() for item in m.notes.items()}
        more = {UNDER_PERFORMING: f"{UNDER_PERFORMING}, below vanilla by more than one standard error on complete data"}
        return "; ".join(f"{mark} {more.get(note, note)}" for mark, note in sorted(notes))

    def value(
        self, data: str, metric: str, method: str, condition: str, paper: float | None, unit: float = 1.0
    ) -> Value:
        """Mean ± s.d. over the seeds; not measured where the method diverged. ``unit``: ours are multiplied by it."""
        f = self.findings[data]
        scores, mark = f.comparisons[metric].scores, "".join(f.methods[method].notes)
        if method not in scores:
            return Value(paper=paper, mark=mark)
        found = scores[method][condition]
        return Value(found.mean * unit, None if found.sd is None else found.sd * unit, paper, mark)

    def direction(
        self, data: str, metric: str, pair: tuple[str, str], condition: str, paper: float, *, unit: float = 1.0
    ) -> Direction:
        """That the first method of the pair is above (paper > 0) or below (paper < 0) the second."""
        f, (first, second) = self.findings[data], pair
        claim = f"{f.methods[first].title} {'above' if paper > 0 else 'below'} {f.methods[second].title}, {data}"
        claim += f", {metric_name(metric)}" + ("" if condition in (COMPLETE, AVERAGE) else f", {condition}")
        comparison = f.comparisons[metric]
        mark = "†" if UNDER_PERFORMING in (f.methods[first].threshold, f.methods[second].threshold) else ""
        if not {first, second} <= set(comparison.scores):
            return Direction(claim, paper, None, mark=mark)
        found = comparison.difference(first, second, condition)
        low, high = found.low * unit, found.high * unit
        if len(comparison.seeds) == 1:  # one training of each says nothing about the methods
            low, high = -math.inf, math.inf
        return Direction(claim, paper, Estimate(found.estimate * unit, low, high), mark=mark)

    def record(self) -> dict[str, Any]:
        """Plain JSON values: the findings, and the runs with every setting."""
        runs = [{"method": r.method, "data": r.data, "seed": r.seed, "file": r.job.path, "config": r.job.settings["config"],
                 "options": r.job.settings["options"]} for r in self.runs]  # fmt: skip
        return {"findings": {data: f.to_dict() for data, f in self.findings.items()}, "runs": runs}

    def facts(self) -> dict[str, str]:
        """Machine, budget, time."""
        configs = {r.data: r.job.settings["config"] for r in self.runs}
        budget = [f"{data}: {c['epochs']} epochs, batch {c['batch_size']}" for data, c in configs.items()]
        seconds = sum(run.result.seconds for run in self.runs)
        return {
            **machine_facts(),
            "budget": "; ".join(budget),
            "time of all test runs": f"{seconds:.0f} s on one thread",
        }


def score_methods(
    plan: Plan, methods: Sequence[MethodConfig], data: Sequence[DataConfig], changes: Mapping[str, Any]
) -> Scored:
    """Finish the runs of methods x data x seeds in the shared grid. ``changes``: of every budget."""
    grid = Grid(methods, data, plan.seeds, {**changes, **plan.changes}, plan.tune)
    finished = run_grid(grid, plan.grid, workers=plan.workers, on_event=plan.on_event)
    found = find(finished, methods, resamples=_RESAMPLES)
    return Scored({f.data: f for f in found}, finished.runs)


def with_base_settings(names: Sequence[str]) -> list[MethodConfig]:
    """By name; one such as "muse+ebr" takes the stored hyper-parameters of "muse" where it has none of its own."""
    bases = {m.name: m for m in load_method_configs(sorted({name.partition("+")[0] for name in names}))}
    return [
        replace(m, selected={**bases[m.name.partition("+")[0]].selected, **m.selected})
        for m in load_method_configs(names)
    ]


def machine_facts() -> dict[str, str]:
    """Versions and processor."""
    return {
        "mmc-fast": __version__,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
