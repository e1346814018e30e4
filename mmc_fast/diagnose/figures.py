"""Line and bar drawings in one plain style, as inline SVG for a report and as PNG for other places.

Colours in the SVG are CSS variables of the report's style sheet, so a drawing follows light and dark mode. Text stays
text. Matplotlib (extra ``diagnose``) is imported at the first drawing and used without pyplot: no global figure, no display.
"""

from __future__ import annotations

import functools
import io
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from mmc_fast._util.extras import require
from mmc_fast._util.files import replace_file

from .document import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

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
    "text.parse_math": False,  # a name may hold dollars
}
Spread = float | tuple[float, float] | None
"""Half length of an error bar, or what it reaches below and above; None: no error bar."""


_P = ParamSpec("_P")
_T = TypeVar("_T")


def styled(draw: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a function draw with the settings of every drawing here; MissingExtra without matplotlib."""

    @functools.wraps(draw)
    def with_style(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with require("matplotlib", extra="diagnose").rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a page has other fonts
            return draw(*args, **kwargs)

    return with_style


@styled
def new_axes(title: str) -> Axes:
    """Axes on a figure of their own that belongs to no global state."""
    from matplotlib.figure import Figure as Canvas

    axes = Canvas(figsize=(5.4, 3.9), layout="constrained").add_subplot()
    axes.set_title(title)
    return axes


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
        svg = self._saved("svg", transparent=True, metadata={"Date": None}).decode()
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg ") :], flags=re.DOTALL)
        for colour, variable in VARIABLES.items():
            svg = svg.replace(colour, f"var({variable})")
        # Width and height come from the page; the view box keeps the proportions.
        for size in ("width", "height"):
            svg = re.sub(rf'(<svg [^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
        return Figure(svg, self.alt, self.caption)

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Write the drawing on white at twice the screen resolution."""
        replace_file(path, self._saved("png", dpi=180, facecolor=PAGE))

    def _saved(self, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        styled(self.canvas.savefig)(buffer, format=kind, bbox_inches="tight", **options)
        return buffer.getvalue()


def series_colour(index: int) -> str:
    """Colour of the series at ``index``; distinct for the first eight and safe for colour-blind readers."""
    return SERIES[index % len(SERIES)]


def in_legend(name: str) -> str:
    """A name as Matplotlib shows it in a legend, which leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


@styled
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
    axes = new_axes(title)
    for position, (name, line) in enumerate(series.items()):
        index = (colours or {}).get(name, position)
        colour, marker = series_colour(index), MARKERS[index % len(MARKERS)] if markers else ""
        axes.plot(line.x, line.y, label=in_legend(name), color=colour, linewidth=1.8, marker=marker, markersize=5)
        spread = [s for s in line.spread or () if s is not None]
        if line.spread is not None and len(spread) == len(line.y):
            low, high = zip(*((y - s, y + s) for y, s in zip(line.y, spread, strict=True)), strict=True)
            axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
    return _finished(axes, x_label, y_label, references, y_limits, alt, caption)


@styled
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
    errors: Mapping[str, Sequence[Spread]] | None = None,
    colours: Mapping[str, int] | None = None,
) -> Drawing:
    """Grouped bars: one group per entry of ``groups``, one bar per series in each, with optional error bars."""
    axes = new_axes(title)
    draw_bars(axes, groups, series, errors, colours)
    return _finished(axes, "", y_label, references, y_limits, alt, caption)


def draw_bars(
    axes: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[Spread]] | None = None,
    colours: Mapping[str, int] | None = None,
) -> bool:
    """The bars of :func:`bars` on given axes. Returns whether the names of the groups had to be slanted."""
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        at = [g + (index - (len(series) - 1) / 2) * width for g in range(len(groups))]
        colour = series_colour((colours or {}).get(name, index))
        axes.bar(at, values, width * 0.92, label=in_legend(name), color=colour, linewidth=0)
        for x, y, spread in zip(at, values, (errors or {}).get(name) or [None] * len(at), strict=True):
            if spread is not None:
                low, high = spread if isinstance(spread, tuple) else (spread, spread)
                axes.errorbar([x], [y], yerr=[[low], [high]], fmt="none", ecolor=INK, elinewidth=1)
    slanted = sum(map(len, groups)) > 34
    axes.set_xticks(
        range(len(groups)), list(groups), rotation=25 if slanted else 0, ha="right" if slanted else "center"
    )
    axes.tick_params(axis="x", length=0)
    return slanted


def _finished(
    axes: Axes,
    x_label: str,
    y_label: str,
    references: Sequence[Reference],
    y_limits: tuple[float | None, float | None],
    alt: str,
    caption: str,
) -> Drawing:
    for reference, line in zip(references, ("--", ":", "-.") * len(references), strict=False):
        axes.axhline(reference.y, label=reference.label, color=INK, linestyle=line, linewidth=1.2)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(*y_limits)
    handles, labels = axes.get_legend_handles_labels()
    canvas: Any = axes.figure
    if len(labels) > 1:
        # Outside the axes, where the layout engine keeps it clear of slanted tick labels.
        columns = 3 if len(labels) > 4 or len(labels) == 3 else 2
        canvas.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.4)
    return Drawing(canvas, alt, caption)
