"""Methods that the standard loop covers, by settings alone; and the best unimodal model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..training import TrainConfig, predict, train
from ..training.progress import Silent
from .base import Fitted, Method, Settings, Task, prior, unimodal_models

LEARNING_RATES = tuple({"lr": lr, "weight_decay": decay} for decay in (0.0, 1e-4) for lr in (1e-3, 3e-4))
SMALL_HEADS: dict[str, Any] = {"hidden_dim": 128, "latent_dim": 64, "psi_dims": [64, 32]}
_PAPER = "Chaudhuri et al., ICML 2025"


def fit_standard(task: Task) -> Fitted:
    """:func:`mmc_fast.experiments.training.train` with the settings of the task."""
    result = train(task.dataset, task.config, seed=task.seed, progress=task.progress, evaluate_on=(), distributed=False)
    model, results = result.model, result.results

    def answer(features: Sequence[Tensor], present: Tensor) -> Tensor:
        return predict(model, features, present)

    record: dict[str, Any] = {"label": results["label"], "selected_epoch": results["selected_epoch"]}
    record |= {"val_score": results["selected_val_score"], "unimodal": results["unimodal"]}
    record |= {"distillation": results["distillation"], "backend": results["environment"]["ebr_backend"]}
    if results["adversarial"] is not None:
        record["modality_probe"] = results["adversarial"]["modality_probe"]
    return Fitted(answer, prior(task.dataset), None, record)


def fit_unimodal(task: Task) -> Fitted:
    """One model per modality; the strongest one that a row has answers for it."""
    dataset = task.dataset
    (task.progress or Silent()).on_start(task.config.unimodal_epochs, "unimodal")
    models = unimodal_models(task)

    def answer(features: Sequence[Tensor], present: Tensor) -> Tensor:
        result = models.task.answers(torch.zeros(len(present), dataset.task.outputs))
        for name in models.weakest_first():  # a stronger one overwrites what a weaker one said
            column = dataset.modalities.index(name)
            rows = present[:, column].nonzero().flatten()
            if len(rows):
                result[rows] = models.predict(name, features[column][rows])
        return result

    record = {"val_score": models.scores[models.strongest], "unimodal": models.scores, "strongest": models.strongest}
    return Fitted(answer, prior(dataset), None, record)


def _method(name: str, title: str, source: str, search: Sequence[Settings], fixed: Settings | None = None) -> Method:
    return Method(name, title, source, fit_standard, tuple(search), fixed or {})


def distilled(section: dict[str, Any]) -> dict[str, Any]:
    """Settings that put distillation before a run."""
    return {"kd": section, "unimodal_share": 0.3}


def _distillation(name: str, title: str, **section: Any) -> Method:
    search = [{"lr": lr, "kd": {"epochs": n}} for lr in (1e-3, 3e-4) for n in (10, 5)]
    return _method(name, title, _PAPER, search, distilled(section))


def robust_heads() -> dict[str, Any]:
    """The ``ebr`` section of the robust form."""
    return SMALL_HEADS | {
        "residual": True, "normalize": True, "substitute": "mean", "reversal": 0.1, "cross_recovery": 0.1
    }  # fmt: skip


_PLAIN = SMALL_HEADS | {"residual": False, "normalize": False, "substitute": "ranked", "ranking": "reference"}
KD = _distillation("kd", "KD (InfoNCE)", loss="info_nce", teachers="stronger", order="weakest_first")

_LEARNER: dict[str, Any] = {
    name: getattr(TrainConfig.preset("recommended"), name)
    for name in ("encoder_norm", "encoder_dropout", "optimizer", "weight_decay", "weight_average", "experts")
} | {"unimodal_share": 1.0}

STANDARD = (
    _method("vanilla", "vanilla", "the standard loop without additions", LEARNING_RATES),
    Method(
        "unimodal",
        "best unimodal",
        "the standard unimodal models",
        fit_unimodal,
        LEARNING_RATES,
        {"unimodal_share": 1.0},
    ),
    _method(
        "dropout",
        "modality dropout",
        "Neverova et al., ModDrop, TPAMI 2016",
        [{"modality_dropout": p, "lr": lr} for lr in (1e-3, 3e-4) for p in (0.5, 0.3)],
    ),
    _method(
        "consistency",
        "modality dropout + consistency",
        "masked predictions are held to complete ones (docs/experiments/study.md)",
        [{"modality_dropout": p, "consistency": c} for c in (1.0, 3.0) for p in (0.5, 0.3)],
    ),
    _method("late", "late fusion", "decision averaging", LEARNING_RATES, {"fusion": "late"}),
    _method(
        "transformer",
        "masked transformer + consistency",
        "late-fusion transformer as in Rheude et al. 2025, with modality dropout and consistency",
        [{"consistency": c, "modality_dropout": p} for c in (1.0, 0.0) for p in (0.5, 0.3)],
        {"fusion": "transformer"},
    ),
    KD,
    _distillation("kd-kl", "KD (KL)", loss="kl", teachers="stronger", order="weakest_first"),
    _distillation("kd-mse", "KD (feature MSE)", loss="mse", teachers="stronger", order="weakest_first"),
    _distillation("kd-strongest-first", "KD, strongest to weakest", teachers="stronger", order="strongest_first"),
    _distillation("kd-random", "KD, random order", teachers="stronger", order="random"),
    _distillation("kd-simultaneous", "KD, simultaneous", teachers="stronger", order="simultaneous"),
    _distillation("kd-strongest", "KD, strongest only", teachers="strongest"),
    _method(
        "ebr-paper",
        "EBR (paper)",
        _PAPER,
        [
            {"ebr": {"reversal": 0.01}},
            {"ebr": {"reversal": 0.1}},
            {"ebr": {"reversal": 1.0}},
            {"ebr": {"reversal": 0.01, "schedule": "interleave", "interleave_epochs": 2}},
        ],
        {"ebr": _PLAIN, "unimodal_share": 0.3},
    ),
    _method(
        "ebr-slides",
        "EBR (slides)",
        f"{_PAPER}, talk slides",
        [{"ebr": {"reversal": v, "reconstruction": r}} for r in (1.0, 0.1) for v in (0.01, 0.1)],
        {"ebr": _PLAIN | {"patience": 5}, "unimodal_share": 0.3},
    ),
    _method(
        "ebr-robust",
        "EBR robust",
        f"{_PAPER}, in the form of docs/experiments/study.md",
        [{}, {"ebr": {"cross_recovery": 0.0}}, {"consistency": 3.0}, {"fusion": "transformer"}],
        {"ebr": robust_heads(), "modality_dropout": 0.5, "substitute_in_training": True, "consistency": 1.0},
    ),
    _method(
        "recommended",
        "recommended learner",
        "modality dropout and consistency with the learner of docs/experiments/learner.md",
        [{"modality_dropout": p, "consistency": c} for c in (1.0, 3.0) for p in (0.5, 0.3)],
        _LEARNER,
    ),
    _method(
        "transformer-learner",
        "masked transformer + consistency, recommended learner",
        "late-fusion transformer as in Rheude et al. 2025, with the learner of docs/experiments/learner.md",
        [{"consistency": c, "modality_dropout": p} for c in (1.0, 0.0) for p in (0.5, 0.3)],
        _LEARNER | {"fusion": "transformer"},
    ),
    _method(
        "ebr-best",
        "EBR, recommended learner",
        f"{_PAPER}, with the learner of docs/experiments/learner.md",
        [{}, {"ebr": {"reversal": 0.0}}, {"consistency": 3.0}, {"modality_dropout": 0.3}],
        _LEARNER
        | {
            "ebr": robust_heads() | {"cross_recovery": 0.0},
            "modality_dropout": 0.5,
            "substitute_in_training": True,
            "consistency": 1.0,
        },
    ),
)
