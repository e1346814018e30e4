"""What the weights of a fusion layer say: features and neurons that share dimensions, and neurons that mix modalities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmc_fast._util.numbers import integer
from mmc_fast.agop.result import resolve_blocks
from mmc_fast.errors import InputError

LOOSE_FACTOR = 1.5
"""The collision bound is called loose where the exact fraction is larger than this times the bound."""


def neural_feature_matrix(weight: Tensor, initial: Tensor | None = None) -> Tensor:
    """``WᵀW`` of a layer ``W [h, d]``, or ``(W − W_0)ᵀ(W − W_0)`` with the weights at initialisation. ``[d, d]`` float64.

    Source: Radhakrishnan et al., Science 2024. Time ``O(h d²)``.
    """
    w = _weight("neural_feature_matrix", weight)
    if initial is not None:
        if initial.shape != weight.shape:
            raise InputError(
                f"neural_feature_matrix: initial is {list(initial.shape)} and weight {list(weight.shape)}; give one shape"
            )
        w = w - initial.double()
    return w.t() @ w


def matrix_cosine(a: Tensor, b: Tensor) -> float:
    """``⟨A, B⟩ / (‖A‖ ‖B‖)``: 1 for proportional matrices; NaN where one of them is zero.

    With ``A`` = neural feature matrix and ``B`` = AGOP of the same layer this is the score of the neural feature
    ansatz. Theorem 2 of the collapse paper has free constants, so it is a distance to report, no test to pass.
    """
    if a.shape != b.shape:
        raise InputError(f"matrix_cosine: got {list(a.shape)} and {list(b.shape)}; give matrices of one shape")
    x, y = a.double(), b.double()
    size = float(torch.linalg.norm(x) * torch.linalg.norm(y))
    return float((x * y).sum()) / size if size > 0 else math.nan


@dataclass(frozen=True)
class CollisionBound:
    """Lemma 1 for given widths: ``bound <= exact``; ``loose`` where the exact fraction is far above the bound."""

    bound: float
    exact: float
    loose: bool

    @property
    def warning(self) -> str | None:
        """One sentence where the bound should not be used."""
        if not self.loose:
            return None
        return (
            f"the widths differ, so the bound {self.bound:.3f} is loose: {self.exact:.3f} of all feature pairs cross "
            "modalities; use the exact fraction"
        )


def collision_bound(widths: Sequence[int]) -> CollisionBound:
    """Lower bound on the chance that two features of one neuron are of different modalities, and the exact fraction.

    ``p ≥ m(m−1) min_i d_i² / (Σ d_i)²`` and ``Σ_{i<j} d_i d_j / C(Σ d_i, 2)`` for features that meet at random. Equal
    widths give ``1 − 1/m``. m = 1: both 0. Source: lemma 1 of the collapse paper.
    Limits: a property of the widths alone; it says nothing about a trained model.
    """
    if not widths or any((integer(d) or 0) < 1 for d in widths):
        raise InputError(f"collision_bound: widths are {list(widths)}; give a positive integer for each modality")
    widths = [int(d) for d in widths]
    m, total = len(widths), sum(widths)
    if m == 1:
        return CollisionBound(0.0, 0.0, False)
    bound = m * (m - 1) * min(widths) ** 2 / total**2
    crossing = (total**2 - sum(d * d for d in widths)) / 2
    exact = crossing / (total * (total - 1) / 2)
    # Small equal widths exceed the bound only by total / (total - 1), which is no looseness of the widths.
    return CollisionBound(bound, exact, exact * (total - 1) / total > LOOSE_FACTOR * bound)


def feature_capacity(weight: Tensor) -> Tensor:
    """Share of a dimension that each feature (column of ``W [h, d]``) has for itself: ``[d]`` float64 in [0, 1].

    ``C_j = (w_j·w_j)² / Σ_k (w_j·w_k)²``: 1 for a column orthogonal to all others, ``1/n`` for n equal columns, 0 for a
    zero column; ``Σ_j C_j ≤ rank``. Source: Scherlis et al. 2022. Time ``O(h d²)``.
    """
    return _capacity(_weight("feature_capacity", weight).t())


def neuron_overlap(weight: Tensor) -> Tensor:
    """The formula of :func:`feature_capacity` over rows: 1 for a neuron that reads what no other reads. ``[h]``."""
    return _capacity(_weight("neuron_overlap", weight))


def _capacity(vectors: Tensor) -> Tensor:
    gram = vectors @ vectors.t()
    own = gram.diagonal().square()
    total = gram.square().sum(1)
    return torch.where(total > 0, own / total.clamp(min=torch.finfo(total.dtype).tiny), torch.zeros_like(own))


@dataclass(frozen=True)
class Polysemanticity:
    """γ(w): ``encoded`` dictionary features over ``rank`` dimensions, with the settings that it depends on."""

    gamma: float
    encoded: int
    rank: int
    features: int
    tau: float
    energy: float


def degree_of_polysemanticity(
    weight: Tensor, dictionary: Tensor, *, tau: float = 0.5, energy: float = 0.99
) -> Polysemanticity:
    """Features encoded per dimension: ``γ(w) = #{j : ‖P_w v_j‖² ≥ τ} / rank``. More than 1 means superposition.

    ``P_w`` projects onto the right singular vectors of ``W [h, d]`` that hold ``energy`` of ``Σσ²`` (with all of them it
    would be the identity for full column rank); ``rank`` is their number. ``dictionary [d, J]`` holds feature
    directions, normalised here; zero columns are not allowed.

    Source: the collapse paper defines γ = encoded features / dim(w) and never computes it; the operational form, τ and
    the dictionary are this project's: report them beside γ. Time ``O(h d min(h, d) + r d J)``.
    Limits: as good as its dictionary. With PCA directions of the data (:func:`pca_dictionary`) it counts variance
    directions, not meanings.
    """
    w = _weight("degree_of_polysemanticity", weight)
    if dictionary.dim() != 2 or dictionary.shape[0] != w.shape[1]:
        raise InputError(
            f"degree_of_polysemanticity: dictionary is {list(dictionary.shape)}; give [{w.shape[1]}, features]"
        )
    if not 0 < tau <= 1 or not 0 < energy <= 1:
        raise InputError(f"degree_of_polysemanticity: tau {tau} and energy {energy}; give two numbers in (0, 1]")
    v = dictionary.double()
    lengths = v.norm(dim=0)
    if not bool((lengths > 0).all()):
        raise InputError("degree_of_polysemanticity: the dictionary holds a zero direction; drop it")
    _, values, right = torch.linalg.svd(w, full_matrices=False)
    squares = values.square()
    if not float(squares.sum()) > 0:
        return Polysemanticity(0.0, 0, 0, v.shape[1], tau, energy)
    held = squares.cumsum(0) / squares.sum()
    rank = int((held < energy - 1e-12).sum()) + 1
    kept = (right[:rank] @ (v / lengths)).square().sum(0)
    encoded = int((kept >= tau).sum())
    return Polysemanticity(encoded / rank, encoded, rank, v.shape[1], tau, energy)


def pca_dictionary(
    covariance: Tensor, blocks: Mapping[str, int] | Sequence[int], energy: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Unit directions of each modality that hold ``energy`` of its variance: ``[d, J]`` and the modality of each ``[J]``.

    A stand-in for feature directions where the true ones are unknown. Constant modalities give none. Time ``O(Σ d_i³)``.
    """
    widths = list(resolve_blocks(blocks, covariance.shape[0]).values())
    columns, owner, start = [], [], 0
    for index, width in enumerate(widths):
        values, vectors = torch.linalg.eigh(covariance[start : start + width, start : start + width].double())
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        total = float(values.sum())
        if total > 0:
            count = int((values.cumsum(0) < energy * total - 1e-12 * total).sum()) + 1
            placed = covariance.new_zeros(covariance.shape[0], count, dtype=torch.float64)
            placed[start : start + width] = vectors[:, :count]
            columns.append(placed)
            owner += [index] * count
        start += width
    dictionary = torch.cat(columns, 1) if columns else covariance.new_zeros(covariance.shape[0], 0, dtype=torch.float64)
    return dictionary, torch.tensor(owner, dtype=torch.int64)


def neuron_modality_shares(
    weight: Tensor, blocks: Mapping[str, int] | Sequence[int], covariance: Tensor | None = None
) -> Tensor:
    """Which modality each neuron reads: ``[h, m]`` float64, rows summing to 1 (a zero neuron: all zeros).

    With the covariance Σ of the inputs, ``w_iᵀ Σ_ii w_i / Σ_j w_jᵀ Σ_jj w_j``: the variance that each block of the neuron's
    weights contributes, unchanged by units and rotations inside of a modality. Without it, squared norms ``‖w_i‖²``,
    which change with units and serve only where all modalities share one scale. Time ``O(h Σ d_i²)``.
    Limits: linear and before the activation; what a neuron does later is not in it.
    """
    w = _weight("neuron_modality_shares", weight)
    widths = list(resolve_blocks(blocks, w.shape[1]).values())
    parts, start = [], 0
    for block in w.split(widths, 1):
        end = start + block.shape[1]
        read = block if covariance is None else block @ covariance.double()[start:end, start:end]
        parts.append((read * block).sum(1).clamp(min=0))
        start = end
    return _normalised(torch.stack(parts, 1))


def attribution_shares(
    weight: Tensor, inputs: Tensor, squared_gradient: Tensor, blocks: Mapping[str, int] | Sequence[int]
) -> Tensor:
    """Modality shares of what neurons pass on, activation × gradient: ``[h, m]`` float64, rows summing to 1 (or all 0).

    ``Σ_n g_nk² (w_ki·(x_ni − mean))²`` over its sum over modalities, with ``g_nk² = Σ_c (∂y_c/∂z_k)²`` at sample n given as
    ``squared_gradient [N, h]``, ``weight [h, d]`` and ``inputs [N, d]`` of the layer. A neuron counts where it is active.
    Companion of :func:`neuron_modality_shares`. Time ``O(N h d)``.
    """
    w = _weight("attribution_shares", weight)
    widths = list(resolve_blocks(blocks, w.shape[1]).values())
    if inputs.shape != (len(inputs), w.shape[1]) or squared_gradient.shape != (len(inputs), len(w)):
        raise InputError(
            f"attribution_shares: inputs {list(inputs.shape)} and squared_gradient {list(squared_gradient.shape)} for a weight "
            f"{list(w.shape)}; give [N, d] and [N, h]"
        )
    x = inputs.double() - inputs.double().mean(0)
    parts = zip(x.split(widths, 1), w.split(widths, 1), strict=True)
    shares = torch.stack([(squared_gradient.double() * (xi @ wi.t()).square()).sum(0) for xi, wi in parts], 1)
    return _normalised(shares)


def signal_noise_shares(
    weight: Tensor, inputs: Tensor, labels: Tensor, blocks: Mapping[str, int] | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Where the variance of each neuron comes from: signal and noise of every modality, ``[h, m]`` each, float64.

    The features of modality i are the mean of the sample's class (signal) plus the rest (noise); the shares are the variances
    of ``w_ki·signal_i`` and of ``w_ki·noise_i``, divided by the sum of all 2 m of them. A neuron whose signal is of one modality
    and whose noise is of another is what the collapse mechanism needs. Time ``O(N h d)``.
    Limits: signal is what class means hold; what only nonlinear models see counts as noise here.
    """
    w = _weight("signal_noise_shares", weight)
    widths = list(resolve_blocks(blocks, w.shape[1]).values())
    if inputs.shape != (len(labels), w.shape[1]):
        raise InputError(
            f"signal_noise_shares: inputs {list(inputs.shape)} and {len(labels)} labels for a weight {list(w.shape)}; give "
            "[N, d] and [N]"
        )
    x = inputs.double() - inputs.double().mean(0)
    signal = torch.zeros_like(x)
    for label in labels.unique():
        rows = labels == label
        signal[rows] = x[rows].mean(0)
    found = []
    for part in (signal, x - signal):
        pairs = zip(part.split(widths, 1), w.split(widths, 1), strict=True)
        found.append(torch.stack([(pi @ wi.t()).square().mean(0) for pi, wi in pairs], 1))
    shares = _normalised(torch.cat(found, 1))
    return shares[:, : len(widths)], shares[:, len(widths) :]


def _normalised(shares: Tensor) -> Tensor:
    total = shares.sum(1, keepdim=True)
    return torch.where(total > 0, shares / total.clamp(min=torch.finfo(total.dtype).tiny), torch.zeros_like(shares))


def modality_entropy(shares: Tensor) -> Tensor:
    """``−Σ_i p_i ln p_i / ln m`` of rows ``[h, m]``: 0 reads one modality, 1 all alike; NaN for a zero row, 0 for m = 1."""
    m = shares.shape[1]
    p = shares.double()
    entropy = -torch.special.xlogy(p, p).sum(1) / (math.log(m) if m > 1 else 1.0)
    return torch.where(p.sum(1) > 0, entropy.clamp(min=0), torch.full_like(entropy, math.nan))


def _weight(name: str, weight: Tensor) -> Tensor:
    if weight.dim() != 2:
        raise InputError(f"{name}: weight has shape {list(weight.shape)}; give the [h, d] of a Linear layer")
    if not torch.isfinite(weight).all():
        raise InputError(f"{name}: the weight holds NaN or infinite values")
    return weight.detach().double()
