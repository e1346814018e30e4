"""``Diagnosis``: what was found, in words, plots and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .document import fragment
from .page import build_page, overview, top_line
from .plot import plot
from .result import DiagnosisData


class Diagnosis(DiagnosisData):
    """What :func:`mmc_fast.diagnose` found: the numbers and verdicts of :class:`DiagnosisData`, and how to look at them.

    Plots and the page need matplotlib (``pip install 'mmc-fast[diagnose]'``).

    Examples:
        >>> from mmc_fast.experiments.data import load
        >>> run = mmc_fast.experiments.training.load_run("runs/mfeat-dropout-0")  # doctest: +SKIP
        >>> diagnosis = mmc_fast.diagnose(run, load("mfeat"))  # doctest: +SKIP
        >>> print(diagnosis.summary(), diagnosis["use_share.pix"])  # doctest: +SKIP
        >>> diagnosis.save_html("diagnosis.html")  # doctest: +SKIP
    """

    def plot(self, kind: str, ax: Any = None) -> Any:
        """One picture on matplotlib axes (new ones where ``ax`` is None), which are returned.

        ``kind``: "use_shares", "blocks", "spectra", "reliance", "shapley", "subsets", "neurons", "responses", "similarity" or
        "ranks".
        Raises InputError for another kind, or where this diagnosis lacks what the picture shows.
        """
        return plot(self, kind, ax)

    def _repr_html_(self) -> str:
        """The table of modalities, for a notebook; needs no extra."""
        return fragment(top_line(self), overview(self))

    def to_html(self, other: DiagnosisData | None = None) -> str:
        """One offline page with every panel, what each means and what it cannot show; ``other``: compared with."""
        return build_page(self, other).html()

    def save_html(self, path: str | Path, other: DiagnosisData | None = None) -> Path:
        """:meth:`to_html` in a file, written in one step."""
        return build_page(self, other).save(path)
