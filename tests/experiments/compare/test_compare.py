"""The grid of the comparison: own data and rows, search on validation only, resume, sharing, the same numbers again."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score
from training_data import BUDGET, check_one_line, own_data
from typer.testing import CliRunner

from mmc_fast.cli import app
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare import grid as grid_module
from mmc_fast.experiments.compare.cells import claimed, read_cell, recompute
from mmc_fast.experiments.compare.grid import SEARCH_SEED, Grid, run_grid
from mmc_fast.experiments.compare.rows import Row, Source, configs_folder, load_source
from mmc_fast.experiments.methods import METHODS
from mmc_fast.experiments.training.parse import read_toml

ROOT = Path(__file__).resolve().parents[3]


def source(folder: Path, seed: int, **options) -> Source:
    load_source.cache_clear()
    own_data(folder, seed, **options)
    return Source("mine", str(folder / "mine.npz"), {}, BUDGET)


def silent(event) -> None:
    pass


def command(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_two_data_sets_and_a_row_of_a_users_own_by_files_alone(tmp_path, seed):
    load_source.cache_clear()
    (tmp_path / "two").mkdir()
    first, second = own_data(tmp_path, seed), own_data(tmp_path / "two", seed + 1, num_classes=3)
    second = second.rename(tmp_path / "two" / "digits.toml")
    row = tmp_path / "wide.toml"
    row.write_text('method = "dropout"\ntitle = "wide"\n[settings]\nencoder_width = 12\n[chosen.mine]\nlr = 0.002\n')
    out = tmp_path / "out"
    done = command("--methods", f"vanilla,{row}", "--data", f"{first},{second}", "--seeds", 2, "--tune", "never",
                   "--out", out, "--jobs", 1)  # fmt: skip
    assert done.exit_code == 0, done.output
    for name in ("results.json", "results.md", "report.html", "figures/mine-missing-rates.png"):
        assert (out / name).stat().st_size > 100, name
    with open(out / "results.csv") as file:
        lines = {(r["data"], r["row"], r["metric"], r["condition"]): r for r in csv.DictReader(file)}
    assert ("digits", "wide", "accuracy", "mean missing") in lines
    assert ("digits", "wide", "auprc", "complete") not in lines
    cells = [read_cell(p) for p in sorted((out / "cells" / "mine").glob("wide-*.npz"))]
    assert [meta["cell"]["config"]["lr"] for meta, _ in cells] == [0.002, 0.002]
    assert [meta["cell"]["config"]["encoder_width"] for meta, _ in cells] == [12, 12]
    for metric, judge in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
        values = [judge(a["labels"], a["missing_0.5"][:, 1]) for _, a in cells]
        found = lines["mine", "wide", metric, "0.5 missing"]
        assert float(found["mean"]) == pytest.approx(np.mean(values), rel=1e-9)
        assert float(found["sd"]) == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    assert lines["mine", "wide", "auroc", "complete"]["pairs"] == "2"


def test_the_search_is_on_validation_only_and_takes_the_best_candidate(tmp_path, seed):
    chosen = []
    for spoiled in (False, True):
        folder = tmp_path / str(spoiled)
        folder.mkdir()
        grid = Grid([Row.parse("dropout", {"method": "dropout"})], [source(folder, seed, spoil_test=spoiled)], [0])
        settings, cells = run_grid(grid, folder / "out", jobs=1, on_event=silent)
        chosen.append(settings["dropout", "mine"])
        record = json.loads((folder / "out" / "choices" / "mine-dropout.json").read_text())
        assert len(record["candidates"]) == len(METHODS["dropout"].search)
        values = []
        for candidate in record["candidates"]:
            meta, arrays = read_cell(folder / "out" / candidate["cell"])
            assert meta["cell"]["part"] == "validation"
            assert meta["cell"]["seed"] == SEARCH_SEED
            assert arrays == {}
            s = meta["scores"]
            values.append((s["complete"]["score"] + (s["missing_0.2"]["score"] + s["missing_0.5"]["score"]) / 2) / 2)
        assert record["chosen"] == METHODS["dropout"].search[values.index(max(values))]
        assert cells[0].config["lr"] == record["chosen"]["lr"]
    assert chosen[0] == chosen[1]


def test_stored_choices_are_taken_and_no_search_is_made(tmp_path, seed):
    row = Row.parse("dropout", {"method": "dropout", "chosen": {"mine": {"lr": 0.5}}})
    data = source(tmp_path, seed)
    for tune, searches in (("auto", False), ("always", True), ("never", False)):
        assert Grid([row], [data], [0], tune=tune).searched(row, data) == searches
    _, cells = run_grid(Grid([row], [data], [0]), tmp_path / "out", jobs=1, on_event=silent)
    assert cells[0].config["lr"] == 0.5
    assert not (tmp_path / "out" / "search").exists()


def test_a_finished_cell_is_never_recomputed_and_a_claimed_one_is_left_alone(tmp_path, seed, monkeypatch):
    rows = [Row.parse(n, {"method": n}) for n in ("vanilla", "late")]
    grid = Grid(rows, [source(tmp_path, seed)], [0], tune="never")
    out = tmp_path / "out"
    _, cells = run_grid(grid, out, jobs=1, on_event=silent)

    def refuse(*arguments):
        raise AssertionError("computed again")

    monkeypatch.setattr(grid_module, "compute", refuse)
    run_grid(grid, out, jobs=1, on_event=silent)
    (out / cells[1].path).unlink()
    with claimed(out, cells[1]) as mine:
        assert mine
        grid_module._work(grid_module.Job(cells[1], out), silent)
        assert not (out / cells[1].path).exists()
    with pytest.raises(AssertionError, match="computed again"):
        grid_module._work(grid_module.Job(cells[1], out), silent)


def test_another_seed_setting_or_data_is_another_cell(tmp_path, seed):
    data, row = source(tmp_path, seed), Row.parse("vanilla", {"method": "vanilla"})
    grid = Grid([row], [data], [0])
    cells = [
        grid.cell(row, data, {}, "test", 0, "a"),
        grid.cell(row, data, {}, "test", 1, "a"),
        grid.cell(row, data, {"lr": 0.1}, "test", 0, "a"),
        grid.cell(row, data, {}, "validation", 0, "a"),
        grid.cell(row, data, {}, "test", 0, "b"),
        Grid([row], [data], [0], {"epochs": 9}).cell(row, data, {}, "test", 0, "a"),
    ]
    assert len({cell.key for cell in cells}) == len(cells)
    assert grid.cell(row, data, {}, "test", 0, "a").key == cells[0].key


@pytest.mark.parametrize("name", ["vanilla", "smil", "muse"])
def test_a_cell_gives_the_same_numbers_again_and_a_changed_one_does_not(tmp_path, seed, name):
    grid = Grid([Row.parse(name, {"method": name})], [source(tmp_path, seed)], [3], tune="never")
    _, cells = run_grid(grid, tmp_path / "out", jobs=1, on_event=silent)
    path = tmp_path / "out" / cells[0].path
    assert recompute(path) == []
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files}
    arrays["missing_0.5"][0] += 0.01
    np.savez(path, **arrays)
    assert recompute(path) == ["missing_0.5"]
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
    while not list((tmp_path / "killed").glob("cells/mine/*.npz")) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(seed % 100 / 1000)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("cells/mine/*.npz")}
    assert done
    both = [start("killed"), start("killed")]
    whole = start("whole")
    for process in [*both, whole]:
        assert process.wait(300) == 0, process.stderr.read().decode()
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    cells = sorted(p.name for p in (tmp_path / "whole").glob("cells/mine/*.npz"))
    assert len(cells) == 9
    assert cells == sorted(p.name for p in (tmp_path / "killed").glob("cells/mine/*.npz"))
    for name in cells:
        a, b = (read_cell(tmp_path / out / "cells" / "mine" / name) for out in ("killed", "whole"))
        assert a[0]["scores"] == b[0]["scores"]
        assert all(np.array_equal(a[1][k], b[1][k]) for k in a[1])
    drop = ("time of this call", "time of all test cells")
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("killed", "whole")]
    for r in results:
        for key in drop:
            r["facts"].pop(key)
        for rows in (f["rows"] for f in r["data_sets"]):
            for facts in rows.values():
                facts.pop("seconds")
    assert results[0] == results[1]


def test_several_workers_give_the_same_numbers_as_one(tmp_path, seed):
    data = source(tmp_path, seed)
    grid = Grid([Row.parse("vanilla", {"method": "vanilla"})], [data], [0, 1], tune="never")
    for jobs in (1, 2):
        _, cells = run_grid(grid, tmp_path / str(jobs), jobs=jobs, on_event=silent)
    for cell in cells:
        one, two = (read_cell(tmp_path / str(jobs) / cell.path) for jobs in (1, 2))
        assert one[0]["scores"] == two[0]["scores"]


def test_a_row_that_diverges_is_a_result(tmp_path, seed):
    from mmc_fast.experiments.compare.output import markdown, score_rows
    from mmc_fast.experiments.compare.table import find

    rows = [Row.parse("vanilla", {"method": "vanilla"}),
            Row.parse("wild", {"method": "shaspec", "settings": {"lr": 1e30, "optimizer": "sgd"}})]  # fmt: skip
    grid = Grid(rows, [source(tmp_path, seed)], [0, 1], {"epochs": 3}, tune="never")
    settings, cells = run_grid(grid, tmp_path / "out", jobs=1, on_event=silent)
    found = find(cells, tmp_path / "out", rows, settings, resamples=20)[0]
    assert found.rows["wild"].diverged == (0, 1)
    assert "diverged with 2 seed(s)" in found.rows["wild"].label
    assert "wild" not in found.main.scores
    marked = {line[0]: line[1:] for line in score_rows(found, found.main.metric)}
    assert set(marked["ShaSpec †§"]) == {"–"}  # diverged, so the gate could not judge it either
    assert "§ diverged with 2 seed(s): ShaSpec. † not judged: ShaSpec." in markdown([found])


def test_every_stored_row_and_data_file_can_be_read():
    from mmc_fast.experiments.compare.rows import load_rows, load_sources

    names = sorted(p.stem for p in (configs_folder() / "rows").glob("*.toml"))
    assert set(names) >= set(METHODS)
    for row in load_rows(names):
        assert row.title
        for chosen in row.chosen.values():
            assert dict(chosen) in [dict(c) for c in row.plugin.search], f"{row.name}: no candidate of the search"
    data = sorted(p.stem for p in (configs_folder() / "data").glob("*.toml"))
    assert {"mfeat", "support2", "avmnist-hard"} <= set(data)
    load_sources(data)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "muze"), "Did you mean 'muse'"),
        (("--methods", "vanilla,vanilla"), "name at least one, and each once"),
        (("--methods", "vanilla", "--data", "mfeet"), "Did you mean 'mfeat'"),
        (("--methods", "vanilla", "--data", "nowhere.npz"), "nowhere.npz"),
        (("--methods", "nowhere.toml"), "cannot be read"),
        (("--seeds", "0"), "give a number of seeds"),
        (("--rates", "1.5"), "missing rates are at least 0 and below 1"),
        (("--rates", "x"), "separated by commas"),
        (("--tune", "maybe"), "allowed are auto, always and never"),
        (("--methods", "vanilla", "--reference", "late"), "none of the rows"),
        (("--jobs", "0"), "at least 1"),
        (("--check", "nowhere.npz"), "cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, arguments, words):
    out = tmp_path / "out"
    done = command(*arguments, "--out", out)
    assert done.exit_code == 2, done.output
    assert words in done.output
    check_one_line(InputError(done.output.strip()))
    assert not out.exists() or not list(out.glob("cells/**/*.npz"))


def test_a_foreign_folder_and_a_broken_cell_are_refused(tmp_path, seed):
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
    cell = next(out.glob("cells/mine/*.npz"))
    cell.write_bytes(cell.read_bytes()[:200])
    done = command(*arguments)
    assert done.exit_code == 2
    assert "remove it and repeat" in done.output


def test_choices_are_stored_as_tables_that_read_back(tmp_path, seed, monkeypatch):
    spec = importlib.util.spec_from_file_location("store_choices", ROOT / "tools" / "store_choices.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "shaspec.toml").write_text('method = "shaspec"\n[chosen.other]\nlr = 0.1\n')
    monkeypatch.setattr(tool, "ROWS", rows)
    grid = Grid([Row.parse("shaspec", {"method": "shaspec"})], [source(tmp_path, seed)], [0])
    settings, cells = run_grid(grid, tmp_path / "out", jobs=1, on_event=silent)
    assert tool.main(tmp_path / "out") == 0
    row = Row.parse("shaspec", read_toml(rows / "shaspec.toml"))
    assert row.chosen == {"other": {"lr": 0.1}, "mine": settings["shaspec", "mine"]}
    again = Grid([row], [source(tmp_path, seed)], [0])
    assert run_grid(again, tmp_path / "out", jobs=1, on_event=silent)[1] == cells


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('title = "no method"', "give the name of a method"),
        ('method = "muse"\ntitle = 3', "give a text"),
        ('method = "muse"\nsetings = 3', "Did you mean 'settings'"),
        ('method = "muse"\n[settings]\nepoch = 3', "Did you mean 'epochs'"),
        ('method = "muse"\n[chosen]\nmine = 3', "give a table"),
        ('method = "muse"\n[chosen.mine.options]\nlayers = 3', "option 'layers' does not exist"),
    ],
)
def test_a_row_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "row.toml").write_text(text + "\n")
    done = command("--methods", tmp_path / "row.toml", "--data", "mfeat", "--out", tmp_path / "out")
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
