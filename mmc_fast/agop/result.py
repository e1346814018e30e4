"""The outcome of an AGOP run: the matrix when asked for, and what can be had without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.numbers import integer
from mmc_fast.errors import InputError
from mmc_fast.ops.agop import op as primitives

from .state import Panel

_PANEL = 512  # rows of S at least: below, eight panels would be eight times the launches for little arithmetic


@dataclass(eq=False, repr=False)
class AGOPResult:
    """AGOP ``G [d, d]`` of one layer's input, formed only when ``matrix`` is read.

    Attributes:
        n: samples that were summed.
        layer: index of the Linear layer at whose input G is (a name for layers given by name).
        output: "logits" or "probs".
        centered: whether the mean Jacobian over all samples was subtracted.
        reduction: "sum" or "mean" (divided by n).
        blocks: modality name -> width, in order; they partition the d inputs.
        probes: random output probes per sample, None for the exact sum.
        method: how it was summed ("co-activation counts", "derivative Gram", "row chain", …).
        backend: the backend that ran, None before any sample.
        input_cov, input_mean: covariance (divided by n) and mean of the layer's inputs, float64, or None.

    Examples:
        >>> head = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> result = mmc_fast.AGOPAccumulator(head).update(torch.randn(1000, 6)).compute()
        >>> values, vectors = result.eigh(2)
        >>> result.method, list(result.matrix.shape), list(vectors.shape)
        ('co-activation counts', [6, 6], [6, 2])
    """

    n: int
    layer: int | str
    output: str
    centered: bool
    reduction: str
    blocks: dict[str, int]
    probes: int | None
    method: str
    backend: str | None
    input_cov: Tensor | None
    input_mean: Tensor | None
    _factored: Factored
    _halves: Sequence[Factored]  # two independent estimates, or none
    _dtype: torch.dtype
    _nonfinite: Tensor  # int64 [1], above zero once a pre-activation was not finite

    def __repr__(self) -> str:
        d = self._factored.size
        return (
            f"AGOPResult(d={d}, n={self.n}, layer={self.layer!r}, output={self.output!r}, centered={self.centered}, "
            f"reduction={self.reduction!r}, method={self.method!r}, backend={self.backend!r})"
        )

    @cached_property
    def matrix(self) -> Tensor:
        """G, ``[d, d]`` in the head's dtype, exactly symmetric. All NaN where any pre-activation was not finite."""
        return self._factored.matrix(self._nonfinite).to(self._dtype)

    @cached_property
    def _finite(self) -> bool:
        """Read on the host, which waits for the device."""
        return not int(self._nonfinite)

    @cached_property
    def probe_error(self) -> float | None:
        """Relative standard error of a probe estimate, ``E‖Ĝ − G‖_F / ‖Ĝ‖_F``, from two independent halves of them.

        With halves of a and b probes, ``√(ab)/(a + b) · ‖Ĝ_a − Ĝ_b‖_F``. None without probes and for a single probe.
        """
        if not self._halves or self.probes is None:
            return None
        if not self._finite:
            return float("nan")
        a = max(1, self.probes // 2)
        b = self.probes - a
        first, second = (half.matrix().double() for half in self._halves)
        size = float(torch.linalg.norm(a * first + b * second) / self.probes)
        gap = float(torch.linalg.norm(first - second)) * (a * b) ** 0.5 / self.probes
        return gap / size if size > 0 else 0.0

    def diagonal(self) -> Tensor:
        """The diagonal of G, ``[d]`` float64, without forming G."""
        return primitives.nan_where(self._nonfinite, self._factored.diagonal())

    def block_traces(self) -> Tensor:
        """``tr(G_ii)`` per entry of ``blocks``, ``[m]`` float64, without forming G. Raw traces change with units."""
        return torch.stack([part.sum() for part in self.diagonal().split(list(self.blocks.values()))])

    def eigh(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues, descending, and their vectors: ``[k]`` and ``[d, k]``, float64, without forming G.

        Lanczos (ARPACK) on ``v -> W1ᵀ(S(W1 v))`` from a fixed start; a dense problem of the smaller of h and d where k
        is close to d. Signs of the vectors are free; the largest entry of each is positive here.
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


def resolve_blocks(blocks: Mapping[str, int] | Sequence[int] | None, width: int) -> dict[str, int]:
    """Name -> width of the modality blocks, which must add up to the layer's input; one block by default."""
    if blocks is None:
        return {"input": width}
    named = dict(blocks) if isinstance(blocks, Mapping) else {str(i): size for i, size in enumerate(blocks)}
    for name, size in named.items():
        if (whole := integer(size)) is None or whole < 0:
            raise InputError(f"agop: block {name!r} has width {size!r}; pass whole numbers >= 0")
        named[name] = whole
    if sum(named.values()) != width:
        raise InputError(
            f"agop: the blocks {named} add up to {sum(named.values())} but the layer's input has width {width}"
        )
    return named


def _as_written(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method without autograd and autocast, whatever the caller's context."""

    @wraps(method)
    def run(self: Factored, *arguments: Any) -> Any:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return method(self, *arguments)

    return run


@dataclass(frozen=True)
class Factored:
    """``G = scale · W1ᵀ S W1`` with ``S = (W2ᵀ W2) ∘ AᵀA``, none of it multiplied out.

    Without W2, S is ``gram`` itself; without W1, G is S. Both are in the working precision.
    """

    width: int  # h
    gram: Panel  # AᵀA, or S
    w2: Tensor | None  # [C, h]
    w1: Tensor | None  # [h, d]
    scale: float
    dtype: torch.dtype
    device: torch.device
    whole: Tensor | None = None  # AᵀA itself, contiguous, where a final product may read it
    finish: str = "auto"  # the backend of that product

    @property
    def size(self) -> int:
        """d, the width of G."""
        return self.width if self.w1 is None else self.w1.shape[1]

    @_as_written
    def matrix(self, nonfinite: Tensor | None = None) -> Tensor:
        """G in the working precision, ``[d, d]``, exactly symmetric; NaN where ``nonfinite[0]`` is above zero.

        Only the upper triangle of S is formed, a panel at a time: with U = S above the diagonal plus half of the
        diagonal, ``G = X + Xᵀ``, ``X = W1ᵀ U W1``.
        """
        if self.whole is not None and self.w1 is not None:
            return primitives.agop_finalise(
                self.w1, self.w2, self.whole, scale=self.scale, nonfinite=nonfinite, backend=self.finish
            )
        g = torch.zeros(self.size, self.size, dtype=self.dtype, device=self.device)
        for start, stop, s in self._upper_panels(self.dtype):
            if self.w1 is None:
                g[start:stop, start:] = s
            else:
                g.addmm_(self.w1[start:stop].t(), s @ self.w1[start:])
        return primitives.nan_where(nonfinite, g.add_(g.t().clone()).mul_(self.scale))

    @_as_written
    def diagonal(self) -> Tensor:
        """The diagonal of G, float64 ``[d]``, in memory O(h d / panels)."""
        g = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        w1 = None if self.w1 is None else self.w1.double()
        for start, stop, s in self._upper_panels(torch.float64):
            if w1 is None:
                g[start:stop] = 2 * s.diagonal()
            else:
                g += 2 * (w1[start:stop] * (s @ w1[start:])).sum(dim=0)
        return g * self.scale

    @_as_written
    def operator(self) -> Callable[[Tensor], Tensor]:
        """``v -> G v`` on float64 ``[d]`` or ``[d, k]`` as ``W1ᵀ (S (W1 v))``; holds S, ``[h, h]``."""
        upper = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
        for start, stop, s in self._upper_panels(torch.float64):
            upper[start:stop, start:] = s
        w1 = None if self.w1 is None else self.w1.double()

        def multiply(v: Tensor) -> Tensor:
            v = v if w1 is None else w1 @ v
            v = upper @ v + upper.t() @ v
            return (v if w1 is None else w1.t() @ v) * self.scale

        return multiply

    def _upper_panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, U[start:stop, start:])`` of the upper half U of S."""
        step = max(_PANEL, -(-self.width // 8))
        for start in range(0, self.width, step):
            stop = min(start + step, self.width)
            s = self.gram(start, stop).to(dtype)
            if self.w2 is not None:
                w2 = self.w2.to(dtype)
                s = s * (w2[:, start:stop].t() @ w2[:, start:])
            s.triu_().diagonal().mul_(0.5)
            yield start, stop, s


def _lanczos(multiply: Callable[[Tensor], Tensor], d: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
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
