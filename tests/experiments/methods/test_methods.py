"""Every method of the comparison: learns, answers for every pattern of presence, and depends on its own row only."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from training_data import tiny

from mmc_fast.errors import InputError
from mmc_fast.experiments.data import MultimodalDataset
from mmc_fast.experiments.methods import CANDIDATES, METHODS, get
from mmc_fast.experiments.training import TrainConfig

BUDGET = TrainConfig(
    epochs=2, batch_size=16, encoder_width=8, encoder_dim=8, fusion_hidden=(8,), fusion_dim=8, fusion_heads=2,
    fusion_depth=1, selection="masked", rates=(0.3,), unimodal_share=0.0, control=False,
)  # fmt: skip
HEADS = {"ebr": {"hidden_dim": 8, "latent_dim": 4, "psi_dims": [6]}}
ALL = sorted(METHODS)
SIMILAR = (
    "transformer-x5",
    "ebr-robust-x5",
    "subset-oracle-x5",
    "kd-random",
    "kd-strongest",
    "kd-strongest-first",
    "kd-simultaneous",
    "mean",
)  # tested with their like
FEW = [pytest.param(n, marks=pytest.mark.slow) if "+" in n or n in SIMILAR else n for n in ALL]


def settings(name: str, **changes) -> dict:
    """The default candidate with small heads and short distillation, and ``changes`` on top."""
    method, found = get(name), dict(get(name).search[0])
    for part in ("ebr", "kd"):
        if part in method.fixed or part in found:
            found[part] = dict(found.get(part, {})) | (
                HEADS["ebr"] if part == "ebr" else {"epochs": 1, "batch_size": 16}
            )
    return found | changes


def patterns(dataset: MultimodalDataset, rows: int = 4) -> tuple[list[torch.Tensor], torch.Tensor]:
    """``rows`` test rows under each of the 2^m - 1 patterns."""
    part = dataset.part("test")
    m = len(dataset.modalities)
    found = [p for p in itertools.product([True, False], repeat=m) if any(p)]
    present = torch.tensor(found).repeat_interleave(rows, 0)
    return [x[:rows].repeat(len(found), 1) for x in part.features], present


@pytest.mark.parametrize("name", ALL)
def test_all_patterns_nothing_absent_is_read_and_rows_do_not_mix_unless_flagged(name, seed):
    method = get(name)
    seed = 0 if method.batch_dependent else seed  # a drawn network may happen to mix next to nothing
    dataset = tiny(seed)
    fitted = method.fit(dataset, settings(name), seed % 1000, budget=BUDGET)
    features, present = patterns(dataset)
    found = fitted.predict(features, present)
    assert found.shape == (len(present), 3)
    torch.testing.assert_close(found.sum(1), torch.ones(len(present)), rtol=0, atol=1e-5)
    junk = [torch.where(present[:, i, None], x, float("nan")) for i, x in enumerate(features)]
    assert torch.equal(fitted.predict(junk, present), found)

    pieces = torch.randperm(len(present), generator=torch.Generator().manual_seed(seed)).split(5)
    apart = torch.empty_like(found)
    for rows in pieces:
        apart[rows] = fitted.predict([x[rows] for x in features], present[rows])
    difference = float((apart - found).abs().max())
    assert difference > 1e-6 if method.batch_dependent else difference < 1e-5, "the flag says otherwise"
    assert (fitted.batch_rows == 256) == method.batch_dependent

    nothing = torch.zeros(2, 3, dtype=torch.bool)
    shares = torch.bincount(dataset.part("train").labels) / len(dataset.part("train"))
    torch.testing.assert_close(fitted.predict([x[:2] for x in features], nothing), shares.expand(2, -1))


@pytest.mark.parametrize("name", FEW)
def test_a_training_is_a_function_of_its_seed_and_never_reads_the_test_part(name, seed):
    dataset = tiny(seed, absent=0.2)
    features, present = patterns(dataset, 2)
    runs = []
    for spoiled in (False, True):
        if spoiled:
            for x in dataset.features.values():
                x[dataset.split == 2] = 1e30
        runs.append(get(name).fit(dataset, settings(name), 7, budget=BUDGET).predict(features, present))
    assert torch.equal(*runs)


# A linear model cannot memorise them.
@pytest.mark.parametrize("name", [n for n in FEW if n != "logistic"])
def test_overfits_64_samples(name):
    """Labels that only memory can tell; accuracy on the rows themselves."""
    generator = torch.Generator().manual_seed(3)
    dataset = tiny(3, dims=(12, 10, 8), num_classes=2, sizes=(64, 64, 8))
    for x in dataset.features.values():
        x.normal_(generator=generator)
        x[64:128] = x[:64]  # scored on what it was trained on
    dataset.labels[:128] = torch.arange(128) % 2
    slow = name.startswith("grape") or name.endswith(
        "+ebr"
    )  # rounds of means, and an adversary beside the task, learn slowly
    budget = TrainConfig.from_dict(
        BUDGET.to_dict() | {"epochs": 200 if slow else 80, "batch_size": 64 if slow else 32, "selection": "complete",
                            "fusion_hidden": [64 if slow else 32], "encoder_width": 32, "encoder_dim": 32,
                            "fusion_dim": 32, "fusion_heads": 4}
    )  # fmt: skip
    changes: dict = {
        "lr": 5e-3,
        "weight_decay": 0.0,
        "modality_dropout": 0.0,
        "consistency": 0.0,
        "unimodal_share": 1.0,
    }
    if name.startswith("boosting"):
        changes["options"] = {"learning_rate": 0.1, "max_leaf_nodes": 31, "min_samples_leaf": 1}
    fitted = get(name).fit(dataset, settings(name, **changes), 0, budget=budget)
    part = dataset.part("train")
    accuracy = float((fitted.predict(part.features, part.present).argmax(1) == part.labels).float().mean())
    assert accuracy >= 0.95, accuracy


def test_the_searches_are_equally_large_and_hold_different_settings():
    for method in METHODS.values():
        resolved = [repr((c.to_dict(), o)) for c, o in (method.resolve(s, BUDGET) for s in method.search)]
        assert len(set(resolved)) == CANDIDATES, method.name
        assert method.resolve(budget=BUDGET)[0].unimodal_share <= 1, "no unimodal model trains longer than the run"


def test_no_two_methods_are_the_same_system():
    found = {}
    for name, method in METHODS.items():
        config, options = method.resolve(budget=BUDGET)
        found.setdefault((method.fitter, repr(config.to_dict()), repr(options)), []).append(name)
    assert [names for names in found.values() if len(names) > 1] == []


@pytest.mark.parametrize("name", [n for n in ALL if get(n).classes_only])
def test_a_method_for_classes_refuses_another_task(name):
    numbers = MultimodalDataset.from_arrays({"a": torch.rand(60, 2).numpy()}, torch.rand(60).numpy(), name="lengths")
    with pytest.raises(
        InputError, match=re.escape(f"method {name} is for classes and lengths holds a task of regression")
    ):
        get(name).fit(numbers, settings(name), 0, budget=BUDGET)


def test_unknown_names_and_options_are_refused_in_one_line():
    with pytest.raises(InputError, match="Did you mean 'muse'"):
        get("muze")
    with pytest.raises(InputError, match="option 'alignmnt' does not exist; allowed are alignment, domain"):
        get("shaspec").resolve({"options": {"alignmnt": 1}})
    with pytest.raises(InputError, match="Did you mean 'epochs'"):
        get("vanilla").resolve({"epoch": 1})


@pytest.mark.parametrize(
    "changes",
    [{"modality_dropout": 0.5, "consistency": 1.0}, {"clip_grad_norm": 1.0}, {"ebr": {"cross_recovery": 0.1}},
     {"ebr": {"schedule": "interleave"}}, {"nonfinite": "skip"}],
)  # fmt: skip
def test_settings_that_the_loop_of_baselines_lacks_are_refused(changes):
    name = "shaspec+ebr" if "ebr" in changes else "shaspec"
    with pytest.raises(InputError, match="which re-implemented methods do not have; leave it at"):
        get(name).fit(tiny(0), changes, 0, budget=BUDGET)
