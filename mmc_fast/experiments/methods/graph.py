"""Message passing between samples and modalities, and the two methods made of it: GRAPE and MUSE.

Sources: You et al., NeurIPS 2020; Wu et al., ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training import TrainConfig
from ..training.distillation import info_nce
from ..training.masks import training_masks
from .base import Method
from .baseline import BaselineModel, Batch, fit_baseline


class SageLayer(nn.Module):
    """One round on the bipartite graph of b samples and m modalities, whose edges carry features of their own.

    Message over edge (n, i): ``relu(P [sender; edge])``; a node takes the mean over its edges,
    ``h' = relu(Q [h; mean])``; then ``edge' = relu(W [edge; sample'; modality'])``. An absent edge sends nothing and
    stays zero. Source: You et al., NeurIPS 2020, equations 1 to 3.
    """

    def __init__(self, nodes: int, edges: int, width: int) -> None:
        super().__init__()
        self.to_sample = nn.Linear(nodes + edges, width)
        self.to_modality = nn.Linear(nodes + edges, width)
        self.sample = nn.Linear(nodes + width, width)
        self.modality = nn.Linear(nodes + width, width)
        self.edge = nn.Linear(edges + 2 * width, width)

    def forward(
        self, samples: Tensor, modalities: Tensor, edges: Tensor, here: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``samples [b, n]``, ``modalities [m, n]``, ``edges [b, m, e]``, ``here`` bool ``[b, m]`` to the next ones."""
        b, m, _ = edges.shape
        mask = here.unsqueeze(-1)
        edges = torch.where(mask, edges, 0.0)
        senders = modalities.expand(b, m, -1)
        inbox = torch.where(mask, torch.relu(self.to_sample(torch.cat([senders, edges], -1))), 0.0)
        taken = inbox.sum(1) / here.sum(1, keepdim=True).clamp(min=1)
        senders = samples.unsqueeze(1).expand(b, m, -1)
        outbox = torch.where(mask, torch.relu(self.to_modality(torch.cat([senders, edges], -1))), 0.0)
        given = outbox.sum(0) / here.sum(0).unsqueeze(-1).clamp(min=1)
        samples = torch.relu(self.sample(torch.cat([samples, taken], -1)))
        modalities = torch.relu(self.modality(torch.cat([modalities, given], -1)))
        ends = [samples.unsqueeze(1).expand(b, m, -1), modalities.expand(b, m, -1)]
        edges = torch.where(mask, torch.relu(self.edge(torch.cat([edges, *ends], -1))), 0.0)
        return samples, modalities, edges


class BipartiteGraph(nn.Module):
    """Layers on a graph whose sample nodes start equal and whose modality nodes start at learned vectors."""

    def __init__(self, widths: list[int], width: int, layers: int) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Linear(w, width) for w in widths)
        self.start_sample = nn.Parameter(torch.ones(width))
        self.start_modality = nn.Parameter(torch.randn(len(widths), width))
        self.rounds = nn.ModuleList(SageLayer(width, width, width) for _ in range(layers))

    def forward(self, encoded: Sequence[Tensor], here: Tensor) -> Tensor:
        """Sample embeddings ``[b, width]`` from features ``[b, width_i]`` of which those in ``here`` are edges."""
        masked = [torch.where(here[:, i, None], z, 0.0) for i, z in enumerate(encoded)]
        edges = torch.stack([enter(z) for enter, z in zip(self.enter, masked, strict=True)], 1)
        samples, modalities = self.start_sample.expand(len(here), -1), self.start_modality
        for layer in self.rounds:
            samples, modalities, edges = layer(samples, modalities, edges, here)
        return samples


class Grape(BaselineModel):
    """GraphSAGE with edge updates, edges hidden at random in training, a classifier on the sample node.

    A modality node gathers from the whole batch, so a prediction depends on the rows that it is made with.
    """

    batch_dependent = True

    def __init__(self, dims: Mapping[str, int], num_classes: int, config: TrainConfig, layers: int = 3) -> None:
        super().__init__(dims, num_classes, config)
        width = config.fusion_hidden[0]
        self.graph = BipartiteGraph(self.widths, width, layers)
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))

    def fuse(self, encoded: Sequence[Tensor], filled: Tensor) -> Tensor:
        return self.classifier(self.graph(encoded, filled))


GRAPE = Method(
    "grape",
    "GRAPE",
    "You et al., NeurIPS 2020",
    fit_baseline(Grape),
    tuple({"modality_dropout": p, "options": {"layers": n}} for n in (3, 2) for p in (0.3, 0.5)),
    batch_dependent=True,
    baseline=True,
)


class Muse(BaselineModel):
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

    def fuse(self, encoded: Sequence[Tensor], filled: Tensor) -> Tensor:
        return self.classifier(self.graph(encoded, filled))

    def loss(self, batch: Batch) -> Tensor:
        encoded, filled, extra = self.filled(batch.features, batch.present)
        first = self.graph(encoded, filled)
        second = self.graph(encoded, training_masks(filled, self.edge_dropout, batch.random))
        a, b = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
        labels = batch.labels
        return (
            self.task.loss(self.classifier(first), labels, "mean")
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


MUSE = Method(
    "muse",
    "MUSE",
    "Wu et al., ICLR 2024",
    fit_baseline(Muse),
    tuple(
        {"modality_dropout": p, "options": {"agreement": w, "classes": w, "edge_dropout": 0.3}}
        for w in (0.5, 0.1)
        for p in (0.5, 0.0)
    ),
    batch_dependent=True,
    baseline=True,
    classes_only=True,
)
