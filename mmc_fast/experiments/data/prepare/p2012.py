"""p2012: PhysioNet/Computing in Cardiology Challenge 2012, sets a and b: 8,000 intensive care stays, 48 hours."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np

from mmc_fast.errors import InputError
from mmc_fast.experiments.data.prepare.originals import Originals
from mmc_fast.experiments.data.prepare.recipe import Recipe

Limits = dict[str, tuple[float, float]]
ROWS = 4000  # stays of each set
SHA256 = "61175690cde2ddcbc6983945b06ec33515ac7fadae19c4147ea94b2eb1b41274"  # of all names and contents of the records
OUTCOMES = ["SAPS-I", "SOFA", "Length_of_stay", "Survival", "In-hospital_death"]
STATIC: Limits = {"Age": (0, 200), "Gender": (0, 1), "Height": (100, 230), "Weight": (20, 300)}
VITALS: Limits = {
    "HR": (5, 300), "SysABP": (20, 300), "DiasABP": (5, 250), "MAP": (10, 280), "NISysABP": (20, 300),
    "NIDiasABP": (5, 250), "NIMAP": (10, 280), "RespRate": (1, 100), "Temp": (25, 45), "GCS": (3, 15),
}  # fmt: skip
LABS: Limits = {
    "ALP": (1, 5000), "ALT": (1, 30000), "AST": (1, 30000), "Albumin": (0.5, 10), "BUN": (0.5, 300),
    "Bilirubin": (0.05, 100), "Cholesterol": (10, 1000), "Creatinine": (0.05, 50), "Glucose": (5, 2000), "HCO3": (2, 70),
    "HCT": (5, 75), "K": (1, 15), "Lactate": (0.1, 40), "Mg": (0.3, 15), "Na": (80, 200), "PaCO2": (5, 150),
    "PaO2": (10, 800), "Platelets": (1, 3000), "SaO2": (20, 100), "TroponinI": (0, 200), "TroponinT": (0, 200),
    "WBC": (0.05, 500), "pH": (6.5, 8.0),
}  # fmt: skip
SUPPORT: Limits = {"FiO2": (0.2, 1.0), "MechVent": (0, 1), "Urine": (0, 6000)}
VIEWS = {"vitals": (VITALS, 48), "labs": (LABS, 12), "support": (SUPPORT, 48)}
"""View -> parameters with the range outside of which a value counts as not measured, and steps in 48 hours."""
_WHERE = {name: (view, j) for view, (limits, _) in VIEWS.items() for j, name in enumerate(limits)}


def build(originals: Originals) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Means over each step (urine: sums); NaN where nothing was measured. Set b is the test part, a fifth of each class
    of set a the validation part."""
    originals.require("Outcomes-a.txt", "Outcomes-b.txt")
    ids, outcomes, test = [], [], []
    for part in "ab":
        table = _outcomes(originals, f"Outcomes-{part}.txt")
        ids += [int(row[0]) for row in table]
        outcomes += [[float(cell) for cell in row[1:]] for row in table]
        test += [part == "b"] * len(table)
    names = {f"{i}.txt" for i in ids}
    files = originals.collect(names.__contains__, "records (set-a, set-b)", expected=2 * ROWS, sha256=SHA256)
    absent = [i for i in ids if f"{i}.txt" not in files]
    if absent:
        raise originals.missing(f"{len(absent)} of {len(ids)} records, such as {absent[0]}.txt")
    n, dropped = len(ids), 0
    static, unit = np.full((n, len(STATIC)), np.nan), np.zeros(n, int)
    total = {view: np.zeros((n, steps, len(limits))) for view, (limits, steps) in VIEWS.items()}
    count = {view: np.zeros(array.shape, np.int32) for view, array in total.items()}
    for i, record in enumerate(ids):
        with originals.reading(f"{record}.txt"):
            for hour, name, value in _lines(files[f"{record}.txt"], record):
                if name == "ICUType":
                    unit[i] = int(value)
                elif name in STATIC:
                    low, high = STATIC[name]
                    if hour == 0 and low <= value <= high:  # -1: not known
                        static[i, list(STATIC).index(name)] = value
                elif name in _WHERE:
                    view, j = _WHERE[name]
                    limits, steps = VIEWS[view]
                    if name == "pH" and 650 <= value <= 800:
                        value /= 100
                    low, high = limits[name]
                    if low <= value <= high:
                        step = min(int(hour * steps / 48), steps - 1)
                        total[view][i, step, j] += value
                        count[view][i, step, j] += 1
                    else:
                        dropped += 1
        originals.progress("average records", i + 1, n)
    y, is_test = np.array(outcomes)[:, -1].astype(np.uint8), np.array(test)
    arrays: dict[str, np.ndarray] = {"x_static": np.c_[static, unit[:, None] == np.arange(1, 5)].astype(np.float32)}
    arrays["names_static"] = np.array([*STATIC, *(f"ICUType={k}" for k in range(1, 5))])
    for view, (limits, _) in VIEWS.items():
        divisor = np.maximum(count[view], 1)
        if "Urine" in limits:
            divisor[..., list(limits).index("Urine")] = 1
        arrays[f"x_{view}"] = np.where(count[view] > 0, total[view] / divisor, np.nan).astype(np.float16)
        arrays[f"names_{view}"] = np.array(list(limits))
    arrays |= {"y": y, "split": _split(y, is_test), "outcomes": np.array(outcomes, np.float32)}
    arrays |= {"names_outcomes": np.array(OUTCOMES), "record": np.array(ids, np.int32)}
    return arrays, {
        "name": "PhysioNet/CinC Challenge 2012",
        "views": ["static", *VIEWS],
        "dropped_out_of_range": dropped,
    }


def _outcomes(originals: Originals, name: str) -> list[list[str]]:
    header, *rows = list(csv.reader(io.StringIO(originals.read(name).decode("ascii", errors="replace")))) or [[]]
    if header != ["RecordID", *OUTCOMES] or any(len(row) != len(header) for row in rows):
        raise InputError(f"p2012: {name} is damaged; its columns should be RecordID, {', '.join(OUTCOMES)}")
    originals.rows(name, len(rows), ROWS)
    return rows


def _lines(content: bytes, record: int) -> list[tuple[float, str, float]]:
    """Hour, parameter and value of each line ``HH:MM,PARAMETER,VALUE``."""
    header, *lines = content.decode("ascii").split()
    if header != "Time,Parameter,Value":
        raise ValueError("no line Time,Parameter,Value")
    found = []
    for line in lines:
        time, name, value = line.split(",")
        hours, minutes = time.split(":")
        if name == "RecordID" and int(value) != record:
            raise ValueError(f"it is the record {value}")
        found.append((int(hours) + int(minutes) / 60, name, float(value)))
    return found


def _split(y: np.ndarray, test: np.ndarray) -> np.ndarray:
    split = np.where(test, 2, 0).astype(np.uint8)
    rng = np.random.default_rng(0)
    for label in (0, 1):
        rows = rng.permutation(np.flatnonzero(~test & (y == label)))
        split[rows[: len(rows) // 5]] = 1
    return split


RECIPE = Recipe(
    where="set-a.tar.gz, set-b.tar.gz (or .zip), Outcomes-a.txt and Outcomes-b.txt from "
    "https://physionet.org/content/challenge-2012/1.0.0, open access, ODC-BY 1.0",
    build=build,
    split="01be7fccfefc1d48",
)
