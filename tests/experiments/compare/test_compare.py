"""The grid of the comparison: own data and method configs, search on validation only, resume, sharing, the same numbers again."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score
from training_data import BUDGET, check_one_line, own_data
from typer.testing import CliRunner

from mmc_fast._util.toml import read_toml
from mmc_fast.cli import app
from mmc_fast.errors import InputError
from mmc_fast.experiments import jobs as jobs_module
from mmc_fast.experiments.compare import grid as grid_module
from mmc_fast.experiments.compare.configs import BUDGET as BUDGET_OF_ALL
from mmc_fast.experiments.compare.configs import (
    DataConfig,
    MethodConfig,
    configs_folder,
    fingerprint_of,
    load_data,
    load_data_configs,
    load_method_configs,
)
from mmc_fast.experiments.compare.findings import find
from mmc_fast.experiments.compare.grid import SEARCH_SEED, Grid, run_grid
from mmc_fast.experiments.compare.output import markdown, score_rows
from mmc_fast.experiments.compare.runs import check
from mmc_fast.experiments.jobs import claimed, read
from mmc_fast.experiments.manifest import Manifest
from mmc_fast.experiments.methods import METHODS
from mmc_fast.experiments.training.evaluate import masks_at
from mmc_fast.experiments.training.progress import Silent

ROOT = Path(__file__).resolve().parents[3]


def data_config(folder: Path, seed: int, **options) -> DataConfig:
    load_data.cache_clear()
    fingerprint_of.cache_clear()
    own_data(folder, seed, **options)
    return DataConfig("mine", str(folder / "mine.npz"), {}, BUDGET)


def silent(event) -> None:
    pass


def command(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_two_data_sets_and_a_method_config_of_a_users_own_by_files_alone(tmp_path, seed):
    (tmp_path / "two").mkdir()
    first, second = own_data(tmp_path, seed), own_data(tmp_path / "two", seed + 1, num_classes=3)
    second = second.rename(tmp_path / "two" / "digits.toml")
    row = tmp_path / "wide.toml"
    row.write_text('method = "dropout"\ntitle = "wide"\n[settings]\nencoder_width = 12\n[selected.mine]\nlr = 0.002\n')
    out = tmp_path / "out"
    done = command("--methods", f"vanilla,{row}", "--data", f"{first},{second}", "--seeds", 2, "--tune", "never",
                   "--out", out, "--jobs", 1)  # fmt: skip
    assert done.exit_code == 0, done.output
    for name in ("results.json", "results.md", "report.html", "figures/mine-missing-rates.png"):
        assert (out / name).stat().st_size > 100, name
    with open(out / "results.csv") as file:
        lines = {(r["data"], r["method"], r["metric"], r["condition"]): r for r in csv.DictReader(file)}
    assert ("digits", "wide", "accuracy", "mean missing") in lines
    assert ("digits", "wide", "auprc", "complete") not in lines
    runs = [read(p) for p in sorted((out / "runs" / "mine").glob("wide-*.npz"))]
    assert [r.settings["config"]["lr"] for r in runs] == [0.002, 0.002]
    assert [r.settings["config"]["encoder_width"] for r in runs] == [12, 12]
    for metric, judge in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
        values = [judge(r.arrays["labels"], r.arrays["missing_0.5"][:, 1]) for r in runs]
        found = lines["mine", "wide", metric, "0.5 missing"]
        assert float(found["mean"]) == pytest.approx(np.mean(values), rel=1e-9)
        assert float(found["sd"]) == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    assert lines["mine", "wide", "auroc", "complete"]["pairs"] == "2"


def test_the_search_is_on_validation_only_and_takes_the_best_candidate(tmp_path, seed):
    selected = []
    for spoiled in (False, True):
        folder = tmp_path / str(spoiled)
        folder.mkdir()
        method = MethodConfig.parse("dropout", {"method": "dropout"})
        finished = run_grid(
            Grid([method], [data_config(folder, seed, spoil_test=spoiled)], [0]),
            folder / "out",
            workers=1,
            on_event=silent,
        )
        selected.append(finished.selected["dropout", "mine"])
        record = json.loads((folder / "out" / "selected" / "mine-dropout.json").read_text())
        assert len(record["candidates"]) == len(METHODS["dropout"].search)
        values = []
        for candidate in record["candidates"]:
            result = read(folder / "out" / candidate["file"])
            assert result.settings["part"] == "validation"
            assert result.settings["seed"] == SEARCH_SEED
            assert result.arrays == {}
            s = result.values["scores"]
            values.append((s["complete"]["score"] + (s["missing_0.2"]["score"] + s["missing_0.5"]["score"]) / 2) / 2)
        assert [c["score"] for c in record["candidates"]] == pytest.approx(values)
        assert record["selected"] == METHODS["dropout"].search[values.index(max(values))]
        assert finished.runs[0].job.settings["config"]["lr"] == record["selected"]["lr"]
    assert selected[0] == selected[1]


@pytest.mark.parametrize("column", [None, "b"])
def test_a_run_is_scored_on_its_part_under_the_masks_of_that_part(tmp_path, seed, column):
    plain = data_config(tmp_path, seed)
    data = replace(plain, budget={**plain.budget, "rates_modality": column})
    method = MethodConfig.parse("dropout", {"method": "dropout"})
    grid, dataset = Grid([method], [data], [0]), load_data(data.key)
    fitted = method.plugin.fit(dataset, {"lr": 0.02}, 5, budget=data.budget_with({}))
    for part in ("test", "validation"):
        job, heard = grid.job(method, data, {"lr": 0.02}, part, 5), []
        progress = Silent()
        progress.on_epoch = heard.append
        rows, found = dataset.part(part), jobs_module.perform(job, tmp_path, progress)
        assert [record["epoch"] for record in heard] == [1]
        assert found.values["metric"] == dataset.metric
        masks = {"complete": rows.present}
        for rate in (0.2, 0.5):
            name = f"missing_{rate:g}"
            masks[name], realised = masks_at(rows.present, rate, 5, part, None if column is None else 1)
            assert found.values["realised"][name] == realised
        assert list(found.values["scores"]) == list(masks)
        for name, present in masks.items():
            answers = fitted.predict(rows.features, present)
            assert found.values["scores"][name] == dataset.task.scores(answers, rows.labels)
            if part == "test":
                assert np.array_equal(found.arrays[name], answers.numpy())
                assert np.array_equal(dataset.labels[found.arrays["index"]], found.arrays["labels"])
        assert (part == "test") == bool(found.arrays)


def test_stored_selections_are_taken_and_no_search_is_made(tmp_path, seed):
    method = MethodConfig.parse("dropout", {"method": "dropout", "selected": {"mine": {"lr": 0.5}}})
    data = data_config(tmp_path, seed)
    for tune, searches in (("auto", False), ("always", True), ("never", False)):
        assert Grid([method], [data], [0], tune=tune).searched(method, data) == searches
    (run,) = run_grid(Grid([method], [data], [0]), tmp_path / "out", workers=1, on_event=silent).runs
    assert run.job.settings["config"]["lr"] == 0.5
    assert not (tmp_path / "out" / "search").exists()


def test_the_first_of_equally_good_candidates_is_selected_and_diverged_ones_are_passed_over(tmp_path):
    """By the mean of complete and masked scores; the last of the candidates alone would win by one of the two."""
    method, data = MethodConfig.parse("dropout", {"method": "dropout"}), DataConfig("mine", "mine.npz")
    scores = [(0.9, 0.1, "nan"), (0.6, 0.6, None), (0.7, 0.5, None), (0.8, 0.3, None)]
    results = []
    for n, (complete, missing, failed) in enumerate(scores):
        found = {
            "complete": complete,
            "missing_0.2": missing - 0.1,
            "missing_0.5": missing - 0.1,
            "missing_0.7": missing + 0.2,
        }
        values = {} if failed else {"scores": {name: {"score": v} for name, v in found.items()}}
        results.append((f"file {n}", jobs_module.Result({}, values, {}, failed, 1.0, 1)))
    jobs_module.own_folder(tmp_path, "jobs")
    assert grid_module._select(method, data, results, tmp_path) == method.plugin.search[1]
    grid_module._select(method, replace(data, name="two"), results, tmp_path)
    listed = Manifest.above(tmp_path / "selected" / "two-dropout.json", advice="x")
    assert "selected/mine-dropout.json" in listed
    assert "selected/two-dropout.json" in listed
    record = json.loads((tmp_path / "selected" / "mine-dropout.json").read_text())
    assert (record["seed"], record["part"], record["selected"]) == (SEARCH_SEED, "validation", method.plugin.search[1])
    assert [c["score"] for c in record["candidates"]] == [
        None,
        pytest.approx(0.6),
        pytest.approx(0.6),
        pytest.approx(0.55),
    ]
    assert [c["file"] for c in record["candidates"]] == [f"file {n}" for n in range(4)]
    assert [c["settings"] for c in record["candidates"]] == [dict(s) for s in method.plugin.search]
    assert grid_module._validation_score({"complete": {"score": 0.3}}) == 0.3, "without missing rates"
    with pytest.raises(InputError, match="every candidate of the search diverged"):
        grid_module._select(method, data, results[:1] * 4, tmp_path)


def test_a_finished_run_is_never_repeated_and_a_claimed_one_is_left_alone(tmp_path, seed, monkeypatch):
    methods = [MethodConfig.parse(n, {"method": n}) for n in ("vanilla", "late")]
    grid = Grid(methods, [data_config(tmp_path, seed)], [0], tune="never")
    out = tmp_path / "out"
    job = run_grid(grid, out, workers=1, on_event=silent).runs[1].job

    def refuse(*arguments):
        raise AssertionError("repeated")

    monkeypatch.setattr(jobs_module, "perform", refuse)
    run_grid(grid, out, workers=1, on_event=silent)
    (out / job.path).unlink()
    with claimed(out, job) as mine:
        assert mine
        jobs_module._work((job, out), silent)
        assert not (out / job.path).exists()
    with pytest.raises(AssertionError, match="repeated"):
        jobs_module._work((job, out), silent)


def test_which_of_two_settings_wins(tmp_path, seed):
    """Changes of a call over the budget of the data over that of all; a config's settings over the candidate's."""
    plain = DataConfig("mine", "mine.npz")
    data = replace(plain, budget={"epochs": 7, "batch_size": 5})
    assert plain.budget_with({}) == BUDGET_OF_ALL
    assert (BUDGET_OF_ALL.epochs, BUDGET_OF_ALL.batch_size, BUDGET_OF_ALL.selection) == (30, 64, "masked")
    assert (BUDGET_OF_ALL.unimodal_share, BUDGET_OF_ALL.control) == (0.0, False)
    found = data.budget_with({"epochs": 9})
    assert (found.epochs, found.batch_size, found.selection) == (9, 5, "masked")
    method = MethodConfig.parse("wide", {"method": "muse", "settings": {"lr": 0.3, "options": {"classes": 0.2}}})
    config, options = method.resolve(
        {"lr": 0.1, "modality_dropout": 0.4, "options": {"classes": 0.9, "agreement": 0.8}}, found
    )
    assert (config.lr, config.modality_dropout, config.epochs) == (0.3, 0.4, 9)
    assert options == {"classes": 0.2, "agreement": 0.8}
    assert (method.name, method.title) == ("wide", "MUSE")
    assert MethodConfig.parse("x", {"method": "muse", "title": "Own"}).title == "Own"
    mine = data_config(tmp_path, seed)
    job = Grid([method], [mine], [0], {"epochs": 4}).job(method, mine, {"lr": 0.1}, "test", 3)
    assert (job.name, job.stage) == ("runs/mine/wide-3", "runs")
    config = job.settings["config"]
    assert (config["epochs"], config["batch_size"], config["lr"]) == (4, BUDGET["batch_size"], 0.3)
    assert (job.settings["method"], job.settings["options"], job.settings["seed"]) == ("muse", {"classes": 0.2}, 3)
    searched = Grid([method], [mine], [0]).job(method, mine, {}, "validation", 900)
    assert (searched.name, searched.stage, searched.settings["part"]) == (
        "search/mine/wide-900",
        "search",
        "validation",
    )


def test_files_of_a_data_config_are_found_beside_it(tmp_path):
    (tmp_path / "own.csv").write_text("id,y,x,z\n0,0,1,1\n")
    (tmp_path / "map.toml").write_text('id = "id"\nlabel = "y"\n[modalities]\na = ["x"]\nb = ["z"]\n')
    config = DataConfig.parse("d", {"data": "own.csv", "columns": "map.toml", "split_seed": 0}, tmp_path)
    assert (config.data, config.options["columns"]) == (str(tmp_path / "own.csv"), str(tmp_path / "map.toml"))
    assert config.options["split_seed"] == 0
    assert json.loads(config.key) == [config.data, dict(config.options)]
    assert DataConfig.parse("mfeat", {"data": "mfeat"}, tmp_path).data == "mfeat"
    for values, said in (
        ({}, "'data' is None"),
        ({"data": "mfeat", "budget": 3}, "'budget' is 3"),
        ({"data": "mfeat", "bugdet": {}}, "budget"),
    ):
        with pytest.raises(InputError, match=said):
            DataConfig.parse("d", values)


def test_the_seed_of_the_search_is_none_of_a_test_run(tmp_path, seed):
    method, data = MethodConfig.parse("vanilla", {"method": "vanilla"}), data_config(tmp_path, seed)
    Grid([method], [data], range(SEARCH_SEED))
    with pytest.raises(InputError, match="that of the search"):
        Grid([method], [data], [0, SEARCH_SEED])


def test_another_seed_setting_part_or_content_is_another_run(tmp_path, seed):
    data, method = data_config(tmp_path, seed), MethodConfig.parse("vanilla", {"method": "vanilla"})
    grid = Grid([method], [data], [0])
    jobs = [
        grid.job(method, data, {}, "test", 0),
        grid.job(method, data, {}, "test", 1),
        grid.job(method, data, {"lr": 0.1}, "test", 0),
        grid.job(method, data, {}, "validation", 0),
        Grid([method], [data], [0], {"epochs": 9}).job(method, data, {}, "test", 0),
    ]
    assert grid.job(method, data, {}, "test", 0).key == jobs[0].key
    renamed = MethodConfig.parse("other", {"method": "vanilla"})
    assert grid.job(renamed, data, {}, "test", 0).key == jobs[0].key  # names are for people
    data_config(tmp_path, seed + 1)  # other content under the same path
    jobs.append(grid.job(method, data, {}, "test", 0))
    assert len({job.key for job in jobs}) == len(jobs)
    with pytest.raises(InputError, match="the data mine have changed"):
        jobs_module.perform(jobs[0], tmp_path)


@pytest.mark.parametrize("name", ["vanilla", "smil", "muse"])
def test_a_run_gives_the_same_numbers_again_and_a_changed_one_does_not(tmp_path, seed, name):
    grid = Grid([MethodConfig.parse(name, {"method": name})], [data_config(tmp_path, seed)], [3], tune="never")
    (run,) = run_grid(grid, tmp_path / "out", workers=1, on_event=silent).runs
    path = tmp_path / "out" / run.job.path
    assert check(path) == []
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files}
    arrays["missing_0.5"] = arrays["missing_0.5"][::-1]
    np.savez(path, **arrays)
    with pytest.raises(InputError, match="changed or exchanged"):
        check(path)
    Manifest.above(path, advice="x").add([path])  # as if it had been written so
    assert check(path) == ["missing_0.5"]
    done = command("--check", path)
    assert done.exit_code == 1
    assert "missing_0.5" in done.output


@pytest.mark.slow
def test_killed_at_random_and_resumed_by_two_processes_gives_the_numbers_of_an_undisturbed_grid(tmp_path, seed):
    data = own_data(tmp_path, seed)
    text = data.read_text().replace("epochs = 1", "epochs = 4")
    data.write_text(text)

    def start(out: str, jobs: int = 1) -> subprocess.Popen:
        arguments = ["--methods", "vanilla,consistency,shaspec", "--data", str(data), "--seeds", "3", "--tune", "never"]
        code = [
            sys.executable,
            "-m",
            "mmc_fast",
            "compare",
            *arguments,
            "--out",
            str(tmp_path / out),
            "--jobs",
            str(jobs),
        ]
        root = str(ROOT)
        env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(code, env=env, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    first = start("killed")
    end = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("runs/mine/*.npz")) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(seed % 100 / 1000)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("runs/mine/*.npz")}
    assert done
    both = [start("killed"), start("killed")]
    whole = start("whole")
    for process in [*both, whole]:
        assert process.wait(300) == 0, process.stderr.read().decode()
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    names = sorted(p.name for p in (tmp_path / "whole").glob("runs/mine/*.npz"))
    assert len(names) == 9
    assert names == sorted(p.name for p in (tmp_path / "killed").glob("runs/mine/*.npz"))
    for name in names:
        a, b = (read(tmp_path / out / "runs" / "mine" / name) for out in ("killed", "whole"))
        assert a.values["scores"] == b.values["scores"]
        assert all(np.array_equal(a.arrays[k], b.arrays[k]) for k in a.arrays)
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("killed", "whole")]
    for r in results:
        for key in ("time of this call", "time of all test runs"):
            r["facts"].pop(key)
        for facts in (m for f in r["data_sets"] for m in f["methods"].values()):
            facts.pop("seconds")
    assert results[0] == results[1]


def test_several_workers_give_the_same_numbers_as_one(tmp_path, seed):
    grid = Grid(
        [MethodConfig.parse("vanilla", {"method": "vanilla"})], [data_config(tmp_path, seed)], [0, 1], tune="never"
    )
    one, two = (run_grid(grid, tmp_path / str(n), workers=n, on_event=silent) for n in (1, 2))
    assert one.selected == two.selected == {("vanilla", "mine"): METHODS["vanilla"].search[0]}
    for a, b in zip(one.runs, two.runs, strict=True):
        assert a.result.values["scores"] == b.result.values["scores"]


def test_a_method_that_diverges_is_a_result(tmp_path, seed):
    methods = [MethodConfig.parse("vanilla", {"method": "vanilla"}),
               MethodConfig.parse("wild", {"method": "shaspec", "settings": {"lr": 1e30, "optimizer": "sgd"}})]  # fmt: skip
    grid = Grid(methods, [data_config(tmp_path, seed)], [0, 1], {"epochs": 3}, tune="never")
    finished = run_grid(grid, tmp_path / "out", workers=1, on_event=silent)
    (found,) = find(finished, methods, resamples=20)
    assert found.methods["wild"].diverged == (0, 1)
    assert "wild" not in found.main.scores
    marked = {line[0]: line[1:] for line in score_rows(found, found.main.metric)}
    assert set(marked["ShaSpec †§"]) == {"–"}  # diverged, so the threshold could not be judged either
    assert "§ diverged with 2 seed(s): ShaSpec. † not judged: ShaSpec." in markdown([found])


def test_every_stored_config_can_be_read():
    names = sorted(p.stem for p in (configs_folder() / "methods").glob("*.toml"))
    for method in load_method_configs([*names, *METHODS]):  # one without a file has its defaults
        assert method.title
        for selected in method.selected.values():
            assert dict(selected) in [dict(c) for c in method.plugin.search], (
                f"{method.name}: no candidate of the search"
            )
    data = sorted(p.stem for p in (configs_folder() / "data").glob("*.toml"))
    assert {"mfeat", "support2", "avmnist-hard"} <= set(data)
    load_data_configs(data)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "vanilla,vanilla"), "name at least one, and each once"),
        (("--methods", "vanilla", "--data", "mfeet"), "Did you mean 'mfeat'"),
        (("--methods", "vanilla", "--data", "nowhere.npz"), "nowhere.npz"),
        (("--methods", "nowhere.toml"), "cannot be read"),
        (("--rates", "x"), "separated by commas"),
        (("--check", "nowhere.npz"), "cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, arguments, words):
    out = tmp_path / "out"
    done = command(*arguments, "--out", out)
    assert done.exit_code == 2, done.output
    assert words in done.output
    check_one_line(InputError(done.output.strip()))
    assert not out.exists() or not list(out.glob("runs/**/*.npz"))


def test_a_foreign_folder_and_a_broken_result_are_refused(tmp_path, seed):
    data = own_data(tmp_path, seed)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    done = command("--methods", "vanilla", "--data", data, "--tune", "never", "--out", foreign)
    assert done.exit_code == 2
    assert "holds no comparison" in done.output
    out = tmp_path / "out"
    arguments = ("--methods", "vanilla", "--data", data, "--tune", "never", "--seeds", 1, "--out", out, "--jobs", 1)
    assert command(*arguments).exit_code == 0
    path = next(out.glob("runs/mine/*.npz"))
    path.write_bytes(path.read_bytes()[:200])
    done = command(*arguments)
    assert done.exit_code == 2
    assert "remove it and repeat" in done.output


def test_selections_are_stored_as_tables_that_read_back(tmp_path, seed, monkeypatch):
    spec = importlib.util.spec_from_file_location("store_selected", ROOT / "tools" / "store_selected.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    methods = tmp_path / "methods"
    methods.mkdir()
    (methods / "shaspec.toml").write_text('method = "shaspec"\n[selected.other]\nlr = 0.1\n')
    monkeypatch.setattr(tool, "METHODS", methods)
    data = data_config(tmp_path, seed)
    grid = Grid([MethodConfig.parse("shaspec", {"method": "shaspec"})], [data], [0])
    finished = run_grid(grid, tmp_path / "out", workers=1, on_event=silent)
    assert tool.main(tmp_path / "out") == 0
    method = MethodConfig.parse("shaspec", read_toml(methods / "shaspec.toml"))
    assert method.selected == {"other": {"lr": 0.1}, "mine": finished.selected["shaspec", "mine"]}
    again = run_grid(Grid([method], [data], [0]), tmp_path / "out", workers=1, on_event=silent)
    assert [run.job for run in again.runs] == [run.job for run in finished.runs]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('title = "no method"', "give the name of a method"),
        ('method = "muse"\ntitle = 3', "give a text"),
        ('method = "muse"\nsetings = 3', "Did you mean 'settings'"),
        ('method = "muse"\n[settings]\nepoch = 3', "Did you mean 'epochs'"),
        ('method = "muse"\n[selected]\nmine = 3', "give a table"),
        ('method = "muse"\n[selected.mine.options]\nlayers = 3', "option 'layers' does not exist"),
    ],
)
def test_a_method_config_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "config.toml").write_text(text + "\n")
    done = command("--methods", tmp_path / "config.toml", "--data", "mfeat", "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert words in done.output
    check_one_line(InputError(done.output.strip()))


def test_without_rates_there_is_complete_data_only(tmp_path, seed):
    data, out = own_data(tmp_path, seed), tmp_path / "out"
    done = command("--methods", "vanilla,late", "--data", data, "--seeds", 1, "--tune", "never", "--rates", "none",
                   "--out", out, "--jobs", 1, "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)[0]
    assert found["comparisons"]["auroc"]["conditions"] == ["complete"]
    assert {t["condition"] for t in found["tests"]} == {"complete"}
