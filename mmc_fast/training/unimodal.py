"""One small model per modality: how strong it is alone, teachers for distillation, the reference of the ranking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import MultimodalDataset, Part
from .config import TrainConfig
from .masks import epoch_order
from .metrics import score
from .model import build_encoder
from .optim import build_optimizer, set_learning_rate
from .parts import to_device
from .seeds import generator, seeded_init

__all__ = ["UnimodalModel", "UnimodalModels", "train_unimodal"]


class UnimodalModel(nn.Module):
    """Encoder of one modality and a one-hidden-layer classifier on it: ``[B, d] -> [B, C]``."""

    def __init__(self, dim: int, num_classes: int, config: TrainConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(dim, config)
        width = config.fusion_hidden[0] if config.fusion_hidden else config.encoder_width
        self.classifier = nn.Sequential(
            nn.Linear(self.encoder.out_dim, width), nn.ReLU(), nn.Linear(width, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x))


@dataclass
class UnimodalModels:
    """Trained unimodal models with their validation scores; share one between methods of the same data and seed.

    ``key`` records what they depend on, so that a run refuses models of other data, seed or settings.
    """

    models: dict[str, UnimodalModel]
    scores: dict[str, float]
    key: dict[str, Any]

    @property
    def strongest(self) -> str:
        """The modality with the best validation score (the first of equals)."""
        return self.weakest_first()[-1]

    def weakest_first(self) -> list[str]:
        """Modalities by rising validation score; of equals the one that comes first in the data set is the stronger."""
        return sorted(self.scores, key=lambda name: self.scores[name], reverse=True)[::-1]

    @torch.no_grad()
    def predict(self, name: str, x: Tensor) -> Tensor:
        """Class probabilities ``[N, C]`` of one modality's model, on the CPU."""
        model = self.models[name]
        return torch.softmax(model(x.to(next(model.parameters()).device)), -1).cpu()


def unimodal_key(dataset: MultimodalDataset, config: TrainConfig, seed: int, fingerprint: str) -> dict[str, Any]:
    """What unimodal models depend on."""
    names: tuple[str, ...] = ("batch_size", "optimizer", "lr", "weight_decay", "momentum", "lr_decay", "lr_decay_every")
    names += ("encoder", "encoder_width", "encoder_dim", "fusion_hidden", "unimodal_epochs")
    settings = {name: getattr(config, name) for name in names}
    settings["fusion_hidden"] = list(config.fusion_hidden)
    return {"data": dataset.name, "fingerprint": fingerprint, "seed": seed, "settings": settings}


def train_unimodal(
    dataset: MultimodalDataset,
    config: TrainConfig,
    *,
    seed: int,
    fingerprint: str,
    device: str | torch.device = "cpu",
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> UnimodalModels:
    """Train one model per modality on the train rows that have it; keep each one's best validation epoch.

    All are trained side by side under the sum of their losses. Their parameters are disjoint, so this is the same as
    training each alone, with one optimiser step in place of m.
    """
    with seeded_init(seed, "unimodal", "init"):
        models = nn.ModuleList(UnimodalModel(d, dataset.num_classes, config) for d in dataset.dims.values()).to(device)
    train, held_out = (to_device(dataset.part(name), device) for name in ("train", "validation"))
    optimizer = build_optimizer({"all": list(models.parameters())}, config)
    order_of = generator(seed, "unimodal", "order")
    best_score = [-1.0] * len(models)
    best_state = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    complete = bool(train.present.all())
    for epoch in range(config.unimodal_epochs):
        set_learning_rate(optimizer, config, epoch)
        _train_epoch(
            models, optimizer, train, epoch_order(len(train), order_of).to(device), config.batch_size, complete
        )
        for i, model in enumerate(models):
            value = _validation_score(model, held_out, i, dataset.metric)
            if value > best_score[i]:
                best_score[i] = value
                best_state[i] = {k: v.clone() for k, v in model.state_dict().items()}
        if on_epoch is not None:
            names = dataset.modalities
            scores = dict(zip(names, best_score, strict=True))
            on_epoch({"stage": "unimodal", "epoch": epoch + 1, "val_score": max(best_score), "scores": scores})
    for model, state in zip(models, best_state, strict=True):
        model.load_state_dict(state)
        model.eval().requires_grad_(False)
    named = dict(zip(dataset.modalities, models, strict=True))
    return UnimodalModels(
        named,  # type: ignore[arg-type]
        dict(zip(dataset.modalities, best_score, strict=True)),
        unimodal_key(dataset, config, seed, fingerprint),
    )


def _train_epoch(models: nn.ModuleList, optimizer: Any, train: Part, order: Tensor, batch: int, complete: bool) -> None:
    features = [x[order].split(batch) for x in train.features]
    labels, present = train.labels[order].split(batch), train.present[order].split(batch)
    for step in range(len(labels)):
        losses = []
        for i, model in enumerate(models):
            x, y = features[i][step], labels[step]
            if not complete:
                here = present[step][:, i]
                x, y = x[here], y[here]
            if len(y):
                losses.append(F.cross_entropy(model(x), y))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()


@torch.no_grad()
def _validation_score(model: nn.Module, part: Part, column: int, metric: str) -> float:
    """Score on the validation rows that have the modality; chance level where they cannot be scored."""
    here = part.present[:, column]
    labels = part.labels[here]
    if len(labels) == 0 or (metric == "auroc" and len(labels.unique()) < 2):
        return 0.5 if metric == "auroc" else 0.0
    return score(torch.softmax(model(part.features[column][here]), -1).cpu(), labels.cpu(), metric)
