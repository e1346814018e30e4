"""Data sets made in memory: the object checks itself, whoever makes it; synthetic sets keep what they promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from mmc_fast.errors import InputError
from mmc_fast.experiments import data
from mmc_fast.experiments.data import MultimodalDataset, SyntheticModality


@pytest.fixture
def good() -> MultimodalDataset:
    return data.synthetic(60, modalities=2, num_classes=3, missing_rate=0.2, seed=4)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "no modality": ({"features": {}, "present": torch.ones(60, 0, dtype=torch.bool)}, "at least one is needed"),
    "an unknown part": ({"split": torch.arange(60, dtype=torch.uint8) % 4}, "split code 3 in row 3 is unknown"),
    "labels of another type": ({"labels": torch.zeros(60)}, r"labels must be int64 of shape \[any\], got float32"),
    "labels that are no tensor": (
        {"labels": np.zeros(60, int)},
        "labels must be a tensor with one entry a row, got ndarray",
    ),
    "split of wrong length": ({"split": torch.zeros(59, dtype=torch.uint8)}, r"split must be uint8 of shape \[60\]"),
    "presence of another type": ({"present": torch.ones(60, 2)}, r"present must be bool of shape \[60, 2\]"),
    "presence of wrong width": ({"present": torch.ones(60, 3, dtype=torch.bool)}, r"got bool \[60, 3\]"),
    "ids of another type": ({"ids": torch.zeros(60)}, "ids must be int64"),
    "features in double": ({"features": {"a": torch.zeros(60, 12).double()}}, "present must be bool"),
    "an unknown metric": ({"metric": "f1"}, "metric 'f1' are not those of the task"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_bad_fields(case: str, good: MultimodalDataset) -> None:
    changes, message = CHANGES[case]
    with pytest.raises(InputError, match=message) as caught:
        replace(good, **changes)
    assert "\n" not in str(caught.value)


def test_bad_features(good: MultimodalDataset) -> None:
    a, b = good.features.values()
    for x, message in (
        (a.double(), "'a' must be float32"),
        (a[:59], r"'a' must be float32 of shape \[60, any\], got float32 \[59, 12\]"),
        (a[:, :0], "'a' has no feature"),
        (torch.full_like(a, float("nan")), "'a' holds NaN"),
        (a[:, :3], "'a' has 3 features and 12 feature names"),
    ):
        with pytest.raises(InputError, match=message):
            replace(good, features={"a": x, "b": b})
    with pytest.raises(InputError, match="12 features and none feature names"):
        replace(good, feature_names={"a": good.feature_names["a"]})


def test_keep(good: MultimodalDataset) -> None:
    good = replace(good, ids=torch.arange(60) * 7, row_names=[f"row {n}" for n in range(60)])
    only = good.keep(["b"])
    rows = good.present[:, 1] | (good.split > 0)
    assert int((~rows).sum()) > 0
    assert only.modalities == ["b"]
    assert torch.equal(only.features["b"], good.features["b"][rows])
    assert torch.equal(only.labels, good.labels[rows])
    assert torch.equal(only.split, good.split[rows])
    assert torch.equal(only.ids, good.ids[rows])
    assert only.row_names == [f"row {n // 7}" for n in only.ids.tolist()]
    part = only.part("validation")
    some = part.select(torch.tensor([3, 1]))  # index: rows of the data set, also of a part of a part
    assert torch.equal(only.features["b"][some.index], some.features[0])
    assert torch.equal(some.index, part.index[[3, 1]])
    assert good.keep(["b", "a"]).modalities == ["a", "b"]
    with pytest.raises(InputError, match="Unknown modality 'c'"):
        good.keep(["c"])


def test_batches_are_the_rows_of_their_part_in_order(good: MultimodalDataset) -> None:
    for batches, part in ((good.batches(), 2), (good.training_batches(), 0), (good.part("validation").batches(4), 1)):
        assert torch.cat([b.index for b in batches]).tolist() == torch.where(good.split == part)[0].tolist()
        assert len(batches) == len(list(batches))
    assert [len(b) for b in good.part("validation").batches(4)] == [4, 2]


def test_parts_of_streamed_data_are_runs_of_rows(good: MultimodalDataset) -> None:
    with pytest.raises(InputError, match="must be in the order train, validation, test"):
        replace(good, streamed=True)
    order = good.split.argsort(stable=True)
    features = {name: x[order] for name, x in good.features.items()}
    rows = {"present": good.present[order], "labels": good.labels[order], "split": good.split[order]}
    plain = replace(good, features=features, **rows)
    streamed = replace(plain, streamed=True)
    for name in ("train", "validation", "test"):
        a, b = plain.part(name), streamed.part(name)
        assert (a.streamed, b.streamed) == (False, True)
        for x, y in zip(
            (*a.features, a.present, a.labels, a.index), (*b.features, b.present, b.labels, b.index), strict=True
        ):
            assert torch.equal(x, y)
    assert torch.equal(streamed.keep(["a", "b"]).features["b"], features["b"])
    with pytest.raises(InputError, match="drops rows of features that are mapped into memory"):
        streamed.keep(["b"])


def test_synthetic_signal_is_where_it_is_said_to_be(seed: int) -> None:
    strong, weak = SyntheticModality(strength=4.0), SyntheticModality(strength=0.5, predictive=2)
    got = data.synthetic(1500, modalities={"strong": strong, "weak": weak}, num_classes=3, seed=seed)
    assert got.info["predictive"] == {"strong": [0, 1, 2, 3], "weak": [0, 1]}
    train, test = got.part("train"), got.part("test")

    def score(view: int, columns: slice) -> float:
        model = LogisticRegression().fit(train.features[view][:, columns].numpy(), train.labels.numpy())
        return float(model.score(test.features[view][:, columns].numpy(), test.labels.numpy()))

    assert score(0, slice(0, 4)) > 0.9
    assert score(1, slice(0, 2)) < score(0, slice(0, 4)) - 0.2
    assert score(0, slice(4, 12)) < 0.45  # noise: one in three, give or take
    assert got.feature_names["weak"][1:3] == ["signal_1", "noise_2"]
    assert torch.bincount(got.labels).tolist() == [500, 500, 500]


def test_synthetic_is_seeded_and_missing(seed: int) -> None:
    one, two, other = (data.synthetic(200, missing_rate=0.4, seed=seed + s) for s in (0, 0, 1))
    for a, b in zip(one.features.values(), two.features.values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.present, two.present)
    assert not torch.equal(one.present, other.present)
    assert one.present.any(1).all()
    assert 0.1 < 1 - one.present.double().mean() < 0.6


def test_planted_collapse_collapses(seed: int) -> None:
    """A plain network on both modalities does not use the hard one, from which alone it learns the classes well."""
    got = data.planted_collapse(seed)
    train, held_out = got.part("train"), got.part("validation")
    linear = LogisticRegression().fit(train.features[1].numpy(), train.labels.numpy())
    assert linear.score(held_out.features[1].numpy(), held_out.labels.numpy()) < 0.45  # folded: no linear way

    def score(model: torch.nn.Module, views: list[Tensor]) -> float:
        with torch.no_grad():
            return float((model(torch.cat(views, 1)).argmax(1) == held_out.labels).double().mean())

    easy, hard = held_out.features
    both, alone = fit(train.features, train.labels, seed), fit(train.features[1:], train.labels, seed)
    only_easy = score(both, [easy, torch.zeros_like(hard)])
    only_hard = score(both, [torch.zeros_like(easy), hard])
    print(f"hard alone {score(alone, [hard])}, fused {score(both, [easy, hard])}, of it {only_easy} and {only_hard}")
    assert score(alone, [hard]) > 0.8
    assert only_easy > 0.85
    assert only_hard < score(alone, [hard]) - 0.15


def fit(views: list[Tensor], labels: Tensor, seed: int) -> torch.nn.Module:
    """One hidden layer on the views side by side, 25 epochs of Adam with dropout."""
    x = torch.cat(views, 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 4)]
        model = nn.Sequential(*layers)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(25):
            for rows in torch.randperm(len(x)).split(128):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
                optimiser.step()
    return model.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 5}, "5 samples of 3 classes"),
        ({"num_classes": 1}, "need 2 classes"),
        ({"modalities": 0}, "allowed are 1 to 26"),
        ({"missing_rate": 1.0}, "rate 1.0"),
    ],
)
def test_bad_synthetic(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.synthetic(**options)


@pytest.mark.parametrize(
    "options", [{"predictive": 13}, {"dim": 0, "predictive": 0}, {"strength": float("nan")}, {"reliability": 1.2}]
)
def test_bad_synthetic_modality(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="synthetic: "):
        SyntheticModality(**options)
