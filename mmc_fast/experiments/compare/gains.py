"""What each option of an exploration gains, from its log: ``python -m mmc_fast.experiments.compare.gains LOG.jsonl``."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Gain", "gains", "table"]


class Gain(NamedTuple):
    """An option on an arm: mean gain over ``against`` on the same seeds, and its standard error, at missing rates and complete."""

    option: str
    against: str
    arm: str
    data: str
    seeds: int
    missing: tuple[float, float]
    complete: tuple[float, float]


def gains(lines: Sequence[Mapping[str, Any]]) -> list[Gain]:
    """Paired by seed. "recipe-NAME" is held against "recipe", every other option against "base"; in the order of the log."""
    scores: dict[tuple[str, str, str], dict[int, tuple[float, float]]] = {}
    for line in lines:
        if not line["failed"]:
            s = line["scores"]
            found = statistics.fmean(v for name, v in s.items() if name != "complete"), s["complete"]
            scores.setdefault((line["option"], line["arm"], line["data"]), {})[line["seed"]] = found
    result = []
    for (option, arm, data), mine in scores.items():
        against = "recipe" if option.startswith("recipe-") else "base"
        theirs = scores.get((against, arm, data), {})
        both = [seed for seed in mine if seed in theirs]
        if option != against and both:
            pairs = [[mine[seed][i] - theirs[seed][i] for seed in both] for i in (0, 1)]
            result.append(Gain(option, against, arm, data, len(both), _mean(pairs[0]), _mean(pairs[1])))
    return result


def table(found: Sequence[Gain]) -> str:
    """Markdown: a row for each option and arm, a column for each set; missing / complete, ± one standard error."""
    sets = list(dict.fromkeys(g.data for g in found))
    rows = list(dict.fromkeys((g.option, g.against, g.arm) for g in found))
    by = {g[:4]: g for g in found}
    lines = [f"| option | against | arm | {' | '.join(f'{d}: missing, complete' for d in sets)} |"]
    lines.append("|---|---|---|" + "---|" * len(sets))
    for row in rows:
        cells = [by.get((*row, d)) for d in sets]
        texts = ["–" if g is None else f"{_text(g.missing)}, {_text(g.complete)} ({g.seeds})" for g in cells]
        lines.append(f"| {' | '.join(row)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def _text(pair: tuple[float, float]) -> str:
    return f"{pair[0]:+.4f}" + ("" if pair[1] != pair[1] else f" ± {pair[1]:.4f}")


if __name__ == "__main__":
    print(table(gains([json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()])))
