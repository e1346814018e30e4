"""MUSE: a graph of patients and modalities, whose embedding survives dropped edges and agrees within a class.

Source: Wu et al., ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import MultimodalDataset
from ..training import TrainConfig
from ..training.distillation import info_nce
from ..training.masks import training_masks
from .base import Method
from .graph import BipartiteGraph
from .peer import Batch, PeerModel, fit_peer

__all__ = ["MUSE", "Muse", "supervised_contrastive"]


class Muse(PeerModel):
    """Two rounds of message passing with edge updates, a linear classifier on the sample node.

    Loss: CE + ``agreement`` · InfoNCE to a view with dropped edges + ``classes`` · supervised contrast, T = 0.07. A
    modality node gathers from the whole batch, so a prediction depends on the rows that it is made with.
    """

    batch_dependent = True

    def __init__(
        self,
        dims: Mapping[str, int],
        num_classes: int,
        config: TrainConfig,
        agreement: float = 0.5,
        classes: float = 0.5,
        edge_dropout: float = 0.3,
    ) -> None:
        super().__init__(dims, num_classes, config)
        self.agreement, self.classes, self.edge_dropout = agreement, classes, edge_dropout
        self.graph = BipartiteGraph(self.widths, config.fusion_hidden[0], layers=2)
        self.classifier = nn.Linear(config.fusion_hidden[0], num_classes)

    def forward(self, features: Sequence[Tensor], present: Tensor) -> Tensor:  # type: ignore[override]
        slots, filled, _ = self.slots(features, present)
        return self.classifier(self.graph(slots, filled))

    def loss(self, batch: Batch) -> Tensor:
        slots, filled, extra = self.slots(batch.features, batch.present)
        first = self.graph(slots, filled)
        second = self.graph(slots, training_masks(filled, self.edge_dropout, batch.random))
        a, b = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
        labels = batch.labels
        return (
            F.cross_entropy(self.classifier(first), labels)
            + extra
            + self.agreement * info_nce(a, b, 0.07)
            + self.classes * supervised_contrastive(torch.cat([a, b]), torch.cat([labels, labels]), 0.07)
        )


def supervised_contrastive(unit: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over anchors of ``-mean_{p of the same class} log softmax(unit unitᵀ / T)``, the anchor itself left out.

    ``unit [n, e]``; anchors that are alone in their class do not count. Source: Khosla et al., NeurIPS 2020.
    """
    own = torch.eye(len(unit), dtype=torch.bool)
    logits = (unit @ unit.t() / temperature).masked_fill(own, float("-inf"))
    shares = logits.log_softmax(-1).masked_fill(own, 0.0)
    alike = (labels[:, None] == labels) & ~own
    count = alike.sum(1)
    anchors = count > 0
    found = (shares * alike).sum(1)[anchors] / count[anchors]
    return -found.mean() if len(found) else unit.new_zeros(())


def _build(config: TrainConfig, dataset: MultimodalDataset, options: Mapping[str, Any]) -> Muse:
    return Muse(dataset.dims, dataset.num_classes, config, **options)


MUSE = Method(
    "muse",
    "MUSE",
    "Wu et al., ICLR 2024",
    fit_peer(_build),
    tuple(
        {"modality_dropout": p, "options": {"agreement": w, "classes": w, "edge_dropout": 0.3}}
        for w in (0.5, 0.1)
        for p in (0.5, 0.0)
    ),
    batch_dependent=True,
    peer=True,
)
