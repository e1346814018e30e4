"""Message passing between samples and modalities: the layer that GRAPE and MUSE are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BipartiteGraph", "SageLayer"]


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

    def forward(self, slots: list[Tensor], here: Tensor) -> Tensor:
        """Sample embeddings ``[b, width]`` from slots ``[b, width_i]`` of which those in ``here`` are edges."""
        masked = [torch.where(here[:, i, None], z, 0.0) for i, z in enumerate(slots)]
        edges = torch.stack([enter(z) for enter, z in zip(self.enter, masked, strict=True)], 1)
        samples, modalities = self.start_sample.expand(len(here), -1), self.start_modality
        for layer in self.rounds:
            samples, modalities, edges = layer(samples, modalities, edges, here)
        return samples
