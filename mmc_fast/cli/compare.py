"""``mmc-fast compare``: rows and data by name or file, the grid, tables in every form."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from mmc_fast import __version__
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare.cells import recompute
from mmc_fast.experiments.compare.folder import own_folder
from mmc_fast.experiments.compare.grid import Grid, run_grid
from mmc_fast.experiments.compare.output import family, footnotes, score_rows, tests_table, write_outputs
from mmc_fast.experiments.compare.rows import load_rows, load_sources, sources_here
from mmc_fast.experiments.compare.table import Findings, find
from mmc_fast.experiments.training.pool import check_workers

from .terminal import GridDisplay, error_console, print_table, tell_left_out

__all__ = ["DATA", "check_cell", "print_comparison", "run_compare"]

SCHEMA_VERSION = 1
DATA = ("mfeat", "support2", "avmnist-hard")


def run_compare(
    methods: Sequence[str],
    data: Sequence[str] | None,
    out: Path,
    *,
    seeds: int,
    rates: tuple[float, ...] | None,
    epochs: int | None,
    jobs: int,
    tune: Literal["auto", "always", "never"],
    reference: str | None,
) -> list[Findings]:
    """Finish the grid in ``out`` and write its tables; what is there already is taken over.

    ``data``: None is those of :data:`DATA` that are here; the others are named.
    """
    check_workers(jobs, "jobs")
    if seeds < 1:
        raise InputError(f"compare: seeds is {seeds}; give a number of seeds, 1 or more")
    changes: dict[str, Any] = {} if rates is None else {"rates": list(rates)}
    if rates == ():
        changes["selection"] = "complete"
    if epochs is not None:
        changes["epochs"] = epochs
    here, left_out = (data, {}) if data is not None else sources_here(DATA)
    grid = Grid(load_rows(methods), load_sources(here), range(seeds), changes, tune)
    names = [row.name for row in grid.rows]
    if reference is not None and reference not in names:
        raise InputError(f"compare: the reference {reference!r} is none of the rows {', '.join(names)}")
    tell_left_out(left_out)
    own_folder(out, "comparison")
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
    facts |= {f"left out: {name}": reason for name, reason in left_out.items()}
    write_outputs(findings, out, facts, about | {"seeds": list(grid.seeds), "facts": facts})
    return findings


def check_cell(path: Path) -> list[str]:
    """Names of what differs when a cell is computed again from its stored settings."""
    return recompute(path)


def print_comparison(console: Console, findings: Sequence[Findings], out: Path) -> None:
    """Scores of every data set and metric, the tests, and where the files are."""
    for f in findings:
        for metric, comparison in f.comparisons.items():
            title = f"{f.data}: test {metric}, mean ± s.d. over {len(comparison.seeds)} seed(s)"
            print_table(console, title, ["row", *comparison.conditions], score_rows(f, metric))
        if notes := footnotes(f):
            console.print(f"{notes}.", markup=False, highlight=False)
        if f.tests:
            titles = {name: facts.title for name, facts in f.rows.items()}
            print_table(console, f"{f.data}: against the reference, {family(f.tests)}", *tests_table(f.tests, titles))
    console.print(f"Tables, figures and report: {out}", markup=False)
