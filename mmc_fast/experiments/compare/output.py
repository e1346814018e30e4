"""Findings as CSV, JSON, Markdown, drawings and a page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmc_fast import __version__
from mmc_fast._util.atomic import write_json
from mmc_fast._util.files import replace_file
from mmc_fast.diagnose.document import (
    Block,
    Callout,
    Cell,
    Details,
    Facts,
    Panels,
    Report,
    Section,
    Table,
    Text,
    literal,
    signed,
)
from mmc_fast.diagnose.figures import Drawing

from ..jobs import ADVICE
from ..manifest import Manifest
from ..report.comparison import Score
from ..report.drawings import draw_rates, metric_name
from .findings import UNDER_PERFORMING, Findings

SCHEMA_VERSION = 2
_P_COLUMNS = ("p", "p (Holm)", "p (signed ranks)")
_LINES = 8  # that a drawing can tell apart
_CSV_COLUMNS = (
    "data", "method", "plug_in", "metric", "condition", "mean", "sd", "se", "low", "high", "best", "seeds", "threshold",
    "batch_rows", "difference", "difference_low", "difference_high", "reference", "p", "p_holm", "p_wilcoxon", "pairs",
)  # fmt: skip
READING = (
    "Mean ± s.d. over seeds, more is better. **Bold**: the paired 95 % intervals (seeds and test samples) against every other method lie "
    "above 0. Tests: paired by seed, masks and test samples; Holm over all tests of the report; with one seed there is none. A "
    "re-implementation whose score on complete data is below that of vanilla by more than one standard error is marked "
    f"“{UNDER_PERFORMING}”: its numbers say little about the method."
)


def write_outputs(
    findings: Sequence[Findings],
    folder: Path,
    facts: Mapping[str, str],
    about: Mapping[str, Any],
    *,
    title: str = "Comparison of methods",
    drawings: Mapping[str, Mapping[str, Drawing]] | None = None,
    blocks: Mapping[str, Sequence[Block]] | None = None,
    warning: str = "",
    opening: tuple[str, Sequence[Block], Drawing] | None = None,
) -> None:
    """Write results.csv, results.json, results.md, report.html and figures/ into ``folder``, each in one step.

    ``about``: more of results.json. ``drawings``, ``blocks``: by data set, what the page shows beside the comparison; a
    drawing's name is that of its file. ``opening``: lead of the page, what comes first on it, and the drawing in that.
    """
    head = {"schema_version": SCHEMA_VERSION, "mmc_fast_version": __version__}
    write_json(folder / "results.json", {**head, **about, "data_sets": [f.to_dict() for f in findings]})
    replace_file(folder / "results.csv", _csv(findings))
    replace_file(folder / "results.md", markdown(findings, title))
    page = Report(
        title,
        opening[0] if opening else _lead(findings),
        f"mmc-fast {__version__}. This page is self-contained and loads nothing.",
    )
    warned: list[Block] = [Callout(warning, "warning")] if warning else []
    if opening is not None:
        opening[2].save_png(folder / "figures" / "story.png")
        page.add_section(Section("In one picture", [*warned, *opening[1]]))
        warned = []
    for f in findings:
        shown = _rate_drawings(f) | dict((drawings or {}).get(f.data, {}))
        for name, drawing in shown.items():
            drawing.save_png(folder / "figures" / f"{f.data}-{name}.png")
        page.add_section(
            Section(
                f.data, [*(warned if f is findings[0] else ()), *_blocks(f, shown), *(blocks or {}).get(f.data, ())]
            )
        )
    page.add_section(Section("How to read this", [Text(READING), Facts(facts)]))
    page.save(folder / "report.html")
    list_files(folder)


def list_files(folder: Path) -> None:
    """List what a command has just written into ``folder`` in the manifest of it, or of the folder above."""
    manifest = Manifest.above(folder, advice=ADVICE)
    if manifest is not None:
        written = [p for pattern in ("result*.*", "report.html", "figures/*.png") for p in folder.glob(pattern)]
        manifest.add(sorted(written))


def _lead(findings: Sequence[Findings]) -> str:
    return f"{len(findings[0].methods)} methods on {len(findings)} data set(s): the same encoders and budget for each."


def _rate_drawings(f: Findings) -> dict[str, Drawing]:
    """Score against missing rate; several drawings where there are more methods than a reader can tell apart."""
    names = list(f.main.scores)
    groups = [names[i : i + _LINES] for i in range(0, len(names), _LINES)]
    return {
        "missing-rates" + (f"-{n}" if len(groups) > 1 else ""): draw_rates(
            f.main, {m: f.methods[m].title for m in some}
        )
        for n, some in enumerate(groups, start=1)
    }


def _blocks(f: Findings, drawings: Mapping[str, Drawing]) -> list[Block]:
    blocks: list[Block] = []
    failed = [facts.title for facts in f.methods.values() if facts.threshold == UNDER_PERFORMING]
    if failed:
        blocks.append(Callout(f"**{UNDER_PERFORMING}**: {literal(', '.join(failed))}.", "warning"))
    for metric, comparison in f.comparisons.items():
        caption = f"Test {metric_name(metric)}, mean ± s.d. {literal(footnotes(f))}".strip()
        blocks.append(Table(["method", *comparison.conditions], score_rows(f, metric), caption))
    blocks.append(Panels([d.figure() for d in drawings.values()]))
    if f.tests:
        table = Table(*tests_table(f), tests_title(f))
        blocks.append(Details("Tests against the reference", [table]))
    settings = [[facts.title, str(dict(facts.settings) or "as declared"), facts.source] for facts in f.methods.values()]
    blocks.append(Details("Settings", [Table(["method", "selected", "source"], settings)]))
    return blocks


def score_rows(f: Findings, metric: str) -> list[list[Cell | str]]:
    """One line per method: its title with marks, then mean ± s.d. per condition; a dash where it diverged."""
    comparison = f.comparisons[metric]
    rows: list[list[Cell | str]] = []
    for name, facts in f.methods.items():
        scores = comparison.scores.get(name)
        cells: list[Cell | str] = ["–"] * len(comparison.conditions)
        if scores is not None:
            cells = [Cell(_mean(scores[c]), strong=scores[c].best) for c in comparison.conditions]
        rows.append([facts.marked, *cells])
    return rows


def footnotes(f: Findings) -> str:
    """What the marks of its methods mean; empty where there is none."""
    meaning: dict[str, list[str]] = {}
    for facts in f.methods.values():
        for mark, note in facts.notes.items():
            meaning.setdefault(f"{mark} {note}", []).append(facts.title)
    return ". ".join(f"{note}: {', '.join(titles)}" for note, titles in sorted(meaning.items()))


def tests_title(f: Findings) -> str:
    """What the table of tests holds."""
    if not f.tests[0].family:
        return "Against the reference, one seed: intervals of these trainings alone"
    return f"Against the reference, {f.tests[0].pairs} pairs of seeds, Holm over {f.tests[0].family} tests"


def tests_table(f: Findings) -> tuple[list[str], list[list[Cell | str]]]:
    """Headings, and one line per test; without p-values where there are none."""
    several = bool(f.tests[0].family)
    titles = {name: facts.title for name, facts in f.methods.items()}
    rows: list[list[Cell | str]] = []
    for t in f.tests:
        name = f"{titles[t.method]} − {titles[t.reference]}, {metric_name(t.metric)}, {t.condition}"
        clear = t.p_holm is not None and t.p_holm < 0.05
        line: list[Cell | str] = [name, Cell(signed(t.difference), strong=clear), f"{signed(t.low)} … {signed(t.high)}"]
        rows.append([*line, *map(_p, (t.p, t.p_holm, t.p_wilcoxon))] if several else line)
    return ["difference", "estimate", "95 % interval", *(_P_COLUMNS if several else ())], rows


def markdown(findings: Sequence[Findings], title: str = "Comparison of methods") -> str:
    """The tables as Markdown."""
    parts = [f"# {title}", READING]
    for f in findings:
        parts.append(f"## {_markdown(f.data)}")
        for metric, comparison in f.comparisons.items():
            parts.append(f"Test {metric_name(metric)}, {len(comparison.seeds)} seed(s):")
            parts.append(markdown_table(["method", *comparison.conditions], score_rows(f, metric)))
        if notes := footnotes(f):
            parts.append(f"{_markdown(notes)}.")
        if f.tests:
            parts += [f"{tests_title(f)}:", markdown_table(*tests_table(f))]
        rates = "; ".join(
            f"{k.removeprefix('missing_')}: {', '.join(f'{v:.2f}' for v in r)}" for k, r in f.realised.items()
        )
        parts.append(f"Realised missing rates by modality: {rates or 'none'}.")
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> str:
    """A table; the first column holds names, the others are aligned right, strong cells are bold."""

    def text(cell: Cell | str) -> str:
        plain = _markdown(cell if isinstance(cell, str) else cell.text)
        plain = f"**{plain}**" if isinstance(cell, Cell) and cell.strong else plain
        return plain

    head = [" | ".join(map(_markdown, columns)), "|".join(["---", *["---:"] * (len(columns) - 1)])]
    return "\n".join(f"| {line} |" for line in [*head, *(" | ".join(map(text, row)) for row in rows)])


def _markdown(text: str) -> str:
    """Text that somebody chose: on one line, and no markup."""
    return re.sub(r"[\\`*|<]|\](?=\()", r"\\\g<0>", " ".join(text.split()))


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Lines of a CSV file; None is an empty field, and short rows are filled up with those."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if v is None else v for v in [*row, *[None] * (len(columns) - len(row))]])
    return buffer.getvalue()


def _csv(findings: Sequence[Findings]) -> str:
    lines = []
    for f in findings:
        tests = {(t.metric, t.condition, t.method): t for t in f.tests}
        for metric, comparison in f.comparisons.items():
            for name, by_condition in comparison.scores.items():
                facts = f.methods[name]
                for condition, s in by_condition.items():
                    line = [f.data, name, facts.method, metric, condition, s.mean, s.sd, s.se, s.low, s.high]
                    line += [1 if s.best else None]
                    line += [len(comparison.seeds), facts.threshold, facts.batch_rows]
                    t = tests.get((metric, condition, name))
                    if t is not None:
                        line += [t.difference, t.low, t.high, t.reference, t.p, t.p_holm, t.p_wilcoxon, t.pairs]
                    lines.append(line)
    return csv_text(_CSV_COLUMNS, lines)


def _mean(score: Score) -> str:
    return f"{score.mean:.3f}" + ("" if score.sd is None else f" ± {score.sd:.3f}")


def _p(value: float | None) -> str:
    return "–" if value is None else "< .001" if value < 0.001 else f"{value:.3f}"
