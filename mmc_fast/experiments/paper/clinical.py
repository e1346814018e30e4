"""Tables 1, 2 and 5: clinical tasks, one pair of columns for each metric of each data config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..compare.configs import DataConfig, load_data_configs, load_method_configs
from ..report.comparison import AVERAGE, COMPLETE
from ..report.drawings import draw_rates, metric_name
from .base import Direction, Outcome, Plan, ResultTable, declare
from .paper import TABLE1, TABLE2, TABLE5
from .scores import Scored, score_methods, with_base_settings

_PLACES = {"mortality": 0, "readmission": 2}  # of a task's AUC (ROC) among the paper's numbers; the other AUC is next
_COMPLETE_DATA: dict[str, object] = {"rates": [], "selection": "complete"}
_BUDGETS = {
    "support2": {"epochs": 10, "batch_size": 128},
    "diabetes130-readmission": {"epochs": 2, "batch_size": 512},
}
"""Of tables 1 and 2, whose slowest methods take a hundred times the time of vanilla (MT steps through every subset)."""

_PRESETS = ("recommended", "ebr-best")  # of this library; they stand beside the paper's form
Numbers = Mapping[str, Sequence[float]]


def _data(plan: Plan) -> list[DataConfig]:
    return [replace(d, budget={**d.budget, **_BUDGETS.get(d.name, {})}) for d in load_data_configs(plan.data)]


def paper_number(numbers: Sequence[float] | None, data: DataConfig, metric: str) -> float | None:
    """The paper's number for the task that the data stand for and a metric; None where it prints none."""
    if numbers is None or metric not in ("auroc", "auprc"):
        return None
    task = "readmission" if data.options.get("task") == "readmission" else "mortality"
    place = _PLACES[task] + (metric == "auprc")
    return numbers[place] if place < len(numbers) else None


def _table(
    title: str, scored: Scored, data: Sequence[DataConfig], methods: Mapping[str, str | None], numbers: Numbers, condition: str
) -> ResultTable:  # fmt: skip
    """``methods``: method config -> its key among the paper's numbers, None for one that the paper lacks."""
    columns = [(d, metric) for d in data for metric in scored.findings[d.name].comparisons]
    lines = []
    for name, key in methods.items():
        paper = None if key is None else numbers[key]
        values = [scored.value(d.name, m, name, condition, paper_number(paper, d, m)) for d, m in columns]
        lines.append((scored.title(name), values))
    headings = [f"{d.name} {metric_name(m)}" for d, m in columns]
    return ResultTable(title, headings, lines, footnote=scored.footnote)


def _directions(
    scored: Scored, data: Sequence[DataConfig], pairs: Sequence[tuple[str, str]], numbers: Numbers, condition: str
) -> list[Direction]:
    """For pairs of method configs: the paper's difference against ours, by data and metric.

    On data with another metric than the paper's, the sign is that of its AUC (ROC). Both forms of EBR stand for the paper's.
    """
    result = []
    for d in data:
        for metric in scored.findings[d.name].comparisons:
            for pair in pairs:
                known = metric if metric in ("auroc", "auprc") else "auroc"
                a, b = (paper_number(numbers["ebr" if n in ("ebr-paper", "ebr-robust") else n], d, known) for n in pair)
                if a is not None and b is not None and a != b:
                    result.append(scored.direction(d.name, metric, pair, condition, a - b))
    return result


def _table1(plan: Plan) -> Outcome:
    data, forms = _data(plan), ["ebr-paper", "ebr-robust"]
    baselines = [name for name in TABLE1 if name != "ebr"]
    scored = score_methods(plan, load_method_configs(["vanilla", *baselines, *forms, *_PRESETS]), data, {})
    methods: dict[str, str | None] = {"vanilla": None} | {name: name for name in baselines}
    methods |= {"ebr-paper": "ebr", "ebr-robust": None} | dict.fromkeys(_PRESETS)
    table = _table("Table 1: mean over the missing rates", scored, data, methods, TABLE1, AVERAGE)
    pairs = [(form, baseline) for form in forms for baseline in baselines]
    drawings = {}
    for name, f in scored.findings.items():
        for kind, some in (("baselines", ["vanilla", *baselines]), ("ebr", ["vanilla", "muse", "shaspec", *forms])):
            drawings[f"{name}-{kind}"] = draw_rates(f.main, {m: f.methods[m].title for m in some if m in f.main.scores})
    notes = [
        "The paper's spread in this table is over the five missing rates, not over seeds; ours is over seeds.",
        "The paper states p < .01 of a signed-rank test; its five pairs (the rates) cannot give less than .0625.",
        "The paper's EBR is compared in two forms: the paper's own, and the robust form of this library.",
    ]
    directions = _directions(scored, data, pairs, TABLE1, AVERAGE)
    return Outcome([table], directions, drawings, notes, scored.facts(), scored.record())


def _table2(plan: Plan) -> Outcome:
    data = _data(plan)
    scored = score_methods(plan, with_base_settings(["vanilla", *TABLE2]), data, _COMPLETE_DATA)
    methods: dict[str, str | None] = {"vanilla": None} | {name: name for name in TABLE2}
    table = _table("Table 2: complete data", scored, data, methods, TABLE2, COMPLETE)
    bases = [name for name in TABLE2 if "+" not in name]
    pairs = [(f"{base}+{more}", base) for base in bases for more in ("kd", "ebr")]
    pairs += [(f"{base}+ebr", f"{base}+kd") for base in bases]
    directions = _directions(scored, data, pairs, TABLE2, COMPLETE)
    return Outcome([table], directions, facts=scored.facts(), record=scored.record())


def _table5(plan: Plan) -> Outcome:
    data = load_data_configs(plan.data)
    vanilla, *orders = load_method_configs(["vanilla", *TABLE5])
    best = next(m for m in orders if m.name == "kd")
    # One setting for all orders, so that nothing but the order differs.
    orders = [replace(m, selected=best.selected) for m in orders if m is not best]
    orders.append(replace(best, title="KD, weakest to strongest"))
    scored = score_methods(plan, [vanilla, *orders], data, _COMPLETE_DATA)
    methods: dict[str, str | None] = {"vanilla": None} | {name: name for name in TABLE5}
    table = _table("Table 5: order of distillation, complete data", scored, data, methods, TABLE5, COMPLETE)
    worst = "kd-strongest-first"
    pairs = [("kd", other) for other in TABLE5 if other != "kd"]
    pairs += [(worst, other) for other in TABLE5 if other not in ("kd", worst)]
    directions = _directions(scored, data, pairs, TABLE5, COMPLETE)
    return Outcome([table], directions, facts=scored.facts(), record=scored.record())


TABLE_1, TABLE_2, TABLE_5 = declare("table1", _table1), declare("table2", _table2), declare("table5", _table5)
