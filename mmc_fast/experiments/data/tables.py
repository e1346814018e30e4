"""Tables as people have them: files of several formats read with pandas, columns as numbers or as categories."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmc_fast._util.extras import require
from mmc_fast._util.files import check_regular
from mmc_fast._util.memory import check_memory
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.cells import as_numbers, as_text
from mmc_fast.experiments.data.preprocessing import encoded_names

ENDINGS = (".csv", ".tsv", ".parquet", ".feather")
CATEGORIES = 50  # at most, of a column
RARE = 0.01  # share of the training rows below which a category counts as "other"

_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_CELLS = 4  # bytes in memory for one of a table on disk, at least


def read_table(path: Path) -> Any:
    """A pandas table. Cells of CSV and TSV stay text, so that the meaning of one never depends on other rows.

    A ``.csv`` whose first line has more semicolons than commas is separated by semicolons. Raises InputError.
    """
    pandas = require("pandas", extra="experiments")
    try:
        check_regular(path)
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise InputError(f"{path}: {what}.") from None
    if path.suffix not in ENDINGS:
        raise InputError(f"{path}: tables are read from {', '.join(ENDINGS)}; store it in one of these.")
    advice = "take fewer rows or columns, or store it as npz and give a memory_budget"
    try:
        check_memory(_CELLS * path.stat().st_size, f"{path}: the table", advice)
        if path.suffix == ".parquet":
            parquet = require("pyarrow.parquet", extra="experiments")
            about = parquet.read_metadata(path)
            sizes = (about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            check_memory(2 * max(sum(sizes), 8 * about.num_rows * about.num_columns), f"{path}: the table", advice)
            frame = pandas.read_parquet(path)
        elif path.suffix == ".feather":
            require("pyarrow", extra="experiments")
            frame = pandas.read_feather(path)
        else:
            with open(path, encoding="utf-8-sig", newline="") as file:
                first = file.readline()
            comma = ";" if first.count(";") > first.count(",") else ","
            separator = "\t" if path.suffix == ".tsv" else comma
            header = next(csv.reader([first], delimiter=separator), [])
            _check_header(path, header)
            frame = pandas.read_csv(
                path, sep=separator, dtype=str, encoding="utf-8-sig", skipinitialspace=True, index_col=False
            )
    except InputError:
        raise
    except Exception as error:  # pandas and pyarrow raise many kinds for damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]} ({reason}); store it again.") from error
    frame.columns = [str(name).strip() for name in frame.columns]
    _check_header(path, list(frame.columns))
    if not len(frame):
        raise InputError(f"{path}: no rows; a table needs a header and at least one row.")
    return frame


def _check_header(path: Path, names: Sequence[str]) -> None:
    stripped = [name.strip() for name in names]
    twice = next((name for i, name in enumerate(stripped) if name in stripped[:i]), None)
    if twice is not None:
        raise InputError(f"{path}: column {twice!r} is there twice; rename or remove one.")


def place(table: Any, row: int) -> str:
    """A row as a reader finds it: its number in the file, or its id where several tables were joined."""
    return f"{table.index.name or 'row'} {table.index[row]}"


def fit_categories(
    frame: Any, columns: Sequence[str], train: np.ndarray, declared: Sequence[str], where: str
) -> dict[str, list[str]]:
    """The categories of the columns that are text or ``declared``, from the training rows (bool [N]) alone.

    A category is kept where it has at least two training rows and 1 % of those with a value, at most the 50 most
    frequent ones; the others become "other". Raises InputError for columns of numbers mixed with text, dates, and text
    of which nothing would be kept.
    """
    found = {}
    pandas = require("pandas", extra="experiments")
    for name in columns:
        column = frame[name]
        if pandas.api.types.is_datetime64_any_dtype(column) or pandas.api.types.is_timedelta64_dtype(column):
            raise InputError(
                f"{where}: column {name!r} holds dates; turn them into numbers, such as days since admission."
            )
        if name not in declared and not isinstance(column.dtype, pandas.CategoricalDtype):
            values, bad = as_numbers(column)
            wrong = bad & train
            if not wrong.any():
                continue
            _check_mixed(name, column, values, wrong, train, where)
        text = [t for t, here in zip(as_text(column), train, strict=True) if here and t is not None]
        counts: dict[str, int] = {}
        for t in text:
            counts[t] = counts.get(t, 0) + 1
        least = max(2, math.ceil(RARE * len(text)))
        kept = sorted((t for t, n in counts.items() if n >= least), key=lambda t: (-counts[t], t))[:CATEGORIES]
        if not kept:
            raise InputError(
                f"{where}: column {name!r} holds {len(counts)} different texts in {len(text)} training rows and none of "
                "them often enough for a category; leave the column out, or turn it into numbers."
            )
        found[name] = sorted(kept)
    return found


def _check_mixed(name: str, column: Any, values: np.ndarray, wrong: np.ndarray, train: np.ndarray, where: str) -> None:
    rows = np.flatnonzero(wrong)
    texts = as_text(column.iloc[rows])
    row, example = int(rows[0]), texts[0]
    comma = next((i for i, t in enumerate(texts) if t is not None and _DECIMAL_COMMA.fullmatch(t)), None)
    if comma is not None:
        row, example = int(rows[comma]), texts[comma]
        raise InputError(
            f"{where}: column {name!r} holds {example!r} in {place(column, row)}; write decimal points, not commas."
        )
    if (~np.isnan(values) & train).sum() >= wrong.sum():
        raise InputError(
            f"{where}: column {name!r} holds numbers and {example!r} in {place(column, row)}; make it empty or a number, or list "
            "the column under categorical."
        )


def encode(
    frame: Any, columns: Sequence[str], categories: dict[str, list[str]], where: str
) -> tuple[np.ndarray, list[str]]:
    """float64 [N, d] of the columns in this order, NaN where a cell is empty or a column not there.

    A category becomes 0/1 columns, the last for all others. Also returns "COLUMN=VALUE" for values that are no
    category. Raises InputError for text in a column of numbers.
    """
    parts, strange = [], []
    for name in columns:
        if name not in frame.columns:
            parts.append(np.full((len(frame), len(encoded_names([name], categories))), np.nan))
            continue
        if name not in categories:
            values, bad = as_numbers(frame[name])
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                raise InputError(
                    f"{where}: column {name!r} holds {frame[name].iloc[row]!s} in {place(frame, row)}, and it is a column of "
                    "numbers in training; make it empty or a number."
                )
            parts.append(values[:, None])
            continue
        text, known = as_text(frame[name]), {c: j for j, c in enumerate(categories[name])}
        hot = np.zeros((len(frame), len(known) + 1))
        hot[np.arange(len(text)), [known.get(t, len(known)) for t in text]] = 1  # type: ignore[arg-type]
        hot[[t is None for t in text]] = np.nan
        parts.append(hot)
        strange += sorted({f"{name}={t}" for t in text if t is not None and t not in known})
    return np.concatenate(parts, 1), strange
