"""Tables 3 and 4: avMNIST with audio missing, in both readings of "missing"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmc_fast.diagnose.figures import Drawing

from ..compare.configs import DataConfig, load_data_configs
from ..data.avmnist_paper import PAPER_VARIANTS
from ..report.comparison import COMPLETE
from .base import Outcome, Plan, ResultTable, Value, declare
from .inside import curve, draw_curves
from .paper import TABLE3, TABLE4
from .scores import Scored, score_methods, with_base_settings

_DATA = "avmnist-paper"
_SHARES = {share: variant for variant, share in PAPER_VARIANTS.items() if share is not None}
_PERCENT = 100.0
_LINES = 8  # that a drawing can tell apart
_READINGS = {
    "train": "audio missing from that share of the training samples, test on images alone",
    "test": "audio missing from that share of the test samples, training on complete pairs",
}
Methods = Mapping[str, "str | None"]
"""Method config -> its key among the paper's numbers."""


def _one_reading(plan: Plan, reading: str, names: Sequence[str]) -> tuple[Scored, list[tuple[str, str]]]:
    """The trainings of a reading; where each share's scores are: data config and condition."""
    base, methods = load_data_configs([_DATA])[0], with_base_settings(names)
    if reading == "test":
        changes = {"rates": list(_SHARES), "rates_modality": "audio"}
        return score_methods(plan, methods, [base], changes), [(_DATA, f"{share:g} missing") for share in _SHARES]
    data = [DataConfig(f"avmnist-{v}", base.data, {"variant": v}, base.budget) for v in _SHARES.values()]
    scored = score_methods(plan, methods, data, {"rates": [], "selection": "complete"})
    return scored, [(d.name, COMPLETE) for d in data]


def _draw(title: str, table: ResultTable) -> list[Drawing]:
    shares = [_PERCENT * share for share in _SHARES]
    curves = {label: curve(dict(zip(shares, values, strict=True))) for label, values in table.rows}
    labels = [label for label, line in curves.items() if len(line.x) == len(shares)]
    x_label, y_label = "percent of the samples without audio", "accuracy, percent"
    about = f"{title}: accuracy from {shares[0]:g} to {shares[-1]:g} % without audio."
    return [
        draw_curves(title, {label: curves[label] for label in labels[i : i + _LINES]}, x_label, y_label, about)
        for i in range(0, len(labels), _LINES)
    ]


def _outcome(
    plan: Plan,
    number: int,
    methods: Methods,
    numbers: Mapping[str, Sequence[float]],
    pairs: Sequence[tuple[str, str]],
    notes: Sequence[str],
    absent: Mapping[str, str] | None = None,
) -> Outcome:
    """``pairs``: methods whose order the paper shows; ``absent``: methods of the paper that are not here -> their key."""
    whole = Outcome([], [], notes=notes)
    for reading in [plan.reading] if plan.reading != "both" else list(_READINGS):
        scored, places = _one_reading(plan, reading, list(methods))
        rows = []
        for name, key in methods.items():
            paper = [None] * len(places) if key is None else numbers[key]
            values = [scored.value(data, "accuracy", name, c, p, _PERCENT)
                      for (data, c), p in zip(places, paper, strict=True)]  # fmt: skip
            rows.append((scored.title(name), values))
        for label, key in (absent or {}).items():
            rows.append((f"{label} (not implemented)", [Value(paper=n) for n in numbers[key]]))
        title = f"Table {number}, {_READINGS[reading]}: accuracy in percent"
        columns = [f"{_PERCENT * share:g} %" for share in _SHARES]
        table = ResultTable(title, columns, rows, 2, 2, scored.footnote)
        directions = []
        for pair in pairs:
            a, b = (numbers[methods[name] or name] for name in pair)
            for i, (data, condition) in enumerate(places):
                if a[i] != b[i]:
                    found = scored.direction(data, "accuracy", pair, condition, a[i] - b[i], unit=_PERCENT)
                    directions.append(found)
        drawings = {f"{reading}-{n}": d for n, d in enumerate(_draw(f"Table {number}, missing in {reading}", table), 1)}
        facts = {f"{name} (missing in {reading})" if name in whole.facts and whole.facts[name] != fact else name: fact
                 for name, fact in scored.facts().items()}  # fmt: skip
        whole = Outcome(
            [*whole.tables, table], [*whole.directions, *directions], {**whole.drawings, **drawings}, notes,
            {**whole.facts, **facts}, {**whole.record, reading: scored.record()},
        )  # fmt: skip
    return whole


_BASELINES = ("grape", "smil", "shaspec", "muse")


def _table3(plan: Plan) -> Outcome:
    methods: dict[str, str | None] = {"vanilla": None, "cm-ae": None} | {name: name for name in _BASELINES}
    methods |= {"shaspec+ebr": "ebr", "ebr-paper": None, "ebr-robust": None, "recommended": None, "ebr-best": None}
    notes = [
        "The paper's EBR row is ShaSpec + EBR: the same numbers stand in its table 4 under that name. So ours stands beside it.",
        "In the origin of this protocol (SMIL) “missing” is the share of training samples without audio with a test on images "
        "alone; the paper says “missing at test time”. Both readings are measured.",
        "The paper's AE is an autoencoder that fills in what is missing; CM-AE is related but not the same, and GAN and "
        "Full2miss have no counterpart here.",
    ]
    absent = {"AE": "ae", "GAN": "gan", "Full2miss": "full2miss"}
    return _outcome(plan, 3, methods, TABLE3, [("shaspec+ebr", name) for name in _BASELINES], notes, absent)


def _table4(plan: Plan) -> Outcome:
    bases = ("smil", "shaspec", "muse")
    methods: dict[str, str | None] = {"vanilla": None}
    for base in bases:
        methods |= {base: base, f"{base}+ebr": f"{base}+ebr"}
    numbers = {**{base: TABLE3[base] for base in bases}, **TABLE4}
    notes = ["The paper's ShaSpec + EBR has the same numbers as the EBR row of its table 3."]
    return _outcome(plan, 4, methods, numbers, [(f"{base}+ebr", base) for base in bases], notes)


TABLE_3, TABLE_4 = declare("table3", _table3), declare("table4", _table4)
