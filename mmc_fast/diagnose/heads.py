"""What the weights of the head tell, and units of a fusion that is no chain of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .collect import Collector
from .features import checked_features
from .layers import ChainSums, jacobian_rows
from .measures.polysemanticity import cross_modal_polysemanticity
from .options import DiagnoseOptions
from .passes import Batches
from .result import Measure


def head_measures(
    adapter: Adapter, batches: Batches, collector: Collector, o: DiagnoseOptions, measures: dict[str, Measure],
    arrays: dict[str, Any], notes: list[str],
) -> None:  # fmt: skip
    """What only the weights tell."""
    notes += [f"{name} is constant in these data, so its use cannot show." for name in _constant(collector)]
    if isinstance(collector.layers, ChainSums):
        if o.initial_weight is None:
            notes.append("No initial weights were given: the neural feature matrix is WᵀW, not that of W − W₀.")
        unimodal = o.unimodal_weights or getattr(adapter, "unimodal_weights", None)
        _weight_classifier(measures, notes, collector.layers.weights[0], collector.widths, unimodal, o.seed)
    else:
        arrays |= _neurons_by_gradient(adapter, batches, collector)


def _constant(collector: Collector) -> list[str]:
    """Modalities without any variance."""
    variances = collector.moments.combine(collector.active()).covariance.diagonal()
    parts = variances[: sum(collector.widths.values())].split(list(collector.widths.values()))
    return [name for name, part in zip(collector.widths, parts, strict=True) if not bool(part.any())]


def _weight_classifier(
    measures: dict[str, Measure], notes: list[str], weight: Tensor, widths: dict[str, int], unimodal: Any, seed: int
) -> None:
    found = cross_modal_polysemanticity(weight, widths, unimodal, seed=seed)
    if found.not_applicable:
        notes.append(f"Cross-modal polysemanticity by the weight classifier is not applicable: {found.not_applicable}.")
        return
    measures["weight_classifier.cross_entropy"] = Measure(found.cross_entropy)
    measures["weight_classifier.entropy"] = Measure(found.entropy)
    measures["weight_classifier.accuracy"] = Measure(found.accuracy)


def _neurons_by_gradient(adapter: Adapter, batches: Batches, collector: Collector) -> dict[str, Any]:
    """Modality shares of up to 128 units of the fused representation: ``E[J_i Σ_ii J_iᵀ]`` on the first batch."""
    if collector.represent == adapter.fuse:
        return {}
    batch = next(iter(batches))[1]
    features = checked_features(adapter, batch, collector.widths, 0)
    count = collector.columns[1]
    units = torch.linspace(0, count - 1, min(count, 128)).round().long().tolist()
    width = collector.columns[0]
    sigma = collector.moments.combine(collector.active()).covariance[:width, :width]
    shares = []
    for rows in jacobian_rows(lambda f: collector.represent(f).flatten(1), features, units):
        gram = rows.double().cpu()
        parts, start = [], 0
        for width in collector.widths.values():
            block = gram[:, start : start + width]
            parts.append(float(((block @ sigma[start : start + width, start : start + width]) * block).sum()))
            start += width
        total = sum(parts)
        shares.append([max(p, 0.0) / total if total > 0 else 0.0 for p in parts])
    return {"neuron_shares": shares}
