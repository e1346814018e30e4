"""What hides modalities from the model in training, and the order in which rows come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import mcar

__all__ = ["epoch_order", "presence_entropy", "training_masks"]


def epoch_order(rows: int, generator: torch.Generator) -> Tensor:
    """A permutation of ``rows``: int64 ``[rows]``."""
    return torch.randperm(rows, generator=generator)


def training_masks(present: Tensor, rate: float, generator: torch.Generator, sizes: str = "binomial") -> Tensor:
    """Presence of the rows of an epoch, bool ``[N, m]``; rate 0 returns ``present`` (natural presence) itself.

    "binomial": every present modality is hidden with probability ``rate``; a row that would lose all is drawn again.
    "uniform": a share ``rate`` of the rows keeps k of its n present modalities, k uniform on 1 .. n and then every
    subset of k alike, so that small subsets are seen as often as large ones.
    """
    if rate == 0:
        return present
    if sizes == "binomial":
        return mcar(present, rate, generator).present
    count = present.sum(1, keepdim=True)
    kept = (torch.rand(len(present), 1, generator=generator, dtype=torch.float64) * count).long() + 1
    places = torch.rand(present.shape, generator=generator).masked_fill(~present, 2.0).argsort(1).argsort(1)
    masked = torch.rand(len(present), 1, generator=generator) < rate
    return present & (~masked | (places < kept))


def presence_entropy(present: Tensor) -> float:
    """H(pi) in nats: entropy of the modality frequencies among present (row, modality) pairs; ln m if all are."""
    counts = present.sum(0).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum())
