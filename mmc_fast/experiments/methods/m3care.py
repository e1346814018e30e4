"""M3Care: an absent modality is imputed from similar samples of the batch that have it.

Source: Zhang et al., KDD 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmc_fast.nn.fusion import TransformerFusion

from ..training import TrainConfig
from .base import Method
from .baseline import BaselineModel, fit_baseline


class M3Care(BaselineModel):
    """Similarity of samples -> thresholded graph -> two graph convolutions per modality -> gated mix -> transformer.

    Similarity: mean over the modalities that both samples have of ``exp(-mean (u_a - u_b)²)`` with learned projections
    u; below ``threshold`` it counts as 0. Modality i of sample a is gathered only from samples that have i and share at
    least one modality with a. A modality for which there is nobody stays absent. Depends on the batch.
    """

    batch_dependent = True

    def __init__(self, dims: Mapping[str, int], num_classes: int, config: TrainConfig, threshold: float = 0.5) -> None:
        super().__init__(dims, num_classes, config)
        self.threshold = threshold
        self.compare = nn.ModuleList(nn.Linear(w, 16) for w in self.widths)
        self.first = nn.ModuleList(nn.Linear(w, w) for w in self.widths)
        self.second = nn.ModuleList(nn.Linear(w, w) for w in self.widths)
        self.gate = nn.ModuleList(nn.Linear(2 * w, 1) for w in self.widths)
        self.transformer = TransformerFusion(
            self.widths, num_classes, config.fusion_dim, config.fusion_heads, config.fusion_depth
        )

    def nearness(self, encoded: Sequence[Tensor], here: Tensor) -> Tensor:
        """``[b, b]`` in [0, 1]; 0 between samples without a modality in common."""
        total = shared = torch.zeros(len(here), len(here))
        for i, (project, z) in enumerate(zip(self.compare, encoded, strict=True)):
            u = project(torch.where(here[:, i, None], z, 0.0))
            square = u.square().mean(-1)
            distance = (square[:, None] + square - 2 * u @ u.t() / u.shape[1]).clamp(min=0)
            both = (here[:, i, None] & here[:, i]).to(u.dtype)
            total = total + both * torch.exp(-distance)
            shared = shared + both
        return total / shared.clamp(min=1)

    def gather(self, encoded: Sequence[Tensor], here: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the neighbours say about every modality, and bool ``[b, m]``: whether there is one."""
        near = self.nearness(encoded, here)
        near = torch.where(near >= self.threshold, near, 0.0)
        near = near * (1 - torch.eye(len(here)))  # its own value comes in through the gate
        result, found = [], []
        for i, (first, second, z) in enumerate(zip(self.first, self.second, encoded, strict=True)):
            weights = near * here[:, i].to(near.dtype)
            total = weights.sum(1, keepdim=True)
            weights = weights / total.clamp(min=1e-12)
            known = torch.where(here[:, i, None], z, 0.0)
            hidden = torch.where(here[:, i, None], torch.relu(first(known + weights @ known)), 0.0)
            result.append(second(weights @ hidden))
            found.append(total[:, 0] > 0)
        return result, torch.stack(found, 1)

    def fuse(self, encoded: Sequence[Tensor], filled: Tensor) -> Tensor:
        """Logits: own and gathered features mixed by a gate where both are there."""
        gathered, found = self.gather(encoded, filled)
        mixed = []
        for i, (gate, z, others) in enumerate(zip(self.gate, encoded, gathered, strict=True)):
            here, near = filled[:, i, None], found[:, i, None]
            own = torch.where(here, z, 0.0)
            share = torch.where(near, torch.sigmoid(gate(torch.cat([own, others], -1))), 1.0)
            mixed.append(torch.where(here, share * own + (1 - share) * others, others))
        return self.transformer(mixed, filled | found)


M3CARE = Method(
    "m3care",
    "M3Care",
    "Zhang et al., KDD 2022",
    fit_baseline(M3Care),
    tuple({"modality_dropout": p, "options": {"threshold": t}} for t in (0.5, 0.8) for p in (0.5, 0.0)),
    batch_dependent=True,
    baseline=True,
)
