"""The paper's experiments on open data: our numbers beside the paper's, and which of its directions agree."""

from __future__ import annotations

from mmc_fast._util.names import unknown

from .base import Direction, Estimate, Experiment, Outcome, Plan, ResultTable, Value, paired
from .clinical import TABLE_1, TABLE_2, TABLE_5
from .digits import TABLE_3, TABLE_4
from .fig4 import FIGURE_4
from .fig5 import FIGURE_5
from .fig6 import FIGURE_6
from .fig7 import FIGURE_7
from .table6 import TABLE_6
from .table7 import TABLE_7
from .table9 import TABLE_9

__all__ = [
    "EXPERIMENTS",
    "Direction",
    "Estimate",
    "Experiment",
    "Outcome",
    "Plan",
    "ResultTable",
    "Value",
    "get",
    "paired",
]

_ALL = [TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_5, TABLE_6, TABLE_7, TABLE_9, FIGURE_4, FIGURE_5, FIGURE_6, FIGURE_7]
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}


def get(name: str) -> Experiment:
    """An experiment by name. Raises InputError with the nearest name where there is none."""
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, tuple(EXPERIMENTS))
    return EXPERIMENTS[name]
