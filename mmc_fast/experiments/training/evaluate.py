"""Scores of a finished model on one part: complete data, missing rates, reliance on single modalities."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmc_fast._util.names import unknown
from mmc_fast._util.seeds import generator
from mmc_fast.diagnose import diagnose
from mmc_fast.diagnose.result import plain
from mmc_fast.errors import InputError

from ..data import MultimodalDataset, Part, mcar
from ..data.dataset import PARTS
from .adapter import RunAdapter
from .model import MultimodalModel
from .parts import row_pieces
from .substitution import fills
from .unimodal import UnimodalModels

RATES = (0.1, 0.2, 0.3, 0.4, 0.7)
_BATCH = 4096  # rows at a time, fewer where they are wider than 1024
_VALUES = _BATCH * 1024


@torch.no_grad()
def predict(
    model: MultimodalModel,
    features: Sequence[Tensor],
    present: Tensor,
    *,
    on_empty: str = "error",
) -> Tensor:
    """Answers of the task ``[N, A]`` on the CPU; absent modalities are substituted by the model's rule.

    Args:
        features: one ``[N, d_i]`` per modality. present: bool ``[N, m]``; absent rows are never read.
        on_empty: for rows with nothing present: "error", or "prior" to answer with what is best
            for all rows of the train part alike (class shares, mean target).

    Raises:
        InputError: rows with nothing present under ``on_empty="error"``, or an unknown ``on_empty``.
    """
    if on_empty not in ("error", "prior"):
        raise unknown("on_empty", on_empty, ("error", "prior"))
    empty = ~present.any(1)
    if on_empty == "error" and empty.any():
        raise InputError(
            f"{int(empty.sum())} of {len(empty)} rows have no modality present (the first is row "
            f"{int(empty.nonzero()[0])}); drop them or ask for on_empty='prior'"
        )
    was_training, task = model.training, model.task
    model.eval()
    device = model.prior.device
    out = []
    size = max(1, min(_BATCH, _VALUES // max(x.shape[1] for x in features)))
    for start in range(0, len(present), size):
        rows = slice(start, start + size)
        here: Tensor | None = present[rows].to(device)
        some = [x[rows].to(device) for x in features]
        if here is None or bool(here.all()):
            out.append(task.answers(model(some).logits).cpu())
            continue
        total, count = torch.zeros((), device=device), torch.zeros((), device=device)
        for source, chosen in fills(model, here):
            weight = chosen[:, None].float()
            total = total + weight * task.answers(model(some, here, source).logits)
            count = count + weight
        out.append((total / count).cpu())
    model.train(was_training)
    answers = torch.cat(out) if out else task.answers(torch.zeros(0, task.outputs))
    return torch.where(empty[:, None], task.answers(model.prior.cpu()[None]), answers)


def masks_at(
    present: Tensor, rate: float, seed: int, part: str, column: int | None = None
) -> tuple[Tensor, list[float]]:
    """Presence at an MCAR missing rate, and the realised rates; a function of the arguments only.

    ``column``: the one modality that is hidden; None: each, independently.
    """
    nominal = rate if column is None else [rate if i == column else 0.0 for i in range(present.shape[1])]
    drawn = mcar(present, nominal, generator(seed, "missing", part, repr(float(rate))))
    return drawn.present, drawn.realised


def hidden_column(dataset: MultimodalDataset, modality: str | None) -> int | None:
    """Column of the modality that missing rates hide; None for each. Raises InputError for an unknown name."""
    if modality is None:
        return None
    if modality not in dataset.modalities:
        raise unknown("rates_modality", modality, dataset.modalities)
    return dataset.modalities.index(modality)


@dataclass
class Predictions:
    """Per-sample answers ``[N, A]`` behind the scores (class probabilities, ...) by condition, labels, data set rows."""

    part: str
    labels: Tensor
    index: Tensor
    answers: dict[str, Tensor] = field(default_factory=dict)


def evaluate(
    model: MultimodalModel,
    dataset: MultimodalDataset,
    *,
    part: str = "test",
    rates: Sequence[float] = RATES,
    seed: int = 0,
    unimodal: UnimodalModels | None = None,
    reliance: bool = True,
    on_empty: str = "error",
    rates_modality: str | None = None,
) -> dict[str, Any]:
    """Score ``model`` on one part of ``dataset``.

    Args:
        part: "train", "validation" or "test".
        rates: missing rates, each in [0, 1).
        seed: of the masks, which depend on ``seed``, part and rate only: methods with the same seed meet the same masks.
        unimodal: the unimodal models of the run, for the column "unimodal".
        reliance: measure the reliance on each modality.
        on_empty: what a row with nothing present gets: "error", or "prior" (the class shares of the train part).
        rates_modality: the one modality that the rates hide; None: each, independently.

    Returns a dict: "complete" (the score with natural presence only), "missing" (for each rate "rate", "realised" per
    modality and "score"), "mean_missing" (their mean), "reliance" (for each modality "unimodal": its unimodal model on the
    rows that have it, None without ``unimodal``; and what :func:`mmc_fast.diagnose` says of it on this part: scores "leave_one_out",
    "single_modality", with it "shuffled", its "shapley" value, the "verdict" and its "evidence"); under auroc also "complete_auprc" and
    an "auprc" for each rate, under accuracy "macro_f1" and "macro_auroc" (one class against the others) in the same way.

    Raises:
        InputError: unknown part, a rate outside [0, 1), a data set of other modalities than the model's.
    """
    return measure(model, dataset, part, rates, seed, unimodal, reliance, on_empty, rates_modality)[0]


def measure(
    model: MultimodalModel,
    dataset: MultimodalDataset,
    part: str,
    rates: Sequence[float],
    seed: int,
    unimodal: UnimodalModels | None,
    reliance: bool,
    on_empty: str,
    rates_modality: str | None = None,
) -> tuple[dict[str, Any], Predictions]:
    """:func:`evaluate` together with the predictions behind its scores."""
    if part not in PARTS:
        raise unknown("part", part, PARTS)
    check_fits(model, dataset)
    rows = dataset.part(part)
    task = model.task
    found = Predictions(part, rows.labels, rows.index)

    def scored(name: str, features: Sequence[Tensor], present: Tensor) -> dict[str, float]:
        probabilities = predict(model, features, present, on_empty=on_empty)
        found.answers[name] = probabilities
        return task.scores(probabilities, rows.labels)

    complete = scored("complete", rows.features, rows.present)
    result: dict[str, Any] = {"part": part, "metric": task.metric, "rows": len(rows), "complete": complete["score"]}
    result |= {f"complete_{name}": value for name, value in complete.items() if name != "score"}
    missing: list[dict[str, Any]] = []
    column = hidden_column(dataset, rates_modality)
    for rate in rates:
        present, realised = masks_at(rows.present, rate, seed, part, column)
        missing.append(
            {"rate": float(rate), "realised": realised} | scored(f"missing_{rate:g}", rows.features, present)
        )
    result["missing"] = missing
    result["mean_missing"] = statistics.fmean(m["score"] for m in missing) if missing else None
    if reliance:
        result["reliance"] = _reliance(model, rows, unimodal, found)
    return result, found


_MEASURES = {"leave_one_out": "without", "single_modality": "only", "shuffled": "shuffled", "shapley": "shapley"}
"""Key of an entry under "reliance" -> measure of the diagnosis."""


def _reliance(
    model: MultimodalModel, rows: Part, unimodal: UnimodalModels | None, found: Predictions
) -> dict[str, Any]:
    """The measurement of :func:`mmc_fast.diagnose` on the same rows, without AGOP and probes."""
    known = {} if unimodal is None else _alone(rows, unimodal, found)
    was_training = model.training
    d = diagnose(RunAdapter(model, unimodal), rows, metric=model.task.metric, agop=False, probes=False)
    model.train(was_training)
    result: dict[str, Any] = {}
    for i, verdict in enumerate(d.verdicts):
        name = verdict.modality
        entry = known.get(name, {"unimodal": None, "unimodal_rows": int(rows.present[:, i].sum())})
        entry |= {key: d.value(f"{kind}.{name}") for key, kind in _MEASURES.items()}
        result[name] = entry | {"verdict": verdict.kind, "evidence": plain(verdict.evidence)}
    return result


def _alone(rows: Part, unimodal: UnimodalModels, found: Predictions) -> dict[str, dict[str, Any]]:
    """The score of each unimodal model on the rows that have its modality; its predictions are kept."""
    result = {}
    for i, name in enumerate(unimodal.models):
        here = rows.present[:, i]
        entry: dict[str, Any] = {"unimodal": None, "unimodal_rows": int(here.sum())}
        if entry["unimodal_rows"]:
            pieces = [unimodal.predict(name, rows.features[i][some]) for some in row_pieces(rows, here)]
            probabilities = torch.cat(pieces)
            found.answers[f"unimodal_{name}"] = _spread(probabilities, here)
            labels = rows.labels[here]
            if unimodal.task.scorable(labels):
                entry["unimodal"] = unimodal.task.score(probabilities, labels)
        result[name] = entry
    return result


def _spread(probabilities: Tensor, here: Tensor) -> Tensor:
    """Put rows back to their places among all rows; NaN where there is none."""
    full = probabilities.new_full((len(here), probabilities.shape[1]), float("nan"))
    full[here] = probabilities
    return full


def check_fits(model: MultimodalModel, dataset: MultimodalDataset) -> None:
    """Raise InputError unless ``dataset`` has the modalities, widths and classes that ``model`` was built for."""
    widths = dict(zip(model.modalities, model.input_widths, strict=True))
    if widths != dataset.dims or list(widths) != dataset.modalities:
        raise InputError(f"the model was built for modalities {widths} but {dataset.name} has {dataset.dims}")
    mine, other = model.task, dataset.task
    if not mine.fits(other):
        told = [
            f"{t.kind} of {len(t.names)} ({', '.join(t.names[:5])}{', ...' if len(t.names) > 5 else ''})"
            for t in (mine, other)
        ]
        raise InputError(f"the model was built for {told[0]} but {dataset.name} has {told[1]}")
