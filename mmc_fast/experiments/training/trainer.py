"""``Trainer``: the epochs of one model, from fresh or restored state, until the last epoch or an interruption."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import Tensor
from typing_extensions import TypedDict

from mmc_fast._util.documents import Count0, Finite
from mmc_fast._util.names import unknown
from mmc_fast._util.seeds import generator, seeded_init

from ..data import MultimodalDataset
from ..tasks import NotFiniteError
from .adversarial import probe
from .average import WeightAverage
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
from .evaluate import hidden_column, masks_at, predict
from .interrupt import Autosave, Stage
from .masks import epoch_order, presence_entropy, training_masks
from .model import MultimodalModel
from .optim import build_optimizer, set_learning_rate
from .parts import Batches, to_device
from .processes import Processes
from .progress import TrainingDiverged
from .schedules import AdversarialStop
from .steps import Phase, Stepper, phase_of
from .substitution import ranking_parts, refresh, source_for

_PROBE_ROWS = 512
# Plain values of a checkpoint that are attributes as they are.
_PLAIN = ("epoch", "step", "skipped", "skipped_rows", "history", "best_epoch", "first_active", "about")


class _Record(TypedDict):
    stage: str
    epoch: Count0
    val_score: Finite
    seconds: Finite


class _Stop(TypedDict):
    patience: int | None
    larger_is_better: bool
    best: Finite | None
    bad: Count0
    stopped_after: int | None


class TrainerMeta(TypedDict):
    """Plain values of a checkpoint."""

    epoch: Count0
    step: Count0
    skipped: Count0
    skipped_rows: Count0
    clipped: Count0
    best_epoch: Count0
    history: list[_Record]
    first_active: int | None
    about: dict[str, Any]
    spent: Finite
    best_score: Finite | None
    stop: _Stop


class Trainer:
    """Trains ``model`` by ``config``; holds everything that a checkpoint has to hold.

    Attributes after :meth:`fit`: ``history`` (one record per epoch), ``best_epoch`` (from 1), ``best_weights``,
    ``last_weights`` (of the last epoch), ``stop`` (state of the adversarial early stop), ``first_active`` (the
    first epoch after which the encoders receive a reversed gradient; None: never).
    """

    def __init__(
        self,
        model: MultimodalModel,
        dataset: MultimodalDataset,
        config: TrainConfig,
        *,
        seed: int,
        reference: str | None = None,
        stage: Stage | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.model, self.dataset, self.config, self.seed = model, dataset, config, seed
        self.stage, self.reference = stage or Stage(), reference
        self.guard = self.stage.guard
        model.eval()  # dropout acts in steps alone, not in rankings, probes and distillation
        self.device = model.prior.device
        self.train_part = to_device(dataset.part("train"), self.device)
        self.validation = dataset.part("validation")
        self.ranking_parts = ranking_parts(dataset) if config.ebr is not None else []
        column = hidden_column(dataset, config.rates_modality)
        self.validation_masks = [
            masks_at(self.validation.present, rate, seed, "validation", column)[0] for rate in config.rates
        ]
        self.optimizer = build_optimizer(model.groups(), config)
        self.stepper = Stepper(model, self.optimizer, config, self.processes)
        self.average = WeightAverage(model, config.weight_average) if config.weight_average else None
        self.generators = {name: generator(seed, name) for name in ("order", "masks", "noise", "foreign")}
        # "foreign": whose latent each modality is rebuilt from
        self.stepper.random = self.generators["foreign"]
        self.noisy = _noisy_column(dataset, config)
        if self.noisy is not None:
            self.noise_scale = self.train_part.features[self.noisy].std(0)
        rows = torch.randperm(len(self.train_part), generator=generator(seed, "probe"))[:_PROBE_ROWS]
        self.probe_part = self.train_part.select(rows.to(self.device))
        self.stop = AdversarialStop(
            config.ebr.patience if config.ebr is not None else None,
            larger_is_better=config.adversarial_stop == "score",
        )
        self.epoch = 0  # whole epochs done
        self.step = 0  # steps done in the epoch that runs
        self.order: Tensor | None = None  # row order of the epoch that runs
        self.masks: Tensor | None = None  # presence of its rows
        self.skipped = self.skipped_rows = 0  # batches and rows of the epoch that runs that were not finite
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # L_sem, L_md, L_rec summed over rows
        self.spent, self.started = 0.0, time.perf_counter()  # seconds before an interruption; begin of what followed
        self.history: list[dict[str, Any]] = []
        self.best_score, self.best_epoch = -math.inf, 0
        self.best_weights: dict[str, Tensor] = {}
        self.last_weights: dict[str, Tensor] = {}
        self.first_active: int | None = None
        self.ranking_current = False
        self.ranked = config.ebr is not None and config.ebr.substitute == "ranked"
        self.about: dict[str, Any] = {}  # plain facts about how the state came to be
        self.autosave = Autosave(self.stage, self.state)

    def fit(self) -> None:
        """Run the epochs that are left; saves a checkpoint after each ``checkpoint_every`` of them.

        Raises:
            Interrupted: the guard saw Ctrl-C; the step was finished and the state saved.
            TrainingDiverged: a loss became NaN or infinite.
        """
        while self.epoch < self.config.epochs:
            self._run_epoch()
        self.last_weights = _copy(self.model.state_dict())
        self.model.load_state_dict(self.best_weights)
        self.ranking_current = False
        self._refresh()
        self.model.eval()

    def _run_epoch(self) -> None:
        self.started = time.perf_counter()
        config, part = self.config, self.train_part
        phase = phase_of(config, self.epoch, self.stop.stopped)
        rate = set_learning_rate(self.optimizer, config, self.epoch)
        if self.order is None or self.masks is None:
            self.order = epoch_order(len(part), self.generators["order"])
            self.masks = training_masks(part.present.cpu(), config.modality_dropout, self.generators["masks"])
            self.sums.zero_()
            if self.ranked and (config.substitute_in_training or config.consistency > 0):
                self._refresh()
        self._run_steps(phase, self.order, self.masks.to(self.device))
        entropy = presence_entropy(self.model.head_present(self.masks)) if config.ebr is not None else 0.0
        self.order = self.masks = None
        self.step, self.epoch = 0, self.epoch + 1
        self._finish_epoch(phase, rate, entropy)

    def _run_steps(self, phase: Phase, order: Tensor, masks: Tensor) -> None:
        config, part, size = self.config, self.train_part, self.config.batch_size
        order = order.to(self.device)
        batches = Batches(part, order, size, lazy=self.stepper.split)
        natural = None if bool(part.present.all()) else part.present[order].split(size)
        present = None if bool(masks.all()) else masks[order].split(size)
        steps = len(batches)
        if config.ebr is not None:
            self.stepper.reversal.fill_(0.0 if phase == "semantic" else config.ebr.reversal)
        self.model.train()
        while self.step < steps:
            n = self.step
            here = None if present is None else present[n]
            source = None
            if config.substitute_in_training and here is not None:
                source = source_for(self.model, here, self.generators["foreign"])
            self._take_step(phase, batches, here, source, None if natural is None else natural[n])
            self.ranking_current = False
            self.step += 1
            self.autosave.after_step()
        self.model.eval()

    def _take_step(
        self, phase: Phase, batches: Batches, present: Tensor | None, source: Tensor | None, natural: Tensor | None
    ) -> None:
        """One step on all rows of its batch."""
        skip, n = self.config.nonfinite == "skip", self.step
        labels = batches.labels[n]
        noise = None if self.noisy is None else self._draw_noise(len(labels))

        def load(rows: slice) -> list[Tensor]:
            features = batches.features(n, rows)
            if self.noisy is not None and noise is not None:
                features[self.noisy] = self._with_noise(features[self.noisy], noise[rows])
            return features

        with self._dropout():
            total, parts, stop = self.stepper.backward(
                phase, labels, load, present, source, natural, self.guard.requested
            )
        if self.processes.size > 1:
            self.guard.agreed = stop
        # On a device a look at the loss costs a synchronisation.
        looked = self.device.type == "cpu" or n + 1 == len(batches) or skip
        refused = looked and not bool(torch.isfinite(total))
        if refused and not skip:
            self._loss_diverged(total)
        if refused or self.stepper.update(phase):
            self._skip(len(labels))
        else:
            if self.average is not None:
                self.average.update()
            self.sums += parts.double() * len(labels)

    def _skip(self, rows: int) -> None:
        """Count a batch whose step was not taken; an error where the configuration does not skip."""
        if self.config.nonfinite == "stop":
            self._diverged(f"the gradient became infinite or NaN in epoch {self.epoch + 1}, step {self.step + 1}")
        self.skipped, self.skipped_rows = self.skipped + 1, self.skipped_rows + rows

    def _dropout(self) -> AbstractContextManager[None]:
        """Dropout reads the global generator: seeded by the step, so that a resumed run draws the same."""
        if not self.config.encoder_dropout:
            return nullcontext()
        return seeded_init(self.seed, "dropout", self.epoch, self.step)

    def _draw_noise(self, rows: int) -> Tensor:
        """U on [-1, 1], for all rows of a batch."""
        width = self.train_part.features[self.noisy or 0].shape[1]
        return 2 * torch.rand(rows, width, generator=self.generators["noise"]).to(self.noise_scale) - 1

    def _with_noise(self, x: Tensor, uniform: Tensor) -> Tensor:
        """``(1 - r) x + r U std(x)`` with U uniform on [-1, 1] and the standard deviations of the train part."""
        rate = self.config.noise_rate
        return (1 - rate) * x + rate * uniform * self.noise_scale

    def _finish_epoch(self, phase: Phase, rate: float, entropy: float) -> None:
        config = self.config
        self._check_weights()
        record: dict[str, Any] = {"stage": self.stage.name, "epoch": self.epoch, "phase": phase, "lr": rate}
        rows = len(self.train_part) - self.skipped_rows
        if rows == 0:
            self._diverged(f"every batch of epoch {self.epoch} was skipped because its loss or gradient was not finite")
        computed = (phase != "adversarial", config.ebr is not None, config.ebr is not None)
        means = [v / rows if there else None for v, there in zip(self.sums.tolist(), computed, strict=True)]
        record |= dict(zip(("loss_sem", "loss_md", "loss_rec"), means, strict=True))
        record |= {"reversal": None, "loss_md_over_entropy": None}
        if config.nonfinite == "skip":
            record["skipped"] = self.skipped
        if config.clip_grad_norm is not None:
            record["clipped"] = self.stepper.clipped
        self.skipped = self.skipped_rows = self.stepper.clipped = 0
        record |= dict.fromkeys(("psi_accuracy", "grad_norm_psi", "grad_norm_encoders"))
        if config.ebr is not None:
            reversal = float(self.stepper.reversal)
            record["reversal"] = reversal
            if means[1] is not None and entropy > 0:
                record["loss_md_over_entropy"] = means[1] / entropy
            record |= probe(self.model, self.probe_part, reversal, self.processes)
            if self.first_active is None and record["grad_norm_encoders"] > 0:
                self.first_active = self.epoch
        with nullcontext() if self.average is None else self.average.applied():
            self.ranking_current = self.ranking_current and self.average is None
            self._select(record)
        self.ranking_current = self.ranking_current and self.average is None
        if phase != "adversarial" and config.ebr is not None:
            watched = record["val_score"] if config.adversarial_stop == "score" else record["loss_sem"]
            self.stop.watch(self.epoch, watched)
        record["adversarial_stopped"] = self.stop.stopped
        record["seconds"] = self._seconds()
        self.spent = 0.0
        self.history.append(record)
        self._check_equal()
        if self.epoch % config.checkpoint_every == 0 or self.epoch == config.epochs:
            self.autosave.save()
        self.stage.on_epoch(record)
        if self.processes.size > 1:
            self.guard.agreed = self.processes.any(self.guard.requested)
        self.autosave.after_epoch()

    def _select(self, record: dict[str, Any]) -> None:
        """Score the epoch on the validation part, and keep its weights where they are the best so far."""
        record |= self._validate()
        selected = {"complete": "val_score", "masked": "val_score_masked", "last": "epoch"}[self.config.selection]
        if record[selected] > self.best_score:
            self.best_score, self.best_epoch = record[selected], self.epoch
            self.best_weights = _copy(self.model.state_dict())

    def _seconds(self) -> float:
        """Seconds of the epoch that runs."""
        return self.spent + time.perf_counter() - self.started

    def _check_equal(self) -> None:
        """Several processes must hold the same weights; other rounding in one of them would grow unseen."""
        if self.processes.size > 1:
            content = b"".join(p.detach().cpu().numpy().tobytes() for p in self.model.parameters())
            self.processes.check_same("weights", content, "do all run on the same kind of processor and library?")

    def _refresh(self) -> None:
        """Bring the ranking up to date with the weights."""
        if not self.ranking_current:
            refresh(self.model, self.ranking_parts, self.reference, self.processes)
            self.ranking_current = True

    def _validate(self) -> dict[str, float | None]:
        """Scores on the validation part; the ranking is brought up to date first where it will be used."""
        masked = self.config.selection == "masked"
        if self.ranked and (masked or not bool(self.validation.present.all())):
            self._refresh()
        features, labels = self.validation.features, self.validation.labels

        def score_with(present: Tensor) -> float:
            mine = self.processes.rows(len(labels))
            found = predict(self.model, [x[mine] for x in features], present[mine], on_empty="prior")
            found = self.processes.gather_rows(found, len(labels))
            try:
                return self.model.task.score(found, labels)
            except NotFiniteError as error:
                self._diverged(f"{error} (validation after epoch {self.epoch})")

        record: dict[str, float | None] = {"val_score": score_with(self.validation.present)}
        if masked:
            record["val_score_masked"] = sum(map(score_with, self.validation_masks)) / len(self.validation_masks)
        return record

    def _weights_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def _loss_diverged(self, total: Tensor) -> NoReturn:
        """Before the step is taken: the weights are still those of the step before."""
        if self._weights_finite():
            self.autosave.save()
        self._diverged(f"the loss became {float(total.detach())} in epoch {self.epoch + 1}, step {self.step + 1}")

    def _check_weights(self) -> None:
        """After the last step of an epoch, before anything is measured or saved."""
        if not self._weights_finite():
            self._diverged(f"the weights became infinite or NaN at the end of epoch {self.epoch}")

    def _diverged(self, what: str) -> NoReturn:
        newest = self.stage.store.newest() if self.stage.store is not None else None
        raise TrainingDiverged(
            f"{what} (stage {self.stage.name}); lower the learning rate or the reversal; "
            f"last good checkpoint: {newest or 'none was written'}"
        )

    def state(self) -> tuple[Checkpoint, int, int]:
        """The state as it is now; weights that are no longer finite must not replace good ones."""
        if not self._weights_finite():
            self._diverged(f"the weights became infinite or NaN in epoch {self.epoch + 1}, step {self.step}")
        tensors = prefixed("optimizer", optimizer_tensors(self.optimizer)) | prefixed("best", self.best_weights)
        tensors |= {f"generator.{name}": g.get_state() for name, g in self.generators.items()}
        tensors["sums"] = self.sums
        if self.average is not None:
            tensors |= prefixed("average", self.average.tensors())
        if self.order is not None and self.masks is not None:
            tensors |= {"order": self.order, "masks": self.masks}
        meta = {name: getattr(self, name) for name in _PLAIN} | {
            "spent": 0.0 if self.order is None else self._seconds(),
            "clipped": self.stepper.clipped,
            "best_score": self.best_score if self.best_epoch else None,
            "stop": asdict(self.stop),
        }
        return Checkpoint(self.model.state_dict(), tensors, meta), self.epoch, self.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the state of a checkpoint; what follows equals the run that was never interrupted."""
        with fits_checkpoint(self.stage.name):
            self._restore(checkpoint.weights, checkpoint.tensors, checkpoint.meta)

    def _restore(self, weights: dict[str, Tensor], tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self._check_state(weights, tensors, meta)
        self.model.load_state_dict(weights)
        restore_optimizer(self.optimizer, stripped("optimizer", tensors))
        for name, g in self.generators.items():
            g.set_state(tensors[f"generator.{name}"])
        self.best_weights = {k: v.to(self.device) for k, v in stripped("best", tensors).items()}
        if self.average is not None:
            self.average.restore(stripped("average", tensors))
        self.sums = tensors["sums"].to(self.device)
        self.order, self.masks = tensors.get("order"), tensors.get("masks")
        for name in _PLAIN:
            setattr(self, name, meta[name])
        self.spent, self.stepper.clipped = meta["spent"], meta["clipped"]
        self.best_score = -math.inf if meta["best_score"] is None else meta["best_score"]
        self.stop = AdversarialStop(**meta["stop"])

    def _check_state(self, weights: dict[str, Tensor], tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Raise ValueError for a state that no run of this configuration on these data can have."""
        model, rows = self.model.state_dict(), len(self.train_part)
        check_like(weights, model)
        expected = prefixed("best", model) if meta["best_epoch"] else {}
        moments = stripped("optimizer", tensors)
        expected |= prefixed("optimizer", moments_like(self.optimizer, moments))
        expected |= {f"generator.{name}": g.get_state() for name, g in self.generators.items()}
        expected |= {"sums": self.sums, "masks": self.train_part.present}
        expected |= {} if self.average is None else prefixed("average", self.average.tensors())
        expected["order"] = torch.zeros(rows, dtype=torch.int64)
        check_like(tensors, expected, optional=("order", "masks"))
        check_rows(tensors.get("order"), rows)
        steps, begun = -(-rows // self.config.batch_size), "order" in tensors
        if begun != ("masks" in tensors) or meta["step"] > (steps if begun else 0) or meta["skipped_rows"] > rows:
            raise ValueError(f"it stands at step {meta['step']} of {steps}")
        if not meta["best_epoch"] <= meta["epoch"] == len(meta["history"]) <= self.config.epochs:
            raise ValueError(f"it stands after epoch {meta['epoch']} of {self.config.epochs}")
        stop = AdversarialStop(**meta["stop"])
        if (stop.patience, stop.larger_is_better) != (self.stop.patience, self.stop.larger_is_better):
            raise ValueError("its adversarial stop is another one")


def _noisy_column(dataset: MultimodalDataset, config: TrainConfig) -> int | None:
    if config.noise_modality is None:
        return None
    if config.noise_modality not in dataset.modalities:
        raise unknown("noise_modality", config.noise_modality, dataset.modalities)
    return dataset.modalities.index(config.noise_modality)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in state.items()}
