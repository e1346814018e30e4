"""Cross-modal distillation: encoders of weak modalities learn to agree with frozen encoders of strong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import MultimodalDataset, Part
from ..errors import InputError
from .config import KDConfig
from .masks import epoch_order
from .model import MultimodalModel
from .parts import to_device
from .seeds import generator, seeded_init
from .unimodal import UnimodalModels

__all__ = ["distil", "info_nce", "teaching_plan"]


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
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Pretrain the encoders of the weaker modalities of ``model`` in place; returns what was done, pair by pair.

    Only train rows that have both modalities are used. The teacher (a unimodal encoder) is frozen; its features, the
    student's encoder and two linear projections to ``embedding_dim`` meet in :func:`info_nce`. The projections are
    dropped afterwards.

    Raises:
        InputError: fewer than two modalities.
    """
    if len(dataset.modalities) < 2:
        raise InputError(f"kd needs at least 2 modalities and {dataset.name} has {len(dataset.modalities)}")
    train = to_device(dataset.part("train"), model.class_prior.device)
    done = []
    for teacher, student in teaching_plan(unimodal, kd, seed):
        losses = _distil_pair(model, train, dataset.modalities, teacher, student, unimodal, kd, seed, on_epoch)
        done.append({"teacher": teacher, "student": student, "loss": losses})
    return done


def _distil_pair(
    model: MultimodalModel,
    train: Part,
    names: list[str],
    teacher: str,
    student: str,
    unimodal: UnimodalModels,
    kd: KDConfig,
    seed: int,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> list[float]:
    device = model.class_prior.device
    t, s = names.index(teacher), names.index(student)
    both = train.present[:, t] & train.present[:, s]
    if int(both.sum()) < 2:
        raise InputError(f"kd: {int(both.sum())} train row(s) have both {teacher} and {student}; 2 or more are needed")
    with torch.no_grad():
        target = unimodal.models[teacher].encoder.to(device)(train.features[t][both])
    x = train.features[s][both]
    encoder = model.encoders[s]
    with seeded_init(seed, "kd", "init", teacher, student):
        project_student = nn.Linear(model.widths[s], kd.embedding_dim).to(device)
        project_teacher = nn.Linear(target.shape[1], kd.embedding_dim).to(device)
    moving = [*encoder.parameters(), *project_student.parameters(), *project_teacher.parameters()]
    optimizer = torch.optim.Adam(moving, lr=kd.lr, fused=True)
    order_of = generator(seed, "kd", "order", teacher, student)
    losses = []
    for epoch in range(kd.epochs):
        total, seen = 0.0, 0
        for rows in epoch_order(len(x), order_of).to(device).split(kd.batch_size):
            if len(rows) < 2:
                continue
            a = F.normalize(project_student(encoder(x[rows])), dim=-1)
            b = F.normalize(project_teacher(target[rows]), dim=-1)
            loss = info_nce(a, b, kd.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, seen = total + float(loss.detach()) * len(rows), seen + len(rows)
        losses.append(total / seen)
        if on_epoch is not None:
            on_epoch(
                {
                    "stage": "distillation",
                    "epoch": epoch + 1,
                    "loss": losses[-1],
                    "teacher": teacher,
                    "student": student,
                }
            )
    return losses
