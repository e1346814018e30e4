"""Whole runs: repeats, resumes, Ctrl-C, divergence, labels, the record, and what no run may look at."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_data import same_numbers, small, tiny

from mmc_fast.errors import InputError
from mmc_fast.experiments.data import MultimodalDataset
from mmc_fast.experiments.training import METHODS, Interrupted, TrainingDiverged, load_predictions, load_run, train
from mmc_fast.experiments.training.progress import Silent
from mmc_fast.experiments.training.steps import Stepper


@pytest.fixture(autouse=True)
def _brief_probe(monkeypatch):
    """The modality probe has tests of its own; here it need not converge."""
    monkeypatch.setattr("mmc_fast.experiments.training.adversarial._PROBE_EPOCHS", 3)


class At(Silent):
    """Calls ``action`` after epoch ``epoch`` of ``stage``; keeps what it was told."""

    def __init__(self, stage: str = "", epoch: int = 0, action=None) -> None:
        self.stage, self.epoch, self.action = stage, epoch, action
        self.total, self.seen, self.ended = 0, [], 0

    def on_start(self, total_epochs, label):
        self.total = total_epochs

    def on_epoch(self, record):
        self.seen.append((record["stage"], record["epoch"]))
        if (record["stage"], record["epoch"]) == (self.stage, self.epoch):
            self.action()

    def on_end(self, results):
        self.ended += 1


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def config_of(method: str, **changes):
    """Everything that holds random state at once: masks in training, masked selection, cross-modal sources."""
    if method == "ebr":
        changes = {
            "modality_dropout": 0.3,
            "ebr_cross_recovery": 0.2,
            "substitute_in_training": True,
            "selection": "masked",
        } | changes
    if method == "kd":
        config = small("kd", **changes)
        return replace(config, kd=replace(config.kd, epochs=2, batch_size=16, embedding_dim=4))
    return small(method, **changes)


def weights(result) -> dict[str, torch.Tensor]:
    return result.model.state_dict()


def equal_weights(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_numbers_other_seed_other_numbers(method, seed):
    dataset, config = tiny(seed, absent=0.2), config_of(method)
    first, second = (train(dataset, config, seed=seed) for _ in range(2))
    assert equal_weights(weights(first), weights(second))
    assert same_numbers(first.results, second.results)
    other = train(dataset, config, seed=seed + 1)
    assert not equal_weights(weights(first), weights(other))


def test_a_run_neither_reads_nor_changes_the_global_generator(seed):
    dataset, config = tiny(seed), config_of("ebr")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train(dataset, config, seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert equal_weights(weights(first), weights(train(dataset, config, seed=seed)))


@pytest.mark.parametrize("fusion", ["concat", "late", "transformer"])
@pytest.mark.parametrize("substitute", [("ranked", "reference"), ("ranked", "pairwise"), ("mean", "reference")])
def test_every_fusion_with_every_substitution(fusion, substitute, seed):
    config = small(
        "ebr", epochs=1, fusion=fusion, ebr_substitute=substitute[0], ebr_ranking=substitute[1], control=False
    )
    result = train(tiny(seed, absent=0.3), config, seed=seed).results
    assert result["scores"]["mean_missing"] >= 0
    assert result["ranking"]["substitute"] == substitute[0]


@pytest.mark.parametrize(
    ("method", "stage", "epoch"),
    [
        ("dropout", "train", 2),
        ("kd", "unimodal", 1),
        ("kd", "distillation", 1),
        ("ebr", "control", 1),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one_bitwise(method, stage, epoch, seed, tmp_path):
    dataset, config = tiny(seed, absent=0.2), config_of(method)
    whole = train(dataset, config, seed=seed, run_dir=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(dataset, config, seed=seed, run_dir=tmp_path / "cut", progress=At(stage, epoch, ctrl_c))
    assert not (tmp_path / "cut" / "results.json").exists()
    torch.manual_seed(seed)  # a resumed run must not depend on the global generator
    resumed = train(dataset, config, seed=seed, run_dir=tmp_path / "cut", resume=True)
    assert equal_weights(weights(whole), weights(resumed))
    assert same_numbers(whole.results, resumed.results)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_ctrl_c_within_an_epoch_finishes_the_step_and_resumes_bitwise(optimizer, seed, tmp_path, monkeypatch):
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    dataset, config = tiny(seed, absent=0.2), config_of("ebr", optimizer=optimizer, lr=0.01, **momentum)
    whole = train(dataset, config, seed=seed)
    steps = []
    original = Stepper.update

    def update(self, *args):
        steps.append(1)
        if len(steps) == 6:  # 4 steps an epoch: the second step of the second epoch
            ctrl_c()
        return original(self, *args)

    monkeypatch.setattr(Stepper, "update", update)
    with pytest.raises(Interrupted, match="epoch-000001-step-000002"):
        train(dataset, config, seed=seed, run_dir=tmp_path / "run")
    assert len(steps) == 6
    monkeypatch.setattr(Stepper, "update", original)
    resumed = train(dataset, config, seed=seed, run_dir=tmp_path / "run", resume=True)
    assert equal_weights(weights(whole), weights(resumed))
    assert same_numbers(whole.results, resumed.results)


def test_ctrl_c_without_a_folder_says_that_nothing_was_saved_and_restores_the_handler(seed):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="nothing was saved"):
        train(tiny(seed), small("vanilla"), seed=0, progress=At("train", 1, ctrl_c))
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_ends_at_once(seed):
    def twice():
        ctrl_c()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt) as error:
        train(tiny(seed), small("vanilla"), seed=0, progress=At("train", 1, twice))
    assert not isinstance(error.value, Interrupted)


def test_progress_hears_every_epoch_and_the_total_is_right(seed, tmp_path):
    heard = At()
    config = replace(config_of("ebr"), kd=config_of("kd").kd)
    train(tiny(seed), config, seed=seed, progress=heard)
    stages = [s for s, _ in heard.seen]
    assert {s: stages.count(s) for s in stages} == {"unimodal": 3, "distillation": 8, "train": 3, "control": 3}
    assert heard.total == len(heard.seen)
    assert heard.ended == 1
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny(seed), config, seed=seed, run_dir=folder, progress=At("train", 2, ctrl_c))
    rest = At()
    train(tiny(seed), config, seed=seed, run_dir=folder, progress=rest, resume=True)
    assert rest.total == len(rest.seen) == 1 + 4 + 3  # an epoch, the control's distillation, the control


@pytest.mark.parametrize(
    ("changes", "dims", "label"),
    [
        ({}, (5, 3, 4), "ebr"),
        ({"ebr_reversal": 0.0}, (5, 3, 4), "without-effect"),
        ({"ebr_reversal": 0.0, "control": False}, (5, 3, 4), "without-effect"),
        ({}, (5,), "without-effect"),
        ({"ebr_modalities": ("b",)}, (5, 3, 4), "without-effect"),
        ({"ebr_schedule": "interleave", "ebr_interleave_epochs": 3}, (5, 3, 4), "without-effect"),
        ({"ebr_schedule": "interleave", "ebr_interleave_epochs": 3, "control": False}, (5, 3, 4), "without-effect"),
        ({"control": False}, (5, 3, 4), "ebr"),
        ({"ebr_modalities": ("a", "c")}, (5, 3, 4), "ebr"),
    ],
)
def test_label_says_whether_lambda_changed_anything(changes, dims, label, seed):
    results = train(tiny(seed, dims=dims), small("ebr", **changes), seed=seed).results
    assert results["label"] == label
    distance = results["adversarial"]["distance_to_lambda0"]
    if changes.get("control") is False and label == "ebr":
        assert distance is None
    elif label == "ebr":
        assert distance > 1e-4
    elif distance is not None:
        assert distance == 0.0


def test_model_selected_before_the_first_reversed_gradient_is_without_effect(seed):
    """The last weights differ from the control's, but the selected epoch came before the first reversed gradient."""
    config = small("ebr", epochs=3, ebr_schedule="interleave", ebr_interleave_epochs=2, lr=1e-6)
    results = train(tiny(seed), config, seed=seed).results
    assert results["adversarial"]["distance_to_lambda0"] > 0
    assert results["adversarial"]["first_active_epoch"] == 3
    assert results["label"] == ("ebr" if results["selected_epoch"] == 3 else "without-effect")


def test_distance_is_that_of_separately_trained_runs(seed):
    for drawn in range(seed, seed + 8):  # until one has a discriminator whose units are not all dead
        dataset = tiny(drawn)
        results = train(dataset, small("ebr", selection="last", epochs=2), seed=drawn)
        zero = train(dataset, small("ebr", selection="last", epochs=2, ebr_reversal=0.0), seed=drawn)
        a, b = weights(results), weights(zero)
        names = [n for n, _ in results.model.named_parameters() if not n.startswith("head.discriminator")]
        flat = [torch.cat([s[n].double().flatten() for n in names]) for s in (a, b)]
        expected = float((flat[0] - flat[1]).norm() / flat[1].norm())
        assert results.results["adversarial"]["distance_to_lambda0"] == pytest.approx(expected, rel=1e-9)
        assert results.results["adversarial"]["control"] == {
            "modality_probe": zero.results["adversarial"]["modality_probe"],
            "best_epoch": zero.results["selected_epoch"],
            "best_val_score": zero.results["selected_val_score"],
        }
        if not torch.equal(a["head.discriminator.0.weight"], b["head.discriminator.0.weight"]):
            return
    pytest.fail("no discriminator differs from that of the run without reversal")


@pytest.mark.parametrize("method", ["vanilla", "ebr"])
def test_test_rows_change_nothing_but_test_scores(method, seed):
    dataset = tiny(seed, absent=0.2)
    rows = dataset.split == 2
    poison = {k: torch.where(rows[:, None], torch.full_like(x, 1e30), x) for k, x in dataset.features.items()}
    flipped = dataset.present.clone()
    flipped[rows] = ~flipped[rows]
    labels = torch.where(rows, (dataset.labels + 1) % 3, dataset.labels)
    other = replace(dataset, features=poison, present=flipped, labels=labels)
    config = config_of(method)
    a, b = (train(d, config, seed=seed, evaluate_on=("validation",)) for d in (dataset, other))
    assert equal_weights(weights(a), weights(b))  # includes the ranking and its similarities
    assert a.results["data"].pop("fingerprint") != b.results["data"].pop("fingerprint")
    assert same_numbers(a.results, b.results)


def test_evaluating_on_validation_never_asks_for_the_test_part(seed, monkeypatch):
    asked = []
    original = MultimodalDataset.part
    monkeypatch.setattr(MultimodalDataset, "part", lambda self, name: (asked.append(name), original(self, name))[1])
    train(tiny(seed), config_of("ebr"), seed=seed, evaluate_on=("validation",))
    assert set(asked) == {"train", "validation"}
    train(tiny(seed), config_of("ebr"), seed=seed)
    assert "test" in asked


@pytest.mark.parametrize("method", METHODS)
def test_record_of_a_run(method, seed, tmp_path):
    dataset = tiny(seed, num_classes=2, absent=0.2)
    result = train(dataset, config_of(method), seed=seed, run_dir=tmp_path / "run", evaluate_on=("test", "validation"))
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert stored == json.loads(json.dumps(result.results, allow_nan=False))
    keys = {"schema_version", "mmc_fast_version", "method", "label", "data", "config", "seed", "environment", "history"}
    keys |= {"adversarial", "ranking", "unimodal", "scores", "timing"}
    assert keys <= stored.keys()
    assert stored["method"] == stored["label"] == method
    assert [r["epoch"] for r in stored["history"]] == [1, 2, 3]
    fields = {"epoch", "lr", "reversal", "loss_sem", "loss_md", "loss_md_over_entropy", "psi_accuracy", "loss_rec"}
    fields |= {"grad_norm_psi", "grad_norm_encoders", "val_score", "seconds"}
    assert all(fields <= r.keys() for r in stored["history"])
    if method == "ebr":
        found = stored["adversarial"]
        assert found["lambda"] == 0.5
        assert 0 <= found["modality_probe"]["balanced_accuracy"] <= 1
        assert found["modality_probe"]["chance"] == pytest.approx(1 / 3)
        assert found["modality_probe"]["rows"] == int(dataset.part("validation").present.sum()), (
            "judged on held-out rows"
        )
        strongest = max("abc", key=stored["unimodal"].get)  # the first of equals
        assert stored["ranking"]["reference"] == stored["ranking"]["order"][0] == strongest
        assert all(r["loss_md_over_entropy"] > 0 and r["grad_norm_encoders"] > 0 for r in stored["history"])
        assert stored["environment"]["ebr_backend"].split("/")[0] in ("eager", "cpp")
    else:
        assert stored["adversarial"] is None
        assert stored["environment"]["ebr_backend"] is None
    assert stored["data"]["sizes"] == {"train": 60, "validation": 30, "test": 30}
    assert stored["scores"]["part"] == "test"
    assert set(stored["scores"]["reliance"]) == {"a", "b", "c"}
    assert {"complete_auprc", "mean_missing"} <= stored["scores"].keys()
    assert stored["other_scores"]["validation"]["rows"] == 30
    best = max(
        stored["history"], key=lambda r: (r["val_score_masked" if method == "ebr" else "val_score"], -r["epoch"])
    )
    assert stored["selected_epoch"] == best["epoch"]


def test_finished_run_opens_again_and_predicts_the_same(seed, tmp_path):
    dataset, folder = tiny(seed, absent=0.2), tmp_path / "run"
    config = config_of("ebr")
    first = train(dataset, config, seed=seed, run_dir=folder)
    loaded = load_run(folder)
    assert loaded.config == config
    assert loaded.results == json.loads(json.dumps(first.results))
    assert equal_weights(loaded.model.state_dict(), weights(first))
    assert loaded.unimodal is not None
    assert loaded.unimodal.scores == first.unimodal.scores
    found = load_predictions(folder)["test"]
    p = first.predictions[0]
    assert torch.equal(found.labels, dataset.part("test").labels)
    assert set(found.answers) == set(p.answers)
    assert all(torch.equal(found.answers[k].nan_to_num(), v.nan_to_num()) for k, v in p.answers.items())
    again = train(dataset, config, seed=seed, run_dir=folder, resume=True)  # finished: opened, not repeated
    assert again.results == loaded.results
    state = load_file(folder / "model.safetensors")
    assert equal_weights(state, weights(first))


def test_folders_that_hold_something_else_are_refused(seed, tmp_path):
    dataset, config, folder = tiny(seed), small("vanilla"), tmp_path / "run"
    train(dataset, config, seed=0, run_dir=folder)
    before = sorted(p.name for p in folder.iterdir())
    cases = [
        ({"seed": 0}, config, dataset, "a run already"),
        ({"seed": 1, "resume": True}, config, dataset, "seed was 0 and is now 1"),
        ({"seed": 0, "resume": True}, replace(config, lr=0.5), dataset, "config.lr was 0.001 and is now 0.5"),
        ({"seed": 0, "resume": True}, config, tiny(seed + 1), "data.fingerprint"),
        ({"seed": 0, "resume": True, "evaluate_on": ("validation",)}, config, dataset, "evaluate_on"),
    ]
    for arguments, settings, data, message in cases:
        with pytest.raises(InputError, match=message) as error:
            train(data, settings, run_dir=folder, **arguments)
        assert "\n" not in str(error.value)
    assert sorted(p.name for p in folder.iterdir()) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        train(dataset, config, seed=0, run_dir=other)
    with pytest.raises(InputError, match="nothing to resume"):
        train(dataset, config, seed=0, run_dir=tmp_path / "none", resume=True)
    with pytest.raises(InputError, match="is a file"):
        train(dataset, config, seed=0, run_dir=other / "notes.txt")
    for path, message in ((other, "holds no run"), (tmp_path / "none", "holds no run")):
        with pytest.raises(InputError, match=message):
            load_run(path)


def test_damaged_files_and_folders_are_one_clear_line(seed, tmp_path):
    folder = tmp_path / "run"
    train(tiny(seed), small("vanilla", epochs=1), seed=0, run_dir=folder)
    for name in ("model.safetensors", "unimodal.safetensors", "results.json", "manifest.json", "predictions.npz"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=r"cannot be used|changed or exchanged") as error:
            load_predictions(folder) if name == "predictions.npz" else load_run(folder)
        assert "\n" not in str(error.value)
        (folder / name).write_bytes(content)
    load_run(folder)
    with pytest.raises(InputError, match="cannot be used"):
        train(tiny(seed), small("vanilla"), seed=0, run_dir=folder / "results.json" / "below")


def test_unfinished_run_does_not_load(seed, tmp_path):
    with pytest.raises(Interrupted):
        train(tiny(seed), small("vanilla"), seed=0, run_dir=tmp_path / "run", progress=At("train", 1, ctrl_c))
    with pytest.raises(InputError, match="not finished"):
        load_run(tmp_path / "run")


def test_divergence_names_the_place_and_keeps_the_last_good_state(seed, tmp_path, monkeypatch):
    original, calls = Stepper.losses, []

    def losses(self, *args):
        calls.append(1)
        total, parts = original(self, *args)
        return (total * float("nan") if len(calls) == 7 else total), parts

    monkeypatch.setattr(Stepper, "losses", losses)
    folder = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match=r"nan in epoch 2, step 3 .*epoch-000001-step-000002") as error:
        train(tiny(seed), small("vanilla"), seed=seed, run_dir=folder)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(Stepper, "losses", original)
    resumed = train(tiny(seed), small("vanilla"), seed=seed, run_dir=folder, resume=True)
    assert equal_weights(weights(resumed), weights(train(tiny(seed), small("vanilla"), seed=seed)))


def test_exploding_weights_are_an_error_and_are_never_saved(seed, tmp_path):
    config = small("vanilla", optimizer="sgd", lr=1e30)
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        train(tiny(seed), config, seed=seed, run_dir=tmp_path / "run")
    for path in Path(tmp_path).rglob("checkpoints/train/*.safetensors"):
        assert all(bool(torch.isfinite(t).all()) for t in load_file(path).values())


def test_shared_unimodal_models_change_nothing_and_strangers_are_refused(seed):
    dataset = tiny(seed)
    alone = train(dataset, config_of("ebr"), seed=seed)
    donor = train(dataset, small("vanilla"), seed=seed)
    shared = train(dataset, config_of("ebr"), seed=seed, unimodal=donor.unimodal)
    assert equal_weights(weights(alone), weights(shared))
    assert same_numbers(alone.results, shared.results)
    for data, config, s in (
        (tiny(seed + 1), config_of("ebr"), seed),
        (dataset, config_of("ebr"), seed + 1),
        (dataset, config_of("ebr", encoder_dim=5), seed),
    ):
        with pytest.raises(InputError, match="unimodal"):
            train(data, config, seed=s, unimodal=donor.unimodal)


def test_run_without_unimodal_models_when_nothing_needs_them(seed):
    config = small("ebr", unimodal_share=0.0, ebr_substitute="mean", control=False)
    results = train(tiny(seed), config, seed=seed).results
    assert results["unimodal"] is None
    assert all(v["unimodal"] is None for v in results["scores"]["reliance"].values())
