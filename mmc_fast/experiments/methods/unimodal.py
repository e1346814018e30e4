"""Best unimodal: one model per modality; the strongest one that a row has answers for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..training.parts import fingerprint
from ..training.unimodal import train_unimodal
from .base import Fitted, Method, Task, class_prior
from .standard import RATES_OF_LEARNING

__all__ = ["UNIMODAL"]


def _fit(task: Task) -> Fitted:
    dataset = task.dataset
    if task.progress is not None:
        task.progress.on_start(task.config.unimodal_epochs, "unimodal")
    on_epoch = None if task.progress is None else task.progress.on_epoch
    models = train_unimodal(dataset, task.config, seed=task.seed, fingerprint=fingerprint(dataset), on_epoch=on_epoch)
    strongest_first = models.weakest_first()[::-1]

    def answer(features: Sequence[Tensor], present: Tensor) -> Tensor:
        result = torch.zeros(len(present), dataset.num_classes)
        open_rows = torch.ones(len(present), dtype=torch.bool)
        for name in strongest_first:
            column = dataset.modalities.index(name)
            rows = (open_rows & present[:, column]).nonzero().flatten()
            if len(rows):
                result[rows] = models.predict(name, features[column][rows])
                open_rows[rows] = False
        return result

    record = {"val_score": models.scores[models.strongest], "unimodal": models.scores, "strongest": models.strongest}
    return Fitted(answer, class_prior(dataset), None, record)


UNIMODAL = Method(
    "unimodal", "best unimodal", "the standard unimodal models", _fit, RATES_OF_LEARNING, {"unimodal_share": 1.0}
)
