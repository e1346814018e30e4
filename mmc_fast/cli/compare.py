"""``mmc-fast compare``: method configs and data by name or file, the grid, tables in every form."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from mmc_fast._util.names import choose
from mmc_fast._util.numbers import shown
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare.configs import data_here, load_data_configs, load_method_configs
from mmc_fast.experiments.compare.findings import Findings, find
from mmc_fast.experiments.compare.grid import Grid, not_for, run_grid
from mmc_fast.experiments.compare.output import footnotes, score_rows, tests_table, tests_title, write_outputs
from mmc_fast.experiments.compare.runs import check as check_run
from mmc_fast.experiments.jobs import own_folder
from mmc_fast.experiments.pool import check_workers
from mmc_fast.experiments.report.drawings import metric_name

from .base import AsJson, Jobs, command, print_json, say
from .scores import parse_rates
from .terminal import JobsDisplay, error_console, output_console, print_table

DATA = ("mfeat", "support2", "avmnist-hard")
METHODS = "vanilla,unimodal,consistency,late,transformer,kd,ebr-paper,ebr-robust,shaspec,muse"


def print_comparison(console: Console, findings: Sequence[Findings], out: Path) -> None:
    """Scores of every data set and metric, the tests, and where the files are."""
    for f in findings:
        for metric, comparison in f.comparisons.items():
            title = f"{f.data}: test {metric_name(metric)}, mean ± s.d. over {len(comparison.seeds)} seed(s)"
            print_table(console, title, ["method", *comparison.conditions], score_rows(f, metric))
        if notes := footnotes(f):
            console.print(f"{notes}.", markup=False)
        if f.tests:
            print_table(console, f"{f.data}: {tests_title(f)}", *tests_table(f))
    console.print(f"Tables, figures and report: {out}", markup=False)


def compare(
    methods: Annotated[str, typer.Option(help="Methods, or TOML files of your own, separated by commas.")] = METHODS,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data, separated by commas: data sets, npz files, or TOML files with a budget. "
            f"(default: {', '.join(DATA)}, those that are here)"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds: 0, 1, ...")] = 5,
    rates: Annotated[
        str | None,
        typer.Option(help="Missing rates, such as 0.1,0.4; none for complete data only. (default: .1,.2,.3,.4,.7)"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Budget of every method. (default: that of the data)")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the grid; a grid there is continued.")] = Path("runs/compare"),
    jobs: Jobs = 2,
    tune: Annotated[
        str, typer.Option(help="Settings: auto (stored selection, else a search), always (search), never (no search).")
    ] = "auto",
    reference: Annotated[
        str | None, typer.Option(help="Method that the others are tested against. (default: vanilla, else the first)")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(help="Only repeat this finished run (or LOG.jsonl:LINE) and compare; exit code 1 if different."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods with equal budgets and searches: a resumable grid of trainings, tables, tests, a page."""
    if check is not None:
        different = check_run(check)
        typer.echo(f"different: {', '.join(different)}" if different else "the same numbers")
        raise typer.Exit(1 if different else 0)
    check_workers(jobs, "jobs")
    choose("--tune", tune, ("auto", "always", "never"))
    if not 1 <= seeds <= 1000:
        raise InputError(f"compare: seeds is {shown(seeds)}; give a number of seeds from 1 to 1000")
    changes: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    if rates is not None:
        wanted = [] if rates.strip() == "none" else parse_rates(rates)
        changes |= {"rates": wanted} if wanted else {"rates": [], "selection": "complete"}
    here, left_out = (data.split(","), {}) if data is not None else data_here(DATA)
    grid = Grid(load_method_configs(methods.split(",")), load_data_configs(here), range(seeds), changes, tune)  # type: ignore[arg-type]
    names = [m.name for m in grid.methods]
    if reference is not None and reference not in names:
        raise InputError(f"compare: the reference {reference!r} is none of the methods {', '.join(names)}")
    if methods == METHODS:
        unfit = not_for(grid.methods, grid.data)
        left_out |= {name: f"The method cannot be trained here: {reason}." for name, reason in unfit.items()}
        grid = replace(grid, methods=[m for m in grid.methods if m.name not in unfit or m.name == reference])
    for name, reason in left_out.items():
        say(f"{name} is left out. {reason}")
    own_folder(out, "comparison")
    started = time.monotonic()
    with JobsDisplay(error_console()) as display:
        finished = run_grid(grid, out, workers=jobs, on_event=display.on_event)
    findings = find(finished, grid.methods, reference=reference)
    facts = {
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "seeds": ", ".join(map(str, grid.seeds)),
        "time of this call": f"{time.monotonic() - started:.0f} s with {jobs} job(s) of one thread",
        "time of all test runs": f"{sum(run.result.seconds for run in finished.runs):.0f} s",
        **{f"left out: {name}": reason for name, reason in left_out.items()},
    }
    write_outputs(findings, out, facts, {"kind": "comparison", "seeds": list(grid.seeds), "facts": facts})
    if as_json:
        print_json([f.to_dict() for f in findings])
    else:
        print_comparison(output_console(), findings, out)


COMMAND = command(compare)
