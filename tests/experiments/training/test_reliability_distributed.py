"""Two processes by torchrun: the numbers of one, one death that ends all in order, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_runs import cases, data, matrix, sparse
from safetensors.torch import load_file
from test_reliability_split import TOLERANCE, close, distance
from training_data import small

from mmc_fast.errors import InputError
from mmc_fast.experiments.training import train

HERE = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="torch.distributed with gloo is not here"
)


def launch(
    task: str, out: Path, *arguments: object, processes: int = 2, seconds: int = 240
) -> subprocess.CompletedProcess:
    """``torchrun`` on this machine; the job is ended where it hangs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(HERE / "distributed_runs.py"), task, str(out), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)


def test_two_processes_equal_one(seed, tmp_path):
    """Uneven last batches, rows with different modalities missing, every loss, ranking, adversarial figure and score."""
    done = launch("compare", tmp_path, seed, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, config in cases().items():
        whole = train(data(seed), config, seed=seed)
        states = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1)]
        results = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]), name
        assert results[0] == results[1], name
        assert results[0]["environment"]["processes"] == 2
        if config.optimizer != "sgd":
            continue  # Adam divides tiny gradients by their own size: rounding is not small there
        assert distance(whole.model.state_dict(), states[0]) < TOLERANCE, name
        expected = json.loads(json.dumps(whole.results))
        for key in ("history", "scores", "unimodal", "ranking", "distillation"):
            assert close(expected[key], results[0][key]), (name, key)


@pytest.mark.parametrize(
    ("processes", "count"),
    [(2, 3), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(3, 0, marks=pytest.mark.slow)],
)
def test_a_modality_that_few_rows_have_under_every_schedule_and_preset(processes, count, seed, tmp_path):
    """Batches of 4 rows over processes and pieces; the drawn combinations are the keys of the files."""
    done = launch("compare_matrix", tmp_path, seed, count, processes=processes, seconds=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, config in matrix(seed, count).items():
        whole = train(sparse(seed), replace(config, accumulate=1), seed=seed)
        states = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(processes)]
        assert all(torch.equal(state[k], states[0][k]) for state in states for k in state), name
        assert distance(whole.model.state_dict(), states[0]) < TOLERANCE, name
        assert close(
            json.loads(json.dumps(whole.results))["history"],
            json.loads((tmp_path / f"{name}-0.json").read_text())["history"],
        ), name


def test_a_process_that_dies_ends_the_job_with_one_line_and_a_usable_checkpoint(seed, tmp_path):
    done = launch("die", tmp_path, seed, 1)
    assert done.returncode != 0
    assert (tmp_path / "lost-0").is_file(), done.stderr[-3000:]
    line = (tmp_path / "lost-0").read_text()
    assert line.startswith("process 0 of 2: another process of this run died or does not answer (")
    assert str(tmp_path / "run") in line
    assert "\n" not in line
    alone = train(data(seed), small("dropout", epochs=4), seed=seed, run_dir=tmp_path / "run", resume=True)
    whole = train(data(seed), small("dropout", epochs=4), seed=seed)
    assert alone.results["history"][0]["val_score"] == pytest.approx(whole.results["history"][0]["val_score"], abs=0.05)
    assert len(alone.results["history"]) == 4


@pytest.mark.slow
def test_the_first_process_dies_and_the_job_resumes_with_two(seed, tmp_path):
    assert launch("die", tmp_path, seed, 0).returncode != 0
    assert (tmp_path / "lost-1").read_text().startswith("process 1 of 2: another process")
    assert launch("resume", tmp_path, seed).returncode == 0
    a, b = (load_file(tmp_path / f"resumed-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step_saved(seed, tmp_path):
    assert launch("interrupt", tmp_path, seed).returncode == 0
    found = [(tmp_path / f"interrupted-{rank}").read_text() for rank in (0, 1)]
    steps = {int(text.split()[0]) for text in found}
    assert len(steps) == 1
    epoch, step = divmod(steps.pop(), 4)  # 61 rows in batches of 16
    assert (epoch, step) >= (1, 2)  # the signal came in the sixth step
    assert f"epoch-{epoch:06d}-step-{step:06d}" in found[0]
    assert launch("resume", tmp_path, seed).returncode == 0


@pytest.mark.slow
def test_arguments_that_differ_a_folder_in_use_and_losses_that_cannot_be_split(seed, tmp_path):
    (tmp_path / "something").write_text("mine")
    assert launch("refuse", tmp_path, seed).returncode == 0
    for rank in (0, 1):
        found = json.loads((tmp_path / f"refused-{rank}.json").read_text())
        assert "process 1 of 2 has other arguments" in found["arguments"]
        assert "holds other files" in found["folder"]
        assert "cannot be split" in found["dropout"]


@pytest.mark.slow
def test_heads_inside_of_distributed_data_parallel(seed, tmp_path):
    done = launch("wrapped", tmp_path, seed)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = load_file(tmp_path / "whole.safetensors")
    for rank in (0, 1):
        for name, g in load_file(tmp_path / f"wrapped-{rank}.safetensors").items():
            torch.testing.assert_close(g, whole[name], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3])
def test_three_processes_with_accumulation_equal_one(processes, seed, tmp_path):
    """Batches of 16 and 13 rows in 9 pieces: some of them one row."""
    done = launch("compare", tmp_path, seed, 3, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, config in cases().items():
        if config.optimizer == "sgd":
            whole = train(data(seed), config, seed=seed)
            assert distance(whole.model.state_dict(), load_file(tmp_path / f"{name}-0.safetensors")) < TOLERANCE, name


def test_without_processes_distributed_is_refused_and_false_is_alone(seed):
    with pytest.raises(InputError, match="torchrun"):
        train(data(seed), small("vanilla", epochs=1), seed=seed, distributed=True)
    result = train(data(seed), small("vanilla", epochs=1), seed=seed, distributed=False)
    assert result.results["environment"]["processes"] == 1
