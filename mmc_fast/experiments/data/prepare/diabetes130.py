"""diabetes130: Diabetes 130-US Hospitals for Years 1999-2008 (UCI), 101,766 encounters in six views."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmc_fast.experiments.data.prepare.originals import Originals
from mmc_fast.experiments.data.prepare.recipe import Recipe, dense, view_arrays
from mmc_fast.experiments.data.prepare.tables import one_hot, pandas, table

FILE = "diabetic_data.csv"
SHA256 = "0689e7ec031237dc63031b938805c48377748761a3b26acab621567afa24df97"
COUNTS = ["num_lab_procedures", "num_procedures", "num_medications", "number_outpatient", "number_emergency"]
COUNTS += ["number_inpatient", "number_diagnoses"]
CODES = ["diag_1", "diag_2", "diag_3"]
DRUGS = [
    "metformin", "repaglinide", "nateglinide", "chlorpropamide", "glimepiride", "acetohexamide", "glipizide", "glyburide",
    "tolbutamide", "pioglitazone", "rosiglitazone", "acarbose", "miglitol", "troglitazone", "tolazamide", "insulin",
    "glyburide-metformin", "glipizide-metformin", "glimepiride-pioglitazone", "metformin-rosiglitazone",
    "metformin-pioglitazone",
]  # fmt: skip
IDS = ["admission_type_id", "admission_source_id", "discharge_disposition_id"]
OTHERS = [
    "patient_nbr", "race", "gender", "payer_code", "age", "weight", "medical_specialty", "time_in_hospital",
    "max_glu_serum", "A1Cresult",
]  # fmt: skip
COLUMNS = [*OTHERS, *IDS, *COUNTS, *CODES, *DRUGS, "change", "diabetesMed", "readmitted"]
DIED = [11, 19, 20, 21]  # discharge dispositions
HOSPICE = [13, 14]
READMITTED = {"NO": 0, ">30": 1, "<30": 2}


def build(originals: Originals) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A rare value of a column counts as ``other``; a diagnosis is 2 as primary, 1 as secondary, 3 as both."""
    originals.expect({FILE: 101_766})
    originals.read(FILE, sha256=SHA256)
    frame = table(originals, FILE, COLUMNS, na_values="?", keep_default_na=False, dtype=dict.fromkeys(CODES, str))

    def hot(column: str, least: int = 1, name: str | None = None) -> tuple[np.ndarray, list[str]]:
        return one_hot(frame[column].rename(name or column), least)

    def flag(rows: Any, name: str) -> tuple[np.ndarray, list[str]]:
        return rows.to_numpy(bool)[:, None], [name]

    with originals.reading(FILE):
        decade = frame["age"].str.extract(r"\[(\d+)-")[0].astype(int) // 10
        readmitted = frame["readmitted"].map(READMITTED).to_numpy(np.uint8)
    views = {
        "demographics": dense(
            hot("race"), hot("gender", 10), hot("payer_code", 100), (decade.to_numpy()[:, None], ["age_decade"]),
            flag(frame["weight"].isna(), "weight_missing"), dtype=np.uint8,
        ),
        "admission": dense(
            hot("admission_type_id", 20, "type"), hot("admission_source_id", 20, "source"), hot("medical_specialty", 300),
            (frame[["time_in_hospital"]].to_numpy(), ["time_in_hospital"]), dtype=np.uint8,
        ),
        "utilisation_labs": dense(
            (frame[COUNTS].to_numpy(), COUNTS), hot("max_glu_serum"), hot("A1Cresult"), dtype=np.uint8
        ),
        "diagnoses": _diagnoses(frame, least=300),
        "medications": dense(*_medications(frame, least=20), dtype=np.uint8),
        "disposition": dense(hot("discharge_disposition_id", 20, "disposition"), dtype=np.uint8),
    }  # fmt: skip
    arrays = view_arrays(views)
    disposition = frame["discharge_disposition_id"]
    arrays["y_readmit"], arrays["y_died"] = readmitted, disposition.isin(DIED).to_numpy(np.uint8)
    arrays["eligible"] = (~disposition.isin(DIED + HOSPICE)).to_numpy(np.uint8)
    patients, number = np.unique(frame["patient_nbr"], return_inverse=True)
    u = np.random.default_rng(0).random(len(patients))
    arrays["split"] = np.where(u < 0.7, 0, np.where(u < 0.8, 1, 2)).astype(np.uint8)[number]
    arrays["patient"] = pandas().factorize(frame["patient_nbr"])[0].astype(np.int32)
    tasks = {"y_readmit": "0 no, 1 after 30 days, 2 within 30 days; rows with eligible = 1", "y_died": "at discharge"}
    return arrays, {"name": "Diabetes 130-US hospitals", "views": list(views), "tasks": tasks}


def _diagnoses(frame: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    """By the first three characters of the ICD-9 code; diabetes (250) by its first decimal too."""

    def short(code: object) -> str:
        if not isinstance(code, str):
            return ""
        return code[:5] if code.startswith("250") else code.split(".")[0]

    codes = np.array([[short(code) for code in frame[column]] for column in CODES])
    values, counts = np.unique(codes[codes != ""], return_counts=True)
    keep = values[counts >= least]
    matrix = np.zeros((len(frame), len(keep)), np.uint8)
    for weight, row in zip((2, 1, 1), codes, strict=True):
        at = np.minimum(np.searchsorted(keep, row), max(0, len(keep) - 1))
        known = np.flatnonzero(keep[at] == row) if len(keep) else np.array([], int)
        matrix[known, at[known]] |= weight
    return matrix, keep


def _medications(frame: Any, least: int) -> list[tuple[np.ndarray, list[str]]]:
    """Dose steady, up or down, for each drug and direction that at least ``least`` encounters have."""
    pairs = [(drug, level) for drug in DRUGS for level in ("Steady", "Up", "Down")]
    found = [((frame[drug] == level).to_numpy()[:, None], [f"{drug}={level}"]) for drug, level in pairs]
    found = [(given, names) for given, names in found if given.sum() >= least]
    found.append(((frame["change"] == "Ch").to_numpy()[:, None], ["change"]))
    found.append(((frame["diabetesMed"] == "Yes").to_numpy()[:, None], ["diabetesMed"]))
    return found


RECIPE = Recipe(
    where="diabetic_data.csv (in diabetes+130-us+hospitals+for+years+1999-2008.zip, before that dataset_diabetes.zip) from "
    "https://archive.ics.uci.edu/dataset/296, CC BY 4.0",
    build=build,
    split="7c79d31fc2009eff",
)
