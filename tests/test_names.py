"""Names are shown as they are: whatever somebody calls a modality, a method or a folder is no markup anywhere."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from command_line import run as command
from rich.console import Console
from training_data import BUDGET, check_one_line, tiny

from mmc_fast._util.names import check_name, printable
from mmc_fast.cli.terminal import JobsDisplay, RunDisplay, print_table
from mmc_fast.diagnose import Diagnosis
from mmc_fast.diagnose.document import Callout, Cell, Report, Section, Table, literal
from mmc_fast.diagnose.figures import Line, lines
from mmc_fast.errors import InputError
from mmc_fast.experiments import data
from mmc_fast.experiments.compare.output import markdown_table
from mmc_fast.experiments.training import load_run, train

NAMES = (
    "[/bold]", "[link=x]y[/link]", "$\\frac{$ $", "**b** `c`", "<script>alert(1)</script> &amp;", "_hidden", "a.b/c|d",
    "模态 é 😀", "\\*", "%s {0} {x}", '" onload="x', "-rf ~ ;",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


def file_of(folder: Path, names: tuple[str, str]) -> Path:
    dataset = tiny(1, dims=(4, 3), num_classes=2)
    arrays = {f"x_{name}": x.numpy() for name, x in zip(names, dataset.features.values(), strict=True)}
    np.savez(folder / "own.npz", y=dataset.labels.numpy(), split=dataset.split.numpy(), **arrays)
    return folder / "own.npz"


def text_of(page: str) -> str:
    """What a reader sees of a page, tags removed."""
    return unescape(re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


@pytest.mark.parametrize("pair", list(zip(NAMES[::2], NAMES[1::2], strict=True)), ids=range(len(NAMES) // 2))
def test_modalities_of_any_name_go_through_every_command(pair, tmp_path):
    path, run = file_of(tmp_path, pair), tmp_path / f"{pair[0].replace('/', '')} run"
    settings = [f"--set={k}={json.dumps(v)}" for k, v in BUDGET.items() if k != "epochs"]
    told = []
    for arguments in (
        (
            "train",
            "--data",
            path,
            "--method",
            "ebr" if "." not in pair[0] else "vanilla",
            "--epochs",
            1,
            "--run-dir",
            run,
            *settings,
        ),
        ("evaluate", "--run", run),
        ("predict", "--run", run, "--data", path),
        ("diagnose", "--run", run, "--html", tmp_path / "page.html", "--resamples", 10),
    ):
        told.append("".join(command(*arguments)))
    shown = text_of((tmp_path / "page.html").read_text())
    for name in pair:
        for output in (told[0], told[1], told[3]):
            assert name[:20] in output, name
        assert name in shown
    assert "<script>alert" not in (tmp_path / "page.html").read_text()
    assert list(load_run(run).model.modalities) == list(pair)


@pytest.mark.parametrize("name", NAMES)
def test_every_sink_shows_a_name_as_it_is(name):
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
        print_table(console, name, ["x", name], [[name, Cell(name, strong=True)]])
        assert console.file.getvalue().count(name) == 4
        for display in (RunDisplay(console), JobsDisplay(console)):
            with display:
                display.begin(name, 3)
                display.step(name)
    section = Section(
        name, [Table([name, "b"], [[name, Cell(name, note=name)]], literal(name)), Callout(literal(name))]
    )
    page = Report(name, literal(name), literal(name), [section]).html()
    assert text_of(page).count(name) >= 9
    assert "<strong>" not in page
    assert "<code>" not in page
    drawing = lines(name, {name: Line([0, 1], [0, 1]), "b": Line([0, 1], [1, 0])}, x_label=name, y_label=name, alt=name)
    svg = unescape(drawing.figure().svg)
    assert svg.count(f">{name}<") + svg.count(f"> {name}<") >= 4
    row = markdown_table(["a", name], [["b", name]]).splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


@pytest.mark.parametrize("name", ["", " ", "a\x00b", "a\nb", "\x1b[31m", "\ud800", "\u202eabc", "\u2028"])
def test_names_that_no_line_can_show_are_refused_in_one_line(name):
    with pytest.raises(InputError) as error:
        check_name("a modality", name)
    check_one_line(error.value)
    str(error.value).encode()
    dataset = tiny(1)
    with pytest.raises(InputError):
        type(dataset)(**{**vars(dataset), "features": {name: dataset.features["a"], "b": dataset.features["b"]}})
    assert printable(printable(name)) == printable(name)


@pytest.mark.parametrize(
    "path", ["~nobody-of-this-name/x.npz", "a\x00b.npz", "x\x00/y.csv", "\ud800.npz", "~nobody-of-this-name/x.csv"]
)
def test_paths_that_lead_nowhere_are_one_line(path, tmp_path):
    for read in (
        lambda: data.load(path),
        lambda: load_run(path),
        lambda: Diagnosis.from_json(path),
        lambda: train(tiny(1), None, seed=0, run_dir=path) if "\x00" in path else load_run(path),
    ):
        with pytest.raises((InputError, AttributeError)) as error:
            read()
        if isinstance(error.value, InputError):
            check_one_line(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes are those of Linux")
def test_a_folder_whose_name_is_no_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff run"
    arguments = [sys.executable, "-m", "mmc_fast", "train", "--data", "mfeat", "--method", "vanilla", "--epochs", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = subprocess.run([*arguments, "--run-dir", folder], env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    again = subprocess.run(
        [sys.executable, "-m", "mmc_fast", "evaluate", "--run", folder], env=environment, capture_output=True
    )
    assert again.returncode == 0, again.stderr
    unknown = subprocess.run([*arguments[:3], "[/bold]"], env=environment, capture_output=True)
    assert unknown.returncode == 2
    assert b"Traceback" not in unknown.stderr
