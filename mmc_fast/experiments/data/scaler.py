"""Standardisation with train statistics, and what happens to values that were not measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["NAN_POLICIES", "ViewScaler"]

NAN_POLICIES = ("error", "mean", "indicator")
_CHUNK = 8192  # rows held in float64 at a time


@dataclass(frozen=True, eq=False)
class ViewScaler:
    """Column statistics of one modality over its present training rows, and their use on all rows.

    ``x -> (x - mean) * scale``, with ``scale = 1 / std`` (population), and 0 for a column that is constant in train:
    it carries nothing, so it becomes 0 everywhere. A value that was not measured becomes ``fill``: the train mean,
    that is 0 after standardising. A column never measured in train becomes 0 everywhere, also where a later row has
    it. ``indicated`` lists the columns whose measured pattern (1 measured, 0 not) is appended, unscaled, on the
    right; so a row in which nothing was measured is the zero vector, the same as an absent one.
    """

    mean: np.ndarray  # float64 [d], subtracted
    scale: np.ndarray  # float64 [d], multiplied
    fill: np.ndarray  # float64 [d], for values not measured, on the scale of the result
    constant: np.ndarray  # int64, columns with one value in train
    never: np.ndarray  # int64, columns not measured in train
    indicated: np.ndarray  # int64, columns with an indicator

    @classmethod
    def fit(
        cls, x: np.ndarray, rows: np.ndarray, *, indicator: bool, standardise: bool, chunk: int = _CHUNK
    ) -> ViewScaler:
        """Statistics of ``x[rows]`` ([N, d], NaN = not measured; ``rows`` bool [N], present and in train).

        ``chunk``: rows held at a time.
        """
        d = x.shape[1]
        count, total = np.zeros(d), np.zeros(d)
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
        never = count == 0
        constant = ~never & ((low == high) | (std < np.finfo(np.float32).tiny))
        incomplete = ~never & (count < rows.sum())
        if standardise:
            scale = np.where(never | constant, 0.0, 1.0 / np.where(never | constant, 1.0, std))
            fill = np.zeros(d)
        else:
            scale, fill, mean = np.where(never, 0.0, 1.0), mean, np.zeros(d)
        indicated = np.flatnonzero(incomplete) if indicator else np.zeros(0, np.int64)
        return cls(mean, scale, fill, np.flatnonzero(constant), np.flatnonzero(never), indicated)

    def width(self, d: int) -> int:
        """Columns of the result for ``d`` features: theirs and the indicators."""
        return d + len(self.indicated)

    def apply(self, x: np.ndarray, present: np.ndarray) -> np.ndarray:
        """float32 [N, d + number of indicators]; rows where ``present`` (bool [N]) is False are zero."""
        d = x.shape[1]
        out = np.zeros((len(x), self.width(d)), np.float32)
        rows = x[present].astype(np.float64)
        measured = ~np.isnan(rows)
        values = np.where(measured, (rows - self.mean) * self.scale, self.fill)
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
