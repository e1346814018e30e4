"""Standardisation with train statistics, and what happens to values that were not measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

NAN_POLICIES = ("error", "mean", "indicator")
_CHUNK = 8192  # rows held in float64 at a time


@dataclass(frozen=True, eq=False)
class ViewScaler:
    """Column statistics of one modality over its present training rows, and their use on any rows.

    ``x -> (x - mean) / std`` (population), and 0 for a column that is constant in train: it carries nothing, so it
    becomes 0 everywhere. A value that was not measured becomes the train mean, that is 0 after standardising. A column
    never measured in train becomes 0 everywhere, also where a later row has it. ``indicated`` lists the columns whose
    measured pattern (1 measured, 0 not) is appended, unscaled, on the right; so a row in which nothing was measured is
    the zero vector, the same as an absent one. ``low``, ``high``, ``count`` and ``rows`` (present ones) describe the
    training rows for a comparison with later ones.
    """

    mean: np.ndarray  # float64 [d], 0 where never measured, as std, low and high
    std: np.ndarray  # float64 [d]
    low: np.ndarray  # float64 [d]
    high: np.ndarray  # float64 [d]
    count: np.ndarray  # int64 [d], measured values
    rows: int
    indicated: np.ndarray  # int64, columns with an indicator
    standardise: bool = True

    @classmethod
    def fit(
        cls, x: np.ndarray, rows: np.ndarray, *, indicator: bool, standardise: bool, chunk: int = _CHUNK
    ) -> ViewScaler:
        """Statistics of ``x[rows]`` ([N, d], NaN = not measured; ``rows`` bool [N], present and in train).

        ``chunk``: rows held at a time.
        """
        d = x.shape[1]
        count, total = np.zeros(d, np.int64), np.zeros(d)
        low, high = np.full(d, np.inf), np.full(d, -np.inf)
        for values in _chunks(x, rows, chunk):
            count += np.isfinite(values).sum(0)
            total += np.nansum(values, 0)
            low = np.fmin(low, np.fmin.reduce(values, 0))
            high = np.fmax(high, np.fmax.reduce(values, 0))
        mean = total / np.maximum(count, 1)
        square = np.zeros(d)
        for values in _chunks(x, rows, chunk):
            square += np.nansum((values - mean) ** 2, 0)
        std = np.sqrt(square / np.maximum(count, 1))
        known = count > 0
        incomplete = known & (count < rows.sum())
        return cls(
            mean,
            std,
            np.where(known, low, 0.0),
            np.where(known, high, 0.0),
            count,
            int(rows.sum()),
            np.flatnonzero(incomplete) if indicator else np.zeros(0, np.int64),
            standardise,
        )

    @property
    def never(self) -> np.ndarray:
        """Columns not measured in train."""
        return np.flatnonzero(self.count == 0)

    @property
    def constant(self) -> np.ndarray:
        """Columns with one value in train."""
        return np.flatnonzero((self.count > 0) & ((self.low == self.high) | (self.std < np.finfo(np.float32).tiny)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats keep every digit."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ViewScaler:
        """What :meth:`to_dict` gave."""
        arrays = {k: np.array(v, np.float64) for k, v in values.items() if isinstance(v, list)}
        integers = {k: arrays[k].astype(np.int64) for k in ("count", "indicated")}
        return cls(**(values | arrays | integers))

    def width(self, d: int) -> int:
        """Columns of the result for ``d`` features: theirs and the indicators."""
        return d + len(self.indicated)

    def apply(self, x: np.ndarray, present: np.ndarray) -> np.ndarray:
        """float32 [N, d + number of indicators]; rows where ``present`` (bool [N]) is False are zero."""
        d = x.shape[1]
        out = np.zeros((len(x), self.width(d)), np.float32)
        rows = x[present].astype(np.float64)
        measured = ~np.isnan(rows)
        if self.standardise:
            scale = 1.0 / np.where(self.std > 0, self.std, 1.0)
            values = np.where(measured, (rows - self.mean) * scale, 0.0)
            values[:, self.constant] = 0.0
        else:
            values = np.where(measured, rows, self.mean)
        values[:, self.never] = 0.0
        with np.errstate(over="ignore"):  # the caller tests the result for infinities
            out[present, :d] = values
        out[present, d:] = measured[:, self.indicated]
        return out


def _chunks(x: np.ndarray, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(x), size):
        chunk = x[start : start + size][rows[start : start + size]]
        if len(chunk):
            yield chunk.astype(np.float64)
