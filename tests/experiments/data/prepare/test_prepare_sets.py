"""Each set from small originals in the publisher's layout, values worked out by hand; and in full where the originals are."""

from __future__ import annotations

import io
import shutil
import wave
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from mmc_fast.errors import InputError
from mmc_fast.experiments.data.prepare import diabetes130, eicu_demo, p2012, prepare
from mmc_fast.experiments.data.prepare.fsdd_logmel20 import SPEAKERS


def made(name: str, folder: Path, verify: bool = False) -> dict[str, np.ndarray]:
    with np.load(prepare(name, folder, folder / "out", verify=verify), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def test_mfeat_and_support2(tmp_path: Path) -> None:
    widths = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}
    values = {view: np.random.default_rng(1).integers(0, 99, (50, width)) / 8 for view, width in widths.items()}
    with zipfile.ZipFile(tmp_path / "multiple+features.zip", "w") as archive:
        for view, table in values.items():
            archive.writestr(f"mfeat-{view}", "\n".join("  ".join(map(str, row)) for row in table))
    got = made("mfeat", tmp_path)
    assert got["y"].tolist() == [digit for digit in range(10) for _ in range(5)]
    for view, table in values.items():
        np.testing.assert_array_equal(got[f"x_{view}"], table.astype(np.float32))
    with pytest.raises(InputError, match="mfeat-fou has 50 rows, the release has 2000"):
        prepare("mfeat", tmp_path, tmp_path)
    head = (
        "id,age,sex,hospdead,dzgroup,num.co,edu,income,scoma,race,hday,diabetes,dementia,ca,meanbp,wblc,hrt,resp,temp,"
    )
    head += "pafi,alb,bili,crea,sod,ph,glucose,bun,urine,adlp,adls\n"
    line = "{},60.5,{},{},Coma,0,11,,3,white,1,0,1,no,97,6,,22,36,388,1.8,.2,1.2,141,7.45,,,,7,\n"
    people = "".join(line.format(i, ("male", "female")[i % 3 == 0], int(i % 4 == 0)) for i in range(40))
    (tmp_path / "support2.csv").write_text(head + people)
    got = made("support2", tmp_path)
    assert got["names_demographics"].tolist() == [
        "age",
        "edu",
        "sex=female",
        "sex=male",
        "race=white",
        "income=missing",
    ]
    assert got["x_demographics"][:2].tolist() == [[60.5, 11, 1, 0, 1, 1], [60.5, 11, 0, 1, 1, 1]]
    assert got["y"].tolist() == [int(i % 4 == 0) for i in range(40)]
    assert np.isnan(got["x_labs"]).any(0).tolist() == [False] * 7 + [True] * 3


def embedded(name: str) -> dict[str, np.ndarray]:
    with np.load(str(files("mmc_fast.experiments.data.embedded") / f"{name}.npz"), allow_pickle=False) as file:
        return {key: file[key] for key in file.files if key != "meta"}


@pytest.mark.parametrize("packed", [False, True])
def test_mfeat_from_the_files_of_uci(packed: bool, tmp_path: Path) -> None:
    wanted = embedded("mfeat")
    folder = tmp_path / "original"
    folder.mkdir()
    for view in ("fac", "fou", "kar", "mor", "pix", "zer"):
        lines = ["   ".join(["", *map(repr, row)]) for row in wanted[f"x_{view}"].astype(float).tolist()]
        (folder / f"mfeat-{view}").write_text("\n".join(lines) + "\n")
    (folder / "mfeat.info").write_text("1. Title of Database: Multiple features\n")
    if packed:
        with zipfile.ZipFile(tmp_path / "multiple+features.zip", "w") as archive:
            for path in folder.iterdir():
                archive.write(path, path.name)
        shutil.rmtree(folder)
    got = made("mfeat", tmp_path, verify=True)
    assert got.keys() - {"meta"} == wanted.keys()
    for key, array in wanted.items():
        assert got[key].dtype == array.dtype
        np.testing.assert_array_equal(got[key], array)


SUPPORT2 = (
    "age,death,sex,hospdead,slos,d.time,dzgroup,dzclass,num.co,edu,income,scoma,charges,totcst,totmcst,avtisst,race,sps,aps,"
    "surv2m,surv6m,hday,diabetes,dementia,ca,prg2m,prg6m,dnr,dnrday,meanbp,wblc,hrt,resp,temp,pafi,alb,bili,crea,sod,ph,"
    "glucose,bun,urine,adlp,adls,sfdm2,adlsc"
)


@pytest.mark.parametrize(("first", "gap"), [("id,", ""), ("", ""), ('"",', "NA")])  # UCI; row names of R, with NA
def test_support2_from_the_csv_of_its_publishers(first: str, gap: str, tmp_path: Path) -> None:
    wanted = embedded("support2")
    cells = {name: ["0"] * 9105 for name in SUPPORT2.split(",")} | {"hospdead": [str(y) for y in wanted["y"]]}
    for view in ("demographics", "disease", "vitals", "labs", "function"):
        for column, values in zip(wanted[f"names_{view}"].tolist(), wanted[f"x_{view}"].T.astype(float), strict=True):
            name, _, text = column.partition("=")
            if text:
                for row in np.flatnonzero(values):
                    cells[name][row] = gap if text == "missing" else f'"{text}"'
            else:
                cells[name] = [gap if np.isnan(v) else repr(v) for v in values.tolist()]
    lines = [",".join(line) for line in zip(map(str, range(1, 9106)), *cells.values(), strict=True)]
    (tmp_path / "support2.csv").write_text("\n".join([first + SUPPORT2, *lines]) + "\n")
    got = made("support2", tmp_path, verify=True)
    assert got.keys() - {"meta"} == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_array_equal(got[key], array)
    cut = (tmp_path / "support2.csv").read_text()[:-20]
    (tmp_path / "support2.csv").write_text(cut)
    with pytest.raises(
        InputError, match=r"^support2: support2\.csv is damaged, incomplete or not the publisher's file"
    ):
        prepare("support2", tmp_path, tmp_path)


def test_avmnist(tmp_path: Path) -> None:
    rng, tone = np.random.default_rng(2), np.arange(6000) / 8000
    for part, n in (("train", 300), ("t10k", 80)):
        image, label = rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
        image[:, 0] = 0
        for what, array in (("images.idx3", image), ("labels.idx1", label)):
            shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = b"\0\0\x08" + bytes([array.ndim]) + shape + array.tobytes()
            (tmp_path / f"{part}-{what.replace('.', '-')}-ubyte").write_bytes(content)
    for digit in range(10):
        for speaker in SPEAKERS:
            for number in (0, 5, 10, 11):
                with wave.open(str(tmp_path / f"{digit}_{speaker}_{number}.wav"), "wb") as file:
                    file.setparams((1, 2, 8000, 0, "NONE", ""))
                    file.writeframes((9000 * np.sin(2 * np.pi * 350 * (digit + 1) * tone)).astype("<i2").tobytes())
    got = made("avmnist", tmp_path)
    assert np.bincount(got["split"]).tolist() == [60, 10, 20]
    for key, spoken in (("audio_index", got["rec_number"] // 5), ("audio_index_speaker", None)):
        np.testing.assert_array_equal(got["rec_digit"][got[key]], got["label"])
        part = [2, 1, 0] if spoken is not None else [0, 0, 0, 0, 2, 1]
        of = spoken if spoken is not None else got["rec_speaker"]
        np.testing.assert_array_equal(np.array(part)[of[got[key]]], got["split"])
    loudest = got["audio_bank"][:, :, 5].argmax(1)  # the band rises with the pitch
    assert [len(set(loudest[got["rec_digit"] == d])) for d in range(10)] == [1] * 10
    assert (np.diff([loudest[got["rec_digit"] == d][0] for d in range(10)]) >= 0).all()
    assert (got["audio_bank"].max((1, 2)) == 255).all()
    assert (got["audio_bank"][:, :, -1] == 0).all()  # a quarter of a second of silence at the end
    assert not (got["audio_babble"] == got["audio_bank"][got["audio_index"]]).all((1, 2)).any()
    pixels = got["image"].reshape(90, 784) / 255
    _, _, directions = np.linalg.svd(pixels[got["split"] == 0] - got["image_pca_mean"], full_matrices=False)
    basis = got["image_pca_basis"]
    np.testing.assert_allclose(np.abs((directions[: basis.shape[1]] * basis.T).sum(1)), 1, atol=1e-4)
    assert (basis[:28] == 0).all()
    small = made("avmnist_small", tmp_path)
    assert "audio_babble" not in small
    np.testing.assert_array_equal(small["audio_bank"], made("fsdd_logmel20", tmp_path)["logmel"])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1\0\0\0\x50" + bytes(79))
    with pytest.raises(InputError, match="t10k-labels-idx1-ubyte is damaged or no idx file"):
        made("avmnist", tmp_path)


def test_p2012(tmp_path: Path) -> None:
    for part, first in (("a", 132539), ("b", 142675)):
        ids = range(first, first + 20)
        lines = [f"{i},6,1,5,-1,{int(i % 2)}" for i in ids]
        (tmp_path / f"Outcomes-{part}.txt").write_text(
            f"RecordID,{','.join(p2012.OUTCOMES)}\n" + "\n".join(lines) + "\n"
        )
        (tmp_path / f"set-{part}").mkdir()
        for i in ids:
            events = ["RecordID,%d" % i, "Age,54", "Height,-1", "ICUType,3", "HR,70", "HR,80", "pH,735", "Temp,-17"]  # noqa: UP031
            text = (
                "Time,Parameter,Value\n"
                + "".join(f"00:00,{e}\n" for e in events)
                + "01:30,Urine,30\n01:59,Urine,40\n47:59,K,4\n"
            )
            (tmp_path / f"set-{part}/{i}.txt").write_text(text)
    got = made("p2012", tmp_path)
    np.testing.assert_array_equal(got["x_static"][0], [54, np.nan, np.nan, np.nan, 0, 0, 1, 0])
    assert got["x_vitals"][0, 0, 0] == 75
    assert (np.isfinite(got["x_vitals"]).sum(), np.isfinite(got["x_labs"]).sum()) == (40, 80)
    assert got["x_support"][0, 1].tolist()[2] == 70
    assert got["x_labs"][0, 11, list(p2012.LABS).index("K")] == 4
    assert got["x_labs"][0, 0, -1] == np.float16(7.35)
    assert np.bincount(got["split"]).tolist() == [16, 4, 20]
    (tmp_path / "set-b/142675.txt").unlink()
    with pytest.raises(InputError, match=r"missing in .*: 1 of 40 records, such as 142675\.txt"):
        made("p2012", tmp_path)
    (tmp_path / "set-b/142675.txt").write_text("Time,Parameter,Value\n00:00,HR,7")
    (tmp_path / "set-a/132540.txt").write_text("Time,Parameter,Value\n00:00,HR")
    with pytest.raises(InputError, match=r"132540\.txt is damaged"):
        made("p2012", tmp_path)


def test_diabetes130(tmp_path: Path) -> None:
    row = dict.fromkeys(diabetes130.COLUMNS, "No") | dict.fromkeys([*diabetes130.COUNTS, *diabetes130.IDS], "1")
    row |= {
        "age": "[60-70)",
        "weight": "?",
        "diag_1": "250.83",
        "diag_2": "401",
        "diag_3": "401.9",
        "time_in_hospital": "3",
    }
    rows = [row | {"patient_nbr": str(i // 2), "readmitted": ("NO", ">30", "<30")[i % 3]} for i in range(900)]
    rows[0] |= {"discharge_disposition_id": "11", "diag_1": "401", "race": "?", "metformin": "Up"}
    text = "\n".join([",".join(row), *(",".join(r.values()) for r in rows)])
    with zipfile.ZipFile(tmp_path / "dataset_diabetes.zip", "w") as archive:
        archive.writestr("dataset_diabetes/diabetic_data.csv", text)
    got = made("diabetes130", tmp_path)
    assert got["names_diagnoses"].tolist() == ["250.8", "401"]
    assert got["x_diagnoses"][:2].tolist() == [[0, 3], [2, 1]]
    assert got["names_demographics"].tolist()[:2] == ["race=No", "race=missing"]
    assert got["x_demographics"][0, -2:].tolist() == [6, 1]
    assert got["y_readmit"][:4].tolist() == [0, 1, 2, 0]
    assert (got["y_died"].sum(), got["eligible"].sum()) == (1, 899)
    assert (got["split"][::2] == got["split"][1::2]).all()
    assert set(got["split"]) == {0, 1, 2}
    with pytest.raises(InputError, match=r"diabetic_data\.csv is not that of the release"):
        made("diabetes130", tmp_path, verify=True)


def test_eicu_demo(tmp_path: Path) -> None:
    columns = {
        "patient": eicu_demo.PATIENT,
        "apacheApsVar": [eicu_demo.KEY, *eicu_demo.BEDSIDE, *eicu_demo.LABS],
        "vitalAperiodic": [eicu_demo.KEY, "observationoffset", *eicu_demo.PRESSURES],
        "diagnosis": [eicu_demo.KEY, "diagnosisoffset", "diagnosisstring"],
        "treatment": [eicu_demo.KEY, "treatmentoffset", "treatmentstring"],
        "medication": [eicu_demo.KEY, "drugstartoffset", "drugordercancelled", "drugname"],
        "pastHistory": [eicu_demo.KEY, "pasthistoryoffset", "pasthistorypath"],
    }
    files = {name: io.StringIO(",".join(header) + "\n") for name, header in columns.items()}
    for file in files.values():
        file.seek(0, io.SEEK_END)
    for i in range(60):
        fate = "Expired" if i % 6 == 0 else "" if i == 1 else "Alive"
        again = ("1,admit", "2,readmit")[i % 2]
        files["patient"].write(f"{i},{i // 2},F,> 89,X,7,CHF,999,80,-10,{fate},MICU,ED,{again},1440,Alive,p{i // 2}\n")
        files["apacheApsVar"].write(f"{i}," + ",".join(["-1"] * 12 + ["5"] * 12) + "\n")
        files["vitalAperiodic"].write(f"{i},5,100,4,\n{i},59,120,60,\n{i},1440,1,1,1\n")
        files["diagnosis"].write(f"{i},9,a|b|c|d\n{i},1441,late\n")
        files["treatment"].write(f"{i},9,t|u\n")
        files["medication"].write(f'{i},9,No,"TABS warfarin 5 MG"\n{i},9,Yes,HEPARIN\n')
        files["pastHistory"].write(f"{i},9,notes/Progress Notes/Past History/Old/CHF\n")
    for name, file in files.items():
        (tmp_path / f"{name}.csv").write_text(file.getvalue())
    got = made("eicu_demo", tmp_path)
    np.testing.assert_array_equal(got["x_demographics"][0, :3], [90, np.nan, 80])
    assert np.isnan(got["x_bedside"]).all()
    assert (got["x_labs"] == 5).all()
    np.testing.assert_array_equal(got["x_bp_series"][3, 0], [110, 60, np.nan])
    assert np.isnan(got["x_bp_series"][:, 1:]).all()
    named = [got[f"names_{view}"].tolist() for view in ("diagnoses", "treatments", "medications", "history")]
    assert named == [["a", "apache:CHF", "a|b", "a|b|c"], ["t|u"], ["WARFARIN"], ["Old/CHF"]]
    assert got["y_hospital_death"][:3].tolist() == [1, 255, 0]
    assert got["y_icu_readmit"].tolist() == [1, 0] * 30
    assert (got["split"][::2] == got["split"][1::2]).all()
    with pytest.raises(InputError, match=r"patient\.csv has 60 rows, the release has 2520"):
        made("eicu_demo", tmp_path, verify=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder"),
    [("fsdd_logmel20", "fsdd"), ("p2012", "physionet2012"), ("diabetes130", "diabetes130"), ("eicu_demo", "eicu-demo"),
     ("mimic4_demo", "mimic-iv-demo-2.2")],
)  # fmt: skip
def test_the_originals_give_the_benchmark_files(
    name: str, folder: str, needs_data: Callable[..., Path], tmp_path: Path
) -> None:
    originals = needs_data(name).parent / "raw" / folder
    if not originals.is_dir():
        pytest.skip(f"needs the originals of {name} in {folder}, beside the folder of the benchmark sets")
    path = prepare(name, originals, tmp_path)
    with np.load(path, allow_pickle=False) as got, np.load(needs_data(name) / path.name, allow_pickle=False) as known:
        assert set(got.files) == set(known.files)
        for key in set(known.files) - {"meta"}:
            assert got[key].dtype == known[key].dtype
            np.testing.assert_array_equal(got[key], known[key])
