"""What a model knows of its columns: names, order, categories, scaling and class names; and how far new rows are from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from mmc_fast._util.documents import Count0, Finite
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.scaler import ViewScaler
from mmc_fast.experiments.tasks import Task, task_from_dict

FAR = 0.25  # standardised mean difference that counts as a shift, beyond three standard errors
OUTSIDE = 0.05  # share of values outside of the training range that counts as a shift


class _Scaler(TypedDict):
    mean: list[Finite]
    std: list[Finite]
    low: list[Finite]
    high: list[Finite]
    count: list[Count0]
    rows: Count0
    indicated: list[Count0]
    standardise: bool


class _View(TypedDict):
    columns: list[str]
    categories: dict[str, list[str]]
    scaler: _Scaler


class PreprocessingDocument(TypedDict):
    """The form of :meth:`Preprocessing.to_dict`."""

    views: dict[str, _View]
    policy: str
    task: dict[str, Any]
    source: dict[str, Any]


@dataclass(frozen=True, eq=False)
class ViewColumns:
    """The columns of one modality, in order.

    ``columns`` as the source names them; a column in ``categories`` became one 0/1 column for each of its categories
    and one for all others. ``scaler``: statistics of the training rows over the columns that result.
    """

    columns: list[str]
    scaler: ViewScaler
    categories: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the encoded columns, before indicators."""
        return encoded_names(self.columns, self.categories)


def encoded_names(columns: Sequence[str], categories: dict[str, list[str]]) -> list[str]:
    """A number keeps its name; a category becomes ``COLUMN=VALUE``, and ``COLUMN=other`` for what training lacks."""
    found = []
    for column in columns:
        found += [f"{column}={c}" for c in (*categories[column], "other")] if column in categories else [column]
    return found


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """From rows of a source to the input of a model, with statistics of its training rows alone.

    ``task``: how labels are read. ``source``: the roles of columns (``id``,
    ``label``, ...) in the tables that the data came from.
    """

    views: dict[str, ViewColumns]
    policy: str
    task: Task
    source: dict[str, Any] = field(default_factory=dict)

    def keep(self, modalities: Sequence[str]) -> Preprocessing:
        """For these modalities only."""
        return replace(self, views={name: self.views[name] for name in modalities})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        views = {
            name: {"columns": v.columns, "categories": v.categories, "scaler": v.scaler.to_dict()}
            for name, v in self.views.items()
        }
        return {"views": views, "policy": self.policy, "task": self.task.to_dict(), "source": self.source}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """What :meth:`to_dict` gave."""
        views = {
            name: ViewColumns(v["columns"], ViewScaler.from_dict(v["scaler"]), v["categories"])
            for name, v in values["views"].items()
        }
        return cls(views, values["policy"], task_from_dict(values["task"]), values["source"])

    def align(
        self, dataset: str, views: dict[str, np.ndarray], names: dict[str, list[str]], rows: int
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The modalities in the order and with the columns of training, NaN where one is not there; and what differs.

        Columns are matched by name, or by place where ``names`` has none and the number fits. Raises InputError where no
        modality is there, or where columns without names are of another number.
        """
        if not set(views) & set(self.views):
            raise InputError(
                f"{dataset}: none of the modalities of the run is there; they are {', '.join(self.views)}, "
                f"and the data have {', '.join(views) or 'none'}"
            )
        found: dict[str, np.ndarray] = {}
        differ: dict[str, Any] = {"new_modalities": [v for v in views if v not in self.views], "absent_modalities": []}
        differ |= {"new_columns": {}, "missing_columns": {}}
        for view, columns in self.views.items():
            wanted = columns.names
            if view not in views:
                differ["absent_modalities"].append(view)
                found[view] = np.full((rows, len(wanted)), np.nan, np.float32)
                continue
            x = views[view].reshape(rows, -1)
            own = names.get(view)
            if own is None and x.shape[1] != len(wanted):
                raise InputError(
                    f"{dataset}: modality {view!r} has {x.shape[1]} columns without names and the run was trained on "
                    f"{len(wanted)}; store their names as names_{view}"
                )
            if own is None or own == wanted:
                found[view] = x
                continue
            place = {name: j for j, name in enumerate(own)}
            taken = np.full((rows, len(wanted)), np.nan, np.result_type(x.dtype, np.float32))
            for j, name in enumerate(wanted):
                if name in place:
                    taken[:, j] = x[:, place[name]]
            found[view] = taken
            for key, names_ in (
                ("new_columns", [n for n in own if n not in set(wanted)]),
                ("missing_columns", [n for n in wanted if n not in place]),
            ):
                if names_:
                    differ[key][view] = names_
        return found, differ


def shift(pre: Preprocessing, views: dict[str, np.ndarray], present: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """How far each column of new rows is from the training rows; no prediction depends on it.

    For each column: ``difference`` = (mean here - mean in train) / std in train over the measured values (None where
    there is none to take), ``outside`` = share of them outside of the training range, ``measured`` and
    ``training_measured`` = shares of the present rows, and ``far``: more than 5 % outside, or a difference beyond
    0.25 + 3 / sqrt(values).
    """
    found = []
    for view, columns in pre.views.items():
        s, rows = columns.scaler, np.flatnonzero(present[view])
        d = len(s.mean)
        count, total, outside = np.zeros(d, np.int64), np.zeros(d), np.zeros(d, np.int64)
        for start in range(0, len(rows), 8192):
            x = views[view][rows[start : start + 8192]].astype(np.float64)
            count += (~np.isnan(x)).sum(0)
            total += np.nansum(x, 0)
            outside += ((x < s.low) | (x > s.high)).sum(0)
        for j, name in enumerate(columns.names):
            entry: dict[str, Any] = {"modality": view, "column": name, "difference": None, "outside": None}
            entry["measured"] = round(count[j] / len(rows), 6) if len(rows) else None
            entry["training_measured"] = round(int(s.count[j]) / s.rows, 6) if s.rows else None
            entry["far"] = False
            if count[j] and s.count[j]:
                gap = total[j] / count[j] - s.mean[j]
                if s.std[j] > 0:
                    entry["difference"] = float(round(gap / s.std[j], 6))
                share = outside[j] / count[j]
                entry["outside"] = float(round(share, 6))
                distance = abs(entry["difference"] or 0.0)
                entry["far"] = bool(share > OUTSIDE or distance > FAR + 3 / np.sqrt(count[j]))
            found.append(entry)
    return found
