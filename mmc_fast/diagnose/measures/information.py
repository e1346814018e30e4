"""Shared, unique and joint information of modalities about the labels, by the second moments of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmc_fast.errors import InputError

__all__ = ["Information", "Pid", "components", "distillation_margin", "gaussian_information", "gaussian_pid", "one_hot"]

GROUPS = 16


@dataclass(frozen=True)
class Information:
    """A number of nats and its standard error (jackknife over 16 groups of rows)."""

    value: float
    error: float


@dataclass(frozen=True)
class Pid:
    """Parts of ``I(M, R; Y)``: in both (redundancy), only in M, only in the rest R, only in both together (synergy)."""

    redundancy: Information
    unique: Information
    unique_rest: Information
    synergy: Information


def components(x: Tensor, count: int = 16) -> Tensor:
    """The ``count`` leading principal components of rows ``[N, ...]``, at unit variance, constant ones left out: ``[N, k]``."""
    centred = x.detach().flatten(1).double()
    centred = centred - centred.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    keep = s > 1e-6 * s.max().clamp(min=1e-30)
    return u[:, keep][:, :count] * math.sqrt(max(1, len(x) - 1))


def one_hot(labels: Tensor) -> Tensor:
    """Indicators of all classes that occur but one, ``[N, C − 1]`` float64 (the last follows from the others)."""
    _, place = labels.unique(return_inverse=True)
    return torch.nn.functional.one_hot(place).double()[:, :-1]


def gaussian_information(x: Tensor, y: Tensor) -> float:
    """``I(X; Y) = ½ (log det Σ_x + log det Σ_y − log det Σ_xy)`` in nats of jointly Gaussian rows ``[N, p]``, ``[N, q]``.

    Unbiased for Gaussians: the mean of the log determinant of a Wishart matrix is taken off. Columns must be independent
    and N > p + q + 1. Source: Venkatesh et al., NeurIPS 2023 (bias of Gaussian PID). Limits: sees linear relations only. Any
    invertible linear map of x or of y, such as rescaling an encoder, changes nothing.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) <= x.shape[1] + y.shape[1] + 1:
        raise InputError(
            f"gaussian_information: got {list(x.shape)} and {list(y.shape)}; give [N, p] and [N, q] with N > p + q + 1"
        )
    if not x.shape[1] or not y.shape[1]:
        return 0.0
    return 0.5 * (_log_det(x) + _log_det(y) - _log_det(torch.cat([x, y], 1)))


def gaussian_pid(modality: Tensor, rest: Tensor, target: Tensor) -> Pid:
    """Partial information decomposition of what a modality and the rest say of a target, rows ``[N, p]``, ``[N, r]``, ``[N, q]``.

    ``redundancy = min(I(M; Y), I(R; Y))``, ``unique = I(M; Y) − redundancy``, ``synergy = I(M, R; Y) − max(I(M; Y), I(R; Y))``, in
    nats, by :func:`gaussian_information`. Source: Barrett, Physical Review E 2015 (minimum mutual information, the only
    choice for one Gaussian target; for several columns one of some). Limits: linear relations; classes are no Gaussians; of two
    modalities one always has no unique part. Rescaling an encoder changes nothing.
    """

    def parts(rows: Tensor) -> list[float]:
        m, r, y = modality[rows], rest[rows], target[rows]
        own, other, both = (
            gaussian_information(m, y),
            gaussian_information(r, y),
            gaussian_information(torch.cat([m, r], 1), y),
        )
        shared = min(own, other)
        return [shared, own - shared, other - shared, both - max(own, other)]

    return Pid(*_jackknife(parts, len(target)))


def distillation_margin(teacher: Tensor, student: Tensor, target: Tensor) -> Information:
    """``I(T; S) − I(S; Y)`` in nats: distilling T into S can only help where it is above 0, by the complementarity hypothesis.

    Rows of representations ``[N, p]``, ``[N, s]`` and of the target ``[N, q]``. Source: the cross-modal complementarity hypothesis
    for knowledge distillation. Limits: a hypothesis, here by linear relations only, and of these representations. Rescaling an
    encoder changes nothing.
    """
    found = _jackknife(
        lambda rows: [
            gaussian_information(teacher[rows], student[rows]) - gaussian_information(student[rows], target[rows])
        ],
        len(target),
    )
    return found[0]


def _log_det(x: Tensor) -> float:
    """Unbiased log determinant of the covariance of Gaussian rows ``[N, d]``."""
    x = x.double()
    centred = x - x.mean(0)
    freedom = len(x) - 1
    sign, value = torch.linalg.slogdet(centred.t() @ centred / freedom)
    if not sign > 0:
        return math.nan
    dimensions = torch.arange(x.shape[1], dtype=torch.float64)
    bias = torch.digamma((freedom - dimensions) / 2).sum() - x.shape[1] * math.log(freedom / 2)
    return float(value - bias)


def _jackknife(numbers: Callable[[Tensor], Sequence[float]], rows: int) -> list[Information]:
    """Numbers of all rows with the standard error ``√((K − 1) / K Σ_k (θ_k − θ̄)²)``, θ_k without group k."""
    every = torch.arange(rows)
    left_out = torch.tensor([numbers(every[every % GROUPS != k]) for k in range(GROUPS)], dtype=torch.float64)
    error = ((GROUPS - 1) / GROUPS * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    return [Information(value, float(e)) for value, e in zip(numbers(every), error, strict=True)]
