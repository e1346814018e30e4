"""GRAPE: samples and modalities as the two sides of a graph, missing values as absent edges.

Source: You et al., NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..data import MultimodalDataset
from ..training import TrainConfig
from .base import Method
from .graph import BipartiteGraph
from .peer import Batch, PeerModel, fit_peer

__all__ = ["GRAPE", "Grape"]


class Grape(PeerModel):
    """GraphSAGE with edge updates, edges hidden at random in training, a classifier on the sample node.

    A modality node gathers from the whole batch, so a prediction depends on the rows that it is made with.
    """

    batch_dependent = True

    def __init__(self, dims: Mapping[str, int], num_classes: int, config: TrainConfig, layers: int = 3) -> None:
        super().__init__(dims, num_classes, config)
        width = config.fusion_hidden[0]
        self.graph = BipartiteGraph(self.widths, width, layers)
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, features: Sequence[Tensor], present: Tensor) -> Tensor:  # type: ignore[override]
        slots, filled, _ = self.slots(features, present)
        return self.classifier(self.graph(slots, filled))

    def loss(self, batch: Batch) -> Tensor:
        slots, filled, extra = self.slots(batch.features, batch.present)
        return F.cross_entropy(self.classifier(self.graph(slots, filled)), batch.labels) + extra


def _build(config: TrainConfig, dataset: MultimodalDataset, options: Mapping[str, Any]) -> Grape:
    return Grape(dataset.dims, dataset.num_classes, config, **options)


GRAPE = Method(
    "grape",
    "GRAPE",
    "You et al., NeurIPS 2020",
    fit_peer(_build),
    tuple({"modality_dropout": p, "options": {"layers": n}} for n in (3, 2) for p in (0.3, 0.5)),
    batch_dependent=True,
    peer=True,
)
