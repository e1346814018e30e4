"""Which present latent stands in for a missing modality (paper, section 3.4)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmc_fast.errors import InputError

__all__ = [
    "cosine_sums",
    "foreign_source",
    "latent_similarity",
    "mean_source",
    "pairwise_source",
    "rank_modalities",
    "ranked_source",
    "similarity_of_sums",
]


def latent_similarity(latents: Tensor, present: Tensor) -> Tensor:
    """Mean cosine of latents ``[m, N, k]`` over samples that have both modalities: ``[m, m]``, float64.

    ``present`` is bool ``[N, m]``. A pair that no sample has together gets -1 and a warning; the diagonal is 1.
    Use training (and validation) samples only. Cost: ``O(N m^2 k)``.
    """
    return similarity_of_sums(cosine_sums(latents, present))


def cosine_sums(latents: Tensor, present: Tensor) -> Tensor:
    """Cosines summed over samples that have both modalities, and their number: float64 ``[2, m, m]``, upper triangles.

    Sums of pieces of the samples add up to that of all.
    """
    m = latents.shape[0]
    unit = F.normalize(latents.double(), dim=-1)
    sums = torch.zeros(2, m, m, dtype=torch.float64)
    for i in range(m):
        for j in range(i + 1, m):
            both = present[:, i] & present[:, j]
            sums[0, i, j] = (unit[i, both] * unit[j, both]).sum()
            sums[1, i, j] = both.sum()
    return sums


def similarity_of_sums(sums: Tensor) -> Tensor:
    """The similarity ``[m, m]`` of :func:`latent_similarity` from :func:`cosine_sums`."""
    m = sums.shape[1]
    similarity = torch.eye(m, dtype=torch.float64)
    for i in range(m):
        for j in range(i + 1, m):
            if sums[1, i, j] == 0:
                warnings.warn(
                    f"no sample has modalities {i} and {j} together; their similarity is set to -1",
                    stacklevel=2,
                )
                value = -1.0
            else:
                value = float(sums[0, i, j]) / int(sums[1, i, j])
            if value != value:
                raise InputError(
                    f"latents of modality {i} or {j} are not finite, so they cannot be ranked; "
                    "rescale the features or lower the learning rate"
                )
            similarity[i, j] = similarity[j, i] = value
    return similarity


def rank_modalities(similarity: Tensor, reference: int) -> list[int]:
    """Modalities by falling similarity to ``reference``, which comes first; equal ones keep their index order."""
    m = similarity.shape[0]
    if not 0 <= reference < m:
        raise ValueError(f"reference is {reference}; with {m} modalities allowed are 0 to {m - 1}")
    others = sorted((j for j in range(m) if j != reference), key=lambda j: (-float(similarity[reference, j]), j))
    return [reference, *others]


def ranked_source(present: Tensor, order: Sequence[int]) -> Tensor:
    """int64 ``[B, m]``: a missing modality takes the present one nearest to it in the ranked list ``order``.

    Of two equally near ones it takes the one closer to the reference (the head of the list). A present modality
    is its own source; a row with nothing present gets -1.
    """
    m = present.shape[1]
    if sorted(order) != list(range(m)):
        raise ValueError(f"order is {list(order)}; expected a permutation of 0 to {m - 1}")
    place = {j: n for n, j in enumerate(order)}

    def nearest_first(i: int) -> list[int]:
        return sorted(range(m), key=lambda j: (abs(place[i] - place[j]), place[j]))

    return _first_present(present, [nearest_first(i) for i in range(m)])


def pairwise_source(present: Tensor, similarity: Tensor) -> Tensor:
    """int64 ``[B, m]``: a missing modality takes the present one most similar to it (ties: lower index)."""
    m = present.shape[1]
    if tuple(similarity.shape) != (m, m):
        raise ValueError(f"similarity has shape {list(similarity.shape)}; expected [{m}, {m}]")

    def most_similar_first(i: int) -> list[int]:
        return sorted(range(m), key=lambda j: (j != i, -float(similarity[i, j]), j))

    return _first_present(present, [most_similar_first(i) for i in range(m)])


def _first_present(present: Tensor, preference: list[list[int]]) -> Tensor:
    order = torch.tensor(preference, device=present.device)  # [m, m], best first
    available = present[:, order]  # [B, m, m]
    first = available.to(torch.uint8).argmax(-1)  # [B, m]
    chosen = order.expand(present.shape[0], -1, -1).gather(2, first.unsqueeze(-1)).squeeze(-1)
    return torch.where(available.any(-1), chosen, -1)


def mean_source(present: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """float ``[B, m, m]``: a present modality is its own source, a missing one takes the mean of those."""
    m = present.shape[1]
    own = torch.eye(m, dtype=dtype, device=present.device)
    mean = present.to(dtype) / present.sum(1, keepdim=True).clamp(min=1)  # [B, m]
    return torch.where(present.unsqueeze(-1), own, mean.unsqueeze(1))


def foreign_source(present: Tensor | None, batch: int, m: int, generator: torch.Generator) -> Tensor:
    """int64 ``[B, m]``: for every target modality another present one, drawn uniformly; -1 where there is none."""
    available = torch.ones(batch, m, m, dtype=torch.bool, device=generator.device)
    if present is not None:
        available &= present.unsqueeze(1)
    available &= ~torch.eye(m, dtype=torch.bool, device=generator.device)
    draw = torch.rand(batch, m, m, generator=generator, device=generator.device)
    chosen = draw.masked_fill(~available, -1.0).argmax(-1)
    return torch.where(available.any(-1), chosen, -1)
