"""From arrays as a file holds them to a checked, standardised data set: one path for every source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mmc_fast._util.names import choose
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.dataset import MultimodalDataset
from mmc_fast.experiments.data.preprocessing import Preprocessing, ViewColumns, shift
from mmc_fast.experiments.data.scaler import NAN_POLICIES, ViewScaler
from mmc_fast.experiments.data.scratch import Scratch
from mmc_fast.experiments.tasks import Task

_CHUNK = 8192  # rows looked at together
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class RawDataset:
    """What a source gives: values not scaled, NaN = not measured, any shape [N, ...] per view.

    ``present`` holds bool [N] for the views that state it. For another view a row with nothing measured (all NaN) is
    absent. ``nan_policy`` is the default of this source. ``columns`` and ``categories``: of
    views that come from a table, its columns and the categories of some. ``source``: roles of columns in that table.
    """

    name: str
    views: dict[str, np.ndarray]
    labels: np.ndarray
    split: np.ndarray
    task: Task
    names: dict[str, list[str]] = field(default_factory=dict)
    present: dict[str, np.ndarray] = field(default_factory=dict)
    ids: np.ndarray | None = None
    nan_policy: str = "error"
    info: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    categories: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    row_names: list[str] | None = None


def build(
    raw: RawDataset,
    *,
    preprocessing: Preprocessing | None = None,
    purpose: str = "training",
    nan_policy: str | None = None,
    standardise: bool = True,
    drop_empty: bool = False,
    scratch: Scratch | None = None,
) -> MultimodalDataset:
    """The data set of ``raw``: absence found, NaN handled by the policy, standardised with train statistics.

    ``nan_policy``: ``"error"``, ``"mean"`` (train mean) or ``"indicator"`` (train mean, and a 0/1 measured column for
    every feature that has a NaN in train); None = the default of the source. ``drop_empty``: leave out training rows
    with nothing present, for a selection of modalities; without it they are an error. Views that are mapped are worked
    on in pieces, and their result is mapped by ``scratch``. ``preprocessing``: of a finished run, used instead of
    statistics of these rows; columns are matched with it by name, and ``info["differences"]`` and ``info["shift"]`` say
    how the data differ. Raises :class:`~mmc_fast.errors.InputError`.
    """
    policy = choose("nan_policy", raw.nan_policy if nan_policy is None else nan_policy, NAN_POLICIES)
    differ = None
    if preprocessing is not None:
        policy = "mean" if preprocessing.policy == "error" else preprocessing.policy  # gaps are told, not refused
        views, differ = preprocessing.align(raw.name, raw.views, raw.names, len(raw.labels))
        for key, told in raw.info.get("differences", {}).items():  # what the reader of a table saw
            differ[key] = (
                differ.get(key, type(told)()) + told if isinstance(told, list) else {**differ.get(key, {}), **told}
            )
        stated = {view: here for view, here in raw.present.items() if view in views}
        absent = {view: np.zeros(len(raw.labels), bool) for view in differ["absent_modalities"]}
        names = {view: columns.names for view, columns in preprocessing.views.items()}
        raw = replace(raw, views=views, names=names, present=stated | absent)
    train = raw.split == 0
    flat = {view: values.reshape(len(values), -1) for view, values in raw.views.items()}
    present = {view: raw.present[view] if view in raw.present else ~_all_nan(x) for view, x in flat.items()}
    presence = np.stack([present[view] for view in flat], 1)
    rows = presence.any(1) | ~train if drop_empty else np.ones(len(train), bool)
    streamed = scratch is not None and any(isinstance(values, np.memmap) for values in raw.views.values())
    # Mapped data are put in the order of the parts: picking rows of a part would copy them into memory.
    order = np.argsort(raw.split, kind="stable") if streamed else np.arange(len(train))
    order = order[rows[order]]
    features, names, fitted = {}, {}, {}
    notes: dict[str, Any] = {"never_measured": {}, "constant": {}, "indicators": {}, "absent": {}}
    for view, x in flat.items():
        own = raw.names.get(view) or [f"{view}_{j}" for j in range(x.shape[1])]
        here = present[view]
        chunk = scratch.rows(x.shape[1]) if streamed and scratch is not None else _CHUNK
        _check_values(raw.name, view, x, here, own, policy, chunk)
        if preprocessing is not None:
            scaler = preprocessing.views[view].scaler
        else:
            indicator = policy == "indicator"
            scaler = ViewScaler.fit(x, here & train, indicator=indicator, standardise=standardise, chunk=chunk)
        fitted[view] = ViewColumns(raw.columns.get(view, own), scaler, raw.categories.get(view, {}))
        shape = (len(order), scaler.width(x.shape[1]))
        scaled = np.empty(shape, np.float32) if not streamed or scratch is None else scratch.empty(shape, np.float32)
        for start, some in _pieces(order, chunk):
            piece = scaler.apply(x[some], here[some])
            scaled[start : start + len(some)] = piece
            bad = ~np.isfinite(piece)
            if bad.any():
                row, column = np.argwhere(bad)[0]
                raise InputError(
                    f"{raw.name}: modality {view!r}, feature {own[column]!r}, row {some[row]}: the value is too far from "
                    "the training rows for float32 after standardising; clip or rescale the feature."
                )
        features[view] = scaled
        names[view] = own + [f"{own[j]} measured" for j in scaler.indicated]
        for key, found in (
            ("never_measured", [own[j] for j in scaler.never]),
            ("constant", len(scaler.constant)),
            ("indicators", len(scaler.indicated)),
            ("absent", round(float(1 - here.mean()), 6) if len(here) else 0.0),
        ):
            if found:
                notes[key][view] = found
    if not rows.all():
        notes["dropped_rows"] = int((~rows).sum())
    used = preprocessing
    if used is None:
        used = Preprocessing(fitted, policy, raw.task, raw.source)
    elif differ is not None:
        notes |= {"differences": differ, "shift": shift(used, flat, present)}
    return MultimodalDataset(
        name=raw.name,
        features={view: torch.from_numpy(x) for view, x in features.items()},
        present=torch.from_numpy(presence[order]),
        labels=raw.task.tensor(raw.labels[order]),
        split=torch.from_numpy(raw.split[order].astype(np.uint8)),
        num_classes=raw.task.outputs,
        metric=raw.task.metric,
        task=raw.task,
        feature_names=names,
        ids=None if raw.ids is None else torch.from_numpy(raw.ids[order].astype(np.int64)),
        info={**raw.info, "nan_policy": policy, "standardised": standardise, **notes},
        streamed=streamed,
        preprocessing=used,
        purpose=purpose,
        row_names=None if raw.row_names is None else [raw.row_names[i] for i in order],
    )


def _pieces(x: np.ndarray, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(x), chunk):
        yield start, x[start : start + chunk]


def _all_nan(x: np.ndarray) -> np.ndarray:
    if x.dtype.kind != "f" or not x.shape[1] or not len(x):
        return np.zeros(len(x), bool)
    # The first column tells which rows are worth a look.
    found = np.isnan(x[:, 0])
    candidates = np.flatnonzero(found)
    for start in range(0, len(candidates), _CHUNK):
        some = candidates[start : start + _CHUNK]
        found[some] = np.isnan(x[some]).all(1)
    return found


def _check_values(
    dataset: str, view: str, x: np.ndarray, here: np.ndarray, names: list[str], policy: str, chunk: int
) -> None:
    """Raise on infinities, on values beyond float32, and on NaN where the policy forbids it; absent rows aside."""
    if x.dtype.kind != "f":
        return
    gaps, first = 0, (0, 0)
    for start, piece in _pieces(x, chunk):
        known = here[start : start + chunk, None]
        too_large = np.isinf(piece)
        if x.dtype.itemsize > 4:
            with np.errstate(invalid="ignore"):
                too_large |= np.abs(piece) > _LARGEST
        too_large &= known
        if too_large.any():
            row, column = np.argwhere(too_large)[0]
            raise InputError(
                f"{dataset}: modality {view!r} holds {piece[row, column]} in row {start + row}, feature "
                f"{names[column]!r}; values must be finite and fit into float32. Use NaN for 'not measured'."
            )
        missing = np.isnan(piece) & known
        if policy == "error" and missing.any():
            row, column = np.argwhere(missing)[0]
            first = first if gaps else (start + int(row), int(column))
            gaps += int(missing.any(1).sum())
    if gaps:
        raise InputError(
            f"{dataset}: modality {view!r} has NaN in {gaps} row(s), the first in row {first[0]}, feature "
            f"{names[first[1]]!r}. Fill them, or choose nan_policy 'mean' or 'indicator'."
        )
