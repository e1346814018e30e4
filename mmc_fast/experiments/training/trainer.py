"""``Trainer``: the epochs of one model, from fresh or restored state, until the last epoch or an interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from mmc_fast._util.names import unknown
from mmc_fast._util.seeds import generator

from ..data import MultimodalDataset
from .checkpoint import (
    Checkpoint,
    CheckpointStore,
    fits_checkpoint,
    optimizer_tensors,
    prefixed,
    restore_optimizer,
    stripped,
)
from .config import TrainConfig
from .evaluate import hidden_column, masks_at, predict
from .game import probe
from .interrupt import InterruptGuard
from .masks import epoch_order, presence_entropy, training_masks
from .metrics import NotFiniteError, score
from .model import MultimodalModel
from .optim import build_optimizer, set_learning_rate
from .parts import Batches, to_device
from .progress import Interrupted, TrainingDiverged
from .schedules import AdversarialStop, reversal_at
from .split import SplitStep
from .steps import Phase, Stepper, phase_of
from .substitution import ranking_parts, refresh, source_for
from .world import World

__all__ = ["Trainer"]

_PROBE_ROWS = 512


class _Step(NamedTuple):
    """One step of an epoch: its number, what plays, and the rows' presence, substitutes and presence in the data."""

    number: int
    phase: Phase
    present: Tensor | None
    source: Tensor | None
    natural: Tensor | None
    last: bool


class Trainer:
    """Trains ``model`` by ``config``; holds everything that a checkpoint has to hold.

    Attributes after :meth:`fit`: ``history`` (one record per epoch), ``best_epoch`` (from 1), ``best_weights``,
    ``last_weights`` (of the last epoch), ``stop`` (state of the adversarial early stop), ``first_pull`` (the first
    epoch after which the encoders receive a reversed gradient; None: never).
    """

    def __init__(
        self,
        model: MultimodalModel,
        dataset: MultimodalDataset,
        config: TrainConfig,
        *,
        seed: int,
        stage: str = "train",
        reference: str | None = None,
        store: CheckpointStore | None = None,
        guard: InterruptGuard | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.model, self.dataset, self.config, self.seed = model, dataset, config, seed
        self.stage, self.reference, self.store, self.on_epoch = stage, reference, store, on_epoch
        self.guard = guard or InterruptGuard()
        self.device = model.class_prior.device
        self.train_part = to_device(dataset.part("train"), self.device)
        self.validation = dataset.part("validation")
        self.ranking_parts = ranking_parts(dataset) if config.ebr is not None else []
        column = hidden_column(dataset, config.rates_modality)
        self.validation_masks = [
            masks_at(self.validation.present, rate, seed, "validation", column)[0] for rate in config.rates
        ]
        scales = {"discriminator": config.ebr.psi_lr_scale} if config.ebr is not None else {}
        self.optimizer = build_optimizer(model.groups(), config, scales)
        self.stepper = Stepper(model, self.optimizer, config)
        split = self.world.size > 1 or config.accumulate > 1
        self.split = SplitStep(self.stepper, self.world, config) if split else None
        self.generators = {name: generator(seed, name) for name in ("order", "masks", "noise", "foreign")}
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
        self.spent = 0.0  # seconds of the epoch that runs, before an interruption
        self.history: list[dict[str, Any]] = []
        self.best_score, self.best_epoch = -math.inf, 0
        self.best_weights: dict[str, Tensor] = {}
        self.last_weights: dict[str, Tensor] = {}
        self.first_pull: int | None = None
        self.ranking_current = False
        self.ranked = config.ebr is not None and config.ebr.substitute == "ranked"
        self.about: dict[str, Any] = {}  # plain facts about how the state came to be
        self.saved = time.monotonic()

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
        started = time.perf_counter()
        config, part = self.config, self.train_part
        phase = phase_of(config, self.epoch, self.stop.stopped)
        rate = set_learning_rate(self.optimizer, config, self.epoch)
        if self.order is None or self.masks is None:
            self.order = epoch_order(len(part), self.generators["order"])
            self.masks = training_masks(part.present.cpu(), config.modality_dropout, self.generators["masks"])
            self.sums.zero_()
            if self.ranked and config.substitute_in_training:
                self._refresh()
        self._run_steps(phase, self.order, self.masks.to(self.device), started)
        entropy = presence_entropy(self.model.head_present(self.masks)) if config.ebr is not None else 0.0
        self.order = self.masks = None
        self.step, self.epoch = 0, self.epoch + 1
        self._finish_epoch(phase, rate, entropy, started)

    def _run_steps(self, phase: Phase, order: Tensor, masks: Tensor, started: float) -> None:
        config, part, size = self.config, self.train_part, self.config.batch_size
        order = order.to(self.device)
        batches = Batches(part, order, size, lazy=self.split is not None)
        natural = None if bool(part.present.all()) else part.present[order].split(size)
        present = None if bool(masks.all()) else masks[order].split(size)
        steps = len(batches)
        self.model.train()
        while self.step < steps:
            n = self.step
            progress = (self.epoch + n / steps) / config.epochs
            if config.ebr is not None:
                self.stepper.reversal.fill_(0.0 if phase == "semantic" else reversal_at(config, progress))
            here = None if present is None else present[n]
            source = source_for(self.model, here) if config.substitute_in_training and here is not None else None
            at = _Step(n, phase, here, source, None if natural is None else natural[n], n + 1 == steps)
            stop = self._whole_step(at, batches) if self.split is None else self._split_step(self.split, at, batches)
            self.ranking_current = False
            self.step += 1
            if stop:
                self.spent += time.perf_counter() - started
                self._interrupt()
            elif self.store is not None and time.monotonic() - self.saved >= config.checkpoint_seconds:
                self._save_within(started)

    def _whole_step(self, at: _Step, batches: Batches) -> bool:
        """A step on all rows of the batch at once; True where a signal asks to stop."""
        skip, known = self.config.nonfinite == "skip", self.stepper.loss_md
        _, inputs, labels = batches[at.number]
        if self.noisy is not None:
            inputs[self.noisy] = self._with_noise(inputs[self.noisy])
        total, parts, latents = self.stepper.losses(at.phase, inputs, at.present, labels, at.source, at.natural)
        # On a device a look at the loss costs a synchronisation.
        looked = self.device.type == "cpu" or at.last or skip
        refused = looked and not bool(torch.isfinite(total))
        if refused and not skip:
            self._loss_diverged(total)
        self._count(refused or self.stepper.update(at.phase, total, latents, at.present), parts, len(labels), known)
        return self.guard.requested

    def _split_step(self, split: SplitStep, at: _Step, batches: Batches) -> bool:
        """The same on the rows of this process, piece by piece; True where all processes have agreed to stop."""
        known, labels = self.stepper.loss_md, batches.labels[at.number]
        noise = None if self.noisy is None else self._draw_noise(len(labels))

        def load(rows: slice) -> list[Tensor]:
            inputs = batches.features(at.number, rows)
            if self.noisy is not None and noise is not None:
                inputs[self.noisy] = self._with_noise(inputs[self.noisy], noise[rows])
            return inputs

        found = split.backward(at.phase, labels, load, at.present, at.source, at.natural, self.guard.requested)
        refused = not bool(torch.isfinite(found.total))
        if refused and self.config.nonfinite == "stop":
            self._loss_diverged(found.total)
        self._count(refused or split.finish(at.phase), found.parts, len(labels), known)
        return found.stop

    def _count(self, refused: bool, parts: Tensor, rows: int, known: Tensor) -> None:
        """Add the losses of a step that was taken; one that was refused leaves all as it was."""
        if refused:
            self._skip(rows)
            self.stepper.loss_md = known
        else:
            self.sums += parts.double() * rows

    def _skip(self, rows: int) -> None:
        """Count a batch whose step was not taken; an error where the configuration does not skip."""
        if self.config.nonfinite == "stop":
            self._diverged(f"the gradient became infinite or NaN in epoch {self.epoch + 1}, step {self.step + 1}")
        self.skipped, self.skipped_rows = self.skipped + 1, self.skipped_rows + rows

    def _save_within(self, started: float) -> None:
        """A checkpoint in the middle of an epoch; weights that are no longer finite must not replace good ones."""
        if not self._weights_finite():
            self._diverged(f"the weights became infinite or NaN in epoch {self.epoch + 1}, step {self.step}")
        before = self.spent
        self.spent += time.perf_counter() - started
        self.save()
        self.spent = before

    def _draw_noise(self, rows: int) -> Tensor:
        """U on [-1, 1], for all rows of a batch."""
        width = self.train_part.features[self.noisy or 0].shape[1]
        return 2 * torch.rand(rows, width, generator=self.generators["noise"]).to(self.noise_scale) - 1

    def _with_noise(self, x: Tensor, uniform: Tensor | None = None) -> Tensor:
        """``(1 - r) x + r U std(x)`` with U uniform on [-1, 1] and the standard deviations of the train part."""
        rate = self.config.noise_rate
        uniform = self._draw_noise(len(x)) if uniform is None else uniform
        return (1 - rate) * x + rate * uniform * self.noise_scale

    def _finish_epoch(self, phase: Phase, rate: float, entropy: float, started: float) -> None:
        config = self.config
        self._check_weights()
        record: dict[str, Any] = {"stage": self.stage, "epoch": self.epoch, "phase": phase, "lr": rate}
        rows = len(self.train_part) - self.skipped_rows
        if rows == 0:
            self._diverged(f"every batch of epoch {self.epoch} was skipped because its loss or gradient was not finite")
        means = [None if math.isnan(v) else v / rows for v in self.sums.tolist()]
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
            record |= probe(self.model, self.probe_part, reversal, self.world)
            if self.first_pull is None and record["grad_norm_encoders"] > 0:
                self.first_pull = self.epoch
        record |= self._validate()
        selected = {"complete": "val_score", "masked": "val_score_masked", "last": "epoch"}[config.selection]
        if record[selected] > self.best_score:
            self.best_score, self.best_epoch = record[selected], self.epoch
            if self.ranked:
                self._refresh()
            self.best_weights = _copy(self.model.state_dict())
        if phase != "adversarial" and config.ebr is not None:
            watched = record["val_score"] if config.adversarial_stop == "score" else record["loss_sem"]
            self.stop.judge(self.epoch, watched)
        record["adversarial_stopped"] = self.stop.stopped
        record["seconds"] = self.spent + time.perf_counter() - started
        self.spent = 0.0
        self.history.append(record)
        self._check_equal()
        due = self.epoch % config.checkpoint_every == 0 or self.epoch == config.epochs or self.guard.requested
        if self.store is not None and due:
            self.save()
        if self.on_epoch is not None:
            self.on_epoch(record)
        if self.world.any(self.guard.requested):  # perhaps only since on_epoch
            self._interrupt(saved=due)

    def _check_equal(self) -> None:
        """Several processes must hold the same weights; other rounding in one of them would grow unseen."""
        if self.world.size > 1:
            content = b"".join(p.detach().cpu().numpy().tobytes() for p in self.model.parameters())
            self.world.check_same("weights", content, "do all run on the same kind of processor and library?")

    def _refresh(self) -> None:
        """Bring the ranking up to date with the weights."""
        if not self.ranking_current:
            refresh(self.model, self.ranking_parts, self.reference, self.world)
            self.ranking_current = True

    def _validate(self) -> dict[str, float | None]:
        """Scores on the validation part; the ranking is brought up to date first where a slot will be substituted."""
        masked = self.config.selection == "masked"
        if self.ranked and (masked or not bool(self.validation.present.all())):
            self._refresh()
        features, labels, metric = self.validation.features, self.validation.labels, self.dataset.metric

        def judge(present: Tensor) -> float:
            mine = self.world.rows(len(labels))
            found = predict(self.model, [x[mine] for x in features], present[mine], on_empty="prior")
            found = self.world.gather_rows(found, len(labels))
            try:
                return score(found, labels, metric)
            except NotFiniteError as error:
                self._diverged(f"{error} (validation after epoch {self.epoch})")

        record: dict[str, float | None] = {"val_score": judge(self.validation.present)}
        if masked:
            record["val_score_masked"] = sum(map(judge, self.validation_masks)) / len(self.validation_masks)
        return record

    def _weights_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def _loss_diverged(self, total: Tensor) -> NoReturn:
        """Before the step is taken: the weights are still those of the step before."""
        if self._weights_finite():
            self.save()
        self._diverged(f"the loss became {float(total.detach())} in epoch {self.epoch + 1}, step {self.step + 1}")

    def _check_weights(self) -> None:
        """After the last step of an epoch, before anything is measured or saved."""
        if not self._weights_finite():
            self._diverged(f"the weights became infinite or NaN at the end of epoch {self.epoch}")

    def _diverged(self, what: str) -> NoReturn:
        newest = self.store.newest() if self.store is not None else None
        raise TrainingDiverged(
            f"{what} (stage {self.stage}); lower the learning rate or the reversal; "
            f"last good checkpoint: {newest or 'none was written'}"
        )

    def _interrupt(self, saved: bool = False) -> None:
        if not self.world.first:
            raise Interrupted(f"interrupted in epoch {self.epoch + 1} of stage {self.stage}; the first process saves")
        if self.store is None:
            raise Interrupted(f"interrupted in epoch {self.epoch + 1} of stage {self.stage}; nothing was saved")
        if not saved:
            self.save()
        raise Interrupted(f"interrupted; saved {self.store.newest()}")

    def save(self) -> None:
        """Write a checkpoint of the state as it is now."""
        if self.store is None:
            return
        tensors = prefixed("optimizer", optimizer_tensors(self.optimizer)) | prefixed("best", self.best_weights)
        tensors |= {f"generator.{name}": g.get_state() for name, g in self.generators.items()}
        tensors["sums"] = self.sums
        tensors["loss_md"], tensors["reversal"] = self.stepper.loss_md, self.stepper.reversal
        if self.order is not None and self.masks is not None:
            tensors |= {"order": self.order, "masks": self.masks}
        meta = {
            "epoch": self.epoch,
            "step": self.step,
            "spent": self.spent,
            "skipped": [self.skipped, self.skipped_rows, self.stepper.clipped],
            "history": self.history,
            "best_score": self.best_score if self.best_epoch else None,
            "best_epoch": self.best_epoch,
            "first_pull": self.first_pull,
            "about": self.about,
            "stop": {"best": self.stop.best, "bad": self.stop.bad, "stopped_after": self.stop.stopped_after},
        }
        self.store.save(Checkpoint(self.model.state_dict(), tensors, meta), self.epoch, self.step)
        self.saved = time.monotonic()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the state of a checkpoint; what follows equals the run that was never interrupted."""
        with fits_checkpoint(self.stage):
            self._restore(checkpoint.weights, checkpoint.tensors, checkpoint.meta)

    def _restore(self, weights: dict[str, Tensor], tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.model.load_state_dict(weights)
        restore_optimizer(self.optimizer, stripped("optimizer", tensors))
        for name, g in self.generators.items():
            g.set_state(tensors[f"generator.{name}"])
        self.best_weights = {k: v.to(self.device) for k, v in stripped("best", tensors).items()}
        self.sums = tensors["sums"].to(self.device)
        self.stepper.loss_md = tensors["loss_md"].to(self.device)
        self.stepper.reversal.copy_(tensors["reversal"])  # after the last step of an epoch nobody sets it again
        self.order, self.masks = tensors.get("order"), tensors.get("masks")
        self.epoch, self.step, self.spent = meta["epoch"], meta["step"], meta["spent"]
        self.skipped, self.skipped_rows, self.stepper.clipped = meta["skipped"]
        self.history, self.best_epoch, self.first_pull = meta["history"], meta["best_epoch"], meta["first_pull"]
        self.about = meta["about"]
        self.best_score = -math.inf if meta["best_score"] is None else meta["best_score"]
        self.stop.best, self.stop.bad = meta["stop"]["best"], meta["stop"]["bad"]
        self.stop.stopped_after = meta["stop"]["stopped_after"]


def _noisy_column(dataset: MultimodalDataset, config: TrainConfig) -> int | None:
    if config.noise_modality is None:
        return None
    if config.noise_modality not in dataset.modalities:
        raise unknown("noise_modality", config.noise_modality, dataset.modalities)
    return dataset.modalities.index(config.noise_modality)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in state.items()}
