"""Tables of events that do not fit into memory: read once, kept on disk by blocks of rows, counted and filled by block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmc_fast.experiments.data.prepare.tables import pandas

BLOCK = 2048  # rows of the data set whose events are in memory at a time
_RECORD = np.dtype([("row", "<i4"), ("key", "<i4"), ("value", "<f8")])


class Spill:
    """Events (row, key, value) of ``n`` rows, in files under ``folder``; memory holds one block and all distinct keys.

    What comes out does not depend on the pieces in which events were added, only on their order.
    """

    def __init__(self, folder: Path, name: str, n: int) -> None:
        self.n, self.keys = n, {}  # type: ignore[var-annotated]
        self._paths = [folder / f"{name}.{block}" for block in range(-(-n // BLOCK))]
        self._out = folder / f"{name}.npy"
        for path in self._paths:
            path.touch()

    def add(self, rows: np.ndarray, keys: np.ndarray, values: np.ndarray | None = None) -> None:
        """Append events; ``keys`` are text or numbers."""
        at, distinct = pandas().factorize(keys)
        number = np.array([self.keys.setdefault(key, len(self.keys)) for key in distinct.tolist()], np.int32)
        records = np.zeros(len(rows), _RECORD)
        records["row"], records["key"] = rows, number[at] if len(rows) else 0
        if values is not None:
            records["value"] = values
        block = records["row"] // BLOCK
        for b in np.unique(block):
            with open(self._paths[b], "ab") as file:
                records[block == b].tofile(file)

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for b, path in enumerate(self._paths):
            yield b * BLOCK, np.fromfile(path, _RECORD)

    def common(self, least: int, counted: np.ndarray | None = None) -> list[Any]:
        """The keys of at least ``least`` rows, sorted; ``counted``: bool [n], the rows that count. None = all."""
        total = np.zeros(len(self.keys), np.int64)
        for _, records in self._blocks():
            if counted is not None:
                records = records[counted[records["row"]]]
            pairs = np.unique(records["row"].astype(np.int64) * max(1, len(self.keys)) + records["key"])
            total += np.bincount(pairs % max(1, len(self.keys)), minlength=len(self.keys))
        return sorted(key for key, number in self.keys.items() if total[number] >= least)

    def listed(self, keys: list[Any], dtype: Any) -> np.ndarray:
        """[n, K], mapped from disk: 1 where the row has an event of the key."""
        return self._fill(keys, dtype, lambda cell, records, size: np.bincount(cell, minlength=size) > 0)

    def means(self, keys: list[Any]) -> np.ndarray:
        """float32 [n, K], mapped from disk: mean of the values of the row's events of the key; NaN where there is none."""

        def mean(cell: np.ndarray, records: np.ndarray, size: int) -> np.ndarray:
            count = np.bincount(cell, minlength=size)
            total = np.bincount(cell, weights=records["value"], minlength=size)
            return np.where(count > 0, total / np.maximum(count, 1), np.nan)

        return self._fill(keys, np.float32, mean)

    def _fill(self, keys: list[Any], dtype: Any, reduce: Any) -> np.ndarray:
        column = np.full(len(self.keys), -1)
        for j, key in enumerate(keys):
            if key in self.keys:
                column[self.keys[key]] = j
        matrix = np.lib.format.open_memmap(self._out, "w+", dtype=dtype, shape=(self.n, len(keys)))
        for start, records in self._blocks():
            stop = min(start + BLOCK, self.n)
            records = records[column[records["key"]] >= 0]
            cell = (records["row"] - start).astype(np.int64) * len(keys) + column[records["key"]]
            matrix[start:stop] = reduce(cell, records, (stop - start) * len(keys)).reshape(stop - start, len(keys))
        matrix.flush()
        for path in self._paths:
            path.unlink()
        return matrix
