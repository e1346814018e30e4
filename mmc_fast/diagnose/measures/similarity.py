"""How alike two representations are, and how redundant the columns of one are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmc_fast.errors import InputError


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA ``‖X̄ᵀȲ‖_F² / (‖X̄ᵀX̄‖_F ‖ȲᵀȲ‖_F)`` of centred ``X [N, p]`` and ``Y [N, q]``, in [0, 1].

    1 for equal geometry up to rotation and one overall scale; NaN where a representation is constant. Of two random
    ones it grows with p and q over N, so compare it at one N. Source: Kornblith et al., ICML 2019. Time ``O(N (p + q)²)``.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise InputError(f"linear_cka: got {list(x.shape)} and {list(y.shape)}; give [N, p] and [N, q] with one N")
    p = x.shape[1]
    covariance = covariance_of(torch.cat([x.double(), y.double()], 1))
    return cka_from_covariance(covariance[:p, :p], covariance[:p, p:], covariance[p:, p:])


def cka_from_covariance(xx: Tensor, xy: Tensor, yy: Tensor) -> float:
    """Linear CKA from the covariances ``Σ_xx [p, p]``, ``Σ_xy [p, q]``, ``Σ_yy [q, q]``, for data that are streamed."""
    size = float(torch.linalg.norm(xx.double()) * torch.linalg.norm(yy.double()))
    return float(xy.double().square().sum()) / size if size > 0 else math.nan


def variance_inflation(covariance: Tensor, ridge: float = 1e-6) -> Tensor:
    """Variance inflation factors: the diagonal of ``(R + ridge·I)^{-1}`` with R the correlation matrix. ``[p]`` float64.

    1 for a column that the others cannot predict; with R² of the prediction, ``1 / (1 − R²)``. The paper's table 7 is their
    mean. Constant columns have no correlation and come out as NaN; leave them out of a mean (``nanmean``). ``ridge``
    bounds the factors by ``1 / ridge`` where columns are collinear. Time ``O(p³)``. Source: table 7 of the collapse paper.
    """
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise InputError(f"variance_inflation: covariance is {list(covariance.shape)}; give [p, p]")
    if not ridge > 0:
        raise InputError(f"variance_inflation: ridge is {ridge}; give a positive number, such as 1e-6")
    s = covariance.double()
    variances = s.diagonal()
    moving = variances > 1e-12 * variances.max().clamp(min=torch.finfo(s.dtype).tiny)
    factors = torch.full_like(variances, math.nan)
    if moving.any():
        scale = variances[moving].rsqrt()
        correlation = s[moving][:, moving] * scale[:, None] * scale
        shifted = correlation + ridge * torch.eye(len(scale), dtype=s.dtype, device=s.device)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed):  # rounding of collinear columns left some eigenvalues negative
            values, vectors = torch.linalg.eigh((correlation + correlation.t()) / 2)
            factors[moving] = (vectors.square() / (values.clamp(min=0) + ridge)).sum(1)
        else:
            factors[moving] = torch.cholesky_inverse(factor).diagonal()
    return factors


def covariance_of(x: Tensor) -> Tensor:
    """Covariance (divided by N) of rows ``[N, p]`` in float64."""
    if x.dim() != 2 or not len(x):
        raise InputError(f"covariance: got {list(x.shape)}; give rows [N, p] with N >= 1")
    centred = x.double() - x.double().mean(0)
    return centred.t() @ centred / len(x)
