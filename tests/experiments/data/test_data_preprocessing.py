"""A finished run on new rows: its own scaling and columns, whatever the rows hold, and a report of what differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmc_fast.errors import InputError
from mmc_fast.experiments.data import load, synthetic
from mmc_fast.experiments.data.preprocessing import Preprocessing, ViewColumns, shift
from mmc_fast.experiments.data.scaler import ViewScaler
from mmc_fast.experiments.tasks import Classification
from mmc_fast.experiments.training import LoadedRun, TrainConfig, load_run, train
from mmc_fast.experiments.training.rows import shift_lines

LABS, NOTES = ["na", "k", "ph"], ["n1", "n2"]


def arrays(rows: int, seed: int, gaps: int | None = None) -> dict[str, np.ndarray]:
    """Two modalities; column ``gaps`` of labs has values that were not measured."""
    g = np.random.default_rng(seed)
    y = np.arange(rows) % 2
    labs = 140 + 5 * (y[:, None] + g.normal(size=(rows, 3)))
    if gaps is not None:
        labs[g.random(rows) < 0.3, gaps] = np.nan
    return {"x_labs": labs, "x_notes": y[:, None] + g.normal(size=(rows, 2)), "y": y, "ids": np.arange(rows) + 1000}


def save(path: Path, values: dict[str, np.ndarray], labs: list[str] = LABS, **more: np.ndarray) -> Path:
    np.savez(path, **values, names_labs=np.array(labs), names_notes=np.array(NOTES), **more)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    folder = tmp_path_factory.mktemp("run")
    path = save(folder / "own.npz", arrays(150, 0, gaps=0), split=np.arange(150) % 3)
    config = TrainConfig.preset("ebr", epochs=2, control=False, rates=())
    train(load(path, nan_policy="indicator"), config, seed=0, run_dir=folder / "run")
    return load_run(folder / "run")


def test_new_rows_are_scaled_by_the_training_rows_of_the_run(finished: LoadedRun, tmp_path: Path):
    train_rows, new = arrays(150, 0, gaps=0)["x_labs"][::3], arrays(40, 1, gaps=2)
    path = save(tmp_path / "new.npz", {k: v for k, v in new.items() if k != "y"})
    found = load(path, preprocessing=finished.preprocessing, purpose="prediction").features["labs"].numpy()
    mean, std = np.nanmean(train_rows, 0), np.nanstd(train_rows, 0)
    wanted = np.nan_to_num((new["x_labs"] - mean) / std, nan=0.0)  # a gap becomes the training mean
    np.testing.assert_allclose(found[:, :3], wanted, rtol=1e-5, atol=1e-6)
    assert np.array_equal(found[:, 3], np.ones(40))  # the indicator of "na", the column with gaps in training


def test_columns_in_another_order_and_arrays_give_the_same_predictions(finished: LoadedRun, tmp_path: Path):
    new = arrays(40, 2)
    same = finished.predict(save(tmp_path / "a.npz", new)).answers
    turned = new | {"x_labs": np.c_[new["x_labs"][:, [2, 0, 1]], np.ones(40)]}
    other = finished.predict(save(tmp_path / "b.npz", turned, ["ph", "na", "k", "extra"]))
    assert torch.equal(other.answers, same)
    assert (other.differences["new_columns"], other.differences["missing_columns"]) == ({"labs": ["extra"]}, {})
    assert other.rows == [str(i) for i in range(1000, 1040)]
    order = finished.predict(save(tmp_path / "c.npz", new | {"x_labs": new["x_labs"][:, [2, 0, 1]]}, ["ph", "na", "k"]))
    assert torch.equal(order.answers, same)
    fewer = finished.predict(save(tmp_path / "d.npz", new | {"x_labs": new["x_labs"][:, [1, 0]]}, ["k", "na"]))
    assert (fewer.differences["new_columns"], fewer.differences["missing_columns"]) == ({}, {"labs": ["ph"]})


def test_a_cohort_without_a_modality_is_that_of_rows_which_lack_it(finished: LoadedRun, tmp_path: Path):
    new = arrays(30, 3)
    np.savez(tmp_path / "a.npz", x_notes=new["x_notes"])
    lacks = finished.predict(tmp_path / "a.npz")
    marked = finished.predict(save(tmp_path / "b.npz", new, present_labs=np.zeros(30, bool)))
    assert torch.equal(lacks.answers, marked.answers)
    assert lacks.differences["absent_modalities"] == ["labs"]
    assert lacks.present.tolist() == [[False, True]] * 30


def test_rows_with_nothing_get_the_class_shares_and_are_told(finished: LoadedRun, tmp_path: Path):
    new = arrays(10, 4)
    new["x_labs"][0], new["x_notes"][0] = np.nan, np.nan
    found = finished.predict(save(tmp_path / "a.npz", new))
    assert found.answers[0].tolist() == pytest.approx([0.5, 0.5])
    assert "1 row(s) have no modality" in found.report()[-1]


def test_no_prediction_depends_on_other_rows(finished: LoadedRun, tmp_path: Path):
    new = arrays(60, 5, gaps=1)
    whole = finished.predict(save(tmp_path / "a.npz", new)).answers
    changed = {k: v.copy() for k, v in new.items()}
    changed["x_labs"][1:], changed["x_notes"][1:] = 1e6, np.nan
    other = finished.predict(save(tmp_path / "b.npz", changed)).answers
    single = finished.predict(save(tmp_path / "c.npz", {k: v[:1] for k, v in new.items()})).answers
    torch.testing.assert_close(other[0], whole[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(single[0], whole[0], rtol=0, atol=1e-6)


def test_shift_is_the_standardised_difference_and_the_share_outside(finished: LoadedRun, tmp_path: Path):
    train_rows, new = arrays(150, 0, gaps=0)["x_labs"][::3], arrays(50, 6)
    new["x_labs"][:, 1] = new["x_labs"][:, 1] * 10 + 100
    found = {e["column"]: e for e in finished.predict(save(tmp_path / "a.npz", new)).shift}
    for j, name in enumerate(LABS):
        known, x = train_rows[~np.isnan(train_rows[:, j]), j], new["x_labs"][:, j]
        assert found[name]["difference"] == pytest.approx((x.mean() - known.mean()) / known.std(), abs=1e-5)
        assert found[name]["outside"] == pytest.approx(((x < known.min()) | (x > known.max())).mean(), abs=1e-5)
    assert found["na"]["training_measured"] == pytest.approx((~np.isnan(train_rows[:, 0])).mean(), abs=1e-5)
    assert found["k"]["far"]


def test_preprocessing_survives_its_file(finished: LoadedRun):
    stored = finished.preprocessing
    assert stored is not None
    again = Preprocessing.from_dict(stored.to_dict())
    assert again.to_dict() == stored.to_dict()
    assert again.views["labs"].scaler.std.dtype == np.float64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {"x_other": a["x_labs"]}, "none of the modalities of the run is there"),
        (lambda a: {"x_labs": a["x_labs"][:, :2]}, "2 columns without names and the run was trained on 3"),
        (lambda a: {"x_labs": a["x_labs"] * np.inf}, "holds inf"),
    ],
)
def test_what_cannot_be_used_is_refused(finished: LoadedRun, tmp_path: Path, change, said: str):
    np.savez(tmp_path / "a.npz", **change(arrays(10, 0)))
    with pytest.raises(InputError, match=said):
        finished.predict(tmp_path / "a.npz")


def test_a_data_set_of_other_modalities_is_refused(finished: LoadedRun) -> None:
    with pytest.raises(InputError, match="modalities"):
        finished.predict(synthetic(60, modalities=2, num_classes=2))


def test_shift_compares_with_the_training_rows_and_knows_the_thresholds(seed: int) -> None:
    """Against formulas over whole columns, on more rows than are read at a time; each column stands at one side of a limit."""
    g = np.random.default_rng(seed)
    columns = [
        "same",
        "outside 6 %",
        "outside 4 %",
        "far",
        "near",
        "gaps",
        "never here",
        "never in training",
        "constant",
    ]
    n, d = 10_000, len(columns)
    trained = g.uniform(-1, 1, (397, d))
    trained[:, 7], trained[:, 8] = np.nan, 2.0
    trained[::4, 0] = np.nan
    scaler = ViewScaler.fit(trained, np.ones(397, bool), indicator=False, standardise=True)
    new = g.uniform(-0.7, 0.7, (n, d)) + scaler.mean
    new[:, 8] = 2.0
    for j, share in ((1, 0.06), (2, 0.04)):
        ends = np.arange(round(share * n))
        new[ends, j] = np.where(ends % 2, scaler.low[j] - 1e-3, scaler.high[j] + 1e-3)  # at both ends: the mean stays
    for j, distance in ((3, 0.30), (4, 0.26)):  # 0.25 and three standard errors are 0.28
        new[:, j] += distance * scaler.std[j]
    new[g.random(n) < 0.3, 5] = np.nan
    new[:, 6] = np.nan
    present = g.random(n) < 0.95
    present[: round(0.06 * n)] = True
    pre = Preprocessing({"v": ViewColumns(columns, scaler)}, "mean", Classification.of(2))
    found = shift(pre, {"v": new.astype(np.float32)}, {"v": present})
    rows = new.astype(np.float32).astype(float)[present]
    assert [e["column"] for e in found] == columns
    for j, entry in enumerate(found):
        x, t = rows[~np.isnan(rows[:, j]), j], trained[~np.isnan(trained[:, j]), j]
        assert entry["measured"] == round(len(x) / len(rows), 6)
        assert entry["training_measured"] == round(len(t) / 397, 6)
        if len(x) and len(t):
            assert entry["outside"] == pytest.approx(((x < t.min()) | (x > t.max())).mean(), abs=1e-6)
        if len(x) and len(t) and t.std() > 0:
            assert entry["difference"] == pytest.approx((x.mean() - t.mean()) / t.std(), abs=1e-5)
        else:
            assert entry["difference"] is None
    assert [e["column"] for e in found if e["far"]] == ["outside 6 %", "far"]


@pytest.mark.parametrize(("values", "far"), [([2.0] + [0.0] * 19, False), ([2.0, 2.0] + [0.0] * 18, True),
                                             ([1.0] * 16, False), ([1.0] * 17, True),
                                             ([2.0] + [0.0] * 18 + [np.nan] * 5, True)])  # fmt: skip
def test_a_column_is_far_beyond_its_limits_not_at_them(values: list[float], far: bool) -> None:
    """One value of twenty outside is 5 %; a mean of 1 s.d. is 0.25 + 3 / sqrt(16)."""
    scaler = ViewScaler.fit(np.array([[-1.0], [1.0]]), np.ones(2, bool), indicator=False, standardise=True)
    pre = Preprocessing({"v": ViewColumns(["c"], scaler)}, "mean", Classification.of(2))
    (found,) = shift(pre, {"v": np.array(values)[:, None]}, {"v": np.ones(len(values), bool)})
    assert found["far"] is far


def test_what_a_user_should_know_is_told_the_farthest_columns_first():
    entry = {"modality": "labs", "far": True}
    shifts = [
        entry | {"column": "near", "outside": 0.0, "difference": 0.1, "far": False},
        entry | {"column": "small", "outside": 0.1, "difference": None},
        entry | {"column": "low", "outside": 0.1, "difference": -2.0},
        entry | {"column": "up", "outside": 0.1, "difference": 1.0},
        entry | {"column": "out", "outside": 0.505, "difference": 0.25},
    ]
    differences = {
        "absent_modalities": ["notes"], "new_modalities": ["x", "y"], "missing_columns": {"labs": ["k"]},
        "new_columns": {"labs": [f"c{n}" for n in range(9)]}, "unknown_categories": {"labs": [f"v{n}" for n in range(8)]},
    }  # fmt: skip
    assert shift_lines({"differences": differences, "shift": shifts}) == [
        "modalities that no row has: notes",
        "modalities that the model does not know, not used: x, y",
        "labs: columns that are not there, taken as not measured: k",
        "labs: columns that the model does not know, not used: c0, c1, c2, c3, c4, c5, c6, c7 and 1 more",
        "labs: values that are no category of training, taken as 'other': v0, v1, v2, v3, v4, v5, v6, v7",
        "4 of 5 columns are far from the training data, the farthest first:",
        "  labs out: 50% outside of the training range, mean +0.25 training s.d. away",
        "  labs low: 10% outside of the training range, mean -2.00 training s.d. away",
        "  labs up: 10% outside of the training range, mean +1.00 training s.d. away",
        "  labs small: 10% outside of the training range",
    ]
    assert len(shift_lines({"shift": shifts[1:] * 5})) == 1 + 10
    assert shift_lines({}) == shift_lines({"differences": {}, "shift": shifts[:1]}) == []


def test_a_table_of_predictions_names_the_rows_and_what_each_had(finished: LoadedRun, tmp_path: Path):
    new = arrays(4, 7)
    present = np.array([True, False, True, True])
    new["x_notes"][3] = np.nan
    found = finished.predict(save(tmp_path / "a.npz", new, present_labs=present))
    assert found.table()["modalities"].tolist() == ["labs+notes", "notes", "labs+notes", "labs"]
    assert found.table()["id"].tolist() == ["1000", "1001", "1002", "1003"]
    assert found.table()["prediction"].tolist() == [finished.model.task.names[i] for i in found.answers.argmax(1)]
    del new["ids"]
    assert finished.predict(save(tmp_path / "b.npz", new)).table()["row"].tolist() == [0, 1, 2, 3]
