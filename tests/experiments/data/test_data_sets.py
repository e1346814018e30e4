"""The registered sets: what is embedded, what the benchmark files hold, what each task leaves out."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmc_fast._env import VARIABLES, env
from mmc_fast.errors import InputError
from mmc_fast.experiments import data

ROOT = Path(__file__).resolve().parents[3]
NeedsData = Callable[..., Path]

# name, task, variant -> rows of train, validation, test; widths before indicator columns
EXPECTED: dict[tuple[str, str | None, str | None], tuple[list[int], list[int]]] = {
    ("mfeat", None, None): ([1200, 200, 600], [76, 216, 64, 240, 47, 6]),
    ("support2", None, None): ([5463, 911, 2731], [15, 15, 5, 10, 2]),
    ("avmnist", None, "plain"): ([12000, 2000, 4000], [784, 400]),
    ("avmnist", None, "speaker"): ([12000, 2000, 4000], [784, 400]),
    ("avmnist", None, "hard"): ([12000, 2000, 4000], [4, 400]),
    **{
        ("avmnist", None, variant): ([900, 150, 450], [784, 400])
        for variant in ("paper", "paper-95", "paper-90", "paper-85", "paper-80")
    },
    ("avmnist_small", None, "plain"): ([3000, 500, 1500], [784, 400]),
    ("avmnist_small", None, "speaker"): ([3000, 500, 1500], [784, 400]),
    ("fsdd_logmel20", None, "recording"): ([2400, 300, 300], [400]),
    ("fsdd_logmel20", None, "speaker"): ([2000, 500, 500], [400]),
    ("p2012", None, None): ([3201, 799, 4000], [8, 480, 276, 144]),
    ("diabetes130", "readmission", None): ([69691, 10044, 19608], [26, 41, 15, 137, 34, 20]),
    ("diabetes130", "death", None): ([71403, 10297, 20066], [26, 41, 15, 137, 34]),
    ("eicu_demo", "hospital_death", None): ([1513, 244, 735], [40, 12, 12, 72, 153, 151, 133, 48]),
    ("eicu_demo", "readmission", None): ([1451, 237, 704], [40, 12, 12, 72, 153, 151, 133, 48]),
    ("mimic4_demo", "death", None): ([161, 20, 94], [29, 135, 24, 145, 43]),
    ("mimic4_demo", "readmission", None): ([152, 19, 89], [29, 135, 24, 145, 43]),
}
EMBEDDED = ("mfeat", "support2")


def test_the_registry_is_what_is_tested() -> None:
    open_sets = [i for i in data.available() if i.name != "mimic4"]  # test_prepare_mimic4.py has that one
    listed = {(i.name, t, v) for i in open_sets for t in i.tasks for v in i.variants or (None,)}
    tested = {
        (info.name, task or info.tasks[0], variant)
        for (name, task, variant) in EXPECTED
        for info in data.available()
        if info.name == name
    }
    assert listed == tested


@pytest.mark.parametrize(("name", "task", "variant"), EXPECTED)
def test_every_set_loads(name: str, task: str | None, variant: str | None, needs_data: NeedsData) -> None:
    if name not in EMBEDDED:
        needs_data(name)
    parts, widths = EXPECTED[name, task, variant]
    got = data.load(name, task=task, variant=variant)
    info = next(i for i in data.available() if i.name == name)
    assert [len(got.part(p)) for p in ("train", "validation", "test")] == parts
    own = [sum(not f.endswith(" measured") for f in names) for names in got.feature_names.values()]
    assert own == widths
    assert set(got.modalities) <= set(info.modalities)
    assert (got.name, got.metric, got.info["variant"]) == (name, info.metric, variant)
    assert got.info["task"] == (task or info.tasks[0])
    assert got.info["licence"] == info.licence
    assert info.found
    train = got.part("train")
    for i, (view, x) in enumerate(zip(got.modalities, train.features, strict=True)):
        here = x[train.present[:, i]].double()
        columns = [not f.endswith(" measured") for f in got.feature_names[view]]
        np.testing.assert_allclose(here.mean(0)[columns], 0, atol=1e-5)
        if name in ("mfeat", "avmnist", "diabetes130"):  # nothing is filled, so variances are 1 (0 where constant)
            spread = here.var(0, correction=0)[columns]
            assert torch.isclose(spread, torch.ones_like(spread), atol=1e-4).logical_or(spread == 0).all()


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets_equal_the_benchmark_files(name: str, needs_data: NeedsData) -> None:
    embedded = np.load(str(files("mmc_fast.experiments.data.embedded") / f"{name}.npz"), allow_pickle=False)
    with np.load(needs_data(name) / f"{name}.npz", allow_pickle=False) as other:
        for key in embedded.files:
            if key != "meta":
                assert embedded[key].dtype == other[key].dtype
                np.testing.assert_array_equal(embedded[key], other[key])
        missing = {k for k in other.files if k not in embedded.files}
    assert missing == ({"x_physician", "names_physician", "y_disease"} if name == "support2" else set())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mfeat", "594e556d1846c94d7daf1271bc079f684ee1a2c2b6701774859ff72f341e3a9c"),
        ("support2", "9074d980dd4fc4c3d53e3b790a2a0e388a56f9edb258cfadf22011b813431124"),
    ],
)
def test_embedded_files_are_small_fixed_and_licensed(name: str, content: str) -> None:
    path = Path(str(files("mmc_fast.experiments.data.embedded") / f"{name}.npz"))
    assert path.stat().st_size <= 2_200_000
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            assert member.date_time == (1980, 1, 1, 0, 0, 0)
            digest.update(member.filename.encode() + archive.read(member))
    assert digest.hexdigest() == content
    assert f"`{path.name}`" in path.with_name("LICENSES.md").read_text()


def raw(needs_data: NeedsData, name: str) -> Any:
    return np.load(needs_data(name) / f"{name}.npz", allow_pickle=False)


def test_avmnist_pairs(needs_data: NeedsData) -> None:
    file = raw(needs_data, "avmnist")
    for variant, index in (("plain", "audio_index"), ("speaker", "audio_index_speaker")):
        got = data.load("avmnist", variant=variant, standardise=False)
        np.testing.assert_array_equal(got.features["image"], file["image"].reshape(18000, 784))
        audio = file["audio_bank"][file[index]]
        np.testing.assert_array_equal(got.features["audio"], audio.reshape(18000, 400))
        np.testing.assert_array_equal(file["rec_digit"][file[index]], got.labels)  # the pair is one digit
    speakers = file["rec_speaker"][file["audio_index_speaker"]]
    assert len({(int(s), int(p)) for s, p in zip(speakers, got.split, strict=True)}) == len(set(speakers.tolist()))


def test_avmnist_hard(needs_data: NeedsData) -> None:
    """The image is its four leading principal components, found again here from the basis in the file."""
    file = raw(needs_data, "avmnist")
    got = data.load("avmnist", variant="hard", standardise=False)
    np.testing.assert_array_equal(got.features["audio"], file["audio_babble"].reshape(18000, 400))
    pixels = file["image"].reshape(18000, 784) / 255.0
    coefficients = (pixels - file["image_pca_mean"]) @ file["image_pca_basis"]
    np.testing.assert_allclose(got.features["image"], coefficients, atol=1e-3)


def test_avmnist_of_the_paper(needs_data: NeedsData) -> None:
    """Three speakers with all their recordings, no image twice, equal shares; nested sets of rows without audio."""
    file = raw(needs_data, "avmnist")
    got = data.load("avmnist", variant="paper", standardise=False)
    speaker, digit = file["rec_speaker"][got.ids], file["rec_digit"][got.ids]
    np.testing.assert_array_equal(digit, got.labels)
    names = json.loads(str(file["meta"]))["speakers"]
    assert {names[s] for s in speaker} == {"jackson", "nicolas", "theo"}
    assert len(set(got.ids.tolist())) == len(got.ids) == 1500
    of_image = {image.tobytes(): set() for image in file["image"]}
    for image, label in zip(file["image"], file["label"], strict=True):
        of_image[image.tobytes()].add(int(label))
    images = [x.numpy().astype(np.uint8).tobytes() for x in got.features["image"]]
    assert len(set(images)) == 1500
    assert all(int(y) in of_image[x] for x, y in zip(images, got.labels, strict=True))
    shares = np.zeros((10, 6, 3), int)
    np.add.at(shares, (digit, speaker, got.split.numpy()), 1)
    assert (shares[:, [1, 3, 4]] == [30, 5, 10 + 5]).all()
    assert got.present.all()
    heard = [got.present[:, 1]]
    for share, train, validation in ((80, 180, 30), (85, 135, 23), (90, 90, 15), (95, 45, 8)):
        less = data.load("avmnist", variant=f"paper-{share}")
        np.testing.assert_array_equal(less.ids, got.ids)
        assert less.present[:, 0].all()
        assert [int(less.part(p).present[:, 1].sum()) for p in ("train", "validation", "test")] == [
            train,
            validation,
            0,
        ]
        heard.append(less.present[:, 1])
        assert not (heard[-1] & ~heard[-2]).any()


def test_diabetes_tasks(needs_data: NeedsData) -> None:
    file = raw(needs_data, "diabetes130")
    death = data.load("diabetes130", task="death", modalities=["demographics"])
    np.testing.assert_array_equal(death.labels, file["y_died"])
    with pytest.raises(InputError, match="Unknown modality 'disposition'"):
        data.load("diabetes130", task="death", modalities=["disposition"])
    back = data.load("diabetes130", task="readmission", modalities=["demographics"], standardise=False)
    rows = file["eligible"] == 1
    np.testing.assert_array_equal(back.labels, file["y_readmit"][rows] == 2)
    np.testing.assert_array_equal(back.features["demographics"], file["x_demographics"][rows])
    np.testing.assert_array_equal(back.ids, file["patient"][rows])


@pytest.mark.parametrize("task", ["hospital_death", "readmission"])
def test_eicu_absence_and_rows(task: str, needs_data: NeedsData) -> None:
    file = raw(needs_data, "eicu_demo")
    got = data.load("eicu_demo", task=task)
    if task == "hospital_death":
        rows, label = file["y_hospital_death"] < 2, file["y_hospital_death"]
    else:
        rows, label = file["y_unit_death"] == 0, file["y_icu_readmit"]
    np.testing.assert_array_equal(got.labels, label[rows])
    for i, view in enumerate(got.modalities):
        x = np.nan_to_num(file[f"x_{view}"][rows].reshape(rows.sum(), -1).astype(float), nan=np.inf)
        nothing = np.inf if view in ("demographics", "bedside", "labs", "bp_series") else 0.0
        np.testing.assert_array_equal(~got.present[:, i].numpy(), (x == nothing).all(1))
        assert not got.features[view][~got.present[:, i]].any()
    assert not got.present.all()


def test_mimic_tasks(needs_data: NeedsData) -> None:
    file = raw(needs_data, "mimic4_demo")
    got = data.load("mimic4_demo", task="readmission")
    np.testing.assert_array_equal(got.labels, file["y_readmit30"][file["y_death"] == 0])
    np.testing.assert_array_equal(data.load("mimic4_demo").labels, file["y_death"])


def test_p2012_sequences(needs_data: NeedsData) -> None:
    file = raw(needs_data, "p2012")
    got = data.load("p2012", modalities=["labs"], nan_policy="mean")
    names, x = got.feature_names["labs"], file["x_labs"].astype(np.float64)
    step, lab = 7, 5
    column = names.index(f"{file['names_labs'][lab]}@{step}")
    values = x[:, step, lab]
    train = values[file["split"] == 0]
    kept = (file["split"] > 0) | ~np.isnan(x).all((1, 2))
    expected = np.nan_to_num((values - np.nanmean(train)) / np.nanstd(train))[kept]
    np.testing.assert_allclose(got.features["labs"][:, column], expected, atol=1e-4)


def test_without_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"p2012: .*MMC_DATA is not set; set MMC_DATA to the folder that holds p2012\.npz"
    ):
        data.load("p2012")
    assert {i.name for i in data.available() if i.found} == set(EMBEDDED)
    assert len(data.load("mfeat")) == 2000
    monkeypatch.setenv("MMC_DATA", str(tmp_path))
    with pytest.raises(InputError, match="set MMC_DATA to the folder that holds avmnist"):
        data.load("avmnist")
    (tmp_path / "p2012.npz").write_bytes(
        (ROOT / "mmc_fast" / "experiments" / "data" / "embedded" / "mfeat.npz").read_bytes()
    )
    with pytest.raises(InputError, match="no array 'x_static'"):
        data.load("p2012")


def test_table_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMC_DATA", "/somewhere")
    assert env("MMC_DATA") == "/somewhere"
    monkeypatch.setenv("MMC_DATA", "")
    assert env("MMC_DATA") is None
    with pytest.raises(KeyError, match="add a row"):
        env("MMC_NOT_THERE")
    names = [variable.name for variable in VARIABLES]
    assert len(set(names)) == len(names)
    assert all(variable.name.startswith("MMC_") and variable.meaning for variable in VARIABLES)
