"""MT: one transformer for every subset of the modalities, trained on all of them at once.

Source: Ma et al., "Are multimodal transformers robust to missing modality?", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmc_fast.nn.fusion import TransformerFusion

from ..training import TrainConfig
from .base import Method
from .baseline import BaselineModel, Batch, fit_baseline

_ALL_UP_TO = 5  # modalities for which every subset is a task; beyond, as many are drawn for each step
_DRAWN = 8


class SubsetTransformer(BaselineModel):
    """Tokens of the modalities and a class token; attention masked to the subset that is there.

    Up to layer ``fusion_layer`` a token attends only to itself, from there on to all of its subset (in the source this
    layer is searched; here it is in the declared search). Loss: mean CE over the subsets of each row.
    """

    def __init__(self, dims: Mapping[str, int], num_classes: int, config: TrainConfig, fusion_layer: int = 0) -> None:
        super().__init__(dims, num_classes, config)
        self.fusion_layer = fusion_layer
        depth = config.fusion_depth + fusion_layer
        self.transformer = TransformerFusion(self.widths, num_classes, config.fusion_dim, config.fusion_heads, depth)

    def fuse(self, encoded: Sequence[Tensor], filled: Tensor) -> Tensor:
        """Logits from the modalities in ``filled`` ``[b, m]``."""
        t, batch = self.transformer, len(filled)
        masked = [torch.where(filled[:, i, None], z, 0.0) for i, z in enumerate(encoded)]
        tokens = torch.stack([p(z) for p, z in zip(t.projections, masked, strict=True)], 1) + t.modality
        tokens = torch.cat([t.class_token.expand(batch, 1, -1), tokens], 1)
        seen = F.pad(filled, (1, 0), value=True)[:, None, None, :]
        alone = torch.eye(tokens.shape[1], dtype=torch.bool)[None, None]
        for n, block in enumerate(t.blocks):
            tokens = block(tokens, alone if n < self.fusion_layer else seen)
        return t.classifier(t.norm(tokens[:, 0]))

    def loss(self, batch: Batch) -> Tensor:
        encoded, filled, extra = self.filled(batch.features, batch.natural)
        tasks = subsets(filled.shape[1], batch.random)
        here = (tasks[:, None] & filled).flatten(0, 1)  # [S * b, m]
        rows = here.any(1)
        labels = batch.labels.repeat(len(tasks), *[1] * (batch.labels.dim() - 1))[rows]
        repeated = [z.repeat(len(tasks), 1)[rows] for z in encoded]
        return self.task.loss(self.fuse(repeated, here[rows]), labels, "mean") + extra


def subsets(m: int, random: torch.Generator) -> Tensor:
    """Non-empty subsets of m modalities, bool ``[S, m]``: all of them for m up to 5, else the full one and 7 drawn."""
    if m <= _ALL_UP_TO:
        return (torch.arange(1, 2**m)[:, None] >> torch.arange(m)) % 2 == 1
    drawn = torch.rand(_DRAWN, m, generator=random) < 0.5
    drawn[torch.arange(_DRAWN), torch.randint(m, (_DRAWN,), generator=random)] = True
    drawn[0] = True
    return drawn


MT = Method(
    "mt",
    "MT",
    "Ma et al., CVPR 2022",
    fit_baseline(SubsetTransformer),
    tuple({"lr": lr, "options": {"fusion_layer": n}} for lr in (1e-3, 3e-4) for n in (0, 1)),
    baseline=True,
)
