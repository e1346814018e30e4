"""mimic4 and mimic4_demo: hospital admissions of MIMIC-IV (2.2 and later, credentialed) and of its open demo 2.2.

The tables of events are read once, in pieces; what is kept of them lies on disk (see :mod:`spill`), so that memory grows
with the number of admissions by some hundred bytes each, not with the number of events.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmc_fast.errors import InputError
from mmc_fast.experiments.data.prepare.originals import Originals
from mmc_fast.experiments.data.prepare.recipe import Recipe, dense, view_arrays
from mmc_fast.experiments.data.prepare.spill import Spill
from mmc_fast.experiments.data.prepare.tables import chunks, one_hot, pandas, table
from mmc_fast.experiments.data.splits import stratified_split

CHUNK = 100_000  # rows of a table in memory at a time
VIEWS = ("diagnoses", "procedures", "medications", "labs")
TEXTS = ["gender", "admission_type", "admission_location", "insurance", "marital_status", "race"]
ADMISSIONS = ["subject_id", "hadm_id", "admittime", "dischtime", "hospital_expire_flag", *TEXTS[1:]]
PATIENTS = ["subject_id", "gender", "anchor_age", "anchor_year"]
DEMO_ROWS = {
    "admissions.csv": 275, "patients.csv": 100, "diagnoses_icd.csv": 4506, "procedures_icd.csv": 722,
    "prescriptions.csv": 18_087, "labevents.csv": 107_727, "d_labitems.csv": 1622,
}  # fmt: skip
VITALS: dict[str, tuple[dict[int, float], float, float]] = {
    "heart_rate": ({220045: 1}, 0, 300),
    "systolic": ({220050: 1, 220179: 1, 225309: 1}, 0, 400),
    "diastolic": ({220051: 1, 220180: 1, 225310: 1}, 0, 300),
    "mean_pressure": ({220052: 1, 220181: 1, 225312: 1}, 0, 300),
    "respiratory_rate": ({220210: 1, 224690: 1}, 0, 70),
    "temperature_f": ({223761: 1, 223762: 1.8}, 70, 120),
    "oxygen_saturation": ({220277: 1}, 0, 100),
    "glucose": ({220621: 1, 225664: 1, 226537: 1}, 0, 2000),
    "gcs_eye": ({220739: 1}, 0, 4),
    "gcs_verbal": ({223900: 1}, 0, 5),
    "gcs_motor": ({223901: 1}, 0, 6),
    "fio2_percent": ({223835: 1}, 20, 100),
    "weight_kg": ({224639: 1, 226512: 1}, 20, 400),
}
"""Vital sign -> items of chartevents with a factor to one unit, and the range (low, high] of values that count.

Items as in the derived tables of the MIMIC Code Repository. Temperatures in Celsius are turned into Fahrenheit.
"""


@dataclass(frozen=True)
class Rules:
    """What becomes a column, and until when an event counts. ``least``: text or item -> admissions that must have it."""

    least: dict[str, float]
    share: bool  # ``least`` are shares of the training admissions, else numbers of all admissions
    hours: float | None = 48.0  # medications that start later after admission are left out; None: all


FULL = Rules(
    {"demographics": 0.002, "diagnoses": 0.01, "procedures": 0.005, "medications": 0.02, "labs": 0.1, "vitals": 0.0},
    True,
)
SMALL = Rules({"demographics": 8, "diagnoses": 8, "procedures": 5, "medications": 15, "labs": 80}, False, hours=None)


def build(originals: Originals, *, demo: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One row for each admission, of adults in the full database, in the order of ``hadm_id``.

    Diagnoses and procedures are the codes of the whole admission (they are assigned after discharge); labs are means
    over the 24 hours before and the 48 after admission, vital signs over the first 48 hours. Of the full database, what
    becomes a column is decided by the training part alone.
    """
    rules = SMALL if demo else FULL
    if demo:
        originals.expect(DEMO_ROWS)
    else:
        originals.require(*DEMO_ROWS)
    admissions = _admissions(originals, adults=not demo)
    n, expired = len(admissions), admissions["hospital_expire_flag"].to_numpy(np.uint8)
    person = pandas().factorize(admissions["subject_id"], sort=True)[0].astype(np.int32)
    split = stratified_split(np.zeros(n, int) if demo else expired, seed=0, ids=person)
    counted = split == 0 if rules.share else np.ones(n, bool)
    least = {
        view: max(2, math.ceil(value * counted.sum())) if rules.share else int(value)
        for view, value in rules.least.items()
    }
    texts = [one_hot(admissions[column], least["demographics"], counted) for column in TEXTS]
    age = admissions["anchor_age"] + admissions["admittime"].dt.year - admissions["anchor_year"]
    views = {"demographics": dense((age.to_numpy(float)[:, None], ["age"]), *texts)}
    rows = _Rows(admissions)
    dtype = np.float32 if demo else np.uint8
    with_chart = not demo and originals.has("chartevents.csv")
    for view in (*VIEWS, *(["vitals"] if with_chart else [])):
        spill = Spill(originals.scratch, view, n)
        for at, keys, values in _EVENTS[view](originals, rows, rules):
            spill.add(at, keys, values)
        columns = list(VITALS) if view == "vitals" else spill.common(least[view], counted)
        names = _lab_names(originals, columns) if view == "labs" else columns
        if not columns:
            raise InputError(f"{originals.name}: no {view} that {least[view]} admissions have; are the tables whole?")
        matrix = spill.means(columns) if view in ("labs", "vitals") else spill.listed(columns, dtype)
        views[view] = matrix, np.array(names)
    arrays = view_arrays(views)
    arrays |= {"y_death": expired, "y_readmit30": _readmitted(admissions), "split": split, "patient": person}
    arrays["hadm"] = admissions["hadm_id"].to_numpy(np.int32)
    title = "MIMIC-IV Clinical Database Demo 2.2" if demo else "MIMIC-IV"
    return arrays, {"name": title, "views": list(views), "tasks": ["y_death", "y_readmit30"]}


def _admissions(originals: Originals, *, adults: bool) -> Any:
    frame = table(originals, "admissions.csv", ADMISSIONS)
    patients = table(originals, "patients.csv", PATIENTS)
    with originals.reading("admissions.csv"):
        for column in ("admittime", "dischtime"):
            frame[column] = pandas().to_datetime(frame[column], format="ISO8601")
        joined = frame.merge(patients, on="subject_id", how="left", validate="many_to_one")
        if joined["anchor_age"].isna().any() or joined["hadm_id"].duplicated().any():
            raise ValueError("patients that patients.csv lacks, or an admission twice")
    joined = joined.astype({"anchor_age": int, "anchor_year": int})
    if adults:
        joined = joined[joined["anchor_age"] + joined["admittime"].dt.year - joined["anchor_year"] >= 18]
    return joined.sort_values("hadm_id").reset_index(drop=True)


def _readmitted(admissions: Any) -> np.ndarray:
    """uint8 [N]: the patient's next admission is within 30 days of discharge."""
    ordered = admissions.sort_values(["subject_id", "admittime"])
    gap = ordered.groupby("subject_id")["admittime"].shift(-1) - ordered["dischtime"]
    days = gap.dt.total_seconds() / 86400
    return ((days >= 0) & (days <= 30)).reindex(admissions.index).to_numpy(np.uint8)


class _Rows:
    """The row of an admission, and hours after its begin."""

    def __init__(self, admissions: Any) -> None:
        self.hadm = admissions["hadm_id"].to_numpy(np.int64)
        self.begin = admissions["admittime"].to_numpy("datetime64[s]")

    def of(self, hadm: Any) -> np.ndarray:
        """int64, −1 where the event is of none of the admissions."""
        wanted = hadm.fillna(-1).to_numpy(np.int64)
        at = np.minimum(np.searchsorted(self.hadm, wanted), len(self.hadm) - 1)
        return np.where(self.hadm[at] == wanted, at, -1)

    def hours(self, rows: np.ndarray, times: Any) -> np.ndarray:
        """NaN where no time is stated."""
        moments = pandas().to_datetime(times, format="ISO8601").to_numpy("datetime64[s]")
        return (moments - self.begin[rows]) / np.timedelta64(1, "h")


Events = Iterator[tuple[np.ndarray, np.ndarray, "np.ndarray | None"]]


def _codes(originals: Originals, rows: _Rows, rules: Rules, *, name: str) -> Events:
    """``VERSION:`` and the first three characters of the ICD code."""
    columns = ["hadm_id", "icd_code", "icd_version"]
    for frame in chunks(originals, f"{name}.csv", columns, CHUNK, dtype={"icd_code": str, "icd_version": str}):
        at = rows.of(frame["hadm_id"])
        known = (at >= 0) & frame["icd_code"].notna().to_numpy()
        frame = frame[known]
        yield at[known], (frame["icd_version"] + ":" + frame["icd_code"].str.strip().str[:3]).to_numpy(object), None


def _drugs(originals: Originals, rows: _Rows, rules: Rules) -> Events:
    for frame in chunks(originals, "prescriptions.csv", ["hadm_id", "starttime", "drug"], CHUNK, dtype={"drug": str}):
        at = rows.of(frame["hadm_id"])
        known = (at >= 0) & frame["drug"].notna().to_numpy()
        at, frame = at[known], frame[known]
        if rules.hours is not None:
            early = rows.hours(at, frame["starttime"]) < rules.hours
            at, frame = at[early], frame[early]
        yield at, frame["drug"].str.strip().str.lower().to_numpy(object), None


def _measured(
    originals: Originals, rows: _Rows, name: str, first_hour: float, items: set[int] | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Row, item and value of the numbers measured from ``first_hour`` to hour 48."""
    for frame in chunks(originals, f"{name}.csv", ["hadm_id", "itemid", "charttime", "valuenum"], CHUNK):
        if items is not None:
            frame = frame[frame["itemid"].isin(items)]
        at = rows.of(frame["hadm_id"])
        known = (at >= 0) & np.isfinite(frame["valuenum"].to_numpy(float))
        at, frame = at[known], frame[known]
        hour = rows.hours(at, frame["charttime"])
        timely = (hour >= first_hour) & (hour < 48)
        frame = frame[timely]
        yield at[timely], frame["itemid"].to_numpy(np.int64), frame["valuenum"].to_numpy(float)


def _vitals(originals: Originals, rows: _Rows, rules: Rules) -> Events:
    sign_of = {item: sign for sign, (items, _, _) in VITALS.items() for item in items}
    for at, item, value in _measured(originals, rows, "chartevents", 0, set(sign_of)):
        names, kept, scaled = np.empty(len(item), object), np.zeros(len(item), bool), value.copy()
        for sign, (items, low, high) in VITALS.items():
            for code, factor in items.items():
                here = item == code
                names[here] = sign
                scaled[here] = value[here] * factor + (32 if factor != 1 else 0)
                kept |= here & (scaled > low) & (scaled <= high)
        yield at[kept], names[kept], scaled[kept]


_EVENTS: dict[str, Callable[[Originals, _Rows, Rules], Events]] = {
    "diagnoses": functools.partial(_codes, name="diagnoses_icd"),
    "procedures": functools.partial(_codes, name="procedures_icd"),
    "medications": _drugs,
    "labs": lambda originals, rows, rules: _measured(originals, rows, "labevents", -24, None),
    "vitals": _vitals,
}


def _lab_names(originals: Originals, items: list[Any]) -> list[str]:
    label = table(originals, "d_labitems.csv", ["itemid", "label"]).set_index("itemid")["label"].to_dict()
    return [str(label.get(item, item)) for item in items]


_TABLES = (
    "hosp/ with admissions, patients, diagnoses_icd, procedures_icd, prescriptions, labevents, d_labitems (.csv.gz)"
)
RECIPE = Recipe(
    where=f"{_TABLES}, and for the vital signs icu/chartevents.csv.gz, from https://physionet.org/content/mimiciv (2.2 or "
    "later); credentialed users only, PhysioNet Credentialed Health Data License 1.5.0",
    build=functools.partial(build, demo=False),
)
DEMO = Recipe(
    where=f"{_TABLES} from https://physionet.org/content/mimic-iv-demo/2.2, ODbL 1.0",
    build=functools.partial(build, demo=True),
    split="fd6b8dbd9f49aabd",
)
