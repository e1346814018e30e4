"""Options of the loop: consistency, cross-modal reconstruction, noise, presets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from training_data import small, tiny

from mmc_fast.errors import InputError
from mmc_fast.experiments.training import TrainConfig, train
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.optim import build_optimizer
from mmc_fast.experiments.training.steps import Counts, Rows, Stepper
from mmc_fast.experiments.training.trainer import Trainer
from mmc_fast.nn.substitution import foreign_source


def stepper_for(config, data):
    model = MultimodalModel(data.dims, data.num_classes, config)
    return Stepper(model, build_optimizer(model.groups(), config), config)


@pytest.mark.parametrize("method", ["dropout", "ebr"])
def test_consistency_is_the_divergence_from_the_complete_prediction(method, seed):
    data = tiny(seed)
    config = small(method, modality_dropout=0.5, consistency=2.0)
    stepper = stepper_for(config, data)
    part = data.part("train").select(torch.arange(16))
    present = torch.ones(16, 3, dtype=torch.bool)
    present[::2, 0] = False
    total, parts = stepper.losses("semantic", Rows(part.features, part.labels, present))
    masked = stepper.model(part.features, present).logits
    complete = stepper.model(part.features).logits
    p, q = complete.softmax(-1), masked.softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    semantic = (F.cross_entropy(masked, part.labels) + F.cross_entropy(complete, part.labels)) / 2
    assert total.item() == pytest.approx((semantic + 2.0 * divergence).item(), rel=1e-4)
    assert parts[0].item() == pytest.approx(semantic.item(), rel=1e-5)


def test_consistency_holds_the_complete_prediction_fixed(seed):
    """Were it not fixed, the divergence alone would pull at the bias of a model that masks nothing it needs."""
    data = tiny(seed)
    stepper = stepper_for(small("dropout", modality_dropout=0.5, consistency=1.0), data)
    part = data.part("train").select(torch.arange(16))
    present = torch.ones(16, 3, dtype=torch.bool)
    present[:, 0] = False
    masked = stepper.model(part.features, present).logits.detach()
    _, divergence = stepper._consistency(masked, Rows(part.features, part.labels), Counts(16))
    assert not divergence.requires_grad


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("phase", ["joint", "semantic"])
def test_cross_recovery_rebuilds_each_modality_from_another_one(phase, accumulate, seed):
    """The weight times the mean over (row, modality) pairs that have another one of |decoder_i(g_j) - z_i|^2 / d_i."""
    data = tiny(seed, absent=0.4)
    part = data.part("train").select(torch.arange(16))
    totals = []
    for weight in (0.0, 0.7):
        stepper = stepper_for(small(ebr_cross_recovery=weight, ebr_reversal=0.0, accumulate=accumulate), data)
        stepper.model.load_state_dict(totals[0][1].state_dict()) if totals else None
        stepper.random.manual_seed(seed)
        total, _ = stepper.losses(phase, Rows(part.features, part.labels, part.present))
        totals.append((total.item(), stepper.model))
    model = totals[1][1]
    source = foreign_source(part.present, 16, 3, torch.Generator().manual_seed(seed))
    z = [encoder(x) for encoder, x in zip(model.encoders, part.features, strict=True)]
    g = [h(x) for h, x in zip(model.head.encoders, z, strict=True)]
    errors = []
    for n in range(16):
        for i in range(3):
            j = int(source[n, i])
            if part.present[n, i] and j >= 0:
                assert j != i
                assert part.present[n, j]
                errors.append((model.head.decoders[i](g[j][n]) - z[i][n]).square().mean())
    assert 0 < len(errors) < int(part.present.sum()), "a row with one modality has none to be rebuilt from"
    wanted = 0.7 * float(torch.stack(errors).mean().detach())
    assert totals[1][0] - totals[0][0] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", ["a", "b"])
def test_noise_follows_the_formula(name, seed):
    data = tiny(seed)
    config = small("vanilla", noise_modality=name, noise_rate=0.25)
    trainer = Trainer(MultimodalModel(data.dims, data.num_classes, config), data, config, seed=seed)
    x = torch.zeros(20000, data.dims[name])
    noisy = trainer._with_noise(x, trainer._draw_noise(len(x)))
    scale = data.part("train").features["abc".index(name)].std(0)
    assert bool((noisy.abs() <= 0.25 * scale + 1e-6).all())
    torch.testing.assert_close(noisy.std(0), 0.25 * scale / math.sqrt(3), rtol=0.05, atol=0)
    ones = torch.ones(4, data.dims[name])
    assert bool((trainer._with_noise(ones, trainer._draw_noise(4)) >= 0.75 - 0.25 * scale - 1e-6).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "vanilla", "consistency": 1.0}, "set modality_dropout"),
        ({"method": "vanilla", "noise_rate": 0.1}, "noise needs both"),
        ({"method": "vanilla", "noise_rate": 2.0, "noise_modality": "a"}, "noise_rate is 2"),
        ({"method": "dropout", "consistency": -1.0}, "consistency is -1"),
    ],
)
def test_options_that_do_not_fit_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        small(**changes)


def test_robust_preset_is_ebr_with_what_the_study_found():
    config = TrainConfig.from_dict({"method": "robust", "epochs": 3})
    assert config.method == "ebr"
    assert (config.modality_dropout, config.substitute_in_training, config.consistency) == (0.5, True, 1.0)
    assert (config.ebr.residual, config.ebr.normalize, config.ebr.substitute) == (True, True, "mean")
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="needs EBR heads"):
        TrainConfig.from_dict({"method": "robust", "ebr": None})


def test_unknown_noise_modality_is_named():
    with pytest.raises(InputError, match="noise_modality"):
        train(tiny(0), small("vanilla", noise_modality="z", noise_rate=0.1), seed=0)
