"""MIMIC-IV: features against plain loops over the tables, leakage, pieces, memory, absent and foreign tables."""

from __future__ import annotations

import csv
import gzip
import math
import shutil
import tracemalloc
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from mimic_database import write_mimic

from mmc_fast.errors import InputError
from mmc_fast.experiments import data
from mmc_fast.experiments.data.prepare import check, mimic4, prepare, spill


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mimic") / "mimiciv" / "3.1"
    write_mimic(folder, 120)
    return folder


@pytest.fixture(scope="module")
def prepared(database: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    path = prepare("mimic4", database.parents[1], tmp_path_factory.mktemp("out"))
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def rows(folder: Path, table: str) -> list[dict[str, str]]:
    with gzip.open(folder / f"{table}.csv.gz", "rt") as file:
        return list(csv.DictReader(file))


def moment(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S")


def test_rows_labels_and_split(database: Path, prepared: dict[str, np.ndarray]) -> None:
    patients = {r["subject_id"]: r for r in rows(database, "hosp/patients")}
    stays = rows(database, "hosp/admissions")
    age = {r["hadm_id"]: int(patients[r["subject_id"]]["anchor_age"]) + int(r["admittime"][:4]) - 2150 for r in stays}
    adults = sorted((r for r in stays if age[r["hadm_id"]] >= 18), key=lambda r: int(r["hadm_id"]))
    assert 0 < len(adults) < len(stays)
    assert prepared["hadm"].tolist() == [int(r["hadm_id"]) for r in adults]
    assert prepared["y_death"].tolist() == [int(r["hospital_expire_flag"]) for r in adults]
    assert prepared["x_demographics"][:, 0].tolist() == [age[r["hadm_id"]] for r in adults]
    again = []
    for r in adults:
        later = [
            moment(o["admittime"])
            for o in adults
            if o["subject_id"] == r["subject_id"] and o["admittime"] > r["admittime"]
        ]
        gap = (min(later) - moment(r["dischtime"])).total_seconds() / 86400 if later else -1
        again.append(int(0 <= gap <= 30))
    assert prepared["y_readmit30"].tolist() == again
    assert 0 < sum(again) < len(again)
    parts = defaultdict(set)
    for r, person, part in zip(adults, prepared["patient"], prepared["split"], strict=True):
        parts[r["subject_id"]].add((int(person), int(part)))
    assert all(len(found) == 1 for found in parts.values())
    assert len({next(iter(found))[0] for found in parts.values()}) == len(parts)


@pytest.mark.parametrize(("view", "table"), [("diagnoses", "diagnoses_icd"), ("medications", "prescriptions")])
def test_lists_against_a_plain_loop(view: str, table: str, database: Path, prepared: dict[str, np.ndarray]) -> None:
    begin = {r["hadm_id"]: moment(r["admittime"]) for r in rows(database, "hosp/admissions")}
    had = defaultdict(set)
    for r in rows(database, f"hosp/{table}"):
        if view == "diagnoses":
            had[int(r["hadm_id"])].add(f"{r['icd_version']}:{r['icd_code'][:3]}")
        elif (moment(r["starttime"]) - begin[r["hadm_id"]]).total_seconds() < 48 * 3600:
            had[int(r["hadm_id"])].add(r["drug"].strip().lower())
    names, hadm, train = prepared[f"names_{view}"].tolist(), prepared["hadm"].tolist(), prepared["split"] == 0
    expected = np.array([[name in had[h] for name in names] for h in hadm], np.uint8)
    np.testing.assert_array_equal(prepared[f"x_{view}"], expected)
    least = max(2, math.ceil(mimic4.FULL.least[view] * train.sum()))
    counts = defaultdict(int)
    for h in np.array(hadm)[train].tolist():
        for item in had[h]:
            counts[item] += 1
    assert names == sorted(item for item, count in counts.items() if count >= least)


def test_means_against_a_plain_loop(database: Path, prepared: dict[str, np.ndarray]) -> None:
    begin = {r["hadm_id"]: moment(r["admittime"]) for r in rows(database, "hosp/admissions")}
    found = defaultdict(list)
    sign = {220045: "heart_rate", 223761: "temperature_f", 223762: "temperature_f", 220210: "respiratory_rate"}
    for table, first in (("hosp/labevents", -24), ("icu/chartevents", 0)):
        for r in rows(database, table):
            if not r["hadm_id"] or not r["valuenum"]:
                continue
            hours, value = (moment(r["charttime"]) - begin[r["hadm_id"]]).total_seconds() / 3600, float(r["valuenum"])
            name = f"lab, {r['itemid']}" if first else sign.get(int(r["itemid"]), "")
            value = value * 1.8 + 32 if r["itemid"] == "223762" else value
            low, high = {"temperature_f": (70, 120), "respiratory_rate": (0, 70)}.get(name, (-1e9, 1e9))
            if first <= hours < 48 and low < value <= high:
                found[int(r["hadm_id"]), name].append(value)
    for view in ("labs", "vitals"):
        assert prepared[f"x_{view}"].dtype == np.float32
        for j, name in enumerate(prepared[f"names_{view}"].tolist()):
            if view == "vitals" and name not in sign.values():
                continue
            expected = [np.mean(found[h, name]) if found[h, name] else np.nan for h in prepared["hadm"].tolist()]
            np.testing.assert_allclose(prepared[f"x_{view}"][:, j], expected, rtol=1e-6)
    assert len(prepared["names_labs"]) == 60
    assert prepared["names_vitals"].tolist() == list(mimic4.VITALS)


def test_the_same_bytes_whatever_the_pieces(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare("mimic4", database, tmp_path / "a").read_bytes()
    monkeypatch.setattr(mimic4, "CHUNK", 97)
    monkeypatch.setattr(spill, "BLOCK", 13)
    assert prepare("mimic4", database, tmp_path / "b").read_bytes() == first
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["mimic4.npz"]
    assert check("mimic4", tmp_path / "b") == "whole; made from originals that no check sum verified"


def test_columns_do_not_depend_on_the_test_part(
    database: Path, prepared: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """A drug that every admission outside of training gets is no column."""
    copy = tmp_path / "copy"
    shutil.copytree(database, copy)
    begin = {r["hadm_id"]: r["admittime"] for r in rows(database, "hosp/admissions")}
    with gzip.open(copy / "hosp/prescriptions.csv.gz", "at") as file:
        for h in prepared["hadm"][prepared["split"] != 0].tolist():
            file.write(f"1,{h},,,,,{begin[str(h)]},,MAIN,Of the future" + "," * 11 + "\n")
    with np.load(prepare("mimic4", copy, tmp_path / "out"), allow_pickle=False) as file:
        for key in prepared:
            if key != "meta":
                np.testing.assert_array_equal(file[key], prepared[key])


def measured(folder: Path, out: Path) -> tuple[int, int, int]:
    """Peak of the traced memory, rows of labevents read, rows of the result."""
    read = []
    tracemalloc.start()
    try:
        path = prepare("mimic4", folder, out, progress=lambda phase, done, total: read.append((phase, done)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with np.load(path, allow_pickle=False) as file:
        return peak, max(done for phase, done in read if phase == "read labevents.csv"), len(file["split"])


def test_memory_does_not_grow_with_the_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the patients: eight times the rows through the reader, the same peak beyond what a row itself takes."""
    monkeypatch.setattr(mimic4, "CHUNK", 1000)
    monkeypatch.setattr(spill, "BLOCK", 64)
    for patients in (40, 320):
        write_mimic(tmp_path / f"{patients}", patients, events={"labevents": 120})
    measured(tmp_path / "40", tmp_path)  # imports
    peak, read, _ = measured(tmp_path / "40", tmp_path)
    peak_8, read_8, rows_8 = measured(tmp_path / "320", tmp_path)
    print(f"{read} and {read_8} rows, peak {peak / 2**20:.1f} and {peak_8 / 2**20:.1f} MiB")
    assert read_8 > 6 * read
    assert peak_8 - peak < 1000 * rows_8


def test_the_registry_loads_it_with_and_without_vital_signs(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMC_DATA", str(tmp_path))
    prepare("mimic4", database, tmp_path)
    whole = data.load("mimic4")
    assert list(whole.features) == ["demographics", "diagnoses", "procedures", "medications", "labs", "vitals"]
    assert not whole.present.all()  # some admission has no procedure
    survived = data.load("mimic4", task="readmission", standardise=False)
    with np.load(tmp_path / "mimic4.npz", allow_pickle=False) as file:
        lived = file["y_death"] == 0
        np.testing.assert_array_equal(whole.labels, file["y_death"])
        np.testing.assert_array_equal(survived.labels, file["y_readmit30"][lived])
        np.testing.assert_array_equal(survived.split, file["split"][lived])
        for view in ("procedures", "labs"):
            wanted = file[f"x_{view}"][lived]
            columns = [survived.feature_names[view].index(name) for name in file[f"names_{view}"].tolist()]
            measured = ~np.isnan(wanted) & survived.present[:, list(whole.features).index(view), None].numpy()
            assert measured.any()
            np.testing.assert_array_equal(survived.features[view][:, columns].numpy()[measured], wanted[measured])
            recorded = (wanted != 0) if view == "procedures" else ~np.isnan(wanted)
            np.testing.assert_array_equal(survived.present[:, list(whole.features).index(view)], recorded.any(1))
    shutil.copytree(database / "hosp", tmp_path / "without")
    prepare("mimic4", tmp_path / "without", tmp_path)
    assert list(data.load("mimic4").features) == list(whole.features)[:-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", r"mimic4: missing in .*: labevents\.csv; get it: hosp/ .* credentialed users only"),
        ("column", r"mimic4: admissions\.csv has no column race \(it has subject_id, hadm_id, .*another release"),
        ("cut", r"mimic4: labevents\.csv\.gz is damaged, incomplete or not the publisher's file"),
        ("sums", r"prescriptions\.csv\.gz: differs from its check sum in SHA256SUMS\.txt; get it again"),
        ("stranger", r"mimic4: admissions\.csv is damaged.*patients that patients\.csv lacks"),
    ],
)
def test_damaged_tables_are_told_in_one_line(damage: str, message: str, database: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(database, copy)
    labs, stays = copy / "hosp/labevents.csv.gz", copy / "hosp/admissions.csv.gz"
    if damage == "absent":
        labs.unlink()
    elif damage == "cut":
        labs.write_bytes(labs.read_bytes()[:-1000])
    elif damage == "sums":
        (copy / "SHA256SUMS.txt").write_text(f"{'0' * 64} hosp/prescriptions.csv.gz\n")
    else:
        text = gzip.decompress(stays.read_bytes()).decode()
        stranger = text.splitlines()[1].replace("1000000", "7", 1)
        text = text.replace(",race,", ",ethnicity,") if damage == "column" else f"{text}{stranger}\n"
        stays.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(InputError, match=message) as error:
        prepare("mimic4", copy, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())
