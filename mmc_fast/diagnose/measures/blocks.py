"""What a layer uses of each modality: blocks of its AGOP, weighed by the covariance of its inputs.

``G`` is the AGOP at an input u made of m modality blocks, ``Σ`` the covariance of u. Raw blocks of G change when a
modality changes its units; everything here is unchanged by any invertible linear map inside of a modality, such as a
rotation or a rescaling that the weights undo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmc_fast.agop.result import resolve_blocks
from mmc_fast.errors import InputError

Blocks = Mapping[str, int] | Sequence[int]


def use_shares(gram: Tensor, covariance: Tensor, blocks: Blocks) -> Tensor:
    """Share of the head's local response that comes from each modality: ``tr(G_ii Σ_ii) / Σ_j tr(G_jj Σ_jj)``.

    ``tr(G_ii Σ_ii) / N`` is the mean squared change of the outputs when modality i moves as it does in the data.

    Args:
        gram: ``G [d, d]``. covariance: ``Σ [d, d]`` of the same inputs. blocks: widths of the modalities, in order.

    Returns ``[m]`` float64 in [0, 1] with sum 1; all zeros where the head uses nothing at all.

    Raises InputError for shapes that do not fit or values that are not finite. Time ``O(Σ d_i²)``.
    Limits: first order and at the data, so a saturated head uses little; blind to what could be used. Two modalities
    that say the same share the use in whatever way training left it.
    Source: lemma 2 and theorem 3 of the collapse paper; the weighting by Σ is this project's.
    """
    g, s, widths = _checked("use_shares", gram, covariance, blocks)
    used = torch.stack([(gi * si).sum() for gi, si in zip(_diagonal(g, widths), _diagonal(s, widths), strict=True)])
    used = used.clamp(min=0)
    total = used.sum()
    return used / total if total > 0 else torch.zeros_like(used)


def block_energies(gram: Tensor, covariance: Tensor, blocks: Blocks) -> Tensor:
    """``‖Σ_ii^½ G_ij Σ_jj^½‖_F² = tr(G_ij Σ_jj G_ji Σ_ii)`` over their sum: the block heat map, ``[m, m]`` float64.

    All zeros where G is zero on the support of the data. Time ``O(d³)``. Errors as in :func:`use_shares`.
    """
    g, s, widths = _checked("block_energies", gram, covariance, blocks)
    rows = [part.split(widths, 1) for part in g.split(widths, 0)]
    sigma = _diagonal(s, widths)
    m = len(widths)
    energy = g.new_zeros(m, m)
    for i in range(m):
        for j in range(m):
            energy[i, j] = ((sigma[i] @ rows[i][j]) * (rows[i][j] @ sigma[j])).sum()
    energy = energy.clamp(min=0)
    total = energy.sum()
    return energy / total if total > 0 else energy


def entanglement(gram: Tensor, covariance: Tensor, blocks: Blocks) -> float:
    """How much of G couples different modalities: ``Σ_{i≠j} ‖G̃_ij‖² / ‖G̃‖²`` on Σ-whitened blocks.

    0: outputs respond to modalities separately; larger: the same response directions read several modalities. Two
    modalities that act through one shared direction with equal strength give ½, m of them ``1 − 1/m``. 0 for G = 0.
    Time ``O(d³)``. Source: theorem 2 of the collapse paper (mixed blocks); the whitening is this project's.
    Limits: says that outputs weigh modalities together, not that the sharing harms. The output layer alone can do so with
    neurons that each read one modality, so it is no measure of shared neurons; see ``weights.modality_entropy``.
    """
    energy = block_energies(gram, covariance, blocks)
    total = energy.sum()
    return float((total - energy.diagonal().sum()) / total) if total > 0 else 0.0


def whitened(gram: Tensor, covariance: Tensor, blocks: Blocks) -> Tensor:
    """``G̃ = B G B`` with ``B`` the block-diagonal square root of Σ: G in units of each modality's spread, ``[d, d]``.

    Its eigenvalues do not depend on the units or the orientation inside of a modality. Time ``O(d³)``.
    """
    g, s, widths = _checked("whitened", gram, covariance, blocks)
    root = torch.block_diag(*[_square_root(block) for block in _diagonal(s, widths)])
    product = root @ g @ root
    return (product + product.t()) / 2


def spectrum(matrix: Tensor) -> Tensor:
    """Eigenvalues of a symmetric positive semidefinite matrix, descending, rounding below zero cut off; float64."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"spectrum: got a matrix {list(matrix.shape)}; give a square symmetric one")
    if not torch.isfinite(matrix).all():
        raise InputError("spectrum: the matrix holds NaN or infinite values; remove such samples first")
    return torch.linalg.eigvalsh(matrix.double()).flip(0).clamp(min=0)


def effective_rank(values: Tensor) -> float:
    """``exp(H(p))`` with ``p = σ / Σσ``: between 1 and the number of values; 0 where all are zero.

    ``values``: singular values (of a Gram matrix: its eigenvalues). Source: Roy and Vetterli, EUSIPCO 2007.
    """
    total = values.double().sum()
    if not total > 0:
        return 0.0
    p = values.double() / total
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def stable_rank(values: Tensor) -> float:
    """``‖A‖_F² / ‖A‖_2² = Σσ² / max σ²``: at most the rank, insensitive to small values; 0 for a zero matrix."""
    squares = values.double().square()
    largest = squares.max() if len(squares) else squares.sum()
    return float(squares.sum() / largest) if largest > 0 else 0.0


def numerical_rank(values: Tensor, tolerance: float = 1e-3) -> int:
    """How many singular values exceed ``tolerance`` times the largest. State the tolerance beside the number."""
    if not 0 <= tolerance < 1:
        raise InputError(f"numerical_rank: tolerance is {tolerance}; give a share of the largest value in [0, 1)")
    largest = float(values.max()) if len(values) else 0.0
    return int((values > tolerance * largest).sum()) if largest > 0 else 0


@dataclass(frozen=True)
class Ranks:
    """Three ranks of one spectrum, and the tolerance of the first."""

    numerical: int
    effective: float
    stable: float
    tolerance: float


def ranks(values: Tensor, tolerance: float = 1e-3) -> Ranks:
    """:func:`numerical_rank`, :func:`effective_rank` and :func:`stable_rank` of singular values ``[r]``."""
    return Ranks(numerical_rank(values, tolerance), effective_rank(values), stable_rank(values), tolerance)


def top_directions(gram: Tensor, covariance: Tensor, blocks: Blocks, k: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """The k strongest response directions of the whitened G, and how much of each lies in every modality.

    Returns eigenvalues ``[k]`` (descending), vectors ``[d, k]`` in whitened coordinates (free in sign), and shares
    ``[k, m]`` = squared length of the vector inside each block, rows summing to 1. Time ``O(d³)``.
    """
    _, _, widths = _checked("top_directions", gram, covariance, blocks)
    d = gram.shape[0]
    if not 1 <= k <= d:
        raise InputError(f"top_directions: k is {k}; give an integer from 1 to {d}")
    values, vectors = torch.linalg.eigh(whitened(gram, covariance, blocks))
    values, vectors = values[-k:].flip(0).clamp(min=0), vectors[:, -k:].flip(1)
    shares = torch.stack([part.square().sum(0) for part in vectors.split(widths)], dim=1)
    return values, vectors, shares


def _checked(name: str, gram: Tensor, covariance: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, list[int]]:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or covariance.shape != gram.shape:
        raise InputError(
            f"{name}: gram is {list(gram.shape)} and covariance {list(covariance.shape)}; give two [d, d] of one layer"
        )
    if not (torch.isfinite(gram).all() and torch.isfinite(covariance).all()):
        raise InputError(f"{name}: gram or covariance holds NaN or infinite values; remove such samples first")
    return gram.double(), covariance.double(), list(resolve_blocks(blocks, gram.shape[0]).values())


def _diagonal(matrix: Tensor, widths: Sequence[int]) -> list[Tensor]:
    blocks, start = [], 0
    for width in widths:
        blocks.append(matrix[start : start + width, start : start + width])
        start += width
    return blocks


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.t()) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
