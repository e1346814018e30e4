"""Can the probabilities of a model be believed, with all modalities and without some? Functions of outputs, not of features."""

from __future__ import annotations

import torch
from torch import Tensor

from mmc_fast.errors import InputError


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """ECE ``Σ_b (n_b / N) |accuracy_b − mean confidence_b|`` over equally wide bins of confidence, in [0, 1].

    ``confidence [N]``: probability of the predicted class; ``correct [N]``: whether the prediction is right.
    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017. Limits: biased upwards by about ``√(bins / N)``, and it sees the
    predicted class alone. Rescaling an encoder that the fusion undoes changes nothing.
    """
    if confidence.dim() != 1 or confidence.shape != correct.shape or not len(confidence) or bins < 1:
        raise InputError(
            f"expected_calibration_error: confidence {list(confidence.shape)}, correct {list(correct.shape)}, {bins} bins; "
            "give two [N] of the same rows and at least one bin"
        )
    p, hit = confidence.double(), correct.double()
    place = (p * bins).ceil().long().sub(1).clamp(0, bins - 1)  # bins (b / B, (b + 1) / B]
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, hit - p)
    return float(gap.abs().sum() / len(p))


def brier_score(probabilities: Tensor, labels: Tensor) -> Tensor:
    """``Σ_c (p_c − 1[y = c])²`` of each sample, ``[N]`` in [0, 2]; its mean is the Brier score, 0 at best.

    ``probabilities [N, C]``, ``labels [N]``. Source: Brier 1950 (his form for several classes). It mixes calibration and
    discrimination. Rescaling an encoder that the fusion undoes changes nothing.
    """
    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1]:
        raise InputError(
            f"brier_score: probabilities {list(probabilities.shape)}, labels {list(labels.shape)}; give [N, C] and [N]"
        )
    truth = torch.nn.functional.one_hot(labels.long(), probabilities.shape[1])
    return (probabilities.double() - truth).square().sum(1)


def silent_failures(right: Tensor, right_without: Tensor, confidence_without: Tensor, confident: float = 0.9) -> Tensor:
    """Which samples are right with all modalities, and wrong with confidence of at least ``confident`` without one: bool ``[N]``.

    Its mean is the rate at which the loss of a modality turns a right answer into a wrong one that nobody would doubt.
    Limits: depends on how the modality was removed and on ``confident``. Rescaling an encoder changes nothing.
    """
    return right.bool() & ~right_without.bool() & (confidence_without >= confident)
