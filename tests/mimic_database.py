"""Data bases of any size with the tables and columns of MIMIC-IV 2.2, drawn at random, written piece by piece."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SCHEMA = {
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "hosp/admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admit_provider_id,"
    "admission_location,discharge_location,insurance,language,marital_status,race,edregtime,edouttime,hospital_expire_flag",
    "hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "hosp/procedures_icd": "subject_id,hadm_id,seq_num,chartdate,icd_code,icd_version",
    "hosp/prescriptions": "subject_id,hadm_id,pharmacy_id,poe_id,poe_seq,order_provider_id,starttime,stoptime,drug_type,drug,"
    "formulary_drug_cd,gsn,ndc,prod_strength,form_rx,dose_val_rx,dose_unit_rx,form_val_disp,form_unit_disp,doses_per_24_hrs,"
    "route",
    "hosp/labevents": "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,charttime,storetime,value,valuenum,"
    "valueuom,ref_range_lower,ref_range_upper,flag,priority,comments",
    "hosp/d_labitems": "itemid,label,fluid,category",
    "icu/chartevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,warning",
}
LAB_ITEMS = np.arange(50800, 50860)
CHART_ITEMS = np.array([220045, 220179, 220180, 223761, 223762, 220210, 220277, 226512, 224055, 228096])
PER_ADMISSION = {"diagnoses_icd": 12, "procedures_icd": 2, "prescriptions": 20, "labevents": 40, "chartevents": 30}


def write_mimic(
    folder: Path, patients: int, *, seed: int = 0, chart: bool = True, events: dict[str, int] | None = None
) -> None:
    """``patients`` with one to four admissions each; ``events``: rows for each admission and table, on average."""
    per = {**PER_ADMISSION, **(events or {})}
    rng = np.random.default_rng(seed)
    (folder / "hosp").mkdir(parents=True)
    (folder / "icu").mkdir()
    files = {table: gzip.open(folder / f"{table}.csv.gz", "wt", compresslevel=1) for table in SCHEMA}  # noqa: SIM115
    for table, file in files.items():
        file.write(SCHEMA[table] + "\n")

    def put(table: str, **columns: Any) -> None:
        frame = pd.DataFrame(columns).reindex(columns=SCHEMA[table].split(","))
        frame.to_csv(files[table], header=False, index=False, date_format="%Y-%m-%d %H:%M:%S")

    put("hosp/d_labitems", itemid=LAB_ITEMS, label=[f"lab, {i}" for i in LAB_ITEMS], fluid="Blood")
    for first in range(0, patients, 500):
        subject = np.arange(first, min(first + 500, patients)) + 10_000_000
        put(
            "hosp/patients", subject_id=subject, gender=rng.choice(["F", "M"], len(subject)),
            anchor_age=rng.integers(16, 92, len(subject)), anchor_year=2150,
        )  # fmt: skip
        stays = rng.integers(1, 5, len(subject))
        owner = np.repeat(subject, stays)
        n = len(owner)
        hadm = 20_000_000 + 4 * (owner - 10_000_000) + np.concatenate([rng.permutation(k) for k in stays])
        begin = np.datetime64("2150-01-01T00:00:00") + rng.integers(0, 400 * 86400, n).astype("timedelta64[s]")
        end = begin + rng.integers(86400, 20 * 86400, n).astype("timedelta64[s]")
        sick = rng.normal(size=n)
        died = (sick + rng.normal(size=n) > 1.8).astype(int)
        put(
            "hosp/admissions", subject_id=owner, hadm_id=hadm, admittime=begin, dischtime=end,
            admission_type=rng.choice(["EW EMER.", "URGENT", "ELECTIVE"], n), admission_location="EMERGENCY ROOM",
            insurance=rng.choice(["Medicare", "Other"], n), marital_status=rng.choice(["SINGLE", "", "MARRIED"], n),
            race=rng.choice(["WHITE", "BLACK/CAPE VERDEAN", "UNKNOWN"], n, p=[0.9, 0.09, 0.01]), hospital_expire_flag=died,
        )  # fmt: skip

        def draw(table: str) -> tuple[np.ndarray, dict[str, Any]]:
            at = np.sort(rng.integers(0, n, n * per[table]))  # noqa: B023
            moment = begin[at] + rng.integers(-40 * 3600, 90 * 3600, len(at)).astype("timedelta64[s]")  # noqa: B023
            return at, {"subject_id": owner[at], "hadm_id": hadm[at], "moment": moment}  # noqa: B023

        for table in ("diagnoses_icd", "procedures_icd"):
            at, keys = draw(table)
            code = np.char.zfill((rng.zipf(1.5, len(at)) % 900).astype(str), 3)
            version = rng.choice([9, 10], len(at))
            put(f"hosp/{table}", subject_id=keys["subject_id"], hadm_id=keys["hadm_id"], icd_code=[f"{c}1" for c in code],
                icd_version=version)  # fmt: skip
        at, keys = draw("prescriptions")
        drug = np.char.add(" Drug ", (rng.zipf(1.4, len(at)) % 200).astype(str))
        put("hosp/prescriptions", **_timed(keys, "starttime"), drug=drug, drug_type="MAIN")
        at, keys = draw("labevents")
        item = rng.choice(LAB_ITEMS, len(at))
        value = np.where(
            rng.random(len(at)) < 0.1, np.nan, np.round(item % 100 + sick[at] + rng.normal(size=len(at)), 2)
        )
        outside = rng.random(len(at)) < 0.2
        put(
            "hosp/labevents",
            **_timed(keys, "charttime", outside),
            itemid=item,
            valuenum=value,
            comments='___, as "seen"',
        )
        if chart:
            at, keys = draw("chartevents")
            item = rng.choice(CHART_ITEMS, len(at))
            put(
                "icu/chartevents",
                **_timed(keys, "charttime"),
                itemid=item,
                valuenum=np.round(rng.uniform(30, 110, len(at)), 1),
            )
    for file in files.values():
        file.close()
    if not chart:
        (folder / "icu/chartevents.csv.gz").unlink()


def _timed(keys: dict[str, Any], name: str, outside: np.ndarray | None = None) -> dict[str, Any]:
    """Keys of events; ``outside``: those that belong to no admission."""
    hadm = pd.Series(keys["hadm_id"], dtype="Int64")
    if outside is not None:
        hadm[outside] = pd.NA
    return {"subject_id": keys["subject_id"], "hadm_id": hadm, name: keys["moment"]}
