"""Tables 1, 2 and 5: clinical tasks, one pair of columns for each metric of each data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mmc_fast.diagnose.figures import Drawing

from ..compare.rows import Source, load_rows, load_sources
from ..report.comparison import AVERAGE, COMPLETE
from ..report.drawings import draw_rates, metric_name
from .base import Direction, Experiment, Outcome, Plan, ResultTable
from .paper import TABLE1, TABLE2, TABLE5
from .scores import Scored, rows_on_bases, score_rows, task_of

__all__ = ["TABLE_1", "TABLE_2", "TABLE_5"]

_PLACES = {"mortality": 0, "readmission": 2}  # of a task's AUC (ROC) among the paper's numbers; the other AUC is next
COMPLETE_DATA: dict[str, object] = {"rates": [], "selection": "complete"}


_BUDGETS = {
    "support2": {"epochs": 10, "batch_size": 128},
    "diabetes130-readmission": {"epochs": 2, "batch_size": 512},
}
"""Of tables 1 and 2, whose slowest rows take a hundred times the time of vanilla (MT steps through every subset)."""


def _sources(experiment: Experiment, plan: Plan) -> list[Source]:
    found = load_sources(experiment.sources(plan))
    return [replace(s, budget={**s.budget, **_BUDGETS.get(s.name, {})}) for s in found]


def paper_number(numbers: Sequence[float] | None, source: Source, metric: str) -> float | None:
    """The paper's number for a source's task and a metric; None where it prints none."""
    if numbers is None or metric not in ("auroc", "auprc"):
        return None
    place = _PLACES[task_of(source)] + (metric == "auprc")
    return numbers[place] if place < len(numbers) else None


def clinical_table(
    title: str,
    scored: Scored,
    sources: Sequence[Source],
    rows: Mapping[str, str | None],
    numbers: Mapping[str, Sequence[float]],
    condition: str,
) -> ResultTable:
    """``rows``: row -> its key among the paper's numbers, None for a row that the paper lacks."""
    columns = [(s, metric) for s in sources for metric in scored.findings[s.name].comparisons]
    lines = []
    for name, key in rows.items():
        paper = None if key is None else numbers[key]
        values = [scored.value(s.name, m, name, condition, paper_number(paper, s, m)) for s, m in columns]
        lines.append((scored.title(name), values))
    headings = [f"{s.name} {metric_name(m)}" for s, m in columns]
    return ResultTable(title, headings, lines, footnote=scored.footnote)


def paper_differences(
    scored: Scored,
    sources: Sequence[Source],
    pairs: Sequence[tuple[str, str, str, str]],
    numbers: Mapping[str, Sequence[float]],
    condition: str,
) -> list[Direction]:
    """For (first row, second row, their keys in the paper): the paper's difference against ours, by source and metric.

    On data with another metric than the paper's, the sign is that of its AUC (ROC).
    """
    result = []
    for s in sources:
        for metric in scored.findings[s.name].comparisons:
            for first, second, key, other in pairs:
                known = metric if metric in ("auroc", "auprc") else "auroc"
                a, b = paper_number(numbers[key], s, known), paper_number(numbers[other], s, known)
                if a is not None and b is not None and a != b:
                    result.append(scored.direction(s.name, metric, (first, second), condition, a - b))
    return result


def _finished(
    scored: Scored,
    table: ResultTable,
    directions: Sequence[Direction],
    notes: Sequence[str] = (),
    drawings: Mapping[str, Drawing] | None = None,
) -> Outcome:
    return Outcome([table], directions, drawings or {}, notes, scored.facts(), scored.record())


def _table1(plan: Plan) -> Outcome:
    sources = _sources(TABLE_1, plan)
    peers = [name for name in TABLE1 if name != "ebr"]
    forms = ["ebr-paper", "ebr-robust"]
    scored = score_rows(plan, load_rows(["vanilla", *peers, *forms]), sources, {})
    rows: dict[str, str | None] = {"vanilla": None} | {name: name for name in peers}
    rows |= {"ebr-paper": "ebr", "ebr-robust": None}
    table = clinical_table("Table 1: mean over the missing rates", scored, sources, rows, TABLE1, AVERAGE)
    pairs = [(form, peer, "ebr", peer) for form in forms for peer in peers]
    directions = paper_differences(scored, sources, pairs, TABLE1, AVERAGE)
    drawings = {}
    for data, f in scored.findings.items():
        for kind, names in (("peers", ["vanilla", *peers]), ("ebr", ["vanilla", "muse", "shaspec", *forms])):
            shown = {name: f.rows[name].title for name in names if name in f.main.scores}
            drawings[f"{data}-{kind}"] = draw_rates(f.main, shown)
    notes = [
        "The paper's spread in this table is over the five missing rates, not over seeds; ours is over seeds.",
        "The paper states p < .01 of a signed-rank test; its five pairs (the rates) cannot give less than .0625.",
        "The paper's EBR is compared in two forms: the paper's own, and the robust form of this library.",
    ]
    return _finished(scored, table, directions, notes, drawings)


def _table2(plan: Plan) -> Outcome:
    sources = _sources(TABLE_2, plan)
    scored = score_rows(plan, rows_on_bases(["vanilla", *TABLE2]), sources, COMPLETE_DATA)
    rows: dict[str, str | None] = {"vanilla": None} | {name: name for name in TABLE2}
    table = clinical_table("Table 2: complete data", scored, sources, rows, TABLE2, COMPLETE)
    bases = [name for name in TABLE2 if "+" not in name]
    pairs = [(f"{base}+{more}", base) for base in bases for more in ("kd", "ebr")]
    pairs += [(f"{base}+ebr", f"{base}+kd") for base in bases]
    directions = paper_differences(scored, sources, [(a, b, a, b) for a, b in pairs], TABLE2, COMPLETE)
    return _finished(scored, table, directions)


def _table5(plan: Plan) -> Outcome:
    sources = load_sources(TABLE_5.sources(plan))
    vanilla, *orders = load_rows(["vanilla", *TABLE5])
    best = next(row for row in orders if row.name == "kd")
    # One setting for all orders, so that nothing but the order differs.
    orders = [replace(row, chosen=best.chosen) for row in orders if row is not best]
    orders.append(replace(best, title="KD, weakest to strongest"))
    scored = score_rows(plan, [vanilla, *orders], sources, COMPLETE_DATA)
    rows: dict[str, str | None] = {"vanilla": None} | {name: name for name in TABLE5}
    table = clinical_table("Table 5: order of distillation, complete data", scored, sources, rows, TABLE5, COMPLETE)
    worst = "kd-strongest-first"
    pairs = [("kd", other) for other in TABLE5 if other != "kd"]
    pairs += [(worst, other) for other in TABLE5 if other not in ("kd", worst)]
    directions = paper_differences(scored, sources, [(a, b, a, b) for a, b in pairs], TABLE5, COMPLETE)
    return _finished(scored, table, directions)


_STAND_INS = (
    "Open data in place of MIMIC-IV: by default support2 (death in hospital) for mortality and diabetes130 (readmission "
    "within 30 days) for readmission. The paper's numbers for mortality stand beside any data that are not of readmission."
)
_SETTINGS = (
    "Small encoders and few epochs, the same for every row (support2: 10 epochs in batches of 128; diabetes130: 2 in batches "
    "of 512; --epochs changes it); settings are stored choices or the declared defaults, "
    "with --tune auto those of a search on validation data."
)
TABLE_1 = Experiment(
    "table1",
    "Clinical tasks with modalities missing, mean over the missing rates",
    "Table 1, MIMIC-IV, mean over the rates .1, .2, .3, .4, .7: EBR is above every other method on both tasks.",
    (
        _STAND_INS,
        "Modalities are missing from the test rows, independently, no row loses all; training rows are masked afresh in "
        "every epoch by the methods that train with masks.",
        "CM-AE, SMIL, MT, GRAPE, M3Care, ShaSpec and MUSE are small re-implementations.",
        _SETTINGS,
    ),
    ("support2", "diabetes130-readmission"),
    _table1,
    searches=True,
)
TABLE_2 = Experiment(
    "table2",
    "KD and EBR under GRAPE, M3Care and MUSE, complete data",
    "Table 2, MIMIC-IV, complete data: KD raises each of the three methods, EBR raises each more.",
    (
        _STAND_INS,
        "+ KD and + EBR are put at the unimodal encoders; EBR has residual heads and normalised latents there.",
        "GRAPE, M3Care and MUSE are small re-implementations; they train with random masks here too.",
        _SETTINGS,
    ),
    ("support2", "diabetes130-readmission"),
    _table2,
    searches=True,
)
TABLE_5 = Experiment(
    "table5",
    "The order in which teachers take turns in distillation",
    "Table 5, MIMIC-IV mortality: teachers from weakest to strongest are best, from strongest to weakest worst.",
    (
        "By default support2 (death in hospital, five modalities) in place of MIMIC-IV.",
        "Distillation by symmetric InfoNCE into the encoders of a vanilla model; the paper's base model is not stated.",
        "Every stronger modality teaches every weaker one; strength is the validation score of unimodal models.",
        "All orders have the same settings.",
    ),
    ("support2",),
    _table5,
    searches=True,
)
