"""What a finished run says of itself: figures of the adversarial training, its label, the content of results.json."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy
import sklearn
import torch
from torch import Tensor
from typing_extensions import TypedDict

from mmc_fast import __version__
from mmc_fast._util.documents import Count0, Finite
from mmc_fast.ops.dispatch import ran
from mmc_fast.ops.ebr import products

from ..data.dataset import PARTS
from .adversarial import parameter_distance, post_hoc_probe
from .distillation import teaching_plan
from .model import MultimodalModel
from .parts import to_device
from .substitution import describe
from .trainer import Trainer
from .unimodal import UnimodalModels

SCHEMA_VERSION = 2


class _DataResults(TypedDict):
    name: str
    fingerprint: str
    dims: dict[str, int]
    task: dict[str, Any]
    metric: str
    sizes: dict[str, int]
    modalities: list[str]
    info: dict[str, Any]


class _Missing(TypedDict):
    rate: Finite
    realised: list[Finite]
    score: Finite | None


class _Scores(TypedDict):
    part: str
    metric: str
    rows: Count0
    complete: Finite | None
    missing: list[_Missing]
    mean_missing: Finite | None


class RunResults(TypedDict):
    """The form of results.json, as far as something here reads it."""

    schema_version: Literal[2]
    mmc_fast_version: str
    method: str
    label: str
    data: _DataResults
    config: dict[str, Any]
    seed: Count0
    environment: dict[str, Any]
    history: list[dict[str, Any]]
    selected_epoch: Count0
    selected_val_score: Finite
    adversarial: dict[str, Any] | None
    unimodal: dict[str, Finite] | None
    scores: _Scores | None
    other_scores: dict[str, _Scores]
    timing: dict[str, Finite]


def adversarial_figures(run: Trainer, control: Trainer | None, trivial: bool) -> dict[str, Any] | None:
    """What the adversarial training changed; None without EBR. ``trivial``: λ can change nothing."""
    if run.config.ebr is None:
        return None
    parts = [to_device(run.dataset.part(name), run.device) for name in ("train", "validation")]

    def probed(model: MultimodalModel) -> dict[str, Any] | None:
        return post_hoc_probe(model, parts[0], parts[1], run.seed)

    distance: float | None = 0.0 if trivial else None
    found = None
    if control is not None:
        names = [n for n, _ in run.model.named_parameters() if not n.startswith("head.discriminator.")]
        distance = parameter_distance(run.last_weights, control.last_weights, names)
        best = {"best_epoch": control.best_epoch, "best_val_score": _selected_score(control)}
        found = {"modality_probe": probed(control.model)} | best
    return {
        "lambda": run.config.ebr.reversal,
        "modality_probe": probed(run.model),
        "distance_to_lambda0": distance,
        "first_active_epoch": run.first_active,
        "stopped_after": run.stop.stopped_after,
        "control": found,
    }


def environment(model: MultimodalModel, before: Mapping[str, int]) -> dict[str, Any]:
    """What a result depends on besides settings and data: versions, machine, threads, device, backends of the EBR step.

    ``before``: :func:`mmc_fast.ops.dispatch.ran` at the start of the run. "ebr_backend" says what did the work, such as
    "cpp/avx512", not what was asked for; None where the step never ran. "ebr_products": how the native step multiplies.
    """
    device, prefix = model.prior.device, "ebr_step/"
    used = [n.removeprefix(prefix) for n, k in ran().items() if n.startswith(prefix) and k > before.get(n, 0)]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scikit_learn": sklearn.__version__,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "ebr_backend": " and ".join(used) or None,
        "ebr_products": products.stored(),
    }


def results_of(
    run: Trainer,
    *,
    adversarial: dict[str, Any] | None,
    trivial: bool,
    scores: Sequence[dict[str, Any]],
    unimodal: UnimodalModels | None,
    data: Mapping[str, Any],
    ran_before: dict[str, int],
    timing: Mapping[str, float],
) -> dict[str, Any]:
    """The content of results.json; docs/experiments/training.md describes every key."""
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
        "label": _label(run, adversarial, trivial),
        "data": {**data, **about},
        "config": config.to_dict(),
        "seed": run.seed,
        "environment": environment(run.model, ran_before) | {"processes": run.processes.size},
        "history": run.history,
        "selected_epoch": run.best_epoch,
        "selected_val_score": _selected_score(run),
        "adversarial": adversarial,
        "ranking": describe(run.model, run.reference),
        "unimodal": None if unimodal is None else unimodal.scores,
        "distillation": distillation,
        "scores": scores[0] if scores else None,
        "other_scores": {s["part"]: s for s in scores[1:]},
        "timing": dict(timing),
    }


def _selected_score(run: Trainer) -> float:
    """On complete validation data, whatever the epoch was selected by."""
    score: float = run.history[run.best_epoch - 1]["val_score"]
    return score


def _label(run: Trainer, adversarial: dict[str, Any] | None, trivial: bool) -> str:
    """The method's name, or "without-effect" for an EBR run that λ did not change."""
    if adversarial is None:
        return run.config.method
    # Selected before the first reversed gradient, the model is that of the λ = 0 control, whatever came later.
    reached = run.first_active is not None and run.best_epoch >= run.first_active
    effect = reached and not trivial and adversarial["distance_to_lambda0"] != 0.0
    return run.config.method if effect else "without-effect"


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
