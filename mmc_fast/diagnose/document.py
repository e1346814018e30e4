"""A report is a title and sections; a section is a list of blocks. ``Report.save`` writes one offline HTML file.

Blocks hold plain data and know nothing of HTML; the template beside this file renders them. Text may mark
``**strong**`` and `` `code` `` and is escaped otherwise. New kinds of content are new sections, not new block types.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jinja2
from markupsafe import Markup, escape

__all__ = ["Callout", "Cell", "Details", "Facts", "Figure", "Panels", "Report", "Section", "Table", "Text", "signed"]


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by blank lines."""

    text: str


@dataclass(frozen=True)
class Callout:
    """A statement that must not be overlooked."""

    text: str
    kind: Literal["finding", "note", "warning"] = "note"


@dataclass(frozen=True)
class Cell:
    """One table cell; ``strong`` marks a value that stands out, ``note`` is shown small beneath it."""

    text: str
    strong: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """The first column holds row headings, the others numbers (aligned right with tabular figures)."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.caption!r}: a row has {len(row)} cells for {len(self.columns)} columns")


@dataclass(frozen=True)
class Figure:
    """An SVG drawing (from ``figures.to_svg``) with its alternative text and caption."""

    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Panels:
    """Figures side by side where the screen is wide enough, beneath each other where it is not."""

    figures: Sequence[Figure]
    caption: str = ""


@dataclass(frozen=True)
class Facts:
    """A short list of names and values."""

    items: Mapping[str, str]


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until asked for."""

    summary: str
    blocks: Sequence[Block]


Block = Text | Callout | Table | Figure | Panels | Facts | Details


@dataclass(frozen=True)
class Section:
    """A heading with blocks beneath it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "section"


@dataclass
class Report:
    """One self-contained page: styles and drawings are inside, nothing is requested from anywhere."""

    title: str
    lead: str = ""
    footer: str = ""
    sections: list[Section] = field(default_factory=list)

    def add_section(self, section: Section) -> Report:
        """Append a section. Returns the report, so that calls can be chained."""
        self.sections.append(section)
        return self

    def html(self) -> str:
        """The page as text."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("mmc_fast.diagnose", "template"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.filters["inline"] = _inline
        environment.filters["paragraphs"] = lambda text: [_inline(p) for p in re.split(r"\n\s*\n", text.strip())]
        environment.filters["kind"] = _kind
        environment.filters["cell"] = lambda value: value if isinstance(value, Cell) else Cell(value)
        style = (Path(__file__).parent / "template" / "style.css").read_text(encoding="utf-8")
        drawings = _Drawings()
        return environment.get_template("report.html.jinja").render(
            report=self, style=Markup(style), drawing=drawings.place, anchors=_unique([s.anchor for s in self.sections])
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to ``path`` in one step: a reader sees the old file or the whole new one."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = self.html()
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target


class _Drawings:
    """Gives the identifiers inside every placed SVG a prefix of their own: they share one page."""

    def __init__(self) -> None:
        self.count = 0

    def place(self, figure: Figure) -> Markup:
        self.count += 1
        prefix = f"f{self.count}-"
        svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', figure.svg)
        svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", svg)
        svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', svg)
        label = escape(figure.alt)
        return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def signed(value: float) -> str:
    """A difference with its sign, three digits, and a true minus."""
    return f"{value:+.3f}".replace("-", "−")


def _kind(block: object) -> str:
    if not isinstance(block, Block):
        raise TypeError(f"a report is made of {Block}, got {type(block).__name__}")
    return type(block).__name__


def _inline(text: str) -> Markup:
    escaped = str(escape(text))
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped))


def _unique(anchors: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for anchor in anchors:
        seen[anchor] = seen.get(anchor, 0) + 1
        result.append(anchor if seen[anchor] == 1 else f"{anchor}-{seen[anchor]}")
    return result
