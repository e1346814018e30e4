"""Cross-modal distillation: encoders of weak modalities learn to agree with frozen encoders of strong ones."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import TypedDict

from mmc_fast._util.documents import Count0, Finite
from mmc_fast._util.seeds import generator, seeded_init
from mmc_fast.errors import InputError

from ..data import MultimodalDataset
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
from .config import KDConfig
from .interrupt import Autosave, Stage
from .masks import epoch_order
from .model import MultimodalModel
from .parts import to_device
from .progress import TrainingDiverged
from .unimodal import UnimodalModels


class _Done(TypedDict):
    teacher: str
    student: str
    loss: list[Finite]


class _PairMeta(TypedDict):
    epoch: Count0
    step: Count0
    losses: list[Finite]
    total: Finite
    counted: Count0


class DistillationMeta(TypedDict):
    """Plain values of a checkpoint."""

    done: list[_Done]
    pair: _PairMeta | None


def info_nce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE of paired unit rows ``a, b [B, e]``: mean of CE over rows and columns of ``a bᵀ / T``.

    Pair (n, n) is positive, the other rows of the batch are negatives. Source: van den Oord et al. 2018; symmetric form
    as in Radford et al. 2021.
    """
    logits = a @ b.t() / temperature
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def teaching_plan(unimodal: UnimodalModels, kd: KDConfig, seed: int) -> list[tuple[str, str]]:
    """``(teacher, student)`` pairs in the order in which they are trained; students from weakest to strongest."""
    ranked = unimodal.weakest_first()
    plan = []
    for n, student in enumerate(ranked[:-1]):
        teachers = ranked[-1:] if kd.teachers == "strongest" else ranked[n + 1 :]
        if kd.order == "strongest_first":
            teachers = teachers[::-1]
        elif kd.order == "random":
            shuffled = torch.randperm(len(teachers), generator=generator(seed, "kd", "teachers", student))
            teachers = [teachers[i] for i in shuffled.tolist()]
        plan += [(teacher, student) for teacher in teachers]
    return plan


def distil(
    model: MultimodalModel,
    dataset: MultimodalDataset,
    unimodal: UnimodalModels,
    kd: KDConfig,
    *,
    seed: int,
    nonfinite: str = "stop",
    stage: Stage | None = None,
) -> list[dict[str, Any]]:
    """Pretrain the encoders of the weaker modalities of ``model`` in place; returns what was done, pair by pair.

    Only train rows that have both modalities are used. The teacher (a unimodal model) is frozen; it meets the student's
    encoder in ``kd.loss``, for :func:`info_nce` behind two linear projections to ``embedding_dim``. All maps between
    the two are dropped afterwards. ``nonfinite``: "stop" or "skip" a batch whose loss is NaN or infinite. ``stage``:
    how it reports and saves.

    Raises:
        InputError: fewer than two modalities.
        TrainingDiverged: a loss became NaN or infinite.
        Interrupted: the guard saw a signal; saved where the stage has a store.
    """
    if len(dataset.modalities) < 2:
        raise InputError(f"kd needs at least 2 modalities and {dataset.name} has {len(dataset.modalities)}")
    work = _Distillation(model, dataset, unimodal, kd, seed, nonfinite == "skip")
    stage = stage or Stage("distillation")
    if stage.checkpoint is not None:
        work.restore(stage.checkpoint)
    work.run(Autosave(stage, work.state))
    return work.done


class _Distillation:
    """The pairs of the plan one after another, and everything that a checkpoint between two steps holds."""

    def __init__(
        self,
        model: MultimodalModel,
        dataset: MultimodalDataset,
        unimodal: UnimodalModels,
        kd: KDConfig,
        seed: int,
        skip: bool,
    ) -> None:
        self.model, self.unimodal, self.kd, self.seed, self.skip = model, unimodal, kd, seed, skip
        self.names = dataset.modalities
        self.device = model.prior.device
        self.train = to_device(dataset.part("train"), self.device)
        self.rounds = _rounds(teaching_plan(unimodal, kd, seed), kd)
        self.done: list[dict[str, Any]] = []
        self.pair: _Pair | None = None

    def state(self) -> tuple[Checkpoint, int, int]:
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {"done": self.done, "pair": None}
        if self.pair is not None:
            tensors, meta["pair"] = self.pair.state()
        epoch, step = (0, 0) if self.pair is None else (self.pair.epoch, self.pair.step)
        return Checkpoint(self.model.state_dict(), tensors, meta), len(self.done) * self.kd.epochs + epoch, step

    def restore(self, checkpoint: Checkpoint) -> None:
        with fits_checkpoint("distillation"):
            check_like(checkpoint.weights, self.model.state_dict())
            if len(checkpoint.meta["done"]) + (checkpoint.meta["pair"] is not None) > len(self.rounds):
                raise ValueError(f"it has done {len(checkpoint.meta['done'])} rounds of {len(self.rounds)}")
            self.model.load_state_dict(checkpoint.weights)
            self.done = checkpoint.meta["done"]
            if checkpoint.meta["pair"] is not None:
                self.pair = self._pair()
                self.pair.restore(checkpoint.tensors, checkpoint.meta["pair"])

    def _pair(self) -> _Pair:
        teachers, student = self.rounds[len(self.done)]
        t, s = [self.names.index(teacher) for teacher in teachers], self.names.index(student)
        both = self.train.present[:, t].any(1) & self.train.present[:, s]
        if int(both.sum()) < 2:
            raise InputError(
                f"kd: {int(both.sum())} train row(s) have both {_joined(teachers)} and {student}; 2 or more are needed"
            )
        return _Pair(self, teachers, student, t, s, both)

    def run(self, autosave: Autosave) -> None:
        while len(self.done) < len(self.rounds):
            self.pair = self.pair or self._pair()
            pair = self.pair
            while pair.epoch < self.kd.epochs:
                pair.train_epoch(autosave)
                record = {"stage": "distillation", "epoch": pair.epoch, "loss": pair.losses[-1]}
                autosave.stage.on_epoch(record | {"teacher": pair.teacher, "student": pair.student})
                autosave.after_epoch()
            self.done.append({"teacher": pair.teacher, "student": pair.student, "loss": pair.losses})
            self.pair = None


def _rounds(plan: list[tuple[str, str]], kd: KDConfig) -> list[tuple[list[str], str]]:
    """Teachers and student of every round: one teacher, or all of a student's with ``order="simultaneous"``."""
    if kd.order != "simultaneous":
        return [([teacher], student) for teacher, student in plan]
    return [([t for t, s in plan if s == student], student) for student in dict.fromkeys(s for _, s in plan)]


def _joined(teachers: list[str]) -> str:
    return " + ".join(teachers)


class _Pair:
    """The teachers of a round (one, unless simultaneous), one student, what maps between them, and the optimiser."""

    def __init__(
        self, work: _Distillation, teachers: list[str], student: str, t: list[int], s: int, both: Tensor
    ) -> None:
        self.work, self.teacher, self.student = work, _joined(teachers), student
        kd, model, train = work.kd, work.model, work.train
        self.encoder = model.encoders[s]
        models = [work.unimodal.models[name].to(work.device) for name in teachers]
        self.teaching: list[nn.Module] = [m if kd.loss == "kl" else m.encoder for m in models]
        self.there = [train.present[both, column] for column in t]
        if train.streamed:
            self.rows = both.nonzero().flatten()
            self.taught, self.seen = [train.features[column] for column in t], train.features[s]
        else:
            with torch.no_grad():
                pairs = zip(self.teaching, t, strict=True)
                self.targets = [teaching(train.features[column][both]) for teaching, column in pairs]
            self.x = train.features[s][both]
        self.count = int(both.sum())
        self.students: list[nn.Module] = []
        self.readers: list[nn.Module] = []
        for name, teacher in zip(teachers, models, strict=True):
            width = int(teacher.encoder.out_dim)
            given = {"info_nce": kd.embedding_dim, "mse": width, "kl": model.num_classes}[kd.loss]
            with seeded_init(work.seed, "kd", "init", name, student):
                self.students.append(nn.Linear(model.widths[s], given).to(work.device))
                if kd.loss == "info_nce":
                    self.readers.append(nn.Linear(width, given).to(work.device))
        both_sides = zip(self.students, self.readers, strict=True) if self.readers else zip(self.students, strict=True)
        self.projections = nn.ModuleList(module for side in both_sides for module in side)
        moving = [*self.encoder.parameters(), *self.projections.parameters()]
        self.optimizer = torch.optim.Adam(moving, lr=kd.lr, fused=True)
        self.order_of = generator(work.seed, "kd", "order", self.teacher, student)
        self.order: Tensor | None = None  # row order of the epoch that runs
        self.losses: list[float] = []  # one per epoch done
        self.epoch = self.step = 0
        self.total, self.counted = 0.0, 0  # loss summed over the rows of the epoch that runs

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = prefixed("optimizer", optimizer_tensors(self.optimizer))
        tensors |= prefixed("projections", self.projections.state_dict()) | {"generator": self.order_of.get_state()}
        if self.order is not None:
            tensors["order"] = self.order
        meta = {"epoch": self.epoch, "step": self.step, "losses": self.losses}
        return tensors, meta | {"total": self.total, "counted": self.counted}

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        expected = prefixed("optimizer", moments_like(self.optimizer, stripped("optimizer", tensors)))
        expected |= prefixed("projections", self.projections.state_dict()) | {"generator": self.order_of.get_state()}
        expected["order"] = torch.zeros(self.count, dtype=torch.int64)
        check_like(tensors, expected, optional=("order",))
        check_rows(tensors.get("order"), self.count)
        steps = -(-self.count // self.work.kd.batch_size) if "order" in tensors else 0
        if meta["step"] > steps or not len(meta["losses"]) == meta["epoch"] <= self.work.kd.epochs:
            raise ValueError(f"it stands at step {meta['step']} after epoch {meta['epoch']}")
        restore_optimizer(self.optimizer, stripped("optimizer", tensors))
        self.projections.load_state_dict(stripped("projections", tensors))
        self.order_of.set_state(tensors["generator"])
        self.order = tensors.get("order")
        self.epoch, self.step, self.losses = meta["epoch"], meta["step"], meta["losses"]
        self.total, self.counted = meta["total"], meta["counted"]

    def train_epoch(self, autosave: Autosave) -> None:
        if self.order is None:
            self.order = epoch_order(self.count, self.order_of)
        batches = self.order.to(self.work.device).split(self.work.kd.batch_size)
        while self.step < len(batches):
            if len(batches[self.step]) >= 2:
                self._train_step(*self._rows(batches[self.step]))
            self.step += 1
            if self.step < len(batches):
                autosave.after_step()
        if not self.counted:
            raise TrainingDiverged(
                f"every batch of distillation epoch {self.epoch + 1} ({self.teacher} to {self.student}) was skipped; "
                "lower kd.lr or rescale the features"
            )
        self.losses.append(self.total / self.counted)
        self.order, self.step, self.epoch = None, 0, self.epoch + 1
        self.total, self.counted = 0.0, 0

    def _rows(self, rows: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        there = [t[rows] for t in self.there]
        if not self.work.train.streamed:
            return self.x[rows], [target[rows] for target in self.targets], there
        chosen = self.rows[rows]
        with torch.no_grad():
            pairs = zip(self.teaching, self.taught, strict=True)
            return self.seen[chosen], [teaching(x[chosen]) for teaching, x in pairs], there

    def _lesson(self, n: int, z: Tensor, target: Tensor) -> Tensor:
        """Loss of the student's features ``z`` against what teacher ``n`` says on the same rows."""
        kd, found = self.work.kd, self.students[n](z)
        if kd.loss == "mse":
            return F.mse_loss(found, target)
        if kd.loss == "kl":
            t = kd.kl_temperature
            return t * t * self.work.model.task.divergence(found / t, target / t) / len(found)
        return info_nce(F.normalize(found, dim=-1), F.normalize(self.readers[n](target), dim=-1), kd.temperature)

    def _train_step(self, x: Tensor, targets: list[Tensor], there: list[Tensor]) -> None:
        z = self.encoder(x)
        lessons = []
        for n, (target, here) in enumerate(zip(targets, there, strict=True)):
            if bool(here.all()):
                lessons.append(self._lesson(n, z, target))
            elif int(here.sum()) >= 2:
                lessons.append(self._lesson(n, z[here], target[here]))
        if not lessons:
            return
        loss = torch.stack(lessons).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            if self.work.skip:
                return
            raise TrainingDiverged(
                f"the loss of distillation ({self.teacher} to {self.student}) became {value} in epoch "
                f"{self.epoch + 1}, step {self.step + 1}; lower kd.lr or rescale the features"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.total, self.counted = self.total + value * len(x), self.counted + len(x)
