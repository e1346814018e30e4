"""What the measurements of representations share: the fused one, that of single modalities, and their numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmc_fast.diagnose.adapter import flat
from mmc_fast.diagnose.measures.blocks import Ranks, ranks, spectrum
from mmc_fast.diagnose.measures.similarity import covariance_of
from mmc_fast.errors import InputError

from ..data import MultimodalDataset, Part
from ..training import LoadedRun, MultimodalModel, UnimodalModels
from ..training.adapter import RunAdapter

__all__ = ["alone", "fused", "number", "ranks_of", "strength_order"]


@torch.no_grad()
def fused(model: MultimodalModel, part: Part) -> Tensor:
    """Fused representation ``[N, r]``: what the last Linear layer of the fusion receives on these rows.

    Raises InputError for late fusion, which has none.
    """
    adapter = RunAdapter(model)
    received = adapter.encode(part)
    if adapter.head is not None:  # concatenation: the hidden layers of its chain
        return adapter.head[:-1](flat(received))  # type: ignore[index,operator]
    if not hasattr(model.fusion, "classifier"):
        raise InputError("late fusion has no fused representation; choose fusion 'concat' or 'transformer'")
    return adapter.represent(received)


@torch.no_grad()
def alone(unimodal: UnimodalModels | None, dataset: MultimodalDataset, part: Part, name: str) -> Tensor:
    """Features ``[N, p]`` of one modality by the encoder of its unimodal model; rows without it are zeros."""
    if unimodal is None:
        raise InputError("the run has no unimodal models; train it with unimodal_share above 0")
    column = dataset.modalities.index(name)
    here = part.present[:, column, None]
    return torch.where(here, unimodal.models[name].encoder(part.features[column]), 0.0)


def ranks_of(x: Tensor, tolerance: float) -> Ranks:
    """Ranks of centred rows ``[N, r]``."""
    return ranks(spectrum(covariance_of(x)).sqrt(), tolerance)


def strength_order(runs: list[LoadedRun]) -> dict[str, float]:
    """Modality -> mean validation score of its unimodal models over the runs, strongest first."""
    scores = [run.unimodal.scores for run in runs if run.unimodal is not None]
    if not scores:
        raise InputError("no run has unimodal models; train with unimodal_share above 0")
    mean = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
    return dict(sorted(mean.items(), key=lambda item: -item[1]))


def number(value: float | None) -> float | None:
    """The value as JSON knows it: NaN and infinities are None."""
    return float(value) if value is not None and math.isfinite(value) else None
