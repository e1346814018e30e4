"""A user's own file: each part of the documented layout arrives as it should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import DROP, arrays, write

from mmc_fast.experiments import data
from mmc_fast.experiments.data.archive import Archive
from mmc_fast.experiments.data.splits import stratified_split


def test_everything_arrives(tmp_path: Path) -> None:
    base = arrays()
    meta = {"name": "mine", "views": ["b", "a"], "num_classes": 3, "source": "lab", "licence": "CC0"}
    extra = {
        "names_a": np.array(["u", "v", "w", "z"]),
        "ids": np.array([f"p{i // 3}" for i in range(90)]),
        "meta": np.array(json.dumps(meta)),
        "diary": np.zeros(5),
    }
    got = data.load(write(tmp_path / "d.npz", extra), standardise=False)
    assert got.name == "mine"
    assert got.modalities == ["b", "a"]
    assert got.dims == {"b": 3, "a": 4}
    assert (got.num_classes, got.metric) == (3, "accuracy")
    assert got.feature_names == {"b": ["b_0", "b_1", "b_2"], "a": ["u", "v", "w", "z"]}
    assert (got.info["source"], got.info["licence"], got.info["ignored_arrays"]) == ("lab", "CC0", ["diary"])
    np.testing.assert_array_equal(got.features["a"], base["x_a"])
    np.testing.assert_array_equal(got.features["b"], base["x_b"].astype(np.float32))
    np.testing.assert_array_equal(got.labels, base["y"])
    np.testing.assert_array_equal(got.split, base["split"])
    assert got.ids is not None
    assert len(torch.unique(got.ids)) == 30
    assert got.present.all()


def test_str_path_order_of_the_file_and_fractionless_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz", {"y": (np.arange(90) % 2).astype(np.float64)})
    got = data.load(str(path))
    assert got.name == "d"
    assert got.modalities == ["a", "b"]
    assert (got.num_classes, got.metric, got.labels.dtype) == (2, "auroc", torch.int64)


def test_sequences_are_flattened_with_names_for_each_step(tmp_path: Path) -> None:
    values = np.arange(90 * 6, dtype=np.float64).reshape(90, 3, 2)
    path = write(tmp_path / "d.npz", {"x_a": values, "names_a": np.array(["hr", "bp"]), "x_b": np.arange(90.0)})
    got = data.load(path, standardise=False)
    assert got.feature_names["a"] == ["hr@0", "bp@0", "hr@1", "bp@1", "hr@2", "bp@2"]
    np.testing.assert_array_equal(got.features["a"], values.reshape(90, 6))
    assert got.dims["b"] == 1


def test_fortran_order_and_compression(tmp_path: Path) -> None:
    base = arrays()
    np.savez_compressed(tmp_path / "d.npz", **{**base, "x_a": np.asfortranarray(base["x_a"])})
    got = data.load(tmp_path / "d.npz", standardise=False)
    np.testing.assert_array_equal(got.features["a"], base["x_a"])


def test_tasks(tmp_path: Path) -> None:
    labels = {"y": DROP, "y_u": np.arange(90) % 2, "y_v": np.arange(90) % 5}
    path = write(tmp_path / "d.npz", labels)
    assert data.load(path, task="u").metric == "auroc"
    v = data.load(path, task="v")
    assert (v.num_classes, v.info["task"]) == (5, "v")
    np.testing.assert_array_equal(v.labels, labels["y_v"])
    only = write(tmp_path / "one.npz", {"y": DROP, "y_u": np.arange(90) % 2})
    assert data.load(only).info["task"] == "u"


def test_a_split_is_drawn_by_class(seed: int, tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz", {"split": DROP})
    got = data.load(path, split_seed=seed)
    for label in range(3):
        assert torch.bincount(got.split[got.labels == label].long()).tolist() == [18, 3, 9]
    assert torch.equal(got.split, data.load(path, split_seed=seed).split)
    assert not torch.equal(got.split, data.load(path, split_seed=seed + 1).split)
    assert got.info["split"] == f"drawn with seed {seed}"


def test_groups_are_dealt_whole_by_their_highest_label(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(0, 100, 500), rng.choice([0, 1, 2], 500, p=[0.85, 0.1, 0.05])
    changes = {
        "split": DROP,
        "ids": ids,
        "y": labels,
        "x_a": rng.normal(size=(500, 2)),
        "x_b": rng.normal(size=(500, 2)),
    }
    got = data.load(write(tmp_path / "d.npz", changes), split_seed=seed)
    names, expected, draw = sorted(set(ids)), {}, np.random.default_rng(seed)
    highest = [max(labels[ids == name]) for name in names]
    for label in (0, 1, 2):
        dealt = draw.permutation([n for n, top in enumerate(highest) if top == label])
        for place, n in enumerate(dealt):
            expected[names[n]] = (place >= round(0.6 * len(dealt))) + (place >= round(0.7 * len(dealt)))
    assert got.split.tolist() == [expected[name] for name in ids]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("count", range(3, 21))
def test_every_class_of_three_or_more_is_in_every_part(count: int, grouped: bool, seed: int) -> None:
    """Also where the shares leave a part nothing."""
    labels = np.repeat([0, 1], [50, count])
    ids = np.arange(50 + count) if grouped else None
    if grouped:  # two rows to each group
        labels, ids = np.repeat(labels, 2), np.repeat(np.arange(50 + count), 2)
    code = stratified_split(labels, seed=seed, ids=ids)
    parts = np.bincount(code[labels == 1], minlength=3) // (1 + grouped)
    assert parts.min() >= 1
    assert parts.sum() == count
    wanted = count * np.array([0.6, 0.1, 0.3])
    assert (np.abs(parts - wanted) <= 1).all(), parts
    assert np.bincount(code[labels == 0]).tolist() == [30 * (1 + grouped), 5 * (1 + grouped), 15 * (1 + grouped)]
    for shares, ends in (((0.0, 0.0), (1, 1)), ((0.0, 1.0), (1, count - 2)), ((1.0, 0.0), (count - 2, 1))):
        code = stratified_split(labels, seed=seed, ids=ids, train=shares[0], validation=shares[1])
        parts = np.bincount(code[labels == 1], minlength=3) // (1 + grouped)
        assert parts.tolist() == [*ends, count - sum(ends)]


def test_the_ends_of_the_parts_are_rounded_not_their_sizes() -> None:
    """Of 15 rows 60 % are 9 and 70 % are 10, whatever 10 % are."""
    assert np.bincount(stratified_split(np.zeros(15, np.int64), seed=0)).tolist() == [9, 1, 5]


def test_no_rows_have_an_empty_split() -> None:
    nothing = np.zeros(0, np.int64)
    assert [len(stratified_split(nothing, seed=0, ids=ids)) for ids in (None, nothing)] == [0, 0]


@pytest.mark.parametrize(("count", "lacking"), [(1, "validation and test"), (2, "validation")])
def test_a_class_that_a_part_lacks_is_told_and_reaches_train(count: int, lacking: str, seed: int) -> None:
    labels = np.repeat([0, 7], [50, count])
    with pytest.warns(UserWarning, match=f"class 7 has none in {lacking}: with fewer than three rows"):
        code = stratified_split(labels, seed=seed)
    assert (code[labels == 7] == 0).any()
    with pytest.warns(UserWarning, match="fewer than three groups"):
        stratified_split(np.repeat(labels, 4), seed=seed, ids=np.repeat(np.arange(len(labels)), 4))


def test_selected_modalities_are_the_only_ones_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = arrays()
    present = np.arange(90) % 4 > 0
    path = write(tmp_path / "d.npz", {"present_b": present})
    read: list[str] = []
    original = Archive.read

    def spy(self: Archive, name: str) -> np.ndarray:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(Archive, "read", spy)
    got = data.load(path, modalities=["b"])
    assert sorted(read) == ["meta", "present_b", "split", "x_b", "y"]
    rows = present | (base["split"] > 0)  # training rows without b teach nothing
    assert len(got) == rows.sum()
    assert got.info["dropped_rows"] == (~rows).sum()
    np.testing.assert_array_equal(got.labels, base["y"][rows])

    both = data.load(path).keep(["b"])
    assert torch.equal(both.features["b"], got.features["b"])
    assert torch.equal(both.present, got.present)
    assert list(both.preprocessing.views) == list(got.preprocessing.views) == ["b"]


def test_parts_and_selection(tmp_path: Path) -> None:
    dataset = data.load(write(tmp_path / "d.npz", {"ids": np.arange(90)}))
    for code, name in enumerate(("train", "validation", "test")):
        part = dataset.part(name)
        assert torch.equal(part.index, torch.nonzero(dataset.split == code).flatten())
        assert len(part) == len(part.index)
        assert torch.equal(part.labels, dataset.labels[part.index])
        for got, x in zip(part.features, dataset.features.values(), strict=True):
            assert torch.equal(got, x[part.index])
    some = part.select(torch.tensor([5, 0, 5]))
    assert some.index.tolist() == [part.index[5], part.index[0], part.index[5]]
    assert torch.equal(some.features[1], dataset.features["b"][some.index])
    assert len(part.select(part.labels == 1)) == (part.labels == 1).sum()
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        dataset.part("validaton")
