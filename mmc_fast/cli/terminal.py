"""What the command line shows: progress bars for a person at a terminal, tables, one-line errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mmc_fast.diagnose.document import Cell
    from mmc_fast.experiments.jobs import Job


def error_console() -> Console:
    """Console on standard error: progress and errors never mix with results on standard output."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def output_console() -> Console:
    """Console on standard output; wide enough for the tables where it is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell | str]], *, numbers: bool = True
) -> None:
    """A table whose first column holds names; the others are aligned as ``numbers`` or as text.

    Strong cells are bold, and starred where the console is no terminal.
    """
    table = Table(title=Text(title), title_justify="left", title_style="bold", header_style="", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if numbers and index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(_styled(cell, console.is_terminal) for cell in row))
    console.print(table)


def _styled(cell: Cell | str, terminal: bool) -> Text:
    if isinstance(cell, str):
        return Text(cell)
    if cell.strong:
        return Text(cell.text, style="bold") if terminal else Text(f"*{cell.text}*")
    return Text(cell.text)


def describe_epoch(record: Mapping[str, Any]) -> str:
    """One line on an epoch: stage, losses and the validation score, as far as the stage has them."""
    parts = [f"{record['stage']} {record['epoch']}"]
    labels = {"loss": "loss", "loss_sem": "L_sem", "loss_md_over_entropy": "L_md/H", "val_score": "val"}
    parts += [f"{label} {record[key]:.3f}" for key, label in labels.items() if isinstance(record.get(key), float)]
    return "  ".join(parts)


class _Bars:
    """A rich progress display that is silent where standard error is not a terminal; ``more``: columns at its end."""

    def __init__(self, console: Console, *more: ProgressColumn) -> None:
        usual = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.bars = Progress(
            *usual, *more, console=console, disable=not console.is_terminal, transient=True, refresh_per_second=5,
            speed_estimate_period=3600,  # a step may take minutes
        )  # fmt: skip

    def __enter__(self) -> Any:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()


class _Steps(_Bars):
    """One bar over counted steps, with the time left and a note."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))
        self.task: TaskID | None = None

    def begin(self, label: str, total: int) -> None:
        """A new bar; the clock starts again."""
        self.task = self.bars.add_task(label, total=total, note="")

    def step(self, note: str, advance: int = 1) -> None:
        """One step done, or with ``advance=0`` a note alone."""
        if self.task is not None:
            self.bars.update(self.task, note=note, advance=advance)


class RunDisplay(_Steps):
    """Progress of one run: epochs of all stages, losses, validation score, remaining time."""

    def on_start(self, total_epochs: int, label: str) -> None:
        self.begin(label, total_epochs)

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.step(describe_epoch(record))

    def on_end(self, results: dict[str, Any]) -> None:
        pass


class JobsDisplay(_Steps):
    """Progress of jobs: how many of the stage are done, the time left, the job that spoke last."""

    def on_event(self, event: tuple[str, Job, Any]) -> None:
        kind, job, value = event
        if kind == "plan":
            self.begin(job.stage, value)
        elif kind == "done":
            self.step(job.name)
        elif kind == "epoch":
            self.step(f"{job.name}  {describe_epoch(value)}", advance=0)


class PassDisplay(_Bars):
    """Progress of passes over data: one bar per phase."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        if phase not in self.tasks:
            self.tasks[phase] = self.bars.add_task(phase, total=total)
        self.bars.update(self.tasks[phase], completed=done, total=total)
