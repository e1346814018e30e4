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
    wanted = load_run(folder / "run").predict(folder / "new.npz").probabilities.numpy()
    np.testing.assert_allclose(found[["p_0", "p_1"]].to_numpy(), wanted, rtol=1e-6)
    assert found["prediction"].astype(str).tolist() == [str(i) for i in wanted.argmax(1)]
    assert found["modalities"].tolist() == ["a"] * 7


def test_an_ending_that_cannot_be_written_is_refused_before_anything_is_read(folder: Path):
    _, err = run("predict", "--run", folder / "none", "--data", "x.npz", "--out", folder / "p.xlsx", code=2)
    assert ".csv or .parquet" in err
