"""eicu_demo: eICU Collaborative Research Database Demo 2.0: 2,520 intensive care stays, first 24 hours, eight views."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mmc_fast.experiments.data.prepare.originals import Originals
from mmc_fast.experiments.data.prepare.recipe import Recipe, dense, view_arrays
from mmc_fast.experiments.data.prepare.tables import multi_hot, one_hot, pandas, table
from mmc_fast.experiments.data.splits import stratified_split

DAY = 1440  # minutes after admission to the unit
RARE = 25  # an item that fewer stays have gets no column
KEY = "patientunitstayid"
ROWS = {
    "patient.csv": 2520, "apacheApsVar.csv": 2205, "vitalAperiodic.csv": 274_088, "diagnosis.csv": 24_978,
    "treatment.csv": 38_290, "medication.csv": 75_604, "pastHistory.csv": 12_109,
}  # fmt: skip
PATIENT = [
    KEY, "patienthealthsystemstayid", "gender", "age", "ethnicity", "hospitalid", "apacheadmissiondx", "admissionheight",
    "admissionweight", "hospitaladmitoffset", "hospitaldischargestatus", "unittype", "unitadmitsource", "unitvisitnumber",
    "unitstaytype", "unitdischargeoffset", "unitdischargestatus", "uniquepid",
]  # fmt: skip
BEDSIDE = [
    "intubated", "vent", "dialysis", "eyes", "motor", "verbal", "meds", "urine", "temperature", "respiratoryrate",
    "heartrate", "meanbp",
]  # fmt: skip
LABS = [
    "wbc", "sodium", "ph", "hematocrit", "creatinine", "albumin", "pao2", "pco2", "bun", "glucose", "bilirubin", "fio2",
]  # fmt: skip
PRESSURES = ["noninvasivesystolic", "noninvasivediastolic", "noninvasivemean"]
FORMS = {"FLEX", "CONT", "TABS", "SOLN", "PREMIX", "VIAL", "INJ"}  # first words of a drug's name that are not the drug


def build(originals: Originals) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Everything known 24 hours after admission to the unit; NaN where nothing was measured."""
    originals.expect(ROWS)
    pd = pandas()
    patient = table(originals, "patient.csv", PATIENT).sort_values(KEY).reset_index(drop=True)
    n, stays = len(patient), pd.Index(patient[KEY])

    def until(name: str, time: str, columns: list[str]) -> Any:
        """Rows of the known stays that were entered by the end of the first day; ``row`` is the stay's."""
        frame = table(originals, f"{name}.csv", [KEY, time, *columns])
        frame["row"] = stays.get_indexer(frame[KEY])
        return frame[(frame[time] <= DAY) & (frame["row"] >= 0)]

    def listed(*pairs: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
        """0/1 columns for the items of the frames' rows; an item without text is left out."""
        rows = np.concatenate([frame["row"].to_numpy() for frame, _ in pairs])
        items = np.concatenate([np.array(text.astype(object).where(text.notna(), ""), object) for _, text in pairs])
        return multi_hot(rows[items != ""], items[items != ""], n, RARE)

    aps = table(originals, "apacheApsVar.csv", [KEY, *BEDSIDE, *LABS]).drop_duplicates(KEY)
    aps = aps.set_index(KEY).reindex(stays).astype(float).replace(-1, np.nan)
    diagnosis = until("diagnosis", "diagnosisoffset", ["diagnosisstring"])
    admission = patient.assign(row=np.arange(n))
    treatment = until("treatment", "treatmentoffset", ["treatmentstring"])
    medication = until("medication", "drugstartoffset", ["drugordercancelled", "drugname"])
    medication = medication[medication["drugordercancelled"] != "Yes"]
    history = until("pastHistory", "pasthistoryoffset", ["pasthistorypath"])
    views = {
        "demographics": _demographics(patient),
        "bedside": dense((aps[BEDSIDE].to_numpy(), BEDSIDE)),
        "labs": dense((aps[LABS].to_numpy(), LABS)),
        "bp_series": (_pressures(until("vitalAperiodic", "observationoffset", PRESSURES), n), ["systolic", "diastolic", "mean"]),
        "diagnoses": listed(
            *((diagnosis, _path(diagnosis["diagnosisstring"], depth)) for depth in (1, 2, 3)),
            (admission, "apache:" + admission["apacheadmissiondx"].astype(object)),
        ),
        "treatments": listed(*((treatment, _path(treatment["treatmentstring"], depth)) for depth in (2, 3))),
        "medications": listed((medication, medication["drugname"].map(_drug, na_action="ignore"))),
        "history": listed(
            (history, history["pasthistorypath"].str.replace("notes/Progress Notes/Past History/", "", regex=False))
        ),
    }  # fmt: skip
    arrays = view_arrays(views) | _outcomes(patient)
    person = pd.factorize(patient["uniquepid"], sort=True)[0]
    arrays["split"] = stratified_split(arrays["y_hospital_death"] == 1, seed=0, ids=person)
    arrays["patient"], arrays["stay"] = person.astype(np.int32), patient[KEY].to_numpy(np.int32)
    arrays["hospital"] = pd.factorize(patient["hospitalid"])[0].astype(np.int16)
    tasks = {"y_hospital_death": "255 unknown", "y_unit_death": "255 unknown"}
    tasks["y_icu_readmit"] = "a later 'readmit' stay in the same hospital stay"
    return arrays, {"name": "eICU-CRD Demo 2.0", "views": list(views), "tasks": tasks}


def _path(text: Any, depth: int) -> Any:
    """The first levels of ``a|b|c``."""
    return text.str.split("|").str[:depth].str.join("|")


def _drug(name: str) -> str:
    """The first word of four letters or more that is not a form of the drug."""
    return next((word for word in re.findall(r"[A-Z][A-Z\-]{3,}", name.upper()) if word not in FORMS), "")


def _demographics(patient: Any) -> tuple[np.ndarray, np.ndarray]:
    age = pandas().to_numeric(patient["age"].astype(str).str.replace("> 89", "90"), errors="coerce").to_numpy(float)
    height, weight = (patient[f"admission{what}"].to_numpy(float, copy=True) for what in ("height", "weight"))
    height[(height < 100) | (height > 230)] = np.nan
    weight[(weight < 20) | (weight > 300)] = np.nan
    before = np.log1p(np.maximum(-patient["hospitaladmitoffset"].to_numpy(), 0))
    numbers = np.c_[age, height, weight, before], ["age", "height", "weight", "log_minutes_in_hospital_before_unit"]
    texts = [one_hot(patient[c], 15) for c in ("gender", "ethnicity", "unittype", "unitadmitsource", "unitstaytype")]
    return dense(numbers, *texts)


def _pressures(vital: Any, n: int) -> np.ndarray:
    """float32 [N, 24, 3]: hourly means of the cuff pressures."""
    series = np.full((n, 24, 3), np.nan, np.float32)
    vital = vital[(vital["observationoffset"] >= 0) & (vital["observationoffset"] < DAY)]
    for j, column in enumerate(PRESSURES):
        valid = vital[(vital[column] > 5) & (vital[column] < 300)]
        mean = valid.groupby(["row", valid["observationoffset"] // 60])[column].mean()
        series[mean.index.get_level_values(0), mean.index.get_level_values(1), j] = mean.to_numpy()
    return series


def _outcomes(patient: Any) -> dict[str, np.ndarray]:
    fate = {"Alive": 0, "Expired": 1}
    hospital, unit = (
        patient[f"{place}dischargestatus"].map(fate).fillna(255).to_numpy(np.uint8) for place in ("hospital", "unit")
    )
    again = patient[patient["unitstaytype"] == "readmit"].groupby("patienthealthsystemstayid")["unitvisitnumber"].max()
    last = patient["patienthealthsystemstayid"].map(again).fillna(-1)
    return {
        "y_hospital_death": hospital,
        "y_unit_death": unit,
        "y_icu_readmit": (patient["unitvisitnumber"] < last).to_numpy(np.uint8),
        "los_days": (patient["unitdischargeoffset"].to_numpy() / DAY).astype(np.float32),
        "first_stay": (patient["unitvisitnumber"] == 1).to_numpy(np.uint8),
    }


RECIPE = Recipe(
    where="patient, apacheApsVar, vitalAperiodic, diagnosis, treatment, medication and pastHistory (.csv.gz) from "
    "https://physionet.org/content/eicu-crd-demo/2.0.1, ODbL 1.0",
    build=build,
    split="41006220513f7894",
)
