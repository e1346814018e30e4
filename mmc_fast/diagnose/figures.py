"""Line and bar drawings in one plain style, as inline SVG for a report and as PNG for other places.

Colours in the SVG are CSS variables of the report's style sheet, so a drawing follows light and dark mode. Text stays
text. Matplotlib is used without pyplot: no global figure, no display.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from mmc_fast.diagnose.document import Figure

__all__ = ["Drawing", "Line", "Reference", "bars", "lines", "series_colour"]

INK, SOFT, GRID, PAGE = "#1b1e23", "#5b636e", "#d9dde2", "#ffffff"
SERIES = ("#4c566a", "#0072b2", "#b8860b", "#c2410c", "#6b4fbb", "#00805f", "#b3377f", "#7a5230")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--line", PAGE: "--page"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES, start=1)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmc-fast",  # the same drawing gives the same bytes
    "font.size": 11,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


@dataclass(frozen=True)
class Line:
    """One series: values over ``x``, with an optional half width of its band (None: no band)."""

    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Reference:
    """A horizontal line that gives a drawing its scale, such as chance."""

    label: str
    y: float


@dataclass(frozen=True)
class Drawing:
    """A finished drawing with the words that describe it."""

    canvas: Canvas
    alt: str
    caption: str = ""

    def figure(self) -> Figure:
        """The drawing as a block of a report."""
        buffer = io.StringIO()
        with mpl.rc_context(STYLE):
            self.canvas.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg ") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        for colour, variable in VARIABLES.items():
            svg = svg.replace(colour, f"var({variable})")
        # Width and height come from the page; the view box keeps the proportions.
        svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
        return Figure(svg, self.alt, self.caption)

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Write the drawing on white at twice the screen resolution."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            self.canvas.savefig(path, format="png", dpi=180, facecolor=PAGE, bbox_inches="tight")


def series_colour(index: int) -> str:
    """Colour of the series at ``index``; distinct for the first eight and safe for colour-blind readers."""
    return SERIES[index % len(SERIES)]


def lines(
    title: str,
    series: Mapping[str, Line],
    *,
    x_label: str,
    y_label: str,
    alt: str,
    caption: str = "",
    references: Sequence[Reference] = (),
    y_limits: tuple[float | None, float | None] = (None, None),
    markers: bool = True,
    colours: Mapping[str, int] | None = None,
) -> Drawing:
    """One line per series with a band of ± its spread. ``colours`` fixes the colour index of a series by name."""
    with mpl.rc_context(STYLE):
        canvas, axes = _canvas(title)
        for position, (name, line) in enumerate(series.items()):
            index = (colours or {}).get(name, position)
            colour = series_colour(index)
            axes.plot(
                line.x,
                line.y,
                label=name,
                color=colour,
                linewidth=1.8,
                marker=MARKERS[index % len(MARKERS)] if markers else "",
                markersize=5,
            )
            if line.spread is not None and all(s is not None for s in line.spread):
                low = [y - (s or 0.0) for y, s in zip(line.y, line.spread, strict=True)]
                high = [y + (s or 0.0) for y, s in zip(line.y, line.spread, strict=True)]
                axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
        _finish(axes, x_label, y_label, references, y_limits)
    return Drawing(canvas, alt, caption)


def bars(
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    y_label: str,
    alt: str,
    caption: str = "",
    references: Sequence[Reference] = (),
    y_limits: tuple[float | None, float | None] = (0.0, None),
    errors: Mapping[str, Sequence[float | None]] | None = None,
    colours: Mapping[str, int] | None = None,
) -> Drawing:
    """Grouped bars: one group per entry of ``groups``, one bar per series in each, with optional error bars."""
    with mpl.rc_context(STYLE):
        canvas, axes = _canvas(title)
        width = 0.8 / len(series)
        for index, (name, values) in enumerate(series.items()):
            at = [g + (index - (len(series) - 1) / 2) * width for g in range(len(groups))]
            axes.bar(
                at, values, width * 0.92, label=name, color=series_colour((colours or {}).get(name, index)), linewidth=0
            )
            spread = [s for s in (errors or {}).get(name, ()) if s is not None]
            if len(spread) == len(values):
                axes.errorbar(at, values, yerr=spread, fmt="none", ecolor=INK, elinewidth=1)
        axes.set_xticks(range(len(groups)), groups)
        if sum(len(g) for g in groups) > 34:
            axes.tick_params(axis="x", labelrotation=25)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
        axes.tick_params(axis="x", length=0)
        _finish(axes, "", y_label, references, y_limits)
    return Drawing(canvas, alt, caption)


def _canvas(title: str) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(5.4, 3.9), layout="constrained")
    axes = canvas.add_subplot()
    axes.set_title(title)
    return canvas, axes


def _finish(
    axes: Axes,
    x_label: str,
    y_label: str,
    references: Sequence[Reference],
    y_limits: tuple[float | None, float | None],
) -> None:
    styles = ("--", ":", "-.")
    for index, reference in enumerate(references):
        axes.axhline(
            reference.y, label=reference.label, color=INK, linestyle=styles[index % len(styles)], linewidth=1.2
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(*y_limits)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        # Outside the axes, where the layout engine keeps it clear of slanted tick labels.
        axes.figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=3 if len(labels) > 4 or len(labels) == 3 else 2,
            handlelength=1.6,
            columnspacing=1.4,
        )
