"""The demo: what it writes agrees with the runs, it can be interrupted and continued, and it destroys nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score
from typer.testing import CliRunner

from mmc_fast.cli import app
from mmc_fast.cli.demo import print_demo, run_demo_command
from mmc_fast.cli.terminal import DemoDisplay, error_console, output_console
from mmc_fast.errors import InputError
from mmc_fast.experiments.report.comparison import Comparison
from mmc_fast.experiments.training.demo import DemoPlan, DemoRun, demo_config, run_demo

ROOT = Path(__file__).resolve().parents[2]
TINY = DemoPlan(datasets=("mfeat",), seeds=(5,), epochs=1, quick=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo of one epoch on one data set."""
    out = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    run_demo_command(TINY, out, workers=1, fresh=False)
    return out


def test_the_folder_is_whole(done: Path):
    assert {p.name for p in done.iterdir()} == {"results.json", "report.html", "figures", "plan.json", "runs"}
    assert [p.name for p in done.parent.iterdir()] == ["demo"]
    assert {p.name for p in (done / "figures").iterdir()} >= {
        "mfeat-missing-rates.png",
        "mfeat-reliance-vanilla.png",
        "mfeat-reliance-ebr.png",
        "mfeat-reliance-robust.png",
        "fresh-discriminator-ebr.png",
    }
    page = (done / "report.html").read_text(encoding="utf-8")
    assert "smoke run" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_results_agree_with_the_stored_predictions(done: Path):
    results = json.loads((done / "results.json").read_text())
    assert results["kind"] == "demo"
    assert [r["method"] for r in results["runs"]] == ["vanilla", "dropout", "kd", "ebr", "ebr"]
    comparison = Comparison.from_dict(results["data_sets"]["mfeat"]["comparison"])
    for run in results["runs"]:
        with np.load(done / "runs" / f"mfeat-{run['preset']}-5" / "predictions.npz") as arrays:
            truth = accuracy_score(arrays["test/labels"], arrays["test/complete"].argmax(1))
            missing = accuracy_score(arrays["test/labels"], arrays["test/missing_0.3"].argmax(1))
        scores = comparison.scores[run["preset"]]
        assert scores["complete"].mean == pytest.approx(truth) == run["scores"]["complete"]
        assert scores["0.3 missing"].mean == pytest.approx(missing)
        others = [s["score"] for s in run["scores"]["missing"]]
        assert scores["mean missing"].mean == pytest.approx(np.mean(others))


def test_methods_differ_by_configuration_only_and_share_their_masks(done: Path):
    runs = json.loads((done / "results.json").read_text())["runs"]
    assert len({json.dumps([m["realised"] for m in run["scores"]["missing"]]) for run in runs}) == 1
    assert len({json.dumps(run["unimodal"]) for run in runs}) == 1
    ebr = demo_config(DemoPlan(), "ebr").ebr
    assert ebr is not None
    assert (ebr.hidden_dim, ebr.latent_dim) == (128, 64)


def test_the_table_on_screen_is_that_of_the_results(done: Path, capsys: pytest.CaptureFixture[str]):
    from mmc_fast.experiments.report.demo import demo_findings
    from mmc_fast.experiments.training.demo import load_demo_run

    findings = demo_findings([load_demo_run(done / "runs", run) for run in TINY.runs])
    print_demo(output_console(), findings, done, quick=True)
    shown = capsys.readouterr().out
    comparison = json.loads((done / "results.json").read_text())["data_sets"]["mfeat"]["comparison"]
    for by_condition in comparison["scores"].values():
        for score in by_condition.values():
            number = f"{score['mean']:.3f}"
            assert (f"*{number}*" if score["best"] else number) in shown
    assert "its numbers mean nothing" in shown
    assert "modality dropout" in shown


def test_an_interrupted_demo_goes_on_where_it_stopped(tmp_path: Path):
    plan = DemoPlan(datasets=("mfeat",), methods=("vanilla", "dropout"), seeds=(1, 2), epochs=1, quick=True)

    class Impatient(DemoDisplay):
        def on_end(self, run: DemoRun) -> None:
            super().on_end(run)
            if self.finished == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(plan, tmp_path, Impatient(error_console()))
    finished = sorted(tmp_path.glob("*/results.json"))
    before = [p.stat().st_mtime_ns for p in finished]
    assert [p.parent.name for p in finished] == ["mfeat-dropout-1", "mfeat-vanilla-1"]
    display = DemoDisplay(error_console())
    run_demo(plan, tmp_path, display)
    assert display.finished == 4
    assert [p.stat().st_mtime_ns for p in finished] == before
    assert len(list(tmp_path.glob("*/results.json"))) == 4


def test_folders_that_are_not_the_demos_are_left_alone(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no demo"):
        run_demo_command(TINY, tmp_path / "thesis", workers=1, fresh=True)
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "data").write_text("")
    with pytest.raises(InputError, match="not made by the demo"):
        run_demo_command(TINY, tmp_path / "x", workers=1, fresh=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    assert (tmp_path / "x.partial" / "data").exists()


@pytest.mark.parametrize(
    ("changes", "hint"),
    [({"seeds": ()}, "and one seed"), ({"seeds": (1, 1)}, "name each once"), ({"methods": ("ebrr",)}, "'ebr'")],
)
def test_plans_that_cannot_be_run_are_refused(changes, hint):
    with pytest.raises(InputError, match=hint):
        DemoPlan(**changes)


def test_the_bar_reaches_the_end_and_counts_taken_over_runs_as_done():
    plan = DemoPlan(datasets=("mfeat",), methods=("vanilla", "ebr"), seeds=(0,))
    vanilla, ebr = plan.runs
    display = DemoDisplay(error_console())
    display.on_plan({vanilla: 1.0, ebr: 3.0})
    display.on_end(vanilla)  # was finished before
    assert display.bars.tasks[0].completed == pytest.approx(0.25)
    display.on_start(ebr, 2)
    shares = []
    for epoch in (1, 2):
        display.on_epoch(ebr, {"stage": "train", "epoch": epoch, "loss_sem": 0.5, "val_score": 0.25})
        shares.append(display.bars.tasks[0].completed)
    assert 0.25 < shares[0] < shares[1] < 1
    assert "L_sem 0.500  val 0.250" in display.bars.tasks[1].fields["note"]
    display.on_end(ebr)
    assert display.bars.tasks[0].completed == pytest.approx(1.0)
    assert len(display.bars.tasks) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_quick_demo_from_the_command_line_survives_ctrl_c(tmp_path: Path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "mmc_fast", "demo", "--quick", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    partial = tmp_path / "demo.partial"
    deadline = time.monotonic() + 120
    while not list(partial.glob("runs/*/results.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 130, err
    assert "Traceback" not in err
    assert not out.exists()
    kept = sorted(partial.glob("runs/*/results.json"))
    assert kept
    second = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, timeout=300)
    assert second.returncode == 0, second.stderr
    assert "continuing" in second.stderr
    printed = json.loads(second.stdout)
    assert set(printed["data_sets"]) == {"mfeat", "support2"}
    assert (out / "report.html").is_file()
    assert not partial.exists()
    again = CliRunner().invoke(app, ["demo", "--quick", "--out", str(tmp_path / "missing" / "demo"), "--workers", "0"])
    assert again.exit_code == 2
    assert not (tmp_path / "missing").exists()
