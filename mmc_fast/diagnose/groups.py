"""Sums over random groups of samples: combined they give the estimate, drawn with replacement its uncertainty.

Everything that a diagnosis sums is kept for K groups. A bootstrap draw weighs whole groups, which needs no pass over the
data, has constant memory, and holds for any statistic of the sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmc_fast.agop.state import MomentState

STILL = 1e-12
"""Variance over squared mean below which a column of float32 numbers is constant: the rest is rounding."""


def stream(seed: int, *names: object) -> torch.Generator:
    """A generator for the stream called ``names``."""
    from mmc_fast._util.seeds import generator

    return generator(seed, "diagnose", *names)


def dealt(groups: int, count: int, seed: int, *names: object) -> Tensor:
    """The group of each of ``count`` rows: sizes differ by one at most, who goes where is drawn from the stream ``names``."""
    random = stream(seed, *names)
    shift = int(torch.randint(groups, (1,), generator=random))
    return ((torch.arange(count) + shift) % groups)[torch.randperm(count, generator=random)]


def draw_weights(groups: int, resamples: int, seed: int) -> np.ndarray:
    """How often each group is drawn in each resample: ``[resamples, groups]``, rows summing to ``groups``."""
    random = np.random.default_rng([seed, 7])
    return random.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(np.float64)


@dataclass(frozen=True)
class Moments:
    """Mean and covariance (divided by n) of some columns."""

    n: float
    mean: Tensor
    covariance: Tensor


class GroupMoments:
    """Mean and centred sums of rows ``[n, width]`` for every group, float64."""

    def __init__(self, groups: int, width: int, native: bool) -> None:
        self.states = [
            MomentState(1, width, True, torch.device("cpu"), "cpp" if native else None) for _ in range(groups)
        ]

    def add(self, group: int, rows: Tensor) -> None:
        """Rows of one group."""
        self.states[group].add(rows[:, None, :])
        self.states[group].advance(len(rows))

    def combine(self, weights: np.ndarray) -> Moments:
        """The moments of all samples, those of group k counted ``weights[k]`` times; a constant column has no covariance."""
        counts = np.array([s.n for s in self.states]) * weights
        n = float(counts.sum())
        means = torch.stack([s.mean[0] for s in self.states if s.mean is not None])
        share = torch.from_numpy(counts / n)
        mean = (share[:, None] * means).sum(0)
        covariance = torch.zeros_like(self.states[0].gram)
        for state, weight in zip(self.states, weights, strict=True):
            if weight:
                covariance.add_(state.gram, alpha=float(weight) / n)
        covariance = covariance.triu()
        covariance = covariance + covariance.triu(1).t()
        apart = (means - mean) * share.sqrt()[:, None]
        covariance += apart.t() @ apart
        still = covariance.diagonal() <= STILL * mean.square()
        covariance[still] = 0
        covariance[:, still] = 0
        return Moments(n, mean, covariance)

    def to_state(self) -> list[dict[str, Tensor]]:
        return [s.to_tensors() for s in self.states]

    def load_state(self, stored: list[Mapping[str, Any]]) -> None:
        for state, tensors in zip(self.states, stored, strict=True):
            state.load_tensors(dict(tensors))
