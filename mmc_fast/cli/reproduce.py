"""``mmc-fast reproduce``: one experiment of the paper on open data, beside the paper's numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mmc_fast._util.names import unknown
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare.folder import own_folder
from mmc_fast.experiments.compare.rows import load_source, load_sources
from mmc_fast.experiments.paper import Experiment, Outcome, Plan, get
from mmc_fast.experiments.paper.base import READINGS
from mmc_fast.experiments.paper.output import (
    DIRECTION_COLUMNS,
    direction_rows,
    table_columns,
    table_rows,
    to_dict,
    write_outcome,
)
from mmc_fast.experiments.training.pool import check_workers

from .terminal import GridDisplay, error_console, print_table

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
    """Finish the experiment and write its files; what is there already is taken over. Also returns the JSON values."""
    experiment = get(name)
    check_workers(jobs)
    if seeds < 1:
        raise InputError(f"reproduce: seeds is {seeds}; give a number of seeds, 1 or more")
    if epochs is not None and epochs < 1:
        raise InputError(f"reproduce: epochs is {epochs}; give 1 or more")
    for what, value, allowed in (("tune", tune, ("auto", "always", "never")), ("reading", reading, READINGS)):
        if value not in allowed:
            raise unknown(f"--{what}", value, allowed)
    if reading != "both" and not experiment.readings:
        raise InputError(f"reproduce: {name} has no readings of 'missing'; leave --reading out")
    names = None if data is None else tuple(part.strip() for part in data.split(","))
    for source in load_sources(names or experiment.data):
        load_source(source.key)  # refuse data that cannot be used before anything is written
    own_folder(out, "reproduction")
    started = time.monotonic()
    tuning: Literal["auto", "always", "never"] = tune  # type: ignore[assignment]
    with GridDisplay(error_console()) as display:
        plan = Plan(out, range(seeds), jobs, epochs, names, tuning, reading, display.on_event)  # type: ignore[arg-type]
        outcome = experiment.run(plan)
    about = {"data": list(experiment.sources(plan)), "seeds": list(plan.seeds), "epochs": epochs, "tune": tune}
    about |= {"reading": reading} if experiment.readings else {}
    about |= {"seconds": round(time.monotonic() - started, 1), "jobs": jobs}
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
    console.print(f"Tables, figures and report: {folder}", markup=False)
    console.print(outcome.summary, markup=False)
