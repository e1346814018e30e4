"""NumPy's numbers are taken wherever a number is, mean the same, and are stored as plain JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import same_numbers, small, tiny

from mmc_fast import agop, apply_ebr, diagnose
from mmc_fast._util.numbers import check_seed, integer, plain
from mmc_fast.diagnose.measures.weights import collision_bound
from mmc_fast.errors import InputError
from mmc_fast.experiments import data
from mmc_fast.experiments.compare.configs import DataConfig, MethodConfig
from mmc_fast.experiments.compare.demo import DemoPlan
from mmc_fast.experiments.compare.grid import Grid
from mmc_fast.experiments.data.scratch import budget_bytes
from mmc_fast.experiments.data.splits import stratified_split
from mmc_fast.experiments.paper import Plan
from mmc_fast.experiments.training import TrainConfig, evaluate, train
from mmc_fast.experiments.training.adapter import RunAdapter
from mmc_fast.nn import EBRConfig

INTEGERS = [np.int64, np.int32, np.uint8]


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_and_seeds(kind):
    assert type(integer(kind(3))) is int
    assert (integer(kind(3)), check_seed(kind(3))) == (3, 3)
    for other in (True, np.bool_(True), 3.0, np.float64(3), "3", None):
        assert integer(other) is None
        with pytest.raises(InputError, match="give an integer from 0"):
            check_seed(other)
    with pytest.raises(InputError, match="give an integer from 0"):
        check_seed(np.int64(-1))
    assert [type(v) for v in plain((np.float32(0.5), np.int64(1), np.bool_(True), "x"))] == [float, int, bool, str]


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_run_is_that_of_the_plain_numbers(kind, tmp_path):
    dataset, found = tiny(0), []
    for seed, config in (
        (3, small("ebr", epochs=2, lr=0.25)),
        (kind(3), small("ebr", epochs=kind(2), lr=np.float32(0.25), ebr_latent_dim=kind(4))),
    ):
        found.append(train(dataset, config, seed=seed, run_dir=tmp_path / str(len(found))))
    assert same_numbers(found[0].results, found[1].results)
    stored = [json.loads((tmp_path / str(i) / "manifest.json").read_text())["identity"] for i in range(2)]
    assert stored[0] == stored[1]
    model = found[0].model
    assert evaluate(model, dataset, seed=kind(1), rates=(np.float64(0.3),)) == evaluate(
        model, dataset, seed=1, rates=(0.3,)
    )


def test_settings_are_stored_as_json():
    values = {"epochs": np.int64(3), "lr": np.float32(0.25), "control": np.bool_(False), "rates": [np.float32(0.5)]}
    values |= {"fusion_hidden": (np.int64(8),), "ebr": {"latent_dim": np.int64(4), "reversal": np.float64(0.5)}}
    given = TrainConfig.from_dict(values).to_dict()
    made = TrainConfig.preset(
        "ebr", **{**values, "ebr": EBRConfig(**TrainConfig.preset("ebr").ebr.__dict__ | values["ebr"])}
    )
    assert json.loads(json.dumps(given)) == json.loads(json.dumps(made.to_dict()))
    assert (given["epochs"], given["lr"], given["ebr"]["latent_dim"]) == (3, 0.25, 4)
    with pytest.raises(InputError, match="give an integer"):
        TrainConfig.from_dict({"epochs": np.float64(3)})
    assert json.loads(json.dumps(DemoPlan(seeds=(np.int64(1),), epochs=np.int64(2)).to_dict()))["seeds"] == [1]


def test_grids_plans_and_data():
    method, config = MethodConfig.parse("vanilla", {"method": "vanilla"}), DataConfig("m", "mfeat")
    keys = [
        [grid.job(method, config, {}, "test", seed).key for seed in grid.seeds]
        for grid in (Grid([method], [config], range(2)), Grid([method], [config], np.arange(2)))
    ]
    assert keys[0] == keys[1]
    assert json.dumps(list(Plan(Path("out"), ("mfeat",), np.arange(2)).seeds)) == "[0, 1]"
    labels = np.arange(30) % 3
    np.testing.assert_array_equal(stratified_split(labels, seed=np.int64(4)), stratified_split(labels, seed=4))
    one, two = (
        data.synthetic(n, modalities=m, seed=s) for n, m, s in ((90, 2, 5), (np.int64(90), np.int64(2), np.int64(5)))
    )
    assert all(torch.equal(a, b) for a, b in zip(one.features.values(), two.features.values(), strict=True))
    assert budget_bytes(np.int64(5)) == 5


def test_measures_and_heads():
    dataset = tiny(0)
    model = RunAdapter(train(dataset, small("vanilla"), seed=0).model)
    numbers = {"groups": 8, "resamples": 10, "seed": 1, "sample_rows": 64, "level": 0.75}
    other = {name: np.float32(v) if isinstance(v, float) else np.int64(v) for name, v in numbers.items()}
    assert diagnose(model, dataset, **numbers).to_json() == diagnose(model, dataset, **other).to_json()
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    x = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    first, second = (agop(net, x, layer=i(0), seed=i(1), chunk_size=i(4)) for i in (int, np.int64))
    assert torch.equal(first, second)
    assert collision_bound([np.int64(3), np.int64(5)]) == collision_bound([3, 5])
    heads = []
    for i in (int, np.int64):
        foreign = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(2, 5)})
        sizes = {"latent_dim": i(4), "hidden_dim": i(6), "psi_dims": (i(4),)}
        handle = apply_ebr(foreign, at={"a": "a", "b": "b"}, dims={"a": i(4), "b": i(5)}, seed=i(2), **sizes)
        heads.append(handle.head.state_dict())
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
