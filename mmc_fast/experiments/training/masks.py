"""What hides modalities from the model in training, and the order in which rows come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import mcar


def epoch_order(rows: int, generator: torch.Generator) -> Tensor:
    """A permutation of ``rows``: int64 ``[rows]``."""
    return torch.randperm(rows, generator=generator)


def training_masks(present: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Presence of the rows of an epoch, bool ``[N, m]``; rate 0 returns ``present`` (natural presence) itself.

    Every present modality is hidden with probability ``rate``; a row that would lose all is drawn again.
    """
    return present if rate == 0 else mcar(present, rate, generator).present


def presence_entropy(present: Tensor) -> float:
    """H(pi) in nats: entropy of the modality frequencies among present (row, modality) pairs; ln m if all are."""
    counts = present.sum(0).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum())
