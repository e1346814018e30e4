"""What a folder holds is what was written into it: exchanged, changed, missing and special files are named in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
from training_data import check_one_line, same_numbers, small, tiny

from mmc_fast._util.lock import LOCK_NAME
from mmc_fast.errors import InputError
from mmc_fast.experiments.manifest import MANIFEST, Manifest
from mmc_fast.experiments.training import Interrupted, SaveFailed, TrainingDiverged, load_predictions, load_run, train
from mmc_fast.experiments.training.progress import Silent

FILES = ("results.json", "model.safetensors", "unimodal.safetensors", "predictions.npz")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs that differ in their seed alone."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train(tiny(3), small("vanilla", epochs=1), seed=seed, run_dir=root / str(seed))
    return root


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs / "0", tmp_path / "run")


def refused(folder: Path, name: str) -> str:
    """What every reader says of a folder; it names the file and what to do."""

    def read() -> None:
        load_run(folder)
        load_predictions(folder)

    with pytest.raises(InputError) as error:
        read()
    check_one_line(error.value)
    assert name in str(error.value)
    assert "restore it, or train again" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_another_seeds_file_a_missing_one_and_a_changed_bit_are_named(name, run, runs):
    shutil.copy(runs / "1" / name, run / name)
    assert "changed or exchanged" in refused(run, name)
    shutil.copy(runs / "0" / name, run / name)
    load_run(run)
    content = bytearray((run / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run / name).write_bytes(content)
    assert "changed or exchanged" in refused(run, name)
    (run / name).unlink()
    assert "is missing" in refused(run, name)


@pytest.mark.parametrize("kind", ["FIFO", "symbolic link", "folder"])
@pytest.mark.parametrize("name", [*FILES, MANIFEST, "checkpoints/train/x", LOCK_NAME])
def test_special_files_are_refused_and_nothing_waits_or_is_written_through(kind, name, run, runs, tmp_path):
    path = run / name
    if path.exists():
        path.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        if name in ("checkpoints/train/x", LOCK_NAME):
            return  # no reader looks for it
        path.mkdir()
    else:
        path.symlink_to(elsewhere)
    with pytest.raises(InputError) as error:
        load_run(run)
    check_one_line(error.value)
    assert kind in str(error.value)
    assert elsewhere.read_text() == "mine"


@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_that_is_a_link_is_not_written_through(shared, tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / (".manifest.lock" if shared else LOCK_NAME)).symlink_to(tmp_path / "elsewhere")

    def write() -> None:
        if shared:
            Manifest.begin(tmp_path / "run", "comparison", {}, advice="x", shared=True).add([])
        else:
            train(tiny(3), small("vanilla", epochs=1), seed=0, run_dir=tmp_path / "run")

    with pytest.raises(InputError, match="is a symbolic link; a regular file is needed"):
        write()
    assert (tmp_path / "elsewhere").read_text() == "mine"


def rewrite(folder: Path, change) -> None:
    """A forger who knows the format: ``change(manifest document)``, and every hash is right afterwards."""
    from mmc_fast.experiments.manifest import _digest_of, _hash

    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    for name, entry in document["files"].items():
        entry["sha256"], entry["size"] = _hash(folder / name)
    del document["sha256"]
    (folder / MANIFEST).write_text(json.dumps(document | {"sha256": _digest_of(document)}))


RESULTS = [
    lambda r: r.clear(), lambda r: r.update(seed="0"), lambda r: r.update(seed=1), lambda r: r.update(config={}),
    lambda r: r.update(scores=[]), lambda r: r["scores"].update(complete="high"), lambda r: r.update(history={}),
    lambda r: r["data"].update(dims=[]), lambda r: r.update(schema_version=1), lambda r: r.pop("label"),
]  # fmt: skip


@pytest.mark.parametrize("change", RESULTS)
def test_a_right_hash_does_not_make_a_content(change, run):
    results = json.loads((run / "results.json").read_text())
    change(results)
    (run / "results.json").write_text(json.dumps(results))
    rewrite(run, lambda document: None)
    refused(run, "results.json")


IDENTITY = [
    lambda d: d.update(identity={}), lambda d: d["identity"].update(seed=None), lambda d: d.update(files=[]),
    lambda d: d["identity"]["config"].update(epochs=10**30), lambda d: d["identity"]["data"].update(dims={"a": -1}),
    lambda d: d["identity"]["data"].update(num_classes=10**15), lambda d: d.update(kind="comparison"),
]  # fmt: skip


@pytest.mark.parametrize("change", IDENTITY)
def test_a_forged_manifest_is_one_line(change, run):
    try:
        rewrite(run, change)
    except AttributeError:  # no files to hash any more
        document = json.loads((run / MANIFEST).read_text())
        change(document)
        (run / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(InputError) as error:
        load_run(run)
    check_one_line(error.value)


def test_a_flipped_digit_of_the_manifest_is_noticed(run):
    text = (run / MANIFEST).read_text()
    (run / MANIFEST).write_text(text.replace('"epochs": 1', '"epochs": 2'))
    with pytest.raises(InputError, match=r"manifest.json was changed after it was written"):
        load_run(run)


def test_what_made_a_file_stands_beside_it(run):
    found = json.loads((run / MANIFEST).read_text())
    assert found["kind"] == "run"
    assert found["identity"]["seed"] == 0
    for name in FILES:
        entry = found["files"][name]
        assert entry["size"] == (run / name).stat().st_size
        assert entry["by"]["mmc_fast"]
        assert entry["by"]["command"]


class At(Silent):
    """Calls something after an epoch of the run."""

    def __init__(self, call, stage: str = "train") -> None:
        self.call, self.stage, self.last = call, stage, ("", 0)

    def on_epoch(self, record):
        self.last = record["stage"], record["epoch"]
        if self.last == (self.stage, 2):
            self.call()


def test_a_folder_that_is_removed_or_exchanged_ends_the_run_loudly(tmp_path):
    folder = tmp_path / "run"

    def exchange():
        folder.rename(tmp_path / "other")
        folder.mkdir()

    for call, stage in ((lambda: shutil.rmtree(folder), "train"), (exchange, "train"), (exchange, "unimodal")):
        progress = At(call, stage)
        with pytest.raises(SaveFailed, match="was removed or exchanged") as error:
            train(tiny(3), small("vanilla"), seed=0, run_dir=folder, progress=progress)
        check_one_line(error.value)
        assert progress.last == (stage, 2)
        assert not folder.exists() or not list(folder.iterdir())
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(tmp_path / "other", ignore_errors=True)


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_kill_between_any_two_renames_of_a_run_resumes_bitwise(tmp_path, monkeypatch):
    """From the first rename (the manifest of an empty folder) to the last (that lists results.json)."""
    dataset, config = tiny(3), small("vanilla", epochs=1, keep_checkpoints=1)
    whole = train(dataset, config, seed=0, run_dir=tmp_path / "whole")
    real, count = os.replace, 0

    def run(limit: int, after: bool) -> bool:
        """Whether the run was killed."""
        nonlocal count
        count = 0

        def replace(*args):
            nonlocal count
            count += 1
            if count == limit and not after:
                raise Killed
            real(*args)
            if count == limit:
                raise Killed

        folder = tmp_path / f"{limit}-{after}"
        with monkeypatch.context() as m:
            m.setattr("mmc_fast._util.files.os.replace", replace)
            try:
                train(dataset, config, seed=0, run_dir=folder)
                return False
            except Killed:
                pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = train(dataset, config, seed=0, run_dir=folder, resume="auto")
        assert same_numbers(again.results, whole.results)
        assert same_numbers(load_run(folder).results, whole.results)
        assert all(bool((v == again.model.state_dict()[k]).all()) for k, v in whole.model.state_dict().items())
        return True

    limit = 1
    while run(limit, True) | run(limit, False):
        limit += 1
    assert limit > 10


def test_checkpoints_of_one_stage_are_not_taken_by_another(tmp_path):
    """Exchanged files, and exchanged files whose hash was made to fit."""
    dataset, config, folder = tiny(3), small("ebr", epochs=2), tmp_path / "run"

    class InControl(Silent):
        def on_epoch(self, record):
            if (record["stage"], record["epoch"]) == ("control", 1):
                raise Interrupted

    with pytest.raises(Interrupted):
        train(dataset, config, seed=0, run_dir=folder, progress=InControl())
    (control,) = (folder / "checkpoints" / "control").iterdir()
    for theirs in (folder / "checkpoints" / "train").iterdir():
        shutil.copy(theirs, control)
    for prepare in (lambda: None, lambda: rewrite(folder, lambda document: None)):
        prepare()
        with pytest.warns(UserWarning, match="is damaged"), pytest.raises(InputError, match="none of the 1 checkpoint"):
            train(dataset, config, seed=0, run_dir=folder, resume=True)


def test_a_shared_manifest_keeps_what_other_writers_listed(tmp_path):
    first = Manifest.begin(tmp_path, "comparison", {}, advice="x", shared=True)
    second = Manifest.read(tmp_path, advice="x", shared=True)
    for manifest, name in ((first, "a"), (second, "b"), (first, "c")):
        (tmp_path / name).write_text(name)
        manifest.add([tmp_path / name])
    assert sorted(Manifest.read(tmp_path, advice="x").files) == ["a", "b", "c"]


@pytest.mark.fuzz
def test_drawn_attacks_on_a_finished_run_are_named_or_change_nothing(seed, runs, tmp_path):
    """Files cut, changed, exchanged, linked, forged with right hashes: the same model, or one line."""
    draw, good = random.Random(seed), load_run(runs / "0")
    for n in range(12):
        folder = shutil.copytree(runs / "0", tmp_path / str(n))
        victim = folder / draw.choice([*FILES, MANIFEST])
        kind = draw.choice(["cut", "flip", "gone", "other seed", "other file", "fifo", "link", "json", "forged"])
        print(f"try {n}: {kind} {victim.name}")
        content = bytearray(victim.read_bytes())
        if kind in ("gone", "fifo", "link"):
            victim.unlink()
        if kind == "fifo":
            os.mkfifo(victim)
        elif kind == "link":
            victim.symlink_to(runs / "0" / victim.name)
        elif kind == "cut":
            victim.write_bytes(content[: draw.randrange(len(content))])
        elif kind == "other seed":
            shutil.copy(runs / "1" / victim.name, victim)
        elif kind == "other file":
            shutil.copy(runs / "0" / draw.choice(FILES), victim)
        elif kind == "json":
            victim.write_text(draw.choice(["{}", "[]", "null", "NaN", "7", '{"a": ' * 2000, '{"files": {}}']))
        elif kind != "gone":
            for _ in range(draw.choice([1, 1, 20])):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            victim.write_bytes(content)
        if kind == "forged" and victim.name != MANIFEST:
            rewrite(folder, lambda document: None)
        try:
            found = load_run(folder)
            load_predictions(folder)
        except InputError as error:
            check_one_line(error)
            continue
        assert kind in ("forged", "other file", "other seed"), kind
        if kind == "forged":  # a flipped digit with a right hash is a number like any other
            continue
        assert found.results == good.results


@pytest.mark.fuzz
def test_drawn_attacks_on_an_interrupted_run_end_in_the_same_numbers_or_a_line(seed, tmp_path):
    """Checkpoints exchanged among stages and steps, cut, changed, forged with right hashes."""
    draw = random.Random(seed)
    dataset, config = tiny(3), small("ebr", epochs=3, keep_checkpoints=3, unimodal_share=1.0)
    whole = train(dataset, config, seed=0)

    class InControl(Silent):
        def on_epoch(self, record):
            if (record["stage"], record["epoch"]) == ("control", 3):
                raise Interrupted

    with pytest.raises(Interrupted):
        train(dataset, config, seed=0, run_dir=tmp_path / "cut", progress=InControl())
    for n in range(6):
        folder = shutil.copytree(tmp_path / "cut", tmp_path / str(n))
        files = sorted((folder / "checkpoints").rglob("*.safetensors"))
        victim, other = draw.sample(files, 2)
        kind = draw.choice(["flip", "cut", "exchange", "gone", "forged"])
        print(f"try {n}: {kind} {victim.relative_to(folder)} {other.relative_to(folder)}")
        content = bytearray(victim.read_bytes())
        if kind == "gone":
            victim.unlink()
        elif kind == "cut":
            victim.write_bytes(content[: draw.randrange(len(content))])
        elif kind == "exchange" or (kind == "forged" and draw.random() < 0.5):
            shutil.copy(other, victim)
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            victim.write_bytes(content)
        if kind == "forged":
            rewrite(folder, lambda document: None)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = train(dataset, config, seed=0, run_dir=folder, resume=True)
        except (InputError, TrainingDiverged) as error:
            check_one_line(error)
            continue
        assert kind == "forged" or same_numbers(again.results, whole.results)
