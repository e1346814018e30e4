"""The command line from outside: results, exit codes, one line on bad input, nothing half-written."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run

from mmc_fast import __version__
from mmc_fast._env import VARIABLES
from mmc_fast.cli import COMMANDS, load_command
from mmc_fast.cli.base import clean
from mmc_fast.cli.settings import collect_settings, parse_assignments
from mmc_fast.cli.terminal import output_console, print_table
from mmc_fast.experiments.training import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default folders (runs/…) must not land in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def own_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file in the layout for a user's own data."""
    generator = np.random.default_rng(3)
    y = generator.integers(0, 3, 240)
    path = tmp_path_factory.mktemp("data") / "own.npz"
    arrays = {
        "x_good": np.eye(3)[y] * 2 + generator.normal(size=(240, 3)),
        "x_weak": np.c_[y + generator.normal(size=240), generator.normal(size=240)],
        "y": y,
        "split": np.arange(240) % 3,
        "meta": '{"kind": "classification"}',
    }
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, own_file: Path) -> Path:
    """A finished EBR run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    run("train", "--data", own_file, "--method", "ebr", "--epochs", "2", "--seed", "4", "--run-dir", folder)
    return folder


# Results


def test_version_by_option_and_as_a_module():
    assert run("--version")[0].strip() == f"mmc-fast {__version__}"
    command = [sys.executable, "-m", "mmc_fast", "--version"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.strip() == f"mmc-fast {__version__}"


def test_a_warning_is_one_line_without_source_code(capsys):
    @clean
    def command() -> None:
        warnings.warn("checkpoint 3 is damaged\n(no such file)", UserWarning, stacklevel=1)

    command()
    assert capsys.readouterr().err == "mmc-fast: warning: checkpoint 3 is damaged (no such file)\n"


def test_train_prints_what_it_stores(own_file: Path, tmp_path: Path):
    out, err = run(
        "train", "--data", own_file, "--method", "vanilla", "--epochs", "2", "--run-dir", tmp_path / "r", "--json"
    )
    printed = json.loads(out)
    stored = json.loads((tmp_path / "r" / "results.json").read_text())
    assert {k: v for k, v in printed.items() if k != "run_dir"} == stored
    assert stored["config"]["epochs"] == 2
    assert stored["method"] == "vanilla"
    assert err == ""  # no progress where nobody looks


def test_train_shows_a_table_of_the_stored_scores(finished: Path, own_file: Path, tmp_path: Path):
    out, _ = run("train", "--data", own_file, "--epochs", "2", "--method", "dropout", "--seed", "7")
    stored = json.loads((tmp_path / "runs" / "own-dropout-7" / "results.json").read_text())
    assert f"{stored['scores']['complete']:.3f}" in out
    for entry in stored["scores"]["missing"]:
        assert re.search(rf"{entry['rate']:g}\s+{entry['score']:.3f}", out)
    for modality, entry in stored["scores"]["reliance"].items():
        assert re.search(
            rf"{modality}\s+{entry['verdict']}\s+{entry['unimodal']:.3f}\s+{entry['shuffled']:.3f}\s+{entry['leave_one_out']:.3f}",
            out,
        )


def test_the_default_folder_carries_the_name_that_the_method_was_called_by(own_file: Path, tmp_path: Path):
    """Two forms of one method are two runs, in whichever way the form was named."""
    (tmp_path / "robust.toml").write_text('method = "robust"\n')
    arguments = ["train", "--data", own_file, "--epochs", "1", "--set", "unimodal_share=1"]
    for call, folder in (
        (["--method", "robust"], "own-robust-0"),
        (["--method", "ebr"], "own-ebr-0"),
        (["--config", "robust.toml", "--seed", "1"], "own-robust-1"),
        (["--set", "method=robust", "--seed", "2"], "own-robust-2"),
        (["--seed", "3"], "own-ebr-3"),
        (["--set", "kd.epochs=1"], "own-kd-0"),
    ):
        out, _ = run(*arguments, *call, "--json")
        assert json.loads(out)["run_dir"] == f"runs/{folder}"
        assert (tmp_path / "runs" / folder / "results.json").is_file()
    forms = ["--data", "mfeat", "--task", "digit", "--method", "vanilla", "--epochs", "1", "--set", "unimodal_share=0"]
    assert json.loads(run("train", *forms, "--json")[0])["run_dir"] == "runs/mfeat-digit-vanilla-0"


def test_evaluate_repeats_the_scores_of_the_run(finished: Path):
    out, _ = run("evaluate", "--run", finished, "--json")
    found = json.loads(out)
    stored = json.loads((finished / "results.json").read_text())["scores"]
    assert found["same_data"] is True
    assert found["scores"]["complete"] == stored["complete"]
    assert found["scores"]["missing"] == stored["missing"]
    assert found["scores"]["reliance"] == stored["reliance"]


def test_evaluate_takes_other_rates_parts_and_data(finished: Path, own_file: Path, tmp_path: Path):
    found = json.loads(run("evaluate", "--run", finished, "--rates", "0.25", "--part", "validation", "--json")[0])
    assert [entry["rate"] for entry in found["scores"]["missing"]] == [0.25]
    assert found["scores"]["part"] == "validation"
    with np.load(own_file) as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    changed["x_good"] = changed["x_good"] + np.random.default_rng(0).normal(size=changed["x_good"].shape)
    np.savez(tmp_path / "other.npz", **changed)
    out, err = run("evaluate", "--run", finished, "--data", tmp_path / "other.npz")
    assert "not the data of the run" in err
    assert "missing rate" in out


def test_resume_opens_a_finished_run(finished: Path, own_file: Path):
    arguments = ["--data", own_file, "--method", "ebr", "--epochs", "2", "--seed", "4", "--run-dir", finished]
    before = (finished / "results.json").read_bytes()
    assert json.loads(run("train", *arguments, "--resume", "--json")[0])["seed"] == 4
    assert (finished / "results.json").read_bytes() == before


def test_info_names_versions_data_sets_and_every_variable():
    found = json.loads(run("info", "--json")[0])
    assert found["mmc_fast"] == __version__
    assert {d["name"] for d in found["data_sets"] if d["found"]} >= {"mfeat", "support2"}
    assert list(found["environment"]) == [v.name for v in VARIABLES]
    shown = run("info")[0]
    for word in (__version__, found["packages"]["torch"], "mfeat", "native library", *found["environment"]):
        assert word in shown


def test_help_lists_every_command_and_imports_none_of_them():
    shown = run("--help")[0]
    assert all(name in shown for name in COMMANDS)
    code = (
        "import sys, mmc_fast.cli as cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'numpy', 'matplotlib', 'pandas', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip().endswith("\n[]")


def without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line of an interpreter that lacks a package."""
    code = f"import sys; sys.modules[{package!r}] = None; from mmc_fast.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)


def test_a_missing_extra_is_one_line_and_core_commands_do_without():
    done = without("sklearn", "compare", "--methods", "vanilla")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mmc-fast: compare: sklearn is not installed; run: pip install 'mmc-fast[experiments]'\n"
    done = without("sklearn", "info")
    assert done.returncode == 0, done.stderr
    assert "native library" in done.stdout


def test_names_of_a_user_are_no_markup(capsys):
    print_table(output_console(), "[bold]t[/bold]", ["[red]c"], [["[/x]" + 30 * "-"]])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[bold]t[/bold]", "[red]c", "[/x]"))


# Settings


def test_assignments_are_toml_values_in_nested_tables():
    parsed = parse_assignments(["ebr.reversal=0.5", "ebr.psi_dims = [8, 4]", "fusion=late", "control=false", "kd=none"])
    assert parsed == {
        "ebr": {"reversal": 0.5, "psi_dims": [8, 4]},
        "fusion": "late",
        "control": False,
        "kd": None,
    }


def test_file_then_options_then_assignments(tmp_path: Path):
    path = tmp_path / "c.toml"
    path.write_text('method = "ebr"\nepochs = 7\nlr = 0.5\n[ebr]\nreversal = 0.25\nlatent_dim = 9\n')
    config = TrainConfig.from_dict(collect_settings(path, None, 8, ["ebr.reversal=0.125", "batch_size=16"]))
    assert (config.method, config.epochs, config.lr, config.batch_size) == ("ebr", 8, 0.5, 16)
    assert config.ebr is not None
    assert (config.ebr.reversal, config.ebr.latent_dim) == (0.125, 9)


@pytest.mark.parametrize(
    ("assignments", "method"),
    [([], "ebr"), (["kd.epochs=3"], "kd"), (["modality_dropout=0.5"], "dropout"), (["ebr.reversal=2"], "ebr")],
)
def test_the_method_follows_from_the_settings_where_it_is_not_named(assignments, method):
    assert TrainConfig.from_dict(collect_settings(None, None, None, assignments)).method == method


# Bad input

BAD_CALLS = {
    "unknown method": (["train", "--data", "mfeat", "--method", "ebrr"], "Did you mean 'ebr'"),
    "unknown data set": (["train", "--data", "mfaet"], "Did you mean 'mfeat'"),
    "no such file": (["train", "--data", "nowhere.npz"], "no such file"),
    "unknown task": (["train", "--data", "mfeat", "--task", "weather"], "digit"),
    "variant of a set without": (["train", "--data", "mfeat", "--variant", "hard"], "no variants"),
    "unknown NaN policy": (["train", "--data", "support2", "--nan-policy", "guess"], "indicator"),
    "split seed for a fixed split": (["train", "--data", "mfeat", "--split-seed", "1"], "fixed split"),
    "unknown setting": (["train", "--data", "mfeat", "--set", "epoch=3"], "Did you mean 'epochs'"),
    "setting of a wrong type": (["train", "--data", "mfeat", "--set", "epochs=many"], "give an integer"),
    "setting out of range": (["train", "--data", "mfeat", "--set", "lr=-1"], "above 0"),
    "negative reversal": (["train", "--data", "mfeat", "--set", "ebr.reversal=-1"], "at least 0"),
    "no assignment": (["train", "--data", "mfeat", "--set", "lr"], "KEY=VALUE"),
    "method against settings": (
        ["train", "--data", "mfeat", "--method", "vanilla", "--set", "ebr.reversal=1"],
        "change one of them",
    ),
    "no epochs": (["train", "--data", "mfeat", "--epochs", "0"], "at least 1"),
    "negative seed": (["train", "--data", "mfeat", "--seed", "-1"], "seed"),
    "config not there": (["train", "--data", "mfeat", "--config", "c.toml"], "No such file"),
    "config is a folder": (["train", "--data", "mfeat", "--config", "."], "is a folder"),
    "device not there": (["train", "--data", "mfeat", "--device", "tpu"], "allowed are"),
    "resume of nothing": (["train", "--data", "mfeat", "--resume", "--run-dir", "none"], "nothing to resume"),
    "run not there": (["evaluate", "--run", "none"], "holds no run"),
    "no workers": (["demo", "--workers", "0"], "at least 1"),
}


@pytest.mark.parametrize(("arguments", "hint"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, hint, tmp_path: Path):
    out, err = run(*arguments, code=2)
    assert out == ""
    assert err.startswith("mmc-fast: ")
    assert err.count("\n") == 1
    assert hint in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "hint"),
    [(b"epochs = = 3", "Invalid"), (b"\xff\xfe", "utf-8"), (b"[ebr\n", "Expected"), (b"ebr = 3", "table of settings")],
)
def test_a_broken_configuration_file_is_one_line(content, hint, tmp_path: Path):
    (tmp_path / "c.toml").write_bytes(content)
    _, err = run("train", "--data", "mfeat", "--config", "c.toml", code=2)
    assert err.count("\n") == 1
    assert hint in err
    assert [p.name for p in tmp_path.iterdir()] == ["c.toml"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--rates", "0.1;0.2"], "separated by commas"),
        (["--rates", "1.5"], "1.5"),
        (["--part", "tset"], "Did you mean 'test'"),
        (["--data", "support2"], "support2"),
    ],
)
def test_bad_evaluation_is_one_line(arguments, hint, finished: Path):
    out, err = run("evaluate", "--run", finished, *arguments, code=2)
    assert (out, err.count("\n")) == ("", 1)
    assert hint in err


def test_usage_errors_exit_2_without_a_traceback():
    for arguments in (["frobnicate"], ["train"], ["train", "--data", "mfeat", "--seed", "x"], ["info", "--jsonn"]):
        _, err = run(*arguments, code=2)
        assert "Traceback" not in err
        assert "Usage" in err


def test_a_run_folder_in_use_is_not_touched(finished: Path, own_file: Path):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    arguments = ["train", "--data", own_file, "--method", "ebr", "--run-dir", finished]
    _, err = run(*arguments, code=2)
    assert "holds a run already" in err
    _, err = run(*arguments, "--resume", "--epochs", "3", code=2)
    assert "epochs was 2 and is now 3" in err
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_a_folder_that_cannot_be_written_is_one_line(own_file: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    _, err = run("train", "--data", own_file, "--run-dir", tmp_path / "file" / "run", code=2)
    assert err.count("\n") == 1
    assert "file" in err


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch: pytest.MonkeyPatch, own_file: Path):
    import mmc_fast.cli.train as command

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(command, "train", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run("train", "--data", own_file)


def test_a_diverged_run_is_one_line_and_exit_1(own_file: Path):
    _, err = run("train", "--data", own_file, "--method", "vanilla", "--set", "lr=1e30", code=1)
    assert err.count("\n") == 1
    assert "in epoch 1" in err
    assert "lower the learning rate" in err


# Advice


def options(command: Any) -> set[str]:
    """Those of its subcommands included."""
    own = {o for p in command.params for o in p.opts}
    return own.union(*(options(sub) for sub in getattr(command, "commands", {}).values()))


OPTIONS = {name: options(load_command(name)) for name in COMMANDS}
SPEAK_FOR = {name: {name} for name in OPTIONS} | {"paper": {"reproduce"}}
"""Module or package -> the commands whose user reads its messages; those of others are for any command."""


def advice() -> Iterator[tuple[str, str, set[str]]]:
    """Place, option and commands, for each option in a string that is no docstring."""
    for path in sorted((ROOT / "mmc_fast").rglob("*.py")):
        if path.name in ("figures.py", "document.py"):  # they have variables of style sheets
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        callers = SPEAK_FOR.get(path.parent.name) or SPEAK_FOR.get(path.stem) or set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
                for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", node.value):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", option, callers


def test_messages_name_only_options_that_their_command_has():
    named = set()
    for place, option, callers in advice():
        named.add(option)
        own = ("--version", "--install-completion")  # of mmc-fast itself
        assert option in own or any(option in known for known in OPTIONS.values()), f"{place}: {option}"
        for command in callers:
            assert option in OPTIONS[command], f"{place}: {command} has no {option}"
    assert named >= {"--out", "--tune", "--data", "--weights", "--set", "--rates"}


# Ctrl-C


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_saves_exits_130_and_can_be_resumed(own_file: Path, tmp_path: Path):
    folder = tmp_path / "r"
    command = [sys.executable, "-m", "mmc_fast", "train", "--data", str(own_file), "--method", "vanilla"]
    command += ["--set", "unimodal_share=0", "--run-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    long = subprocess.Popen([*command, "--epochs", "5000"], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not list(folder.glob("checkpoints/*/epoch-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    long.send_signal(signal.SIGINT)
    _, err = long.communicate(timeout=60)
    assert long.returncode == 130, err
    assert "saved" in err
    assert "Traceback" not in err
    assert not (folder / "results.json").exists()
    (checkpoint,) = sorted(folder.glob("checkpoints/train/epoch-*"))[-1:]
    assert int(checkpoint.name.split("-")[1]) >= 1
    evaluated = subprocess.run(
        [sys.executable, "-m", "mmc_fast", "evaluate", "--run", str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert evaluated.returncode == 2
    assert "not finished" in evaluated.stderr
