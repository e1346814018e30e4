"""The demo's report: from finished runs and their test predictions to comparisons, drawings and one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmc_fast.diagnose.document import Callout, Report, Section
from mmc_fast.diagnose.figures import Drawing
from mmc_fast.diagnose.verdict import ModalityVerdict

from .comparison import Comparison, compare
from .drawings import draw_fresh_discriminator, draw_game, draw_missing_rates, draw_reliance
from .runs import RunSet, group_runs, method_of
from .sections import chance_score, game_section, results_section, settings_section, summary_section
from .words import reliance_verdicts

__all__ = ["DemoFindings", "demo_drawings", "demo_findings", "demo_report"]

Predictions = Mapping[str, NDArray[Any]]
BASE, FOCUS, MASKED = "vanilla", ("ebr", "robust"), "dropout"


FORMS = (
    "**Two forms of EBR.** EBR is the published method: a missing modality is decoded from the latent of the available "
    "one that ranks nearest. EBR robust is the form that this project's study found to work best, not the authors': "
    "residual heads, a weak game, and training with random masks that are filled with the mean of the present latents, "
    "as at inference. It meets missing modalities in training, as modality dropout does; EBR does not."
)


@dataclass(frozen=True)
class DemoFindings:
    """One data set: its runs, the comparison of the methods, chance, and the verdicts per method and modality."""

    runs: RunSet
    comparison: Comparison
    chance: float
    verdicts: Mapping[str, Sequence[ModalityVerdict]]


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
        verdicts = {method: reliance_verdicts(runs, method) for method in runs.methods}
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
    focus = _focus(findings[0].runs)
    summary = summary_section(sets, [f.comparison for f in findings], base=BASE, focus=focus)
    if quick:
        warning = Callout("This was a smoke run of a few epochs and one seed. Its numbers mean **nothing**.", "warning")
        summary = Section(summary.title, [warning, *summary.blocks])
    report.add_section(summary)
    for f in findings:
        report.add_section(results_section(f.runs, f.comparison, f.chance, base=BASE, focus=focus, masked=MASKED))
    report.add_section(game_section(sets, focus=focus))
    configs = {sets[0].name(m): runs[0]["config"] for m, runs in sets[0].methods.items()}
    return report.add_section(settings_section(facts, configs, note=FORMS if "robust" in focus else ""))


def demo_drawings(findings: Sequence[DemoFindings]) -> dict[str, Drawing]:
    """Drawings worth a file of their own, by file name without its ending."""
    drawings: dict[str, Drawing] = {}
    for f in findings:
        name = f.runs.dataset
        drawings[f"{name}-missing-rates"] = draw_missing_rates(f.runs, f.comparison)
        for method in (BASE, *_focus(f.runs)):
            drawings[f"{name}-reliance-{method}"] = draw_reliance(f.runs, method, f.chance)
    for method in _focus(findings[0].runs):
        played = [f.runs for f in findings if all(_fresh(run) for run in f.runs.methods[method])]
        for runs in played:
            chance = _fresh(runs.methods[method][0])["chance"]
            drawings[f"{runs.dataset}-game-{method}"] = draw_game(runs, method, chance)
        if played:
            drawings[f"fresh-discriminator-{method}"] = draw_fresh_discriminator(played, method)
    return drawings


def _focus(runs: RunSet) -> tuple[str, ...]:
    return tuple(method for method in FOCUS if method in runs.methods)


def _fresh(run: Mapping[str, Any]) -> Any:
    return (run.get("game") or {}).get("fresh_discriminator")


def _key(results: Mapping[str, Any]) -> tuple[str, str, int]:
    return results["data"]["name"], method_of(results), results["seed"]


def _by_rate(predictions: Predictions) -> dict[float, NDArray[Any]]:
    rates = {float(n.removeprefix("missing_")): p for n, p in predictions.items() if n.startswith("missing_")}
    return {0.0: predictions["complete"]} | dict(sorted(rates.items()))


def _count(number: int, noun: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six")
    return f"{words[number] if number < len(words) else number} {noun}{'' if number == 1 else 's'}"
