"""A report is a title and sections; a section is a list of blocks. ``Report.save`` writes one offline HTML file.

Blocks hold plain data and know nothing of HTML. ``Text``, ``Callout``, captions, leads and summaries may mark ``**strong**`` and
`` `code` ``; names and whatever else somebody chose go into them through :func:`literal`. Cells, headings, facts and all the rest
are shown as they are. New kinds of content are new sections, not new block types.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from mmc_fast._util.files import replace_file


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
    """One table cell; ``strong`` marks a value that stands out, ``note`` is shown small beneath it, ``bar`` (0 to 1) as a bar.

    ``code``: a name in the program. ``markup``: the text may mark ``**strong**`` and `` `code` ``.
    """

    text: str
    strong: bool = False
    note: str = ""
    bar: float | None = None
    code: bool = False
    markup: bool = False


@dataclass(frozen=True)
class Table:
    """The first column holds row headings, the others numbers (aligned right with tabular figures).

    ``cards``: on a narrow screen every row becomes a card, each value beside the name of its column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    cards: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.caption!r}: a row has {len(row)} cells for {len(self.columns)} columns")


@dataclass(frozen=True)
class Figure:
    """An SVG drawing (from ``figures.Drawing``) with its alternative text and caption."""

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


@dataclass(frozen=True)
class Downloads:
    """Links to files that are inside of the page: file name -> text."""

    files: Mapping[str, str]


Block = Text | Callout | Table | Figure | Panels | Facts | Details | Downloads


@dataclass(frozen=True)
class Section:
    """A heading with blocks beneath it."""

    title: str
    blocks: Sequence[Block]


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
        style = (Path(__file__).parent / "template" / "style.css").read_text(encoding="utf-8")
        anchors = _anchors([section.title for section in self.sections])
        writer = _Writer()
        links = "\n".join(f'<a href="#{a}">{escape(s.title)}</a>' for a, s in zip(anchors, self.sections, strict=True))
        bodies = "\n".join(
            f'<section id="{a}">\n<h2>{escape(s.title)}</h2>\n{writer.blocks(s.blocks)}\n</section>'
            for a, s in zip(anchors, self.sections, strict=True)
        )
        nav = f'<nav aria-label="Sections">\n{links}\n</nav>\n' if len(self.sections) > 2 else ""
        footer = f"<footer><p>{_inline(self.footer)}</p></footer>\n" if self.footer else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
            f"<title>{escape(self.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<header>\n"
            f"<h1>{escape(self.title)}</h1>\n{_paragraphs(self.lead, 'lead')}\n{nav}</header>\n"
            f"<main>\n{bodies}\n</main>\n{footer}</body>\n</html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to ``path`` in one step: a reader sees the old file or the whole new one."""
        return replace_file(path, self.html())


class _Writer:
    """HTML of blocks. The identifiers inside every SVG get a prefix of their own: all share one page."""

    def __init__(self) -> None:
        self.drawings = 0

    def blocks(self, blocks: Sequence[Block]) -> str:
        return "\n".join(self.block(block) for block in blocks)

    def block(self, block: Block) -> str:
        if isinstance(block, Text):
            return _paragraphs(block.text)
        if isinstance(block, Callout):
            return f'<div class="callout {block.kind}">\n{_paragraphs(block.text)}\n</div>'
        if isinstance(block, Table):
            return self.table(block)
        if isinstance(block, Figure):
            return f"<figure>{self.drawing(block)}{_caption(block.caption)}</figure>"
        if isinstance(block, Panels):
            caption = f'\n<p class="caption">{_inline(block.caption)}</p>' if block.caption else ""
            return f'<div class="panels">\n{self.blocks(block.figures)}\n</div>{caption}'
        if isinstance(block, Facts):
            rows = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in block.items.items())
            return "<dl>\n" + "\n".join(rows) + "\n</dl>"
        if isinstance(block, Details):
            inner = self.blocks(block.blocks)
            return f"<details>\n<summary>{_inline(block.summary)}</summary>\n{inner}\n</details>"
        if isinstance(block, Downloads):
            links = (
                f'<a download="{escape(name)}" href="data:text/plain;charset=utf-8,{quote(text)}">{escape(name)}</a>'
                for name, text in block.files.items()
            )
            return f'<p class="downloads">Download: {", ".join(links)}</p>'
        raise TypeError(f"a report is made of {Block}, got {type(block).__name__}")

    def table(self, table: Table) -> str:
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
        rows = "\n".join(
            "<tr>" + "".join(_cell(c, i, table.columns[i]) for i, c in enumerate(row)) + "</tr>" for row in table.rows
        )
        kind = ' class="cards"' if table.cards else ""
        return (
            f'<figure class="table">\n<div class="scroll" tabindex="0" role="region" '
            f'aria-label="{escape(table.caption or "table")}">\n<table{kind}>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n{_caption(table.caption)}</figure>"
        )

    def drawing(self, figure: Figure) -> str:
        self.drawings += 1
        prefix = f"f{self.drawings}-"
        svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', figure.svg)
        svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", svg)
        svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', svg)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(figure.alt)}" ', 1)


def fragment(text: str, table: Table) -> str:
    """A line of text and a table with its bars as HTML that carries its own style, for a notebook."""
    style = (
        ".mmc td,.mmc th{text-align:right;vertical-align:top;padding:.3em .6em}.mmc td:last-child,.mmc th:first-child,.mmc th:last-child{text-align:left}"
        ".mmc small{display:block;opacity:.7}.mmc figure{margin:0}.mmc .bar{display:block;width:5em;height:.5em;margin-left:auto;"
        "background:linear-gradient(#0072b2,#0072b2) 0 0/calc(100%*var(--v)) 100% no-repeat #8883}"
    )
    return f'<div class="mmc"><style>{style}</style>{_paragraphs(text)}{_Writer().table(table)}</div>'


def signed(value: float) -> str:
    """A difference with its sign, three digits, and a true minus."""
    return f"{value:+.3f}".replace("-", "−")


def _cell(value: Cell | str, column: int, heading: str) -> str:
    cell = value if isinstance(value, Cell) else Cell(value)
    tag = f'td data-label="{escape(heading)}"' if column else 'th scope="row"'
    strong = ' class="strong"' if cell.strong else ""
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    bar = ""
    if cell.bar is not None:
        bar = f'<i class="bar" aria-hidden="true" style="--v:{min(max(cell.bar, 0.0), 1.0):.3f}"></i>'
    text = _inline(cell.text) if cell.markup else escape(cell.text)
    return f"<{tag}{strong}>{bar}{f'<code>{text}</code>' if cell.code else text}{note}</{tag[:2]}>"


def _caption(text: str) -> str:
    return f"<figcaption>{_inline(text)}</figcaption>" if text else ""


def _paragraphs(text: str, kind: str = "") -> str:
    attributes = f' class="{kind}"' if kind else ""
    parts = [p for p in re.split(r"\n\s*\n", text.strip()) if p]
    return "\n".join(f"<p{attributes}>{_inline(p)}</p>" for p in parts)


def literal(text: str) -> str:
    """Text that somebody chose, for use within text that may be marked: shown as it is."""
    return re.sub(r"[\\*`]", r"\\\g<0>", text)


def _inline(text: str) -> str:
    plain = re.sub(r"\\([\\*`])", lambda found: f"&#{ord(found[1])};", escape(text))
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", plain)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)


def _anchors(titles: Sequence[str]) -> list[str]:
    """One for each title, made of its letters and digits; those of one title are numbered."""
    plain = [re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section" for title in titles]
    earlier = [plain[:i].count(anchor) for i, anchor in enumerate(plain)]
    return [f"{anchor}-{n + 1}" if n else anchor for anchor, n in zip(plain, earlier, strict=True)]
