"""Tables of the originals: read with pandas, turned into columns of numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmc_fast._util.extras import require
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.prepare.originals import Originals

if TYPE_CHECKING:
    import pandas as pd


def pandas() -> Any:
    """The module pandas; :class:`~mmc_fast._util.extras.MissingExtra`, one line, where it is not installed."""
    return require("pandas", extra="experiments")


def table(originals: Originals, name: str, columns: Sequence[str], **options: Any) -> pd.DataFrame:
    """The columns of one csv file (or ``.csv.gz``); ``options`` are those of ``pandas.read_csv``."""
    _check_header(originals, name, columns)
    with originals.open(name) as stream:
        frame: pd.DataFrame = pandas().read_csv(stream, usecols=list(columns), **{"low_memory": False, **options})
    originals.progress(f"read {name}", len(frame), len(frame))
    originals.rows(name, len(frame), originals.expected.get(name, len(frame)))
    return frame


def chunks(
    originals: Originals, name: str, columns: Sequence[str], rows: int, **options: Any
) -> Iterator[pd.DataFrame]:
    """The same in pieces of ``rows`` rows, for tables that do not fit into memory."""
    _check_header(originals, name, columns)
    done = 0
    with originals.open(name) as stream:
        for frame in pandas().read_csv(stream, usecols=list(columns), chunksize=rows, **options):
            done += len(frame)
            originals.progress(f"read {name}", done, None)
            yield frame
    originals.rows(name, done, originals.expected.get(name, done))


def _check_header(originals: Originals, name: str, columns: Sequence[str]) -> None:
    with originals.open(name) as stream:
        first = io.TextIOWrapper(stream, encoding="utf-8-sig").readline()
    header = next(csv.reader([first]), [])
    missing = [column for column in columns if column not in header]
    if missing:
        raise InputError(
            f"{originals.name}: {name} has no column {', '.join(missing)} (it has {', '.join(header[:12]) or 'none'}); "
            f"is it of another release? get it: {originals.where}"
        )


def one_hot(column: pd.Series, least: int = 1, counted: np.ndarray | None = None) -> tuple[np.ndarray, list[str]]:
    """uint8 [N, K] and names ``COLUMN=value``: the values of at least ``least`` rows in order, the rest ``other``.

    An empty cell is the value ``missing``. ``counted``: rows that decide which values have a column. None = all.
    """
    text = column.astype(object).where(column.notna(), "missing").astype(str).to_numpy(dtype=object)
    values, counts = np.unique(text if counted is None else text[counted], return_counts=True)
    keep = values[counts >= least].tolist()
    position = {value: j for j, value in enumerate(keep)}
    at = np.array([position.get(value, len(keep)) for value in text])
    if (at == len(keep)).any():
        keep.append("other")
    return (at[:, None] == np.arange(len(keep))).astype(np.uint8), [f"{column.name}={value}" for value in keep]


def multi_hot(rows: np.ndarray, keys: np.ndarray, n: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, K] with 1 where the row has the key, over the keys of at least ``least`` rows; and the keys, sorted."""
    values, at = np.unique(keys.astype(str), return_inverse=True)
    pairs = np.unique(rows.astype(np.int64) * len(values) + at)
    row, key = pairs // max(1, len(values)), pairs % max(1, len(values))
    keep = np.flatnonzero(np.bincount(key, minlength=len(values)) >= least)
    matrix = np.zeros((n, len(values)), np.float32)
    matrix[row, key] = 1
    return matrix[:, keep], np.array(values[keep].tolist(), str)
