"""SMIL: absent features are mixtures of learned priors; training is a meta-learning step of second order.

Source: Ma et al., AAAI 2021.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from mmc_fast.nn.fusion import ConcatFusion

from ..data import Part
from ..training import TrainConfig
from .base import Method
from .baseline import BaselineModel, Batch, fit_baseline

_FITTED_ROWS = 4096  # rows that the priors are computed on


class Smil(BaselineModel):
    """``ẑ_i = Σ_k w_k c_ik`` with K-means centres ``c_i`` of the features of modality i on complete train rows.

    The weights are the softplus of a small net on the present features, divided by their sum. In training a feature f
    becomes ``f + ε · softplus(net)``, ε normal times ``noise``. One step: θ' = θ - ``inner_lr`` ∇ CE on the rows with
    gaps, then descend CE(gaps, θ') + CE(complete, θ') + ``match`` · MSE(ẑ, z) through θ' (second order).
    """

    centres: Tensor

    def __init__(
        self,
        dims: Mapping[str, int],
        num_classes: int,
        config: TrainConfig,
        clusters: int = 10,
        inner_lr: float = 1e-3,
        match: float = 0.01,
        noise: float = 0.1,
    ) -> None:
        super().__init__(dims, num_classes, config)
        self.clusters, self.inner_lr, self.match, self.noise = clusters, inner_lr, match, noise
        total, m = sum(self.widths), len(dims)
        self.weigh = nn.ModuleList(nn.Linear(total + m, clusters) for _ in dims)
        self.regularise = nn.Linear(total, total)
        self.layers = ConcatFusion(self.widths, num_classes, config.fusion_hidden)
        self.register_buffer("centres", torch.zeros(clusters, total))

    @torch.no_grad()
    def begin_epoch(self, train: Part) -> None:
        """K-means of the features as they are now; of all rows that have the modality where no row is complete."""
        complete = train.present.all(1)
        found = []
        for i, encoder in enumerate(self.encoders):
            rows = complete if int(complete.sum()) >= self.clusters else train.present[:, i]
            z = encoder(train.features[i][rows.nonzero().flatten()[:_FITTED_ROWS]])
            k = min(self.clusters, len(z))
            centres = KMeans(k, n_init=1, random_state=0).fit(z.double().numpy()).cluster_centers_
            found.append(torch.as_tensor(centres, dtype=z.dtype)[torch.arange(self.clusters) % k])
        self.centres.copy_(torch.cat(found, 1))

    def impute(self, encoded: Sequence[Tensor], filled: Tensor) -> list[Tensor]:
        """The mixture of priors for every modality, whether it is there or not."""
        known = [torch.where(filled[:, i, None], z, 0.0) for i, z in enumerate(encoded)]
        seen = torch.cat([*known, filled.to(known[0].dtype)], -1)
        result = []
        for weigh, centres in zip(self.weigh, self.centres.split(self.widths, 1), strict=True):
            weights = F.softplus(weigh(seen))
            result.append(weights / weights.sum(-1, keepdim=True) @ centres)
        return result

    def forward(  # type: ignore[override]
        self, features: Sequence[Tensor], present: Tensor, natural: Tensor | None = None, epsilon: Tensor | None = None
    ) -> Any:
        """Logits; with ``natural`` logits with gaps and without, MSE of what was filled in, and the heads' loss."""
        encoded, filled, extra = self.filled(features, present)
        guesses = self.impute(encoded, filled)
        logits = self._classify(encoded, guesses, filled, epsilon)
        if natural is None:
            return logits
        clean, known, _ = self.filled(features, natural)
        complete = self.fuse(clean, known, epsilon)
        hidden = known & ~filled
        error = sum(
            ((guess - z.detach()).square().mean(-1) * hidden[:, i]).sum()
            for i, (guess, z) in enumerate(zip(guesses, clean, strict=True))
        )
        return logits, complete, error / hidden.sum().clamp(min=1), extra

    def fuse(self, encoded: Sequence[Tensor], filled: Tensor, epsilon: Tensor | None = None) -> Tensor:
        return self._classify(encoded, self.impute(encoded, filled), filled, epsilon)

    def _classify(
        self, encoded: Sequence[Tensor], guesses: Sequence[Tensor], filled: Tensor, epsilon: Tensor | None
    ) -> Tensor:
        pairs = zip(encoded, guesses, strict=True)
        fused = torch.cat([torch.where(filled[:, i, None], z, guess) for i, (z, guess) in enumerate(pairs)], -1)
        if epsilon is not None:
            fused = fused + epsilon * F.softplus(self.regularise(fused))
        return self.layers(fused.split(self.widths, -1))

    def loss(self, batch: Batch) -> Tensor:
        epsilon = self.noise * torch.randn(len(batch.labels), sum(self.widths), generator=batch.random)
        fast = self.inner_step(batch, epsilon)
        gaps, complete, error, extra = torch.func.functional_call(
            self, fast, (batch.features, batch.present, batch.natural, epsilon)
        )
        task = self.task.loss(gaps, batch.labels, "mean") + self.task.loss(complete, batch.labels, "mean")
        return task + self.match * error + extra

    def inner_step(self, batch: Batch, epsilon: Tensor | None = None) -> dict[str, Tensor]:
        """θ' of encoders and fusion after one SGD step on the rows with gaps; still a function of θ."""
        own: dict[str, Tensor] = {
            name: p for name, p in self.named_parameters() if name.startswith(("encoders.", "layers."))
        }
        rows = (~batch.present.all(1)).nonzero().flatten()
        if len(rows) == 0:
            return own
        noise = None if epsilon is None else epsilon[rows]
        logits = self([x[rows] for x in batch.features], batch.present[rows], None, noise)
        loss = self.task.loss(logits, batch.labels[rows], "mean")
        slopes = torch.autograd.grad(loss, list(own.values()), create_graph=True)
        return {name: p - self.inner_lr * g for (name, p), g in zip(own.items(), slopes, strict=True)}


SMIL = Method(
    "smil",
    "SMIL",
    "Ma et al., AAAI 2021",
    fit_baseline(Smil),
    tuple(
        {"modality_dropout": p, "options": {"inner_lr": lr, "clusters": 10, "match": 0.01, "noise": 0.1}}
        for lr in (1e-3, 1e-2)
        for p in (0.5, 0.3)
    ),
    baseline=True,
)
