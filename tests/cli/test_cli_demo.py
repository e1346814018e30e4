"""The demo: what it writes agrees with the runs, it can be interrupted and continued, and it destroys nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from mmc_fast.cli.demo import print_demo, write_demo
from mmc_fast.cli.terminal import JobsDisplay, error_console, output_console
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare import demo as demo_module
from mmc_fast.experiments.compare.demo import DemoFindings, DemoPlan, demo_config, demo_story, run_demo
from mmc_fast.experiments.jobs import Job, Result
from mmc_fast.experiments.tasks import Classification
from mmc_fast.experiments.training import Predictions, load_run

ROOT = Path(__file__).resolve().parents[2]
TINY = DemoPlan(data=("mfeat",), seeds=(5,), epochs=1, quick=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo of one epoch on one data set."""
    out = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    write_demo(TINY, out, workers=1)
    return out


def runs(out: Path) -> dict[str, tuple[Path, dict]]:
    """Preset -> folder and results of its run."""
    found = sorted(p for p in (out / "runs" / "mfeat").iterdir() if p.is_dir())
    return {p.name.split("-")[0]: (p, load_run(p).results) for p in found}


def test_the_folder_is_whole(done: Path):
    assert {p.name for p in done.iterdir()} - {".manifest.lock"} == {
        "manifest.json", "results.json", "results.csv", "results.md", "report.html", "figures", "runs",
    }  # fmt: skip
    assert {p.name for p in (done / "figures").iterdir()} - {"story.png"} == {
        "mfeat-missing-rates.png", "mfeat-reliance-vanilla.png", "mfeat-reliance-ebr.png", "mfeat-reliance-robust.png",
        "mfeat-adversary-ebr.png", "mfeat-adversary-robust.png",
    }  # fmt: skip
    page = (done / "report.html").read_text(encoding="utf-8")
    assert "smoke run" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_results_agree_with_the_stored_predictions(done: Path):
    (found,) = json.loads((done / "results.json").read_text())["data_sets"]
    scores = found["comparisons"]["accuracy"]["scores"]
    assert list(scores) == list(TINY.methods)
    for preset, (folder, results) in runs(done).items():
        with np.load(folder / "predictions.npz") as arrays:
            truth = accuracy_score(arrays["test/labels"], arrays["test/complete"].argmax(1))
            missing = accuracy_score(arrays["test/labels"], arrays["test/missing_0.3"].argmax(1))
        assert scores[preset]["complete"]["mean"] == pytest.approx(truth) == results["scores"]["complete"]
        assert scores[preset]["0.3 missing"]["mean"] == pytest.approx(missing)
        others = [s["score"] for s in results["scores"]["missing"]]
        assert scores[preset]["mean missing"]["mean"] == pytest.approx(np.mean(others))


def test_methods_differ_by_configuration_only_and_share_their_masks_and_unimodal_models(done: Path):
    results = [r for _, r in runs(done).values()]
    assert len(results) == len(TINY.methods)
    assert len({json.dumps([m["realised"] for m in r["scores"]["missing"]]) for r in results}) == 1
    assert len({json.dumps(r["unimodal"]) for r in results}) == 1
    ebr = demo_config(DemoPlan(), "ebr").ebr
    assert ebr is not None
    assert (ebr.hidden_dim, ebr.latent_dim) == (128, 64)


def test_a_finished_demo_is_taken_over_and_shown_as_stored(done: Path, capsys: pytest.CaptureFixture[str]):
    before = {p: p.stat().st_mtime_ns for p in (done / "runs").rglob("*") if p.is_file() and p.suffix != ".lock"}
    findings = write_demo(TINY, done, workers=1)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    print_demo(output_console(), findings, done, quick=True)
    shown = capsys.readouterr().out
    (found,) = json.loads((done / "results.json").read_text())["data_sets"]
    for by_condition in found["comparisons"]["accuracy"]["scores"].values():
        assert all(f"{score['mean']:.3f}" in shown for score in by_condition.values())
    assert "numbers mean nothing" in shown
    assert "modality dropout" in shown


def looked_into(data: str, **scores: tuple[float, float, float]) -> DemoFindings:
    """By modality: its unimodal model, plain training with it alone, the repaired model with it alone."""

    def run(kept: int) -> dict:
        entries = {
            m: {"unimodal": s[0], "single_modality": s[kept], "leave_one_out": 0.0, "shuffled": 0.0, "shapley": 0.0}
            for m, s in scores.items()
        }
        reported = {"complete": (0.97, 0.98)[kept - 1], "reliance": entries}
        return {"scores": reported, "data": {"name": data, "metric": "accuracy"}}

    comparison: Any = SimpleNamespace(data=data, main=SimpleNamespace(metric="accuracy"))
    return DemoFindings(comparison, 0.1, {"vanilla": [run(1)], "EBR robust": [run(2)]}, {})


def test_the_story_is_the_modality_that_was_lost_and_brought_back():
    story = demo_story(
        [looked_into("one", a=(0.8, 0.7, 0.75), b=(0.9, 0.2, 0.6)), looked_into("two", c=(0.9, 0.5, 0.7))]
    )
    assert story is not None
    assert (story.data, story.modality, story.alone, story.kept, story.repaired) == ("one", "b", 0.9, 0.2, 0.6)
    assert story.complete == (0.97, 0.98)
    assert all(f"{value:.3f}" in story.sentence for value in (0.9, 0.2, 0.6, 0.97, 0.98))
    assert "b 0.900, 0.200, 0.600" in story.drawing.alt


def test_there_is_no_story_where_nothing_was_lost_or_brought_back():
    assert demo_story([looked_into("one", a=(0.8, 0.79, 0.79), b=(0.6, 0.7, 0.9))]) is None


def test_predictions_of_unimodal_models_which_have_gaps_are_left_out(monkeypatch: pytest.MonkeyPatch):
    p = torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    shown = {"complete": p, "missing_0.1": p, "alone_a": p * torch.nan}
    found = Predictions("test", torch.tensor([1, 0]), torch.arange(2), shown)
    monkeypatch.setattr(demo_module, "load_predictions", lambda folder: {"test": found})
    stored = {"data": {"metric": "accuracy", "task": Classification.of(2).to_dict()}, "label": "vanilla"}
    stored |= {"scores": {"missing": [{"rate": 0.1, "realised": [0.1]}]}}
    result = demo_module._scored(Result({}, {}, {}, None, 1.0, 1), stored, Path())
    assert set(result.arrays) == {"labels", "complete", "missing_0.1"}
    assert result.values["scores"]["complete"]["score"] == 1.0


def test_an_interrupted_demo_goes_on_where_it_stopped(tmp_path: Path):
    plan = DemoPlan(data=("mfeat",), methods=("vanilla", "dropout"), seeds=(1, 2), epochs=1, quick=True)
    done: list[str] = []

    def impatient(event: tuple[str, Job, object]) -> None:
        if event[0] == "done":
            done.append(event[1].name)
            if len(done) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(plan, tmp_path, workers=1, on_event=impatient)
    assert done == ["runs/mfeat/vanilla-1", "runs/mfeat/vanilla-2", "runs/mfeat/dropout-1"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("results.json")}
    assert len(before) == 3
    left: list[str] = []
    run_demo(plan, tmp_path, workers=1, on_event=lambda event: left.append(f"{event[0]} {event[1].name}"))
    assert [event for event in left if event.startswith("done")] == ["done runs/mfeat/dropout-2"]
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_folders_that_are_not_the_demos_are_left_alone(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no demo"):
        write_demo(TINY, tmp_path / "thesis", workers=1, fresh=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("changes", "hint"),
    [({"seeds": ()}, "one seed"), ({"seeds": (1, 1)}, "name each once"), ({"methods": ("vanilla", "ebrr")}, "'ebr'"),
     ({"methods": ("ebr",)}, "vanilla among")],
)  # fmt: skip
def test_plans_that_cannot_be_run_are_refused(changes, hint):
    with pytest.raises(InputError, match=hint):
        DemoPlan(**changes)


def test_the_bar_counts_the_jobs_of_a_stage():
    display = JobsDisplay(error_console())
    job = Job("runs/mfeat/ebr-0", run_demo, {})
    display.on_event(("plan", job, 2))
    display.on_event(("epoch", job, {"stage": "train", "epoch": 1, "loss_sem": 0.5, "val_score": 0.25}))
    assert "L_sem 0.500  val 0.250" in display.bars.tasks[0].fields["note"]
    display.on_event(("done", job, None))
    assert (display.bars.tasks[0].completed, display.bars.tasks[0].total) == (1, 2)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_quick_demo_from_the_command_line_survives_ctrl_c(tmp_path: Path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "mmc_fast", "demo", "--quick", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/*/results.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 130, err
    assert "Traceback" not in err
    assert not (out / "results.json").exists()
    assert list(out.glob("runs/*/*/results.json"))
    second = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, timeout=300)
    assert second.returncode == 0, second.stderr
    assert [f["data"] for f in json.loads(second.stdout)["data_sets"]] == ["mfeat", "support2"]
    assert (out / "report.html").is_file()
