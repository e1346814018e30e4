"""``mmc-fast diagnose``: a run, weights behind an adapter, pages, comparison, a process that is killed and started again."""

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
import torch
from command_line import run
from safetensors.torch import save_file

from mmc_fast.diagnose import Diagnosis, diagnose
from mmc_fast.experiments import data
from mmc_fast.experiments.training import TrainConfig, load_run, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diagnose")


@pytest.fixture(scope="module")
def own_file(folder: Path) -> Path:
    """A small data set in the layout of a user's file."""
    drawn = data.synthetic(400, modalities=2, num_classes=3, missing_rate=0.1, seed=3)
    path = folder / "own.npz"
    arrays = {f"x_{name}": x.numpy() for name, x in drawn.features.items()}
    arrays |= {f"present_{name}": drawn.present[:, i].numpy() for i, name in enumerate(drawn.modalities)}
    np.savez(path, meta='{"kind": "classification"}', y=drawn.labels.numpy(), split=drawn.split.numpy(), **arrays)
    return path


@pytest.fixture(scope="module", params=["vanilla", "ebr"])
def finished(request, folder: Path, own_file: Path) -> Path:
    dataset = data.load(own_file)
    dataset.info["loaded"] = {"data": str(own_file)}
    values = {"method": request.param, "epochs": 3, "encoder_width": 8, "encoder_dim": 8}
    if request.param == "ebr":
        values["ebr"] = {"latent_dim": 8, "hidden_dim": 8, "psi_dims": [8]}
    train(dataset, TrainConfig.from_dict(values), seed=1, run_dir=folder / request.param)
    return folder / request.param


def test_a_run(finished: Path, own_file: Path, tmp_path: Path) -> None:
    out, _ = run("diagnose", "--run", finished, "--json", "--resamples", "20", "--html", tmp_path / "page.html")
    found = Diagnosis.from_json(out)
    loaded = load_run(finished)
    alone = {name: found.value(f"alone.{name}") for name in found.modalities}
    assert alone == {name: entry["evidence"]["alone"] for name, entry in loaded.results["scores"]["reliance"].items()}
    assert found == diagnose(loaded, data.load(own_file), resamples=20)
    assert list(found.modalities) == ["a", "b"]
    assert found.settings["agop"].startswith("co-activation")
    assert ("modality_probe.balanced_accuracy" in found.measures) == (finished.name == "ebr")
    assert "weight_classifier.cross_entropy" in found.measures
    assert "<h2>Modalities" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not (finished / "diagnose-test.state").exists()
    (tmp_path / "d.json").write_text(out, encoding="utf-8")
    text, _ = run("diagnose", "--run", finished, "--resamples", "20", "--compare", tmp_path / "d.json")
    assert "use_share.a" in text
    assert "Use over ability" in text or "cannot be judged" in text
    other, _ = run("diagnose", "--run", finished, "--part", "train", "--resamples", "0", "--json")
    assert Diagnosis.from_json(other).n_samples == 240


def test_the_score_is_that_of_the_run(finished: Path) -> None:
    """Complete data score the same through the adapter as in the evaluation, substitution of absent ones included."""
    loaded = load_run(finished)
    out, _ = run("diagnose", "--run", finished, "--json", "--resamples", "0")
    complete = loaded.results["scores"]["complete"]
    assert Diagnosis.from_json(out).value("score.all") == pytest.approx(complete, abs=1e-9)


ADAPTER = """
import torch
from torch import nn

class Adapter:
    def __init__(self, tensors):
        self.head = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
        self.head.load_state_dict(tensors)
        self.head.eval()

    def encode(self, batch):
        return {"a": batch.features[0], "b": batch.features[1]}

    def fuse(self, features):
        return self.head(torch.cat(list(features.values()), 1))

    def labels(self, batch):
        return batch.labels

class Slow(Adapter):
    def load(self, path):
        import time
        class Batches:
            def __len__(self):
                return 60
            def __iter__(self):
                for index in range(60):
                    time.sleep(0.05)
                    g = torch.Generator().manual_seed(index)
                    yield torch.randn(5000, 24, generator=g), torch.randint(3, (5000,), generator=g)
        return Batches()

    def encode(self, batch):
        return {"a": batch[0][:, :12], "b": batch[0][:, 12:]}

    def labels(self, batch):
        return batch[1]
"""


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_adapter.py").write_text(ADAPTER, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_adapter", None)
    g = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (16, 24), "0.bias": (16,), "2.weight": (3, 16), "2.bias": (3,)}
    save_file({name: torch.randn(shape, generator=g) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_weights_behind_an_adapter(own_model: Path, own_file: Path) -> None:
    out, _ = run(
        "diagnose",
        "--weights",
        own_model,
        "--adapter",
        "my_adapter:Adapter",
        "--data",
        own_file,
        "--json",
        "--resamples",
        "0",
    )
    assert Diagnosis.from_json(out).modalities == {"a": 12, "b": 12}


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "either --run, or --weights"),
        (["--run", "nowhere"], "holds no run"),
        (["--adapter", "my_adapter:Adapter", "--weights", "model.safetensors"], "needs --weights and --data"),
        (["--adapter", "my_adapter", "--weights", "model.safetensors", "--data", "x"], "module:function"),
        (["--adapter", "nothing_here:f", "--weights", "model.safetensors", "--data", "x"], "cannot be imported"),
        (["--adapter", "my_adapter:absent", "--weights", "model.safetensors", "--data", "x"], "has no absent"),
        (["--adapter", "my_adapter:Adapter", "--weights", "my_adapter.py", "--data", "x"], "as safetensors"),
        (["--adapter", "my_adapter:Adapter", "--weights", "wrong.safetensors", "--data", "x"], "failed on wrong"),
        (["--adapter", "my_adapter:Adapter", "--weights", "model.safetensors", "--data", "x"], "x"),
        (["--compare", "my_adapter.py"], "my_adapter.py cannot be used"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], hint: str, own_model: Path) -> None:
    save_file({"other": torch.ones(2)}, "wrong.safetensors")
    before = sorted(os.listdir())
    out, error = run("diagnose", *arguments, code=2)
    assert not out
    assert hint in error
    assert error.count("\n") == 1
    assert [name for name in sorted(os.listdir()) if name != "__pycache__"] == [n for n in before if n != "__pycache__"]


def test_a_killed_process_goes_on_with_the_same_numbers(own_model: Path) -> None:
    code = (
        "import torch; torch.set_num_threads(1)\nfrom mmc_fast.cli.diagnose import run_diagnose\nfrom pathlib import Path\n"
        "d = run_diagnose(None, Path('model.safetensors'), 'my_adapter:Slow', 'anything', part='test', options={}, state=None,\n"
        "    settings={'resamples': 10, 'probes': False}, save_every=0.2)\nprint(d.to_json())"
    )
    state = Path("model.safetensors.diagnose.state")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not state.exists() and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert state.exists(), "killed before it stored anything, or after it was done"
    second = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    state.unlink(missing_ok=True)
    whole = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert second.returncode == whole.returncode == 0, second.stderr
    assert json.loads(second.stdout) == json.loads(whole.stdout)
