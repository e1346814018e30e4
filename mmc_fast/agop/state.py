"""What an AGOP accumulator remembers between batches: exact counts, or moments in float64. All merge and resume."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmc_fast.ops.agop import op as primitives

from .gram import add_gram

__all__ = ["CountState", "MomentState", "from_triangle", "to_triangle"]

_STEP_ROWS = 1024  # rows summed in the working precision before they go to float64
_NARROW = 64  # BLAS sums narrow products in one chain, so these are summed in float64 at once


def to_triangle(matrix: Tensor) -> Tensor:
    """The upper triangle with its diagonal, row after row: ``[h, h] -> [h (h + 1) / 2]``."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def from_triangle(packed: Tensor, width: int) -> Tensor:
    """Undo ``to_triangle``; zeros below the diagonal."""
    matrix = packed.new_zeros(width, width)
    rows, columns = torch.triu_indices(width, width, device=packed.device)
    matrix[rows, columns] = packed
    return matrix


class CountState:
    """Co-activation counts: int64 ``[h, h]``, exact, so the order of batches and processes does not matter."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.counts = torch.zeros(width, width, dtype=torch.int64, device=device)  # upper triangle

    def merge(self, other: CountState) -> None:
        self.counts += other.counts.to(self.counts.device)

    def detach_copy(self) -> CountState:
        copy = CountState(0, self.counts.device)
        copy.counts = self.counts.clone()
        return copy

    def to_tensors(self) -> dict[str, Tensor]:
        return {"counts": to_triangle(self.counts)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.counts = from_triangle(tensors["counts"].to(self.counts), len(self.counts))

    def to_sums(self) -> Iterator[Tensor]:
        """Quantities that add up across processes; counts below 2^53 are exact in float64."""
        yield to_triangle(self.counts).double()

    def load_sums(self, sums: Iterator[Tensor]) -> None:
        self.counts = from_triangle(next(sums).to(torch.int64), len(self.counts))


class MomentState:
    """``Σ BᵀB`` over samples, each with rows ``B [R, h]``, and with ``center`` about the mean row of each of the R.

    Batches are merged by means and centred sums (Chan, Golub, LeVeque 1983), which does not cancel. The precision of
    the rows sums some hundred of them, float64 sums these.
    """

    def __init__(self, rows: int, width: int, center: bool, device: torch.device, kernel: str | None = None) -> None:
        self.n = 0
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)  # upper triangle
        self.mean = torch.zeros(rows, width, dtype=torch.float64, device=device) if center else None
        self._kernel = kernel  # a backend whose kernel adds to float64 by itself

    def add(self, rows: Tensor, first: int = 0) -> None:
        """Add ``rows [n, R', h]``: rows ``first .. first + R'`` of n further samples; ``advance(n)`` ends the batch."""
        samples, count, width = rows.shape
        if not samples:
            return
        if self.mean is not None:
            batch_mean = rows.mean(dim=0)
            rows = rows - batch_mean
            mean = self.mean[first : first + count]
            delta = batch_mean.double() - mean
            self.gram.addmm_(delta.t(), delta, alpha=self.n * samples / (self.n + samples))
            mean += delta * (samples / (self.n + samples))
        flat = rows.reshape(samples * count, width)
        if self._kernel is not None:
            primitives.syrk_update(flat, self.gram, backend=self._kernel)
            return
        if flat.dtype == torch.float64 or width <= _NARROW:
            add_gram(flat.double(), self.gram)
            return
        for part in flat.split(_STEP_ROWS):
            step = part.new_zeros(width, width)
            add_gram(part, step)
            self.gram += step

    def add_moments(self, samples: int, gram: Tensor, mean: Tensor | None) -> None:
        """Add a batch given by its (centred) Gram matrix and its mean rows."""
        self.gram += gram
        if self.mean is not None and mean is not None and samples:
            delta = mean - self.mean
            total = self.n + samples
            self.gram.addmm_(delta.t(), delta, alpha=self.n * samples / total)
            self.mean += delta * (samples / total)

    def advance(self, samples: int) -> None:
        """Close a batch of so many samples."""
        self.n += samples

    def merge(self, other: MomentState) -> None:
        device = self.gram.device
        mean = None if other.mean is None else other.mean.to(device)
        self.add_moments(other.n, other.gram.to(device), mean)
        self.advance(other.n)

    def detach_copy(self) -> MomentState:
        copy = MomentState(0, 0, False, self.gram.device)
        copy.n, copy.gram, copy._kernel = self.n, self.gram.clone(), self._kernel
        copy.mean = None if self.mean is None else self.mean.clone()
        return copy

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"n": torch.tensor(self.n), "gram": to_triangle(self.gram)}
        if self.mean is not None:
            tensors["mean"] = self.mean.clone()
        return tensors

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.gram.copy_(from_triangle(tensors["gram"].to(self.gram), len(self.gram)))
        self.n = int(tensors["n"])
        if self.mean is not None:
            self.mean.copy_(tensors["mean"])

    def to_sums(self) -> Iterator[Tensor]:
        gram = self.gram
        yield torch.tensor([self.n], dtype=torch.float64, device=gram.device)
        if self.mean is None:
            yield to_triangle(gram)
        else:
            yield to_triangle(torch.addmm(gram, self.mean.t(), self.mean, alpha=self.n))
            yield self.mean.reshape(-1) * self.n

    def load_sums(self, sums: Iterator[Tensor]) -> None:
        self.n = int(next(sums))
        gram = from_triangle(next(sums), len(self.gram))
        if self.mean is not None:
            self.mean = next(sums).reshape(self.mean.shape) / max(1, self.n)
            gram.addmm_(self.mean.t(), self.mean, alpha=-self.n)
        self.gram = gram
