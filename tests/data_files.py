"""A small valid npz file in the documented layout, which tests break in one place at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

DROP = object()  # as a value: leave the array out


def arrays(seed: int = 0, rows: int = 90) -> dict[str, Any]:
    """Two views (a: 4 features, b: 3), 3 classes, 60/10/30 split, two rows to each id."""
    rng = np.random.default_rng(seed)
    return {
        "x_a": rng.normal(5.0, 3.0, (rows, 4)).astype(np.float32),
        "x_b": rng.normal(-1.0, 0.1, (rows, 3)),
        "y": (np.arange(rows) % 3).astype(np.int64),
        "meta": '{"kind": "classification"}',
        "split": np.repeat([0, 1, 2], [rows * 6 // 10, rows // 10, rows - rows * 6 // 10 - rows // 10]).astype(
            np.uint8
        ),
    }


def write(path: Path, changes: dict[str, Any] | None = None, **kwargs: int) -> Path:
    """The valid file with some arrays replaced, added or (DROP) left out."""
    content = {**arrays(**kwargs), **(changes or {})}
    np.savez(path, **{key: value for key, value in content.items() if value is not DROP})
    return path


def edited(array: np.ndarray, position: Any, value: Any) -> np.ndarray:
    """A copy with one entry changed."""
    copy = array.copy()
    copy[position] = value
    return copy
