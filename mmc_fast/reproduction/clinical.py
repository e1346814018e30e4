"""Tables 1, 2 and 5: clinical tasks, one pair of columns for each metric of each data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..analysis.report.comparison import COMPLETE
from ..analysis.report.drawings import metric_name
from ..comparison.rows import Source, load_rows, load_sources
from .base import Direction, Experiment, Outcome, Plan, ResultTable
from .paper import TABLE5
from .scores import Scored, score_rows, task_of

__all__ = ["TABLE_5"]

_PLACES = {"mortality": 0, "readmission": 2}  # of a task's AUC (ROC) among the paper's numbers; the other AUC is next
COMPLETE_DATA: dict[str, object] = {"rates": [], "selection": "complete"}


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
    for name, label in zip(rows, scored.labels(list(rows)), strict=True):
        key = rows[name]
        paper = None if key is None else numbers[key]
        values = [scored.value(s.name, m, name, condition, paper_number(paper, s, m)) for s, m in columns]
        lines.append((label, values))
    return ResultTable(title, [f"{s.name} {metric_name(m)}" for s, m in columns], lines)


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
                    result.append(scored.direction(s.name, metric, first, second, condition, a - b))
    return result


def _notes(scored: Scored, *others: str) -> list[str]:
    gate = scored.gate_note()
    return [*others, *([gate] if gate else [])]


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
    return Outcome([table], directions, {}, _notes(scored), scored.facts(), scored.record())


TABLE_5 = Experiment(
    "table5",
    "The order in which teachers take turns in distillation",
    "Table 5, MIMIC-IV mortality: teachers from weakest to strongest are best, from strongest to weakest worst.",
    (
        "Support2 (death in hospital, five modalities) in place of MIMIC-IV.",
        "Distillation by symmetric InfoNCE into the encoders of a vanilla model; the paper's base model is not stated.",
        "Every stronger modality teaches every weaker one; strength is the validation score of unimodal models.",
    ),
    ("support2",),
    _table5,
)
