"""Run folders under attack: locks, kills between any two file operations, damage in every file, a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_data import check_one_line, same_numbers, small, store_at, tiny

from mmc_fast._util import files as files_module
from mmc_fast._util.lock import LOCK_NAME, FolderLock
from mmc_fast.errors import InputError
from mmc_fast.experiments.training import Interrupted, SaveFailed, load_predictions, load_run, train
from mmc_fast.experiments.training.checkpoint import Checkpoint
from mmc_fast.experiments.training.progress import Silent


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def state(value: float) -> Checkpoint:
    return Checkpoint({"w": torch.full((3,), value)}, {"m": torch.full((2,), value)}, {"value": value})


def equal(a, b) -> bool:
    x, y = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(x[k], y[k]) for k in x) and same_numbers(a.results, b.results)


class StopAfter(Silent):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch(self, record):
        if (record["stage"], record["epoch"]) == ("train", self.epoch):
            os.kill(os.getpid(), signal.SIGTERM)


# Locks


def test_a_folder_in_use_is_refused_with_the_holder_and_freed_afterwards(tmp_path):
    path = tmp_path / ".lock"
    with FolderLock(path, "run_dir x"):
        with pytest.raises(InputError, match="run_dir x is in use by another process") as error:
            FolderLock(path, "run_dir x").acquire()
        assert "\n" not in str(error.value)
    with FolderLock(path, "run_dir x"):
        pass


def test_two_runs_in_one_folder_exclude_each_other_and_the_loser_changes_nothing(seed, tmp_path):
    dataset, config, seen = tiny(seed), small("vanilla", epochs=1), []

    class Second(Silent):
        def on_epoch(self, record):
            if record["stage"] != "train":
                return
            before = sorted(p.name for p in (tmp_path / "run").iterdir())
            for resume in (False, True, "auto"):
                with pytest.raises(InputError, match=r"in use by another process|holds a run already") as error:
                    train(dataset, config, seed=seed, run_dir=tmp_path / "run", resume=resume)
                seen.append(str(error.value))
            assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before

    train(dataset, config, seed=seed, run_dir=tmp_path / "run", progress=Second())
    assert len(seen) == 3
    assert sum("in use" in line for line in seen) == 2


def test_an_interrupted_and_a_failed_run_give_the_folder_back(seed, tmp_path):
    dataset, config, folder = tiny(seed), small("vanilla"), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(dataset, config, seed=seed, run_dir=folder, progress=StopAfter(1))

    class Fail(Silent):
        def on_epoch(self, record):
            raise KeyError("a fault of the caller")

    with pytest.raises(KeyError):
        train(dataset, config, seed=seed, run_dir=folder, resume=True, progress=Fail())
    train(dataset, config, seed=seed, run_dir=folder, resume=True)


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    path = tmp_path / ".lock"
    script = (
        "import sys, time; from pathlib import Path; from mmc_fast._util.lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1]), 'x'); lock.acquire(); print('held', flush=True); time.sleep(60)\n"
    )
    root = str(Path(__file__).resolve().parents[3])
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="in use"):
        FolderLock(path, "x").acquire()
    holder.kill()
    holder.wait()
    with FolderLock(path, "x"):
        pass


def test_what_a_kill_leaves_of_a_new_folder_does_not_stop_a_new_start(seed, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").write_text("process 1 on nowhere")
    (folder / ".manifest.json.abcd.tmp").write_text("{")
    train(tiny(seed), small("vanilla", epochs=1), seed=seed, run_dir=folder, resume="auto")
    with pytest.raises(InputError, match="resume is 'perhaps'"):
        train(tiny(seed), small("vanilla"), seed=seed, run_dir=folder, resume="perhaps")


# Kills between file operations


def test_a_kill_between_any_two_file_operations_leaves_a_readable_store(tmp_path, monkeypatch):
    """Saves two steps; stops before the n-th rename or synchronisation, for every n."""
    operations = ["os.replace", "os.fsync"]
    real = {name: eval(f"files_module.{name}", {"files_module": files_module}) for name in operations}

    def run(limit: int | None) -> int:
        folder = tmp_path / f"run-{limit}" / "train"
        store = store_at(folder, keep=1)
        store.save(state(1), 1, 0)
        count = 0

        def counting(name):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if limit is not None and count > limit:
                    raise Killed
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as m:
            for name in operations:
                m.setattr(f"mmc_fast._util.files.{name}", counting(name))
            with contextlib.suppress(Killed):
                store.save(state(2), 1, 1)
        found = store_at(folder, keep=1).latest()
        assert found is not None, f"nothing is left after operation {limit}"
        assert found.meta["value"] in (1, 2)
        assert float(found.weights["w"][0]) == found.meta["value"]
        return count

    total = run(None)
    assert total == 6  # file, rename and folder of the checkpoint, then of the manifest
    for limit in range(total):
        run(limit)


# Damage


def damage(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = draw.choice(["cut", "flip", "many", "zeros", "empty", "gone", "other"])
    if kind == "gone":
        path.unlink()
        return kind
    if kind == "cut":
        content = content[: draw.randrange(len(content))]
    elif kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "many":
        for _ in range(20):
            content[draw.randrange(len(content))] = draw.randrange(256)
    elif kind == "zeros":
        content = bytearray(len(content))
    elif kind == "other":
        content = bytearray(draw.choice([b"[]", b"null", b"7", b'{"a": 1}', b"\xff\xfe", b"PK\x03\x04"]))
    else:
        content = bytearray()
    path.write_bytes(bytes(content))
    return kind


@pytest.mark.fuzz
@pytest.mark.parametrize("method", ["kd", "ebr"])
def test_random_damage_of_an_interrupted_run_is_repaired_or_one_line(method, seed, tmp_path, monkeypatch):
    """A resumed run equals the undisturbed one bit for bit, or says in one line what is wrong; never anything else."""
    monkeypatch.setattr("mmc_fast.experiments.training.adversarial._PROBE_EPOCHS", 2)
    draw = random.Random(seed)
    config = small(method, epochs=3, control=False, keep_checkpoints=3)
    if method == "kd":
        config = replace(config, kd=replace(config.kd, epochs=1, batch_size=16, embedding_dim=4))
    dataset = tiny(seed)
    whole = train(dataset, config, seed=seed)
    with pytest.raises(Interrupted):
        train(dataset, config, seed=seed, run_dir=tmp_path / "cut", progress=StopAfter(2))
    outcomes = {"resumed": 0, "refused": 0}
    for n in range(14):
        folder = tmp_path / f"try-{n}"
        shutil.copytree(tmp_path / "cut", folder)
        victim = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.name != LOCK_NAME))
        kind = damage(victim, draw)
        print(f"try {n}: {kind} {victim.relative_to(folder)}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                resumed = train(dataset, config, seed=seed, run_dir=folder, resume=True)
        except InputError as error:
            check_one_line(error)
            outcomes["refused"] += 1
        else:
            assert equal(whole, resumed)
            outcomes["resumed"] += 1
    print(outcomes)


@pytest.mark.fuzz
def test_random_damage_of_a_finished_run_is_found(seed, tmp_path):
    """Every changed bit of the weights is noticed; other files are read or refused in one line."""
    draw = random.Random(seed)
    train(tiny(seed), small("vanilla", epochs=1), seed=seed, run_dir=tmp_path / "run")
    good = load_run(tmp_path / "run")
    for n in range(40):
        folder = tmp_path / f"try-{n}"
        shutil.copytree(tmp_path / "run", folder)
        victim = draw.choice(sorted(p for p in folder.iterdir() if p.is_file() and p.name != LOCK_NAME))
        kind = damage(victim, draw)
        print(f"try {n}: {kind} {victim.name}")
        try:
            loaded = load_run(folder)
            load_predictions(folder)
        except InputError as error:
            check_one_line(error)
            continue
        a, b = good.model.state_dict(), loaded.model.state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_nothing_intact_and_strangers_are_one_line_and_stay(seed, tmp_path):
    store = store_at(tmp_path / "run" / "a", keep=2, run="mine")
    for n in (1, 2):
        store.save(state(n), n, 0).write_bytes(b"\xff")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(InputError, match="none of the 2 checkpoint"):
        store.latest()
    assert len(list((tmp_path / "run" / "a").iterdir())) == 2
    other = store_at(tmp_path / "other" / "a", keep=2, run="theirs").save(state(1), 2, 0)
    shutil.copy(other, tmp_path / "run" / "a")
    with (
        pytest.warns(UserWarning, match="changed or exchanged"),
        pytest.raises(InputError, match="none of the 2 checkp"),
    ):
        store.latest()
    store.manifest.add([tmp_path / "run" / "a" / other.name])  # even where the hash is right
    with (
        pytest.warns(UserWarning, match="another run, stage or step"),
        pytest.raises(InputError, match="none of the 2"),
    ):
        store.latest()


def test_after_a_fall_back_the_damaged_future_is_dropped_not_the_new_state(tmp_path):
    store = store_at(tmp_path / "train", keep=2)
    store.save(state(1), 1, 0)
    store.save(state(9), 5, 0).write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.latest().meta["value"] == 1
    store.save(state(2), 2, 0)
    assert store.latest().meta["value"] == 2


# Disks


def test_a_full_disk_is_one_line_and_keeps_the_last_good_state(seed, tmp_path, monkeypatch):
    dataset, config, folder = tiny(seed), small("vanilla", epochs=4), tmp_path / "run"
    saves, real = [], files_module._sync

    def full(path):
        saves.extend([path] if "checkpoints/train" in str(path) else [])
        if len(saves) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path)

    monkeypatch.setattr("mmc_fast._util.files._sync", full)
    with pytest.raises(SaveFailed, match=r"No space left on device\); last good checkpoint: .*epoch-00000\d") as error:
        train(dataset, config, seed=seed, run_dir=folder)
    assert "\n" not in str(error.value)
    assert not [p for p in folder.rglob(".*") if p.name != ".lock"]  # no half-written files
    monkeypatch.setattr("mmc_fast._util.files._sync", real)
    assert equal(train(dataset, config, seed=seed, run_dir=folder, resume=True), train(dataset, config, seed=seed))


def test_a_file_size_limit_of_the_system_is_one_line_on_the_command_line(seed, tmp_path):
    """The real thing: the kernel refuses the write, the command prints one line and exits with 1."""
    resource = pytest.importorskip("resource")
    script = (
        "import resource, sys; from mmc_fast.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        "sys.argv = ['mmc-fast', 'train', '--data', 'mfeat', '--method', 'vanilla', '--epochs', '1', '--run-dir', sys.argv[1]]\n"
        "main()\n"
    )
    assert resource
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("mmc-fast:")]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1
    assert "could not be written (" in lines[0]
    assert "Traceback" not in done.stderr


def test_paths_with_spaces_and_unicode(seed, tmp_path):
    folder = tmp_path / "ein Lauf – Ωμέγα 模态 'quoted' %s {x}"
    dataset, config = tiny(seed), small("ebr", epochs=2)
    with pytest.raises(Interrupted):
        train(dataset, config, seed=seed, run_dir=folder, progress=StopAfter(1))
    resumed = train(dataset, config, seed=seed, run_dir=folder, resume=True)
    assert equal(resumed, train(dataset, config, seed=seed))
    load_predictions(folder)
