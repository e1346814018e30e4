"""A split within train and validation: no test row, the shares of each class, groups and names with their rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_data import tiny

from mmc_fast.errors import InputError
from mmc_fast.experiments.data.inner import inner_split


def test_the_inner_split_holds_no_test_row_and_every_class(seed):
    dataset = tiny(seed, sizes=(90, 30, 60))
    for x in dataset.features.values():
        x[dataset.split == 2] = 1e30
    inner = inner_split(dataset, [40, 20, 30], seed)
    assert max(float(x.max()) for x in inner.features.values()) < 1e30
    sizes = [len(inner.part(name)) for name in ("train", "validation", "test")]
    assert sizes[2] == 30
    assert sizes[:2] == pytest.approx([40, 20], abs=2)
    for part in range(3):  # as many of each class as the shares say
        classes = torch.bincount(inner.labels[inner.split == part], minlength=int(dataset.labels.max()) + 1)
        pool = torch.bincount(dataset.labels[dataset.split < 2], minlength=len(classes))
        if part < 2:
            assert (classes - pool * (40, 20)[part] / 120).abs().max() <= 1
    place = {tuple(row): n for n, row in enumerate(torch.cat(list(dataset.features.values()), 1).tolist())}
    chosen = [place[tuple(row)] for row in torch.cat(list(inner.features.values()), 1).tolist()]
    assert torch.equal(inner.labels, dataset.labels[chosen])
    assert torch.equal(inner.present, dataset.present[chosen])
    assert inner.split.dtype == dataset.split.dtype
    rows = torch.cat(list(inner.features.values()), 1)
    assert len(rows.unique(dim=0)) == len(rows), "a row twice"
    other = inner_split(dataset, [40, 20, 30], seed + 1)
    assert not torch.equal(other.labels, inner.labels) or not torch.equal(other.features["a"], inner.features["a"])
    again = inner_split(dataset, [40, 20, 30], seed)
    assert all(torch.equal(x, inner.features[name]) for name, x in again.features.items())
    inner_split(dataset, [89, 30, 1], seed)  # all rows that there are
    every = [inner_split(dataset, [60, 30, 30], seed + n).split for n in (0, 1)]
    assert list(map(len, every)) == [120, 120]
    assert not torch.equal(*every), "the parts are drawn, not only what is left out"
    for wrong in ([90, 20, 11], [100, 20, 30], [50, 20, 0], [-1, 30, 30], [40, 20], [40, 20, 30, 10]):
        with pytest.raises(InputError, match="three numbers of at most 120 rows"):
            inner_split(dataset, wrong, seed)


def test_the_inner_split_keeps_groups_and_names_with_their_rows(seed):
    dataset = tiny(seed, sizes=(90, 30, 60))
    ids = torch.arange(180) // 3
    dataset = replace(dataset, ids=ids, row_names=[f"row {i}" for i in range(180)], split=dataset.split[ids * 3])
    inner = inner_split(dataset, [60, 30, 15], seed)
    rows = [int(name.split()[1]) for name in inner.row_names]
    assert torch.equal(inner.ids, ids[rows])
    assert torch.equal(inner.features["a"], dataset.features["a"][rows])
    parts = {g: set(inner.split[inner.ids == g].tolist()) for g in inner.ids.tolist()}
    assert all(len(found) == 1 for found in parts.values()), "a group in two parts"
