"""An outcome as JSON, CSV, Markdown, drawings and a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmc_fast import __version__
from mmc_fast._util.atomic import write_json
from mmc_fast._util.files import replace_file
from mmc_fast.diagnose.document import Callout, Cell, Details, Facts, Panels, Report, Section, Table, Text, signed

from ..compare.output import csv_text, list_files, markdown_table
from .base import Direction, Experiment, Outcome, ResultTable, Value

SCHEMA_VERSION = 2
DIRECTION_COLUMNS = ("direction that the paper shows", "paper", "ours", "95 % interval", "verdict")
_CSV_COLUMNS = (
    "experiment", "kind", "table", "row", "column", "mean", "sd", "low", "high", "paper", "verdict",
)  # fmt: skip
READING = (
    "Ours: mean ± s.d. over the seeds; beside it the number that the paper prints, measured on other data, so that sizes "
    "compare only loosely. A direction agrees where the 95 % interval of our paired difference lies on the paper's side "
    "of 0, disagrees where it lies on the other side, and is undecided where the interval holds 0."
)
_STRONG = ("agrees", "disagrees")


def table_columns(table: ResultTable) -> list[str]:
    """Headings: every column, followed by the paper's where it has a number in it."""
    return ["method", *(name for i, column in enumerate(table.columns) for name in _pair(table, i, column))]


def table_rows(table: ResultTable) -> list[list[Cell | str]]:
    """One line per row, in the order of :func:`table_columns`; a dash where there is no number."""
    rows: list[list[Cell | str]] = []
    for label, values in table.rows:
        line: list[Cell | str] = [label]
        for i, value in enumerate(values):
            line.append(_ours(value, table.digits))
            if _has_paper(table, i):
                line.append("–" if value.paper is None else f"{value.paper:.{table.paper_digits}f}")
        rows.append(line)
    return rows


def direction_rows(outcome: Outcome) -> list[list[Cell | str]]:
    """One line per direction."""
    return [
        [d.claim, _paper(d), *_estimate(d), Cell(f"{d.verdict} {d.mark}".strip(), strong=d.verdict in _STRONG)]
        for d in outcome.directions
    ]


def to_dict(experiment: Experiment, outcome: Outcome, about: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values of everything; an interval without an end has None there."""
    return {
        "schema_version": SCHEMA_VERSION,
        "mmc_fast_version": __version__,
        "kind": "reproduction",
        "name": experiment.name,
        "title": experiment.title,
        "paper": experiment.paper,
        "deviations": list(experiment.deviations),
        **about,
        "tables": [
            {
                "title": table.title,
                "columns": list(table.columns),
                "footnote": table.footnote,
                "rows": [{"label": label, "values": [vars(v) for v in values]} for label, values in table.rows],
            }
            for table in outcome.tables
        ],
        "directions": [_direction(d) for d in outcome.directions],
        "summary": outcome.summary,
        "notes": list(outcome.notes),
        "facts": dict(outcome.facts),
        "record": dict(outcome.record),
    }


def markdown(experiment: Experiment, outcome: Outcome) -> str:
    """The tables as Markdown, to be pasted under a heading of the second level."""
    parts = [f"## {experiment.name}: {experiment.title}", f"The paper: {experiment.paper}"]
    parts.append("\n".join(f"- {deviation}" for deviation in experiment.deviations))
    for table in outcome.tables:
        parts += [f"{table.title}:", markdown_table(table_columns(table), table_rows(table))]
        parts += [f"{table.footnote}."] if table.footnote else []
    if outcome.directions:
        parts.append(markdown_table(DIRECTION_COLUMNS, direction_rows(outcome)))
    parts.append(outcome.summary)
    if outcome.notes:
        parts.append("\n".join(f"- {note}" for note in outcome.notes))
    parts.append("; ".join(f"{name}: {value}" for name, value in outcome.facts.items()) + ".")
    return "\n\n".join(parts) + "\n"


def page(experiment: Experiment, outcome: Outcome) -> Report:
    """The page."""
    report = Report(
        f"{experiment.name}: {experiment.title}",
        f"{experiment.paper} {outcome.summary}",
        f"mmc-fast {__version__}. This page is self-contained and loads nothing.",
    )
    blocks: list[Any] = [
        Table(table_columns(t), table_rows(t), ". ".join(filter(None, [t.title, t.footnote]))) for t in outcome.tables
    ]
    if outcome.drawings:
        blocks.append(Panels([drawing.figure() for drawing in outcome.drawings.values()]))
    blocks += [Callout(note, "note") for note in outcome.notes]
    report.add_section(Section("Ours beside the paper's", blocks))
    if outcome.directions:
        report.add_section(
            Section("Directions", [Table(DIRECTION_COLUMNS, direction_rows(outcome)), Text(outcome.summary)])
        )
    deviations = Text("\n\n".join(experiment.deviations))
    return report.add_section(
        Section("How to read this", [Text(READING), Details("Deviations", [deviations]), Facts(outcome.facts)])
    )


def write_outcome(experiment: Experiment, outcome: Outcome, folder: Path, about: Mapping[str, Any]) -> None:
    """Write result.json, result.csv, result.md, report.html and figures/ into ``folder``, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", to_dict(experiment, outcome, about))
    replace_file(folder / "result.csv", _csv(experiment, outcome))
    replace_file(folder / "result.md", markdown(experiment, outcome))
    for name, drawing in outcome.drawings.items():
        drawing.save_png(folder / "figures" / f"{name}.png")
    page(experiment, outcome).save(folder / "report.html")
    list_files(folder)


def _has_paper(table: ResultTable, column: int) -> bool:
    return any(values[column].paper is not None for _, values in table.rows)


def _pair(table: ResultTable, index: int, column: str) -> list[str]:
    return [column, "paper"] if _has_paper(table, index) else [column]


def _ours(value: Value, digits: int) -> str:
    if value.mean is None:
        return f"– {value.mark}".strip()
    spread = "" if value.sd is None else f" ± {value.sd:.{digits}f}"
    return f"{value.mean:.{digits}f}{spread} {value.mark}".strip()


def _signed(value: float) -> str:
    """A difference with its sign; three digits behind the point, fewer where it is large."""
    return signed(value) if abs(value) < 10 else f"{value:+.1f}".replace("-", "−")


def _paper(d: Direction) -> str:
    if d.printed:
        return _signed(d.paper)
    return "> 0" if d.paper > 0 else "< 0"


def _estimate(d: Direction) -> list[str]:
    if d.ours is None:
        return ["–", "–"]
    if math.isinf(d.ours.low):
        return [_signed(d.ours.value), "one seed"]
    return [_signed(d.ours.value), f"{_signed(d.ours.low)} … {_signed(d.ours.high)}"]


def _direction(d: Direction) -> dict[str, Any]:
    ours = None
    if d.ours is not None:
        ours = {name: value if math.isfinite(value) else None for name, value in vars(d.ours).items()}
    found = {"claim": d.claim, "paper": d.paper, "printed": d.printed, "ours": ours}
    return {**found, "verdict": d.verdict, "mark": d.mark}


def _csv(experiment: Experiment, outcome: Outcome) -> str:
    lines: list[list[Any]] = []
    for table in outcome.tables:
        for label, values in table.rows:
            for column, v in zip(table.columns, values, strict=True):
                lines.append([experiment.name, "value", table.title, label, column, v.mean, v.sd, None, None, v.paper])
    for d in outcome.directions:
        ours = [None] * 4 if d.ours is None else [d.ours.value, None, d.ours.low, d.ours.high]
        paper = d.paper if d.printed else None
        lines.append([experiment.name, "direction", None, d.claim, None, *ours, paper, d.verdict])
    return csv_text(_CSV_COLUMNS, lines)
