"""What the gated benches share: ratios, what they are compared with, options, files and the record of the machine.

A ratio is compared with what was recorded for this class of processors (``recorded.csv``), with room for a shared
machine; where nothing was recorded it is shown and compared with nothing. Targets stand beside it and decide nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import recorded
import torch

import mmc_fast
from mmc_fast.ops import native as library

SLACK = 1.1  # the gate of a shared machine is this many times the recorded ratio
TRIES = 3  # a ratio above its gate is measured again: a neighbour may have taken the caches

Target = tuple[str, str, float]  # numerator, denominator, largest ratio asked for


def ratios(targets: Iterable[Target], values: Mapping[str, float]) -> list[dict[str, Any]]:
    """The ratios of a row whose values are known: value, target, and whether it is met."""
    found = []
    for over, under, limit in targets:
        if over in values and under in values:
            value = values[over] / values[under]
            found.append({"ratio": f"{over} / {under}", "value": value, "target": limit, "met": value <= limit})
    return found


def load_since(begin: machine.Moment, threads: int, repeats: Iterable[Sequence[float]]) -> list[str]:
    """Why the measurement since ``begin`` can judge nothing, in words; ``repeats``: the times of each candidate."""
    spreads = [statistics.median(times) / min(times) - 1 for times in repeats if len(times) > 2]
    processors = os.cpu_count() or 1
    return machine.between(begin, machine.Moment.now(), processors, threads, max(spreads, default=0.0)).reasons()


def judged(attempts: Sequence[dict], reached: Mapping[str, float]) -> list[dict[str, Any]]:
    """The ratios of a row measured once or several times: the best value, ``recorded``, ``gate`` and ``state``.

    Attempts on a quiet machine count, others only where there is none, and then nothing is judged. ``state`` is
    "within", "above", "no record" or "not judged".
    """
    quiet = [a for a in attempts if not a["load"]]
    found = []
    for same in zip(*(a["ratios"] for a in quiet or attempts), strict=True):
        best = min(same, key=lambda r: r["value"])
        record = reached.get(best["ratio"])
        limit = None if record is None else SLACK * record
        if limit is None:
            state = "no record"
        elif not quiet:
            state = "not judged"
        else:
            state = "within" if best["value"] <= limit else "above"
        found.append({**best, "recorded": record, "gate": limit, "state": state})
    return found


def tried(measure: Callable[[], dict], bench: str, quiet: bool = False) -> dict:
    """A row's result with its ratios judged; where one is above its gate, or, if ``quiet`` is asked for, where the machine
    was busy, the row is measured again, ``TRIES`` times in all."""
    attempts = [measure()]
    reached = records(bench, attempts[0]["row"])
    while True:
        found = judged(attempts, reached)
        above = any(r["gate"] is not None and r["value"] > r["gate"] for r in found)
        busy = quiet and all(a["load"] for a in attempts)
        if len(attempts) == TRIES or not (above or busy):
            break
        attempts.append(measure())
    load = min((a["load"] for a in attempts), key=len)
    return attempts[0] | {"ratios": found, "load": load, "attempts": len(attempts)}


def records(bench: str, row: str) -> dict[str, float]:
    """What was recorded for a row on this class of processors: ratio -> value."""
    here = machine.this_class()
    return {e.ratio: e.value for e in recorded.read().values() if (e.processors, e.bench, e.row) == (here, bench, row)}


def table(results: Iterable[dict]) -> str:
    """Measured, recorded, gate and target of every ratio, one a line."""
    lines = [("row", "ratio", "measured", "recorded", "gate", "target", "", "")]
    for r in results:
        for q in r["ratios"]:
            numbers = (q["value"], q["recorded"], q["gate"], q["target"])
            cells = ("-" if v is None else f"{v:.3g}" for v in numbers)
            lines.append(
                (r["row"], q["ratio"], *cells, "target met" if q["met"] else "TARGET MISSED", SAID[q["state"]])
            )
    widths = [max(len(line[i]) for line in lines) for i in range(8)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


SAID = {"within": "within the gate", "above": "ABOVE THE GATE", "no record": "no record", "not judged": "not judged"}


def report(bench: str, results: Sequence[dict]) -> str:
    """The table, what it compares with, and why rows were not judged."""
    here = machine.this_class()
    same = [e for e in recorded.read().values() if (e.processors, e.bench) == (here, bench)]
    lines = [table(results), f"processors: {here}"]
    if same:
        lines.append("recorded on: " + "; ".join(sorted({f"{e.machine}, {e.date}" for e in same})))
    else:
        lines.append("nothing was recorded for these processors, so there is nothing to compare with (--record)")
    for r in results:
        if r["load"]:
            lines.append(f"{r['row']}: not judged, the machine is busy: {'; '.join(r['load'])}")
    return "\n".join(lines)


def record(bench: str, results: Iterable[dict], today: str) -> list[str]:
    """Write the ratios of rows measured on a quiet machine into the table; return the names of the other rows."""
    entries, left = [], []
    for r in results:
        if r["load"]:
            left.append(r["row"])
            continue
        place = (machine.name(), today)
        for q in r["ratios"]:
            entries.append(recorded.Entry(machine.this_class(), bench, r["row"], q["ratio"], q["value"], *place))
    recorded.write(entries)
    return left


def parser(doc: str | None, rows: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """The options that every gated bench has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ends = made.add_mutually_exclusive_group()
    ends.add_argument("--gate", action="store_true", help="exit code 1 where a ratio exceeds its gate")
    ends.add_argument("--record", action="store_true", help="write the ratios of this machine into bench/recorded.csv")
    made.add_argument("--row", action="append", choices=rows, help="only this row; may be repeated")
    made.add_argument("--one-thread", action="store_true", help="without the rows that need idle processors")
    made.add_argument("--list", action="store_true", help="name the rows")
    made.add_argument("--no-compile", action="store_true", help="without the baselines under torch.compile")
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--json", type=Path)
    return made


def begin(made: argparse.ArgumentParser, argv: list[str] | None, missing: str | None) -> argparse.Namespace:
    """Parse, list the rows where that is asked for, and stop where there is nothing to measure."""
    options = made.parse_args(argv)
    if options.list:
        rows = next(action for action in made._actions if action.dest == "row").choices or ()
        print("\n".join(rows))
        raise SystemExit(0)
    if missing:
        print(f"no native code, nothing to gate: {missing}", file=sys.stderr)
        raise SystemExit(2)
    if options.rounds < 1:
        made.error(f"--rounds {options.rounds}: pass 1 or more")
    torch.set_num_threads(1)
    return options


def chosen(rows: Iterable[Any], options: argparse.Namespace) -> list[Any]:
    """The rows that the options leave."""
    named = [row for row in rows if not options.row or row.name in options.row]
    return [row for row in named if row.threads == 1 or not options.one_thread]


def clock(threads: int) -> float:
    """CPU time of one thread, the clock on the wall for several."""
    return time.thread_time() if threads == 1 else time.perf_counter()


def finish(bench: str, results: list[dict], options: argparse.Namespace) -> int:
    """Print the report and write the file; exit code 1 where the gate is asked for and a ratio is above it, or where a
    row that should be recorded was not."""
    if any(r["ratios"] for r in results):
        print(report(bench, results))
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1, default=str))
    if options.record:
        left = record(bench, results, datetime.date.today().isoformat())
        for row in left:
            print(f"{row}: not recorded, the machine is busy; try again when it is idle", file=sys.stderr)
        return 1 if left else 0
    above = any(q["state"] == "above" for r in results for q in r["ratios"])
    return 1 if options.gate and above else 0


def by_candidate(metafunc: Any, pairs: Sequence[tuple[Any, str]]) -> None:
    """One test for each (row, candidate), where a test asks for both."""
    if {"row", "candidate"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("row", "candidate"), pairs, ids=[f"{row.name}-{name}" for row, name in pairs])


def benchmarked(benchmark: Any, run: Callable[[], object], threads: int, rounds: int, warm: bool = True) -> None:
    """Run a candidate through pytest-benchmark: its CPU time on one thread, the clock on the wall on several."""
    if threads > 1:
        benchmark._timer = time.perf_counter
    torch.set_num_threads(threads)
    try:
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=int(warm))
    finally:
        torch.set_num_threads(1)
    benchmark.extra_info.update(processor=machine.name(), processors=machine.this_class(), threads=threads)


def environment() -> dict:
    return {
        "processor": machine.name(),
        "class": machine.this_class(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mmc_fast": mmc_fast.__version__,
        "library": library.describe(),
    }
