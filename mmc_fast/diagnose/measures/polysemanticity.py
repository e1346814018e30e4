"""Neurons that serve two modalities: a classifier of weights, and how single neurons respond to two features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.extras import require
from mmc_fast._util.numbers import check_seed
from mmc_fast.errors import InputError

from .weights import modality_entropy, neuron_modality_shares

_WIDTH = 64


@dataclass(frozen=True)
class WeightClassifier:
    """Cross-modal polysemanticity of a layer; None throughout where it is ``not_applicable`` for the stated reason.

    ``cross_entropy``: mean nats between the predicted modality of a neuron and the one whose block is largest in it;
    ``entropy``: mean entropy of the prediction over ln m; ``accuracy``: of the classifier on held-out unimodal rows
    (near ``1/m`` it cannot tell modalities, and the other two mean nothing); ``width``: of the shared projection.
    """

    cross_entropy: float | None
    entropy: float | None
    accuracy: float | None
    width: int | None
    not_applicable: str | None = None


def cross_modal_polysemanticity(
    weight: Tensor,
    blocks: Mapping[str, int],
    unimodal: Mapping[str, Tensor] | None,
    *,
    width: int = _WIDTH,
    seed: int = 0,
) -> WeightClassifier:
    """Would a classifier that knows unimodal neurons be in doubt about the fused ones? Low: monosemantic neurons.

    A two-layer ReLU classifier learns to name the modality of rows of ``unimodal[name] [h_i, d_i]`` and is applied to
    the rows of ``weight [h, Σ d_i]``. Rows have different widths, so all go through ONE random projection to ``width``
    (at most the narrowest d_i) columns: a unimodal row as ``P[:, :d_i] w``, a fusion row as the sum of its blocks
    ``Σ_i P[:, :d_i] w_i``. Zero-padding would give the modality away by position. Rows are normalised to unit length.

    Source: table 9 of the collapse paper (5.66 vanilla, 2.09 KD, 0.59 EBR); the projection and the target (the largest
    block) are this project's, since a fusion row has no label of its own. Time: training on Σ h_i rows.
    Limits: needs unimodal models of the same architecture; values depend on their number and training.
    """
    if not unimodal:
        return WeightClassifier(None, None, None, None, "no unimodal weights were given")
    if set(unimodal) != set(blocks) or len(blocks) < 2:
        raise InputError(
            f"cross_modal_polysemanticity: unimodal weights for {sorted(unimodal)} but blocks {sorted(blocks)}; give one "
            "[h_i, d_i] for each of two or more modalities"
        )
    for name, w in unimodal.items():
        if w.dim() != 2 or w.shape[1] != blocks[name]:
            raise InputError(
                f"cross_modal_polysemanticity: weight of {name!r} is {list(w.shape)}; give [h, {blocks[name]}]"
            )
    if min(len(w) for w in unimodal.values()) < 8:
        return WeightClassifier(None, None, None, None, "a unimodal layer has fewer than 8 neurons to learn from")
    require("sklearn", extra="diagnose")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier

    width = min(width, *blocks.values())
    widest = max(blocks.values())
    seed = check_seed(seed)
    random = torch.Generator().manual_seed(seed)
    projection = torch.randn(width, widest, dtype=torch.float64, generator=random)
    names = list(blocks)
    rows = [_unit(unimodal[n].detach().double() @ projection[:, : blocks[n]].t()) for n in names]
    labels = np.repeat(np.arange(len(names)), [len(r) for r in rows])
    x = torch.cat(rows).numpy()
    train_x, test_x, train_y, test_y = train_test_split(x, labels, test_size=0.25, stratify=labels, random_state=seed)
    classifier = MLPClassifier((64,), alpha=1e-3, max_iter=400, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train_x, train_y)
    parts = weight.detach().double().split(list(blocks.values()), 1)
    summed = torch.stack([p @ projection[:, : p.shape[1]].t() for p in parts]).sum(0)
    alive = summed.norm(dim=1) > 0
    if not alive.any():
        return WeightClassifier(None, None, None, None, "all neurons of the fused layer are zero")
    probability = torch.from_numpy(classifier.predict_proba(_unit(summed[alive]).numpy()))
    largest = neuron_modality_shares(weight, blocks)[alive].argmax(1)
    chosen = probability.gather(1, largest[:, None]).clamp(min=1e-12)
    return WeightClassifier(
        cross_entropy=float(-chosen.log().mean()),
        entropy=float(modality_entropy(probability).mean()),
        accuracy=float(classifier.score(test_x, test_y)),
        width=width,
    )


@dataclass(frozen=True)
class NeuronResponse:
    """Mean activation of one neuron over bins of a predictive and of a noisy feature (both standardised).

    ``centres [b]``, ``predictive [b]`` and ``noisy [b]`` (NaN where a bin is empty); ``overlap``: length of the
    intersection over that of the union of the two ranges in which the neuron is active, NaN where it never is.
    ``slopes``: correlation of the activation with each of the two.
    """

    centres: tuple[float, ...]
    predictive: tuple[float, ...]
    noisy: tuple[float, ...]
    overlap: float
    slopes: tuple[float, float]

    @property
    def entangled(self) -> bool:
        """The neuron answers to both features: each explains at least 5 % of its variance linearly."""
        return min(s * s for s in self.slopes) >= 0.05


def neuron_response(
    activation: Tensor, predictive: Tensor, noisy: Tensor, *, bins: int = 15, active: float = 0.5
) -> NeuronResponse:
    """Does a fusion neuron answer to a predictive feature, to a noisy one, or to both?

    ``activation``, ``predictive``, ``noisy``: ``[N]``. The range of a feature in which the neuron is active: bins between
    −2.5 and 2.5 standard deviations whose mean activation rises above ``active`` of the way from the lowest to the highest
    bin of both curves.

    Source: slides of the collapse paper (entangled and disentangled neurons); bins and threshold are this project's.
    Limits: marginal responses; features that are correlated show each other's.
    """
    if not (activation.shape == predictive.shape == noisy.shape) or activation.dim() != 1 or len(activation) < 2 * bins:
        raise InputError(
            f"neuron_response: got {list(activation.shape)}, {list(predictive.shape)}, {list(noisy.shape)}; "
            f"give three [N] with N >= {2 * bins}"
        )
    edges = np.linspace(-2.5, 2.5, bins + 1)
    a = activation.detach().double().cpu().numpy()
    curves = [_curve(a, f.detach().double().cpu().numpy(), edges) for f in (predictive, noisy)]
    both = np.concatenate(curves)
    low, high = np.nanmin(both), np.nanmax(both)
    spans: Sequence[np.ndarray] = [np.nan_to_num(c, nan=low) > low + active * (high - low) for c in curves]
    if high - low <= 1e-12 * max(1.0, abs(high)):
        overlap = math.nan
    else:
        overlap = float((spans[0] & spans[1]).sum() / (spans[0] | spans[1]).sum())
    slopes = (_correlation(a, predictive), _correlation(a, noisy))
    centres = tuple(((edges[1:] + edges[:-1]) / 2).tolist())
    return NeuronResponse(centres, tuple(curves[0].tolist()), tuple(curves[1].tolist()), overlap, slopes)


def _curve(activation: np.ndarray, feature: np.ndarray, edges: np.ndarray) -> np.ndarray:
    spread = feature.std()
    place = np.digitize((feature - feature.mean()) / (spread if spread > 0 else 1.0), edges) - 1
    inside = (place >= 0) & (place < len(edges) - 1)
    counts = np.bincount(place[inside], minlength=len(edges) - 1)
    sums = np.bincount(place[inside], weights=activation[inside], minlength=len(edges) - 1)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _correlation(a: np.ndarray, feature: Tensor) -> float:
    f = feature.detach().double().cpu().numpy()
    size = a.std() * f.std()
    return float(((a - a.mean()) * (f - f.mean())).mean() / size) if size > 0 else 0.0


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
