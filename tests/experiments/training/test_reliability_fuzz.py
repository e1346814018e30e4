"""Drawn data sets, settings and inputs: a run ends with finite numbers or with one line, and repeats bit for bit.

hypothesis prints the failing example and ``@reproduce_failure``; the ``seed`` tests print ``--seed N``.
"""

from __future__ import annotations

import json
import random
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_data import check_one_line, same_numbers

from mmc_fast.errors import InputError
from mmc_fast.experiments.training import TrainConfig, TrainingDiverged, train
from mmc_fast.nn import EBRHead
from mmc_fast.testing.strategies import configs, datasets, presence

SLOW = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
FAST = settings(SLOW, max_examples=12)


def attempt(dataset, config, seed):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return train(dataset, config, seed=seed)
    except (InputError, TrainingDiverged) as error:
        check_one_line(error)
        return None


def runs_or_says_why(dataset, config, seed):
    first = attempt(dataset, config, seed)
    if first is None:
        return
    json.dumps(first.results, allow_nan=False)
    assert all(bool(torch.isfinite(t).all()) for t in first.model.state_dict().values())
    assert 0 <= first.results["scores"]["complete"] <= 1
    second = attempt(dataset, config, seed)
    assert second is not None
    a, b = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert same_numbers(first.results, second.results)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.fixture(autouse=True, scope="module")
def _brief_probe():
    with pytest.MonkeyPatch.context() as m:
        m.setattr("mmc_fast.experiments.training.game._FRESH_EPOCHS", 2)
        yield


@FAST
@given(datasets(largest=24), configs(), st.integers(0, 2**31))
def test_drawn_runs(dataset, config, seed):
    runs_or_says_why(dataset, config, seed)


@pytest.mark.slow
@SLOW
@given(datasets(), configs(), st.integers(0, 2**31))
def test_many_drawn_runs(dataset, config, seed):
    runs_or_says_why(dataset, config, seed)


@settings(SLOW, max_examples=60)
@given(st.data())
def test_absent_rows_and_their_garbage_reach_nothing(drawn):
    """Any presence, any garbage in absent rows: outputs and gradients are those with zeros there."""
    rows, m = drawn.draw(st.integers(0, 9)), drawn.draw(st.integers(1, 4))
    here = drawn.draw(presence(rows, m))
    garbage = drawn.draw(st.sampled_from([float("nan"), float("inf"), 1e38, -7.0]))
    g = torch.Generator().manual_seed(drawn.draw(st.integers(0, 2**31)))
    dims = [drawn.draw(st.integers(1, 6)) for _ in range(m)]
    head = EBRHead(dims, latent_dim=3, hidden_dim=4, psi_dims=(3,))
    for p in head.parameters():
        p.data.normal_(generator=g)
    clean = [torch.where(here[:, i, None], torch.randn(rows, d, generator=g), 0.0) for i, d in enumerate(dims)]
    dirty = [torch.where(here[:, i, None], x, garbage) for i, x in enumerate(clean)]
    found = []
    for features in (clean, dirty):
        out = head(features, present=here, reversal=0.5)
        head.zero_grad()
        (out.discrimination_loss + out.reconstruction_loss + sum(r.sum() for r in out.recovered)).backward()
        found.append(
            [out.discrimination_loss, out.reconstruction_loss, *out.recovered, *(p.grad for p in head.parameters())]
        )
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


BAD = [None, "", "x", [], {}, -1, 0, 1.5, float("nan"), float("inf"), True, 10**30, [[1]], "1e5", -0.0, ("a",), b"x"]


def test_drawn_settings_from_files_are_taken_or_refused_in_one_line(seed):
    """Every key of the configuration with values of every kind, misspelt keys, wrong tables."""
    draw = random.Random(seed)
    known = [*TrainConfig.preset("ebr").to_dict(), "accumulate", "nonfinite", "clip_grad_norm", "checkpoint_seconds"]
    refused = 0
    for n in range(600):
        values = {}
        for _ in range(draw.randrange(1, 3)):
            key = draw.choice(known)
            if draw.random() < 0.2:
                at = draw.randrange(len(key))
                key = key[:at] + draw.choice("abcxyz_") + key[at + draw.randrange(2) :]
            values[key] = draw.choice(BAD)
            if key in ("ebr", "kd") and draw.random() < 0.7:
                inner = {"ebr": ["reversal", "psi_dims", "schedule", "latent_dim"], "kd": ["epochs", "lr", "teachers"]}[
                    key
                ]
                values[key] = {draw.choice([*inner, "revesral"]): draw.choice(BAD)}
        try:
            config = TrainConfig.from_dict(values)
        except InputError as error:
            check_one_line(error)
            refused += 1
            continue
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config, (n, values)
    assert refused > 300


def test_drawn_arguments_of_the_operator_are_refused_cleanly(seed):
    """Wrong shapes, types and ranges: an error of Python with one line, never a crash."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    head = EBRHead([3, 2], latent_dim=2, hidden_dim=3, psi_dims=(2,))
    good = {
        "present": torch.ones(4, 2, dtype=torch.bool),
        "source": torch.zeros(4, 2, dtype=torch.int64),
        "reversal": 0.5,
    }
    bad = [
        torch.ones(3, 2, dtype=torch.bool),
        torch.ones(4, 3),
        torch.zeros(0),
        torch.full((4, 2), 7),
        torch.ones(4, 2, 2, 2),
    ]
    bad += ["x", torch.full((4, 2), -5), torch.zeros(4, 2, dtype=torch.complex64), torch.ones(2, 4, dtype=torch.bool)]
    for _ in range(60):
        features = [torch.randn(4, 3, generator=g), torch.randn(4, 2, generator=g)]
        arguments = dict(good)
        arguments[draw.choice(["present", "source"])] = draw.choice(bad)
        if draw.random() < 0.3:
            features[draw.randrange(2)] = draw.choice(
                [torch.randn(3, 3), torch.randn(4), torch.zeros(4, 3, dtype=torch.int64)]
            )
        try:
            out = head(features, **arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            check_one_line(error)
        else:
            assert out.latents.shape[1] == 4
