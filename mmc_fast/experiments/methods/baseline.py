"""``BaselineModel``: what re-implemented methods share, the encoders of the standard model; and the loop that trains them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmc_fast._util.seeds import generator, seeded_init
from mmc_fast.errors import InputError
from mmc_fast.nn import EBRConfig

from ..data import Part
from ..tasks import NotFiniteError
from ..training import TrainConfig, TrainingDiverged, UnimodalModels
from ..training.distillation import distil
from ..training.evaluate import hidden_column, masks_at
from ..training.interrupt import InterruptGuard, Stage
from ..training.masks import epoch_order, training_masks
from ..training.model import MultimodalModel
from ..training.optim import build_optimizer, set_learning_rate
from ..training.parts import Batches, task_of
from ..training.progress import Silent
from ..training.substitution import ranking_parts, refresh, source_for
from .base import BATCH_ROWS, Fitted, Task, prior, unimodal_models

_EXACT_ROWS = 4096  # rows at a time where the prediction does not depend on them


@dataclass(frozen=True)
class Batch:
    """Rows of one step.

    ``features`` ``[b, d_i]``; ``natural`` bool ``[b, m]``, presence in the data; ``present``, after random masks;
    ``labels`` ``[b]``; ``random``: generator of whatever the loss draws.
    """

    features: list[Tensor]
    natural: Tensor
    present: Tensor
    labels: Tensor
    random: torch.Generator


class BaselineModel(MultimodalModel, ABC):
    """Base of the re-implemented methods: ``filled`` gives their modality features, they add a fusion and, some, a loss.

    The encoders are those of the standard model; with an ``ebr`` section its heads stand behind them and fill absent
    modalities by its substitution rule, so that EBR can be put under any of these methods.
    """

    batch_dependent = False

    def __init__(self, dims: Mapping[str, int], num_classes: int, config: TrainConfig) -> None:
        super().__init__(dims, num_classes, config)
        del self.fusion

    def filled(self, features: Sequence[Tensor], present: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Features ``[b, width_i]``, zeros where nothing is; bool ``[b, m]``: there or filled in; the loss of the heads."""
        encoded = self.encode(features, present)
        if self.head is None or self.config.ebr is None:
            return encoded, present, encoded[0].new_zeros(())
        source = source_for(self, present)
        out = self.apply_head(encoded, present, source, self.config.ebr.reversal)
        for h, i in enumerate(self.columns):
            encoded[i] = out.recovered[h]
        loss = out.discrimination_loss + self.config.ebr.reconstruction * out.reconstruction_loss
        visible = self._visible(present, source)
        return encoded, present if visible is None else visible, loss

    @abstractmethod
    def fuse(self, encoded: Sequence[Tensor], filled: Tensor) -> Tensor:
        """Logits ``[b, C]`` from features of the modalities in ``filled`` bool ``[b, m]``."""

    def forward(self, features: Sequence[Tensor], present: Tensor) -> Tensor:  # type: ignore[override]
        """Logits ``[b, C]``."""
        encoded, filled, _ = self.filled(features, present)
        return self.fuse(encoded, filled)

    def loss(self, batch: Batch) -> Tensor:
        """What a step descends, the task's loss unless a method says otherwise; may call for gradients of its own."""
        encoded, filled, extra = self.filled(batch.features, batch.present)
        return self.task.loss(self.fuse(encoded, filled), batch.labels, "mean") + extra

    def begin_epoch(self, train: Part) -> None:
        """Before the steps of an epoch."""

    def end_epoch(self, train: Part) -> None:
        """After the steps of an epoch, before the model is scored."""

    @torch.no_grad()
    def probabilities(self, features: Sequence[Tensor], present: Tensor) -> Tensor:
        """Answers of the task; each call takes the given rows as one batch."""
        self.eval()
        return self.task.answers(self(features, present))


def fit_baseline(kind: Callable[..., BaselineModel], **fixed: Any) -> Callable[[Task], Fitted]:
    """The fitter of a re-implemented method with the model ``kind(dims, num_classes, config, **options, **fixed)``."""

    def build(task: Task) -> BaselineModel:
        return kind(task.dataset.dims, task.dataset.num_classes, task.config, **task.options, **fixed)

    return lambda task: _Fit(build, task).run()


_REFUSED = (
    "weight_average",
    "encoder_dropout",
    "consistency",
    "noise_rate",
    "reweight",
    "accumulate",
    "clip_grad_norm",
    "nonfinite",
)
_REFUSED_HEADS = ("schedule", "patience", "cross_recovery")


def _check_settings(config: TrainConfig) -> None:
    """Refuse settings of the standard loop that this one would pass over in silence."""
    pairs: list[tuple[str, Any, Any, tuple[str, ...]]] = [("", config, TrainConfig(), _REFUSED)]
    pairs += [("ebr.", config.ebr, EBRConfig(), _REFUSED_HEADS)] if config.ebr is not None else []
    for prefix, found, default, names in pairs:
        for name in names:
            if getattr(found, name) != getattr(default, name):
                raise InputError(
                    f"config: {prefix}{name} is {getattr(found, name)!r}, which re-implemented methods do not have; "
                    f"leave it at {getattr(default, name)!r}"
                )


class _Fit:
    """Order, masks, optimiser, validation and selection as in the standard loop; model and loss of the method."""

    def __init__(self, build: Callable[[Task], BaselineModel], task: Task) -> None:
        _check_settings(task.config)
        self.task, self.config, self.dataset = task, task.config, task.dataset
        self.progress = task.progress or Silent()
        self.guard = InterruptGuard()
        with seeded_init(task.seed, "init"):
            self.model = build(task)
        self.train, self.validation = task.dataset.part("train"), task.dataset.part("validation")
        self.model.task = task_of(task.dataset, task.config)
        self.model.prior.copy_(self.model.task.prior(self.train.labels))
        self.unimodal: UnimodalModels | None = None
        self.fitted = Fitted(
            self.model.probabilities,
            prior(task.dataset),
            BATCH_ROWS if self.model.batch_dependent else _EXACT_ROWS,
            {},
        )

    def run(self) -> Fitted:
        config, seed = self.config, self.task.seed
        with self.guard:
            self.progress.on_start(config.epochs + config.unimodal_epochs, "baseline")
            self._before()
            self._epochs()
        record = {"selected_epoch": self.best_epoch, "val_score": self.history[self.best_epoch - 1]["val_score"]}
        self.fitted.record |= record | {"losses": [r["loss"] for r in self.history]}
        if self.unimodal is not None:
            self.fitted.record["unimodal"] = self.unimodal.scores
        self.progress.on_end({"seed": seed})
        return self.fitted

    def _before(self) -> None:
        """Unimodal models where they are needed, and distillation into the encoders."""
        if self.config.unimodal_epochs == 0:
            return
        self.unimodal = unimodal_models(self.task, self.guard)
        if self.config.kd is not None:
            stage, seed = Stage(guard=self.guard), self.task.seed
            pairs = distil(self.model, self.dataset, self.unimodal, self.config.kd, seed=seed, stage=stage)
            self.fitted.record["distillation"] = {"pairs": pairs}

    def _epochs(self) -> None:
        config, seed = self.config, self.task.seed
        optimizer = build_optimizer({"all": list(self.model.parameters())}, config)
        streams = {name: generator(seed, name) for name in ("order", "masks", "peer")}
        self.history: list[dict[str, Any]] = []
        best, self.best_epoch, weights = -math.inf, 0, {}
        self._rank()
        for epoch in range(config.epochs):
            set_learning_rate(optimizer, config, epoch)
            self.model.begin_epoch(self.train)
            loss = self._epoch(optimizer, streams)
            self.model.end_epoch(self.train)
            self._rank()
            record: dict[str, Any] = {"stage": "train", "epoch": epoch + 1, "loss": loss} | self._validate(epoch + 1)
            selected = {"complete": "val_score", "masked": "val_score_masked", "last": "epoch"}[config.selection]
            if record[selected] > best:
                best, self.best_epoch = record[selected], epoch + 1
                weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
            self.history.append(record)
            self.progress.on_epoch(record)
            self.guard.check("the training of a baseline")
        self.model.load_state_dict(weights)
        self.model.eval()

    def _rank(self) -> None:
        """Bring the ranking of the heads, where they have one, up to date with the weights."""
        if self.config.ebr is not None and self.config.ebr.substitute == "ranked":
            strongest = None if self.unimodal is None else self.unimodal.strongest
            refresh(self.model, ranking_parts(self.dataset), strongest)

    def _epoch(self, optimizer: torch.optim.Optimizer, streams: dict[str, torch.Generator]) -> float:
        order = epoch_order(len(self.train), streams["order"])
        masks = training_masks(self.train.present, self.config.modality_dropout, streams["masks"])
        batches = Batches(self.train, order, self.config.batch_size)
        self.model.train()
        total = 0.0
        for n in range(len(batches)):
            rows, features, labels = batches[n]
            batch = Batch(features, self.train.present[rows], masks[rows], labels, streams["peer"])
            loss = self.model.loss(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingDiverged(f"the loss became {value}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += value * len(labels)
            self.guard.check("the training of a baseline")
        return total / len(self.train)

    def _validate(self, epoch: int) -> dict[str, float]:
        """Validation scores, as the standard loop takes them."""
        part = self.validation

        def score_with(present: Tensor) -> float:
            try:
                return self.model.task.score(self.fitted.predict(part.features, present), part.labels)
            except NotFiniteError as error:
                raise TrainingDiverged(f"{error} (validation after epoch {epoch})") from error

        record = {"val_score": score_with(part.present)}
        if self.config.selection == "masked":
            column = hidden_column(self.dataset, self.config.rates_modality)
            seed, rates = self.task.seed, self.config.rates
            masks = [masks_at(part.present, rate, seed, "validation", column)[0] for rate in rates]
            record["val_score_masked"] = sum(map(score_with, masks)) / len(masks)
        return record
