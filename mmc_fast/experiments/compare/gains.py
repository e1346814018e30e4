"""What each option of an exploration gains, from its log: ``python -m mmc_fast.experiments.compare.gains LOG.jsonl [AGAINST]``."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Gain(NamedTuple):
    """An option on an arm: mean gain over ``against`` on the same seeds, and its standard error, at missing rates and complete."""

    option: str
    against: str
    arm: str
    data: str
    seeds: int
    missing: tuple[float, float]
    complete: tuple[float, float]
    halves: tuple[float, float]


def gains(lines: Sequence[Mapping[str, Any]], other: str | None = None) -> list[Gain]:
    """Paired by seed. An option is held against ``other``; without one "recipe-NAME" against "recipe", the rest against "base"."""
    scores: dict[tuple[str, str, str], dict[int, tuple[float, float]]] = {}
    for line in lines:
        if not line["failed"]:
            s = line["scores"]
            found = statistics.fmean(v for name, v in s.items() if name != "complete"), s["complete"]
            scores.setdefault((line["option"], line["arm"], line["data"]), {})[line["seed"]] = found
    result = []
    for (option, arm, data), mine in scores.items():
        against = other or ("recipe" if option.startswith("recipe-") else "base")
        theirs = scores.get((against, arm, data), {})
        both = [seed for seed in mine if seed in theirs]
        if option != against and both:
            pairs = [[mine[seed][i] - theirs[seed][i] for seed in both] for i in (0, 1)]
            pairs.append([(a + b) / 2 for a, b in zip(*pairs, strict=True)])
            missing, complete, halves = map(_mean, pairs)
            result.append(Gain(option, against, arm, data, len(both), missing, complete, halves))
    return result


def table(found: Sequence[Gain]) -> str:
    """Markdown: a row for each option and arm, a column for each set; missing, complete, ± one standard error; the mean of both over the sets."""
    sets = list(dict.fromkeys(g.data for g in found))
    rows = list(dict.fromkeys((g.option, g.against, g.arm) for g in found))
    by = {g[:4]: g for g in found}
    lines = [f"| option | against | arm | {' | '.join(f'{d}: missing, complete' for d in sets)} | mean of both |"]
    lines.append("|---|---|---|---|" + "---|" * len(sets))
    for row in rows:
        cells = [by.get((*row, d)) for d in sets]
        texts = ["–" if g is None else f"{_text(g.missing)}, {_text(g.complete)} ({g.seeds})" for g in cells]
        both = [g.halves for g in cells if g is not None]
        error = sum(e * e for _, e in both) ** 0.5 / len(both)
        lines.append(f"| {' | '.join([*row, *texts, _text((statistics.fmean(v for v, _ in both), error))])} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def _text(pair: tuple[float, float]) -> str:
    return f"{pair[0]:+.4f}" + ("" if pair[1] != pair[1] else f" ± {pair[1]:.4f}")


if __name__ == "__main__":
    log = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    print(table(gains([json.loads(line) for line in log], *sys.argv[2:])))
