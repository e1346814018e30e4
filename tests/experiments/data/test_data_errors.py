"""Every kind of bad input: one clear line, of type InputError, that names what is wrong."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import DROP, arrays, edited, write

from mmc_fast.errors import InputError
from mmc_fast.experiments import data

BASE = arrays()
META = json.dumps


def test_the_unbroken_file_loads(tmp_path: Path) -> None:
    assert len(data.load(write(tmp_path / "good.npz"))) == 90


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no features": ({"x_a": DROP, "x_b": DROP}, {}, "x_VIEW"),
    "no labels": ({"y": DROP}, {}, "no labels"),
    "no split": ({"split": DROP}, {}, "split_seed"),
    "a split and a seed for one": ({}, {"split_seed": 0}, "leave split_seed out"),
    "labels too short": ({"y": BASE["y"][:-1]}, {}, "y has 89 rows"),
    "view too long": ({"x_b": np.zeros((91, 3))}, {}, "x_b has 91 rows"),
    "split too short": ({"split": BASE["split"][1:]}, {}, "split has 89 rows"),
    "ids too short": ({"ids": np.arange(5)}, {}, "ids has 5 rows"),
    "no rows": ({k: v[:0] for k, v in BASE.items() if k != "meta"}, {}, "no rows"),
    "a view without columns": ({"x_a": np.zeros((90, 0))}, {}, "d >= 1"),
    "a view that is one number": ({"x_a": np.float32(3)}, {}, "x_a must hold numbers"),
    "a view of text": ({"x_a": np.full((90, 2), "a")}, {}, "x_a must hold numbers"),
    "complex numbers": ({"x_a": np.zeros((90, 2), complex)}, {}, "complex128"),
    "labels in a cube": ({"y": BASE["y"][:, None, None]}, {}, r"y must have shape \[90\]"),
    "names of wrong number": ({"names_a": np.array(["u", "v"])}, {}, "2 names for 4 features"),
    "names that are numbers": ({"names_a": np.arange(4)}, {}, "must be text"),
    "names of an unknown view": ({"names_c": np.array(["u"])}, {}, "Unknown modality .*'c'.*Allowed: a, b"),
    "presence of an unknown view": ({"present_c": np.ones(90, bool)}, {}, "Unknown modality .*'c'"),
    "an array with a slip in its name": ({"presnt_a": np.ones(90, bool)}, {}, "did you mean 'present_a'"),
    "NaN without a policy": ({"x_a": edited(BASE["x_a"], (3, 2), np.nan)}, {}, "NaN in 1 row.*row 3.*nan_policy"),
    "infinity": ({"x_b": edited(BASE["x_b"], (7, 0), -np.inf)}, {"nan_policy": "mean"}, "-inf in row 7"),
    "infinity in half precision": ({"x_b": edited(BASE["x_b"].astype("f2"), (7, 0), np.inf)}, {}, "inf in row 7"),
    "a value beyond float32": ({"x_b": edited(BASE["x_b"], (7, 1), 1e39)}, {}, "float32"),
    "a value too far from train": (
        {"x_b": edited(np.linspace(0, 1e-30, 270).reshape(90, 3), (80, 1), 3e38)},
        {},
        "too far from the training rows",
    ),
    "unknown NaN policy": ({}, {"nan_policy": "indicater"}, "Did you mean 'indicator'"),
    "whole numbers that may be amounts": (
        {"y": BASE["y"] + 1, "meta": DROP},
        {},
        'holds 3 different whole numbers.*kind = "classification" or kind = "regression"',
    ),
    "a negative label": ({"y": edited(BASE["y"], 4, -1), "meta": META({"num_classes": 3})}, {}, "y is -1 in row 4"),
    "a label out of range": ({"meta": META({"num_classes": 2})}, {}, "y is 2 in row 2, out of range"),
    "a label with a fraction": ({"y": edited(BASE["y"].astype(float), 4, 1.5)}, {}, "'y' holds fractions"),
    "a label that is NaN": ({"y": edited(BASE["y"].astype(float), 4, np.nan)}, {}, "'y' is empty in row 4"),
    "one text in all rows": ({"y": np.full(90, "cat")}, {}, "'cat' in every row"),
    "an unknown kind": ({"meta": META({"kind": "classificaton"})}, {}, "Did you mean 'classification'"),
    "columns that are not one-hot": (
        {"y": np.eye(3)[BASE["y"]] * (np.arange(90)[:, None] != 7), "meta": DROP},
        {},
        "row 7 of the label columns.*multilabel",
    ),
    "names of classes and other numbers": (
        {"meta": META({"classes": ["u", "v"]})},
        {},
        "y is 2 in row 2, out of range; meta names 2 classes",
    ),
    "a class missing from train": (
        {"y": np.where(BASE["split"] == 0, 0, BASE["y"])},
        {},
        "class 1 has no row in the train",
    ),
    "a single class": ({"y": np.ones(90, int)}, {}, "'1' in every row"),
    "one class in validation with AUC": (
        {"y": np.where(BASE["split"] == 1, 0, BASE["y"] % 2)},
        {},
        "class 1 has no row in the validation part",
    ),
    "AUC for three classes": (
        {"meta": META({"metric": "auroc", "kind": "classification"})},
        {},
        "'auroc' is for 2 classes",
    ),
    "an unknown metric": (
        {"meta": META({"metric": "acuracy", "kind": "classification"})},
        {},
        "Did you mean 'accuracy'",
    ),
    "an empty test part": ({"split": np.minimum(BASE["split"], 1)}, {}, "the test part is empty"),
    "an unknown split code": ({"split": edited(BASE["split"], 4, 3)}, {}, "'3'.*row 4"),
    "a negative split code": ({"split": edited(BASE["split"].astype(int), 4, -1)}, {}, "'-1'.*row 4"),
    "a split of text": ({"split": np.full(90, "train")}, {}, "'train'.*row 0"),
    "an id in two parts": ({"ids": np.arange(90) % 80}, {}, r"10 id\(s\).*the first is 0, in train and test"),
    "ids with fractions": ({"ids": np.arange(90) / 2}, {}, "ids must be integers or text"),
    "presence that is not bool": ({"present_a": np.ones(90, np.uint8)}, {}, "present_a must be bool, got uint8"),
    "presence of wrong shape": ({"present_a": np.ones((90, 4), bool)}, {}, "present_a must have shape"),
    "presence of wrong length": ({"present_a": np.ones(89, bool)}, {}, "present_a has 89 rows"),
    "a training row with nothing": (
        {f"present_{v}": edited(np.ones(90, bool), 5, False) for v in "ab"},
        {},
        r"1 training row\(s\) have no modality present \(the first is row 5\)",
    ),
    "a view absent in all of train": ({"present_b": BASE["split"] > 0}, {}, "'b' is absent in every training row"),
    "an unknown modality": ({}, {"modalities": ["a", "bb"]}, "Unknown modality 'bb'.*Allowed: a, b"),
    "no modality": ({}, {"modalities": []}, "empty"),
    "one modality twice": ({}, {"modalities": ["a", "a"]}, "twice"),
    "an unknown task": ({}, {"task": "death"}, "Unknown task 'death'"),
    "several tasks, none chosen": ({"y": DROP, "y_u": BASE["y"], "y_v": BASE["y"]}, {}, "Allowed: u, v"),
    "a variant of a file": ({}, {"variant": "hard"}, "no variants"),
    "meta that is not JSON": ({"meta": "{"}, {}, "meta is not valid JSON"),
    "meta that is a list": ({"meta": "[]"}, {}, "meta must be a JSON object"),
    "meta that is a number": ({"meta": np.float64(1)}, {}, "meta must be one text"),
    "num_classes of text": ({"meta": META({"num_classes": "3"})}, {}, "num_classes must be an integer"),
    "one class, it says": (
        {"meta": META({"num_classes": 1})},
        {},
        "y is 1 in row 1, out of range; meta names 1 classes",
    ),
    "more classes than rows": ({"meta": META({"num_classes": 10**15})}, {}, "class 3 has no row in the train part"),
    "an unknown view in the order": ({"meta": META({"views": ["a", "c"]})}, {}, "Unknown modality .*'c'"),
    "an order that is no list": ({"meta": META({"views": "a"})}, {}, "views must be a list"),
    "a view twice in the order": ({"meta": META({"views": ["a", "a"]})}, {}, "twice"),
    "an object array": ({"x_a": np.array([[1, None]] * 90, object)}, {}, "'x_a': an object array"),
    "dates": ({"x_a": np.zeros((90, 1), "M8[s]")}, {}, "its type is datetime64"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_file(case: str, tmp_path: Path) -> None:
    changes, options, message = CASES[case]
    path = write(tmp_path / "bad.npz", changes)
    with pytest.raises(InputError, match=message) as caught:
        data.load(path, **options)
    assert "\n" not in str(caught.value)


def raw_bytes(path: Path) -> None:
    path.write_bytes(b"this is not a zip file" * 10)


def single_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, BASE["x_a"])


def truncated(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path: Path, rows: int = 90) -> None:
    """One byte of stored data is another: only the check sum can tell."""
    write(path, rows=rows)
    content = bytearray(path.read_bytes())
    content[content.index(arrays(rows=rows)["x_a"].tobytes()) + 16 * rows - 1] ^= 1
    path.write_bytes(bytes(content))


def flipped_far_from_the_header(path: Path) -> None:
    flipped(path, rows=30000)


def other_member(path: Path) -> None:
    write(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "hello")


def same_member_twice(path: Path) -> None:
    write(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("y.npy", npy_bytes(BASE["y"]))


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def lying_header(path: Path) -> None:
    """A header that promises 8 TB over the data of 90 rows; allocation must not be tried."""
    content = npy_bytes(BASE["x_a"]).replace(b"(90, 4), }" + b" " * 12, b"(500000000000, 4), }  ")
    if len(content) != len(npy_bytes(BASE["x_a"])) or b"500000000000" not in content:
        raise AssertionError("the header was not changed as meant")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_a.npy", content)


def broken_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_a.npy", npy_bytes(BASE["x_a"]).replace(b"{'descr'", b"{'deskr'"))


def unknown_version(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_a.npy", b"\x93NUMPY\x09\x00" + npy_bytes(BASE["x_a"])[8:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (raw_bytes, "not an npz file"),
        (single_array, "not an npz file"),
        (truncated, "not an npz file"),
        (flipped, "'x_a': damaged .*CRC"),
        (flipped_far_from_the_header, "'x_a': damaged .*CRC"),
        (other_member, "'readme.txt': not an array"),
        (same_member_twice, "'y.npy': .*twice"),
        (lying_header, "declares float32 .*500000000000.*damaged"),
        (broken_header, "damaged"),
        (unknown_version, "damaged"),
    ],
)
def test_bad_archive(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "bad.npz")
    with pytest.raises(InputError, match=message) as caught:
        data.load(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        data.load(tmp_path / "none.npz")
    with pytest.raises(InputError, match="no table in this folder"):
        data.load(tmp_path)


def test_damaged_files_never_crash(tmp_path: Path, seed: int) -> None:
    """Random bytes changed or cut: an InputError, or the same values; nothing else."""
    rng = np.random.default_rng(seed)
    good = write(tmp_path / "good.npz", rows=30)
    whole, expected = good.read_bytes(), data.load(good)
    bad, refused = tmp_path / "bad.npz", 0
    for _ in range(150):
        content = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.2 else whole)
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            content[position] = rng.integers(256)
        bad.write_bytes(bytes(content))
        try:
            got = data.load(bad)
        except InputError:
            refused += 1
        else:
            for name, x in expected.features.items():
                np.testing.assert_array_equal(got.features[name], x)
    assert refused > 50


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mfaet", {}, "Did you mean 'mfeat'.*Allowed: mfeat, support2, .*path of an npz"),
        ("mfeat", {"task": "digits"}, "Unknown task of mfeat 'digits'.*Did you mean 'digit'.*Allowed: digit"),
        ("mfeat", {"variant": "hard"}, "mfeat has no variants"),
        ("mfeat", {"split_seed": 1}, "fixed split"),
        ("mfeat", {"modalities": ["fuo"]}, "Did you mean 'fou'"),
        ("support2", {"modalities": ["physician"]}, "Unknown modality 'physician'"),
        ("support2", {"nan_policy": "error"}, "nan_policy 'mean' or 'indicator'"),
    ],
)
def test_bad_request_of_a_registered_set(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        data.load(name, **options)
    assert "\n" not in str(caught.value)


def test_modalities_as_a_string_is_a_misuse(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="list of names"):
        data.load(write(tmp_path / "good.npz"), modalities="a")
    with pytest.raises(TypeError, match="name or a path"):
        data.load(5)  # type: ignore[arg-type]
