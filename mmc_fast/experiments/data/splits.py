"""A seeded split into train, validation and test: by class, and by group where there are groups."""

from __future__ import annotations

import numpy as np

__all__ = ["stratified_split"]


def stratified_split(
    labels: np.ndarray, *, seed: int, ids: np.ndarray | None = None, train: float = 0.6, validation: float = 0.1
) -> np.ndarray:
    """uint8 [N]: 0 train, 1 validation, 2 test; the shares hold within each class.

    The rows of each class, in rising order of class, are permuted by one ``numpy.random.default_rng(seed)`` and cut at
    ``round(train n)`` and ``round((train + validation) n)``. With ``ids`` whole groups are dealt instead of rows, a
    group counting to the highest label among its rows, so that no id is in two parts.
    """
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
        first, second = round(train * len(rows)), round((train + validation) * len(rows))
        code[rows[first:second]] = 1
        code[rows[second:]] = 2
    return code[group]
