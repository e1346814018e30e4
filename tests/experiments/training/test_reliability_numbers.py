"""Numbers under stress: what is not finite, clipped gradients, huge scales, constants, single classes, absences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from distributed_runs import sparse
from training_data import check_one_line, small, tiny

from mmc_fast.errors import InputError
from mmc_fast.experiments.tasks import Classification
from mmc_fast.experiments.training import TrainingDiverged, train
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.optim import build_optimizer
from mmc_fast.experiments.training.steps import Rows, Stepper


@pytest.fixture(autouse=True)
def _brief_probe(monkeypatch):
    monkeypatch.setattr("mmc_fast.experiments.training.adversarial._PROBE_EPOCHS", 2)


def poisoned(monkeypatch, calls: set[int], value: float) -> None:
    """The loss of the given steps (from 1) becomes ``value``."""
    real, count = Stepper.losses, []

    def losses(self, *args):
        count.append(1)
        total, parts = real(self, *args)
        return (total * value if len(count) in calls else total), parts

    monkeypatch.setattr(Stepper, "losses", losses)


def finite(result) -> bool:
    weights = all(bool(torch.isfinite(t).all()) for t in result.model.state_dict().values() if t.is_floating_point())
    losses = [r["loss_sem"] for r in result.results["history"] if r["loss_sem"] is not None]
    return weights and all(map(math.isfinite, losses))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipped_batches_are_counted_and_leave_no_trace(value, accumulate, seed, monkeypatch):
    """Step 6 (the second of the second epoch) is skipped: the same as a run in which that step does nothing."""
    config = small("dropout", nonfinite="skip", accumulate=accumulate)
    step = (6 - 1) * accumulate + 1
    with monkeypatch.context() as m:
        poisoned(m, {step}, value)
        skipped = train(tiny(seed), config, seed=seed)
    assert [r["skipped"] for r in skipped.results["history"]] == [0, 1, 0]
    assert finite(skipped)
    if accumulate > 1:
        return
    real, count = Stepper.update, []

    def update(self, phase):
        count.append(1)
        return None if len(count) == 6 else real(self, phase)

    monkeypatch.setattr(Stepper, "update", update)
    expected = train(tiny(seed), config, seed=seed)
    a, b = skipped.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_gradient_that_overflows_under_a_finite_loss_is_skipped_or_stops(seed, monkeypatch, tmp_path):
    poisoned(monkeypatch, {3}, 3e38)
    result = train(tiny(seed), small("vanilla", nonfinite="skip", lr=1e-4), seed=seed)
    assert sum(r["skipped"] for r in result.results["history"]) in (0, 1)  # the loss itself may stay finite
    assert finite(result)
    poisoned(monkeypatch, {3}, float("nan"))
    with pytest.raises(TrainingDiverged, match="in epoch 1, step 3"):
        train(tiny(seed), small("vanilla", clip_grad_norm=1.0), seed=seed, run_dir=tmp_path / "run")


def test_an_epoch_without_any_usable_batch_is_an_error(seed, monkeypatch):
    poisoned(monkeypatch, set(range(1, 100)), float("nan"))
    with pytest.raises(TrainingDiverged, match="every batch of epoch 1 was skipped"):
        train(tiny(seed), small("vanilla", nonfinite="skip"), seed=seed)


def test_clipping_limits_the_norm_over_all_that_moves(seed):
    config = small("ebr", clip_grad_norm=0.01, optimizer="sgd", lr=1.0)
    part = tiny(seed).part("train")
    model = MultimodalModel(tiny(seed).dims, 3, config)
    stepper = Stepper(model, build_optimizer(model.groups(), config), config)
    stepper.reversal.fill_(0.5)
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    total, _ = stepper.losses("joint", Rows(part.features, part.labels))
    gradients = torch.autograd.grad(total, list(model.parameters()), retain_graph=True, allow_unused=True)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    assert norm > 0.01
    stepper.backward("joint", part.labels, lambda rows: [x[rows] for x in part.features])
    assert not stepper.update("joint")
    assert stepper.clipped == 1
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        moved = p.detach().double() - before[name]
        want = torch.zeros_like(moved) if g is None else -g.double() * 0.01 / norm
        torch.testing.assert_close(moved, want, rtol=1e-3, atol=1e-7)
    history = train(tiny(seed), small("vanilla", clip_grad_norm=1e-3), seed=seed).results["history"]
    assert [r["clipped"] for r in history] == [4, 4, 4]
    large = train(tiny(seed), small("vanilla", clip_grad_norm=1e9), seed=seed)
    plain = train(tiny(seed), small("vanilla"), seed=seed)
    a, b = large.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("changes", [{"clip_grad_norm": 0.0}, {"clip_grad_norm": -1.0}, {"accumulate": 0},
                                     {"nonfinite": "ignore"}, {"checkpoint_seconds": 0.0}])  # fmt: skip
def test_settings_out_of_range_are_one_line(changes):
    with pytest.raises(InputError) as error:
        small("vanilla", **changes)
    assert next(iter(changes)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_loss_spike_passes_with_clipping(seed, monkeypatch):
    poisoned(monkeypatch, {2, 7}, 1e12)
    result = train(tiny(seed), small("ebr", clip_grad_norm=1.0, nonfinite="skip", epochs=12, lr=0.02), seed=seed)
    assert finite(result)
    assert result.results["selected_val_score"] > 0.5


@pytest.mark.parametrize("reversal", [1e3, 1e8])
def test_a_huge_lambda_ends_in_finite_weights_or_a_clear_line(reversal, seed):
    config = small("ebr", ebr_reversal=reversal, nonfinite="skip", clip_grad_norm=1.0, control=False)
    assert finite(train(tiny(seed), config, seed=seed))
    try:
        assert finite(train(tiny(seed), replace(config, nonfinite="stop", clip_grad_norm=None), seed=seed))
    except TrainingDiverged as error:
        check_one_line(error)


def changed(dataset, change):
    features = {name: change(i, x.clone()) for i, (name, x) in enumerate(dataset.features.items())}
    return replace(dataset, features={k: torch.where(dataset.present[:, i, None], x, 0)
                                      for i, (k, x) in enumerate(features.items())})  # fmt: skip


@pytest.mark.parametrize("method", ["vanilla", "kd", "ebr"])
def test_features_of_scale_1e8_and_constant_ones(method, seed):
    config = small(method, control=False)
    if method == "kd":
        config = replace(config, kd=replace(config.kd, epochs=1, batch_size=16, embedding_dim=4))
    for change in (lambda i, x: x * 1e8, lambda i, x: x * 0 + 3.0, lambda i, x: x * 0 + (1e8 if i else 0.0)):
        assert finite(train(changed(tiny(seed, absent=0.2), change), config, seed=seed))


def test_features_at_the_edge_of_float32_are_finite_or_one_line(seed):
    for method in ("vanilla", "ebr"):
        dataset = changed(tiny(seed, num_classes=2), lambda i, x: x * 1e37)
        try:
            assert finite(train(dataset, small(method, control=False), seed=seed))
        except (TrainingDiverged, InputError) as error:
            check_one_line(error)


@pytest.mark.parametrize("method", ["dropout", "ebr"])
def test_batches_of_one_class_and_of_one_row(method, seed):
    """Sorted labels in order: every batch has a single class."""
    dataset = tiny(seed, absent=0.3)
    config = small(method, batch_size=1, epochs=1, unimodal_share=1.0, control=False)
    assert finite(train(dataset, config, seed=seed))
    rows = torch.argsort(dataset.labels + 10 * dataset.split.long(), stable=True)
    features = {k: x[rows] for k, x in dataset.features.items()}
    ordered = replace(
        dataset,
        features=features,
        present=dataset.present[rows],
        labels=dataset.labels[rows],
        split=dataset.split[rows],
    )
    with pytest.MonkeyPatch.context() as m:
        m.setattr("mmc_fast.experiments.training.trainer.epoch_order", lambda n, g: torch.arange(n))
        assert finite(train(ordered, replace(config, batch_size=10, epochs=2), seed=seed))


@pytest.mark.parametrize("changes", [{}, {"substitute_in_training": True}, {"ebr_cross_recovery": 0.5},
                                     {"accumulate": 3}, {"ebr_modalities": ("a", "b")}])  # fmt: skip
def test_a_modality_hidden_in_every_row_of_an_epoch(changes, seed, monkeypatch):
    def hide(present, rate, generator):
        masks = present.clone()
        masks[:, 1] = False
        masks[~masks.any(1), 0] = True
        return masks

    monkeypatch.setattr("mmc_fast.experiments.training.trainer.training_masks", hide)
    assert finite(train(tiny(seed), small("ebr", modality_dropout=0.5, control=False, **changes), seed=seed))


def test_predictions_that_are_not_finite_are_named():
    p = torch.tensor([[0.5, 0.5], [float("nan"), 0.5]])
    for metric in ("accuracy", "auroc"):
        with pytest.raises(InputError, match="1 of 2 predictions are NaN or infinite"):
            Classification.of(2, metric).score(p, torch.tensor([0, 1]))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_a_modality_that_most_batches_lack_is_that_of_the_plain_formula(momentum, seed, monkeypatch):
    """Parameters that meet their first gradient late: v ← μ v + g, w ← w − lr v, written out here."""
    dataset = sparse(seed)
    config = small("vanilla", optimizer="sgd", lr=0.02, momentum=momentum, batch_size=4, unimodal_share=1.0)
    fused = train(dataset, config, seed=seed)

    class Plain(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    v = self.state[p].setdefault("v", torch.zeros_like(p))
                    v.mul_(momentum).add_(p.grad)
                    p.data.sub_(group["lr"] * v)

    monkeypatch.setattr("mmc_fast.experiments.training.optim.optim.SGD", Plain)
    plain = train(dataset, config, seed=seed)
    pairs = [
        (fused.model, plain.model),
        *zip(fused.unimodal.models.values(), plain.unimodal.models.values(), strict=True),
    ]
    for a, b in pairs:
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
