"""Unimodal models: trained side by side as if alone, on present rows only, scored on validation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from training_data import small, tiny

from mmc_fast._util.seeds import generator, seeded_init
from mmc_fast.experiments.tasks import Classification
from mmc_fast.experiments.training import unimodal
from mmc_fast.experiments.training.interrupt import Stage
from mmc_fast.experiments.training.masks import epoch_order
from mmc_fast.experiments.training.parts import fingerprint
from mmc_fast.experiments.training.progress import TrainingDiverged
from mmc_fast.experiments.training.runfolder import RunFolder
from mmc_fast.experiments.training.unimodal import (
    UnimodalModel,
    UnimodalModels,
    _SideBySide,
    train_unimodal,
    unimodal_key,
)


def trained(dataset, config, seed):
    return train_unimodal(dataset, config, seed=seed, fingerprint=fingerprint(dataset))


def test_side_by_side_equals_one_by_one(seed):
    """An independent loop for each modality alone, with plain Adam, same initial weights and same row order."""
    dataset = tiny(seed, absent=0.3)
    config = small("vanilla", lr=0.01, lr_decay=0.5, lr_decay_every=2, class_weights="balanced")
    together = trained(dataset, config, seed)
    part, held_out = dataset.part("train"), dataset.part("validation")
    weights = 60 / (3 * torch.bincount(part.labels).float())
    with seeded_init(seed, "unimodal", "init"):
        fresh = [UnimodalModel(d, 3, config) for d in dataset.dims.values()]
    for i, (name, model) in enumerate(zip(dataset.modalities, fresh, strict=True)):
        optimizer = torch.optim.Adam(model.parameters())
        order_of = generator(seed, "unimodal", "order")
        best, kept = -1.0, {}
        for epoch in range(3):
            optimizer.param_groups[0]["lr"] = 0.01 if epoch < 2 else 0.005
            for rows in epoch_order(60, order_of).split(config.batch_size):
                rows = rows[part.present[rows, i]]
                optimizer.zero_grad()
                each = F.cross_entropy(model(part.features[i][rows]), part.labels[rows], reduction="none")
                (weights[part.labels[rows]] * each).mean().backward()
                optimizer.step()
            here = held_out.present[:, i]
            hits = model(held_out.features[i][here]).argmax(1) == held_out.labels[here]
            if float(hits.double().mean()) > best:
                best, kept = float(hits.double().mean()), {k: v.clone() for k, v in model.state_dict().items()}
        assert abs(together.scores[name] - best) < 1e-9
        for k, v in together.models[name].state_dict().items():
            torch.testing.assert_close(v, kept[k], rtol=1e-3, atol=1e-5)


def test_the_first_of_equally_good_epochs_is_kept_for_each_modality(seed, monkeypatch):
    scores = {"a": [0.5, 0.7, 0.7], "b": [0.6, 0.6, 0.5], "c": [0.1, 0.1, 0.3]}
    states, heard = {name: [] for name in scores}, []

    def validation_score(model, part, column, task):
        states["abc"[column]].append({k: v.clone() for k, v in model.state_dict().items()})
        return scores["abc"[column]][len(states["abc"[column]]) - 1]

    monkeypatch.setattr(unimodal, "_validation_score", validation_score)
    dataset = tiny(seed)
    stage = Stage("unimodal", heard.append)
    found = train_unimodal(dataset, small("vanilla"), seed=seed, fingerprint="", stage=stage)
    assert found.scores == {"a": 0.7, "b": 0.6, "c": 0.3}
    for name, epoch in (("a", 1), ("b", 0), ("c", 2)):
        assert all(torch.equal(v, states[name][epoch][k]) for k, v in found.models[name].state_dict().items()), name
    assert [(r["epoch"], r["val_score"], r["scores"]["a"]) for r in heard] == [
        (1, 0.6, 0.5),
        (2, 0.7, 0.7),
        (3, 0.7, 0.7),
    ]


def test_a_modality_that_validation_rows_cannot_score_is_at_chance(seed):
    """AUC where the validation rows that have the modality are of one class, or where none has it."""
    dataset = tiny(seed, num_classes=2)
    present = dataset.present.clone()
    held = dataset.split == 1
    present[held & (dataset.labels == 1), 1] = False
    present[held, 2] = False
    found = trained(replace(dataset, present=present), small("vanilla", epochs=1), seed)
    assert (found.scores["b"], found.scores["c"]) == (0.5, 0.5) != (found.scores["a"],) * 2


def test_absent_and_test_rows_are_never_used(seed):
    dataset, config = tiny(seed, absent=0.3), small("vanilla")
    unused = (dataset.split == 2)[:, None] | ~dataset.present
    poisoned = {k: torch.where(unused[:, i, None], 1e6, x) for i, (k, x) in enumerate(dataset.features.items())}
    a, b = trained(dataset, config, seed), trained(replace(dataset, features=poisoned), config, seed)
    assert a.scores == b.scores
    for name in dataset.modalities:
        for p, q in zip(a.models[name].parameters(), b.models[name].parameters(), strict=True):
            assert torch.equal(p, q)


def test_strongest_and_order(seed):
    dataset = tiny(seed, sizes=(300, 300, 30))
    told = F.one_hot(dataset.labels, 3).float()
    noise = {
        k: torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) for k, x in dataset.features.items()
    }
    b = noise["b"] + 6 * told
    c = noise["c"]
    c[:, :3] += 2 * told
    config = small("vanilla", epochs=6, lr=0.01)
    found = trained(replace(dataset, features={"a": noise["a"], "b": b, "c": c}), config, seed)
    assert found.strongest == "b"
    assert found.weakest_first() == ["a", "c", "b"]
    assert not any(p.requires_grad for m in found.models.values() for p in m.parameters())


def test_the_first_of_equals_is_the_stronger():
    found = UnimodalModels({}, {"a": 0.5, "b": 0.7, "c": 0.7, "d": 0.5}, {}, Classification.of(2))
    assert found.strongest == "b"
    assert found.weakest_first() == ["d", "a", "c", "b"]


def test_share_of_the_budget(seed):
    assert small("vanilla", epochs=10, unimodal_share=0.3).unimodal_epochs == 3
    assert small("vanilla", epochs=1, unimodal_share=0.1).unimodal_epochs == 1
    assert small("vanilla", unimodal_share=0.0).unimodal_epochs == 0


def test_models_survive_a_file(seed, tmp_path):
    dataset, config = tiny(seed), small("vanilla")
    found = trained(dataset, config, seed)
    folder = RunFolder(tmp_path)
    assert folder.load_unimodal(config, dataset.dims, dataset.task) is None
    folder.save_unimodal(found)
    again = folder.load_unimodal(config, dataset.dims, dataset.task)
    assert again is not None
    assert (again.scores, again.key) == (found.scores, found.key)
    for i, name in enumerate(dataset.modalities):
        x = dataset.part("test").features[i]
        assert torch.equal(again.predict(name, x), found.predict(name, x))


def test_the_key_of_the_models_holds_the_settings_that_train_them(seed):
    config = small("vanilla", momentum=0.0, optimizer="sgd")
    changes = {
        "batch_size": 8, "optimizer": "adamw", "lr": 0.5, "weight_decay": 0.5, "momentum": 0.5, "lr_decay": 0.5,
        "lr_decay_every": 7, "encoder_width": 9, "encoder_dim": 9, "fusion_hidden": (9,), "epochs": 9,
        "unimodal_share": 0.3, "encoder_norm": True, "encoder_dropout": 0.1, "class_weights": "balanced",
    }  # fmt: skip
    dataset = tiny(seed)
    key = unimodal_key(dataset, config, seed, "x")
    for name, value in changes.items():
        assert unimodal_key(dataset, replace(config, **{name: value}), seed, "x") != key, name
    assert key not in (unimodal_key(dataset, config, seed + 1, "x"), unimodal_key(dataset, config, seed, "y"))
    for name, value in {"rates": (0.9,), "fusion_dim": 16, "selection": "last"}.items():
        assert unimodal_key(dataset, replace(config, **{name: value}), seed, "x") == key, name


def test_a_stage_that_is_at_its_end_goes_on_with_the_next_one(seed):
    config = small("vanilla")
    works = [_SideBySide(tiny(seed), config, seed, "cpu") for _ in range(2)]
    works[0].epoch = config.unimodal_epochs
    works[1].restore(works[0].state()[0])
    assert works[1].epoch == config.unimodal_epochs


def test_a_loss_that_is_not_finite_stops_the_stage_or_is_left_out_for_its_modality(seed, monkeypatch):
    dataset, original, spoiled = tiny(seed), Classification.loss, []

    def loss(self, outputs, labels, reduction="sum"):
        found = original(self, outputs, labels, reduction)
        return found * spoiled.pop() if spoiled else found  # that of the first modality in the first step

    monkeypatch.setattr(Classification, "loss", loss)
    clean = trained(dataset, small("vanilla", nonfinite="skip"), seed)
    spoiled.append(float("inf"))
    found = trained(dataset, small("vanilla", nonfinite="skip"), seed)
    same = {
        name: all(torch.equal(p, q) for p, q in zip(m.parameters(), clean.models[name].parameters(), strict=True))
        for name, m in found.models.items()
    }
    assert same == {"a": False, "b": True, "c": True}
    spoiled.append(float("inf"))
    with pytest.raises(TrainingDiverged, match="loss of the unimodal model of a became inf in epoch 1, step 1"):
        trained(dataset, small("vanilla", nonfinite="stop"), seed)
