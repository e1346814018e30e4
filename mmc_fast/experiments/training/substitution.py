"""Which present latents stand in for absent modalities: the rule, and when it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmc_fast.nn.substitution import (
    cosine_sums,
    foreign_source,
    mean_source,
    pairwise_source,
    rank_modalities,
    ranked_source,
    similarity_of_sums,
)

from ..data import MultimodalDataset, Part
from .model import MultimodalModel
from .parts import stream_rows
from .processes import Processes

_RANKING_PARTS = ("train", "validation")


def ranking_parts(dataset: MultimodalDataset) -> list[Part]:
    """The only rows that a ranking may see: train and validation."""
    return [dataset.part(name) for name in _RANKING_PARTS]


@torch.no_grad()
def refresh(
    model: MultimodalModel, parts: Sequence[Part], reference: str | None, processes: Processes | None = None
) -> None:
    """Recompute similarity and order of the modalities from the latents of ``parts``; call it when weights changed.

    ``reference``: name of the strongest modality. Where it has no head (or is None) the order starts at the modality
    with the highest mean similarity to the others. The processes of ``processes`` share the rows. Does nothing for a model
    without heads.
    """
    if model.head is None:
        return
    processes = processes or Processes()
    sums: Tensor | None = None
    for pieces in _pieces(parts, processes):
        latents = torch.cat([_latents(model, part, rows) for part, rows in pieces], dim=1)
        present = torch.cat([model.head_present(part.present[rows]) for part, rows in pieces])
        found = cosine_sums(latents, present)
        sums = found if sums is None else sums + found
    if sums is None:
        sums = torch.zeros(2, len(model.columns), len(model.columns), dtype=torch.float64)
    similarity = similarity_of_sums(processes.sum(sums))
    names = [model.modalities[i] for i in model.columns]
    if reference in names:
        head = names.index(reference)
    else:
        head = int(similarity.sum(1).argmax())
    model.similarity.copy_(similarity)
    model.order.copy_(torch.tensor(rank_modalities(similarity, head)))


def _latents(model: MultimodalModel, part: Part, rows: slice) -> Tensor:
    device = model.prior.device
    return model.latents([x[rows].to(device) for x in part.features], part.present[rows].to(device)).cpu()


def _pieces(parts: Sequence[Part], processes: Processes) -> list[list[tuple[Part, slice]]]:
    """What is in memory together: all rows of this process, or some of them where they are streamed."""
    mine = [(part, processes.rows(len(part))) for part in parts]
    if not any(part.streamed for part in parts):
        return [mine]
    return [
        [(part, slice(start, min(start + stream_rows(part), rows.stop)))]
        for part, rows in mine
        for start in range(rows.start, rows.stop, stream_rows(part))
    ]


def source_for(model: MultimodalModel, present: Tensor, random: torch.Generator | None = None) -> Tensor | None:
    """Source of every target modality for presence bool ``[B, m]``; None where the model has no heads.

    ``random``: in training, where "each" draws the present latent that fills.

    Raises:
        RuntimeError: a ranked rule whose ranking was never computed.
    """
    if model.head is None or model.config.ebr is None:
        return None
    available = model.head_present(present)
    if model.config.ebr.substitute == "each" and random is not None:
        foreign = foreign_source(available, len(available), available.shape[1], random)
        return torch.where(available, torch.arange(available.shape[1], device=available.device), foreign)
    if model.config.ebr.substitute in ("mean", "each"):
        return mean_source(available)
    if int(model.order[0]) < 0:
        raise RuntimeError("the ranking of modalities was never computed; call substitution.refresh first")
    if model.config.ebr.ranking == "pairwise":
        return pairwise_source(available, model.similarity)
    return ranked_source(available, model.order.tolist())


def fills(model: MultimodalModel, present: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
    """The sources of one or several fills of a batch, and which rows ``[B]`` each is for; predictions are averaged over them.

    "each": the mean of the present latents, and every present latent in turn.
    """
    every = torch.ones(len(present), dtype=torch.bool, device=present.device)
    yield source_for(model, present), every
    if model.head is not None and model.config.ebr is not None and model.config.ebr.substitute == "each":
        available = model.head_present(present)
        own = torch.arange(available.shape[1], device=present.device)
        for j in own.tolist():
            here = available[:, j]
            yield torch.where(available, own, torch.where(here, j, -1)[:, None]), here & ~available.all(1)


def describe(model: MultimodalModel, reference: str | None) -> dict | None:
    """The rule as it stands in results.json; None for a model without heads."""
    if model.head is None or model.config.ebr is None:
        return None
    names = [model.modalities[i] for i in model.columns]
    return {
        "substitute": model.config.ebr.substitute,
        "ranking": model.config.ebr.ranking,
        "reference": reference if reference in names else names[int(model.order[0])],
        "order": [names[i] for i in model.order.tolist()],
        "similarity": {
            a: dict(zip(names, row, strict=True)) for a, row in zip(names, model.similarity.tolist(), strict=True)
        },
        "parts": list(_RANKING_PARTS),
    }
