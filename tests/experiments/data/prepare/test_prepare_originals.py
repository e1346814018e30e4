"""Originals: found plain, packed and nested; damaged, partial, renamed and doubled ones told in one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmc_fast.errors import InputError
from mmc_fast.experiments.data import available
from mmc_fast.experiments.data.prepare import RECIPES, check, prepare
from mmc_fast.experiments.data.prepare.originals import Originals
from mmc_fast.experiments.data.prepare.recipe import Recipe, prepare_file
from mmc_fast.experiments.data.prepare.tables import chunks, multi_hot, one_hot, table

CONTENT = b"a,b\n1,2\n3,4\n"


def tar_bytes(name: str, content: bytes, mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_bytes(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("x.csv", CONTENT),
        ("deep/er/x.csv.gz", gzip.compress(CONTENT)),
        ("all.zip", zip_bytes("release-1/x.csv", CONTENT)),
        ("all.zip", zip_bytes("release-1/x.csv.gz", gzip.compress(CONTENT))),
        ("all.tgz", tar_bytes("release-1/x.csv", CONTENT)),
        ("all.zip", zip_bytes("inner.tar", tar_bytes("x.csv", CONTENT, "w"))),
    ],
    ids=["plain", "gzip", "zip", "gzip in zip", "tgz", "tar in zip"],
)
def test_a_file_is_found_wherever_it_lies(file: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(content)
    originals = Originals("set", [tmp_path])
    originals.require("x.csv")
    assert originals.read("x.csv", sha256=hashlib.sha256(CONTENT).hexdigest()) == CONTENT
    (tmp_path / "more.zip").write_bytes(zip_bytes("y.csv", CONTENT))
    both = Originals("set", [tmp_path]).collect(lambda name: name[0] in "xy", "tables", expected=2)
    assert list(both)[1] == "y.csv"
    with pytest.raises(InputError, match="tables has 2 files, the release has 3"):
        Originals("set", [tmp_path]).collect(lambda name: name[0] in "xy", "tables", expected=3)
    assert table(originals, "x.csv", ["b"])["b"].tolist() == [2, 4]
    assert [len(piece) for piece in chunks(originals, "x.csv", ["a"], 1)] == [1, 1]


def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x (1).csv").write_bytes(CONTENT)
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(os.urandom(9000))[:-900])
    (tmp_path / "page.csv.gz").write_bytes(b"<!DOCTYPE html>")
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twice.csv").write_bytes(CONTENT)
    (tmp_path / "b/SHA256SUMS.txt").write_text(f"{hashlib.sha256(CONTENT).hexdigest()} twice.csv\n")
    originals = Originals("set", [tmp_path], where="at its publisher")

    def refused(message: str, call: object) -> None:
        with pytest.raises(InputError, match=message) as error:
            call()  # type: ignore[operator]
        assert "\n" not in str(error.value)

    refused(r"set: missing in .*: x\.csv, y\.csv; is 'x \(1\)\.csv' the file 'x\.csv'\? then rename it; get it: at its pub",
            lambda: originals.require("x.csv", "y.csv"))  # fmt: skip
    refused(r"cut\.csv\.gz is damaged, incomplete or not the publisher's file .* get it again: at its publisher",
            lambda: originals.read("cut.csv"))  # fmt: skip
    refused(r"page\.csv\.gz is damaged", lambda: originals.read("page.csv"))
    refused(r"twice\.csv is there twice, .*; give the folder of one", lambda: originals.read("twice.csv"))
    refused(r"nowhere: no such folder", lambda: Originals("set", [tmp_path / "nowhere"]))
    one = Originals("set", [tmp_path / "b"])
    refused(r"twice\.csv is not that of the release .*--unverified", lambda: one.read("twice.csv", sha256="0" * 64))
    refused(r"twice\.csv has 2 rows, the release has 3", lambda: one.rows("twice.csv", 2, 3))
    refused(r"twice\.csv has no column c \(it has a, b\)", lambda: table(one, "twice.csv", ["c"]))
    loose = Originals("set", [tmp_path / "b"], verify=False)
    assert loose.read("twice.csv", sha256="0" * 64) == CONTENT
    loose.rows("twice.csv", 2, 3)
    (tmp_path / "b/twice.csv").write_bytes(CONTENT + b"5,6\n")
    refused(r"twice\.csv: differs from its check sum", lambda: Originals("set", [tmp_path / "b"]).read("twice.csv"))
    (tmp_path / "b/packed.zip").write_bytes(zip_bytes("z.csv", CONTENT)[:-10])
    refused(r"packed\.zip is damaged", lambda: Originals("set", [tmp_path / "b"]).read("z.csv"))


def test_columns_of_texts() -> None:
    import pandas as pd

    column = pd.Series(["b", "a", None, "b", "rare", "a"], name="c")
    values, names = one_hot(column, 2)
    assert names == ["c=a", "c=b", "c=other"]
    assert values.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert one_hot(column, 1)[1] == ["c=a", "c=b", "c=missing", "c=rare"]
    assert one_hot(column, 1, np.array([1, 1, 0, 0, 0, 0], bool))[1] == ["c=a", "c=b", "c=other"]
    matrix, keys = multi_hot(np.array([0, 0, 2, 2, 1]), np.array(["u", "u", "u", "v", "w"], object), 3, 2)
    assert keys.tolist() == ["u"]
    assert matrix.tolist() == [[1], [0], [1]]


def example(originals: Originals) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    content = np.frombuffer(originals.read("x.bin"), np.uint8)
    return {"x_a": content[:, None], "split": content % 3}, {"name": "example"}


def test_a_file_is_whole_or_not_there_and_knows_its_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(range(200)))
    recipe = Recipe("here", example)
    monkeypatch.setitem(RECIPES, "mfeat", recipe)
    path = prepare("mfeat", tmp_path, tmp_path / "out")
    first = path.read_bytes()
    assert prepare("mfeat", [tmp_path], tmp_path / "out").read_bytes() == first
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        assert file["x_a"].tobytes() == bytes(range(200))
    assert meta["originals"] == {"x.bin": hashlib.sha256(bytes(range(200))).hexdigest()}
    assert str(tmp_path) not in json.dumps(meta)
    assert check("mfeat", path.parent) == "whole"
    assert check("mimic4", path.parent) == "not here"
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    arrays["x_a"] = arrays["x_a"] + 1
    np.savez(path, **arrays)
    assert check("mfeat", path.parent) == "damaged: x_a not as written; prepare it again"
    path.write_bytes(first[:-50])
    assert check("mfeat", path.parent).startswith("damaged: ")
    with pytest.raises(InputError, match="draws another split"):
        prepare_file("mfeat", Recipe("here", example, split="0" * 16), [tmp_path], tmp_path / "out")
    assert path.read_bytes() == first[:-50]
    assert [p.name for p in path.parent.iterdir()] == ["mfeat.npz"]
    with pytest.raises(InputError, match=r"Unknown data set 'mfeet'\. Did you mean 'mfeat'"):
        prepare("mfeet", tmp_path, tmp_path / "out")


def test_every_set_of_the_registry_can_be_made() -> None:
    infos = {info.name: info for info in available()}
    assert set(RECIPES) == set(infos)
    for name, recipe in RECIPES.items():
        assert "http" in recipe.where, name
        assert any(word in recipe.where for word in ("CC BY", "ODbL", "ODC-BY", "License")), name
