"""``mmc-fast demo``: the presets of the standard loop on the data that come along, compared and looked into."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mmc_fast.experiments.compare.demo import (
    DemoFindings,
    DemoPlan,
    demo_blocks,
    demo_drawings,
    demo_story,
    run_demo,
)
from mmc_fast.experiments.compare.output import score_rows, write_outputs
from mmc_fast.experiments.jobs import own_folder
from mmc_fast.experiments.pool import check_workers

from .base import AsJson, command, print_json
from .terminal import JobsDisplay, error_console, output_console, print_table

LEAD = "Which modalities does a model use, which did it lose, and what brings them back?"
SMOKE = "This was a smoke run of a few epochs and one seed. Its numbers mean nothing."


def write_demo(plan: DemoPlan, out: Path, *, workers: int, fresh: bool = False) -> list[DemoFindings]:
    """Finish the demo in ``out`` and write its files; what is there already is taken over unless ``fresh``."""
    check_workers(workers)
    manifest = own_folder(out, "demo")
    if fresh:
        manifest.add([], drop=manifest.below("runs"))
        shutil.rmtree(out / "runs", ignore_errors=True)
    started = time.monotonic()
    with JobsDisplay(error_console()) as display:
        findings = run_demo(plan, out, workers=workers, on_event=display.on_event)
    first = next(iter(findings[0].runs.values()))[0]["environment"]
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    facts = {
        "torch": first["torch"],
        "python": first["python"],
        "processor": f"{first['machine']}, {first['cpu_capability']}",
        "seeds": ", ".join(map(str, plan.seeds)),
        "epochs": str(plan.epochs),
        "time of this call": f"{minutes} min {seconds} s with {workers} worker(s) of one thread",
    }
    verdicts = {
        f.comparison.data: {title: [vars(v) for v in some] for title, some in f.verdicts.items()} for f in findings
    }
    story = demo_story(findings)
    about = {"kind": "demo", "plan": plan.to_dict(), "facts": facts, "verdicts": verdicts}
    write_outputs(
        [f.comparison for f in findings],
        out,
        facts,
        about,
        title="Modality collapse and explicit basis reallocation",
        drawings={f.comparison.data: demo_drawings(f) for f in findings},
        blocks={f.comparison.data: demo_blocks(f) for f in findings},
        warning=SMOKE if plan.quick else "",
        opening=(LEAD, story.blocks, story.drawing) if story else None,
    )
    return findings


def print_demo(console: Console, findings: Sequence[DemoFindings], out: Path, quick: bool) -> None:
    """The story, a table and what became of the modalities per data set, and where the report is."""
    if (story := demo_story(findings)) is not None:
        console.print(story.sentence.replace("**", ""), markup=False)
        console.print()
    for f in findings:
        main = f.comparison.main
        title = f"{f.comparison.data}: test {main.metric}, mean ± s.d. over {len(main.seeds)} seed(s)"
        print_table(console, title, ["method", *main.conditions], score_rows(f.comparison, main.metric))
        console.print(f.summary, markup=False)
        console.print()
    strong = "Bold" if console.is_terminal else "Bold (here *)"
    console.print(f"{strong}: the paired 95 % intervals against every other method lie above 0.")
    if quick:
        console.print(SMOKE)
    console.print(f"Report: {out / 'report.html'}", markup=False)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo; what is finished there is taken over.")] = Path(
        "runs/demo"
    ),
    workers: Annotated[int, typer.Option(help="Processes with one thread each.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smoke run: one seed, few epochs, numbers without meaning.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again what is finished in the folder.")] = False,
    open_report: Annotated[bool, typer.Option("--open", help="Show the report in the browser at the end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train vanilla, modality dropout, KD and two forms of EBR on two data sets; write tables, figures, a report."""
    plan = DemoPlan.smoke() if quick else DemoPlan()
    findings = write_demo(plan, out, workers=workers, fresh=fresh)
    if as_json:
        print_json({"out": str(out), "plan": plan.to_dict(), "data_sets": [f.comparison.to_dict() for f in findings]})
    else:
        print_demo(output_console(), findings, out, quick)
    if open_report:
        typer.launch(str((out / "report.html").resolve()))


COMMAND = command(demo)
