"""What a finished run says of itself: the figures of the game, its label, and the content of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmc_fast import __version__

from ..data.dataset import PARTS
from .distillation import teaching_plan
from .environment import environment
from .game import fresh_discriminator, parameter_distance
from .model import MultimodalModel
from .parts import to_device
from .substitution import describe
from .trainer import Trainer
from .unimodal import UnimodalModels

__all__ = ["SCHEMA_VERSION", "game_figures", "results_of"]

SCHEMA_VERSION = 1


def game_figures(run: Trainer, twin: Trainer | None, trivial: bool) -> dict[str, Any] | None:
    """Whether the game was played and what it changed; None without EBR. ``trivial``: lambda can change nothing."""
    if run.config.ebr is None:
        return None
    parts = [to_device(run.dataset.part(name), run.device) for name in ("train", "validation")]

    def judge(model: MultimodalModel) -> dict[str, Any] | None:
        return fresh_discriminator(model, parts[0], parts[1], run.seed)

    distance: float | None = 0.0 if trivial else None
    control = None
    if twin is not None:
        names = [n for n, _ in run.model.named_parameters() if not n.startswith("head.discriminator.")]
        distance = parameter_distance(run.last_weights, twin.last_weights, names)
        control = {
            "fresh_discriminator": judge(twin.model),
            "best_epoch": twin.best_epoch,
            "best_val_score": twin.best_score,
        }
    return {
        "lambda": run.config.ebr.reversal,
        "fresh_discriminator": judge(run.model),
        "distance_to_lambda0": distance,
        "first_active_epoch": run.first_pull,
        "adversarial_stopped_after": run.stop.stopped_after,
        "control": control,
    }


def results_of(
    run: Trainer,
    *,
    game: dict[str, Any] | None,
    trivial: bool,
    scores: Sequence[dict[str, Any]],
    unimodal: UnimodalModels | None,
    data: Mapping[str, Any],
    ran_before: dict[str, int],
    timing: Mapping[str, float],
) -> dict[str, Any]:
    """The content of results.json; docs/training.md describes every key."""
    config, dataset = run.config, run.dataset
    sizes = {name: int((dataset.split == code).sum()) for code, name in enumerate(PARTS)}
    about = {"sizes": sizes, "modalities": dataset.modalities, "info": _jsonable(dataset.info)}
    distillation = None
    if config.kd is not None and unimodal is not None:
        plan = teaching_plan(unimodal, config.kd, run.seed)
        distillation = {"plan": [list(pair) for pair in plan], "pairs": run.about.get("distilled")}
    return {
        "schema_version": SCHEMA_VERSION,
        "mmc_fast_version": __version__,
        "method": config.method,
        "label": _label(run, game, trivial),
        "data": {**data, **about},
        "config": config.to_dict(),
        "seed": run.seed,
        "environment": environment(run.model, ran_before) | {"processes": run.world.size},
        "history": run.history,
        "selected_epoch": run.best_epoch,
        "selected_val_score": run.history[run.best_epoch - 1]["val_score"],
        "game": game,
        "ranking": describe(run.model, run.reference),
        "unimodal": None if unimodal is None else unimodal.scores,
        "distillation": distillation,
        "scores": scores[0] if scores else None,
        "other_scores": {s["part"]: s for s in scores[1:]},
        "timing": dict(timing),
    }


def _label(run: Trainer, game: dict[str, Any] | None, trivial: bool) -> str:
    """The method's name, or "inactive" for an EBR run that lambda did not change."""
    if game is None:
        return run.config.method
    # Selected before the first reversed gradient, the model is that of the control run, whatever came later.
    played = run.first_pull is not None and run.best_epoch >= run.first_pull
    active = played and not trivial and game["distance_to_lambda0"] != 0.0
    return run.config.method if active else "inactive"


def _jsonable(value: Any) -> Any:
    """Plain JSON values; what JSON does not know becomes text."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, Tensor):
        return _jsonable(value.tolist())
    finite = not isinstance(value, float) or (value == value and abs(value) != float("inf"))
    return value if isinstance(value, (str, int, float, bool, type(None))) and finite else str(value)
