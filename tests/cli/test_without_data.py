"""Where no benchmark set is: commands take what is here, say what is not, and find bad options first."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from training_data import check_one_line, own_data

from mmc_fast.errors import InputError
from mmc_fast.experiments import data
from mmc_fast.experiments.compare.configs import data_here, fingerprint_of, load_data
from mmc_fast.experiments.paper import EXPERIMENTS

compare_command = importlib.import_module("mmc_fast.cli.compare")  # the name in the package is the command


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_tests_see_no_benchmark_set_unless_they_ask(needs_data):
    assert "MMC_DATA" not in os.environ
    assert {info.name for info in data.available() if info.found} == {"mfeat", "support2"}
    with pytest.raises(pytest.skip.Exception, match="needs the data set not_a_set: set MMC_DATA"):
        needs_data("not_a_set")


def test_a_test_that_asks_sees_the_folder(needs_data):
    folder = needs_data("avmnist")
    assert os.environ["MMC_DATA"] == str(folder)


def test_what_is_here_and_how_to_get_the_rest(tmp_path, monkeypatch):
    here, missing = data_here(["mfeat", "avmnist-hard", "p2012"])
    assert here == ["mfeat"]
    assert list(missing) == ["avmnist-hard", "p2012"]
    assert "set MMC_DATA to the folder that holds avmnist.npz" in missing["avmnist-hard"]
    assert "Origin: PhysioNet" in missing["p2012"]
    (tmp_path / "p2012.npz").write_bytes(b"")
    monkeypatch.setenv("MMC_DATA", str(tmp_path))
    assert data_here(["p2012"])[0] == ["p2012"]


def test_compare_takes_the_default_sets_that_are_here(tmp_path, monkeypatch):
    load_data.cache_clear()
    fingerprint_of.cache_clear()
    own = own_data(tmp_path, 0)
    monkeypatch.setattr(compare_command, "DATA", (str(own), "avmnist-hard"))
    out, err = run(
        "compare", "--methods", "vanilla,late", "--seeds", "1", "--tune", "never", "--jobs", "1", "--out", "o"
    )
    assert err.count("\n") == 1
    assert "avmnist-hard is left out." in err
    assert "set MMC_DATA to the folder that holds avmnist.npz" in err
    assert "mine: test AUC (ROC)" in out
    stored = json.loads(Path("o/results.json").read_text())
    assert [f["data"] for f in stored["data_sets"]] == ["mine"]
    assert "avmnist.npz" in stored["facts"]["left out: avmnist-hard"]


def test_the_embedded_sets_are_the_default_of_compare_without_data():
    assert data_here(compare_command.DATA)[0] == ["mfeat", "support2"]


@pytest.mark.parametrize("command", ["compare", "reproduce table5"])
def test_a_set_that_is_asked_for_by_name_must_be_here(command):
    _, err = run(*command.split(), "--data", "mfeat,p2012", "--out", "o", code=2)
    assert "set MMC_DATA to the folder that holds p2012.npz" in err
    assert not list(Path("o").glob("**/*.npz"))


@pytest.mark.parametrize("name", ["table3", "table4"])
def test_an_experiment_without_any_of_its_sets_says_which_it_needs(name):
    out, err = run("reproduce", name, "--seeds", "1", "--epochs", "1", "--out", "o")
    assert err.count("\n") == 1
    assert "avmnist-paper is left out." in err
    assert f"Nothing is measured: {name} needs avmnist-paper." in out
    assert not Path("o").exists()
    values = json.loads(run("reproduce", name, "--json", "--out", "o")[0])
    assert (values["tables"], values["data"]) == ([], [])
    assert "avmnist.npz" in values["left_out"]["avmnist-paper"]


def test_an_experiment_runs_on_those_of_its_sets_that_are_here(tmp_path, monkeypatch):
    load_data.cache_clear()
    fingerprint_of.cache_clear()
    own = own_data(tmp_path, 0)
    experiment = EXPERIMENTS["fig6"]
    object.__setattr__(experiment, "data", (str(own), "p2012"))
    try:
        out, err = run("reproduce", "fig6", "--seeds", "1", "--epochs", "1", "--jobs", "1", "--out", "o")
    finally:
        object.__setattr__(experiment, "data", ("mfeat",))
    assert "p2012 is left out." in err
    result = json.loads(Path("o/fig6/result.json").read_text())
    assert result["data"] == [str(own)]
    assert any("p2012 is left out." in note for note in result["notes"])
    assert "Figure 6 on mine" in out


def test_every_experiment_has_an_embedded_set_or_is_fixed_on_one():
    for name, experiment in EXPERIMENTS.items():
        here, _ = data_here(experiment.data)
        assert bool(here) != experiment.fixed, name


BAD_OPTIONS = {
    "unknown set before a fixed split": ("train --data mfaet --split-seed 0", "Did you mean 'mfeat'"),
    "unknown set before a budget": ("train --data nothing --memory-budget 1GB", "Unknown data set 'nothing'"),
    "train seed": ("train --data avmnist --seed -1", "seed is -1"),
    "train split seed": ("train --data nowhere.npz --split-seed -1", "seed is -1"),
    "train device": ("train --data avmnist --device tpu", "allowed are cpu"),
    "train NaN policy": ("train --data avmnist --nan-policy guess", "indicator"),
    "train task": ("train --data avmnist --task weather", "digit"),
    "train variant": ("train --data avmnist --variant hrad", "Did you mean 'hard'"),
    "train budget": ("train --data nowhere.npz --memory-budget much", "memory_budget is 'much'"),
    "train epochs": ("train --data avmnist --epochs 0", "at least 1"),
    "evaluate rates": ("evaluate --run none --rates 1.5", "missing rates are at least 0 and below 1"),
    "evaluate part": ("evaluate --run none --part tset", "Did you mean 'test'"),
    "evaluate seed": ("evaluate --run none --seed -1", "seed is -1"),
    "diagnose groups": ("diagnose --run none --groups 0", "groups is 0"),
    "diagnose resamples": ("diagnose --run none --resamples -1", "resamples is -1"),
    "diagnose part": ("diagnose --run none --part tset", "Did you mean 'test'"),
    "diagnose seed": ("diagnose --run none --seed -1", "seed is -1"),
    "compare rates": ("compare --data avmnist-hard --rates 1.5", "missing rates are at least 0 and below 1"),
    "compare epochs": ("compare --data avmnist-hard --epochs 0", "epochs is 0"),
    "compare seeds": ("compare --data avmnist-hard --seeds 0", "give a number of seeds"),
    "compare jobs": ("compare --data avmnist-hard --jobs 0", "jobs is 0"),
    "compare tune": ("compare --data avmnist-hard --tune maybe", "Allowed: auto"),
    "compare reference": ("compare --data avmnist-hard --reference wrong", "none of the methods"),
    "compare methods": ("compare --data avmnist-hard --methods muze", "Did you mean 'muse'"),
    "compare second name": ("compare --data avmnist-hard,mfeet", "Did you mean 'mfeat'"),
    "compare twice": ("compare --data avmnist-hard,avmnist-hard", "each once"),
    "reproduce epochs": ("reproduce table3 --epochs 0", "give a number from 1"),
    "reproduce seeds": ("reproduce table3 --seeds 0", "give a number from 1"),
    "reproduce jobs": ("reproduce table3 --jobs 0", "jobs is 0"),
    "reproduce reading": ("reproduce table3 --reading tests", "Did you mean 'test'"),
    "reproduce reading of another": ("reproduce table5 --data p2012 --reading test", "leave --reading out"),
    "reproduce tune": ("reproduce fig4 --data p2012 --tune auto", "leave --tune out"),
    "reproduce tune word": ("reproduce table3 --tune maybe", "Allowed: auto, always, never"),
    "reproduce fixed data": ("reproduce table3 --data p2012", "leave --data out"),
    "reproduce second name": ("reproduce table5 --data p2012,mfeet", "Did you mean 'mfeat'"),
    "reproduce twice": ("reproduce table5 --data p2012,p2012", "each once"),
    "demo workers": ("demo --workers 0", "at least 1"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_found_before_data_are_looked_for(arguments, words, tmp_path):
    out, err = run(*arguments.split(), code=2)
    assert out == ""
    assert words in err
    check_one_line(InputError(err.strip()))
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_a_split_is_told_what_the_command_has(tmp_path):
    np.savez(
        tmp_path / "d.npz",
        x_a=np.zeros((9, 2)),
        x_b=np.zeros((9, 2)),
        y=np.arange(9) % 3,
        meta='{"kind": "classification"}',
    )
    for command in ("compare", "reproduce table5"):
        _, err = run(*command.split(), "--data", tmp_path / "d.npz", "--out", tmp_path / "o", code=2)
        assert "a line `split_seed = 0` below" in err
        assert "in a TOML file for --data" in err
