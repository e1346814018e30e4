"""Every state that a stage saves, taken up by a fresh one, ends in the same numbers; a state that it cannot have is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from training_data import same_numbers, small, tiny

from mmc_fast._util.seeds import seeded_init
from mmc_fast.errors import InputError
from mmc_fast.experiments.training import KDConfig
from mmc_fast.experiments.training.checkpoint import Checkpoint
from mmc_fast.experiments.training.distillation import _Distillation, distil
from mmc_fast.experiments.training.interrupt import Stage
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.trainer import Trainer
from mmc_fast.experiments.training.unimodal import _SideBySide, train_unimodal

CONFIG = small(
    "ebr", modality_dropout=0.4, substitute_in_training=True, ebr_cross_recovery=0.2, ebr_patience=1, selection="masked",
    weight_average=0.8, noise_modality="b", noise_rate=0.2, clip_grad_norm=0.5, nonfinite="skip", optimizer="sgd", lr=0.05,
    momentum=0.9,
)  # fmt: skip


class Memory:
    """A store that keeps copies of everything, as a file would hold it."""

    def __init__(self) -> None:
        self.kept: list[tuple[Checkpoint, int, int]] = []
        self.manifest = SimpleNamespace(alive=lambda: None)

    def save(self, state: Checkpoint, epoch: int, step: int) -> None:
        tensors = [{name: t.clone() for name, t in some.items()} for some in (state.weights, state.tensors)]
        self.kept.append((Checkpoint(*tensors, json.loads(json.dumps(state.meta))), epoch, step))


def staged(name: str, checkpoint: Checkpoint | None = None) -> Stage:
    """Saves after every step; the run may change what it takes up."""
    checkpoint = checkpoint and replace(checkpoint, meta=copy.deepcopy(checkpoint.meta))
    return Stage(name, store=Memory(), seconds=0.0, checkpoint=checkpoint)


def fresh(seed: int, dataset) -> MultimodalModel:
    with seeded_init(seed, "init"):
        return MultimodalModel(dataset.dims, 3, CONFIG)


def trainer(seed: int, dataset, stage: Stage) -> Trainer:
    return Trainer(fresh(seed, dataset), dataset, CONFIG, seed=seed, reference="a", stage=stage)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(restore, state: Checkpoint, changes) -> None:
    """Each change of a good state is named as one that does not fit; the state itself does."""
    for change in changes:
        other = Checkpoint(dict(state.weights), dict(state.tensors), copy.deepcopy(state.meta))
        change(other)
        with pytest.raises(InputError):
            restore(other)
    restore(state)


def test_a_run_goes_on_from_any_step(seed):
    dataset, stage = tiny(seed, absent=0.2), staged("train")
    whole = trainer(seed, dataset, stage)
    whole.fit()
    places = [(epoch, step) for _, epoch, step in stage.store.kept]
    assert places[:5] == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]
    assert (len(places), places[-1]) == (15, (3, 0))
    for state, _, _ in stage.store.kept[1::4]:
        again = trainer(seed, dataset, staged("train"))
        again.restore(state)
        again.fit()
        assert equal(again.model.state_dict(), whole.model.state_dict())
        assert equal(again.last_weights, whole.last_weights)
        assert (again.best_epoch, again.best_score, again.first_active) == (
            whole.best_epoch, whole.best_score, whole.first_active
        )  # fmt: skip
        assert again.stop == whole.stop
        assert same_numbers(again.history, whole.history)


def test_a_state_that_no_run_has_is_refused(seed):
    dataset, stage = tiny(seed, absent=0.2), staged("train")
    trainer(seed, dataset, stage).fit()
    (within, _, _), (between, _, _) = stage.store.kept[6], stage.store.kept[9]
    assert (within.meta["step"], between.meta["step"]) == (2, 0)
    restore = trainer(seed, dataset, staged("train")).restore
    changes = [
        lambda s: s.meta.update(step=5), lambda s: s.meta.update(epoch=2), lambda s: s.meta.update(best_epoch=2),
        lambda s: s.meta.update(skipped_rows=61), lambda s: s.meta["history"].append(s.meta["history"][0]),
        lambda s: s.meta["stop"].update(patience=2), lambda s: s.meta["stop"].update(larger_is_better=False),
        lambda s: s.tensors.pop("masks"), lambda s: s.tensors.pop("order"), lambda s: s.tensors.pop("sums"),
        lambda s: s.tensors.pop("average.fusion.layers.0.weight"), lambda s: s.tensors.pop("best.prior"),
        lambda s: s.tensors.update(order=s.tensors["order"].clamp(max=3)), lambda s: s.weights.pop("prior"),
        lambda s: s.tensors.update(order=s.tensors["order"][:-1]), lambda s: s.tensors.update(sums=torch.zeros(2)),
    ]  # fmt: skip
    refused(restore, within, changes)
    within.meta.update(step=4, skipped_rows=60)  # the ends
    restore(within)
    refused(restore, between, [lambda s: s.meta.update(step=1)])


def test_unimodal_models_go_on_from_any_step(seed):
    dataset, config, stage = tiny(seed, absent=0.2), small("vanilla", optimizer="adamw"), staged("unimodal")
    whole = train_unimodal(dataset, config, seed=seed, fingerprint="", stage=stage)
    assert [place[1:] for place in stage.store.kept] == [(e, s) for e in range(3) for s in (1, 2, 3)]
    for state, _, _ in stage.store.kept[::2]:
        again = train_unimodal(dataset, config, seed=seed, fingerprint="", stage=staged("unimodal", state))
        assert again.scores == whole.scores
        assert all(equal(again.models[n].state_dict(), whole.models[n].state_dict()) for n in whole.models)
    restore = _SideBySide(dataset, config, seed, "cpu").restore
    first, later = stage.store.kept[0][0], stage.store.kept[4][0]
    assert first.meta["best_score"] == [None] * 3
    changes = [
        lambda s: s.meta.update(step=5), lambda s: s.meta.update(epoch=4), lambda s: s.meta["best_score"].append(0.5),
        lambda s: s.tensors.pop("generator"), lambda s: s.tensors.pop("best1.classifier.0.bias"),
        lambda s: s.tensors.update(order=s.tensors["order"].clamp(max=3)), lambda s: s.tensors.pop("order"),
    ]  # fmt: skip
    refused(restore, later, changes)


def test_distillation_goes_on_from_any_step(seed):
    dataset, kd = tiny(seed, absent=0.2), KDConfig(epochs=2, batch_size=16, embedding_dim=4)
    config = small("vanilla", epochs=1)
    unimodal = train_unimodal(dataset, config, seed=seed, fingerprint="")

    def model() -> MultimodalModel:
        with seeded_init(seed, "init"):
            return MultimodalModel(dataset.dims, 3, config)

    taught, stage = model(), staged("distillation")
    done = distil(taught, dataset, unimodal, kd, seed=seed, stage=stage)
    places = [place[1:] for place in stage.store.kept]
    assert places[:2] == [(0, 1), (0, 2)]
    assert places == sorted(set(places))
    assert max(places)[0] == 3
    for state, _, _ in stage.store.kept[::3]:
        other = model()
        assert distil(other, dataset, unimodal, kd, seed=seed, stage=staged("distillation", state)) == done
        assert equal(other.state_dict(), taught.state_dict())
    state = next(s for s, epoch, _ in stage.store.kept if epoch == 3)
    assert (len(state.meta["done"]), state.meta["pair"]["epoch"]) == (1, 1)
    changes = [
        lambda s: s.meta["pair"].update(step=99), lambda s: s.meta["pair"].update(epoch=2), lambda s: s.tensors.pop("generator"),
        lambda s: s.meta["pair"].update(epoch=3, losses=[1.0] * 3), lambda s: s.meta["pair"]["losses"].append(1.0),
        lambda s: s.tensors.pop("projections.0.weight"), lambda s: s.tensors.update(order=s.tensors["order"].clamp(max=3)),
        lambda s: s.tensors.pop("order"), lambda s: s.meta["done"].append(s.meta["done"][0]), lambda s: s.weights.pop("prior"),
    ]  # fmt: skip
    refused(lambda s: _Distillation(model(), dataset, unimodal, kd, seed, False).restore(s), state, changes)
