"""Sections built from finished runs. Each takes plain results; a report picks the ones that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmc_fast.diagnose.document import Block, Callout, Cell, Details, Facts, Panels, Section, Table, Text, signed
from mmc_fast.diagnose.verdict import THRESHOLDS

from .comparison import Comparison, table_rows
from .drawings import draw_fresh_discriminator, draw_game, draw_history, draw_missing_rates, draw_reliance, metric_name
from .runs import RunSet, display_name
from .words import collapse_summary, collapse_words, comparison_words, game_words, reliance_verdicts

__all__ = ["chance_score", "game_section", "results_section", "settings_section", "summary_section"]


def chance_score(metric: str, labels: ArrayLike) -> float:
    """Score of a model that knows nothing but the labels' frequencies."""
    y = np.asarray(labels)
    if metric == "auroc":
        return 0.5
    return float((y == 1).mean()) if metric == "auprc" else float(np.bincount(y).max() / len(y))


def summary_section(
    runs: Sequence[RunSet],
    comparisons: Sequence[Comparison],
    *,
    base: str,
    focus: Sequence[str],
) -> Section:
    """The findings in a few sentences: collapse in the ``base`` method, and what each of ``focus`` gains or loses."""
    blocks: list[Block] = []
    for run_set, comparison in zip(runs, comparisons, strict=True):
        collapsed = any(v.kind == "collapsed" for v in reliance_verdicts(run_set, base))
        blocks.append(Callout(collapse_summary(run_set, base), "finding" if collapsed else "note"))
        blocks.append(Text("\n\n".join(words for method in focus for words in comparison_words(comparison, method))))
    return Section("What the runs show", blocks)


def results_section(
    runs: RunSet, comparison: Comparison, chance: float, *, base: str, focus: Sequence[str], masked: str | None
) -> Section:
    """Table, missing rates, reliance of ``base`` and ``focus``, and a sentence per modality for one data set."""
    names = {method: runs.name(method) for method in runs.methods}
    table = Table(
        ["method", *comparison.conditions],
        table_rows(comparison, names),
        f"Test {metric_name(comparison.metric)}, mean ± s.d. over {len(comparison.seeds)} seed(s). Bold: the paired "
        f"{comparison.level:.0%} intervals against every other method lie above 0.",
    )
    blocks: list[Block] = [
        table,
        Panels([draw_missing_rates(runs, comparison).figure(), _validation(runs)]),
        Panels([draw_reliance(runs, method, chance).figure() for method in (base, *focus)]),
        _reliance_table(runs, base=base, focus=focus),
        Text("\n\n".join(collapse_words(runs, base, masked))),
        Details("Differences between all methods, with intervals", [_differences(runs, comparison)]),
        Details("Share of values that were really missing", [_realised(runs)]),
    ]
    return Section(_heading(runs), blocks)


def game_section(runs: Sequence[RunSet], *, focus: Sequence[str]) -> Section:
    """Losses of both players over the epochs, and what a fresh discriminator finds at the end."""
    playing = {m: [r for r in runs if all(_fresh(run) for run in r.methods[m])] for m in focus}
    if not any(playing.values()):
        return Section("The adversarial game", [Text("No run plays it: λ is 0 or there is one modality.")])
    figures = []
    for run_set in runs:
        figures.append(draw_history(run_set, "loss_sem", "training loss L_sem", "cross-entropy").figure())
        for method in focus:
            if run_set in playing[method]:
                chance = _fresh(run_set.methods[method][0])["chance"]
                figures.append(draw_game(run_set, method, chance).figure())
    figures += [draw_fresh_discriminator(sets, method).figure() for method, sets in playing.items() if sets]
    explanation = (
        "EBR lets the encoders work against a discriminator ψ that names the modality of a latent. The loss L_md alone "
        "cannot tell who wins, since a weak ψ also has a high loss; so a fresh discriminator is trained to convergence "
        "on the frozen latents and judged on held-out samples."
    )
    return Section(
        "The adversarial game",
        [Text(explanation), *[Text(game_words(r, m)) for m, sets in playing.items() for r in sets], Panels(figures)],
    )


def settings_section(facts: Mapping[str, str], configs: Mapping[str, Mapping[str, Any]], *, note: str = "") -> Section:
    """Environment, how to read the numbers (after an own ``note``), and the full configuration of every method."""
    reading = (
        "**Missing data.** Each modality of each test row is hidden independently with the nominal rate; a row that "
        "would lose everything is drawn again. Seeds share their masks between methods.\n\n"
        "**Intervals.** The variance of a difference is the variance over seeds divided by their number plus the "
        "bootstrap variance over test samples; the quantile is Student's t with the degrees of freedom of Welch and "
        "Satterthwaite. With few seeds these intervals are wide, and they should be.\n\n"
        "**Use and ability.** Each run is judged as ``mmc-fast diagnose`` judges it. Ability is what a unimodal model scores above "
        "chance. Use is the Shapley value of the score over the subsets of modalities, the others handled by the model's own rule "
        "for absent ones, and what is lost when a modality is that of other samples. A modality has collapsed where it could give "
        "and neither shows any use; it is under-used where its share of the use is below "
        f"{THRESHOLDS.under:g} of its share of the abilities. A low score with nothing else is a matter of robustness, not of collapse."
    )
    rows = _flat(configs)
    table = Table(
        ["setting", *configs], rows, "All settings of every method; a dash where a method does not have the setting."
    )
    return Section(
        "How to read this, and settings",
        [Text(f"{note}\n\n{reading}".strip()), Facts(facts), Details("All settings", [table])],
    )


def _fresh(run: Mapping[str, Any]) -> Any:
    return (run.get("game") or {}).get("fresh_discriminator")


def _heading(runs: RunSet) -> str:
    return f"{runs.dataset}: {runs.title}" if runs.title else runs.dataset


def _validation(runs: RunSet) -> Any:
    return draw_history(runs, "val_score", "validation score", metric_name(runs.metric)).figure()


def _reliance_table(runs: RunSet, *, base: str, focus: Sequence[str]) -> Table:
    methods = (base, *focus)
    verdicts = {method: {v.modality: v for v in reliance_verdicts(runs, method)} for method in methods}
    columns = ["modality", "alone"]
    for method in methods:
        columns += [
            f"{display_name(method)}: {what}" for what in ("shuffled", "nothing else", "use over ability", "verdict")
        ]
    rows: list[list[Cell | str]] = []
    for modality, first in verdicts[base].items():
        row: list[Cell | str] = [modality, _number(first.evidence.get("alone"))]
        for method in methods:
            v = verdicts[method][modality]
            row += [_number(v.evidence.get(kind)) for kind in ("shuffled", "only", "index")]
            row.append(Cell(v.kind, strong=v.kind in ("collapsed", "misleading")))
        rows.append(row)
    return Table(
        columns,
        rows,
        "Score of a unimodal model, of the fused model with the modality of other samples, and of the fused model with nothing "
        "else, by its own handling of absent modalities; means over seeds, and the verdict of most of them.",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _differences(runs: RunSet, comparison: Comparison) -> Table:
    methods = list(comparison.scores)
    pairs = [(a, b) for i, a in enumerate(methods) for b in methods[i + 1 :]]
    rows = []
    for first, second in pairs:
        cells: list[Cell | str] = [f"{runs.name(second)} − {runs.name(first)}"]
        for condition in comparison.conditions:
            d = comparison.difference(second, first, condition)
            cells.append(Cell(signed(d.estimate), d.verdict != "undecided", f"{signed(d.low)} … {signed(d.high)}"))
        rows.append(cells)
    return Table(
        ["difference", *comparison.conditions],
        rows,
        f"Paired {comparison.level:.0%} intervals, {comparison.resamples} resamples. Bold: the interval excludes 0.",
    )


def _realised(runs: RunSet) -> Table:
    first = runs.first
    modalities = list(first["scores"]["reliance"])
    rows = [
        [f"{entry['rate']:g}", *(f"{share:.3f}" for share in entry["realised"])] for entry in first["scores"]["missing"]
    ]
    return Table(["nominal", *modalities], rows, f"Realised missing rates of seed {first['seed']}.")


def _flat(configs: Mapping[str, Mapping[str, Any]]) -> list[list[Cell | str]]:
    def walk(prefix: str, values: Mapping[str, Any]) -> dict[str, str]:
        result = {}
        for key, value in values.items():
            if isinstance(value, Mapping):
                result.update(walk(f"{prefix}{key}.", value))
            else:
                result[f"{prefix}{key}"] = "–" if value is None else str(value)
        return result

    flat = {name: walk("", config) for name, config in configs.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    return [[f"`{key}`", *(values.get(key, "–") for values in flat.values())] for key in keys]
