"""Pairs of a positive ranked above a negative, for many scores and groups of samples, at constant memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

EXACT, BINS = 1 << 15, 2048
_BINNED = ("edges", "counts", "range")


class RankedPairs:
    """``U[s, k, l]``: pairs of a positive of group k and a negative of group l that score s ranks rightly, half for a tie.

    The AUROC of a weighting of groups is ``Σ w_k w_l U[k, l] / (Σ w_k P_k)(Σ w_l N_l)``. Exact while there are fewer than ``EXACT``
    rows. From then on scores are counted in ``BINS`` bins between quantiles of those rows, and pairs within a bin count as ties: the AUROC
    is off by :meth:`errors` at most. Memory ``O(scores · groups · BINS)``.
    """

    def __init__(self, scores: int, groups: int) -> None:
        self.groups = groups
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.edges = self.counts = torch.zeros(scores, 0)
        self.range = self.edges  # smallest and largest score in each bin, [2, S, BINS]

    def add(self, scores: Tensor, labels: Tensor, places: Tensor) -> None:
        """Scores ``[S, B]`` (float32), labels 0 or 1 and groups of a batch."""
        group = labels * self.groups + places
        if self.edges.shape[1]:
            self._count(scores, group)
            return
        self.waiting.append((scores, group))
        if sum(len(g) for _, g in self.waiting) >= EXACT:
            scores, group = self._waiting()
            ranks = torch.linspace(0, scores.shape[1] - 1, BINS + 1)[1:-1].round().long()
            self.edges = torch.stack([row.sort().values[ranks] for row in scores])
            self.counts = torch.zeros(len(scores), 2 * self.groups, BINS, dtype=torch.int32)
            self.range = torch.tensor([math.inf, -math.inf])[:, None, None].repeat(1, len(scores), BINS)
            self.waiting = []
            self._count(scores, group)

    def _waiting(self) -> tuple[Tensor, Tensor]:
        return torch.cat([s for s, _ in self.waiting], 1), torch.cat([g for _, g in self.waiting])

    def _count(self, scores: Tensor, group: Tensor) -> None:
        bins = torch.searchsorted(self.edges, scores.contiguous(), right=True)
        self.range[0].scatter_reduce_(1, bins, scores, "amin")
        self.range[1].scatter_reduce_(1, bins, scores, "amax")
        ones = torch.ones_like(bins, dtype=torch.int32)
        self.counts.view(len(scores), -1).scatter_add_(1, group * BINS + bins, ones)

    def pairs(self) -> np.ndarray:
        """``U [S, K, K]``, float64."""
        k = self.groups
        if self.edges.shape[1]:
            split = (c.double().split(k) for c in self.counts)
            return torch.stack([positive @ (n.cumsum(1) - n / 2).t() for n, positive in split]).numpy()
        scores, group = (x.numpy() for x in self._waiting())
        found = np.zeros((len(scores), k, k))
        for pairs, row in zip(found, scores, strict=True):
            high, where = row[group >= k], group[group >= k] - k
            for negative in range(k):
                low = np.sort(row[group == negative])
                below = (np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")) / 2
                pairs[:, negative] = np.bincount(where, weights=below, minlength=k)
        return found

    def errors(self) -> np.ndarray:
        """How far the AUROC of each score can be from the exact one, ``[S]``: half the share of pairs whose different scores share a bin."""
        if not self.edges.shape[1]:
            return np.zeros(len(self.edges))
        negative, positive = (
            self.counts[:, part].double().sum(1) for part in (slice(self.groups), slice(self.groups, None))
        )
        shared = (negative * positive * (self.range[1] > self.range[0])).sum(1)
        return (shared / (2 * negative.sum(1) * positive.sum(1)).clamp(min=1)).numpy()

    def to_state(self) -> dict[str, Any]:
        return {"waiting": [list(pair) for pair in self.waiting]} | {name: getattr(self, name) for name in _BINNED}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.waiting = [(scores, group) for scores, group in state["waiting"]]
        for name in _BINNED:
            setattr(self, name, state[name])
