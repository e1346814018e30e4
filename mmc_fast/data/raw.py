"""From arrays as a file holds them to a checked, standardised data set: one path for every source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmc_fast.data.dataset import MultimodalDataset
from mmc_fast.data.names import choose
from mmc_fast.data.scaler import NAN_POLICIES, ViewScaler
from mmc_fast.errors import InputError

__all__ = ["RawDataset", "build"]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class RawDataset:
    """What a source gives: values not scaled, NaN = not measured, any shape [N, ...] per view.

    ``present`` holds bool [N] for the views that state it. For another view a row with nothing measured (all NaN) is
    absent. ``nan_policy`` is the default of this source.
    """

    name: str
    views: dict[str, np.ndarray]
    labels: np.ndarray
    split: np.ndarray
    num_classes: int
    metric: str
    names: dict[str, list[str]] = field(default_factory=dict)
    present: dict[str, np.ndarray] = field(default_factory=dict)
    ids: np.ndarray | None = None
    nan_policy: str = "error"
    info: dict[str, Any] = field(default_factory=dict)


def build(
    raw: RawDataset, *, nan_policy: str | None = None, standardise: bool = True, drop_empty: bool = False
) -> MultimodalDataset:
    """The data set of ``raw``: absence found, NaN handled by the policy, standardised with train statistics.

    ``nan_policy``: ``"error"``, ``"mean"`` (train mean) or ``"indicator"`` (train mean, and a 0/1 measured column for
    every feature that has a NaN in train); None = the default of the source. ``drop_empty``: leave out training rows
    with nothing present, for a selection of modalities; without it they are an error. Raises
    :class:`~mmc_fast.errors.InputError`.
    """
    policy = choose("nan_policy", raw.nan_policy if nan_policy is None else nan_policy, NAN_POLICIES)
    train = raw.split == 0
    features, names, present = {}, {}, []
    notes: dict[str, Any] = {"never_measured": {}, "constant": {}, "indicators": {}, "absent": {}}
    for view, values in raw.views.items():
        x = values.reshape(len(values), -1)
        own = raw.names.get(view) or [f"{view}_{j}" for j in range(x.shape[1])]
        here = raw.present.get(view)
        if here is None:
            here = ~_all_nan(x)
        _check_values(raw.name, view, x, here, own, policy)
        scaler = ViewScaler.fit(x, here & train, indicator=policy == "indicator", standardise=standardise)
        scaled = scaler.apply(x, here)
        if not np.isfinite(scaled).all():
            row, column = np.argwhere(~np.isfinite(scaled))[0]
            raise InputError(
                f"{raw.name}: modality {view!r}, feature {own[column]!r}, row {row}: the value is too far from the "
                "training rows for float32 after standardising; clip or rescale the feature."
            )
        features[view] = scaled
        names[view] = own + [f"{own[j]} measured" for j in scaler.indicated]
        present.append(here)
        for key, found in (
            ("never_measured", [own[j] for j in scaler.never]),
            ("constant", len(scaler.constant)),
            ("indicators", len(scaler.indicated)),
            ("absent", round(float(1 - here.mean()), 6) if len(here) else 0.0),
        ):
            if found:
                notes[key][view] = found
    presence = np.stack(present, 1)
    rows = presence.any(1) | ~train if drop_empty else np.ones(len(train), bool)
    if not rows.all():
        notes["dropped_rows"] = int((~rows).sum())
    return MultimodalDataset(
        name=raw.name,
        features={view: torch.from_numpy(x[rows] if "dropped_rows" in notes else x) for view, x in features.items()},
        present=torch.from_numpy(presence[rows]),
        labels=torch.from_numpy(raw.labels[rows].astype(np.int64)),
        split=torch.from_numpy(raw.split[rows].astype(np.uint8)),
        num_classes=raw.num_classes,
        metric=raw.metric,
        feature_names=names,
        ids=None if raw.ids is None else torch.from_numpy(raw.ids[rows].astype(np.int64)),
        info={**raw.info, "nan_policy": policy, "standardised": standardise, **notes},
    )


def _all_nan(x: np.ndarray) -> np.ndarray:
    if x.dtype.kind != "f" or not x.shape[1]:
        return np.zeros(len(x), bool)
    return np.isnan(x).all(1)


def _check_values(dataset: str, view: str, x: np.ndarray, here: np.ndarray, names: list[str], policy: str) -> None:
    """Raise on infinities, on values beyond float32, and on NaN where the policy forbids it; absent rows aside."""
    if x.dtype.kind != "f":
        return
    too_large = np.isinf(x)
    if x.dtype.itemsize > 4:
        with np.errstate(invalid="ignore"):
            too_large |= np.abs(x) > _LARGEST
    too_large &= here[:, None]
    if too_large.any():
        row, column = np.argwhere(too_large)[0]
        raise InputError(
            f"{dataset}: modality {view!r} holds {x[row, column]} in row {row}, feature {names[column]!r}; values must "
            "be finite and fit into float32. Use NaN for 'not measured'."
        )
    if policy != "error":
        return
    gaps = np.isnan(x) & here[:, None]
    if gaps.any():
        row, column = np.argwhere(gaps)[0]
        raise InputError(
            f"{dataset}: modality {view!r} has NaN in {int(gaps.any(1).sum())} row(s), the first in row {row}, feature "
            f"{names[column]!r}. Fill them, or choose nan_policy 'mean' or 'indicator'."
        )
