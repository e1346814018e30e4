"""``mmc-fast data``: the list, a set made from its publisher's files, checks, one line on what is missing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import command_line
import numpy as np
import pytest

HEAD = "age,sex,hospdead,dzgroup,num.co,edu,income,scoma,race,hday,diabetes,dementia,ca,meanbp,wblc,hrt,resp,temp,pafi,alb,"
HEAD += "bili,crea,sod,ph,glucose,bun,urine,adlp,adls\n"
LINE = "6{},male,{},Coma,0,11,,3,white,1,0,1,no,97,6,,22,36,388,1.8,.2,1.2,141,7.45,,,,7,\n"


run = partial(command_line.run, "data")


@pytest.fixture
def originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "originals"
    folder.mkdir()
    (folder / "support2.csv").write_text(HEAD + "".join(LINE.format(i % 10, int(i % 3 == 0)) for i in range(30)))
    return folder


def test_list_names_every_set_its_licence_and_its_place() -> None:
    found = {row["name"]: row for row in json.loads(run("list", "--json")[0])}
    assert (found["mfeat"]["found"], found["mimic4"]["found"]) == (True, False)
    assert "credentialed users only" in found["mimic4"]["get"]
    text = run("list")[0]
    assert "ODbL 1.0" in text
    assert "p2012: set-a.tar.gz" in text


def test_prepare_then_check(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = run("prepare", "support2", "--from", originals, "--unverified")
    assert "whole; made from originals that no check sum verified" in out
    assert f"export MMC_DATA={tmp_path / 'data'}" in out
    monkeypatch.setenv("MMC_DATA", str(tmp_path / "elsewhere"))
    made = json.loads(run("prepare", "support2", "--from", originals, "--unverified", "--json")[0])
    path = tmp_path / "elsewhere/support2.npz"
    assert Path(made["path"]) == path
    assert path.read_bytes() == (tmp_path / "data/support2.npz").read_bytes()
    with np.load(path, allow_pickle=False) as file:
        assert file["y"].tolist() == [int(i % 3 == 0) for i in range(30)]
    assert json.loads(run("check", "--json")[0])["mimic4"] == "not here"
    assert "mimic4: not here" in run("check", "mimic4", code=1)[0]
    path.write_bytes(path.read_bytes()[:-60])
    assert "support2: damaged" in run("check", code=1)[0]


def test_what_is_wrong_is_one_line(originals: Path) -> None:
    for arguments, message in (
        (("prepare", "support2", "--from", originals), "support2.csv has 30 rows, the release has 9105"),
        (("prepare", "p2012", "--from", originals), "missing in"),
        (("prepare", "p2013", "--from", originals), "Did you mean 'p2012'?"),
        (("prepare", "p2012", "--from", originals / "none"), "no such folder"),
        (("check", "nothing"), "Unknown data set 'nothing'"),
    ):
        _, err = run(*arguments, code=2)
        assert message in err
        assert err.count("\n") == 1
