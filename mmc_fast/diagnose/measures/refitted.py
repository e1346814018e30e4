"""What frozen features allow a new head with and without a modality, and what is left of the fused representation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmc_fast.errors import InputError

from .information import Information
from .probes import fitted_logistic


def conditional_utilisation(
    features: Mapping[str, Tensor], labels: Tensor, *, held_out: float = 0.3, c: float = 1.0, seed: int = 0
) -> dict[str, Information]:
    """``(A(all) − A(all without M)) / A(all)`` of each modality: what frozen features lose where a head never saw M.

    A: held-out accuracy of a logistic regression (scikit-learn, inverse strength ``c``) fitted anew on the standardised features
    ``[N, ...]`` side by side; all on one split, ``held_out`` of the rows judge. With the standard error of the paired difference.
    0 where the others say as much; a large gap between modalities says that the fusion was greedy.
    Source: Wu et al., ICML 2022 (conditional utilisation rate). Limits: the head is linear. Columns are standardised, so
    rescaling an encoder changes nothing.
    """
    names, rows = list(features), len(labels)
    if len(names) < 2:
        raise InputError("conditional_utilisation: one modality; give two or more")
    order = torch.from_numpy(np.random.default_rng([seed, 13]).permutation(rows))
    cut = round(rows * (1 - held_out))
    train, test = order[:cut], order[cut:]

    def hits(chosen: list[str]) -> np.ndarray:
        x = torch.cat([features[name].detach().cpu().flatten(1) for name in chosen], 1)
        model = fitted_logistic(x[train], labels[train], c)
        return np.asarray(model.predict(x[test].double().numpy()) == labels[test].numpy(), dtype=float)

    whole = hits(names)
    accuracy = whole.mean()
    found = {}
    for name in names:
        lost = whole - hits([n for n in names if n != name])
        error = lost.std(ddof=1) / np.sqrt(len(lost))
        found[name] = Information(float(lost.mean() / accuracy), float(error / accuracy))
    return found


def class_variance_share(representation: Tensor, labels: Tensor) -> float:
    """η² ``= Σ_c n_c ‖μ_c − μ‖² / Σ_n ‖x_n − μ‖²``: share of the variance of ``[N, r]`` that lies between classes, in [0, 1].

    NaN where nothing varies. Source: Fisher's correlation ratio, summed over columns. Limits: columns of large variance
    dominate. Rescaling an encoder that the fusion undoes changes nothing; rescaling columns of the representation does.
    """
    x = representation.detach().double().flatten(1)
    centred = x - x.mean(0)
    total = float(centred.square().sum())
    between = sum(
        int((labels == label).sum()) * float(centred[labels == label].mean(0).square().sum())
        for label in labels.unique()
    )
    return between / total if total > 0 else float("nan")
