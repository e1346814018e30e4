"""Models, batches and a finished diagnosis that several test files share."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast.diagnose import Diagnosis, diagnose
from mmc_fast.testing import planted_head

WIDTHS = {"image": 6, "audio": 4}


class Attention(nn.Module):
    """A fusion that is no chain: one token per modality, attention, mean, logits."""

    def __init__(self, generator: torch.Generator, classes: int = 3) -> None:
        super().__init__()
        self.image, self.audio = nn.Linear(6, 8), nn.Linear(4, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, classes)
        for p in self.parameters():
            p.data.normal_(generator=generator).mul_(0.6)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        tokens = torch.stack([self.image(features["image"]), self.audio(features["audio"])], 1)
        return self.out(self.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class Toy:
    """An adapter whose batches are ``(image, audio, labels)``."""

    def __init__(self, fusion: nn.Module, head: nn.Module | None = None) -> None:
        self.model, self.head = fusion.eval(), head

    def encode(self, batch: Any) -> dict[str, Tensor]:
        return {"image": batch[0], "audio": batch[1]}

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat(list(features.values()), 1)) if self.head is not None else self.model(features)


def batches(generator: torch.Generator, n: int = 500, size: int = 64, classes: int = 3) -> list[tuple[Tensor, ...]]:
    image, audio = torch.randn(n, 6, generator=generator), torch.randn(n, 4, generator=generator) * 3
    audio[:, 0] += image[:, 0]
    labels = torch.randint(classes, (n,), generator=generator)
    return list(zip(image.split(size), audio.split(size), labels.split(size), strict=True))


def whole(loader: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


def chain(generator: torch.Generator, classes: int = 3) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, classes))
    for p in head.parameters():
        p.data.normal_(generator=generator)
    return head.eval()


@functools.cache
def example(**options: Any) -> Diagnosis:
    """Half of the neurons shared, every measure that needs no second model."""
    planted = planted_head(4, sharing=0.5, jitter=0.1)
    random = torch.Generator().manual_seed(4)
    unimodal = {name: torch.randn(20, 8, generator=random) for name in "ab"}
    return diagnose(planted, planted.batches(), **{"control": True, "unimodal_weights": unimodal} | options)
