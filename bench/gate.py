"""What the gated benches share: targets, the gate of a noisy machine, options, files and the record of the machine."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mmc_fast
from mmc_fast.ops import native as library

SLACK = 1.1  # the gate of a shared machine; the exact figures stand in docs/performance.md
TRIES = 3  # a ratio above its gate is measured again: a neighbour may have taken the caches

# (numerator, denominator, largest ratio asked for[, the ratio that was reached where that is more])
Target = tuple[str, str, float] | tuple[str, str, float, float]


def judged(targets: Iterable[Target], values: Mapping[str, float]) -> list[dict[str, Any]]:
    """The ratios of a row: value, target, whether it is met, and the gate, 1.1 x the target or what was reached."""
    found = []
    for over, under, limit, *reached in targets:
        if over in values and under in values:
            value = values[over] / values[under]
            gate = SLACK * max(limit, *reached, 0.0)
            found.append(
                {"ratio": f"{over} / {under}", "value": value, "target": limit, "met": value <= limit, "gate": gate}
            )
    return found


def tried(measure: Callable[[], dict], gated: bool) -> dict:
    """A row's result; where a ratio is above its gate the row is measured again and the best value counts."""
    result = measure()
    for _ in range(TRIES - 1 if gated else 0):
        if not above([result]):
            break
        for ratio, again in zip(result["ratios"], measure()["ratios"], strict=True):
            if again["value"] < ratio["value"]:
                ratio |= again
    return result


def above(results: Iterable[dict]) -> list[str]:
    """The ratios above their gates, in words."""
    return [
        f"{r['row']}: {q['ratio']} = {q['value']:.3f}, gate {q['gate']:.3f}"
        for r in results
        for q in r["ratios"]
        if q["value"] > q["gate"]
    ]


def parser(doc: str | None, rows: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """The options that every gated bench has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--gate", action="store_true", help="exit code 1 where a ratio exceeds its gate")
    made.add_argument("--row", action="append", choices=rows, help="only this row; may be repeated")
    made.add_argument("--one-thread", action="store_true", help="without the rows that need idle processors")
    made.add_argument("--list", action="store_true", help="name the rows")
    made.add_argument("--no-compile", action="store_true", help="without the baselines under torch.compile")
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--json", type=Path)
    made.add_argument("--csv", type=Path)
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


def finish(
    results: list[dict], options: argparse.Namespace, columns: Sequence[str], per_candidate: Sequence[str]
) -> int:
    """Write the files; exit code 1 where the gate is asked for and a ratio is above it."""
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1, default=str))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", *columns, "candidate", "milliseconds", *per_candidate])
            for r in results:
                for name, value in r["milliseconds"].items():
                    extra = (r.get(key, {}).get(name) for key in per_candidate)
                    writer.writerow([r["row"], *(r[key] for key in columns), name, value, *extra])
    failed = above(results)
    for line in failed:
        print(f"above the gate: {line}", file=sys.stderr)
    return 1 if options.gate and failed else 0


def environment() -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mmc_fast": mmc_fast.__version__,
        "library": library.describe(),
    }
