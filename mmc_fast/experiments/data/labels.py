"""Label columns to a task: what they mean by a stated rule, and an error that names both readings where they are two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmc_fast._util.names import unknown
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.cells import as_numbers, as_text
from mmc_fast.experiments.tasks import KINDS, Classification, MultiLabel, Regression, Survival, Task

_TRUTH = {"True", "False", "true", "false"}


def read_labels(
    columns: Mapping[str, Any],
    kind: str | None,
    where: str,
    place: Callable[[int], str],
    known: Task | None = None,
) -> tuple[np.ndarray, Task]:
    """Labels ``[N]`` or ``[N, L]`` and their task.

    ``columns``: name -> cells, as an array or a table's column. One column of text or of two values holds classes, one with
    fractions holds numbers; several columns of which each row has one 1 are classes, and so is an array of integers 0 to
    C - 1. Everything else needs ``kind``: another column of whole numbers may be codes or amounts, several 0/1 columns
    may be several labels. ``place(row)``: how a row is called. ``known``: the task of a finished run. Raises InputError
    that names column, row and repair.
    """
    kind = known.kind if known is not None else kind
    if kind is not None and kind not in KINDS:
        raise unknown(f"kind of {where}:", kind, tuple(KINDS))
    names = list(columns)
    if kind == "regression":
        return _numbers(columns, where, place), Regression(tuple(names)) if known is None else known
    if kind == "multilabel":
        hot = _zero_one(columns, where, place)
        return hot.astype(np.int64), MultiLabel(tuple(names)) if known is None else known
    if kind == "survival":
        if len(names) != 2:
            raise InputError(
                f"{where}: survival has 2 label columns, time and event, and {len(names)} is named: {', '.join(names)}."
            )
        time, event = columns.items()
        _zero_one(dict([event]), where, place)
        return _numbers(columns, where, place), Survival((time[0], event[0])) if known is None else known
    if len(names) > 1:
        return _one_hot(columns, kind, where, place), Classification(tuple(names)) if known is None else known
    return _one_column(names[0], columns[names[0]], kind, where, place, known)


def _one_column(
    name: str, column: Any, kind: str | None, where: str, place: Callable[[int], str], known: Task | None
) -> tuple[np.ndarray, Task]:
    """Classes, sorted by value where they are numbers, else as text; or numbers where there are fractions."""
    text = as_text(column)
    _check_filled(name, text, where, place)
    found = sorted({str(t) for t in text})
    values, bad = as_numbers(column)
    if not bad.any() and not set(found) & _TRUTH:
        found = sorted(found, key=float)
        fractions = bool((values != np.round(values)).any())
        if kind is None and len(found) > 2:
            if fractions:
                return _numbers({name: column}, where, place), Regression((name,))
            if not _class_numbers(column, len(found)):
                raise InputError(
                    f"{where}: label {name!r} holds {len(found)} different whole numbers, which may be codes or amounts; "
                    'say kind = "classification" or kind = "regression".'
                )
        if known is None and fractions:
            raise InputError(
                f"{where}: label {name!r} holds fractions, {found[0]} and {found[1] if len(found) > 1 else 'no other'} among "
                'them; write classes as whole numbers or text, or say kind = "regression".'
            )
    classes = found if known is None else list(known.names)
    number = {c: i for i, c in enumerate(classes)}
    for row, t in enumerate(text):
        if t not in number:
            raise unknown(f"class in column {name!r}, {place(row)} of {where}:", str(t), classes)
    if known is None and len(classes) < 2:
        raise InputError(f"{where}: label {name!r} is {classes[0]!r} in every row; a classifier needs 2 classes.")
    return np.array([number[str(t)] for t in text], np.int64), known or Classification(tuple(classes))


def _class_numbers(column: Any, different: int) -> bool:
    """Whether an array of integers numbers classes from 0, each in two rows or more on average, as one stores them to train on."""
    if not (isinstance(column, np.ndarray) and column.dtype.kind in "iu"):
        return False
    return int(column.min()) == 0 and int(column.max()) == different - 1 and 2 * different <= len(column)


def _numbers(columns: Mapping[str, Any], where: str, place: Callable[[int], str]) -> np.ndarray:
    """float64 ``[N, L]``; InputError for empty cells, text and infinite values."""
    parts = []
    for name, column in columns.items():
        _check_filled(name, as_text(column), where, place)
        values, _ = as_numbers(column)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise InputError(
                f"{where}: label {name!r} is {as_text(column)[bad[0]]!r} in {place(int(bad[0]))}; a target is a finite number."
            )
        parts.append(values)
    return np.stack(parts, 1)


def _zero_one(columns: Mapping[str, Any], where: str, place: Callable[[int], str]) -> np.ndarray:
    values = _numbers(columns, where, place)
    bad = np.argwhere(~np.isin(values, (0.0, 1.0)))
    if len(bad):
        row, j = bad[0]
        raise InputError(
            f"{where}: label {list(columns)[j]!r} is {values[row, j]:g} in {place(int(row))}; each of several labels is 0 or 1."
        )
    return values


def _one_hot(columns: Mapping[str, Any], kind: str | None, where: str, place: Callable[[int], str]) -> np.ndarray:
    hot = np.stack([as_numbers(c)[0] for c in columns.values()], 1)
    wrong = ~(np.isin(hot, (0.0, 1.0)).all(1) & (hot.sum(1) == 1))
    if wrong.any():
        other = (
            ""
            if kind
            else '; for several labels a row say kind = "multilabel", for several targets kind = "regression", for time and event kind = "survival"'
        )
        raise InputError(
            f"{where}: {place(int(np.flatnonzero(wrong)[0]))} of the label columns {', '.join(columns)} is not one 1 and else "
            f"0; one of several columns must be the class of each row{other}."
        )
    return hot.argmax(1).astype(np.int64)


def _check_filled(name: str, text: list[str | None], where: str, place: Callable[[int], str]) -> None:
    empty = next((row for row, t in enumerate(text) if t is None), None)
    if empty is not None:
        raise InputError(
            f"{where}: label {name!r} is empty in {place(empty)}; remove such rows, or use predict for them."
        )
