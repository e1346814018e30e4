"""Files that are whole or absent, checkpoints that can be trusted, and no pickle anywhere."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import small, store_at, tiny

from mmc_fast._util import files
from mmc_fast._util.atomic import write_json, write_npz, write_tensors
from mmc_fast.experiments.training.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from mmc_fast.experiments.training.loop import train


def state(value: float) -> Checkpoint:
    return Checkpoint({"w": torch.full((3,), value)}, {"m": torch.full((2,), value)}, {"value": value})


class Broken(Exception):
    pass


@pytest.mark.parametrize(
    "write",
    [
        lambda p, v: write_json(p, {"v": v}),
        lambda p, v: write_tensors(p, {"v": torch.full((4,), float(v))}),
        lambda p, v: write_npz(p, {"v": np.full(4, v)}),
    ],
    ids=["json", "tensors", "npz"],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(write, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, 1)
    before = path.read_bytes()

    def fail(*_):
        raise Broken

    for point in ("_sync", "os.replace"):
        with monkeypatch.context() as m:
            m.setattr(f"mmc_fast._util.files.{point}", fail)
            with pytest.raises(Broken):
                write(path, 2)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write(path, 2)
    assert path.read_bytes() != before


def test_contents_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(files, "_sync", lambda p: events.append("folder" if p.is_dir() else "file"))
    replace = files.os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_json(tmp_path / "a.json", {})
    assert events == ["file", "rename", "folder"]


def test_files_get_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    write_json(tmp_path / "a.json", {})
    write_tensors(tmp_path / "a.safetensors", {"v": torch.zeros(2)})
    for name in ("a.json", "a.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_newest_ones_are_kept_and_read(tmp_path):
    store = store_at(tmp_path / "c", keep=2)
    assert store.latest() is None
    for epoch, step in ((1, 0), (2, 5), (2, 11), (10, 0)):
        store.save(state(epoch + step), epoch, step)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "epoch-000002-step-000011.safetensors",
        "epoch-000010-step-000000.safetensors",
    ]
    latest = store.latest()
    assert latest.meta["value"] == 10
    assert torch.equal(latest.weights["w"], torch.full((3,), 10.0))
    assert torch.equal(latest.tensors["m"], torch.full((2,), 10.0))


@pytest.mark.parametrize("damage", ["cut", "flip", "counter", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(damage, tmp_path):
    store = store_at(tmp_path / "c", keep=2)
    store.save(state(1), 1, 0)
    path = store.save(state(2), 2, 0)
    content = path.read_bytes()
    changed = {
        "cut": content[: len(content) // 2],
        "flip": content[:-1] + bytes([content[-1] ^ 1]),  # the last byte is data
        "counter": content.replace(b'value\\": 2', b'value\\": 3'),
        "empty": b"",
    }[damage]
    assert changed != content
    path.write_bytes(changed)
    with pytest.warns(UserWarning, match="damaged"):
        found = store.latest()
    assert found.meta["value"] == 1


def test_a_place_that_is_saved_is_not_written_again_unless_it_is_damaged(tmp_path):
    store = store_at(tmp_path / "c", keep=2)
    path = store.save(state(1), 1, 0)
    before = path.stat().st_mtime_ns, path.read_bytes()
    store.save(state(1), 1, 0)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    path.write_bytes(b"x")
    store.save(state(1), 1, 0)
    assert store.latest().meta["value"] == 1
    assert len(list((tmp_path / "c").iterdir())) == 1


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_optimizer_state_survives(kind, seed):
    def build():
        torch.manual_seed(seed)
        layer = torch.nn.Linear(3, 2)
        if kind == "sgd":
            return layer, torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=True)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    with torch.random.fork_rng():
        first, optimizer = build()
        second, other = build()
    for _ in range(3):
        step(first, optimizer)
    second.load_state_dict(first.state_dict())
    restore_optimizer(other, {k: v.clone() for k, v in optimizer_tensors(optimizer).items()})
    for _ in range(3):
        step(first, optimizer)
        step(second, other)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_checkpoint_every_and_keep(seed, tmp_path):
    config = small("vanilla", epochs=5, checkpoint_every=2, keep_checkpoints=2)
    train(tiny(seed), config, seed=seed, run_dir=tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "train").iterdir())
    assert names == [f"epoch-00000{n}-step-000000.safetensors" for n in (4, 5)]


def test_no_file_of_a_run_is_a_pickle(seed, tmp_path):
    train(tiny(seed), small("ebr", epochs=1), seed=seed, run_dir=tmp_path / "run")
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"]
    assert {p.suffix for p in files} == {".json", ".safetensors", ".npz"}
    with np.load(tmp_path / "run" / "predictions.npz", allow_pickle=False) as arrays:
        assert all(arrays[k].dtype != object for k in arrays.files)


def test_killed_process_leaves_a_run_that_resumes_bitwise(seed, tmp_path):
    """SIGKILL after the second epoch, in a process of its own; the resumed run equals one that never stopped."""
    script = (
        "import os, signal, sys; import torch; torch.set_num_threads(1)\n"
        "from training_data import small, store_at, tiny\n"
        "from mmc_fast.experiments.training import train\n"
        "from mmc_fast.experiments.training.progress import Silent\n"
        "class Kill(Silent):\n"
        "    def on_epoch(self, r):\n"
        "        if (r['stage'], r['epoch']) == ('train', 2): os.kill(os.getpid(), signal.SIGKILL)\n"
        "train(tiny(int(sys.argv[1])), small('dropout'), seed=5, run_dir=sys.argv[2], progress=Kill())\n"
    )
    folder, here = tmp_path / "run", Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{here}:{here.parent}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script, str(seed), str(folder)], env=environment, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    resumed = train(tiny(seed), small("dropout"), seed=5, run_dir=folder, resume=True)
    whole = train(tiny(seed), small("dropout"), seed=5)
    a, b = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
