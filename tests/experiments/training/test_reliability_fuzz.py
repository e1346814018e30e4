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
from strategies import configs, datasets
from training_data import check_one_line, same_numbers

from mmc_fast.errors import InputError
from mmc_fast.experiments.training import TrainConfig, TrainingDiverged, train
from mmc_fast.experiments.training.size import check_size

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
        m.setattr("mmc_fast.experiments.training.adversarial._PROBE_EPOCHS", 2)
        yield


@pytest.mark.fuzz
@FAST
@given(datasets(largest=24), configs(), st.integers(0, 2**31))
def test_drawn_runs(dataset, config, seed):
    runs_or_says_why(dataset, config, seed)


@pytest.mark.slow
@SLOW
@given(datasets(), configs(), st.integers(0, 2**31))
def test_many_drawn_runs(dataset, config, seed):
    runs_or_says_why(dataset, config, seed)


BAD = [None, "", "x", [], {}, -1, 0, 1.5, float("nan"), float("inf"), True, 10**30, [[1]], "1e5", -0.0, ("a",), b"x"]
BAD += [10**5000, 2**70, 1e39, -(2**63), [1] * 5000, "[/bold]", "\x00", "\ud800"]


@pytest.mark.fuzz
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
        with pytest.MonkeyPatch.context() as m:  # what fits the schema fits into memory, or says so
            m.setattr("mmc_fast._util.memory.available_memory", lambda: 10**9)
            try:
                check_size(config, {"a": 5, "b": 3}, 3)
            except InputError as error:
                check_one_line(error)
    assert refused > 300
