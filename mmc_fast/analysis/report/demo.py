"""The demo's report: from finished runs and their test predictions to comparisons, drawings and one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .comparison import Comparison, compare
from .document import Callout, Report, Section
from .drawings import draw_fresh_discriminator, draw_game, draw_missing_rates, draw_reliance
from .figures import Drawing
from .reliance import Verdict
from .runs import RunSet, group_runs
from .sections import chance_score, game_section, results_section, settings_section, summary_section
from .words import reliance_verdicts

__all__ = ["DemoFindings", "demo_drawings", "demo_findings", "demo_report"]

Predictions = Mapping[str, NDArray[Any]]
BASE, FOCUS, MASKED = "vanilla", "ebr", "dropout"


@dataclass(frozen=True)
class DemoFindings:
    """One data set: its runs, the comparison of the methods, chance, and the verdicts per method and modality."""

    runs: RunSet
    comparison: Comparison
    chance: float
    verdicts: Mapping[str, Sequence[Verdict]]


def demo_findings(
    outcomes: Sequence[tuple[Mapping[str, Any], Predictions]],
    *,
    titles: Mapping[str, str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> list[DemoFindings]:
    """Compare the methods on every data set.

    ``outcomes``: results and test predictions of each run; the predictions hold "labels" and class probabilities by
    condition, "complete" and "missing_RATE". ``seed`` draws the bootstrap resamples.
    """
    by_run = {_key(results): predictions for results, predictions in outcomes}
    findings = []
    for runs in group_runs([results for results, _ in outcomes], titles):
        labels = by_run[_key(runs.first)]["labels"]
        comparison = compare(
            runs.dataset,
            runs.metric,
            labels,
            {m: [_by_rate(by_run[_key(run)]) for run in group] for m, group in runs.methods.items()},
            seeds=runs.seeds,
            resamples=resamples,
            generator=np.random.default_rng(seed),
        )
        chance = chance_score(runs.metric, labels)
        verdicts = {method: reliance_verdicts(runs, method, chance) for method in runs.methods}
        findings.append(DemoFindings(runs, comparison, chance, verdicts))
    return findings


def demo_report(findings: Sequence[DemoFindings], facts: Mapping[str, str], *, quick: bool, version: str) -> Report:
    """The page. ``facts``: names and values of the environment; ``quick``: warn that the numbers mean nothing."""
    seeds = len(findings[0].runs.seeds)
    report = Report(
        "Modality collapse and explicit basis reallocation",
        f"{_count(len(findings[0].runs.methods), 'method').capitalize()} on {_count(len(findings), 'data set')}, "
        f"{_count(seeds, 'seed')} each: which modality a fused model ignores, what is left when modalities are "
        "missing, and what explicit basis reallocation (EBR) changes. All sentences are chosen by the numbers.",
        f"mmc-fast {version}. This page is self-contained and loads nothing.",
    )
    sets = [f.runs for f in findings]
    summary = summary_section(
        sets, [f.comparison for f in findings], [f.chance for f in findings], base=BASE, focus=FOCUS
    )
    if quick:
        warning = Callout("This was a smoke run of a few epochs and one seed. Its numbers mean **nothing**.", "warning")
        summary = Section(summary.title, [warning, *summary.blocks])
    report.add_section(summary)
    for f in findings:
        report.add_section(results_section(f.runs, f.comparison, f.chance, base=BASE, focus=FOCUS, masked=MASKED))
    report.add_section(game_section(sets, focus=FOCUS))
    configs = {sets[0].name(m): runs[0]["config"] for m, runs in sets[0].methods.items()}
    return report.add_section(settings_section(facts, configs))


def demo_drawings(findings: Sequence[DemoFindings]) -> dict[str, Drawing]:
    """Drawings worth a file of their own, by file name without its ending."""
    drawings: dict[str, Drawing] = {}
    for f in findings:
        name = f.runs.dataset
        drawings[f"{name}-missing-rates"] = draw_missing_rates(f.runs, f.comparison)
        for method in (BASE, FOCUS):
            drawings[f"{name}-reliance-{method}"] = draw_reliance(f.runs, method, f.chance)
        games = [run["game"] for run in f.runs.methods[FOCUS]]
        if all(game and game["fresh_discriminator"] for game in games):
            drawings[f"{name}-game"] = draw_game(f.runs, FOCUS, games[0]["fresh_discriminator"]["chance"])
    playing = [f.runs for f in findings if f"{f.runs.dataset}-game" in drawings]
    if playing:
        drawings["fresh-discriminator"] = draw_fresh_discriminator(playing, FOCUS)
    return drawings


def _key(results: Mapping[str, Any]) -> tuple[str, str, int]:
    return results["data"]["name"], results["method"], results["seed"]


def _by_rate(predictions: Predictions) -> dict[float, NDArray[Any]]:
    rates = {float(n.removeprefix("missing_")): p for n, p in predictions.items() if n.startswith("missing_")}
    return {0.0: predictions["complete"]} | dict(sorted(rates.items()))


def _count(number: int, noun: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six")
    return f"{words[number] if number < len(words) else number} {noun}{'' if number == 1 else 's'}"
