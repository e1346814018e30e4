"""Data larger than the memory: the same values, models and figures as in memory, within the budget."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import same_numbers, small

from mmc_fast.errors import InputError
from mmc_fast.experiments import data
from mmc_fast.experiments.data.scratch import Scratch, budget_bytes
from mmc_fast.experiments.training import train


@pytest.fixture(autouse=True)
def _brief_probe(monkeypatch):
    monkeypatch.setattr("mmc_fast.experiments.training.adversarial._PROBE_EPOCHS", 2)


def own_file(path: Path, seed: int, rows: int = 400, *, packed: bool = True, shuffled: bool = True) -> Path:
    """Three modalities of different types and layouts, some rows absent, some values not measured."""
    draw = np.random.default_rng(seed)
    labels = np.arange(rows) % 3
    means = draw.normal(size=(3, 7)) * 2
    x_a = (means[labels] + draw.normal(size=(rows, 7))).astype(np.float32)
    x_a[draw.random(rows) < 0.2] = np.nan
    x_b = np.asfortranarray(draw.normal(size=(rows, 5)) * [1, 100, 1e6, 0, 1] + 3.0)
    x_b[draw.random((rows, 5)) < 0.1] = np.nan
    x_b[:, 3] = 2.5
    x_c = draw.integers(0, 255, size=(rows, 2, 3)).astype(np.uint8)
    split = np.repeat([0, 1, 2], [rows // 2, rows // 4, rows - rows // 2 - rows // 4]).astype(np.uint8)
    if shuffled:
        split = draw.permutation(split)
    write = np.savez_compressed if packed else np.savez
    write(path, x_a=x_a, x_b=x_b, x_c=x_c, y=labels, split=split, ids=np.arange(rows) + 1000, meta='{"num_classes": 3}')
    return path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("policy", ["mean", "indicator"])
def test_mapped_data_hold_the_values_of_loaded_ones(packed, policy, seed, tmp_path):
    path = own_file(tmp_path / "own file – ü.npz", seed, packed=packed)
    plain = data.load(path, nan_policy=policy)
    mapped = data.load(path, nan_policy=policy, memory_budget=20_000, scratch=tmp_path)
    assert mapped.streamed
    assert not plain.streamed
    assert data.load(path, nan_policy=policy, memory_budget="1GB").streamed is False
    assert mapped.dims == plain.dims
    assert mapped.feature_names == plain.feature_names
    for name in ("train", "validation", "test"):
        a, b = plain.part(name), mapped.part(name)
        assert b.streamed
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.present, b.present)
        assert torch.equal(plain.ids[a.index], mapped.ids[b.index])
        for x, y in zip(a.features, b.features, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert list(tmp_path.iterdir()) == [path]  # the scratch files have no names


@pytest.mark.parametrize("method", ["vanilla", "kd", "ebr"])
def test_a_run_on_mapped_data_is_the_run_on_loaded_ones(method, seed, tmp_path, monkeypatch):
    """Same rows in the same order, so the same bits; what is summed piece by piece agrees up to rounding."""
    monkeypatch.setattr("mmc_fast.experiments.training.parts.STREAM_ROWS", 37)
    path = own_file(tmp_path / "own.npz", seed, shuffled=False)
    mapped = data.load(path, nan_policy="mean", memory_budget=20_000)
    plain = replace(mapped, features={k: x.clone() for k, x in mapped.features.items()}, streamed=False)
    config = small(method, control=False, modality_dropout=0.2 if method == "ebr" else 0.0)
    if method == "kd":
        config = replace(config, kd=replace(config.kd, epochs=1, batch_size=16, embedding_dim=4))
    a, b = (train(d, config, seed=seed) for d in (plain, mapped))
    assert a.results["data"]["fingerprint"] == b.results["data"]["fingerprint"]
    x, y = a.model.state_dict(), b.model.state_dict()
    for k in x:
        torch.testing.assert_close(x[k], y[k], rtol=1e-4, atol=1e-5)
    if method == "vanilla":
        assert same_numbers(a.results["history"], b.results["history"])


_LIMITED = """
import resource, sys, torch
torch.set_num_threads(1)
from training_data import small
from mmc_fast.experiments import data
from mmc_fast.experiments.training import train
import mmc_fast.experiments.training.loop, sklearn.metrics, numpy, scipy.linalg
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
budget = int(sys.argv[2])
warm = torch.randn(512, 512) @ torch.randn(512, 512)
square = numpy.eye(512)  # each linear algebra library takes its buffers at its first product
numpy.linalg.eigvalsh(square @ square), scipy.linalg.eigvalsh(square)
train(data.load("mfeat", modalities=["mor", "zer"]), small("vanilla", epochs=1, batch_size=64), seed=0)
resource.setrlimit(resource.RLIMIT_DATA, (anonymous() + budget, -1))
kwargs = {"memory_budget": budget // 4} if sys.argv[3] == "mapped" else {}
dataset = data.load(sys.argv[1], **kwargs)
train(dataset, small("vanilla", epochs=1, batch_size=64), seed=0)
print("done")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit on memory is that of Linux")
def test_data_larger_than_the_allowed_memory(seed, tmp_path):
    """The kernel forbids more than 130 MB beyond what the libraries take; loading the features takes 190 MB."""
    rows, d = 12_000, 1600
    draw = np.random.default_rng(seed)
    path = tmp_path / "large.npz"
    x = draw.standard_normal((rows, d), dtype=np.float32)
    split = np.repeat([0, 1, 2], [rows // 2, rows // 4, rows // 4]).astype(np.uint8)
    np.savez(path, x_a=x, x_b=x[:, :400], y=np.arange(rows) % 2, split=split)
    del x
    here = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    environment["MALLOC_ARENA_MAX"] = "1"  # further arenas, made where threads meet, count too

    def run(kind: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", _LIMITED, str(path), str(130_000_000), kind]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert "done" not in run("whole").stdout  # else the limit would prove nothing
    done = run("mapped")
    assert done.stdout.strip() == "done", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("text", "value"), [("2GB", 2 * 10**9), ("512 MiB", 512 * 2**20), ("1.5kb", 1500), (7, 7), ("12", 12)]
)
def test_budgets(text, value):
    assert budget_bytes(text) == value


@pytest.mark.parametrize("bad", ["", "much", "2 XB", "-1GB", 0, -5, 1.5, True, "1e9", "GB"])
def test_bad_budgets_are_one_line(bad, tmp_path):
    with pytest.raises(InputError, match="memory_budget") as error:
        data.load(own_file(tmp_path / "own.npz", 0), memory_budget=bad)
    assert "\n" not in str(error.value)


def test_misuse_of_the_budget_and_the_scratch_folder(tmp_path):
    path = own_file(tmp_path / "own.npz", 0)
    with pytest.raises(InputError, match="leave it out"):
        data.load("mfeat", memory_budget="1GB")
    with pytest.raises(InputError, match="memory_budget"):
        data.load(path, scratch=tmp_path)
    with pytest.raises(InputError, match=r"scratch folder .* cannot be used"):
        data.load(path, nan_policy="mean", memory_budget=1000, scratch=tmp_path / "none")
    with pytest.raises(InputError, match="bytes are needed"):
        Scratch(1000, tmp_path).empty((1 << 40, 1 << 10), np.float32)


def test_damage_in_a_mapped_file_is_found(seed, tmp_path):
    path = own_file(tmp_path / "own.npz", seed, packed=False)
    content = bytearray(path.read_bytes())
    at = content.index(b"x_a.npy") + 300
    content[at] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="damaged"):
        data.load(path, nan_policy="mean", memory_budget=1000)


def test_errors_of_mapped_data_name_the_row_of_the_file(seed, tmp_path):
    path = own_file(tmp_path / "own.npz", seed)
    with np.load(path) as arrays:
        content = {k: arrays[k].copy() for k in arrays.files}
    content["x_b"][:] = 1.0
    content["x_b"][123, 2] = np.inf
    np.savez(path, **content)
    messages = []
    for options in ({}, {"memory_budget": 1000}):
        with pytest.raises(InputError, match="row 123") as error:
            data.load(path, nan_policy="mean", **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
