"""Parts of a data set on a device, and what identifies a data set."""

from __future__ import annotations

import hashlib

from collections.abc import Iterator

import torch
from torch import Tensor

from ..data import MultimodalDataset, Part

__all__ = ["Batches", "fingerprint", "row_pieces", "to_device"]

_ROWS = 4096  # of a streamed part that are in memory at a time


def to_device(part: Part, device: str | torch.device) -> Part:
    """The same rows on ``device``."""
    return Part(
        [x.to(device) for x in part.features],
        part.present.to(device),
        part.labels.to(device),
        part.index.to(device),
        part.streamed,
    )


class Batches:
    """The rows of a part in a given order, batch by batch: ``(rows [b], features, labels)``.

    The features of a part in memory are put in order once; those of a streamed one are read when they are asked for.
    """

    def __init__(self, part: Part, order: Tensor, size: int) -> None:
        self.part, self.rows = part, order.split(size)
        self.ordered = None if part.streamed else [x[order].split(size) for x in part.features]
        self.labels = part.labels[order].split(size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> tuple[Tensor, list[Tensor], Tensor]:
        rows = self.rows[n]
        features = [x[rows] for x in self.part.features] if self.ordered is None else [x[n] for x in self.ordered]
        return rows, features, self.labels[n]


def row_pieces(part: Part, chosen: Tensor) -> Iterator[Tensor]:
    """The chosen rows (bool ``[N]``) for indexing: all at once, or pieces of them where the part is streamed."""
    if not part.streamed:
        yield chosen
        return
    yield from chosen.nonzero().flatten().split(_ROWS)


def fingerprint(dataset: MultimodalDataset) -> str:
    """SHA-256 over names, features, presence, labels and split: equal for equal data, whatever file it came from."""
    digest = hashlib.sha256()
    for name, x in dataset.features.items():
        digest.update(f"{name}\x1f{list(x.shape)}\x1f".encode())
        digest.update(x.contiguous().numpy().data)
    for t in (dataset.present, dataset.labels, dataset.split):
        digest.update(t.contiguous().numpy().data)
    return digest.hexdigest()
