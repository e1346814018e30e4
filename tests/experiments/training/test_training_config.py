"""TrainConfig: round trips, presets, and one clear line for every wrong setting."""

from __future__ import annotations

import dataclasses
import json

import pytest
from training_data import small, tiny

from mmc_fast.errors import InputError
from mmc_fast.experiments.methods import get
from mmc_fast.experiments.training import METHODS, KDConfig, TrainConfig, train
from mmc_fast.nn import EBRConfig


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_through_json(method):
    config = TrainConfig.preset(method, lr=0.002, rates=(0.25,))
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.method == method


def test_round_trip_keeps_nested_settings():
    config = small("ebr", ebr_modalities=("a", "b"), ebr_patience=3, kd=KDConfig(epochs=2, teachers="stronger"))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_partial_dict_starts_from_the_preset():
    config = TrainConfig.from_dict({"method": "ebr", "epochs": 7, "ebr": {"reversal": 0.25}})
    expected = TrainConfig.preset("ebr", epochs=7)
    assert config == dataclasses.replace(expected, ebr=dataclasses.replace(expected.ebr, reversal=0.25))
    assert TrainConfig.from_dict({"kd": {"epochs": 3}}).method == "kd"
    assert TrainConfig.from_dict({"modality_dropout": 0.2}).method == "dropout"


def test_methods_differ_by_configuration_only():
    base = TrainConfig.preset("vanilla").to_dict()
    changed = {m: {k for k, v in TrainConfig.preset(m).to_dict().items() if v != base[k]} for m in METHODS}
    assert changed == {
        "vanilla": set(),
        "dropout": {"method", "modality_dropout"},
        "kd": {"method", "kd"},
        "ebr": {"method", "ebr"},
    }


def test_the_two_recommended_presets_differ_by_the_heads_alone_and_are_those_of_the_comparison():
    both = [TrainConfig.preset(m).to_dict() for m in ("recommended", "ebr-best")]
    assert {k for k in both[0] if both[0][k] != both[1][k]} == {"method", "ebr", "substitute_in_training"}
    for name, preset in zip(("recommended", "ebr-best"), both, strict=True):
        compared = get(name).resolve()[0].to_dict()
        assert {k: compared[k] for k in preset if k != "ebr"} == {k: preset[k] for k in preset if k != "ebr"}
        assert TrainConfig.from_dict({"method": name}).to_dict() == preset
    assert compared["ebr"] == both[1]["ebr"]


BAD = [
    ({"method": "ebrr"}, "Did you mean 'ebr'"),
    ({"epoch": 3}, "Did you mean 'epochs'"),
    ({"ebr": {"reversel": 1}}, "Did you mean 'reversal'"),
    ({"epochs": 0}, "epochs is 0"),
    ({"epochs": 2.5}, "epochs is 2.5; give an integer"),
    ({"epochs": True}, "give an integer"),
    ({"batch_size": -1}, "batch_size is -1"),
    ({"lr": 0}, "lr is 0"),
    ({"lr": float("nan")}, "lr is nan"),
    ({"lr": "fast"}, "give a number"),
    ({"optimizer": "adm"}, "Did you mean 'adam'"),
    ({"fusion": "concatenate"}, "Did you mean 'concat'"),
    ({"fusion_dim": 10, "fusion_heads": 4}, "not a multiple"),
    ({"fusion_hidden": []}, "fusion_hidden is empty"),
    ({"fusion_hidden": 64}, "give a list"),
    ({"modality_dropout": 1.0}, "modality_dropout is 1.0"),
    ({"momentum": 0.9}, "not sgd"),
    ({"rates": [0.1, 1.0]}, r"rates\[1\] is 1"),
    ({"selection": "masked", "rates": []}, "rates is empty"),
    ({"ebr": {"reversal": -1}}, "reversal is -1"),
    ({"ebr": {"reversal": float("nan")}}, "reversal is nan"),
    ({"ebr": {"patience": 0}}, "patience is 0"),
    ({"ebr": {"schedule": "interleaved"}}, "schedule 'interleaved'"),
    ({"ebr": 3}, "give a table"),
    ({"kd": {"temperature": 0}}, "temperature is 0"),
    ({"kd": {}, "encoder": "identity"}, "use encoder 'mlp'"),
    ({"kd": {}, "unimodal_share": 0}, "needs unimodal models"),
    ({"ebr": {}, "unimodal_share": 0}, "needs unimodal models"),
    ({"substitute_in_training": True}, "needs EBR heads"),
    ({"method": "ebr", "ebr": None}, "describe 'vanilla'"),
    ({"method": "vanilla", "modality_dropout": 0.5}, "describe 'dropout'"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(v) for v, _ in BAD])
def test_wrong_settings_are_one_clear_line(values, message):
    with pytest.raises(InputError, match=message) as error:
        TrainConfig.from_dict(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": 0, "evaluate_on": ("tset",)}, "Did you mean 'test'"),
        ({"seed": 0, "device": "tpu"}, "device is 'tpu'"),
        ({"seed": 0, "device": "cuda:99"}, "CUDA devices are visible"),
        ({"seed": 0, "resume": True}, "resume needs run_dir"),
    ],
)
def test_wrong_arguments_of_train(arguments, message):
    with pytest.raises(InputError, match=message):
        train(tiny(0), small("vanilla"), **arguments)


def test_settings_that_do_not_fit_the_data(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match="Did you mean 'a'"):
        train(tiny(0), small("ebr", ebr_modalities=("A",)), seed=0, run_dir=folder)
    with pytest.raises(InputError, match="each once"):
        train(tiny(0), small("ebr", ebr_modalities=("a", "a")), seed=0, run_dir=folder)
    with pytest.raises(InputError, match="at least 2 modalities"):
        train(tiny(0, dims=(5,)), small("kd"), seed=0, run_dir=folder)
    assert not folder.exists()  # nothing half written


def test_ebr_presets_of_both_readings_are_accepted():
    for ebr in (EBRConfig.paper(), EBRConfig.slides()):
        config = TrainConfig.preset("ebr", ebr=ebr)
        assert TrainConfig.from_dict(config.to_dict()) == config
