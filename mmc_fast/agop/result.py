"""The outcome of an AGOP run: the matrix when asked for, and what can be had without it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.numbers import integer
from mmc_fast.errors import InputError

from .finish import Factored

__all__ = ["AGOPResult"]


class AGOPResult:
    """AGOP ``G [d, d]`` of one layer's input, formed only when ``matrix`` is read.

    Attributes:
        n: samples that were summed.
        layer: index of the Linear layer at whose input G is (a name for layers given by name).
        output: "logits" or "probs".
        centered: whether the mean Jacobian over all samples was subtracted.
        reduction: "sum" or "mean" (divided by n).
        input_cov, input_mean: covariance (divided by n) and mean of the layer's inputs, float64, or None.
        blocks: modality name -> width, in order; they partition the d inputs.
        method: how it was summed ("co-activation counts", "derivative Gram", "row chain", …).
        backend: the backend that ran, None before any sample.
    """

    def __init__(
        self,
        factored: Factored,
        halves: list[Factored] | None,
        *,
        n: int,
        layer: int | str,
        output: str,
        centered: bool,
        reduction: str,
        finite: bool,
        dtype: torch.dtype,
        blocks: Mapping[str, int],
        probes: int | None,
        input_cov: Tensor | None,
        input_mean: Tensor | None,
        method: str,
        backend: str | None,
    ) -> None:
        self._factored, self._halves, self._dtype, self._finite = factored, halves, dtype, finite
        self.n, self.layer, self.output, self.centered, self.reduction = n, layer, output, centered, reduction
        self.blocks, self.probes, self.method, self.backend = dict(blocks), probes, method, backend
        self.input_cov, self.input_mean = input_cov, input_mean

    def __repr__(self) -> str:
        d = self._factored.size
        return (
            f"AGOPResult(d={d}, n={self.n}, layer={self.layer!r}, output={self.output!r}, centered={self.centered}, "
            f"reduction={self.reduction!r}, method={self.method!r}, backend={self.backend!r})"
        )

    @cached_property
    def matrix(self) -> Tensor:
        """G, ``[d, d]`` in the head's dtype, exactly symmetric. All NaN where any pre-activation was not finite."""
        return self._guard(self._factored.matrix()).to(self._dtype)

    @cached_property
    def probe_error(self) -> float | None:
        """Relative standard error of a probe estimate, ``E‖Ĝ − G‖_F / ‖Ĝ‖_F``, from two independent halves of them.

        With halves of a and b probes, ``√(ab)/(a + b) · ‖Ĝ_a − Ĝ_b‖_F``. None without probes and for a single probe.
        """
        if self._halves is None or self.probes is None:
            return None
        a = max(1, self.probes // 2)
        b = self.probes - a
        first, second = (half.matrix().double() for half in self._halves)
        size = float(torch.linalg.norm(a * first + b * second) / self.probes)
        gap = float(torch.linalg.norm(first - second)) * (a * b) ** 0.5 / self.probes
        if not self._finite:
            return float("nan")
        return gap / size if size > 0 else 0.0

    def diagonal(self) -> Tensor:
        """The diagonal of G, ``[d]`` float64, without forming G."""
        return self._guard(self._factored.diagonal())

    def block_traces(self) -> Tensor:
        """``tr(G_ii)`` per entry of ``blocks``, ``[m]`` float64, without forming G. Raw traces change with units."""
        return torch.stack([part.sum() for part in self.diagonal().split(list(self.blocks.values()))])

    def eigh(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues, descending, and their vectors: ``[k]`` and ``[d, k]``, float64, without forming G.

        Lanczos (ARPACK) on ``v -> Pᵀ(S(P v))`` from a fixed start; a dense problem of the smaller of h and d where k is
        close to d. Signs of the vectors are free; the largest entry of each is positive here.
        """
        d = self._factored.size
        if not 1 <= (integer(k) or 0) <= d:
            raise InputError(f"AGOPResult.eigh: k={k!r}; pass an integer in 1..{d}")
        k = int(k)
        device = self._factored.device
        if not self._finite:
            nan = torch.full((d, k), float("nan"), dtype=torch.float64, device=device)
            return nan[0].clone(), nan
        multiply = self._factored.operator()
        if d <= 64 or 3 * k >= d:
            dense = multiply(torch.eye(d, dtype=torch.float64, device=device))
            values, vectors = torch.linalg.eigh((dense + dense.t()) / 2)
            values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
        else:
            values, vectors = _lanczos(multiply, d, k, device)
        peaks = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        return values, vectors * torch.where(peaks < 0, -1.0, 1.0)

    def _guard(self, values: Tensor) -> Tensor:
        return values if self._finite else values.fill_(float("nan"))


def _lanczos(multiply, d: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    from scipy.sparse.linalg import LinearOperator, eigsh

    def product(v: np.ndarray) -> np.ndarray:
        return multiply(torch.from_numpy(np.ascontiguousarray(v.reshape(d))).to(device)).cpu().numpy()

    start = np.random.default_rng(0).standard_normal(d)
    if not np.any(product(start)):  # G = 0, which Lanczos cannot start from
        identity = torch.eye(d, k, dtype=torch.float64, device=device)
        return torch.zeros(k, dtype=torch.float64, device=device), identity
    values, vectors = eigsh(LinearOperator((d, d), matvec=product, dtype=np.float64), k=k, which="LA", v0=start)
    order = np.argsort(values)[::-1].copy()
    return torch.from_numpy(values[order]).to(device), torch.from_numpy(vectors[:, order]).to(device)
