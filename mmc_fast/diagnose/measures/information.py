"""Shared, unique and joint information of modalities about the labels, by the second moments of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmc_fast.errors import InputError

GROUPS = 16
Moments = tuple[int, Tensor, list[Tensor]]
"""Rows, covariance, columns of each part."""


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
    if not centred.shape[1]:
        return centred
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
    whole, _ = _moments(x, y)
    return _information(whole, [0], [1])


def gaussian_pid(modality: Tensor, rest: Tensor, target: Tensor) -> Pid:
    """Partial information decomposition of what a modality and the rest say of a target, rows ``[N, p]``, ``[N, r]``, ``[N, q]``.

    ``redundancy = min(I(M; Y), I(R; Y))``, ``unique = I(M; Y) − redundancy``, ``synergy = I(M, R; Y) − max(I(M; Y), I(R; Y))``, in
    nats, by :func:`gaussian_information`. Source: Barrett, Physical Review E 2015 (minimum mutual information, the only
    choice for one Gaussian target; for several columns one of some). Limits: linear relations; classes are no Gaussians; of
    M and R one always has no unique part. Rescaling an encoder changes nothing.
    """

    def parts(moments: Moments) -> list[float]:
        own, other, both = (_information(moments, inside, [2]) for inside in ([0], [1], [0, 1]))
        shared = min(own, other)
        return [shared, own - shared, other - shared, both - max(own, other)]

    return Pid(*_jackknife(parts, modality, rest, target))


def distillation_margin(teacher: Tensor, student: Tensor, target: Tensor) -> Information:
    """``I(T; S) − I(S; Y)`` in nats: distilling T into S can only help where it is above 0, by the complementarity hypothesis.

    Rows of representations ``[N, p]``, ``[N, s]`` and of the target ``[N, q]``. Source: the cross-modal complementarity hypothesis
    for knowledge distillation. Limits: a hypothesis, here by linear relations only, and of these representations. Rescaling an
    encoder changes nothing.
    """

    def margin(moments: Moments) -> list[float]:
        return [_information(moments, [0], [1]) - _information(moments, [1], [2])]

    return _jackknife(margin, teacher, student, target)[0]


def _moments(*parts: Tensor) -> tuple[Moments, list[Moments]]:
    """(rows, covariance, columns of each part) of all rows, and of all but each of 16 groups."""
    rows = len(parts[0])
    columns = sum(p.shape[1] for p in parts if p.dim() == 2)
    if any(p.dim() != 2 or len(p) != rows for p in parts) or rows <= columns + 1:
        plus = " + ".join("pqrs"[: len(parts)])
        raise InputError(
            f"gaussian information: got {', '.join(str(list(p.shape)) for p in parts)}; give rows [N, columns] with N > {plus} + 1"
        )
    z = torch.cat([p.double() for p in parts], 1)
    z = z - z.mean(0)
    places = torch.arange(rows) % GROUPS
    start, ranges = 0, []
    for p in parts:
        ranges.append(torch.arange(start, start + p.shape[1]))
        start += p.shape[1]

    def without(k: int) -> Moments:
        group = z[places == k]
        n, total = rows - len(group), group.sum(0)  # of the other rows it is −total, as z is centred
        return n, (gram - group.t() @ group - torch.outer(total, total) / n) / (n - 1), ranges

    gram = z.t() @ z
    return (rows, gram / (rows - 1), ranges), [without(k) for k in range(GROUPS)]


def _information(moments: Moments, left: list[int], right: list[int]) -> float:
    """Information between parts ``left`` and ``right``."""
    n, covariance, ranges = moments
    a, b = (torch.cat([ranges[i] for i in side]) for side in (left, right))
    both = torch.cat([a, b])
    return 0.5 * (_log_det(n, covariance, a) + _log_det(n, covariance, b) - _log_det(n, covariance, both))


def _log_det(n: int, covariance: Tensor, chosen: Tensor) -> float:
    """Unbiased log determinant for ``n`` Gaussian rows in the ``chosen`` columns, but for a term per column that cancels in an
    information."""
    sign, value = torch.linalg.slogdet(covariance[chosen][:, chosen])
    if not sign > 0:
        return math.nan
    dimensions = torch.arange(len(chosen), dtype=torch.float64)
    return float(value - torch.digamma((n - 1 - dimensions) / 2).sum())


def _jackknife(numbers: Callable[[Moments], Sequence[float]], *parts: Tensor) -> list[Information]:
    """Numbers of all rows with the standard error ``√((K − 1) / K Σ_k (θ_k − θ̄)²)``, θ_k without group k."""
    whole, others = _moments(*parts)
    left_out = torch.tensor([numbers(moments) for moments in others], dtype=torch.float64)
    error = ((GROUPS - 1) / GROUPS * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    return [Information(value, float(e)) for value, e in zip(numbers(whole), error, strict=True)]
