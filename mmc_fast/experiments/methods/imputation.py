"""Zeros and mean: vanilla models whose absent modalities are filled with constants before the fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmc_fast.nn.fusion import ConcatFusion

from ..data import Part
from ..training import TrainConfig
from .base import Method
from .baseline import BaselineModel, Batch, fit_baseline
from .standard import LEARNING_RATES


class ImputedConcat(BaselineModel):
    """Concatenation that sees no mask: an absent modality is what the encoder makes of zeros, or its mean feature.

    "zeros": the input is replaced by zeros (the train mean of standardised columns) and encoded. "mean": the feature is
    replaced by the mean feature of the train rows that have the modality, recomputed after every epoch.
    """

    mean: Tensor

    def __init__(self, dims: Mapping[str, int], num_classes: int, config: TrainConfig, fill: str) -> None:
        super().__init__(dims, num_classes, config)
        self.fill = fill
        self.layers = ConcatFusion(self.widths, num_classes, config.fusion_hidden)
        self.register_buffer("mean", torch.zeros(sum(self.widths)))

    def forward(self, features: Sequence[Tensor], present: Tensor) -> Tensor:  # type: ignore[override]
        if self.fill == "mean":
            return super().forward(features, present)
        return self.layers(self.encode([torch.where(present[:, i, None], x, 0.0) for i, x in enumerate(features)]))

    def fuse(self, encoded: Sequence[Tensor], filled: Tensor) -> Tensor:
        means = self.mean.split(self.widths)
        return self.layers([torch.where(filled[:, i, None], z, means[i]) for i, z in enumerate(encoded)])

    def loss(self, batch: Batch) -> Tensor:
        return self.task.loss(self(batch.features, batch.present), batch.labels, "mean")

    @torch.no_grad()
    def end_epoch(self, train: Part) -> None:
        found = []
        for i, encoder in enumerate(self.encoders):
            found.append(encoder(train.features[i][train.present[:, i]]).mean(0))
        self.mean.copy_(torch.cat(found))


def _method(fill: str, title: str) -> Method:
    return Method(fill, title, "substitution by a constant", fit_baseline(ImputedConcat, fill=fill), LEARNING_RATES)


ZEROS = _method("zeros", "zeros")
MEAN = _method("mean", "mean feature")
