"""``mmc-fast predict`` and ``evaluate --data`` from outside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run

from mmc_fast.experiments.training import load_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """own.npz, shifted.npz (the same in other units), new.npz (no labels, one modality) and a run on the first."""
    folder = tmp_path_factory.mktemp("predict")
    g = np.random.default_rng(0)
    y = np.arange(180) % 2
    own = {"x_a": y[:, None] + g.normal(size=(180, 3)), "x_b": y[:, None] + g.normal(size=(180, 2))}
    np.savez(folder / "own.npz", **own, y=y, split=np.arange(180) // 2 % 3)
    other = {name: x * 10 + 100 for name, x in own.items()}
    np.savez(folder / "shifted.npz", **other, y=y)
    np.savez(folder / "new.npz", x_a=own["x_a"][:7])
    run("train", "--data", folder / "own.npz", "--method", "vanilla", "--epochs", "3", "--run-dir", folder / "run")
    return folder


def test_other_units_show_as_a_shift_and_change_the_score(folder: Path):
    own = json.loads(run("evaluate", "--run", folder / "run", "--json")[0])
    out, _ = run("evaluate", "--run", folder / "run", "--data", folder / "shifted.npz", "--json")
    other = json.loads(out)
    assert own["same_data"]
    assert not other["same_data"]
    assert own["scores"]["complete"] > other["scores"]["complete"] + 0.1
    assert other["scores"]["rows"] == 180  # the file states no split
    assert all(entry["far"] and entry["outside"] > 0.9 for entry in other["shift"])
    assert not any(entry["outside"] > 0.2 for entry in own["shift"])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_predictions_in_a_file_are_those_of_python(folder: Path, ending: str):
    import pandas

    path = folder / "out" / f"p.{ending}"
    _, err = run("predict", "--run", folder / "run", "--data", folder / "new.npz", "--out", path)
    assert "modalities that no row has: b" in err
    found = pandas.read_csv(path) if ending == "csv" else pandas.read_parquet(path)
    wanted = load_run(folder / "run").predict(folder / "new.npz").answers.numpy()
    np.testing.assert_allclose(found[["p_0", "p_1"]].to_numpy(), wanted, rtol=1e-6)
    assert found["prediction"].astype(str).tolist() == [str(i) for i in wanted.argmax(1)]
    assert found["modalities"].tolist() == ["a"] * 7


def test_an_ending_that_cannot_be_written_is_refused_before_anything_is_read(folder: Path):
    _, err = run("predict", "--run", folder / "none", "--data", "x.npz", "--out", folder / "p.xlsx", code=2)
    assert ".csv or .parquet" in err


def test_tables_from_training_to_a_shifted_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of tables trains; one table in other units is evaluated and predicted, with the class names kept."""
    import pandas

    monkeypatch.chdir(tmp_path)
    g = np.random.default_rng(0)
    y = np.arange(160) % 2
    ids = [f"p{i:03}" for i in range(160)]
    labs = pandas.DataFrame({"who": ids, "na": 140 + 3 * y + g.normal(size=160)})
    stay = pandas.DataFrame({"who": ids, "unit": np.array(["icu", "ward"])[g.integers(0, 2, 160)]})
    end = pandas.DataFrame({"who": ids, "fate": np.array(["alive", "dead"])[y]})
    Path("all").mkdir()
    for name, frame in {"labs": labs[5:], "stay": stay, "end": end}.items():
        frame.to_csv(Path("all") / f"{name}.csv", index=False)
    Path("all/columns.toml").write_text('label = "fate"\nid = "who"\n')
    run("train", "--data", "all", "--method", "vanilla", "--epochs", "3", "--run-dir", "run")
    own = json.loads(run("evaluate", "--run", "run", "--json")[0])
    assert own["same_data"]
    one = labs.merge(stay).merge(end)
    one.to_csv("same.csv", index=False)
    one.assign(na=one["na"] * 10 + 100).to_csv("cohort.csv", index=False)
    same = json.loads(run("evaluate", "--run", "run", "--data", "same.csv", "--json")[0])
    cohort = json.loads(run("evaluate", "--run", "run", "--data", "cohort.csv", "--json")[0])
    assert same["scores"]["rows"] == cohort["scores"]["rows"] == 160
    assert same["scores"]["complete"] > cohort["scores"]["complete"] + 0.1
    assert [e["column"] for e in cohort["shift"] if e["far"]] == ["na"]
    stay.drop(columns="unit").assign(na=140.0).to_parquet("new.parquet", index=False)
    _, err = run("predict", "--run", "run", "--data", "new.parquet", "--out", "p.csv")
    assert "modalities that no row has: stay" in err
    found = pandas.read_csv("p.csv")
    assert found["id"].tolist() == ids
    assert set(found["prediction"]) <= {"alive", "dead"}
    assert list(found.columns) == ["id", "prediction", "p_alive", "p_dead", "modalities"]
