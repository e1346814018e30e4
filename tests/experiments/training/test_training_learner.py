"""The encoder with normalisation and dropout, and the average of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_data import small, tiny

from mmc_fast._util.seeds import seeded_init
from mmc_fast.errors import InputError
from mmc_fast.experiments.training import TrainConfig, predict, train
from mmc_fast.experiments.training.average import WeightAverage
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.optim import build_optimizer
from mmc_fast.experiments.training.steps import Stepper
from mmc_fast.experiments.training.unimodal import _SideBySide
from mmc_fast.nn.encoders import MLPEncoder


def test_the_normalised_encoder_is_its_formula(seed):
    torch.manual_seed(seed)
    encoder = MLPEncoder(5, 7, 4, norm=True, dropout=0.4).double()
    x = torch.randn(9, 5, dtype=torch.float64)

    def normalised(v):
        centred = v - v.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()

    first, second = (layer for layer in encoder.layers if isinstance(layer, torch.nn.Linear))
    hidden = normalised(x @ first.weight.t() + first.bias).clamp(min=0)
    torch.testing.assert_close(encoder.eval()(x), normalised(hidden @ second.weight.t() + second.bias))
    dropped = encoder.train()(x.repeat(4000, 1))
    assert float((dropped == 0).double().mean()) == pytest.approx(0.4, abs=0.01)


def test_the_average_of_weights_step_by_step(seed):
    model = torch.nn.Linear(3, 2)
    average, expected = WeightAverage(model, 0.9), model.weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            model.weight.normal_()
        average.update()
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    own = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight.detach(), own)
    other = WeightAverage(torch.nn.Linear(3, 2), 0.9)
    other.restore(average.tensors())
    assert torch.equal(other.mean["weight"], average.mean["weight"])
    assert other.mean["weight"] is not average.mean["weight"]


def test_the_finished_model_has_averaged_weights(seed):
    """A decay near 1 leaves the model at its start, whatever the steps did."""
    dataset = tiny(seed)
    result = train(dataset, small("vanilla", weight_average=0.999999, selection="last"), seed=seed, evaluate_on=())
    start = train(dataset, small("vanilla", lr=1e-12, selection="last"), seed=seed, evaluate_on=())
    for a, b in zip(result.model.parameters(), start.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_step_with_dropout_is_not_split(seed):
    config, dataset = small("vanilla", encoder_dropout=0.1, accumulate=2), tiny(seed)
    model = MultimodalModel(dataset.dims, dataset.num_classes, config)
    with pytest.raises(InputError, match="a step cannot be split"):
        Stepper(model, build_optimizer(model.groups(), config), config)


def test_an_average_that_never_moves_is_refused():
    with pytest.raises(InputError, match="below 1"):
        replace(TrainConfig(), weight_average=1.0)


def test_several_fills_are_each_present_latent_and_their_mean(seed):
    """Row by row: the mean over the decoded latents of every present modality and of their mean."""
    dataset = tiny(seed)
    model = MultimodalModel(dataset.dims, 3, small("ebr", ebr_substitute="each")).eval()
    part, present = dataset.part("test"), torch.tensor([True, False, True]).expand(30, 3).clone()
    present[::3] = torch.tensor([False, False, True])
    present[1::3] = True
    found = predict(model, part.features, present)
    latents = model.latents(part.features, present)
    for row in range(6):
        here = present[row].nonzero().flatten().tolist()
        g = latents[:, row]
        expected = []
        for fill in (g[here].mean(0), *(g[j] for j in here)):
            received = [model.head.decoders[i](g[i] if i in here else fill) for i in range(3)]
            expected.append(model.fusion([r[None] for r in received]).softmax(-1)[0])
        torch.testing.assert_close(found[row], torch.stack(expected).mean(0).detach(), rtol=1e-4, atol=1e-6)


def test_dropout_is_drawn_anew_in_every_step(seed, monkeypatch):
    """From a stream of its own for each step, so that a resumed run draws the same; also beside the unimodal models."""
    dataset, config, drawn = tiny(seed), small("vanilla", epochs=2, encoder_dropout=0.3), {"": [], "unimodal": []}
    for name, kind, method in (("", Stepper, "backward"), ("unimodal", _SideBySide, "_take_step")):
        original = getattr(kind, method)

        def step(*given, own=drawn[name], original=original):
            own.append(torch.initial_seed())
            return original(*given)

        monkeypatch.setattr(kind, method, step)
    train(dataset, config, seed=seed, evaluate_on=())
    for name, seeds in drawn.items():
        expected = []
        for epoch in range(2):
            for n in range(4):
                with seeded_init(seed, *([name] if name else []), "dropout", epoch, n):
                    expected.append(torch.initial_seed())
        assert seeds == expected
    assert len(set(drawn[""] + drawn["unimodal"])) == 16
