"""``mmc-fast demo``: run the plan, compare, draw, and put everything into one folder in one step."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from mmc_fast import __version__
from mmc_fast._util.atomic import write_json
from mmc_fast.errors import InputError
from mmc_fast.experiments.data import available
from mmc_fast.experiments.report.comparison import table_rows
from mmc_fast.experiments.report.demo import DemoFindings, demo_drawings, demo_findings, demo_report
from mmc_fast.experiments.report.words import collapse_summary, comparison_words, game_words
from mmc_fast.experiments.training.demo import DemoPlan, load_demo_run, run_demo
from mmc_fast.experiments.training.lock import FolderLock
from mmc_fast.experiments.training.pool import check_workers

from .terminal import DemoDisplay, error_console, print_table

__all__ = ["print_demo", "run_demo_command"]

SCHEMA_VERSION = 1


def run_demo_command(
    plan: DemoPlan, out: Path, *, workers: int, fresh: bool
) -> tuple[dict[str, Any], list[DemoFindings]]:
    """Run the demo and write ``out``: results.json, report.html, figures/ and the folders of the runs.

    Work goes on in ``<out>.partial``, which is renamed at the end: ``out`` holds the demo before or the whole new one.
    An interrupted demo is continued unless ``fresh``. Returns the results and the findings behind them.
    """
    check_workers(workers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FolderLock(out.with_name(out.name + ".lock"), f"demo folder {out}"):
        return _run(plan, out, workers, fresh)


def _run(plan: DemoPlan, out: Path, workers: int, fresh: bool) -> tuple[dict[str, Any], list[DemoFindings]]:
    started = time.monotonic()
    work = _prepare(plan, out, fresh)
    console = error_console()
    with DemoDisplay(console) as display:
        run_demo(plan, work / "runs", display, workers=workers)
    outcomes = [load_demo_run(work / "runs", run) for run in plan.runs]
    findings = demo_findings(outcomes, titles={d.name: d.title for d in available()})
    first = outcomes[0][0]
    seconds = time.monotonic() - started
    results = {
        "schema_version": SCHEMA_VERSION,
        "mmc_fast_version": __version__,
        "kind": "demo",
        "plan": plan.to_dict(),
        "environment": first["environment"],
        "seconds": round(seconds, 1),
        "data_sets": {f.runs.dataset: _summary(f) for f in findings},
        "runs": [results for results, _ in outcomes],
    }
    for name, drawing in demo_drawings(findings).items():
        drawing.save_png(work / "figures" / f"{name}.png")
    demo_report(findings, _facts(results, workers), quick=plan.quick, version=__version__).save(work / "report.html")
    write_json(work / "results.json", results)
    if out.exists():
        shutil.rmtree(out)
    os.replace(work, out)
    return results, findings


def print_demo(console: Console, findings: list[DemoFindings], out: Path, quick: bool) -> None:
    """A table and the findings in words per data set, and where the report is."""
    for f in findings:
        names = {method: f.runs.name(method) for method in f.runs.methods}
        print_table(
            console,
            f"{f.runs.dataset}: test {f.comparison.metric}, mean ± s.d. over {len(f.comparison.seeds)} seed(s)",
            ["method", *f.comparison.conditions],
            table_rows(f.comparison, names),
        )
        words = [collapse_summary(f.runs, "vanilla", f.chance)]
        for method in ("ebr", "robust"):
            if method in f.runs.methods:
                words += [*comparison_words(f.comparison, method), game_words(f.runs, method)]
        for sentence in words:
            console.print(sentence.replace("**", ""), markup=False)
        console.print()
    console.print(
        f"Bold{'' if console.is_terminal else ' (here *)'}: the paired 95 % intervals against every other method lie "
        "above 0."
    )
    if quick:
        console.print("This was a smoke run: its numbers mean nothing.")
    console.print(f"Report: {out / 'report.html'}", markup=False)


def _prepare(plan: DemoPlan, out: Path, fresh: bool) -> Path:
    """The working folder, empty or with what an interrupted demo of the same plan left."""
    if out.exists() and not _is_demo(out):
        raise InputError(f"{out} exists and holds no demo; choose another folder with --out")
    work = out.with_name(out.name + ".partial")
    record = {"mmc_fast_version": __version__, "plan": plan.to_dict()}
    if work.exists():
        found = _read(work / "plan.json")
        if not found and any(work.iterdir()):
            raise InputError(f"{work} exists and was not made by the demo; move it away or choose another --out")
        if fresh or found != record:
            shutil.rmtree(work)
        else:
            error_console().print(f"continuing the interrupted demo in {work}", markup=False)
            return work
    work.mkdir(parents=True)
    write_json(work / "plan.json", record)
    return work


def _is_demo(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    return _read(folder / "results.json").get("kind") == "demo"


def _read(path: Path) -> dict[str, Any]:
    """A JSON file as a table; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _summary(f: DemoFindings) -> dict[str, Any]:
    return {
        "comparison": f.comparison.to_dict(),
        "chance": f.chance,
        "verdicts": {
            method: [{"modality": v.modality, "kind": v.kind} | v.evidence for v in verdicts]
            for method, verdicts in f.verdicts.items()
        },
        "runs": {
            method: {
                str(run["seed"]): {m: entry["verdict"] for m, entry in (run["scores"].get("reliance") or {}).items()}
                for run in runs
            }
            for method, runs in f.runs.methods.items()
        },
    }


def _facts(results: dict[str, Any], workers: int) -> dict[str, str]:
    environment, plan = results["environment"], results["plan"]
    minutes, seconds = divmod(round(results["seconds"]), 60)
    return {
        "mmc-fast": results["mmc_fast_version"],
        "torch": environment["torch"],
        "python": environment["python"],
        "processor": f"{environment['machine']}, {environment['cpu_capability']}",
        "seeds": ", ".join(map(str, plan["seeds"])),
        "epochs": str(plan["epochs"]),
        "time": f"{minutes} min {seconds} s with {workers} worker(s) of one thread",
    }
