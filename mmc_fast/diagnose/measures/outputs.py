"""What the outputs of a model depend on, without labels: shares of their change, and whether modalities interact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .reliance import shapley_values


def output_shapley(moved: Sequence[float] | np.ndarray) -> np.ndarray:
    """Shares ``[m]`` of the outputs that come from each modality, without labels; they add up to 1.

    ``moved [2^m]``: mean squared distance ``E‖p_S − p‖²`` of the outputs with modalities S only to those with all (last entry 0;
    bit i of the position says whether modality i is in). The Shapley values of ``v(S) = −E‖p_S − p‖²`` over ``v(all) − v(none)``;
    NaN where the outputs never move. Source: Covert et al., NeurIPS 2020 (SAGE with the model's own output for a label);
    MM-SHAP (Parcalabescu and Frank, ACL 2023) asks the same of single samples. Limits: moving the outputs is not helping them.
    Rescaling an encoder changes nothing.
    """
    values = -np.asarray(moved)
    total = values[-1] - values[0]
    shares = shapley_values(values)
    return shares / total if total > 0 else np.full_like(shares, np.nan)


def alignment(
    effect: Tensor, alone: Tensor, draws: int = 1, counts: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """How far a modality moves the outputs the way that it would answer by itself: a correlation in [−1, 1].

    ``effect [N, C]``: outputs minus their mean over ``draws`` replacements of the modality by that of other samples; ``alone
    [N, C]``: outputs of a model that knows the modality only. ``ρ = √(1 + 1/draws) · Σ⟨e, a⟩ / √(Σ‖e‖² Σ‖a‖²)``, both centred
    and each column cut off at its 5 and 95 % quantiles, since few rows would else decide; the replacements add 1/draws of the variance of the effect, and nothing that goes along with ``alone``. Near 0: the model
    learned nothing from it, whatever it moves. It needs no labels, so it tells where scores are too noisy. ``counts [R, N]``:
    how often a resample holds each row; the values in the resamples are the second result. NaN where nothing moves.
    Limits: of what a modality gives beside others alone it sees nothing. Rescaling an encoder changes nothing. Source: ours; the
    effect is the total effect of variance decomposition before squaring (Jansen 1999).
    """
    e, a = (_cut(x.double()) for x in (effect, alone))
    sums = torch.stack([(e * a).sum(1), e.square().sum(1), a.square().sum(1)], 1).numpy()
    counts = np.ones((0, len(sums))) if counts is None else counts
    both, moved, told = (np.concatenate([np.ones((1, len(sums))), counts]) @ sums).T
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.clip(math.sqrt(1 + 1 / draws) * both / np.sqrt(moved * told), -1.0, 1.0)
    return float(found[0]), found[1:]


def _cut(x: Tensor) -> Tensor:
    low, high = torch.quantile(x, x.new_tensor([0.05, 0.95]), dim=0)
    x = torch.minimum(torch.maximum(x, low), high)
    return x - x.mean(0)


@torch.no_grad()
def emap_outputs(
    fuse: Callable[[dict[str, Tensor]], Tensor],
    features: Mapping[str, Tensor],
    partners: int | None = None,
    random: torch.Generator | None = None,
) -> Tensor:
    """The additive part of the outputs ``[n, C]``, float64: what is left where modalities may not interact (EMAP).

    ``f̂_a = μ + Σ_i (1/n Σ_b f(x_i of a, all others of b) − μ_i)``, ``μ_i`` the mean over all a and b, ``μ`` the mean of the μ_i.
    Where f is a sum of functions of one modality each, f̂ = f. Predictions as good as those of f mean that fusion uses no
    interaction of modalities. n calls of ``fuse`` with n rows for each modality, quadratic, so give a stated subsample;
    ``partners``: b, and a in μ_i, run over so many rows drawn at ``random``, the same for all.
    Source: Hessel and Lee, EMNLP 2020 (two modalities; for more the others move together). Limits: interactions in the
    outputs before the softmax. Rescaling an encoder changes nothing.
    """
    names, n = list(features), len(next(iter(features.values())))
    others = torch.randperm(n, generator=random)[:partners]
    parts, means = [], []
    for name in names:
        mixed = ({k: x if k == name else x[[b] * n] for k, x in features.items()} for b in others.tolist())
        conditional = torch.stack([fuse(f).double() for f in mixed]).mean(0)
        means.append(conditional[others.to(conditional.device)].mean(0))
        parts.append(conditional - means[-1])
    return torch.stack(means).mean(0) + torch.stack(parts).sum(0)
