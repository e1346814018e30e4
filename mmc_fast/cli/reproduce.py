"""``mmc-fast reproduce``: one experiment of the paper on open data, beside the paper's numbers."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmc_fast._util.numbers import shown
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare.configs import data_here, load_data, load_data_configs
from mmc_fast.experiments.jobs import own_folder
from mmc_fast.experiments.paper import Experiment, Outcome, Plan, get
from mmc_fast.experiments.paper.output import (
    DIRECTION_COLUMNS,
    direction_rows,
    table_columns,
    table_rows,
    to_dict,
    write_outcome,
)
from mmc_fast.experiments.pool import check_workers

from .base import AsJson, Jobs, command, print_json, say
from .terminal import JobsDisplay, error_console, output_console, print_table


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


def reproduce(
    name: Annotated[
        str, typer.Argument(help="Which experiment, such as table5; `docs/experiments/paper.md` lists them.")
    ],
    seeds: Annotated[int, typer.Option(help="Number of seeds: 0, 1, ...")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Budget of every training. (default: that of the data)")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data, separated by commas, as in compare. (default: the experiment's own, those that are here)"
        ),
    ] = None,
    jobs: Jobs = 2,
    out: Annotated[Path, typer.Option(help="Folder of all experiments; what is finished there is taken over.")] = Path(
        "runs/reproduce"
    ),
    tune: Annotated[
        str, typer.Option(help="Settings: never (stored selection, else the default), auto (else a search), always.")
    ] = "never",
    reading: Annotated[
        str, typer.Option(help="Tables 3 and 4: audio is missing in training (train), in the test (test), or both.")
    ] = "both",
    as_json: AsJson = False,
) -> None:
    """Repeat an experiment of the paper on open data; print our numbers beside the paper's and which directions agree."""
    experiment = get(name)
    check_workers(jobs, "jobs")
    for what, value, most in (("seeds", seeds, 1000), ("epochs", epochs, 10**9)):
        if value is not None and not 1 <= value <= most:
            raise InputError(f"reproduce: {what} is {shown(value)}; give a number from 1 to {most}")
    names = experiment.data if data is None else tuple(part.strip() for part in data.split(","))
    plan = Plan(out, names, range(seeds), jobs, epochs, tune, reading)  # type: ignore[arg-type]
    experiment.check(plan)
    here, left_out = (list(names), {}) if data is not None else data_here(names)
    for config in load_data_configs(here):
        load_data(config.key)  # refuse data that cannot be used before anything is written
    notes = [f"{data} is left out. {reason}" for data, reason in left_out.items()]
    for note in notes:
        say(note)
    started = time.monotonic()
    if here:
        own_folder(out, "reproduction")
        with JobsDisplay(error_console()) as display:
            outcome = experiment.run(replace(plan, data=tuple(here), on_event=display.on_event))
        outcome = replace(outcome, notes=[*outcome.notes, *notes])
    else:
        outcome = Outcome([], [], notes=[f"Nothing is measured: {name} needs {', '.join(names)}.", *notes])
    about: dict[str, Any] = {
        "data": here,
        "left_out": left_out,
        "seeds": list(plan.seeds),
        "epochs": epochs,
        "tune": tune,
    }
    about |= {"reading": reading} if experiment.readings else {}
    about |= {"seconds": round(time.monotonic() - started, 1), "jobs": jobs}
    if here:
        write_outcome(experiment, outcome, out / name, about)
    if as_json:
        print_json(to_dict(experiment, outcome, about))
    else:
        print_outcome(output_console(), experiment, outcome, out / name)


COMMAND = command(reproduce)
