"""Parts of a data set on a device, what identifies a data set, and the task of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data import MultimodalDataset, Part
from ..tasks import Task
from .config import TrainConfig

STREAM_ROWS = 4096  # of a streamed part that are in memory at a time, fewer where they are wide
_STREAM_VALUES = 1 << 20


def to_device(part: Part, device: str | torch.device) -> Part:
    """The same rows on ``device``; the features of a streamed part stay where they are."""
    return Part(
        part.features if part.streamed else [x.to(device) for x in part.features],
        part.present.to(device),
        part.labels.to(device),
        part.index.to(device),
        part.streamed,
    )


def task_of(dataset: MultimodalDataset, config: TrainConfig) -> Task:
    """The task of the data with the class weights of the settings. Raises InputError where it has no classes."""
    if config.class_weights == "none":
        return dataset.task
    return dataset.task.weighted(dataset.labels[dataset.split == 0])


class Batches:
    """The rows of a part in a given order, batch by batch: ``(rows [b], features, labels)``.

    The features of a part in memory are put in order once; those of a streamed one, or with ``lazy``, are read when
    they are asked for.
    """

    def __init__(self, part: Part, order: Tensor, size: int, lazy: bool = False) -> None:
        self.part, self.rows = part, order.split(size)
        self.ordered = None if part.streamed or lazy else [x[order].split(size) for x in part.features]
        self.labels = part.labels[order].split(size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> tuple[Tensor, list[Tensor], Tensor]:
        return self.rows[n], self.features(n, slice(None)), self.labels[n]

    def features(self, n: int, rows: slice) -> list[Tensor]:
        """Features of some rows of batch ``n``."""
        if self.ordered is not None:
            return [x[n][rows] for x in self.ordered]
        chosen = self.rows[n][rows]
        if self.part.streamed:
            there = chosen.cpu()
            return [x[there].to(chosen.device) for x in self.part.features]
        return [x[chosen] for x in self.part.features]


def stream_rows(part: Part) -> int:
    """Rows of a streamed part that are read at a time."""
    return max(1, min(STREAM_ROWS, _STREAM_VALUES // max(x.shape[1] for x in part.features)))


def row_pieces(part: Part, chosen: Tensor) -> Iterator[Tensor]:
    """The chosen rows (bool ``[N]``) for indexing: all at once, or pieces of them where the part is streamed."""
    if not part.streamed:
        yield chosen
        return
    yield from chosen.nonzero().flatten().split(stream_rows(part))


def fingerprint(dataset: MultimodalDataset) -> str:
    """SHA-256 over names, features, presence, labels and split: equal for equal data, whatever file it came from."""
    digest = hashlib.sha256()
    for name, x in dataset.features.items():
        digest.update(f"{name}\x1f{list(x.shape)}\x1f".encode())
        digest.update(x.contiguous().numpy().data)
    for t in (dataset.present, dataset.labels, dataset.split):
        digest.update(t.contiguous().numpy().data)
    return digest.hexdigest()
