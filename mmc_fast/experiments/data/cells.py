"""Cells of one column as numbers or as text, whether it belongs to a table or is an array."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mmc_fast._util.extras import require

_WHOLE = re.compile(r"(-?\d+)\.0+")
_TRUTH = {"true": "1", "false": "0"}


def as_numbers(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N] with NaN where a cell is empty or no number, and bool [N]: not empty and no number.

    true and false count as 1 and 0. ``column``: an array, which needs numpy alone, or a column of a pandas table.
    """
    if isinstance(column, np.ndarray):
        if column.dtype.kind in "biuf":
            return column.astype(np.float64), np.zeros(len(column), bool)
        text = as_text(column)
        values = np.array([_number(t) for t in text])
        return values, np.array([t is not None for t in text], bool) & np.isnan(values)
    pandas = require("pandas", extra="experiments")
    if pandas.api.types.is_bool_dtype(column) or pandas.api.types.is_numeric_dtype(column):
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return values, np.zeros(len(values), bool)
    if pandas.api.types.is_datetime64_any_dtype(column) or pandas.api.types.is_timedelta64_dtype(column):
        return np.full(len(column), np.nan), column.notna().to_numpy()
    text = as_text(column)
    filled = np.array([t is not None for t in text], bool)
    series = pandas.Series([None if t is None else _TRUTH.get(t.lower(), t) for t in text], dtype=object)
    values = pandas.to_numeric(series, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return values, filled & np.isnan(values)


def _number(text: str | None) -> float:
    try:
        return float("nan") if text is None or "_" in text else float(_TRUTH.get(text.lower(), text))
    except ValueError:
        return float("nan")


def as_text(column: Any) -> list[str | None]:
    """Cells as text, None where one is empty; whole numbers without a fraction, however the column is stored."""
    found: list[str | None] = []
    for value in column.tolist():
        if value is None or value != value or (text := str(value).strip()) in ("", "<NA>", "NaT"):
            found.append(None)
        else:
            whole = _WHOLE.fullmatch(text)
            found.append(whole[1] if whole else text)
    return found
