"""``mmc-fast reproduce``: one experiment of the paper on open data, beside the paper's numbers."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mmc_fast.errors import InputError
from mmc_fast.experiments.compare.folder import own_folder
from mmc_fast.experiments.compare.rows import load_source, load_sources, sources_here
from mmc_fast.experiments.paper import Experiment, Outcome, Plan, get
from mmc_fast.experiments.paper.output import (
    DIRECTION_COLUMNS,
    direction_rows,
    table_columns,
    table_rows,
    to_dict,
    write_outcome,
)
from mmc_fast.experiments.training.pool import check_workers

from .terminal import GridDisplay, error_console, print_table, tell_left_out

__all__ = ["print_outcome", "run_reproduce"]


def run_reproduce(
    name: str,
    out: Path,
    *,
    seeds: int,
    epochs: int | None,
    data: str | None,
    jobs: int,
    tune: str,
    reading: str,
) -> tuple[Experiment, Outcome, dict[str, Any]]:
    """Finish the experiment and write its files; what is there already is taken over. Also returns the JSON values.

    Of the experiment's own data those are taken that are here, and the others are named; where none is here nothing is
    measured and no file is written.
    """
    experiment = get(name)
    check_workers(jobs, "jobs")
    if seeds < 1:
        raise InputError(f"reproduce: seeds is {seeds}; give a number of seeds, 1 or more")
    if epochs is not None and epochs < 1:
        raise InputError(f"reproduce: epochs is {epochs}; give 1 or more")
    names = None if data is None else tuple(part.strip() for part in data.split(","))
    plan = Plan(out, range(seeds), jobs, epochs, names, tune, reading)  # type: ignore[arg-type]
    experiment.check(plan)
    here, left_out = (names, {}) if names is not None else sources_here(experiment.data)
    plan = replace(plan, data=tuple(here))
    for source in load_sources(here):
        load_source(source.key)  # refuse data that cannot be used before anything is written
    tell_left_out(left_out)
    notes = [f"{source} is left out. {reason}" for source, reason in left_out.items()]
    started = time.monotonic()
    if here:
        own_folder(out, "reproduction")
        with GridDisplay(error_console()) as display:
            outcome = experiment.run(replace(plan, on_event=display.on_event))
        outcome = replace(outcome, notes=[*outcome.notes, *notes])
    else:
        outcome = Outcome([], [], notes=[f"Nothing is measured: {name} needs {', '.join(experiment.data)}.", *notes])
    about = {
        "data": list(here),
        "seeds": list(plan.seeds),
        "epochs": epochs,
        "tune": tune,
    }
    about |= {"left_out": left_out}
    about |= {"reading": reading} if experiment.readings else {}
    about |= {"seconds": round(time.monotonic() - started, 1), "jobs": jobs}
    if here:
        write_outcome(experiment, outcome, out / name, about)
    return experiment, outcome, to_dict(experiment, outcome, about)


def print_outcome(console: Console, experiment: Experiment, outcome: Outcome, folder: Path) -> None:
    """Tables, directions, notes, where the files are, and last the count of verdicts."""
    console.print(f"{experiment.title}. The paper: {experiment.paper}", markup=False)
    for table in outcome.tables:
        print_table(console, table.title, table_columns(table), table_rows(table))
        if table.footnote:
            console.print(f"{table.footnote}.", markup=False)
    if outcome.directions:
        print_table(console, "Directions", DIRECTION_COLUMNS, direction_rows(outcome))
    for note in (*experiment.deviations, *outcome.notes):
        console.print(f"- {note}", markup=False)
    if outcome.tables:
        console.print(f"Tables, figures and report: {folder}", markup=False)
        console.print(outcome.summary, markup=False)
