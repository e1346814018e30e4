"""Killed anywhere, resumed from what the clock has saved: bit for bit the run that was never touched."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from training_data import same_numbers, small, tiny

from mmc_fast.experiments.training import Interrupted, TrainConfig, train
from mmc_fast.experiments.training.checkpoint import CheckpointStore


@pytest.fixture(autouse=True)
def _brief_probe(monkeypatch):
    monkeypatch.setattr("mmc_fast.experiments.training.adversarial._PROBE_EPOCHS", 2)


class Killed(BaseException):
    """Stands for SIGKILL."""


def config_of(kind: str) -> TrainConfig:
    always = {"checkpoint_seconds": 1e-9, "checkpoint_every": 100, "epochs": 3}
    if kind == "kd":
        config = small("kd", **always)
        return replace(config, kd=replace(config.kd, epochs=2, batch_size=16, embedding_dim=4))
    if kind == "interleave":
        sgd = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9}
        learner = {"modality_dropout": 0.3, "ebr_substitute": "mean"}
        return small("ebr", ebr_schedule="interleave", ebr_interleave_epochs=1, **learner, **sgd, **always)
    heads = {"ebr_cross_recovery": 0.2, "ebr_patience": 2}
    noise = {"noise_modality": "b", "noise_rate": 0.2, "modality_dropout": 0.3, "consistency": 1.0}
    loop = {"substitute_in_training": True, "selection": "masked", "clip_grad_norm": 1.0, "nonfinite": "skip"}
    learner = {"encoder_dropout": 0.2, "encoder_norm": True, "weight_average": 0.8}
    return small("ebr", **learner, **heads, **noise, **loop, **always)


@pytest.mark.parametrize("kind", ["kd", "interleave", "everything"])
def test_killed_after_any_save_and_resumed_is_bitwise_equal(kind, seed, tmp_path, monkeypatch):
    """Every step saves; the process dies right after a random one of these saves, several times in a row."""
    dataset, config = tiny(seed, absent=0.2), config_of(kind)
    whole = train(dataset, config, seed=seed)
    real, draw, saves = CheckpointStore.save, random.Random(seed), []
    left = draw.randrange(1, 30)

    def save(self, *args):
        nonlocal left
        path = real(self, *args)
        saves.append(str(path.relative_to(tmp_path)))
        left -= 1
        if left == 0:
            left = draw.randrange(1, 30)
            raise Killed
        return path

    monkeypatch.setattr(CheckpointStore, "save", save)
    kills = 0
    while True:
        try:
            resumed = train(dataset, config, seed=seed, run_dir=tmp_path / "run", resume="auto")
            break
        except Killed:
            kills += 1
            print(f"killed after {saves[-1]}")
            torch.manual_seed(kills)  # the global generator is nobody's business
    assert kills >= 1
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert same_numbers(whole.results, resumed.results)
    assert {name.split("/")[2] for name in saves} >= {"unimodal", "train"}  # every stage saves itself
    if kind == "kd":
        assert any("train-distillation" in name for name in saves)


@pytest.mark.parametrize("stage", ["unimodal", "train-distillation", "train", "control"])
def test_killed_in_the_first_epoch_of_a_stage_draws_the_later_ones_as_before(stage, seed, tmp_path, monkeypatch):
    """Drawn kills may all fall where nothing is drawn any more; here every stage loses its first epoch's process."""
    dataset, config = tiny(seed, absent=0.2), config_of("everything" if stage == "control" else "kd")
    config = config if config.kd is None else replace(config, kd=replace(config.kd, epochs=3))
    whole = train(dataset, config, seed=seed)
    real = CheckpointStore.save

    def save(self, *args):
        path = real(self, *args)
        if self.folder.name == stage:
            raise Killed
        return path

    with monkeypatch.context() as m:
        m.setattr(CheckpointStore, "save", save)
        with pytest.raises(Killed):
            train(dataset, config, seed=seed, run_dir=tmp_path / "run")
    resumed = train(dataset, config, seed=seed, run_dir=tmp_path / "run", resume=True)
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    for name, model in whole.unimodal.models.items():
        other = resumed.unimodal.models[name].state_dict()
        assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())
    assert same_numbers(whole.results, resumed.results)


def test_interrupted_after_the_last_step_of_an_epoch_keeps_lambda(seed, tmp_path, monkeypatch):
    """The figures of that epoch are taken after the resume, when no step sets λ again."""
    from mmc_fast.experiments.training.steps import Stepper

    dataset, config = tiny(seed), small("ebr", control=False)
    whole = train(dataset, config, seed=seed)
    real, count = Stepper.update, []

    def update(self, *args):
        import os
        import signal

        refused = real(self, *args)
        count.append(1)
        if len(count) == 4:  # 60 rows in batches of 16
            os.kill(os.getpid(), signal.SIGTERM)
        return refused

    monkeypatch.setattr(Stepper, "update", update)
    with pytest.raises(Interrupted, match="epoch-000000-step-000004"):
        train(dataset, config, seed=seed, run_dir=tmp_path / "run")
    monkeypatch.setattr(Stepper, "update", real)
    resumed = train(dataset, config, seed=seed, run_dir=tmp_path / "run", resume=True)
    assert same_numbers(whole.results, resumed.results)


def test_the_clock_decides_when_to_save_and_saving_changes_nothing(seed, tmp_path, monkeypatch):
    dataset = tiny(seed)
    saves = []
    real = CheckpointStore.save
    monkeypatch.setattr(CheckpointStore, "save", lambda self, c, e, s: (saves.append((e, s)), real(self, c, e, s))[1])
    config = small("dropout", unimodal_share=0.0, checkpoint_seconds=1e-9)
    result = train(dataset, config, seed=seed, run_dir=tmp_path / "often")
    assert (0, 1) in saves
    saves.clear()
    rare = train(dataset, replace(config, checkpoint_seconds=1e6), seed=seed, run_dir=tmp_path / "rarely")
    assert saves == [(1, 0), (2, 0), (3, 0)]
    assert all(torch.equal(v, rare.model.state_dict()[k]) for k, v in result.model.state_dict().items())
