"""Re-weighting of one modality: the two forms against what they stand for, and nothing changed where it is off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from training_data import small, tiny

from mmc_fast._util.seeds import seeded_init
from mmc_fast.errors import InputError
from mmc_fast.experiments.methods import get
from mmc_fast.experiments.methods.base import Task
from mmc_fast.experiments.training import TrainConfig, load_run, train
from mmc_fast.experiments.training.adapter import RunAdapter
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.optim import build_optimizer
from mmc_fast.experiments.training.steps import Rows, Stepper


def build(config: TrainConfig, data, seed: int) -> MultimodalModel:
    with seeded_init(seed, "init"):
        return MultimodalModel(data.dims, data.num_classes, config)


def pair(seed: int, method: str = "vanilla", absent: float = 0.0, **changes):
    """A data set, the plain model and the one with a re-weighted ``b``, both from the same seed."""
    data, plain = tiny(seed, absent=absent), small(method)
    changed = replace(plain, reweight_modality="b", **changes)
    return data, build(plain, data, seed), build(changed, data, seed)


@pytest.mark.parametrize("fusion", ["concat", "late", "transformer"])
@pytest.mark.parametrize("method", ["vanilla", "ebr"])
def test_features_are_what_a_scaled_last_layer_gives(seed, method, fusion):
    data = tiny(seed)
    plain = small(method, fusion=fusion)
    model = build(replace(plain, reweight_modality="b", reweight=2.5), data, seed)
    by_hand = build(plain, data, seed)
    last = by_hand.head.decoders[1][-1] if method == "ebr" else by_hand.encoders[1].layers[-1]
    with torch.no_grad():
        last.weight.mul_(3.5)
        last.bias.mul_(3.5)
    part = data.part("test")
    torch.testing.assert_close(model(part.features).logits, by_hand(part.features).logits)
    adapter = RunAdapter(model)
    torch.testing.assert_close(adapter.fuse(adapter.encode(part)), model(part.features).logits)


@pytest.mark.parametrize("method", ["vanilla", "ebr"])
def test_loss_adds_the_unimodal_one(seed, method):
    data, plain, model = pair(seed, method, absent=0.4, reweight=2.0, reweight_form="loss")
    part = data.part("train").select(torch.arange(24))
    assert not bool(part.present[:, 1].all())
    steppers = [Stepper(m, build_optimizer(m.groups(), m.config), m.config) for m in (plain, model)]
    totals = [s.losses("semantic", Rows(part.features, part.labels, part.present)) for s in steppers]
    here = part.present[:, 1]
    logits = F.linear(model.encoders[1](part.features[1][here]), model.own.weight, model.own.bias)
    alone = -logits.log_softmax(-1).gather(1, part.labels[here, None]).sum() / 24
    torch.testing.assert_close(totals[1][0] - totals[0][0], 2.0 * alone)
    torch.testing.assert_close(totals[1][1], totals[0][1], equal_nan=True)  # the reported parts stay what they were
    for total, _ in totals:
        total.backward()
    for i, (a, b) in enumerate(zip(plain.encoders, model.encoders, strict=True)):
        same = torch.allclose(a.layers[0].weight.grad, b.layers[0].weight.grad)
        assert same == (i != 1), i
    assert any(p is model.own.weight for p in model.groups()["task"])


def test_everything_else_starts_as_without_it(seed):
    for form in ("features", "loss"):
        _, plain, model = pair(seed, "ebr", reweight=1.0, reweight_form=form)
        state = model.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
        assert set(state) - set(plain.state_dict()) == ({"own.weight", "own.bias"} if form == "loss" else set())


def test_off_leaves_model_loss_and_record_as_they_were(seed):
    config = small("ebr")
    changed = replace(config, reweight_modality="b", reweight=4.0, reweight_form="loss")
    assert TrainConfig.from_dict(changed.to_dict()) == changed
    data = tiny(seed)
    model = build(config, data, seed)
    z = model.encode(data.part("test").features)
    assert all(a is b for a, b in zip(model.weighted(z), z, strict=True))
    assert model.own is None


@pytest.mark.parametrize("form", ["features", "loss"])
def test_pieces_of_a_step_and_a_stored_run_give_the_same_model(tmp_path, seed, form):
    data = tiny(seed, absent=0.3)
    sgd = {"optimizer": "sgd", "lr": 0.02, "modality_dropout": 0.3, "rates": (), "control": False}
    config = small("ebr", reweight_modality="c", reweight=3.0, reweight_form=form, **sgd)
    whole = train(data, config, seed=seed, run_dir=tmp_path / "run", evaluate_on=())
    pieces = train(data, replace(config, accumulate=3), seed=seed, evaluate_on=())
    plain = train(data, small("ebr", **sgd), seed=seed, evaluate_on=())
    states = [r.model.state_dict() for r in (whole, pieces, plain)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(states[0]["encoders.2.layers.0.weight"], states[2]["encoders.2.layers.0.weight"])
    loaded = load_run(tmp_path / "run").model.state_dict()
    assert loaded.keys() == states[0].keys()
    assert all(torch.equal(loaded[name], value) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reweight": 1.0}, "needs both"),
        ({"reweight_modality": "a"}, "needs both"),
        ({"reweight_modality": "a", "reweight": -1.0}, "reweight is -1"),
        ({"reweight_modality": "a", "reweight": float("nan")}, "reweight is nan"),
        ({"reweight_modality": "a", "reweight": 1.0, "reweight_form": "both"}, "reweight_form"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        small("vanilla", **changes)


def test_an_unknown_modality_and_a_loop_without_the_option_are_refused():
    config = small("vanilla", reweight_modality="z", reweight=1.0)
    with pytest.raises(InputError, match="reweight_modality"):
        train(tiny(0), config, seed=0)
    with pytest.raises(InputError, match="reweight_modality"):
        build(config, tiny(0), 0)
    baseline = get("shaspec")
    budget = replace(config, reweight_modality="a")
    with pytest.raises(InputError, match=r"reweight is 1\.0, which re-implemented methods do not have"):
        baseline.fitter(Task(tiny(0), budget, {}, 0))
