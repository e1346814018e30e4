"""One small model per modality: how strong it is alone, teachers for distillation, the reference of the ranking."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from mmc_fast._util.documents import Count0, Finite
from mmc_fast._util.seeds import generator, seeded_init

from ..data import MultimodalDataset, Part
from ..tasks import NotFiniteError, Task
from .checkpoint import (
    Checkpoint,
    check_like,
    check_rows,
    fits_checkpoint,
    moments_like,
    optimizer_tensors,
    prefixed,
    restore_optimizer,
    stripped,
)
from .config import TrainConfig
from .encoder import build_encoder
from .interrupt import Autosave, Stage
from .masks import epoch_order
from .optim import build_optimizer, set_learning_rate
from .parts import Batches, row_pieces, task_of, to_device
from .progress import TrainingDiverged


class UnimodalMeta(TypedDict):
    """Plain values of a checkpoint."""

    epoch: Count0
    step: Count0
    best_score: list[Finite | None]


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
    task: Task

    @property
    def strongest(self) -> str:
        """The modality with the best validation score (the first of equals)."""
        return self.weakest_first()[-1]

    def weakest_first(self) -> list[str]:
        """Modalities by rising validation score; of equals the one that comes first in the data set is the stronger."""
        return sorted(self.scores, key=lambda name: self.scores[name], reverse=True)[::-1]

    @torch.no_grad()
    def predict(self, name: str, x: Tensor) -> Tensor:
        """Answers of one modality's model, on the CPU."""
        return self.task.answers(self.outputs(name, x))

    @torch.no_grad()
    def outputs(self, name: str, x: Tensor) -> Tensor:
        """Outputs ``[N, C]`` of one modality's model, on the CPU."""
        model = self.models[name]
        return model(x.to(next(model.parameters()).device)).cpu()


def unimodal_key(dataset: MultimodalDataset, config: TrainConfig, seed: int, fingerprint: str) -> dict[str, Any]:
    """What unimodal models depend on."""
    names: tuple[str, ...] = ("batch_size", "optimizer", "lr", "weight_decay", "momentum", "lr_decay", "lr_decay_every")
    names += ("encoder", "encoder_width", "encoder_dim", "fusion_hidden", "unimodal_epochs")
    names += ("encoder_norm", "encoder_dropout", "class_weights")
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
    stage: Stage | None = None,
) -> UnimodalModels:
    """Train one model per modality on the train rows that have it; keep each one's best validation epoch.

    All are trained side by side under the sum of their losses. Their parameters are disjoint, so this is the same as
    training each alone, with one optimiser step in place of m. ``stage``: how it reports and saves.

    Raises:
        TrainingDiverged: a loss or weight became NaN or infinite.
        Interrupted: the guard saw a signal; saved where the stage has a store.
    """
    stage = stage or Stage("unimodal")
    work = _SideBySide(dataset, config, seed, device)
    if stage.checkpoint is not None:
        work.restore(stage.checkpoint)
    work.fit(Autosave(stage, work.state))
    for model, state in zip(work.models, work.best_state, strict=True):
        model.load_state_dict(state)
        model.eval().requires_grad_(False)
    named = dict(zip(dataset.modalities, work.models, strict=True))
    return UnimodalModels(
        named,  # type: ignore[arg-type]
        dict(zip(dataset.modalities, work.best_score, strict=True)),
        unimodal_key(dataset, config, seed, fingerprint),
        work.task,
    )


class _SideBySide:
    """The stage and everything that its checkpoint holds."""

    def __init__(self, dataset: MultimodalDataset, config: TrainConfig, seed: int, device: str | torch.device) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.task = task_of(dataset, config)
        with seeded_init(seed, "unimodal", "init"):
            models = nn.ModuleList(UnimodalModel(d, self.task.outputs, config) for d in dataset.dims.values())
        self.models = models.to(device)
        self.train, self.held_out = (to_device(dataset.part(name), device) for name in ("train", "validation"))
        self.optimizer = build_optimizer({"all": list(self.models.parameters())}, config)
        self.order_of = generator(seed, "unimodal", "order")
        self.order: Tensor | None = None  # row order of the epoch that runs
        self.epoch = self.step = 0
        self.best_score = [-math.inf] * len(self.models)
        self.best_state = [{k: v.clone() for k, v in m.state_dict().items()} for m in self.models]
        self.complete = bool(self.train.present.all())

    def state(self) -> tuple[Checkpoint, int, int]:
        tensors = prefixed("optimizer", optimizer_tensors(self.optimizer)) | {"generator": self.order_of.get_state()}
        for i, best in enumerate(self.best_state):
            tensors |= prefixed(f"best{i}", best)
        if self.order is not None:
            tensors["order"] = self.order
        meta = {"epoch": self.epoch, "step": self.step, "best_score": [_stored(v) for v in self.best_score]}
        return Checkpoint(self.models.state_dict(), tensors, meta), self.epoch, self.step

    def restore(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors
        with fits_checkpoint("unimodal"):
            self._check_state(checkpoint)
            self.models.load_state_dict(checkpoint.weights)
            restore_optimizer(self.optimizer, stripped("optimizer", tensors))
            self.order_of.set_state(tensors["generator"])
            device = self.train.labels.device
            for i in range(len(self.models)):
                self.best_state[i] = {k: v.to(device) for k, v in stripped(f"best{i}", tensors).items()}
            self.order = tensors.get("order")
            meta = checkpoint.meta
            self.epoch, self.step = meta["epoch"], meta["step"]
            self.best_score = [-math.inf if v is None else v for v in meta["best_score"]]

    def _check_state(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError for a state that this stage cannot have."""
        tensors, meta, rows = checkpoint.tensors, checkpoint.meta, len(self.train)
        check_like(checkpoint.weights, self.models.state_dict())
        expected = prefixed("optimizer", moments_like(self.optimizer, stripped("optimizer", tensors)))
        for i, model in enumerate(self.models):
            expected |= prefixed(f"best{i}", model.state_dict())
        expected |= {"generator": self.order_of.get_state(), "order": torch.zeros(rows, dtype=torch.int64)}
        check_like(tensors, expected, optional=("order",))
        check_rows(tensors.get("order"), rows)
        steps = -(-rows // self.config.batch_size) if "order" in tensors else 0
        if (
            meta["step"] > steps
            or meta["epoch"] > self.config.unimodal_epochs
            or len(meta["best_score"]) != len(self.models)
        ):
            raise ValueError(f"it stands at step {meta['step']} after epoch {meta['epoch']}")

    def fit(self, autosave: Autosave) -> None:
        names = self.dataset.modalities
        while self.epoch < self.config.unimodal_epochs:
            set_learning_rate(self.optimizer, self.config, self.epoch)
            if self.order is None:
                self.order = epoch_order(len(self.train), self.order_of)
            self._train_epoch(self.order.to(self.train.labels.device), autosave)
            self.order, self.step, self.epoch = None, 0, self.epoch + 1
            for i, model in enumerate(self.models):
                self._check_weights(model, names[i])
                try:
                    value = _validation_score(model, self.held_out, i, self.task)
                except NotFiniteError as error:
                    raise TrainingDiverged(
                        f"the unimodal model of {names[i]} in epoch {self.epoch}: {error}; or lower the learning rate"
                    ) from error
                if value > self.best_score[i]:
                    self.best_score[i] = value
                    self.best_state[i] = {k: v.clone() for k, v in model.state_dict().items()}
            scores = dict(zip(names, self.best_score, strict=True))
            record = {"stage": "unimodal", "epoch": self.epoch, "val_score": max(self.best_score)}
            autosave.stage.on_epoch(record | {"scores": scores})
            autosave.after_epoch()

    def _train_epoch(self, order: Tensor, autosave: Autosave) -> None:
        batches = Batches(self.train, order, self.config.batch_size)
        self.models.train()
        while self.step < len(batches):
            with seeded_init(self.seed, "unimodal", "dropout", self.epoch, self.step):
                self._take_step(*batches[self.step])
            self.step += 1
            if self.step < len(batches):
                autosave.after_step()
        self.models.eval()

    def _take_step(self, rows: Tensor, features: list[Tensor], labels: Tensor) -> None:
        losses = []
        for i, model in enumerate(self.models):
            x, y = features[i], labels
            if not self.complete:
                here = self.train.present[rows][:, i]
                x, y = x[here], y[here]
            if len(y):
                loss = self.task.loss(model(x), y, "mean")
                if self._usable(loss, i):
                    losses.append(loss)
        self.optimizer.zero_grad(set_to_none=True)
        if losses:
            torch.stack(losses).sum().backward()
            self.optimizer.step()

    def _usable(self, loss: Tensor, i: int) -> bool:
        if loss.device.type != "cpu" or bool(torch.isfinite(loss)):  # elsewhere looking costs a synchronisation
            return True
        if self.config.nonfinite == "skip":
            return False
        raise TrainingDiverged(
            f"the loss of the unimodal model of {self.dataset.modalities[i]} became {float(loss.detach())} in epoch "
            f"{self.epoch + 1}, step {self.step + 1}; rescale its features or lower the learning rate"
        )

    def _check_weights(self, model: nn.Module, name: str) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise TrainingDiverged(
                f"the weights of the unimodal model of {name} became infinite or NaN in epoch {self.epoch}; "
                "rescale its features or lower the learning rate"
            )


@torch.no_grad()
def _validation_score(model: nn.Module, part: Part, column: int, task: Task) -> float:
    """Score on the validation rows that have the modality; chance level where they cannot be scored."""
    here = part.present[:, column]
    labels = part.labels[here].cpu()
    if not task.scorable(labels):
        return task.unscored
    outputs = torch.cat([model(part.features[column][rows]).cpu() for rows in row_pieces(part, here)])
    return task.score(task.answers(outputs), labels)


def _stored(value: float) -> float | None:
    """JSON has no infinity."""
    return None if value == -math.inf else value
