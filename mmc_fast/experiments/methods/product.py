"""Independent unimodal models with fitted late fusion: a product of experts without a fused model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmc_fast.errors import InputError

from ..training.expert_weights import masked_rows
from ..training.experts import ExpertProduct
from ..training.progress import Silent
from .base import Fitted, Method, Task, prior, unimodal_models, with_val_score


def fit_product(task: Task) -> Fitted:
    """Train one model per modality, then fit the weights of their product on masked validation rows."""
    dataset, config = task.dataset, task.config
    if unknown_options := task.options.keys() - {"penalty"}:
        raise InputError(f"product has the option penalty alone, not {', '.join(sorted(unknown_options))}")
    (task.progress or Silent()).on_start(config.unimodal_epochs, "unimodal")
    models = unimodal_models(task)
    product = ExpertProduct(len(dataset.modalities), prior(dataset), fused=False)

    def votes(features: Sequence[Tensor], present: Tensor) -> Tensor:
        experts = torch.zeros(len(features), len(present), dataset.num_classes, dtype=torch.float64)
        for i, name in enumerate(dataset.modalities):
            here = present[:, i]
            if bool(here.any()):
                experts[i, here] = models.predict(name, features[i][here]).double().clamp(min=1e-12).log()
        return experts

    @torch.no_grad()
    def answer(features: Sequence[Tensor], present: Tensor) -> Tensor:
        return product(votes(features, present), None, present).exp().float()

    rows = masked_rows(dataset.part("validation"), config.rates, task.seed)
    product.fit(votes(rows.features, rows.present), None, rows.present, rows.labels, task.options["penalty"])
    fitted = Fitted(answer, prior(dataset), None, {"unimodal": models.scores})
    fitted.record |= {name: p.detach().exp().tolist() for name, p in product.named_parameters()}
    return with_val_score(fitted, dataset)


PRODUCT = Method(
    "product",
    "product of experts",
    "independent unimodal models, weights fitted on masked validation rows",
    fit_product,
    tuple({"lr": lr, "options": {"penalty": p}} for lr in (1e-3, 3e-4) for p in (0.001, 0.1)),
    {"unimodal_share": 1.0},
    classes_only=True,
)
