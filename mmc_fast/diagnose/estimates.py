"""From sums over groups to numbers, and from resampled groups to their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from .absence import coalitions_scored
from .collect import Collector
from .layers import ChainSums, combine_grams
from .measures import blocks, weights
from .measures.reliance import MAX_MODALITIES, shapley_values
from .measures.similarity import cka_from_covariance, variance_inflation
from .result import Measure, around

SHOWN_VALUES, SHOWN_DIRECTIONS, WIDE = 64, 5, 256


@dataclass
class Estimator:
    """Numbers of a finished pass as functions of the weights of its groups."""

    collector: Collector
    tolerance: float
    tau: float
    energy: float
    ridge: float
    initial: Tensor | None = None
    grams: dict[str, list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.grams = self.collector.layers.finish()
        edges = np.cumsum([0, *self.collector.columns])
        self.slices = [slice(int(a), int(b)) for a, b in pairwise(edges)]

    def numbers(self, group_weights: np.ndarray, arrays: dict[str, Any] | None = None) -> dict[str, float]:
        """Every measure of the sums; ``arrays`` receives what is no single number."""
        c, found = self.collector, dict[str, float]()
        covariance = c.moments.combine(group_weights).covariance
        for index, (name, grams) in enumerate(self.grams.items()):
            gram = combine_grams(grams, group_weights)
            columns = self.slices[index]
            sigma = covariance[columns, columns]
            values = self._spectrum(index, gram, sigma)
            rank = blocks.ranks(values, self.tolerance)
            found[f"agop.{name}.effective_rank"] = rank.effective
            found[f"agop.{name}.stable_rank"] = rank.stable
            found[f"agop.{name}.numerical_rank"] = rank.numerical
            if isinstance(c.layers, ChainSums):
                features = weights.neural_feature_matrix(c.layers.weights[index], self.initial if index == 0 else None)
                found[f"agop.{name}.nfm_cosine"] = weights.matrix_cosine(features, gram)
            if arrays is not None:
                total = float(values.sum()) or 1.0
                arrays[f"spectrum.{name}"] = (values[:SHOWN_VALUES] / total).tolist()
            if index == 0:
                self._features(gram, sigma, found, arrays)
        self._fused(covariance, found, arrays)
        return found

    def _spectrum(self, index: int, gram: Tensor, sigma: Tensor) -> Tensor:
        """Eigenvalues of the whitened AGOP of a layer, up to a factor: by modality at the first, as a whole at the others."""
        layers = self.collector.layers
        if index and isinstance(layers, ChainSums) and index == len(layers.weights) - 1:
            weight = layers.weights[index].double()  # G = n WᵀW here, so those of the smaller W Σ Wᵀ are in proportion
            return blocks.spectrum(weight @ sigma @ weight.t())
        split = self.collector.widths if index == 0 else {"all": gram.shape[0]}
        return blocks.spectrum(blocks.whitened(gram, sigma, split))

    def _features(self, gram: Tensor, sigma: Tensor, found: dict[str, float], arrays: dict[str, Any] | None) -> None:
        """Blocks of the layer that receives the modalities, and its neurons."""
        c = self.collector
        shares = blocks.use_shares(gram, sigma, c.widths)
        found |= {f"use_share.{name}": float(s) for name, s in zip(c.widths, shares, strict=True)}
        energies = blocks.block_energies(gram, sigma, c.widths)
        found["entanglement"] = float(energies.sum() - energies.diagonal().sum())
        if isinstance(c.layers, ChainSums):
            weight = c.layers.weights[0]
            neurons = weights.neuron_modality_shares(weight, c.widths, sigma)
            entropy = weights.modality_entropy(neurons)
            found["neuron_entropy"] = float(entropy.nanmean())
            found["mixed_neurons"] = float((entropy > 0.5).double().sum() / entropy.isfinite().sum().clamp(min=1))
            if arrays is not None or weight.shape[1] <= WIDE:
                dictionary, _ = weights.pca_dictionary(sigma, c.widths)
                if dictionary.shape[1]:
                    degree = weights.degree_of_polysemanticity(weight, dictionary, tau=self.tau, energy=self.energy)
                    found["polysemanticity_degree"] = degree.gamma
            if arrays is not None:
                arrays["neuron_shares"] = neurons.tolist()
        if arrays is not None:
            arrays["block_energies"] = energies.tolist()
            count = min(SHOWN_DIRECTIONS, gram.shape[0])
            arrays["top_directions"] = blocks.top_directions(gram, sigma, c.widths, count)[2].tolist()

    def _fused(self, covariance: Tensor, found: dict[str, float], arrays: dict[str, Any] | None) -> None:
        """The fused representation: ranks, redundancy, likeness to each modality."""
        last = self.slices[-1]
        fused = covariance[last, last]
        singular = blocks.spectrum(fused).sqrt()
        rank = blocks.ranks(singular, self.tolerance)
        found["fused.effective_rank"], found["fused.stable_rank"] = rank.effective, rank.stable
        found["fused.numerical_rank"] = rank.numerical
        found["fused.vif"] = float(variance_inflation(fused, self.ridge).nanmean())
        start = 0
        for name, width in self.collector.widths.items():
            mine = slice(start, start + width)
            found[f"cka.{name}"] = cka_from_covariance(covariance[mine, mine], covariance[mine, last], fused)
            start += width
        if arrays is not None:
            arrays["spectrum.fused"] = (singular[:SHOWN_VALUES] / (float(singular.sum()) or 1.0)).tolist()

    def fixed(self) -> dict[str, float]:
        """Numbers that depend on widths and weights alone, so that samples give them no uncertainty."""
        c = self.collector
        bound = weights.collision_bound(list(c.widths.values()))
        found = {"collision_bound": bound.bound, "collision_exact": bound.exact}
        if isinstance(c.layers, ChainSums):
            weight = c.layers.weights[0]
            found["feature_capacity"] = float(weights.feature_capacity(weight).mean())
            found["neuron_overlap"] = float(weights.neuron_overlap(weight).mean())
        return found


def reliance_measures(
    names: list[str], found: Mapping[str, np.ndarray], chance: np.ndarray, effects: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Scores by condition ``[R]`` as measures: all, none, chance; by modality without, only, shuffled, Shapley, total effect."""
    m = len(names)
    full = (1 << m) - 1
    coalition = {c: found.get(f"coalition.{c}", chance) for c in coalitions_scored(m)}
    measures = {"score.all": coalition[full], "score.none": coalition[0], "score.chance": chance}
    values = _shares(coalition, m)
    resampled = _shares({c: found[f"resampled.{c}"] for c in coalition}, m)
    for i, name in enumerate(names):
        measures[f"without.{name}"] = coalition[full ^ 1 << i]
        measures[f"only.{name}"] = coalition[1 << i]
        measures[f"shuffled.{name}"] = found[f"shuffled.{i}"]
        measures[f"shapley.{name}"] = values[i]
        measures[f"resampled_shapley.{name}"] = resampled[i]
        measures[f"total_effect.{name}"] = effects[f"shuffled.{i}"]
        if f"alone.{name}" in found:
            measures[f"alone.{name}"] = found[f"alone.{name}"]
    return measures


def _shares(coalition: Mapping[int, np.ndarray], m: int) -> np.ndarray:
    """Shapley values ``[m, R]``; of many modalities the mean of the first and the last of the contributions that they average."""
    full = (1 << m) - 1
    if m <= MAX_MODALITIES:
        return shapley_values(np.stack([coalition[c] for c in range(full + 1)]))
    bits = [1 << i for i in range(m)]
    return np.stack([(coalition[b] - coalition[0] + coalition[full] - coalition[full ^ b]) / 2 for b in bits])


def interval(
    value: float,
    draws: np.ndarray | None,
    groups: int,
    level: float,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Measure:
    """A measure with standard error and interval from its values in the resamples; without where there are none.

    Student's t with ``groups − 1`` degrees of freedom, the standard error corrected by √(K/(K−1)): a bootstrap of few
    groups is otherwise too narrow. ``limits``: the interval is cut off at what the measure can be.
    """
    if not math.isfinite(value):
        return Measure(None)
    finite = draws[np.isfinite(draws)] if draws is not None else np.empty(0)
    if groups < 3 or len(finite) < 10:
        return Measure(value)
    error = float(finite.std(ddof=1)) * math.sqrt(groups / (groups - 1))
    return around(value, error, level, groups - 1, limits)


def affordable(resamples: int, columns: list[int]) -> int:
    """How many resamples of the sums are drawn: fewer where every one costs eigenvalues of wide matrices, of very wide ones none."""
    return resamples if max(columns) <= WIDE else min(resamples, 24 if max(columns) <= 4 * WIDE else 0)


def resampled(numbers: Callable[[np.ndarray], Mapping[str, float]], draws: np.ndarray) -> dict[str, np.ndarray]:
    """``numbers`` for every row of group weights: name -> ``[R]``, NaN where a draw has no such number."""
    rows = [numbers(weights) for weights in draws]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
