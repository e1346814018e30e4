"""ShaSpec: shared and specific features of every modality; an absent one is replaced by the mean shared feature.

Source: Wang et al., CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc_fast.nn.fusion import ConcatFusion

from ..training import TrainConfig
from .base import Method
from .baseline import BaselineModel, Batch, fit_baseline


class ShaSpec(BaselineModel):
    """``f_i = W [s_i; p_i] + s_i`` with the shared encoder ``s`` (one for all) and specific encoders ``p_i``.

    Loss: CE + ``alignment`` · mean |s_i - s_j| over pairs that are both there + ``domain`` · CE(modality of p_i).
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        num_classes: int,
        config: TrainConfig,
        alignment: float = 0.1,
        domain: float = 0.02,
    ) -> None:
        super().__init__(dims, num_classes, config)
        self.alignment, self.domain = alignment, domain
        width, m = config.encoder_dim, len(dims)
        self.enter = nn.ModuleList(nn.Linear(w, width) for w in self.widths)
        self.share = nn.Sequential(nn.ReLU(), nn.Linear(width, width))
        self.specific = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(width, width)) for _ in dims)
        self.project = nn.Linear(2 * width, width)
        self.name_modality = nn.Linear(width, m)
        self.layers = ConcatFusion([width] * m, num_classes, config.fusion_hidden)

    def parts(self, encoded: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Shared and specific features, each ``[m, b, width]``."""
        entered = [enter(z) for enter, z in zip(self.enter, encoded, strict=True)]
        shared = torch.stack([self.share(e) for e in entered])
        specific = torch.stack([p(e) for p, e in zip(self.specific, entered, strict=True)])
        return shared, specific

    def mixed(self, shared: Tensor, specific: Tensor, filled: Tensor) -> Tensor:
        """Logits; an absent modality takes the mean shared feature of the others."""
        here = filled.t().unsqueeze(-1)
        own = self.project(torch.cat([shared, specific], -1)) + shared
        mean = torch.where(here, shared, 0.0).sum(0) / here.sum(0).clamp(min=1)
        return self.layers(list(torch.where(here, own, mean)))

    def fuse(self, encoded: Sequence[Tensor], filled: Tensor) -> Tensor:
        return self.mixed(*self.parts(encoded), filled)

    def loss(self, batch: Batch) -> Tensor:
        encoded, filled, extra = self.filled(batch.features, batch.present)
        shared, specific = self.parts(encoded)
        task = self.task.loss(self.mixed(shared, specific, filled), batch.labels, "mean")
        here = filled.t()
        names = torch.arange(len(encoded))[:, None].expand_as(here)[here]
        domain = F.cross_entropy(self.name_modality(specific[here]), names)
        return task + extra + self.alignment * shared_distance(shared, filled) + self.domain * domain


def shared_distance(shared: Tensor, filled: Tensor) -> Tensor:
    """Mean |s_i - s_j| over pairs of modalities that are both filled; ``shared [m, b, w]``, ``filled [b, m]``."""
    total, pairs = shared.new_zeros(()), 0
    for i in range(len(shared)):
        for j in range(i):
            both = filled[:, i] & filled[:, j]
            total = total + (shared[i, both] - shared[j, both]).abs().mean(-1).sum()
            pairs += int(both.sum())
    return total / max(1, pairs)


SHASPEC = Method(
    "shaspec",
    "ShaSpec",
    "Wang et al., CVPR 2023",
    fit_baseline(ShaSpec),
    tuple({"modality_dropout": p, "options": {"alignment": a, "domain": 0.02}} for a in (0.1, 1.0) for p in (0.5, 0.3)),
    baseline=True,
)
