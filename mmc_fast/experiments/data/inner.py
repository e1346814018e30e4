"""A data set within a data set: its train and validation rows, split anew, for choices that must not see the test part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mmc_fast.errors import InputError

from .dataset import MultimodalDataset
from .splits import stratified_split


def inner_split(dataset: MultimodalDataset, rows: Sequence[int], seed: int) -> MultimodalDataset:
    """About ``rows`` = (train, validation, test) rows of the train and validation parts; no test row is in the result.

    Split by class and, where there are ids, by group as in :func:`stratified_split`; the new test part is cut to its number of
    rows, the other two come out as near to theirs as whole classes and groups allow.

    Raises:
        InputError: more rows than there are, or an empty part.
    """
    pool = (dataset.split < 2).nonzero().flatten()
    if len(rows) != 3 or min(rows) < 1 or sum(rows) > len(pool):
        raise InputError(f"inner split: rows is {list(rows)}; give three numbers of at most {len(pool)} rows together")
    ids = None if dataset.ids is None else dataset.ids[pool].numpy()
    shares = {"train": rows[0] / len(pool), "validation": rows[1] / len(pool)}
    split = torch.as_tensor(stratified_split(dataset.labels[pool].numpy(), seed=seed, ids=ids, **shares))
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    surplus = order[split[order] == 2][rows[2] :]
    keep = torch.ones(len(pool), dtype=torch.bool)
    keep[surplus] = False
    chosen = pool[keep]
    return replace(
        dataset,
        features={name: x[chosen] for name, x in dataset.features.items()},
        present=dataset.present[chosen],
        labels=dataset.labels[chosen],
        split=split[keep].to(dataset.split.dtype),
        ids=None if dataset.ids is None else dataset.ids[chosen],
        row_names=None if dataset.row_names is None else [dataset.row_names[i] for i in chosen.tolist()],
    )
