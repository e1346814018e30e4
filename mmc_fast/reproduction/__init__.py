"""The paper's experiments on open data: our numbers beside the paper's, and which of its directions agree."""

from __future__ import annotations

from ..data.names import unknown
from .base import Direction, Estimate, Experiment, Outcome, Plan, ResultTable, Value, paired
from .clinical import TABLE_5

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

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in (TABLE_5,)}


def get(name: str) -> Experiment:
    """An experiment by name. Raises InputError with the nearest name where there is none."""
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, tuple(EXPERIMENTS))
    return EXPERIMENTS[name]
