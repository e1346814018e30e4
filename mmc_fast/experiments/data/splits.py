"""A seeded split into train, validation and test: by class, and by group where there are groups."""

from __future__ import annotations

import warnings

import numpy as np

from mmc_fast._util.numbers import check_seed
from mmc_fast.experiments.data.dataset import PARTS


def stratified_split(
    labels: np.ndarray, *, seed: int, ids: np.ndarray | None = None, train: float = 0.6, validation: float = 0.1
) -> np.ndarray:
    """uint8 [N]: 0 train, 1 validation, 2 test; the shares hold within each class.

    The rows of each class, in rising order of class, are permuted by one ``numpy.random.default_rng(seed)`` and cut at
    ``round(train n)`` and ``round((train + validation) n)``, moved by one where a part would be empty: a class of three
    rows or more has one in each part. With ``ids`` whole groups are dealt instead of rows, a group counting to the highest
    label among its rows, so that no id is in two parts. A class that some part lacks all the same is told in a warning.
    """
    seed = check_seed(seed)
    if ids is None:
        group, strata = np.arange(len(labels)), labels
    else:
        _, group = np.unique(ids, return_inverse=True)
        strata = np.full(int(group.max(initial=-1)) + 1, -1, np.int64)
        np.maximum.at(strata, group, labels)
    rng = np.random.default_rng(seed)
    code = np.zeros(len(strata), np.uint8)
    for label in np.unique(strata):
        rows = rng.permutation(np.flatnonzero(strata == label))
        n = len(rows)
        first, second = round(train * n), round((train + validation) * n)
        if n >= 3:
            first = min(max(first, 1), n - 2)
            second = min(max(second, first + 1), n - 1)
        code[rows[first:second]] = 1
        code[rows[second:]] = 2
    result = code[group]
    _tell_small_classes(labels, result, "row" if ids is None else "group")
    return result


def _tell_small_classes(labels: np.ndarray, code: np.ndarray, unit: str) -> None:
    """One warning that names the classes which a part lacks."""
    lacking = {
        int(label): [part for i, part in enumerate(PARTS) if not (code[labels == label] == i).any()]
        for label in np.unique(labels)
    }
    found = [f"class {label} has none in {' and '.join(parts)}" for label, parts in lacking.items() if parts]
    if found:
        more = f" and {len(found) - 3} classes more" if len(found) > 3 else ""
        warnings.warn(
            f"split: {'; '.join(found[:3])}{more}: with fewer than three {unit}s of its own a class cannot be in every part; "
            "add rows, join classes, or store a split of your own",
            stacklevel=3,
        )
