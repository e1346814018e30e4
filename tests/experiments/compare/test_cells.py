"""What a stored result of a comparison must hold before it is used, and how a finished run is repeated."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_data import own_data

from mmc_fast.errors import InputError
from mmc_fast.experiments.compare import grid, runs
from mmc_fast.experiments.compare.configs import DataConfig, MethodConfig, load_data
from mmc_fast.experiments.jobs import Result

P = np.array([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
LABELS = {"labels": np.array([0, 1, 1]), "index": np.array([7, 8, 9])}


def cell(metric: str = "auroc", part: str = "test", failed: str | None = None, arrays=None, **values) -> Result:
    names = ("complete", "missing_0.5")
    found = {
        "metric": metric,
        "batch_rows": None,
        "scores": {n: {"score": 0.5} for n in names},
        "realised": {},
    } | values
    whole = LABELS | dict.fromkeys(names, P) if arrays is None else arrays
    return Result({"part": part}, {} if failed else found, whole, failed, 1.0, 1)


def test_a_cell_is_taken_where_its_arrays_are_those_of_its_scores(tmp_path):
    shifted = [P * (1 + 0.9e-3), P * (1 - 0.9e-3)]
    taken = [
        cell(),
        cell(part="validation", arrays={}),
        cell(failed="diverged", arrays={}),
        cell(metric="r2", arrays=LABELS | {"complete": 9 * P - 20, "missing_0.5": P[:, 0]}),
        cell(arrays=LABELS | dict(zip(("complete", "missing_0.5"), shifted, strict=True))),
        cell(arrays={n: a[:0] for n, a in cell().arrays.items()}),
    ]
    for result in taken:
        runs.check_cell(tmp_path / "x.npz", result)


@pytest.mark.parametrize(
    ("name", "array", "metric", "reason"),
    [
        ("missing_0.5", None, "auroc", "predictions are missing"),
        ("index", None, "auroc", "predictions are missing"),
        ("missing_0.5", P[:2], "auroc", r"missing_0.5 is float64 \[2, 2\] beside 3 labels"),
        ("missing_0.5", P.astype(complex), "r2", r"complex128"),
        ("missing_0.5", np.float64(3), "r2", r"float64 \[\]"),
        ("missing_0.5", np.where(P == 0, np.nan, P), "r2", "missing_0.5 holds NaN or infinity"),
        ("labels", np.array([0.0, 1.0, np.inf]), "r2", "labels holds NaN or infinity"),
        ("complete", P + 0.002, "accuracy", "complete holds no class probabilities"),
        ("complete", P * (1 - 2e-3), "auroc", "complete holds no class probabilities"),
        ("complete", np.array([[-0.01, 1.01]] * 3), "auroc", "complete holds no class probabilities"),
        ("complete", np.ones(3), "accuracy", "complete holds no class probabilities"),
    ],
)
def test_a_cell_of_another_form_is_refused(tmp_path, name, array, metric, reason):
    arrays = {n: a for n, a in (cell().arrays | {name: array}).items() if a is not None}
    with pytest.raises(InputError, match=rf"x.npz cannot be used \(.*{reason}"):
        runs.check_cell(tmp_path / "x.npz", cell(metric, arrays=arrays))


def test_what_a_run_is_repeated_from(tmp_path, seed, monkeypatch):
    """A run in a log, from its line and with its number of threads, or a file that holds one."""
    line = {
        "option": "o", "arm": "a", "data": "d", "seed": seed, "settings": {"method": "vanilla"}, "threads": 1,
        "scores": {"complete": 0.5}, "failed": None, "commit": "abc",
    }  # fmt: skip
    failed = [line | {"failed": "x", "scores": scores} for scores in ({}, None)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in (line, *failed)))
    seen, threads = [], torch.get_num_threads()

    def performed(job, folder):
        seen.append((job.settings, torch.get_num_threads()))
        return Result(job.settings, {"scores": {"complete": {"score": 0.5}}}, {}, None, 1.0, 1)

    monkeypatch.setattr(runs, "perform", performed)
    torch.set_num_threads(threads + 1)
    try:
        assert runs.check(tmp_path / "log.jsonl:1") == []
        assert runs.check(tmp_path / "log.jsonl:2") == ["failed", "scores"]
        with monkeypatch.context() as changed:
            changed.setattr(runs, "perform", lambda job, folder: Result(job.settings, {}, {}, "x", 1.0, 1))
            assert runs.check(tmp_path / "log.jsonl:2") == runs.check(tmp_path / "log.jsonl:3") == [], (
                "it diverges again"
            )
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert seen == [({"method": "vanilla"}, 1)] * 2
    for number in ("0", "4", "x", "-1"):
        with pytest.raises(InputError, match="the log has 3 line"):
            runs.check(tmp_path / f"log.jsonl:{number}")
    other = Result({"data": "d"}, {}, {}, None, 1.0, 1)
    monkeypatch.setattr(runs, "read", lambda path: other)
    with pytest.raises(InputError, match="is of no run of a comparison"):
        runs.check(tmp_path / "x.npz")


def test_the_predictions_of_a_repeated_run_are_compared_by_name_and_value(tmp_path, monkeypatch):
    settings = {"method": "vanilla", "part": "test"}
    stored = cell()
    again = [stored.arrays, {n: a for n, a in stored.arrays.items() if n != "index"}, stored.arrays | {"more": P}]
    again.append(stored.arrays | {"complete": P + 1e-9})
    monkeypatch.setattr(runs, "read", lambda path: Result(settings, stored.values, stored.arrays, None, 1.0, 1))
    found = []
    for arrays in again:
        result = Result(settings, stored.values, arrays, None, 2.0, 1)
        monkeypatch.setattr(runs, "perform", lambda job, folder, result=result: result)
        found.append(runs.check(tmp_path / "x.npz"))
    assert found == [[], ["index"], ["more"], ["complete"]]
    broken = Result(settings, stored.values, stored.arrays | {"complete": P + 1}, None, 1.0, 1)
    monkeypatch.setattr(runs, "read", lambda path: broken)
    with pytest.raises(InputError, match="no class probabilities"):
        runs.check(tmp_path / "x.npz")


def test_a_method_for_classes_needs_them_in_all_of_the_data(monkeypatch):
    kinds = {"a": "classification", "b": "survival", "c": "regression"}
    monkeypatch.setattr(grid, "kind_of", kinds.__getitem__)
    methods = [MethodConfig.parse(name, {"method": name}) for name in ("vanilla", "muse", "shaspec")]
    data = [SimpleNamespace(name=f"set {key}", key=key) for key in kinds]
    assert grid.not_for(methods, data[:1]) == {}
    assert grid.not_for(methods, data) == {"muse": "it is for classes, and set b holds a task of survival"}


def test_data_that_need_an_option_say_how_a_comparison_gives_it(tmp_path, seed):
    own_data(tmp_path, seed)
    path = tmp_path / "mine.npz"
    config = DataConfig("mine", str(path))
    assert load_data(config.key) is load_data(DataConfig("other name", str(path)).key), "kept"
    orders = [DataConfig("mine", "x", dict(pairs)).key for pairs in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)])]
    assert orders[0] == orders[1]
    arrays = dict(np.load(path))
    arrays["x_a"][0, 0] = np.nan
    for change, advice in (({}, '`nan_policy = "mean"`'), ({"y": arrays["y"][1:]}, None)):
        np.savez(path, **arrays | change)
        load_data.cache_clear()
        with pytest.raises(InputError) as caught:
            load_data(config.key)
        text = f'Here that is a line {advice} below `data = "{path}"` in a TOML file for --data.'
        assert text in str(caught.value) if advice else "TOML" not in str(caught.value)
