"""Findings as CSV, JSON, Markdown, drawings and a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmc_fast import __version__
from mmc_fast._util.atomic import write_file, write_json
from mmc_fast.diagnose.document import signed
from mmc_fast.diagnose.figures import Drawing

from ..report import Callout, Cell, Details, Facts, Panels, Report, Section, Table, Text
from ..report.comparison import Score
from ..report.drawings import draw_rates, metric_name
from .table import GATE, Findings, Paired

__all__ = ["family", "footnotes", "markdown", "markdown_table", "score_rows", "tests_table", "write_outputs"]
__all__ += ["write_text"]

_LINES = 8  # that a drawing can tell apart
READING = (
    "Mean ± s.d. over seeds. **Bold**: the paired 95 % intervals (seeds and test samples) against every other row lie "
    "above 0. Tests: paired by seed, masks and test samples; Holm over all tests of the report. Settings were chosen on "
    "validation data by searches of equal size. A re-implementation whose score on complete data is below that of vanilla "
    f"by more than one standard error is marked “{GATE}”: its numbers say little about the method. With one seed nothing is "
    "bold and there are no p-values: it says nothing about other trainings."
)


def write_outputs(
    findings: Sequence[Findings], folder: Path, facts: Mapping[str, str], about: Mapping[str, Any]
) -> None:
    """Write results.csv, results.json, results.md, report.html and figures/ into ``folder``, each in one step."""
    write_json(folder / "results.json", {**about, "data_sets": [f.to_dict() for f in findings]})
    write_text(folder / "results.csv", _csv(findings))
    write_text(folder / "results.md", markdown(findings))
    drawings = {f.data: draw(f) for f in findings}
    for data, some in drawings.items():
        for n, drawing in enumerate(some):
            drawing.save_png(folder / "figures" / f"{data}-missing-rates{f'-{n + 1}' if len(some) > 1 else ''}.png")
    report(findings, drawings, facts).save(folder / "report.html")


def score_rows(f: Findings, metric: str) -> list[list[Cell | str]]:
    """One line per row: its title with marks, then mean ± s.d. per condition; a dash where it diverged."""
    comparison = f.comparisons[metric]
    rows: list[list[Cell | str]] = []
    for name, facts in f.rows.items():
        scores = comparison.scores.get(name)
        cells: list[Cell | str] = ["–"] * len(comparison.conditions)
        if scores is not None:
            cells = [Cell(_mean(scores[c]), strong=scores[c].best) for c in comparison.conditions]
        rows.append([facts.marked, *cells])
    return rows


def footnotes(f: Findings) -> str:
    """What the marks of its rows mean; empty where there is none."""
    meaning: dict[str, list[str]] = {}
    for facts in f.rows.values():
        for mark, note in facts.notes.items():
            meaning.setdefault(f"{mark} {note}", []).append(facts.title)
    return ". ".join(f"{note}: {', '.join(titles)}" for note, titles in sorted(meaning.items()))


def tests_table(tests: Sequence[Paired], titles: Mapping[str, str]) -> tuple[list[str], list[list[Cell | str]]]:
    """Headings, and one line per test; without p-values where there are none."""
    columns = ["difference", "estimate", "95 % interval"]
    columns += ["p", "p (Holm)", "p (signed ranks)", "pairs"] if tests[0].family else []
    rows: list[list[Cell | str]] = []
    for t in tests:
        name = f"{titles[t.row]} − {titles[t.reference]}, {t.metric}, {t.condition}"
        clear = t.p_holm is not None and t.p_holm < 0.05
        line: list[Cell | str] = [name, Cell(signed(t.difference), strong=clear), f"{signed(t.low)} … {signed(t.high)}"]
        rows.append(line + ([*map(_p, (t.p, t.p_holm, t.p_wilcoxon)), str(t.pairs)] if t.family else []))
    return columns, rows


def family(tests: Sequence[Paired]) -> str:
    """How many tests Holm's correction is over, or why there is none."""
    count = tests[0].family
    return f"Holm over {count} tests" if count else "one seed: intervals of these trainings alone"


def markdown(findings: Sequence[Findings]) -> str:
    """The tables as Markdown."""
    parts = ["# Comparison of methods", READING]
    for f in findings:
        parts.append(f"## {f.data}")
        for metric, comparison in f.comparisons.items():
            parts.append(f"Test {metric_name(metric)}, {len(comparison.seeds)} seed(s):")
            parts.append(markdown_table(["row", *comparison.conditions], score_rows(f, metric)))
        if notes := footnotes(f):
            parts.append(f"{notes}.")
        if f.tests:
            parts.append(f"Against the reference ({family(f.tests)}):")
            parts.append(markdown_table(*tests_table(f.tests, _titles(f))))
        rates = "; ".join(
            f"{k.removeprefix('missing_')}: {', '.join(f'{v:.2f}' for v in r)}" for k, r in f.realised.items()
        )
        parts.append(f"Realised missing rates by modality: {rates or 'none'}.")
    return "\n\n".join(parts) + "\n"


def draw(f: Findings) -> list[Drawing]:
    """Score against missing rate; several drawings where there are more rows than a reader can tell apart."""
    names = list(f.main.scores)
    pieces = [names[i : i + _LINES] for i in range(0, len(names), _LINES)]
    return [draw_rates(f.main, {name: f.rows[name].title for name in some}) for some in pieces]


def report(findings: Sequence[Findings], drawings: Mapping[str, Sequence[Drawing]], facts: Mapping[str, str]) -> Report:
    """The page."""
    page = Report(
        "Comparison of methods",
        f"{len(findings[0].rows)} rows on {len(findings)} data set(s): the same encoders, budget and search for each.",
        f"mmc-fast {__version__}. This page is self-contained and loads nothing.",
    )
    for f in findings:
        blocks: list[Any] = []
        failed = [facts.title for facts in f.rows.values() if facts.gate == GATE]
        if failed:
            blocks.append(Callout(f"**{GATE}**: {', '.join(failed)}.", "warning"))
        for metric, comparison in f.comparisons.items():
            blocks.append(Table(["row", *comparison.conditions], score_rows(f, metric), _caption(f, metric)))
        blocks.append(Panels([d.figure() for d in drawings[f.data]]))
        if f.tests:
            caption = f"{family(f.tests)}; {f.tests[0].pairs} pair(s) of seeds in each."
            table = Table(*tests_table(f.tests, _titles(f)), caption)
            blocks.append(Details("Differences from the reference", [table]))
        chosen = [[facts.title, str(dict(facts.settings) or "as declared"), facts.source] for facts in f.rows.values()]
        blocks.append(Details("Settings", [Table(["row", "chosen", "source"], chosen)]))
        page.add_section(Section(f.data, blocks))
    return page.add_section(Section("How to read this", [Text(READING), Facts(facts)]))


def _caption(f: Findings, metric: str) -> str:
    return ". ".join(filter(None, [f"Test {metric_name(metric)}, mean ± s.d.", footnotes(f)]))


def _titles(f: Findings) -> dict[str, str]:
    return {name: facts.title for name, facts in f.rows.items()}


def _mean(score: Score) -> str:
    return f"{score.mean:.3f}" + ("" if score.sd is None else f" ± {score.sd:.3f}")


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< .001" if value < 0.001 else f"{value:.3f}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> str:
    """A table; the first column holds names, the others are aligned right, strong cells are bold."""

    def text(cell: Cell | str) -> str:
        plain = cell if isinstance(cell, str) else f"**{cell.text}**" if cell.strong else cell.text
        return plain.replace("|", "\\|")

    head = [" | ".join(columns), "|".join(["---", *["---:"] * (len(columns) - 1)])]
    return "\n".join(f"| {line} |" for line in [*head, *(" | ".join(map(text, row)) for row in rows)])


def _csv(findings: Sequence[Findings]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["data", "row", "method", "metric", "condition", "mean", "sd", "se", "low", "high", "seeds", "gate", "batch_rows",
         "difference", "reference", "p", "p_holm", "p_wilcoxon", "pairs"]
    )  # fmt: skip
    for f in findings:
        tests = {(t.metric, t.condition, t.row): t for t in f.tests}
        for metric, comparison in f.comparisons.items():
            for name, by_condition in comparison.scores.items():
                facts = f.rows[name]
                for condition, s in by_condition.items():
                    line = [f.data, name, facts.method, metric, condition, s.mean, s.sd, s.se, s.low, s.high]
                    line += [len(comparison.seeds), facts.gate, facts.batch_rows]
                    t = tests.get((metric, condition, name))
                    if t is not None:
                        line += [t.difference, t.reference, t.p, t.p_holm, t.p_wilcoxon, t.pairs]
                    writer.writerow(["" if v is None else v for v in line + [None] * (19 - len(line))])
    return buffer.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write)
