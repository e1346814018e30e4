"""CM-AE: one code for all modalities that every modality is rebuilt from, also where it was hidden.

Source: Ngiam et al., ICML 2011.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmc_fast.nn.encoders import MLPEncoder

from ..training import TrainConfig
from .base import Method
from .baseline import BaselineModel, Batch, fit_baseline


class CrossModalAutoencoder(BaselineModel):
    """Encoders -> one code; a decoder per modality, a classifier on the code.

    Loss: CE + ``rebuild`` · mean squared error of every modality that is in the data, hidden from the encoder or not.
    """

    def __init__(self, dims: Mapping[str, int], num_classes: int, config: TrainConfig, rebuild: float = 1.0) -> None:
        super().__init__(dims, num_classes, config)
        self.rebuild = rebuild
        code = config.fusion_hidden[0]
        self.to_code = nn.Sequential(nn.ReLU(), nn.Linear(sum(self.widths), code), nn.ReLU())
        self.decoders = nn.ModuleList(MLPEncoder(code, config.encoder_width, d) for d in dims.values())
        self.classifier = nn.Linear(code, num_classes)

    def fuse(self, encoded: Sequence[Tensor], filled: Tensor) -> Tensor:
        return self.classifier(self.code(encoded, filled))

    def code(self, encoded: Sequence[Tensor], filled: Tensor) -> Tensor:
        """The shared code ``[b, code]``; an absent modality enters as zeros."""
        return self.to_code(torch.cat([torch.where(filled[:, i, None], z, 0.0) for i, z in enumerate(encoded)], -1))

    def loss(self, batch: Batch) -> Tensor:
        encoded, filled, extra = self.filled(batch.features, batch.present)
        code = self.code(encoded, filled)
        error = code.new_zeros(())
        for i, (decoder, x) in enumerate(zip(self.decoders, batch.features, strict=True)):
            rows = batch.natural[:, i]
            error = error + (decoder(code[rows]) - x[rows]).square().mean(-1).sum()
        error = error / batch.natural.sum().clamp(min=1)
        return self.task.loss(self.classifier(code), batch.labels, "mean") + self.rebuild * error + extra


CM_AE = Method(
    "cm-ae",
    "CM-AE",
    "Ngiam et al., ICML 2011",
    fit_baseline(CrossModalAutoencoder),
    tuple({"modality_dropout": p, "options": {"rebuild": w}} for w in (1.0, 0.1) for p in (0.5, 0.3)),
    baseline=True,
)
