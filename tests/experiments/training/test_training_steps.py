"""What a step updates: parameter groups by phase, gradients written out, and the end of the adversarial part."""

from __future__ import annotations

import copy

import pytest
import torch
from training_data import losses_by_hand, small, tiny

from mmc_fast.experiments.training import trainer as trainer_module
from mmc_fast.experiments.training.evaluate import masks_at, predict
from mmc_fast.experiments.training.interrupt import Stage
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.optim import build_optimizer, learning_rate, set_learning_rate
from mmc_fast.experiments.training.schedules import AdversarialStop
from mmc_fast.experiments.training.steps import Rows, Stepper, phase_of
from mmc_fast.experiments.training.substitution import ranking_parts, refresh, source_for
from mmc_fast.experiments.training.trainer import Trainer

GROUPS = ("encoders", "task", "discriminator")


def setup(seed: int, reversal: float = 0.5, **changes):
    dataset, config = tiny(seed), small("ebr", **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MultimodalModel(dataset.dims, dataset.num_classes, config)
    stepper = Stepper(model, build_optimizer(model.groups(), config), config)
    stepper.reversal.fill_(reversal)
    part = dataset.part("train")
    return model, stepper, part.features, part.labels


def step(stepper, phase, features, labels, present=None) -> None:
    stepper.backward(phase, labels, lambda rows: [x[rows] for x in features], present)
    stepper.update(phase)


def snapshot(model) -> dict[str, list[torch.Tensor]]:
    return {name: [p.detach().clone() for p in group] for name, group in model.groups().items()}


def moved(model, before) -> set[str]:
    groups = model.groups()
    return {n for n in GROUPS if any(not torch.equal(p, q) for p, q in zip(groups[n], before[n], strict=True))}


def grads(model, phase, stepper, features, labels, present=None) -> dict[str, list[torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    stepper.losses(phase, Rows(features, labels, present))[0].backward()
    return {
        name: [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in group]
        for name, group in model.groups().items()
    }


@pytest.mark.parametrize("phase", ["joint", "semantic", "adversarial"])
def test_gradients_equal_the_two_loss_construction(phase, seed):
    model, stepper, features, labels = setup(seed, reversal=0.7)
    present = torch.rand(len(labels), 3, generator=torch.Generator().manual_seed(seed)) < 0.7
    present[~present.any(1), 0] = True
    junk = [torch.where(present[:, i, None], x, float("nan")) for i, x in enumerate(features)]
    got = grads(model, phase, stepper, junk, labels, present)
    semantic, md, _ = losses_by_hand(model, features, labels, present)
    params = {n: list(g) for n, g in model.groups().items()}
    flat = [p for n in GROUPS for p in params[n]]

    def gradient(loss):
        found = torch.autograd.grad(loss, flat, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(p) if f is None else f for p, f in zip(flat, found, strict=True)]

    d_sem, d_md = gradient(semantic), gradient(md)
    signs = {"encoders": -0.7, "task": 0.0, "discriminator": 1.0}
    factors = [signs[n] for n in GROUPS for _ in params[n]]
    take_sem = 0.0 if phase == "adversarial" else 1.0
    take_md = 0.0 if phase == "semantic" else 1.0
    expected = [take_sem * s + take_md * w * m for s, m, w in zip(d_sem, d_md, factors, strict=True)]
    for e, g in zip(expected, [g for n in GROUPS for g in got[n]], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)
    assert any(bool(e.abs().max() > 1e-4) for e in expected)


@pytest.mark.parametrize("phase", ["joint", "semantic", "adversarial"])
def test_nothing_of_an_absent_modality_reaches_a_loss_or_a_gradient(phase, seed):
    """Of the whole loss with reconstruction from another modality, consistency and a re-weighted modality."""
    heads = {"ebr_reconstruction": 0.3, "ebr_cross_recovery": 0.2, "ebr_substitute": "mean"}
    own = {"reweight_modality": "b", "reweight": 0.5, "reweight_form": "loss"}
    model, stepper, features, labels = setup(seed, **heads, **own, consistency=1.0, modality_dropout=0.3)
    present = torch.rand(len(labels), 3, generator=torch.Generator().manual_seed(seed)) < 0.7
    present[~present.any(1), 0] = True
    found = []
    for junk in (0.0, float("nan")):
        model.zero_grad(set_to_none=True)
        stepper.random.manual_seed(seed)
        some = [torch.where(present[:, i, None], x, junk) for i, x in enumerate(features)]
        total, parts = stepper.losses(phase, Rows(some, labels, present, natural=present))
        total.backward()
        found.append([total.detach(), parts, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_step_reports_its_losses_and_whether_it_was_asked_to_stop(seed):
    _, stepper, features, labels = setup(seed)
    total, parts = stepper.losses("joint", Rows(features, labels))
    for asked in (False, True):
        found = stepper.backward("joint", labels, lambda rows: [x[rows] for x in features], stop=asked)
        torch.testing.assert_close(found[0], total.detach())
        torch.testing.assert_close(found[1], parts)
        assert found[2] is asked
    assert stepper.backward("joint", labels, lambda rows: [x[rows] for x in features])[2] is False


def test_discriminator_gets_nothing_from_the_task(seed):
    model, stepper, features, labels = setup(seed)
    assert not any(g.any() for g in grads(model, "semantic", stepper, features, labels)["discriminator"])


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("joint", {"encoders", "task", "discriminator"}),
        ("semantic", {"encoders", "task"}),
        ("adversarial", {"encoders", "discriminator"}),
    ],
)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_frozen_groups_take_no_step(phase, expected, optimizer, seed):
    """Also not by momentum or weight decay: the optimiser has seen gradients of every group before."""
    changes = {"optimizer": optimizer, "weight_decay": 0.1, "lr": 0.01}
    model, stepper, features, labels = setup(seed, **changes, momentum=0.9 if optimizer == "sgd" else 0.0)
    for _ in range(3):
        step(stepper, "joint", features, labels)
    before = snapshot(model)
    step(stepper, phase, features, labels)
    assert moved(model, before) == expected


def test_encoders_are_frozen_in_the_adversarial_phase_without_reversal(seed):
    model, stepper, features, labels = setup(seed, reversal=0.0)
    step(stepper, "semantic", features, labels)
    before = snapshot(model)
    step(stepper, "adversarial", features, labels)
    assert moved(model, before) == {"discriminator"}


def test_psi_lowers_and_encoders_raise_the_loss(seed):
    """A small SGD step of psi alone lowers L_md; one of the encoders alone raises it."""
    model, stepper, features, labels = setup(seed, optimizer="sgd", lr=1e-3, reversal=1.0)
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def md() -> float:
        with torch.no_grad():
            return float(stepper.losses("adversarial", Rows(features, labels))[1][1].double())

    base = md()
    change = {}
    for group in ("discriminator", "encoders"):
        model.load_state_dict(start)
        model.zero_grad(set_to_none=True)
        stepper.losses("adversarial", Rows(features, labels))[0].backward()
        with torch.no_grad():
            for p in model.groups()[group]:
                p -= 0.05 * p.grad
        change[group] = md() - base
    assert change["discriminator"] < 0 < change["encoders"]


def test_learning_rate_decay_reaches_every_group():
    config = small("ebr", lr=0.1, lr_decay=0.5, lr_decay_every=3)
    assert [learning_rate(config, e) for e in (0, 2, 3, 6)] == [0.1, 0.1, 0.05, 0.025]
    model = MultimodalModel({"a": 2, "b": 3}, 2, config)
    optimizer = build_optimizer(model.groups(), config)
    set_learning_rate(optimizer, config, 3)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == dict.fromkeys(GROUPS, 0.05)


def test_phases():
    joint, alternating = small("ebr"), small("ebr", ebr_schedule="interleave", ebr_interleave_epochs=2)
    assert [phase_of(joint, e, False) for e in range(3)] == ["joint"] * 3
    expected = ["semantic"] * 2 + ["adversarial"] * 2 + ["semantic"] * 2
    assert [phase_of(alternating, e, False) for e in range(6)] == expected
    assert {phase_of(c, e, True) for c in (joint, alternating) for e in range(6)} == {"semantic"}
    assert phase_of(small("vanilla"), 0, False) == "semantic"


def test_interleaved_run_records_its_phases_and_updates_the_right_groups(seed):
    config = small("ebr", epochs=4, ebr_schedule="interleave", ebr_interleave_epochs=1, weight_decay=0.1)
    dataset = tiny(seed)
    model = MultimodalModel(dataset.dims, dataset.num_classes, config)
    states = [snapshot(model)]
    trainer = Trainer(
        model,
        dataset,
        config,
        seed=seed,
        reference="a",
        stage=Stage(on_epoch=lambda record: states.append(snapshot(model))),
    )
    trainer.fit()
    assert [r["phase"] for r in trainer.history] == ["semantic", "adversarial"] * 2
    active = [r["epoch"] for r in trainer.history if r["grad_norm_encoders"] > 0]  # none where psi's units are all dead
    assert active in ([2, 4], [])
    assert trainer.first_active == (active[0] if active else None)
    for n, record in enumerate(trainer.history):
        changed = {
            g for g in GROUPS if any(not torch.equal(p, q) for p, q in zip(states[n][g], states[n + 1][g], strict=True))
        }
        assert changed == {"encoders", "task" if record["phase"] == "semantic" else "discriminator"}
        assert record["reversal"] == (0.0 if record["phase"] == "semantic" else 0.5)
        assert (record["loss_sem"] is None) == (record["phase"] == "adversarial")


@pytest.mark.parametrize("schedule", ["joint", "interleave"])
def test_adversarial_stop_stops_only_the_adversarial_part(schedule, seed):
    config = small("ebr", epochs=7, ebr_schedule=schedule, ebr_interleave_epochs=1, ebr_patience=1)
    dataset = tiny(seed)
    model = MultimodalModel(dataset.dims, dataset.num_classes, config)
    states = []
    trainer = Trainer(
        model, dataset, config, seed=seed, reference="a", stage=Stage(on_epoch=lambda r: states.append(snapshot(model)))
    )
    scores = iter([0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4])
    trainer._validate = lambda: {"val_score": next(scores)}  # it stops getting better after the first epoch
    trainer.fit()
    stopped = trainer.stop.stopped_after
    assert stopped == (2 if schedule == "joint" else 3)  # the interleaved schedule watches epochs 1, 3, ... only
    assert len(trainer.history) == 7
    for n in range(stopped, 7):
        assert trainer.history[n]["phase"] == "semantic"
        assert trainer.history[n]["reversal"] == 0.0
        changed = {
            g for g in GROUPS if any(not torch.equal(p, q) for p, q in zip(states[n - 1][g], states[n][g], strict=True))
        }
        assert changed == {"encoders", "task"}


def test_adversarial_stop_counts():
    stop = AdversarialStop(patience=2, larger_is_better=False)
    for epoch, loss in enumerate([1.0, 0.9, 0.9, 0.8, 0.8, 0.85, 0.1], start=1):
        stop.watch(epoch, loss)
    assert stop.stopped_after == 6
    never = AdversarialStop(patience=None, larger_is_better=True)
    for epoch in range(1, 50):
        never.watch(epoch, -epoch)
    assert not never.stopped


def test_reconstruction_loss_reaches_decoders_and_encoders_with_its_weight(seed):
    weighted = setup(seed, ebr_reconstruction=0.3)
    plain = setup(seed)
    model, stepper, features, labels = weighted
    got = grads(model, "semantic", stepper, features, labels)
    base = grads(plain[0], "semantic", plain[1], features, labels)
    z = [e(x) for e, x in zip(model.encoders, features, strict=True)]
    rec = torch.stack(
        [
            (d(h(x)) - x.detach()).square().mean()
            for d, h, x in zip(model.head.decoders, model.head.encoders, z, strict=True)
        ]
    ).mean()
    for name in ("encoders", "task"):
        params = model.groups()[name]
        extra = torch.autograd.grad(rec, params, allow_unused=True, retain_graph=True)
        for g, b, e in zip(got[name], base[name], extra, strict=True):
            torch.testing.assert_close(g - b, 0.3 * (torch.zeros_like(b) if e is None else e), rtol=1e-3, atol=1e-6)


def test_stepper_leaves_inputs_alone(seed):
    _model, stepper, features, labels = setup(seed)
    kept = copy.deepcopy(features)
    step(stepper, "joint", features, labels)
    assert all(torch.equal(a, b) for a, b in zip(features, kept, strict=True))


@pytest.mark.parametrize(("selection", "expected"), [("complete", 2), ("masked", 3), ("last", 5)])
def test_the_first_of_the_best_epochs_is_kept(selection, expected, seed):
    """By the score that the selection names; its weights are those at the end of that epoch."""
    scores = {"val_score": [0.5, 0.7, 0.7, 0.6, 0.7], "val_score_masked": [0.4, 0.1, 0.6, 0.6, 0.5]}
    dataset, config = tiny(seed), small("vanilla", epochs=5, selection=selection)
    states = []
    trainer = Trainer(
        MultimodalModel(dataset.dims, dataset.num_classes, config), dataset, config, seed=seed,
        stage=Stage(on_epoch=lambda r: states.append(copy.deepcopy(trainer.model.state_dict()))),
    )  # fmt: skip
    each = iter(zip(*scores.values(), strict=True))
    trainer._validate = lambda: dict(zip(scores, next(each), strict=True))
    trainer.fit()
    assert trainer.best_epoch == expected
    assert all(torch.equal(v, states[expected - 1][k]) for k, v in trainer.model.state_dict().items())


def test_the_masked_score_is_the_mean_over_the_rates_of_the_validation_part(seed):
    dataset, config = tiny(seed), small("vanilla", selection="masked", rates=(0.2, 0.5, 0.7))
    trainer = Trainer(MultimodalModel(dataset.dims, dataset.num_classes, config), dataset, config, seed=seed)
    part = dataset.part("validation")
    found = []
    for rate in config.rates:
        masks = {name: masks_at(part.present, rate, seed, name)[0] for name in ("validation", "test", "train")}
        assert not torch.equal(masks["validation"], masks["test"])
        answers = predict(trainer.model, part.features, masks["validation"])
        found.append(float((answers.argmax(1) == part.labels).double().mean()))
    record = trainer._validate()
    assert record["val_score_masked"] == pytest.approx(sum(found) / 3)
    complete = predict(trainer.model, part.features, part.present).argmax(1)
    assert record["val_score"] == pytest.approx(float((complete == part.labels).double().mean()))


@pytest.mark.parametrize(
    ("optimizer", "kind", "momentum"), [("adam", torch.optim.Adam, 0), ("adamw", torch.optim.AdamW, 0),
                                        ("sgd", torch.optim.SGD, 0.9), ("sgd", torch.optim.SGD, 0)],
)  # fmt: skip
def test_an_optimizer_is_that_of_torch_by_its_name(optimizer, kind, momentum, seed):
    """Step by step, also for a parameter that has its first gradient later than the others."""
    config = small("vanilla", optimizer=optimizer, lr=0.1, weight_decay=0.05, momentum=float(momentum))
    g = torch.Generator().manual_seed(seed)
    start, gradients = torch.randn(2, 4, generator=g), torch.randn(4, 2, 4, generator=g)
    ours, theirs = ([x.clone().requires_grad_() for x in start] for _ in range(2))
    built = build_optimizer({"encoders": ours, "empty": []}, config)
    options = {"momentum": momentum} if optimizer == "sgd" else {}
    plain = kind(theirs, lr=0.1, weight_decay=0.05, foreach=False, **options)
    assert [group["name"] for group in built.param_groups] == ["encoders"]
    for n, step in enumerate(gradients):
        for params, one in ((ours, built), (theirs, plain)):
            for i, p in enumerate(params):
                p.grad = step[i].clone() if i == 0 or n >= 2 else None
            one.step()
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours[0], start[0])


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_ranking_of_a_model_is_that_of_the_weights_it_has(average, seed, monkeypatch):
    """In the first step of an epoch that substitutes, and after the run, also where weights are averaged or an earlier epoch is kept."""
    dataset = tiny(seed, absent=0.3)
    config = small("ebr", lr=0.05, weight_average=average, substitute_in_training=True, modality_dropout=0.3)
    trainer = Trainer(
        MultimodalModel(dataset.dims, 3, config), dataset, config, seed=seed, reference="b"
    )  # fmt: skip
    parts, checked = ranking_parts(dataset), []

    def fresh(model) -> bool:
        again = copy.deepcopy(model)
        refresh(again, parts, "b")
        return torch.equal(model.similarity, again.similarity) and torch.equal(model.order, again.order)

    def source(model, present, random=None):
        if trainer.step == 0:
            checked.append(fresh(model))
        return source_for(model, present, random)

    monkeypatch.setattr(trainer_module, "source_for", source)
    scores = iter([0.5, 0.9, 0.1])
    validate = trainer._validate
    trainer._validate = lambda: validate() | {"val_score": next(scores)}
    trainer.fit()
    assert checked == [True] * 3
    assert trainer.best_epoch == 2
    assert fresh(trainer.model)
    assert not trainer.model.training
    last = copy.deepcopy(trainer.model)
    last.load_state_dict(trainer.last_weights)
    assert not torch.equal(last.similarity, trainer.model.similarity)
