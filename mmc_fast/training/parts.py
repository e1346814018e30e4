"""Parts of a data set on a device, and what identifies a data set."""

from __future__ import annotations

import hashlib

import torch

from ..data import MultimodalDataset, Part

__all__ = ["fingerprint", "to_device"]


def to_device(part: Part, device: str | torch.device) -> Part:
    """The same rows on ``device``."""
    return Part(
        [x.to(device) for x in part.features],
        part.present.to(device),
        part.labels.to(device),
        part.index.to(device),
    )


def fingerprint(dataset: MultimodalDataset) -> str:
    """SHA-256 over names, features, presence, labels and split: equal for equal data, whatever file it came from."""
    digest = hashlib.sha256()
    for name, x in dataset.features.items():
        digest.update(f"{name}\x1f{list(x.shape)}\x1f".encode())
        digest.update(x.contiguous().numpy().data)
    for t in (dataset.present, dataset.labels, dataset.split):
        digest.update(t.contiguous().numpy().data)
    return digest.hexdigest()
