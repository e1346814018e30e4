"""The weights of a product of experts, fitted on masked validation rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmc_fast._util.seeds import generator

from ..data import Part, mcar
from .evaluate import predict
from .model import MultimodalModel

PENALTY = 1e-3
_DRAWS = 4  # masks of every rate that the weights are fitted on


def masked_rows(part: Part, rates: Sequence[float], seed: int) -> Part:
    """The rows as they are, and at every missing rate, each four times; rows with nothing present are left out."""
    masks = [part.present] * _DRAWS
    for rate in rates:
        draw = generator(seed, "product", repr(float(rate)))
        masks += [mcar(part.present, rate, draw).present for _ in range(_DRAWS)]
    present = torch.cat(masks)
    rows = torch.arange(len(part)).repeat(len(masks))[present.any(1)]
    some = part.select(rows)
    return Part(some.features, present[present.any(1)], some.labels, some.index)


def fit_experts(model: MultimodalModel, validation: Part, rates: Sequence[float], seed: int) -> None:
    """Fit the weights of the model's product; from then on the model answers with it in evaluation."""
    experts = model.experts
    if experts is None:
        raise RuntimeError("this model has no experts; set TrainConfig.experts")
    rows, device = masked_rows(validation, rates, seed), model.prior.device
    fused = model.task.inverse(predict(model, rows.features, rows.present).double()).to(device)
    with torch.no_grad():
        present = rows.present.to(device)
        votes = experts.votes([x.to(device) for x in rows.features], present)
    experts.product.log_prior.copy_(model.task.pooled(model.prior.double()))
    experts.product.fit(votes, fused, present, rows.labels.to(device), PENALTY)
    experts.product.requires_grad_(False)
    experts.fitted.fill_(True)
