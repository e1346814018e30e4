"""What a model is trained to predict: one object with loss, answers, metrics and columns for each kind of task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import NotFiniteError, Task
from .classification import Classification
from .multilabel import MultiLabel
from .regression import Regression
from .survival import Survival

__all__ = [
    "KINDS",
    "Classification",
    "MultiLabel",
    "NotFiniteError",
    "Regression",
    "Survival",
    "Task",
    "task_from_dict",
]

KINDS: dict[str, type[Task]] = {kind.kind: kind for kind in (Classification, MultiLabel, Regression, Survival)}
"""How a column map spells it -> the class."""


def task_from_dict(values: Mapping[str, Any]) -> Task:
    """What :meth:`Task.to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
    given = dict(values)
    return KINDS[given.pop("kind")](**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
