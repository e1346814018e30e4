"""Sections built from finished runs. Each takes plain results; a report picks the ones that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmc_fast.diagnose.document import Block, Callout, Cell, Details, Facts, Panels, Section, Table, Text, signed

from .comparison import Comparison, table_rows
from .drawings import draw_fresh_discriminator, draw_game, draw_history, draw_missing_rates, draw_reliance, metric_name
from .reliance import KEPT_MAX, LOSS_MAX, SIGNAL_MIN
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
    chances: Sequence[float],
    *,
    base: str,
    focus: Sequence[str],
) -> Section:
    """The findings in a few sentences: collapse in the ``base`` method, and what each of ``focus`` gains or loses."""
    blocks: list[Block] = []
    for run_set, comparison, chance in zip(runs, comparisons, chances, strict=True):
        collapsed = any(v.kind == "collapsed" for v in reliance_verdicts(run_set, base, chance))
        blocks.append(Callout(collapse_summary(run_set, base, chance), "finding" if collapsed else "note"))
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
        _reliance_table(runs, chance, base=base, focus=focus, masked=masked),
        Text("\n\n".join(collapse_words(runs, base, chance, masked))),
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
        f"**Collapse.** On a scale from chance (0) to the fused model (1), a modality has collapsed when it reaches "
        f"{SIGNAL_MIN:g} or more alone, its absence costs {LOSS_MAX:g} or less, and the fused model keeps "
        f"{KEPT_MAX:g} or less of its signal when it gets nothing else. Absent modalities are filled with the train "
        "mean for this test. Models that have never seen that can fail on it for that reason alone; the model trained "
        "with modality dropout is the control."
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
    return (run.get("adversarial") or {}).get("modality_probe")


def _heading(runs: RunSet) -> str:
    return f"{runs.dataset}: {runs.title}" if runs.title else runs.dataset


def _validation(runs: RunSet) -> Any:
    return draw_history(runs, "val_score", "validation score", metric_name(runs.metric)).figure()


def _reliance_table(runs: RunSet, chance: float, *, base: str, focus: Sequence[str], masked: str | None) -> Table:
    verdicts = {method: {v.modality: v for v in reliance_verdicts(runs, method, chance)} for method in (base, *focus)}
    control = runs.reliance(masked) if masked is not None else {}
    columns = ["modality", "alone"]
    for method in (base, *focus):
        name = display_name(method)
        columns += [f"{name}: without", f"{name}: only", f"{name}: verdict"]
    columns += [f"{display_name(masked)}: only"] if masked is not None else []
    rows: list[list[Cell | str]] = []
    for modality, scores in runs.reliance(base).items():
        row: list[Cell | str] = [modality, _number(scores.get("alone"))]
        for method in (base, *focus):
            own, verdict = runs.reliance(method)[modality], verdicts[method].get(modality)
            row += [_number(own["without"]), _number(own["only"])]
            row.append(Cell(verdict.kind, strong=verdict.kind == "collapsed") if verdict else "–")
        rows.append([*row, _number(control[modality]["only"])] if masked is not None else row)
    return Table(
        columns,
        rows,
        "Score of a model of this modality alone, of the fused model without it, and of the fused model with nothing "
        "else; means over seeds.",
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
